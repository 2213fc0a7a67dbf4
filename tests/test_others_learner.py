"The Learner in other people's hands: their batches, models, losses, metrics, callbacks, optimizers, screens and habits."
import copy, pickle, warnings
from collections import UserDict, namedtuple
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_03 import accuracy, cross_entropy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_05 import n_rows
from exp.nb_10 import EVENTS, Accuracy, Callback, CancelBatch, CancelEpoch, CancelFit, Learner, Metrics, Progress, load_opt_state
from exp.nb_15 import GradientAccumulation, GradientClip
from exp.nb_11 import Scheduler, sched_lin
from exp.nb_12 import EMA, AdamW
from exp.nb_30 import Compile, MixedPrecision

N, BS = 96, 32

def data(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))

def loaders(bs=BS): return DataLoader(data(), bs, seed=0, shuffle=True), DataLoader(data(50, 1), bs)

def new_learner(cbs=(), dls=None, model=None, cls=Learner, lr=0.1, **kwargs):
    set_seed(42)
    return cls(model() if model else Model(4, 8, 3), dls or loaders(), lr=lr, cbs=cbs, progress=False, **kwargs)

def params(learn): return torch.cat([p.detach().reshape(-1) for m in learn.modules for p in m.parameters()])

momentum = partial(torch.optim.SGD, momentum=0.9)

def on(event, do, **attributes):
    "A callback that does `do(learn)` at an event."
    return type('Doing', (Callback,), {event: lambda self, learn: do(learn), **attributes})()


# What is trained

class Scaled(nn.Module):
    "A loss with a weight of its own, and a layer that behaves differently in training."
    def __init__(self):
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(3)), nn.Dropout(0.5)
    def forward(self, pred, target):
        self.mode = self.training
        return F.cross_entropy(self.drop(pred)*self.scale, target)

def test_a_loss_with_weights_is_trained_switched_swept_and_clipped():
    modes = []
    learn = new_learner([on('after_loss', lambda learn: modes.append((learn.training, learn.loss_func.mode))), GradientClip(1e-3)], loss_func=Scaled())
    learn.loss_func.eval()
    learn.fit(1)
    assert {m for m in modes} == {(True, True), (False, False)} and not learn.loss_func.training
    moved = (learn.loss_func.scale.detach() - 1).abs().max()
    assert 0 < moved < 4e-4 and learn.loss_func.scale.grad is None
    before = learn.loss_func.scale.detach().clone()
    with warnings.catch_warnings(action='ignore'): learn.lr_find(plot=False)
    assert torch.equal(before, learn.loss_func.scale)


def test_weights_shared_by_model_and_loss_are_given_once():
    loss = Scaled()
    learn = new_learner(model=lambda: nn.ModuleDict({'net': nn.Linear(4, 3), 'loss': loss}), loss_func=loss)
    learn.create_opt()
    assert len(learn.opt.param_groups[0]['params']) == 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, x): return self.head(self.body(x).relu())

@pytest.mark.parametrize('opt_func', [momentum, AdamW, torch.optim.AdamW])
def test_a_replaced_head_is_trained_and_the_rest_goes_on(opt_func):
    learn = new_learner(model=Net, opt_func=opt_func)
    learn.fit(1)
    state, body = dict(learn.opt.state[learn.model.body.weight]), learn.model.body
    learn.model.head = nn.Linear(8, 3)
    first = learn.model.head.weight.detach().clone()
    learn.fit(1)
    assert not torch.equal(first, learn.model.head.weight)
    assert [id(p) for p in learn.opt.param_groups[0]['params']] == [id(p) for p in learn.model.parameters()]
    assert len(learn.opt.state) == 4 and all(learn.opt.state[body.weight][k] is v for k, v in state.items() if v.ndim)


def test_a_layer_replaced_in_the_middle_keeps_the_order_of_a_new_optimizer():
    learn = new_learner(model=Net, opt_func=momentum)
    learn.fit(1)
    learn.model.body = nn.Linear(4, 8)
    learn.fit(1)
    assert [id(p) for p in learn.opt.param_groups[0]['params']] == [id(p) for p in learn.model.parameters()]


def test_a_layer_replaced_or_thawed_within_a_fit():
    class Replace(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1:
                learn.model.head = nn.Linear(8, 3)
                self.first = learn.model.head.weight.detach().clone()
    learn = new_learner(replace := Replace(), model=Net)
    learn.fit(2, lr=0.3)
    assert not torch.equal(replace.first, learn.model.head.weight)
    thaw = on('before_epoch', lambda learn: learn.model.body.requires_grad_(learn.epoch == 1))
    trainable = lambda ps, lr: torch.optim.SGD([p for p in ps if p.requires_grad], lr)
    learn = new_learner(thaw, model=Net, opt_func=trainable)
    learn.model.body.requires_grad_(False)
    first = learn.model.body.weight.clone()
    learn.fit(1)
    assert torch.equal(first, learn.model.body.weight)
    learn.fit(2)
    assert not torch.equal(first, learn.model.body.weight)


def test_another_model_is_trained():
    learn = new_learner(opt_func=momentum)
    learn.fit(1)
    learn.model = Net()
    first = params(learn)
    learn.fit(1)
    assert not torch.equal(first, params(learn)) and len(learn.opt.state) == 4
    swap = on('before_epoch', lambda learn: setattr(learn, 'model', Net()) if learn.epoch == 1 else None)
    learn = new_learner(swap, opt_func=momentum)
    learn.fit(2, lr=0.07)
    assert len(learn.opt.state) == 4 and learn.recorder.lrs == [0.07]*6


def test_what_an_optimizer_was_not_given_on_purpose_stays_out():
    learn = new_learner(model=Net, opt_func=lambda ps, lr: torch.optim.SGD([*ps][2:], lr))
    with warnings.catch_warnings(action='error'): learn.fit(2)
    assert len(learn.opt.param_groups[0]['params']) == 2


def test_an_optimizer_made_elsewhere_is_said_to_lack_a_layer():
    learn = new_learner(model=Net)
    learn.opt = torch.optim.SGD(learn.model.head.parameters(), 0.1)
    with pytest.warns(UserWarning, match='does not train body.weight, body.bias: reset_opt=True'): learn.fit(1)
    with warnings.catch_warnings(action='error'): learn.fit(2)
    learn.fit(1, reset_opt=True)
    assert len(learn.opt.param_groups[0]['params']) == 4


def test_rate_and_kind_of_optimizer_changed_between_fits():
    learn = new_learner()
    learn.fit(1)
    learn.lr = 0.01
    learn.fit(1)
    assert learn.recorder.lrs == [0.01]*3
    opt = learn.opt
    learn.opt_func = torch.optim.Adam
    learn.fit(1)
    assert learn.opt is not opt and type(learn.opt) is torch.optim.Adam
    opt = learn.opt
    learn.fit(1)
    assert learn.opt is opt


def test_an_optimizer_may_look_at_the_modules():
    class Split(torch.optim.SGD):
        @staticmethod
        def split_params(*modules): return [dict(params=m.parameters(), lr=0.1*(i + 1)) for i, m in enumerate(modules)]
    for opt_func in (Split, partial(Split, momentum=0.9)):
        learn = new_learner(loss_func=Scaled(), opt_func=opt_func)
        learn.fit(1)
        assert [g['lr'] for g in learn.opt.param_groups] == [0.1, 0.2]


def test_a_copied_learner_trains_its_own_weights():
    learn = new_learner(model=Net, opt_func=momentum)
    learn.fit(1)
    for other in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        before = params(learn)
        with warnings.catch_warnings(action='error'): other.fit(1)
        assert torch.equal(before, params(learn)) and not torch.equal(before, params(other))


@pytest.mark.parametrize('opt_func', [torch.optim.LBFGS, partial(torch.optim.LBFGS, max_iter=5, line_search_fn='strong_wolfe')])
def test_an_optimizer_that_asks_for_the_loss_again(opt_func):
    x, y = data()[:]
    def by_hand():
        set_seed(42)
        model = Model(4, 8, 3)
        opt = opt_func(model.parameters(), lr=0.1)
        for _ in range(3):
            def closure():
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss
            opt.step(closure)
        return torch.cat([p.detach().view(-1) for p in model.parameters()])
    learn = new_learner(dls=([(x, y)], None), opt_func=opt_func)
    learn.fit(3)
    near(params(learn), by_hand(), rtol=1e-5)
    for cb in (GradientAccumulation(2), Compile()):
        with pytest.raises(ValueError, match='without a closure'): new_learner(cb, opt_func=opt_func).fit(1)


# Passes and fits within a fit

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x): return self.layers(x)

class TopTwo:
    "As torchmetrics objects are."
    def __init__(self): self.reset()
    def reset(self): self.right = self.n = 0
    def update(self, pred, target):
        self.right = self.right + (pred.topk(2).indices == target[:, None]).any(-1).sum()
        self.n += len(target)
    def compute(self): return self.right/self.n

SETUPS = {
    'plain': lambda: dict(cbs=[Metrics(train=True)]),
    'average': lambda: dict(cbs=[EMA(0.8)]),
    'half': lambda: dict(cbs=[MixedPrecision()]),
    'accumulation': lambda: dict(cbs=[GradientAccumulation(2)]),
    'schedule': lambda: dict(cbs=[Scheduler(lr=sched_lin(0.2, 0.01), momentum=sched_lin(0.9, 0.5))])}

def outcome(learn):
    record = learn.recorder
    epochs = [{k: v for k, v in row.items() if k != 'seconds'} for row in record.epochs]
    return params(learn), record.losses, record.lrs, record.momenta, epochs, learn.results

def assert_same(a, b):
    for x, y in zip(a, b, strict=True): assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

def nested_run(setup, event, do):
    extra = [on(event, lambda learn: do(learn) if learn.depth == 1 else None, order=7)] if do else []
    learn = new_learner(extra, model=Noisy, opt_func=momentum, metrics=[Accuracy(), TopTwo()])
    learn.cbs += SETUPS[setup]()['cbs']
    learn.fit(2)
    return learn

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('setup', SETUPS)
def test_a_pass_at_any_event_changes_nothing(setup, event):
    def look(learn):
        learn.validate()
        learn.get_preds()
        learn.predict(torch.zeros(2, 4))
    assert_same(outcome(nested_run(setup, event, look)), outcome(nested_run(setup, event, None)))
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('event', [e for e in EVENTS if e not in ('after_predict', 'after_loss')])  # before backward, as in torch
@pytest.mark.parametrize('setup', SETUPS)
def test_a_sweep_at_any_event_changes_nothing(setup, event):
    def sweep(learn):
        with warnings.catch_warnings(action='ignore'): learn.lr_find(steps=12, plot=False)
    assert_same(outcome(nested_run(setup, event, sweep)), outcome(nested_run(setup, event, None)))


@pytest.mark.parametrize('setup', SETUPS)
def test_a_fit_within_a_fit_leaves_record_and_callbacks(setup):
    def inner(learn):
        before = copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.opt.state_dict())
        learn.fit(1, lr=0.02, cbs=GradientClip(0.1))
        learn.model.load_state_dict(before[0])
        load_opt_state(learn.opt, before[1])
        learn.dls[0].sampler.generator.set_state(state)
    state = torch.Generator().manual_seed(0).get_state()
    plain = nested_run(setup, 'before_epoch', lambda learn: learn.dls[0].sampler.generator.set_state(state))
    assert_same(outcome(nested_run(setup, 'before_epoch', inner)), outcome(plain))


def test_a_failing_pass_within_a_fit_changes_nothing():
    def fail(learn):
        with pytest.raises(RuntimeError): learn.validate([(torch.zeros(2, 7), torch.zeros(2).long())])
    for setup in SETUPS:
        assert_same(outcome(nested_run(setup, 'after_predict', fail)), outcome(nested_run(setup, 'after_predict', None)))


def test_steps_replaced_by_callbacks_are_put_back_whatever_they_do():
    class Sloppy(Callback):
        def before_fit(self, learn):
            step = learn.step
            learn.step = lambda: (calls.append('sloppy'), step())
    calls = []
    learn = new_learner()
    learn.step = lambda: (calls.append('own'), learn.opt.step())
    own = learn.step
    nested = on('after_epoch', lambda learn: learn.fit(1) if learn.depth == 1 else None)
    learn.cbs += [Sloppy(), nested]
    learn.fit(1)
    assert learn.step is own and calls == ['sloppy', 'own']*6


def test_a_callback_that_validates_in_validation_is_told():
    with pytest.raises(RecursionError, match='10 deep'): new_learner(on('after_batch', lambda learn: learn.validate())).fit(1)


def test_callbacks_of_one_fit_take_part_in_its_passes():
    dtypes = []
    probe = on('after_predict', lambda learn: dtypes.append(learn.pred.dtype), everywhere=True)
    learn = new_learner(on('after_epoch', lambda learn: learn.validate()))
    learn.fit(1, cbs=[MixedPrecision(), probe])
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == 3 + 2 + 2


def test_given_twice_is_there_once(capsys):
    learn, clip = new_learner(metrics=accuracy), GradientClip()
    learn.progress, learn.cbs = True, learn.cbs + [clip]
    learn.fit(1, cbs=[Metrics(train=True), Progress(), clip])
    assert len(capsys.readouterr().out.splitlines()) == 2 and list(learn.results) == ['train_loss', 'train_accuracy', 'valid_loss', 'accuracy']
    counts = []
    learn.fit(1, cbs=[on('before_fit', lambda learn: counts.append(len(learn.running))), clip])
    assert counts == [6]


# Ends

@pytest.mark.parametrize('end', [CancelFit, None])
def test_the_average_is_in_the_model_after_a_cancelled_fit(end):
    class Stop(Callback):
        order = 50
        def after_epoch(self, learn):
            if end and learn.epoch == 1: raise end
    learn = new_learner([EMA(0.9), Stop()], metrics=accuracy)
    learn.fit(2 if end is None else 5)
    shown = learn.results
    assert learn.validate() == {k: v for k, v in shown.items() if k != 'train_loss'}


class Endless:
    "A loader without a length."
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def pieces(n=75, bs=10): return [(x, y) for x, y in DataLoader(data(n), bs)]

@pytest.mark.parametrize('n', [1, 2, 3, 5, 100])
def test_accumulation_without_a_length(n):
    "The rest of an epoch makes a step of its own."
    def run(dl):
        learn = new_learner(GradientAccumulation(n), dls=(dl, None))
        learn.fit(3)
        return params(learn), len(learn.recorder.losses)
    for a, b in zip(run(pieces()), run(Endless(pieces()))): near(a, b, rtol=1e-6)


@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_loss', 'after_backward'])
@pytest.mark.parametrize('skipped', [{1}, {2}, {7}, {0, 7}, {6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}])
def test_a_skipped_batch_is_as_if_it_had_not_been(event, skipped):
    "With windows of two batches: those that count make windows among themselves."
    class Skip(Callback):
        order = -20
        def check(self, learn):
            if learn.training and learn.iter in skipped: raise CancelBatch
    setattr(Skip, event, Skip.check)
    learn = new_learner([Skip(), GradientAccumulation(2)], dls=(pieces(), None))
    learn.fit(2)
    left, window = [], []
    for i, piece in enumerate(pieces()):
        if i not in skipped: window.append(piece)
        elif event == 'after_backward': window = []  # its gradient is among those of the window, which goes with it
        if len(window) == 2: left, window = left + window, []
    if not left + window: return near(params(learn), params(new_learner()))
    expected = new_learner(GradientAccumulation(2), dls=(left + window, None))
    expected.fit(2)
    near(params(learn), params(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('cancel', [CancelEpoch, CancelFit])
def test_an_epoch_cut_short_leaks_nothing_into_the_next(cancel):
    class Cut(Callback):
        done = False
        def after_loss(self, learn):
            if learn.iter != 4 or self.done: return
            self.done = True
            raise cancel
    learn = new_learner([GradientAccumulation(3), Cut()], dls=(pieces(), None))
    learn.fit(1)
    assert all(p.grad is None for p in learn.model.parameters())
    first = params(learn)
    learn.fit(1)
    other = new_learner([GradientAccumulation(3)], dls=(pieces()[:3], None))
    other.fit(1)
    near(first, params(other))
    other.dls = (pieces(), None)
    other.fit(1)
    near(params(learn), params(other), rtol=1e-5)


def test_batches_that_another_callback_throws_away_after_backward():
    "An overflow found after `backward`: its gradient is gone with it."
    class Overflow(Callback):
        order = 0  # after the accumulation
        def after_backward(self, learn):
            if learn.iter == 1: raise CancelBatch
    learn = new_learner([GradientAccumulation(2), Overflow()], dls=(pieces(60), None))
    learn.fit(1)
    other = new_learner(GradientAccumulation(2), dls=(pieces(60)[2:], None))
    other.fit(1)
    near(params(learn), params(other), rtol=1e-5)


# Rows

Pair = namedtuple('Pair', 'a b')
T = torch.zeros

@pytest.mark.parametrize('target, inputs, expected', [
    (T(5), [T(5, 3)], 5), (T(5, 7).long(), [T(5, 3)], 5), ({'boxes': T(4, 2, 4), 'n': T(4)}, [T(4, 3)], 4),
    ((T(6), T(6, 2)), [T(6, 3)], 6), (Pair(T(6), T(6, 2)), [T(6, 3)], 6), ([T(6), T(6, 2)], [T(6, 3)], 6),
    ([T(2, 4), T(5, 4), T(1, 4)], [[T(3, 8, 8), T(3, 9, 9), T(3, 7, 7)]], 3),          # boxes of three images
    ([{'boxes': T(2, 4)}, {'boxes': T(1, 4)}], [[T(3, 8, 8), T(3, 8, 8)]], 2),
    (['a', 'b', 'c'], [T(3, 2)], 3), ([1, 2, 3, 4], [T(4, 2)], 4), ([[1], [2, 3]], [T(2, 9)], 2),
    (None, [T(8, 2)], 8), (T(()), [T(8, 2)], 8), ('label', [T(8, 2)], 8), (np.zeros((3, 2)), [T(3, 2)], 3), ({'name': 'x', 'y': T(5)}, [T(5)], 5),
    (T(0, 3), [T(0, 4)], 0), ([], [T(0, 4)], 0), (UserDict(y=T(3)), [UserDict(x=T(3, 2))], 3),
    (nn.utils.rnn.pack_sequence([T(3), T(2)]), [T(3, 2)], 2)])
def test_rows_are_counted_by_the_target(target, inputs, expected): assert n_rows(target, inputs) == expected


@pytest.mark.parametrize('target, inputs', [([T(3, 8), T(3, 8)], [[T(3, 8), T(3, 8)]]), ('x', ['y']), (None, [3]), ({}, [])])
def test_rows_that_cannot_be_told_are_refused(target, inputs):
    with pytest.raises(ValueError, match='override n_rows of the Learner'): n_rows(target, inputs)


def batches_as(form, sizes=(30, 30, 5)):
    g = torch.Generator().manual_seed(3)
    for n in sizes:
        x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
        yield form(x, y)

class Multi(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Model(4, 8, 3)
    def forward(self, x):
        if isinstance(x, list): x = torch.stack(x)
        if isinstance(x, dict): x = x['x']
        return self.net(x)

FORMS = {  # how a batch looks, and how the loss finds its target
    'tensors': (lambda x, y: (x, y), lambda t: t),
    'list of rows': (lambda x, y: ([*x], [*y]), torch.stack),
    'dict target': (lambda x, y: (x, {'name': 'rows', 'y': y}), lambda t: t['y']),
    'tuple target': (lambda x, y: (x, (y, y)), lambda t: t[0]),
    'list of targets': (lambda x, y: [x, [y, y]], lambda t: t[0]),
    'list of dicts': (lambda x, y: ([*x], [{'y': v} for v in y]), lambda t: torch.stack([d['y'] for d in t])),
    'numbers': (lambda x, y: (x, y.tolist()), torch.tensor),
    'strings': (lambda x, y: (x, [str(v) for v in y.tolist()]), lambda t: torch.tensor([int(v) for v in t])),
    'numpy': (lambda x, y: (x, y.numpy()), torch.from_numpy)}

@pytest.mark.parametrize('form, find', FORMS.values(), ids=FORMS)
def test_loss_metrics_and_accumulation_weigh_by_rows(form, find):
    def run(form, find, **kwargs):
        def loss_func(pred, target): return F.cross_entropy(pred, find(target))
        def right(pred, target): return accuracy(pred, find(target))
        batches = list(batches_as(form))
        learn = new_learner(GradientAccumulation(2), dls=(batches, batches), model=Multi, loss_func=loss_func, metrics=right)
        learn.fit(2)
        return params(learn), learn.results
    (w, r), (w2, r2) = run(form, find), run(*FORMS['tensors'])
    near(w, w2, rtol=1e-5)
    near([*r.values()], [*r2.values()], rtol=1e-5)


def test_rows_of_ones_own():
    class Packed(Learner):
        def n_rows(self): return int(self.yb['n'])
    batches = [(x, {'n': len(x), 'y': y}) for x, y in batches_as(lambda x, y: (x, y))]
    learn = new_learner(dls=(batches, batches), cls=Packed, loss_func=lambda p, t: F.cross_entropy(p, t['y']))
    learn.fit(1)
    plain = new_learner(dls=([*batches_as(lambda x, y: (x, y))],)*2)
    plain.fit(1)
    near(learn.results['valid_loss'], plain.results['valid_loss'])


def test_an_empty_batch_adds_nothing():
    batches = [(x, y) for x, y in batches_as(lambda x, y: (x, y))]
    empty = (T(0, 4), T(0).long())
    learn = new_learner(dls=(batches, None), metrics=[accuracy, lambda p, t: F.mse_loss(p, p*0)])
    learn.fit(1)
    for loss_func in (F.cross_entropy, nn.CrossEntropyLoss(), lambda p, t: F.cross_entropy(p, t)):
        learn.loss_func = loss_func
        near([*learn.validate([*batches, empty]).values()], [*learn.validate(batches).values()])
    with pytest.raises(FloatingPointError, match='batch 3'): new_learner(dls=([*batches, empty], None)).fit(1)


# Losses that are means over something else than rows

def ragged(ignored=-100):
    "Four sentences a batch, of which all but a few words are ignored."
    g = torch.Generator().manual_seed(5)
    for length in (2, 9, 4):
        x, y = torch.randn(4, length, 4, generator=g), torch.randint(3, (4, length), generator=g)
        y[:, 1:][torch.rand(4, length - 1, generator=g) < 0.5] = ignored
        yield x, y

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x): return self.layer(x).transpose(1, 2)  # (n, classes, length)

WEIGHT = torch.tensor([1., 2., 5.])

class Masked(nn.Module):
    def forward(self, pred, target): return F.cross_entropy(pred, target)
    def weight_of(self, pred, target): return (target >= 0).sum()

@pytest.mark.parametrize('loss_func, ignored', [(F.cross_entropy, -100), (nn.CrossEntropyLoss(ignore_index=-1), -1), (nn.CrossEntropyLoss(WEIGHT), -100),
                                                (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), -100), (Masked(), -100)])
def test_a_loss_over_words_is_a_mean_over_words(loss_func, ignored):
    batches = list(ragged(ignored))
    learn = new_learner(GradientAccumulation(3), dls=(batches, batches), model=Tokens, loss_func=loss_func)
    with torch.no_grad():
        preds = [learn.model(x).transpose(1, 2).reshape(-1, 3) for x, _ in batches]
        whole = loss_func(torch.cat(preds), torch.cat([y.reshape(-1) for _, y in batches]))
    near(learn.validate()['valid_loss'], whole, rtol=1e-5)
    learn.fit(1)
    near(learn.results['train_loss'], whole, rtol=1e-5)
    other = new_learner(model=Tokens)
    opt = torch.optim.SGD(other.model.parameters(), 0.1)
    loss_func(torch.cat([other.model(x).transpose(1, 2).reshape(-1, 3) for x, _ in batches]), torch.cat([y.reshape(-1) for _, y in batches])).backward()
    opt.step()
    near(params(learn), params(other), rtol=1e-4)


def test_a_batch_of_which_all_is_ignored_adds_nothing():
    batches = list(ragged())
    learn = new_learner(dls=(batches, batches), model=Tokens)
    expected = learn.validate()
    near([*learn.validate([*batches, (batches[0][0], batches[0][1]*0 - 100)]).values()], [*expected.values()])


def test_a_metric_may_say_its_weight():
    def word_accuracy(pred, target): return (pred.argmax(1) == target)[target >= 0].float().mean()
    word_accuracy.weight_of = lambda pred, target: (target >= 0).sum()
    batches = list(ragged())
    learn = new_learner(dls=(batches, batches), model=Tokens, metrics=word_accuracy)
    hits = [((learn.model(x).argmax(1) == y)[y >= 0]).float() for x, y in batches]
    near(learn.validate()['word_accuracy'], torch.cat(hits).mean())


@pytest.mark.parametrize('loss_func', [partial(F.cross_entropy, ignore_index=-1, weight=WEIGHT), partial(cross_entropy, dim=1, ignore_index=-1)])
def test_options_that_were_bound_to_a_loss_count(loss_func):
    batches = list(ragged(-1))
    learn = new_learner(dls=(batches, batches), model=Tokens, loss_func=loss_func)
    with torch.no_grad():
        preds = torch.cat([learn.model(x).transpose(1, 2).reshape(-1, 3) for x, _ in batches])
        near(learn.validate()['valid_loss'], loss_func(preds, torch.cat([y.reshape(-1) for _, y in batches])), rtol=1e-5)


def test_accuracy_counts_what_has_a_target():
    batches = [(x, torch.where(torch.arange(len(y)) < 2, -100, y)) for x, y in batches_as(lambda x, y: (x, y), (4, 30, 2))]
    learn = new_learner(dls=(batches, batches), metrics=[accuracy, Accuracy('again')])
    found = learn.validate()
    preds, targets = learn.get_preds()
    near(found['accuracy'], accuracy(preds, targets))
    near(found['again'], accuracy(preds, targets))
