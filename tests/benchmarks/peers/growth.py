"""How an epoch of Learner.fit grows with the data, and with the number of callbacks."""
import torch
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import EVENTS, Callback, Learner
from work import SEED, SIZES, row

COUNTS = 1, 2, 5, 10, 20, 50


class Idle(Callback): "Listens to nothing."
class Listening(Callback): "Listens to every event, and does nothing."
for event in EVENTS: setattr(Listening, event, lambda self, learn: None)


def fit(job, cbs=()):
    dls = DataLoader(Dataset(job.x, job.y), job.bs, shuffle=True, drop_last=True, seed=SEED), None
    learn = Learner(job.model, dls, opt_func=torch.optim.SGD, lr=job.lr, cbs=cbs)
    def run(): learn.fit(1)
    return run


for size, n in SIZES.items():
    @row('exp', size, works=('data',), worker=f'exp, {size}')  # a process each: its peak memory is asked for
    def data(job, variant):
        "Learner with its defaults on rows of 784 floats."
        return fit(job)

@row('exp', '0 callbacks', *(f'{k} {kind}' for kind in ('idle', 'listening') for k in COUNTS), works=('callbacks',))
def callbacks(job, variant):
    "Learner with its defaults, and callbacks that listen to no event, or to all of them and do nothing."
    k, kind = variant.split()
    return fit(job, [(Listening if kind == 'listening' else Idle)() for _ in range(int(k))])
