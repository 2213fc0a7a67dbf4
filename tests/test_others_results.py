"What a Learner shows and gives back in other people's hands: metrics, predictions, screens, errors; and what it refuses."
import dataclasses, io, math, os, subprocess, sys, types, warnings
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_05 import to_device
from exp.nb_10 import Callback, CancelFit, Learner, Metric, Metrics, Progress, StopOnNaN, get_momentum
from exp.nb_11 import Scheduler, sched_const, sched_lin
from exp.nb_15 import Device, GradientAccumulation, GradientClip, OverfitOneBatch
from exp.nb_30 import MixedPrecision

import_module('exp.nb_16')  # show_results, top_losses
N, BS = 96, 32

def data(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))

def new_learner(cbs=(), dls=None, model=None, cls=Learner, lr=0.1, **kwargs):
    set_seed(42)
    dls = dls or (DataLoader(data(), BS, seed=0, shuffle=True), DataLoader(data(50, 1), BS))
    return cls(model() if model else Model(4, 8, 3), dls, lr=lr, cbs=cbs, progress=False, **kwargs)


# Metrics of every kind

def plain(pred, target): return (pred.argmax(-1) == target).float().mean()

def named(func, name):
    func.__name__ = name
    return func

@pytest.mark.parametrize('convert', [float, lambda v: v.numpy(), lambda v: v.numpy().item(), lambda v: np.float64(v), lambda v: v.reshape(1),
                                     lambda v: v.double(), lambda v: v.bfloat16().float()])
def test_a_metric_may_return_any_number(convert):
    learn = new_learner(metrics=[plain, named(lambda p, t: convert(plain(p, t)), 'other')])
    learn.fit(1)
    near(learn.results['other'], learn.results['plain'], rtol=1e-2)


def test_a_metric_may_return_several_by_name():
    def report(pred, target): return {'right': plain(pred, target), 'wrong': 1 - plain(pred, target).item()}
    learn = new_learner([Metrics(train=True)], metrics=report)
    learn.fit(1)
    assert list(learn.results) == ['train_loss', 'train_right', 'train_wrong', 'valid_loss', 'right', 'wrong']
    near(learn.results['right'] + learn.results['wrong'], 1.)
    assert list(learn.recorder.epochs[0])[1:-1] == list(learn.results)


@pytest.mark.parametrize('result, said', [
    (lambda p, t: (p.argmax(-1) == t).float(), r'odd: expected a mean over the rows, one number or a dict of them, got shape \(32,\)'),
    (lambda p, t: p, r'odd: expected a mean .* got shape \(32, 3\)'), (lambda p, t: None, 'odd: expected a number, got None'),
    (lambda p, t: 'good', "odd: expected a number, got 'good'"), (lambda p, t: {'a': p}, r'a: expected a mean'), (lambda p, t: [], 'odd: expected')])
def test_what_is_no_number_is_refused_at_the_first_batch(result, said):
    batches = []
    def odd(pred, target):
        batches.append(len(pred))
        return result(pred, target)
    with pytest.raises(ValueError, match=said): new_learner(metrics=odd).fit(1)
    assert len(batches) == 1


class Object:
    "A metric as torchmetrics' are, with any result."
    def __init__(self, result, name=None):
        self.result = result
        if name: self.name = name
    def reset(self): self.n = 0
    def update(self, pred, target): self.n += len(target)
    def compute(self): return self.result

@pytest.mark.parametrize('result, columns', [(0.5, ['Object']), (np.float32(0.5), ['Object']), (torch.tensor([0.5]), ['Object']),
                                             (torch.tensor([0.1, 0.2]), ['Object_0', 'Object_1']), ([0.1, 0.2, 0.3], ['Object_0', 'Object_1', 'Object_2']),
                                             ({'f1': torch.tensor(0.5), 'auc': 0.7}, ['f1', 'auc'])])
def test_results_of_metric_objects(result, columns):
    learn = new_learner(metrics=Object(result))
    learn.fit(1)
    assert [*learn.results][2:] == columns and all(isinstance(v, float) for v in learn.results.values())


@pytest.mark.parametrize('result, said', [(torch.zeros(3, 3), r'Confusion: expected a number, a vector or a dict, got shape \(3, 3\)'),
                                          ('good', 'Confusion'), ({'m': torch.zeros(2, 2)}, 'm: expected a mean')])
def test_a_matrix_is_refused_at_the_first_batch(result, said):
    metric = Object(result, 'Confusion')
    with pytest.raises(ValueError, match=said): new_learner(metrics=metric).fit(1)
    assert metric.n == 32


def test_a_metric_that_needs_more_than_a_batch():
    class Late(Object):
        def compute(self):
            if self.n < 50: raise ValueError('needs 50 rows')
            warnings.warn('at last')
            return 1.
    learn = new_learner(metrics=Late(0.))
    with pytest.warns(UserWarning, match='at last'): learn.fit(1)
    assert learn.results['Late'] == 1.


def test_a_collection_is_one_metric():
    class Collection(nn.ModuleDict):
        def reset(self): pass
        def update(self, pred, target): pass
        def compute(self): return {k: torch.tensor(1.) for k in self}
        def forward(self): pass
    collection = Collection()
    for name in 'ab': collection[name] = nn.Identity()
    learn = new_learner(metrics=collection)
    learn.fit(1)
    assert [*learn.results][2:] == ['a', 'b']


@pytest.mark.parametrize('name', ['epoch', 'seconds', 'train_loss', 'valid_loss'])
def test_names_of_other_columns_are_refused(name):
    with pytest.raises(ValueError, match=f'different names, got {name} twice'): new_learner(metrics=Metric(plain, name)).fit(1)
    with pytest.raises(ValueError, match=f'different names, got {name} twice'): new_learner(metrics=Object({name: 1.})).fit(1)


def test_names_that_meet_in_a_dict_or_in_training():
    with pytest.raises(ValueError, match='plain twice'): new_learner(metrics=[plain, Object({'plain': 1.})]).fit(1)
    with pytest.raises(ValueError, match='train_plain twice'):
        new_learner([Metrics(train=True)], metrics=[plain, Metric(plain, 'train_plain')]).fit(1)
    learn = new_learner(metrics=Metric(plain, 'loss'))
    learn.fit(1)
    assert 'loss' in learn.results


def test_objects_of_one_class_whose_results_have_names():
    learn = new_learner(metrics=[Object({'a': 1.}), Object({'b': 2.})])
    learn.fit(1)
    assert learn.results['a'] == 1 and learn.results['b'] == 2
    with pytest.raises(ValueError, match='different names, got Object twice'): new_learner(metrics=[Object(1.), Object(2.)]).fit(1)


def test_metrics_changed_by_a_callback():
    class Change(Callback):
        def before_fit(self, learn): learn.metrics = accuracy
    learn = new_learner(Change())
    learn.fit(1)
    learn.fit(1)
    assert 'accuracy' in learn.results


def test_torchmetrics_of_every_form():
    tm = pytest.importorskip('torchmetrics', reason='torchmetrics is not installed')
    args = dict(num_classes=3)
    learn = new_learner([Metrics(train=True)], metrics=[
        tm.MetricCollection([tm.classification.MulticlassF1Score(**args), tm.classification.MulticlassAUROC(**args)]),
        tm.classification.MulticlassAccuracy(average=None, **args), accuracy])
    learn.fit(1)
    assert {'MulticlassF1Score', 'MulticlassAUROC', 'MulticlassAccuracy_0', 'MulticlassAccuracy_2', 'accuracy'} <= learn.results.keys()
    with pytest.raises(ValueError, match='MulticlassConfusionMatrix'): new_learner(metrics=tm.classification.MulticlassConfusionMatrix(3)).fit(1)


# Predictions

Out = namedtuple('Out', 'logits value')

@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    value: torch.Tensor

class ModelOutput(OrderedDict): pass

class Many(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 3), nn.Linear(4, 1), form
    def forward(self, x): return self.form(self.a(x), self.b(x))

MANY = {'tuple': lambda a, b: (a, b), 'list': lambda a, b: [a, b], 'dict': lambda a, b: {'a': a, 'b': b}, 'namedtuple': Out,
        'output': lambda a, b: ModelOutput(a=a, b=b), 'nested': lambda a, b: {'x': (a, [b])}, 'with None': lambda a, b: (a, None, b)}

@pytest.mark.parametrize('form', MANY.values(), ids=MANY)
@pytest.mark.parametrize('target', [lambda y: y, lambda y: (y, y.float()), lambda y: {'y': y}, lambda y: [y, y]], ids=['tensor', 'tuple', 'dict', 'list'])
def test_predictions_and_targets_of_several_parts(form, target):
    x, y = data(70)[:]
    batches = [(x[i:i + 32], target(y[i:i + 32])) for i in range(0, 70, 32)]
    learn = new_learner(dls=(batches, batches), model=lambda: Many(form))
    preds, targets = learn.get_preds()
    with torch.no_grad(): expected = learn.model(x)
    assert type(preds) is type(expected) and type(targets) is type(target(y))
    def flat(o): return [o] if isinstance(o, torch.Tensor) else [] if o is None else [t for p in (o.values() if isinstance(o, dict) else o) for t in flat(p)]
    for a, b in zip(flat(preds) + flat(targets), flat(expected) + flat(target(y)), strict=True): near(a, b)


def test_half_precision_comes_back_as_float32():
    learn = new_learner(MixedPrecision(), model=lambda: Many(MANY['dict']))
    assert learn.get_preds()[0]['a'].dtype is torch.float32 and learn.predict(torch.zeros(2, 4))['b'].numpy().shape == (2, 1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Model(4, 8, 3)
    def forward(self, a, b): return self.net(a - b)

def test_batches_of_inputs_alone():
    x, learn = data()[:][0], new_learner()
    expected = learn.get_preds(x)[0]
    for dl in (DataLoader(Dataset(x), 32), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 32),
               torch.utils.data.DataLoader(x, 32), [(b, None) for b in x.split(32)], iter(x.split(32))):
        preds, targets = learn.get_preds(dl)
        near(preds, expected)
        assert targets is None
    two = new_learner(model=TwoInputs)
    preds, targets = two.get_preds([(a, a*0, None) for a in x.split(32)])
    near(preds, two.predict(x, torch.zeros_like(x)))
    assert targets is None
    with pytest.raises(ValueError, match='got 1 field: inputs without targets'): learn.fit(1) if setattr(learn, 'dls', ([[x]], None)) else learn.fit(1)


def test_targets_that_are_no_tensors():
    x = data(70)[:][0]
    learn = new_learner()
    names = [f'row {i}' for i in range(70)]
    assert learn.get_preds([(x[:32], names[:32]), (x[32:], names[32:])])[1] == names
    boxes = [torch.zeros(i % 3, 4) for i in range(70)]
    assert [len(b) for b in learn.get_preds([(x[:32], boxes[:32]), (x[32:], boxes[32:])])[1]] == [len(b) for b in boxes]


def test_ragged_predictions_are_refused_by_name():
    learn = new_learner(model=lambda: nn.Identity())
    with pytest.raises(ValueError, match=r'predictions of one shape in all batches, got \(2, 3\), \(2, 5\)'):
        learn.get_preds([(torch.zeros(2, 5), None), (torch.zeros(2, 3), None)])


def test_predict_takes_what_people_have():
    x, learn = data()[:][0], new_learner(model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    learn.fit(1)
    expected = learn.get_preds(x)[0]
    near(learn.predict(x), expected)
    near(learn.predict(x.numpy()), expected)
    near(learn.predict(x.double().numpy()), expected)
    near(learn.predict(x.tolist()), expected)
    near(learn.predict(x[0]), expected[0])
    assert not learn.predict(x).requires_grad and learn.model.training and learn.batch is None


def test_predict_of_a_learner_with_steps_of_its_own():
    class Doubled(Learner):
        def predict(self):
            super().predict()
            self.pred = self.pred*2
    class FromDicts(Learner):
        @property
        def xb(self): return [self.batch['x']]
        @property
        def yb(self): return self.batch['y']
    x, y = data()[:]
    plain, doubled = new_learner(), new_learner(cls=Doubled)
    near(doubled.predict(x), plain.predict(x)*2)
    near(doubled.get_preds(x)[0], plain.get_preds(x)[0]*2)
    batches = [{'x': x, 'y': y}]
    dicts = new_learner(dls=(batches, batches), cls=FromDicts)
    dicts.fit(1)
    near(dicts.predict({'x': x, 'y': None}), dicts.get_preds()[0])
    near(dicts.get_preds()[1], y)
    with pytest.raises(TypeError, match='expected batches as this Learner takes them, got a Tensor'): dicts.get_preds(x)


def test_losses_of_rows_of_several_parts():
    x, y = data(40)[:]
    batches = [(x[i:i + 16], (y[i:i + 16], x[i:i + 16, :1])) for i in range(0, 40, 16)]
    def loss_func(pred, target): return F.cross_entropy(pred[0], target[0]) + F.mse_loss(pred[1], target[1])
    learn = new_learner(dls=(batches, batches), model=lambda: Many(MANY['tuple']), loss_func=loss_func)
    losses, idxs = learn.top_losses(5)
    a, b = learn.get_preds()[0]
    expected = F.cross_entropy(a, y, reduction='none') + (b - x[:, :1]).square()[:, 0]
    near(losses, expected.sort(descending=True).values[:5])
    near(expected[idxs], losses)
    titles = [ax.get_title() for ax in learn.show_results(4).flat]
    assert titles[0].count('→') == 2 and titles[0].startswith(f'{y[0]} → ')
    plt.close('all')


@pytest.mark.parametrize('target, model', [(lambda y: y.float(), lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))),
                                           (lambda y: y.float()[:, None], lambda: nn.Linear(4, 1)), (lambda y: torch.randn(len(y), 6), lambda: nn.Linear(4, 6))])
def test_results_of_a_regression(target, model):
    x, y = data(40)[:]
    learn = new_learner(dls=([(x, target(y))], [(x, target(y))]), model=model, loss_func=F.mse_loss)
    learn.fit(1)
    assert all('→' in ax.get_title() for ax in learn.show_results(3).flat if ax.images)
    assert len(learn.top_losses(3)[0]) == 3
    plt.close('all')
    with pytest.raises(ValueError, match='got'): learn.plot_confusion_matrix()


# Devices

class Tokenized(UserDict): pass

@pytest.mark.parametrize('batch', [
    Out(torch.zeros(2), [torch.zeros(3)]), Tokenized(ids=torch.zeros(2)), defaultdict(list, x=torch.zeros(2)), OrderedDict(x=torch.zeros(1)),
    nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)]), Answer(torch.zeros(2), torch.zeros(1)), [torch.zeros(2), 'name', None, 3],
    types.MappingProxyType({'x': torch.zeros(2)}), {'a': {'b': (torch.zeros(1),)}}], ids=lambda b: type(b).__name__)
def test_whatever_holds_tensors_is_moved(batch):
    moved = to_device(batch, 'meta')
    def tensors(o):
        if isinstance(o, torch.Tensor): return [o]
        if hasattr(o, 'data') and isinstance(o.data, torch.Tensor): return [o.data]
        if dataclasses.is_dataclass(o): o = vars(o)
        parts = o.values() if hasattr(o, 'values') else o if isinstance(o, (tuple, list)) else ()
        return [t for p in parts for t in tensors(p)]
    assert tensors(moved) and all(t.device.type == 'meta' for t in tensors(moved)) and all(t.device.type == 'cpu' for t in tensors(batch))
    assert type(moved) is type(batch) or isinstance(batch, types.MappingProxyType)
    if isinstance(batch, defaultdict): assert moved['new'] == []


def test_objects_that_move_themselves():
    class Graph:
        device = 'cpu'
        def to(self, device, **kwargs):
            new = Graph()
            new.device = device
            return new
    assert to_device([Graph()], 'meta')[0].device == 'meta'


def test_device_keeps_the_groups_that_others_hold():
    learn = new_learner(Device('cpu'), opt_func=torch.optim.Adam)
    learn.fit(1)
    groups = learn.opt.param_groups
    learn.fit(1)
    assert learn.opt.param_groups is groups


# Values

@pytest.mark.parametrize('call, said', [
    (lambda l: l.fit(0), 'got 0'), (lambda l: l.fit(-1), 'got -1'), (lambda l: l.fit(2.5), 'got 2.5'), (lambda l: l.fit(math.nan), 'got nan'),
    (lambda l: l.fit(True), 'got True'), (lambda l: l.fit('2'), "got '2'"), (lambda l: l.fit(1, lr=0), 'got 0'), (lambda l: l.fit(1, lr=-0.1), 'got -0.1'),
    (lambda l: l.fit(1, lr=math.nan), 'got nan'), (lambda l: l.fit(1, lr=math.inf), 'got inf'), (lambda l: l.fit(1, lr='0.1'), "got '0.1'"),
    (lambda l: l.fit(1, lr=[0.1, 0.2]), '1 learning rates'), (lambda l: l.fit(1, lr=torch.tensor([0.1, 0.2])), 'got tensor'),
    (lambda l: l.fit(1, lr=slice(0, 1)), 'slice'), (lambda l: l.fit(1, lr=slice(1, None)), 'slice'), (lambda l: l.fit(1, max_batches=0), 'max_batches'),
    (lambda l: l.fit_one_cycle(1, -1.), 'got -1'), (lambda l: l.fit_one_cycle(1, 0.1, div=0), 'div above 0'), (lambda l: l.fit_one_cycle(1, 0.1, div_final=-1), 'div_final above 0'),
    (lambda l: l.fit_one_cycle(1, 0.1, pct_start=1), 'pct_start'), (lambda l: l.fit_one_cycle(1, 0.1, pct_start=math.nan), 'pct_start'),
    (lambda l: l.fit_flat_cos(1, 0.), 'got 0'), (lambda l: l.fit_flat_cos(1, 0.1, pct_start=0), 'pct_start'), (lambda l: l.lr_find(0., 1.), '0 < start < end'),
    (lambda l: l.lr_find(steps=5), 'steps'), (lambda l: l.lr_find(diverged=1), 'diverged'), (lambda l: l.lr_find(steps=20.5), 'steps'),
    (lambda l: l.fit(1, cbs=Scheduler(lr=sched_const(-1))), 'got -1'), (lambda l: l.fit(1, cbs=Scheduler(lr=sched_lin(1, -1))), 'at progress'),
    (lambda l: l.fit(1, cbs=Scheduler(nesterov=sched_const(1))), 'to schedule'), (lambda l: l.get_preds(torch.zeros(2, 4), bs=0), 'bs'),
    (lambda l: l.show_results(0), 'n to be'), (lambda l: l.freeze_to(7), 'parts to train')])
def test_numbers_that_make_no_sense(call, said):
    learn = new_learner()
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=said): call(learn)
    if 'progress' not in said: assert all(map(torch.equal, before, learn.model.parameters()))


@pytest.mark.parametrize('make, said', [
    (lambda: GradientClip(0), 'got 0'), (lambda: GradientClip(-1), 'got -1'), (lambda: GradientClip(math.nan), 'got nan'), (lambda: GradientAccumulation(0), 'got 0'),
    (lambda: GradientAccumulation(2.5), 'got 2.5'), (lambda: StopOnNaN(0), 'got 0'), (lambda: StopOnNaN(1.5), 'got 1.5'), (lambda: OverfitOneBatch(0), 'got 0'),
    (lambda: Progress(-1), 'got -1'), (lambda: Progress(math.nan), 'got nan'), (lambda: new_learner(lr=-1), 'got -1'), (lambda: new_learner(lr=math.nan), 'got nan')])
def test_settings_that_make_no_sense(make, said):
    with pytest.raises(ValueError, match=said): make()


def test_arguments_in_the_wrong_place():
    dls = new_learner().dls
    with pytest.raises(TypeError, match='function as opt_func, got 0.2'): Learner(Model(4, 8, 3), dls, F.cross_entropy, 0.2)
    with pytest.raises(TypeError, match='function as loss_func, got 0.2'): Learner(Model(4, 8, 3), dls, 0.2)
    with pytest.raises(TypeError, match='nn.Module as model, got'): Learner(dls, Model(4, 8, 3))


def test_numpy_counts():
    learn = new_learner()
    learn.fit(np.int64(1), lr=np.float32(0.1))
    assert len(learn.recorder.epochs) == 1


# Rates

def groups(n): return lambda ps, lr: torch.optim.SGD([dict(params=[p]) for p in list(ps)[:n]] + [dict(params=list(ps)[n:])] if n else ps, lr)

def test_rates_as_a_slice():
    learn = new_learner(opt_func=groups(2))
    learn.fit(1, lr=0.3)
    learn.ready_opt()
    near(learn.rates(slice(0.001, 0.1)), [0.001, 0.01, 0.1])
    near(learn.rates(slice(0.1)), [0.01, 0.01, 0.1])
    seen = []
    class Look(Callback):
        def before_batch(self, learn): seen.append([g['lr'] for g in learn.opt.param_groups])
    learn.fit(1, lr=slice(0.001, 0.1), cbs=Look())
    near(seen[0], [0.001, 0.01, 0.1])
    seen.clear()
    learn.fit_one_cycle(1, slice(0.001, 0.1), div=10, cbs=Look())
    near(seen[0], [0.0001, 0.001, 0.01])
    assert new_learner().fit(1, lr=slice(0.1, 0.2)) is None and learn.opt.param_groups[0]['lr'] == 0.1


def test_a_torch_scheduler_goes_on_in_the_next_fit():
    class Torch(Callback):
        scheduler = None
        def before_fit(self, learn): self.scheduler = self.scheduler or torch.optim.lr_scheduler.StepLR(learn.opt, 3, 0.5)
        def after_step(self, learn): self.scheduler.step()
    learn = new_learner(Torch())
    learn.fit(1)
    learn.fit(1)
    near(learn.recorder.lrs, [0.05]*3)
    near(learn.opt.param_groups[0]['lr'], 0.025)


def test_a_rate_that_is_a_tensor():
    learn = new_learner(opt_func=lambda ps, lr: torch.optim.Adam(ps, torch.tensor(lr), capturable=False))
    learn.fit(1, cbs=Scheduler(lr=sched_lin(0.2, 0.1)))
    near(learn.recorder.lrs, [0.2, 0.5/3, 0.4/3])
    lr = learn.opt.param_groups[0]['lr']
    near(lr, 0.1)
    learn.fit(1, lr=0.7)
    assert learn.opt.param_groups[0]['lr'] is lr and learn.recorder.lrs == [0.7]*3
    near(lr, 0.1)


def test_a_flat_rate_that_falls_at_the_end():
    learn = new_learner()
    learn.fit_flat_cos(4, 0.2)
    lrs = learn.recorder.lrs
    assert lrs[:9] == [0.2]*9 and lrs[-1] < lrs[-2] < 0.2 and learn.opt.param_groups[0]['lr'] == 0.1


class Both(torch.optim.SGD):
    "Groups with a momentum and betas, as Muon has them."
    def __init__(self, params, lr):
        super().__init__(params, lr, momentum=0.9)
        for g in self.param_groups: g['betas'] = (0.5, 0.6)

def test_the_momentum_that_is_there_is_scheduled_and_recorded():
    learn = new_learner(opt_func=Both)
    learn.fit(1, cbs=Scheduler(momentum=sched_lin(0.8, 0.5)))
    near(learn.recorder.momenta, [0.8, 0.7, 0.6])
    assert learn.opt.param_groups[0]['betas'] == (0.5, 0.6) and learn.opt.param_groups[0]['momentum'] == 0.9
    assert get_momentum({}) == 0 and get_momentum({'betas': (0.3, 0.4)}) == 0.3


def test_a_schedule_finds_groups_that_were_replaced_or_added():
    class Meddle(Callback):
        def before_epoch(self, learn):
            learn.opt.load_state_dict(learn.opt.state_dict())
            if learn.epoch: learn.opt.add_param_group(dict(params=[nn.Parameter(torch.zeros(1))]))
    learn = new_learner(Meddle())
    learn.fit(2, cbs=Scheduler(lr=sched_lin(1, 0)))
    near(learn.recorder.lrs, [1 - i/6 for i in range(6)])


# Parts of a fit

def test_only_so_many_batches():
    learn = new_learner(metrics=accuracy)
    learn.fit(2, max_batches=2, cbs=Scheduler(lr=sched_lin(1, 0)))
    near(learn.recorder.lrs, [1, 0.75, 0.5, 0.25])
    near(learn.validate([b for b, _ in zip(learn.dls[1], range(2))])['valid_loss'], learn.results['valid_loss'])
    learn.fit(1)
    assert len(learn.recorder.losses) == 3
    learn.fit(1, max_batches=50)
    assert len(learn.recorder.losses) == 3


def test_a_stream_without_an_end():
    class Stream:
        def __iter__(self):
            while True: yield data()[:8]
    learn = new_learner(dls=(Stream(), None))
    learn.fit_one_cycle(2, 0.1, max_batches=5)
    assert len(learn.recorder.losses) == 10


def test_freezing():
    learn = new_learner(model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    learn.freeze_to(-1)
    assert [p.requires_grad for p in learn.model.parameters()] == [False]*4 + [True]*2
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    assert [torch.equal(a, b) for a, b in zip(before, learn.model.parameters())] == [True]*4 + [False]*2
    learn.freeze_to(1)
    assert [p.requires_grad for p in learn.model.parameters()] == [False]*2 + [True]*4
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.fit(1)
    assert not any(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
    wrapped = new_learner()  # Model keeps its layers in one Sequential
    wrapped.freeze_to(1)
    assert [p.requires_grad for p in wrapped.model.parameters()] == [False]*2 + [True]*2
    for n in (2, -3, 1.): 
        with pytest.raises(ValueError, match='at least one of 2 parts'): wrapped.freeze_to(n)


# Callbacks written for other libraries

FOREIGN = {'on_epoch_end': 'after_epoch', 'on_train_begin': 'before_fit', 'on_fit_end': 'after_fit', 'on_train_batch_start': 'before_batch',
           'on_batch_end': 'after_batch', 'on_before_optimizer_step': 'after_backward', 'on_after_backward': 'after_backward', 'on_grad_computed': 'after_backward',
           'on_validation_epoch_end': 'around_pass', 'on_exception': 'cleanup_fit', 'begin_fit': 'before_fit', 'begin_epoch': 'before_epoch', 'begin_batch': 'before_batch',
           'begin_validate': 'around_pass', 'after_pred': 'after_predict', 'before_validate': 'around_pass', 'after_train': 'around_pass', 'on_step_end': 'after_batch',
           'on_evaluate': 'around_pass', 'training_step': 'override a method of Learner', 'validation_step': 'override', 'configure_optimizers': 'override',
           'setup': 'before_fit', 'teardown': 'after_fit', 'epoch_start': 'before_epoch', 'batch_end': 'after_batch', 'fit_end': 'after_fit', 'before_step': 'after_backward',
           'after_cancel_fit': 'cleanup_fit', 'on_loss_begin': 'after_loss', 'befor_fit': 'before_fit', 'after_backwards': 'after_backward', 'on_test_end': 'around_pass'}

@pytest.mark.parametrize('theirs, ours', FOREIGN.items())
def test_events_of_other_libraries_are_refused_with_their_name_here(theirs, ours):
    with pytest.raises(TypeError, match=f'expected an event, got Ported.{theirs}: did you mean .*{ours}'):
        type('Ported', (Callback,), {theirs: lambda self, learn: None})
    mixin = type('Mixin', (), {theirs: lambda self, learn: None})
    with pytest.raises(TypeError, match=theirs): type('Ported', (mixin, Callback), {})


@pytest.mark.parametrize('step', ['predict', 'get_loss', 'backward', 'step', 'zero_grad'])
def test_steps_in_a_callback_are_refused(step):
    with pytest.raises(TypeError, match=f'Ported.{step}, a step: override it in a subclass of Learner, or set learn.{step} in before_fit'):
        type('Ported', (Callback,), {step: lambda self, learn: None})


def test_names_of_ones_own_are_fine():
    class Mine(Callback):
        on_gpu, begin_value, last_step = True, 3, 0
        def measure(self): pass
        def warmup(self): pass
        def start(self): pass
        def stepwise(self): pass
        @contextmanager
        def around_pass(self, learn): yield


def test_around_a_pass():
    seen = []
    class Around(Callback):
        @contextmanager
        def around_pass(self, learn):
            seen.append((learn.training, learn.model.training, learn.fitting, learn.depth))
            try: yield
            finally: seen.append('end')
    learn = new_learner(Around())
    learn.fit(1)
    learn.validate()
    assert seen == [(True, True, True, 1), 'end', (False, False, True, 1), 'end', (False, False, False, 1), 'end']
    seen.clear()
    with pytest.raises(RuntimeError): learn.validate([(torch.zeros(2, 7), torch.zeros(2).long())])
    assert seen == [(False, False, False, 1), 'end'] and learn.depth == 0


@pytest.mark.parametrize('raised, failed', [(None, False), (CancelFit, False), (KeyboardInterrupt, True), (RuntimeError, True)])
def test_a_cleanup_can_know_how_it_ended(raised, failed):
    seen = []
    class Look(Callback):
        def after_loss(self, learn):
            if raised: raise raised
        def cleanup_fit(self, learn): seen.append(learn.failed)
    learn = new_learner(Look())
    try: learn.fit(1)
    except (KeyboardInterrupt, RuntimeError): pass
    assert seen == [failed] and not learn.failed


# Screens

SCRIPT = """
import torch, sys
from exp.nb_10 import Learner, Metric
batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]*3
learn = Learner(torch.nn.Linear(4, 3), (batches, batches), metrics=Metric(lambda p, t: p.mean(), 'точность → ①'))
learn.fit(2)
open(sys.argv[1], 'w').write(str(len(learn.recorder.epochs)))
"""

def test_a_console_short_of_letters(tmp_path):
    env = {**os.environ, 'PYTHONIOENCODING': 'cp1252', 'PYTHONUTF8': '0', 'LC_ALL': 'C'}
    (tmp_path/'script.py').write_text(SCRIPT, encoding='utf-8')
    env['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent.parent), env.get('PYTHONPATH', '')])
    result = subprocess.run([sys.executable, tmp_path/'script.py', tmp_path/'done'], capture_output=True, env=env)
    assert result.returncode == 0 and (tmp_path/'done').read_text() == '2' and b'????????' in result.stdout, result.stderr


def closed():
    stream = io.StringIO()
    stream.close()
    return stream

def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, 'w')

def no_flush():
    "What some programs put in the place of a screen."
    return types.SimpleNamespace(write=lambda text: None)

STREAMS = {'none': lambda: None, 'closed': closed, 'broken pipe': broken_pipe, 'no flush': no_flush, 'ascii': lambda: io.TextIOWrapper(io.BytesIO(), encoding='ascii')}
if os.path.exists('/dev/full'): STREAMS['full'] = lambda: open('/dev/full', 'w')

@pytest.mark.parametrize('out', STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize('err', STREAMS.values(), ids=STREAMS)
def test_screens_that_are_gone(out, err, monkeypatch):
    learn = new_learner(metrics=Metric(plain, 'точность → ①'))
    learn.progress = True
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', out())
        m.setattr(sys, 'stderr', err())
        learn.fit(2)
        for stream in (sys.stdout, sys.stderr):
            try: stream.close()
            except (AttributeError, OSError): pass
    assert len(learn.recorder.epochs) == 2


def test_a_terminal_that_fails_halfway():
    class Terminal(io.StringIO):
        n = 0
        def isatty(self): return True
        def write(self, text):
            self.n += 1
            if self.n > 3: raise OSError('gone')
            return super().write(text)
    learn = new_learner([Progress(every=0)])
    learn.progress, old = True, sys.stderr
    sys.stderr = Terminal()
    try: learn.fit(2)
    finally: sys.stderr = old
    assert len(learn.recorder.epochs) == 2


def test_a_name_that_is_bad_for_a_file(tmp_path):
    learn = new_learner(metrics=Metric(plain, 'точность → ①'))
    learn.fit(1)
    learn.recorder.to_csv(tmp_path/'epochs.csv')
    assert 'точность' in (tmp_path/'epochs.csv').read_text(encoding='utf-8') and len(list(tmp_path.iterdir())) == 1


# Errors that can be looked at

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        hidden = self.layer(x)
        return hidden @ torch.zeros(7, 7)

def frames(error):
    tb, found = error.__traceback__, {}
    while tb:
        found[tb.tb_frame.f_code.co_name] = dict(tb.tb_frame.f_locals)
        tb = tb.tb_next
    return found

def failed(learn):
    try: learn.fit(1)
    except BaseException as error: return frames(error)

def test_the_users_own_frames_stay_where_somebody_looks(monkeypatch):
    learn = new_learner(model=Broken)
    assert failed(learn)['forward'] == {}
    monkeypatch.setattr(sys, 'ps1', '>>> ', raising=False)
    assert failed(learn)['forward']['hidden'].shape == (32, 3)
    learn.debug = False
    assert failed(learn)['forward'] == {}


@pytest.mark.parametrize('error', [KeyboardInterrupt, torch.cuda.OutOfMemoryError])
def test_memory_comes_back_after_an_interrupt(error, monkeypatch):
    class Stopped(nn.Linear):
        def forward(self, x):
            hidden = x*2
            if hidden.ndim: raise error
    monkeypatch.setattr(sys, 'ps1', '>>> ', raising=False)
    assert failed(new_learner(model=lambda: Stopped(4, 3)))['forward'] == {}


def test_the_debugger_in_a_notebook():
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    code = ['import torch\nfrom torch import nn\nfrom exp.nb_10 import Learner\n'
            'class Broken(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(4, 3)\n'
            '    def forward(self, x):\n        hidden = self.layer(x)\n        return hidden @ torch.zeros(7, 7)\n'
            'learn = Learner(Broken(), ([(torch.zeros(2, 4), torch.zeros(2).long())], None), progress=False)',
            'learn.fit(1)', 'import sys\ntb = sys.last_traceback\nwhile tb.tb_frame.f_code.co_name != "forward": tb = tb.tb_next\n'
            'print(tb.tb_frame.f_locals["hidden"].shape)']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    nbclient.NotebookClient(nb, timeout=120, kernel_name='python3', allow_errors=True).execute()
    assert nb.cells[2].outputs[0].text.strip() == 'torch.Size([2, 3])', nb.cells[2].outputs


# The rate finder

@pytest.mark.parametrize('n', [1, 3, 7])
def test_the_rate_finder_with_accumulation(n):
    def run(bs, cbs):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(84*8, 4, generator=g)
        y = (x @ torch.randn(4, 3, generator=g)).argmax(-1)
        learn = new_learner(cbs, dls=([(x[i:i + bs], y[i:i + bs]) for i in range(0, len(x), bs)], None))
        return learn.lr_find(steps=60, plot=False)
    near(run(8, GradientAccumulation(n)), run(8*n, ()), rtol=1e-3)


def test_losses_below_zero():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(640, 4, generator=g)
    y = (x @ torch.randn(4, 3, generator=g)).argmax(-1)
    batches = [(x[i:i + 32], y[i:i + 32]) for i in range(0, 640, 32)]
    plain = new_learner(dls=(batches, None)).lr_find(steps=60, plot=False)
    lower = new_learner(dls=(batches, None), loss_func=lambda p, t: F.cross_entropy(p, t) - 5).lr_find(steps=60, plot=False)
    assert 0.2 < lower.valley/plain.valley < 5 and 1e-4 < lower.valley < 10


@pytest.mark.parametrize('loss_func', [lambda p, t: (p*0).sum() + 1, lambda p, t: (p*0).sum() + torch.rand(()), lambda p, t: (p*0).sum() - torch.rand(())])
def test_no_rate_is_suggested_where_nothing_falls(loss_func):
    learn = new_learner(loss_func=loss_func)
    with pytest.warns(UserWarning, match='no rate can be suggested'): found = learn.lr_find()
    assert found == (None, None)
    plt.close('all')
