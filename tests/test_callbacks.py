"Callbacks as strangers use them: batches of every form, functions that change them, what comes back wrong, and all of it together."
import random
from collections import namedtuple
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Callback, CancelBatch, CancelEpoch, CancelFit, Learner, Metrics
from exp.nb_11 import get_rng_state
from exp.nb_13 import Checkpoint
from exp.nb_15 import BatchTransform, Device, GradientAccumulation, GradientClip, OverfitOneBatch
from exp.nb_30 import Compile, MixedPrecision


def data(n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))

def loaders(bs=32, **kwargs): return DataLoader(data(), bs, shuffle=True, seed=0, **kwargs), DataLoader(data(50, 1), bs)
def pieces(n=75, bs=10): return [(x, y) for x, y in DataLoader(data(n), bs)]

def new_learner(cbs=(), dls=None, model=None, cls=Learner, lr=0.1, **kwargs):
    set_seed(42)
    return cls(model() if model else Model(4, 8, 3), dls or loaders(), lr=lr, cbs=cbs, progress=False, **kwargs)

def params(learn): return torch.cat([p.detach().reshape(-1) for p in learn.model.parameters()])
def on(event, do, **attributes): return type('Doing', (Callback,), {event: lambda self, learn: do(learn), **attributes})()

def run(cbs=(), epochs=2, **kwargs):
    learn = new_learner(cbs, **kwargs)
    learn.fit(epochs)
    return learn

def same(a, b): return torch.equal(params(a), params(b)) and torch.equal(a.recorder.losses, b.recorder.losses)

def double(x): return 2*x
def double_in_data(dls): return tuple([(2*x, y) for x, y in dl] for dl in dls)


# What a function is given, and when

def fixed(): return pieces(), pieces(40)

FORMS = {
    'inputs': double, 'an option': lambda x, factor=2: factor*x, 'all fields': lambda x, y: (2*x, y), 'a list': lambda x, y: [2*x, y],
    'any number': lambda *fields: (2*fields[0], *fields[1:]), 'in place': lambda x: x.mul_(2), 'bound': partial(torch.mul, other=2)}

@pytest.mark.parametrize('form', FORMS)
def test_it_is_as_if_the_data_were_so(form):
    learn, expected = run(BatchTransform(FORMS[form]), dls=fixed()), run(dls=(double_in_data(fixed())[0], fixed()[1]))
    assert same(learn, expected) and learn.results == expected.results


def test_modules_and_functions_of_other_languages():
    assert same(run(BatchTransform(nn.Sequential(nn.Identity())), dls=fixed()), run(dls=fixed()))
    positive = [(x.abs(), y) for x, y in pieces()], None
    assert same(run(BatchTransform(torch.abs), dls=fixed()[:1] + (None,)), run(dls=positive))
    class Scale(nn.Module):
        def forward(self, x, factor=2): return factor*x
    assert same(run(BatchTransform(Scale()), dls=fixed()), run(BatchTransform(double), dls=fixed()))
    class Many(nn.Module):  # as those of torchvision's second version
        def forward(self, *fields): return 2*fields[0], *fields[1:]
    assert same(run(BatchTransform(Many()), dls=fixed()), run(BatchTransform(double), dls=fixed()))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('valid', [True, False])
def test_when(train, valid):
    if not (train or valid):
        with pytest.raises(ValueError, match='got neither'): BatchTransform(double, train, valid)
        return
    doubled = double_in_data(fixed())
    dls = tuple(new if wanted else old for new, old, wanted in zip(doubled, fixed(), (train, valid)))
    learn, expected = run(BatchTransform(double, train, valid), dls=fixed(), metrics=accuracy), run(dls=dls, metrics=accuracy)
    assert same(learn, expected) and learn.results == expected.results
    assert learn.validate() == expected.validate()
    near(learn.get_preds()[0], expected.get_preds()[0])
    x = torch.randn(5, 4)
    near(learn.predict(x), expected.predict(2*x if valid else x))
    near(learn.get_preds(x)[0], learn.predict(x))


def test_a_function_of_all_fields_predicts_without_targets():
    seen = []
    def note(x, y):
        seen.append(y)
        return 2*x, y
    learn = new_learner(BatchTransform(note, valid=True))
    near(learn.predict(torch.ones(2, 4)), new_learner().predict(2*torch.ones(2, 4)))
    assert seen == [None]


# Batches of other forms

class ByName(Learner):
    @property
    def xb(self): return (self.batch['x'],)
    @property
    def yb(self): return self.batch['y']

def named(batches): return [dict(x=x, y=y) for x, y in batches]

def test_dicts():
    learn = run(BatchTransform(lambda batch: {**batch, 'x': 2*batch['x']}), cls=ByName, dls=(named(pieces()), named(pieces(40))))
    assert same(learn, run(BatchTransform(double), dls=fixed()))
    batches = named(pieces())
    run(BatchTransform(lambda batch: batch | dict(x=batch['x'].zero_())), cls=ByName, dls=(batches, None))
    assert torch.equal(batches[0]['x'], pieces()[0][0])
    for wrong, said in ((lambda b: b['x'], r'a tensor of shape \(10, 4\)'), (lambda b: None, 'None'), (lambda b: (b['x'], b['y']), 'a tuple of')):
        with pytest.raises(ValueError, match=f'to give a dict, as it was given, got {said}'): run(BatchTransform(wrong), cls=ByName, dls=(batches, None))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = Model(4, 8, 3)
    def forward(self, a, b): return self.out(a + b)

def test_several_inputs():
    triples = [(x, x.flip(0), y) for x, y in pieces()]
    expected = run(model=Sum, dls=([(2*a, b, y) for a, b, y in triples], None))
    for func in (lambda a, b: (2*a, b), lambda a, b: [2*a, b], lambda a, b, y: (2*a, b, y), lambda *batch: (2*batch[0], *batch[1:])):
        assert same(run(BatchTransform(func), model=Sum, dls=(triples, None)), expected)
    with pytest.raises(TypeError, match=r'the inputs of a batch \(2\), or all its fields \(3\), got one that takes 1'):
        run(BatchTransform(double), model=Sum, dls=(triples, None))
    with pytest.raises(ValueError, match=r'2 fields, as it was given, got a tensor of shape \(10, 4\)'):
        run(BatchTransform(lambda a, b: a), model=Sum, dls=(triples, None))


class Swapped(Learner):
    "Its batches are (target, inputs)."
    @property
    def xb(self): return self.batch[1:]
    @property
    def yb(self): return self.batch[0]

def test_tuples_of_a_form_of_their_own():
    swapped = [(y, x) for x, y in pieces()]
    assert same(run(BatchTransform(lambda y, x: (y, 2*x)), cls=Swapped, dls=(swapped, None)), run(BatchTransform(double), dls=(pieces(), None)))
    with pytest.raises(TypeError, match=r'to take all its fields \(2\), got one that takes 1'): run(BatchTransform(double), cls=Swapped, dls=(swapped, None))


class Itself(Learner):
    "Batches of one field, or none: an autoencoder."
    @property
    def xb(self): return (self.yb,)
    @property
    def yb(self): return self.batch if isinstance(self.batch, torch.Tensor) else self.batch[0]

def test_batches_of_one_field():
    rows = data()[:][0]
    options = dict(cls=Itself, model=lambda: nn.Linear(4, 4), loss_func=F.mse_loss)
    expected = run(dls=(list((2*rows).split(32)), None), **options)
    assert same(run(BatchTransform(double), dls=(list(rows.split(32)), None), **options), expected)
    assert same(run(BatchTransform(double), dls=(TorchLoader(TensorDataset(rows), 32), None), **options), expected)


Pair = namedtuple('Pair', 'image digit')

class Named(Learner):
    @property
    def xb(self): return (self.batch.image,)
    @property
    def yb(self): return self.batch.digit

def test_namedtuples_stay_namedtuples():
    batches = [Pair(x, y) for x, y in pieces()]
    assert same(run(BatchTransform(lambda image, digit: (2*image, digit)), cls=Named, dls=(batches, None)), run(BatchTransform(double), dls=(pieces(), None)))


def test_lists_of_images_of_several_sizes():
    "A function may make one tensor of them."
    class Longest(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 3)
        def forward(self, x): return self.out(x)
    batches = [([torch.ones(n) for n in (2, 4, 6)], torch.tensor([0, 1, 2]))]*2
    pad = lambda xs: torch.stack([F.pad(x, [0, 6 - len(x)]) for x in xs])
    learn = run(BatchTransform(pad, valid=True), model=Longest, dls=(batches, batches))
    assert len(batches[0][0][0]) == 2 and learn.results['valid_loss'] < 2


# Functions that give something else

@pytest.mark.parametrize('func, said', [
    (lambda x: None, 'one field, as it was given, got None'), (lambda x: (x, x), 'one field, as it was given, got a tuple of a tensor of shape (10, 4), a tensor'),
    (lambda x, y: x, '2 fields, as it was given, got a tensor of shape (10, 4)'), (lambda x, y: (x,), 'got a tuple of a tensor of shape (10, 4)'),
    (lambda x, y: (x, y, y), '2 fields'), (lambda x, y: None, 'got None'), (lambda x, y: (x, None), 'got a tuple of a tensor of shape (10, 4), None'),
    (lambda x, y: (), 'a tuple of nothing'), (lambda x, y: dict(x=x, y=y), 'got a dict'), (lambda x: x[:3], 'the rows of the inputs, 10, got a tensor of shape (3, 4)'),
    (lambda x: x.mean(), 'the rows of the inputs, 10, got a tensor of shape ()')])
def test_wrong_returns(func, said):
    with pytest.raises(ValueError) as error: run(BatchTransform(func), dls=fixed())
    assert said in str(error.value)


def test_two_rows_are_no_two_fields():
    "A tensor of two rows could be unpacked."
    with pytest.raises(ValueError, match='got a tensor'): run(BatchTransform(lambda x, y: x), dls=([(x[:2], y[:2]) for x, y in pieces()], None))


@pytest.mark.parametrize('value, said', [(None, 'got None'), (0.1, 'got 0.1'), ('flip', "got 'flip'"), (nn.Identity, 'Identity'), ([double], 'got \\[')])
def test_wrong_functions(value, said):
    with pytest.raises(TypeError, match=said): BatchTransform(value)


def test_functions_of_other_counts():
    for func in (lambda x, y, z: x, lambda x, y, z, w=1: x):
        with pytest.raises(TypeError, match='got one that takes 3'): run(BatchTransform(func))
    def own(x): raise KeyError('mine')
    with pytest.raises(KeyError, match='mine'): run(BatchTransform(own))


def test_rows_may_change_with_their_targets():
    "Every row twice."
    learn, expected = run(BatchTransform(lambda x, y: (x.repeat(2, 1), y.repeat(2))), dls=fixed()), run(dls=fixed())
    near(params(learn), params(expected), rtol=1e-4)


# What is left as it was

def test_data_are_not_written_into():
    ds, batches = data(), pieces()
    for dls in ((DataLoader(ds, 32), DataLoader(ds, 32)), (batches, batches)):
        run(BatchTransform(lambda x, y: (x.zero_(), y.zero_()), valid=True), dls=dls)
    assert torch.equal(ds[:][0], data()[:][0]) and torch.equal(batches[3][1], pieces()[3][1])


def test_a_transform_of_one_fit_is_for_that_fit():
    learn = new_learner(dls=fixed())
    before = list(learn.cbs)
    learn.fit(1, cbs=BatchTransform(double, valid=True))
    assert learn.cbs == before and learn.batch is None
    plain = learn.validate()['valid_loss']
    learn.cbs.append(BatchTransform(double, train=False, valid=True))
    assert learn.validate()['valid_loss'] != plain


def test_validation_within_a_fit_is_transformed_too():
    "Also if the transform was given to the fit alone."
    seen = []
    look = on('after_epoch', lambda learn: seen.append(learn.validate()))
    learn = new_learner(look, dls=fixed())
    learn.fit(2, cbs=BatchTransform(double, valid=True))
    assert seen[-1]['valid_loss'] == learn.results['valid_loss']
    near(seen[-1]['valid_loss'], learn.validate(double_in_data(fixed())[1])['valid_loss'])


@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_step', 'after_epoch'])
def test_a_pass_within_a_batch_changes_nothing(event):
    def look(learn):
        if learn.depth > 1: return
        learn.validate()
        learn.predict(torch.zeros(2, 4))
    def make(do): return [*([on(event, look, order=7)] if do else []), BatchTransform(noise), BatchTransform(double, valid=True), GradientAccumulation(2)]
    assert same(run(make(True)), run(make(False)))


def noise(x): return x + 0.1*torch.randn_like(x)

def test_a_sweep_leaves_no_trace():
    "And is made with the transform, as the training will be."
    calls = []
    def note(x):
        calls.append(len(x))
        return noise(x)
    learn = new_learner(BatchTransform(note))
    state = get_rng_state(learn.dls)
    with pytest.warns(UserWarning): learn.lr_find(steps=12, plot=False)
    assert len(calls) == 12
    after = get_rng_state(learn.dls)
    assert torch.equal(state['torch'], after['torch']) and state['python'] == after['python']
    learn.fit(1)
    assert same(learn, run(BatchTransform(noise), epochs=1))


# Together with others

def test_after_device_and_before_everybody_else():
    seen = []
    def note(x):
        seen.append(x.device.type)
        return x
    def look(learn):
        seen.append(learn.batch[0].device.type)
        raise CancelFit
    new_learner([on('before_batch', look), BatchTransform(note), Device('meta')]).fit(1)
    assert seen == ['meta', 'meta']


def test_in_the_order_given():
    add = lambda x: x + 1
    assert same(run([BatchTransform(double), BatchTransform(add)], dls=fixed()), run(BatchTransform(lambda x: 2*x + 1), dls=fixed()))
    assert same(run([BatchTransform(add), BatchTransform(double)], dls=fixed()), run(BatchTransform(lambda x: 2*(x + 1)), dls=fixed()))


def test_mixed_precision_sees_full_precision_batches():
    dtypes = set()
    def note(x):
        y = x @ torch.ones(4, 4)
        dtypes.add(y.dtype)
        return x
    learn = run([MixedPrecision(), BatchTransform(note, valid=True)])
    assert dtypes == {torch.float32} and same(learn, run(MixedPrecision()))


def mixup(x, y, share=0.7):
    other, target = torch.randperm(len(x)), F.one_hot(y, 3).float()
    return share*x + (1 - share)*x[other], share*target + (1 - share)*target[other]

def test_targets_may_change():
    learn = run(BatchTransform(mixup), metrics=accuracy)
    assert learn.recorder.losses.isfinite().all() and 0 <= learn.results['accuracy'] <= 1
    def pairs(x, y): return x, (y, y.flip(0), torch.tensor(0.7))
    def loss_func(pred, target):
        if isinstance(target, torch.Tensor): return F.cross_entropy(pred, target)
        a, b, share = target
        return share*F.cross_entropy(pred, a) + (1 - share)*F.cross_entropy(pred, b)
    learn = run(BatchTransform(pairs), loss_func=loss_func)
    assert learn.recorder.losses.isfinite().all()


@pytest.mark.parametrize('n', [2, 3])
def test_accumulation_of_changed_batches_is_the_large_batch(n):
    soft = lambda x, y: (2*x, 0.9*F.one_hot(y, 3) + 0.1/3)
    cbs = [BatchTransform(soft), GradientClip(0.05)]
    x, y = data(75)[:]
    whole = [(x[i:i + 10*n], y[i:i + 10*n]) for i in range(0, 75, 10*n)]
    near(params(run([*cbs, GradientAccumulation(n)], dls=(pieces(), None))), params(run(cbs, dls=(whole, None))), rtol=1e-4, atol=1e-6)


def test_one_batch_is_changed_anew_each_time():
    "Not what was changed before."
    seen = []
    look = on('before_batch', lambda learn: seen.append(learn.batch[0].clone()))
    learn = new_learner([look, BatchTransform(double), OverfitOneBatch(3)], dls=fixed())
    learn.fit(1)
    assert len(seen) == 3 and all(torch.equal(x, 2*pieces()[0][0]) for x in seen)
    seen.clear()
    new_learner([look, BatchTransform(noise), OverfitOneBatch(3)], dls=fixed()).fit(1)
    assert not torch.equal(seen[0], seen[1]) and all((x - pieces()[0][0]).abs().max() < 0.6 for x in seen)


def test_it_may_throw_a_batch_away():
    def choosy(x):
        if x[0, 0] > 0: raise CancelBatch
        return x
    left = [(x, y) for x, y in pieces() if x[0, 0] <= 0]
    near(params(run([BatchTransform(choosy), GradientAccumulation(2)], dls=(pieces(), None))), params(run(GradientAccumulation(2), dls=(left, None))))


def test_closures_see_the_changed_batch_once():
    calls = []
    def note(x):
        calls.append(1)
        return 2*x
    options = dict(opt_func=lambda params, lr: torch.optim.LBFGS(params, lr, max_iter=3), epochs=1)
    learn = run(BatchTransform(note), dls=(pieces(), None), **options)
    assert len(calls) == len(pieces()) and same(learn, run(dls=(double_in_data(fixed())[0], None), **options))


# Randomness that goes on in another process

def random_all(x, y):
    "From all three generators."
    return x + 0.1*torch.randn_like(x) + 0.1*random.random() + 0.1*float(np.random.rand()), y

class Crash(Exception): pass

@pytest.mark.parametrize('at', [(0, 2), (1, 0), (1, 2)])
def test_an_interrupted_training_ends_with_the_same_weights(at, tmp_path):
    def crash(learn):
        if learn.training and (learn.epoch, learn.iter) == at: raise Crash
    def make(): return [BatchTransform(random_all, valid=True), GradientAccumulation(2)]
    whole = new_learner(make())
    whole.fit(3)
    learn = new_learner(make())
    with pytest.raises(Crash): learn.fit(3, cbs=[Checkpoint(tmp_path, every=1), on('before_batch', crash, order=50)])
    set_seed(7)
    again = Learner(Model(4, 8, 3), loaders(), lr=0.1, cbs=make(), progress=False)
    again.fit(3, cbs=Checkpoint(tmp_path, every=1, resume=True))
    assert torch.equal(params(again), params(whole)) and again.results == whole.results


# The others, where the old tests don't look

@pytest.mark.parametrize('event', ['after_backward', 'after_step'])
@pytest.mark.parametrize('cancel', [CancelBatch, CancelEpoch])
def test_accumulation_bears_cancelling_anywhere(event, cancel):
    "After a batch was cancelled behind it, a window begins anew, with no gradient in it."
    def stop(learn):
        if (learn.epoch, learn.iter) == (0, 3): raise cancel
    grads = []
    def note(learn):
        if (learn.epoch, learn.iter) > (0, 3): grads.append([p.grad.clone() for p in learn.model.parameters()])
    learn = new_learner([GradientAccumulation(2), on(event, stop, order=1), on('after_backward', note, order=1)], dls=(pieces(80), None), lr=0.)
    learn.fit(2)
    x, y = data(80)[:20] if cancel is CancelEpoch else data(80)[40:60]
    loss = F.cross_entropy(learn.model(x), y)
    for g, expected in zip(grads[0], torch.autograd.grad(loss, [*learn.model.parameters()]), strict=True): near(g, expected, atol=1e-6)


@pytest.mark.parametrize('cb', [GradientAccumulation(1), GradientClip(1e6), Device('cpu'), BatchTransform(lambda x: x), BatchTransform(lambda x, y: (x, y), valid=True)],
                         ids=['accumulate', 'clip', 'device', 'transform', 'transform both'])
def test_with_nothing_to_do_they_do_nothing(cb):
    assert same(run(cb, metrics=accuracy), run(metrics=accuracy))  # batches of 32: a power of two is exact


def test_a_sum_of_the_norm_is_that_of_torch():
    seen = []
    note = on('after_backward', lambda learn: seen.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]).norm()), order=1)
    run([GradientClip(0.01), note])
    near(torch.stack(seen), torch.full((6,), 0.01), rtol=1e-3)


def test_metrics_on_the_training_rows_see_the_changed_batch():
    learn = run([BatchTransform(double), Metrics(train=True)], dls=fixed(), metrics=accuracy)
    expected = run(Metrics(train=True), dls=(double_in_data(fixed())[0], fixed()[1]), metrics=accuracy)
    assert learn.results == expected.results


def test_compiled(monkeypatch):
    "The compiled function gets the changed batch as a tuple (not compiled here, for speed)."
    monkeypatch.setattr(torch, 'compile', lambda func: func)
    learn = run([Compile(), BatchTransform(lambda x, y: [2*x, y])], dls=fixed())
    near(params(learn), params(run(BatchTransform(double), dls=fixed())), rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_cuda():
    seen = []
    def note(x):
        seen.append(x.device.type)
        return 2*x
    gpu, cpu = run([Device('cuda'), BatchTransform(note, valid=True)]), run(BatchTransform(double, valid=True))
    assert set(seen) == {'cuda'}
    near(gpu.recorder.losses, cpu.recorder.losses, rtol=1e-3)


def test_one_batch_leaves_the_order_of_the_rows():
    learn = new_learner(lr=0.)
    learn.fit(1, cbs=OverfitOneBatch(3))
    learn.fit(2)
    assert same(learn, run(lr=0.))
    with pytest.raises(ValueError, match='a batch to train on, got none'): run(OverfitOneBatch(), dls=([], None))
