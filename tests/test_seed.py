"The notebook that the series descends from, cell by cell, on `from exp.all import *`."
import statistics
import pytest
import torch

CELLS = '''
from exp.all import *
mpl.rcParams['image.cmap'] = 'gray'
x_train, y_train, x_valid, y_valid = get_data()
n, m = x_train.shape
c = y_train.max() + 1
nh = 50

class Model(nn.Module):
    def __init__(self, n_in, nh, n_out):
        super().__init__()
        self.layers = [nn.Linear(n_in, nh), nn.ReLU(), nn.Linear(nh, n_out)]
    def __call__(self, x):
        for l in self.layers: x = l(x)
        return x

set_seed(42)
model = Model(m, nh, 10)
pred = model(x_train)

def log_softmax(x): return (x.exp()/(x.exp().sum(-1, keepdim=True))).log()
sm_pred = log_softmax(pred)
picked = sm_pred[[0, 1, 2], [5, 0, 4]]
def nll(inp, target): return -inp[range(target.shape[0]), target].mean()
loss = nll(sm_pred, y_train)

def log_softmax(x): return x - x.exp().sum(-1, keepdim=True).log()
test_near(nll(log_softmax(pred), y_train), loss)

def logsumexp(x):
    m = x.max(-1)[0]
    return m + (x-m[:,None]).exp().sum(-1).log()
test_near(logsumexp(pred), pred.logsumexp(-1))
def log_softmax(x): return x - x.logsumexp(-1, keepdim=True)
test_near(nll(log_softmax(pred), y_train), loss)

test_near(F.nll_loss(F.log_softmax(pred, -1), y_train), loss)
test_near(F.cross_entropy(pred, y_train), loss)

loss_func = F.cross_entropy
bs = 64
xb = x_train[0:bs]; first_pred = model(xb)
yb = y_train[0:bs]
first_loss, first_accuracy = loss_func(first_pred, yb), accuracy(first_pred, yb)
lr = 0.5
'''

LOOP = '''
epoch = 1
for epoch in range(epoch):
    for i in range((n-1)//bs+1):
        start_idx = i*bs
        end_idx = start_idx+bs
        xb = x_train[start_idx:end_idx]
        yb = y_train[start_idx:end_idx]
        loss = loss_func(model(xb), yb)
        loss.backward()
        with torch.no_grad():
            for l in model.layers:
                if hasattr(l, 'weight'):
                    l.weight -= l.weight.grad * lr
                    l.bias   -= l.bias.grad   * lr
                    l.weight.grad.zero_()
                    l.bias  .grad.zero_()
'''


@pytest.fixture(scope='module')
def seed():
    "The names that the seed's notebook ends its setup with."
    names = {}
    exec(CELLS, names)
    return names


def test_shapes_and_labels(seed):
    assert seed['x_train'].shape == (50_000, 784) and seed['y_train'].shape == (50_000,)
    assert seed['y_train'][:3].tolist() == [5, 0, 4] and seed['c'] == 10
    assert seed['first_pred'].shape == (64, 10) and seed['picked'].shape == (3,)


def test_before_training_the_model_knows_nothing(seed):
    assert 2.2 < seed['loss'] < 2.4
    assert 2.2 < seed['first_loss'] < 2.4 and seed['first_accuracy'] < 0.3


def test_one_epoch_over_ten_seeds(seed):
    "One epoch in order, whole validation set: a band over seeds, not one lucky number."
    accuracies, losses = [], []
    for i in range(10):
        seed['set_seed'](i)
        seed['model'] = seed['Model'](784, 50, 10)
        exec(LOOP, seed)
        with torch.no_grad(): accuracies.append(seed['accuracy'](seed['model'](seed['x_valid']), seed['y_valid']).item())
        with torch.no_grad(): losses.append(seed['loss_func'](seed['model'](seed['x_train']), seed['y_train']).item())
    assert statistics.mean(accuracies) > 0.935 and min(accuracies) > 0.90
    assert statistics.mean(losses) < 0.22
