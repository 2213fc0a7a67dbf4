"Everything the series exports, and the usual aliases, for a scratch notebook of your own: `from exp.all import *`."
import math
from functools import partial
from pathlib import Path
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim, tensor

from exp.nb_00 import *
from exp.nb_01 import *
from exp.nb_02 import *
from exp.nb_03 import *
from exp.nb_04 import *
from exp.nb_05 import *
from exp.nb_10 import *
from exp.nb_11 import *
from exp.nb_12 import *
from exp.nb_13 import *
from exp.nb_14 import *
from exp.nb_15 import *
from exp.nb_16 import *
from exp.nb_20 import *
from exp.nb_21 import *
from exp.nb_22 import *
from exp.nb_23 import *
from exp.nb_24 import *
from exp.nb_25 import *
from exp.nb_30 import *
from exp.nb_31 import *
from exp.nb_32 import *
from exp.nb_40 import *
from exp.nb_41 import *
from exp.nb_42 import *
from exp.nb_43 import *
from exp.nb_44 import *
