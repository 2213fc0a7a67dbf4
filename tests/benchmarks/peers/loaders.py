"""The loading rows: batches looked at and thrown away; `run()` keeps the last one of the first pass in `job.last`."""
from torch.utils.data import TensorDataset
from work import SEED, WORKS, row


def through(job, dl):
    "What is timed: some passes through a loader."
    def run():
        for i in range(WORKS['loading'].passes):
            n = 0
            for xb, yb in dl: n += len(xb)
            if n != len(job.batches())*job.bs: raise ValueError(f'expected {len(job.batches())*job.bs} rows, got {n}')
            if i == 0: job.last = xb, yb
    return run


@row('x[idx]', '', works=('loading',), worker='by hand')
def indexed(job, variant):
    "Tensors indexed by each batch of one permutation."
    return through(job, job.batches())

@row('exp', 'DataLoader', works=('loading',))
def exp(job, variant):
    "Our DataLoader, shuffled."
    from exp.nb_04 import DataLoader, Dataset
    return through(job, DataLoader(Dataset(job.x, job.y), job.bs, shuffle=True, drop_last=True, seed=SEED))

@row('torch', 'DataLoader, default', works=('loading',), worker='by hand')
def default(job, variant):
    "torch's DataLoader over a TensorDataset: a row at a time, collated."
    return through(job, job.torch_dls()[0])

@row('torch', 'DataLoader, whole batches', works=('loading',), worker='by hand')
def whole(job, variant):
    "The same with a BatchSampler as its sampler and batch_size=None."
    return through(job, job.torch_fast_dl())

@row('fastai', 'TfmdDL', works=('loading',))
def fastai(job, variant):
    "fastai's loader over a TensorDataset."
    from fastai.basics import TfmdDL
    order = list(job.sampler())
    options = dict(shuffle=True, num_workers=0, drop_last=True, shuffle_fn=lambda idxs: order)
    return through(job, TfmdDL(TensorDataset(job.x, job.y), job.bs, **options))

@row('skorch', 'get_iterator', works=('loading',))
def skorch(job, variant):
    "torch's DataLoader over skorch's Dataset, as a net makes them."
    from skorch import NeuralNet
    from torch import nn
    net = NeuralNet(nn.Identity, nn.MSELoss, batch_size=job.bs, iterator_train__sampler=job.sampler(), iterator_train__drop_last=True)
    return through(job, net.get_iterator(net.get_dataset(job.x, job.y), training=True))

@row('Accelerate', 'prepare(DataLoader)', works=('loading',))
def accelerate(job, variant):
    "torch's DataLoader, prepared."
    from accelerate import Accelerator
    return through(job, Accelerator(cpu=True).prepare(job.torch_dls()[0]))

@row('Keras', 'arrays in fit', works=('loading',))
def keras(job, variant):
    "What model.fit makes of a pair of arrays, here already in the common order."
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
    order = list(job.sampler())[:len(job.batches())*job.bs]
    return through(job, ArrayDataAdapter(job.x[order], job.y[order], batch_size=job.bs).get_torch_dataloader())
