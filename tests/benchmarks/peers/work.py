"""What every row of the table does: the same rows in the same order, from the same first weights, on one thread but for `cnn2`."""
import gc, shutil, sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import FunctionType
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from exp.nb_00 import set_seed
from exp.nb_01 import get_data
from exp.nb_02 import Model

SEED = 42                                 # of the first weights, and of the order of the training rows
SIZES = {f'{k}x': 25_000*k for k in (1, 2, 4, 8)}  # rows of made-up data, to see how time and memory grow


@dataclass
class Work:
    title: str
    base: tuple                           # the row that the others are compared with: (library, variant)
    bs: int = 64                          # rows of a training batch; validation takes twice as many
    lr: float = 0.3
    n: int = 50_000                       # training rows; a last short batch is dropped
    n_valid: int = 10_000                 # validation rows; 0: training only
    passes: int = 1                       # through the training rows
    threads: int = 1                      # if one, on one core

BY_HAND = 'by hand', 'lean'
WORKS = {
    'mlp': Work('An epoch of digits: 784-50-10, batches of 64, then validation', BY_HAND),
    'tiny': Work('A model too small to matter: 1000 batches of 64', BY_HAND, n=64_000, n_valid=0),
    'cnn': Work('A small convolutional network: batches of 256, then validation', BY_HAND, bs=256, lr=0.1, n=256*80, n_valid=5_000),
    'cnn2': Work('The same network on two threads, on whichever cores', BY_HAND, bs=256, lr=0.1, n=256*80, n_valid=5_000, threads=2),
    'loading': Work('Loading: batches of 64 rows of 784 floats, nothing trained', ('x[idx]', ''), n_valid=0, passes=4),
    'data': Work('Learner.fit as the data grows', ('exp', '1x'), n=SIZES['1x'], n_valid=0),
    'callbacks': Work('Learner.fit as callbacks are added: 1000 batches of the tiny model', ('exp', '0 callbacks'), n=64_000,
                      n_valid=0)}
OF_ALL = 'mlp', 'tiny', 'cnn'             # what every library trains
CNNS = 'cnn', 'cnn2'
TRAINING = *OF_ALL, 'cnn2'


@dataclass
class Row:
    worker: str           # rows of one worker share a process
    works: tuple          # names of `WORKS`
    prepare: FunctionType

ROWS = {}                 # (library, variant) -> Row

def row(library, *variants, works=OF_ALL, worker=None, needs=None):
    "Enter a function into the table, unless a program that it needs is missing."
    def enter(f):
        if needs and not shutil.which(needs):
            print(f'left out: {library}, which needs {needs}', file=sys.stderr)
            return f
        for variant in variants: ROWS[library, variant] = Row(worker or library, works, f)
        return f
    return enter

def load_rows():
    "Fill `ROWS`: import every module that has some."
    for module in ('trainers', 'loaders', 'growth'): import_module(module)


def make_model(name):
    if name == 'mlp': return Model(784, 50, 10)
    if name in CNNS: return nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
                                            nn.Flatten(), nn.Linear(800, 10))
    return nn.Linear(784, 10) if name == 'data' else nn.Linear(4, 2)


def first_weights():
    "The weights that every library begins with: name of the work -> state_dict."
    set_seed(SEED)
    found = {name: make_model(name).state_dict() for name in WORKS if name not in ('cnn2', 'loading')}
    return found | dict(cnn2=found['cnn'])


digits = cache(get_data)

@cache
def get_rows(name, n):
    "Training and validation tensors of a work."
    if name in ('mlp', *CNNS, 'loading'):
        x, y, x_valid, y_valid = digits()
        if name in CNNS: x, x_valid = x.view(-1, 1, 28, 28), x_valid.view(-1, 1, 28, 28)
        k = WORKS[name].n_valid
        return x[:n], y[:n], x_valid[:k], y_valid[:k]
    g, width = torch.Generator().manual_seed(SEED), 784 if name == 'data' else 4
    x, y = torch.empty(n, width).normal_(generator=g), torch.randint(2, (n,), generator=g)
    return x, y, x[:0], y[:0]


class Batches:
    "The loader that the loop by hand uses, for whoever takes an iterable: one permutation an epoch, a batch indexed at once."
    def __init__(self, x, y, bs): self.x, self.y, self.bs = x, y, bs
    def __len__(self): return len(self.x)//self.bs
    def __iter__(self):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(SEED))
        for idxs in order[:len(self)*self.bs].split(self.bs): yield self.x[idxs], self.y[idxs]


class Slices:
    "Validation rows in order, as views."
    def __init__(self, x, y, bs): self.x, self.y, self.bs = x, y, bs
    def __len__(self): return -(-len(self.x)//self.bs)
    def __iter__(self): return zip(self.x.split(self.bs), self.y.split(self.bs))


@dataclass
class Job:
    "One run of a work: a fresh model and the data."
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    bs: int
    lr: float

    @property
    def has_valid(self): return len(self.x_valid) > 0
    def optimizer(self): return torch.optim.SGD(self.model.parameters(), lr=self.lr)
    def batches(self): return Batches(self.x, self.y, self.bs)
    def slices(self): return Slices(self.x_valid, self.y_valid, 2*self.bs)
    def sampler(self): return RandomSampler(range(len(self.x)), generator=torch.Generator().manual_seed(SEED))

    def torch_dls(self):
        "torch's DataLoader as its tutorial has it; the sampler is the one that shuffle=True makes, in the common order."
        return (DataLoader(TensorDataset(self.x, self.y), self.bs, sampler=self.sampler(), drop_last=True),
                DataLoader(TensorDataset(self.x_valid, self.y_valid), 2*self.bs))

    def torch_fast_dl(self):
        "torch's DataLoader without its own batching: a BatchSampler's list of indices goes to the dataset at once."
        sampler = BatchSampler(self.sampler(), self.bs, drop_last=True)
        return DataLoader(TensorDataset(self.x, self.y), batch_size=None, sampler=sampler)

    @torch.no_grad()
    def accuracy(self, model=None):
        "Share of right answers over the validation rows, by hand; None without any."
        if not self.has_valid: return None
        model = model or self.model
        model.eval()
        right = 0
        for xb, yb in self.slices(): right += (model(xb).argmax(1) == yb).sum()
        return right.item()/len(self.x_valid)


def make_job(name, weights, n=None):
    work = WORKS[name]
    model = nn.Module() if name == 'loading' else make_model(name)
    if weights: model.load_state_dict(weights)
    gc.collect()
    return Job(name, model, *get_rows(name, n or work.n), work.bs, work.lr)
