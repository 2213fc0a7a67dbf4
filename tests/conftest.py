"One thread, no display, Ctrl-C as in the foreground, and a fixed seed before each test."
import os, signal
os.environ['MPLBACKEND'] = 'Agg'

import pytest
import torch
from exp.nb_00 import set_seed

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it


@pytest.fixture(autouse=True)
def fixed_seed():
    set_seed(42)
    torch.set_flush_denormal(False)  # what torch 2.4 compiles turns it on, for the process that loads it
