"One thread, no display, and a fixed seed before each test."
import os
os.environ['MPLBACKEND'] = 'Agg'

import pytest
import torch
from exp.nb_00 import set_seed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed(): set_seed(42)
