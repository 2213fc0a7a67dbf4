"One thread, no display, no GPU, Ctrl-C as in the foreground, and a fixed seed before each test."
import os, signal
os.environ['MPLBACKEND'] = 'Agg'
# Bits are compared and processes forked, which is for CPUs. `GPU_TESTS=1 pytest -k 'cuda or gpu or nccl' tests` is for GPUs.
if not os.environ.get('GPU_TESTS'): os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest
import torch
from exp.nb_00 import set_seed

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it


@pytest.fixture(autouse=True)
def fixed_seed():
    set_seed(42)
    torch.set_flush_denormal(False)  # what torch 2.4 compiles turns it on, for the process that loads it
