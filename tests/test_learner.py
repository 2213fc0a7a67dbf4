"The Learner under fire: exceptions and cancellations at every event, odd data, memory, and callbacks that get in each other's way."
import gc, io, json, math, shutil, sys, weakref
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import EVENTS, Accuracy, Callback, CancelBatch, CancelEpoch, CancelFit, Learner, Metric, Metrics, Progress, Recorder, StopOnNaN
from exp.nb_15 import Device, GradientAccumulation, GradientClip, OverfitOneBatch
from exp.nb_12 import SGD
from exp.nb_30 import Compile, MixedPrecision

N, BS = 96, 32

def data(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))

def loaders(bs=BS, **kwargs): return DataLoader(data(), bs, seed=0, **kwargs), DataLoader(data(50, 1), bs)

def new_learner(cbs=(), dls=None, model=None, cls=Learner, lr=0.1, **kwargs):
    set_seed(42)
    return cls(model() if model else Model(4, 8, 3), dls or loaders(), lr=lr, cbs=cbs, progress=False, **kwargs)

def params(learn): return torch.cat([p.detach().reshape(-1) for p in learn.model.parameters()])


class Spy(Callback):
    "Notes every event."
    def __init__(self): self.seen = []
for event in EVENTS: setattr(Spy, event, lambda self, learn, event=event: self.seen.append(event))

class RaiseOnce(Callback):
    "Raises at the first time an event comes, after the spy at most events, before it in cleanups."
    order = 1
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.fail)
    def fail(self, learn):
        error, self.error = self.error, None
        if error: raise error

def short(): return [data()[:8]], [data()[8:16]]  # one batch to train on, one to validate on

def full_trace(n_epochs=2):
    spy = Spy()
    new_learner([spy], short()).fit(n_epochs)
    return spy.seen

BATCH = {e for e in EVENTS if e in ('before_batch', 'after_batch', 'cleanup_batch') or e.split('_')[1] in ('predict', 'loss', 'backward', 'step')}
EPOCH = {'before_epoch', 'after_epoch', 'cleanup_epoch'}

def open_phases(event):
    "Phases whose cleanup is still to come when `event` raises, innermost first."
    phases = ['batch', 'epoch', 'fit'] if event in BATCH else ['epoch', 'fit'] if event in EPOCH else ['fit']
    return phases[1:] if event.startswith('cleanup') else phases


def test_the_order_of_events():
    trained = 'before_batch after_predict after_loss after_backward after_step after_batch cleanup_batch'.split()
    validated = 'before_batch after_predict after_loss after_batch cleanup_batch'.split()
    epoch = ['before_epoch', *trained, *validated, 'after_epoch', 'cleanup_epoch']
    assert full_trace() == ['before_fit', *epoch, *epoch, 'after_fit', 'cleanup_fit']


def test_a_batch_that_is_over_is_let_go():
    class Look(Callback):
        def after_epoch(self, learn): self.left = learn.batch, learn.pred, learn.loss
    new_learner(look := Look()).fit(1)
    assert look.left == (None, None, None)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('event', EVENTS)
def test_an_exception_at_any_event(event, error):
    "The cleanup of every open phase runs, once, innermost first; the Learner goes on as if nothing had been."
    spy, full = Spy(), full_trace()
    learn = new_learner([spy], short(), opt_func=lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))
    learn.model.eval()
    with pytest.raises(error): learn.fit(2, lr=0.3, cbs=RaiseOnce(event, error()))
    assert spy.seen == full[:full.index(event) + 1] + [f'cleanup_{phase}' for phase in open_phases(event)]
    assert learn.batch is None and learn.pred is None and learn.loss is None and not learn.model.training
    assert learn.opt.param_groups[0]['lr'] == 0.1 and all(p.grad is None for p in learn.model.parameters())
    assert {'backward', 'step', 'predict'}.isdisjoint(vars(learn))
    spy.seen.clear()
    learn.fit(2)
    assert spy.seen == full


@pytest.mark.parametrize('cancel', [CancelBatch, CancelEpoch, CancelFit])
@pytest.mark.parametrize('event', EVENTS)
def test_cancel_at_any_event(event, cancel):
    "Caught by its phase, if that is open: then the rest of the phase is skipped, and all goes on after its cleanup."
    spy, full, phase = Spy(), full_trace(), cancel.__name__[len('Cancel'):].lower()
    learn, phases = new_learner([spy], short()), open_phases(event)
    if phase not in phases:
        with pytest.raises(cancel): learn.fit(2, cbs=RaiseOnce(event, cancel()))
        return
    learn.fit(2, cbs=RaiseOnce(event, cancel()))
    at, closed = full.index(event), phases[:phases.index(phase) + 1]
    rest = full[full.index(f'cleanup_{phase}', at) + 1:]
    assert spy.seen == full[:at + 1] + [f'cleanup_{p}' for p in closed] + rest


@pytest.mark.parametrize('event', ['cleanup_batch', 'cleanup_epoch', 'cleanup_fit'])
def test_every_cleanup_runs_even_if_one_fails(event):
    spies = [Spy(), Spy()]
    first, last = RaiseOnce(event, RuntimeError('first')), RaiseOnce(event, RuntimeError('last'))
    with pytest.raises(RuntimeError): new_learner([spies[0], first, last, spies[1]], short()).fit(1)
    assert all(spy.seen.count(event) == 1 for spy in spies) and first.error is last.error is None


def test_cleanup_goes_backwards():
    seen = []
    class Named(Callback):
        def __init__(self, name, order): self.name, self.order = name, order
        def before_fit(self, learn): seen.append(self.name)
        def cleanup_fit(self, learn): seen.append(self.name)
    new_learner([Named('b', 1), Named('c', 1), Named('a', 0)], short()).fit(1)
    assert ''.join(seen) == 'abccba'


def test_nothing_of_a_failed_batch_is_alive():
    "Not even while the traceback is kept, whatever frames it went through."
    refs = []
    class Failing(nn.Linear):
        def forward(self, x):
            hidden, nest = x*2, {'a': [x + 1]}
            refs.extend(weakref.ref(t) for t in (x, hidden, nest['a'][0]))
            raise RuntimeError('no')
    learn = new_learner(model=lambda: Failing(4, 3))
    with pytest.raises(RuntimeError) as caught: learn.fit(1)
    gc.collect()
    assert caught.value.__traceback__ and len(refs) == 3 and all(ref() is None for ref in refs)


def test_no_growth_over_200_fits():
    learn = new_learner(dls=short(), metrics=accuracy)
    def count():
        gc.collect()
        return len(gc.get_objects()), sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for _ in range(20): learn.fit(1)
    before = count()
    for _ in range(200): learn.fit(1)
    objects, tensors = (b - a for a, b in zip(before, count()))
    assert objects < 100 and tensors == 0


@pytest.mark.parametrize('opt_func', [torch.optim.SGD, torch.optim.Adam])
def test_fitting_twice_is_one_longer_fit(opt_func):
    def train(*epochs):
        learn = new_learner(dls=loaders(shuffle=True), opt_func=opt_func, lr=0.01,
                            model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
        losses = []
        for n in epochs:
            learn.fit(n)
            losses.append(learn.recorder.losses)
        return torch.cat(losses), params(learn)
    for a, b in zip(train(1, 2), train(3)): assert torch.equal(a, b)


def test_a_new_optimizer_on_request():
    learn = new_learner(opt_func=torch.optim.Adam)
    learn.fit(1)
    first = learn.opt
    learn.fit(1)
    assert learn.opt is first
    learn.fit(1, reset_opt=True)
    assert learn.opt is not first


def test_callbacks_changed_during_a_fit_count_from_the_next():
    spy = Spy()
    class Meddler(Callback):
        def before_epoch(self, learn):
            if spy not in learn.cbs: learn.cbs.append(spy)
    learn = new_learner(Meddler(), short())
    learn.fit(2)
    assert spy.seen == []
    learn.fit(2)
    assert spy.seen == full_trace()


def test_a_fit_within_a_fit():
    "A callback may validate or predict in the middle of an epoch: nothing changes but the time."
    class Curious(Callback):
        def after_step(self, learn):
            loss, epoch = learn.loss, learn.epoch
            self.result, preds = learn.validate(), learn.get_preds(data()[:10][0])[0]
            assert learn.loss is loss and learn.training and learn.model.training and learn.epoch == epoch and len(preds) == 10
    plain, curious = new_learner(metrics=accuracy), new_learner([cb := Curious()], metrics=accuracy)
    for learn in (plain, curious): learn.fit(2)
    assert torch.equal(params(plain), params(curious)) and torch.equal(plain.recorder.losses, curious.recorder.losses)
    assert plain.results == curious.results and cb.result.keys() == {'valid_loss', 'accuracy'}


# Odd data

class Broken:
    def __init__(self, at): self.at = at
    def __len__(self): return N
    def __getitem__(self, i):
        if i == self.at: raise OSError(f'row {i} cannot be read')
        return torch.ones(4), 0

def test_a_dataset_that_raises():
    ds = Broken(40)
    learn = new_learner(dls=(DataLoader(ds, BS), None))
    with pytest.raises(OSError, match='row 40'): learn.fit(1)
    ds.at = None
    learn.fit(1)
    assert len(learn.recorder.losses) == 3


def test_an_empty_loader_and_a_generator():
    with pytest.raises(ValueError, match='to train on, got none'): new_learner(dls=(DataLoader(data(), 100, drop_last=True), None)).fit(1)
    with pytest.raises(ValueError, match='to validate on, got none'): new_learner(dls=(short()[0], [])).fit(1)
    learn = new_learner(dls=(iter([data()[:8]]), None))
    with pytest.raises(ValueError, match='used up'): learn.fit(2)
    assert len(learn.recorder.epochs) == 1


def test_a_batch_of_one():
    learn = new_learner(dls=(DataLoader(data(3), 1), DataLoader(data(1), 1)), metrics=accuracy)
    learn.fit(1)
    assert len(learn.recorder.losses) == 3 and learn.results['accuracy'] in (0., 1.)


@pytest.mark.parametrize('at', [0, 4, 99, 100, 104])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_nan_at_a_chosen_step(at, value):
    def loss_func(pred, yb):
        loss = F.cross_entropy(pred, yb)
        calls.append(None)
        return loss*value if len(calls) == 105 + at + 1 else loss
    calls = []
    learn = new_learner(dls=(short()[0]*105, None), loss_func=loss_func)
    with pytest.raises(FloatingPointError, match=f'got {value} at epoch 1, batch {at}, lr 0.1'): learn.fit(3)
    assert len(calls) <= 105 + at + 100


def test_several_inputs_and_a_loss_of_several_parts():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Model(4, 8, 3)
        def forward(self, a, b): return self.net(a - b)
    class Parts(Learner):
        def get_loss(self):
            self.loss, self.parts = self.loss_func(self.pred, self.yb)
    def both(pred, yb): return (loss := F.cross_entropy(pred, yb)), {'entropy': loss.detach()}
    x, y = data()[:64]
    batches = [(x[i:i + 32], torch.ones(4), y[i:i + 32]) for i in (0, 32)]
    learn = new_learner(dls=(batches, batches), model=TwoInputs, cls=Parts, loss_func=both, metrics=Accuracy())
    learn.fit(2)
    assert learn.results['train_loss'] > learn.results['valid_loss'] and learn.parts['entropy'] > 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match='pair .training, validation or None., got DataLoader'): Learner(Model(4, 8, 3), loaders()[0])
    with pytest.raises(ValueError, match='got 0'): new_learner().fit(0)
    with pytest.raises(ValueError, match='1 learning rates, one a group, got 2'): new_learner().fit(1, lr=[0.1, 0.2])
    with pytest.raises(ValueError, match='got None'): new_learner(dls=(loaders()[0], None)).validate()
    with pytest.raises(TypeError, match='expected a Callback, got 3'): new_learner([3]).fit(1)
    with pytest.raises(TypeError, match='expected an event, got Keras.before_train: did you mean before_'):
        class Keras(Callback):
            def before_train(self, learn): pass


# Metrics

@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**31))
def test_a_metric_is_the_same_however_the_rows_are_cut(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(sum(sizes), 5, generator=g), torch.randint(5, (sum(sizes),), generator=g)
    for metric in (Accuracy(), Metric(F.cross_entropy)):
        for p, t in zip(pred.split(sizes), target.split(sizes)): metric.update(p, t)
        near(metric.compute(), metric.func(pred, target), rtol=1e-5)


def test_a_metric_over_many_batches():
    "More than are added up at once."
    pred, target = torch.randn(1050, 5), torch.randint(5, (1050,))
    metric = Metric(F.cross_entropy)
    for p, t in zip(pred.split(3), target.split(3)): metric.update(p, t)
    near(metric.compute(), F.cross_entropy(pred, target), rtol=1e-5)


def test_training_metrics():
    learn = new_learner([Metrics(train=True)], metrics=accuracy, lr=0.)
    learn.fit(1)
    x, y = data()[:N]
    near(learn.results['train_accuracy'], accuracy(learn.model(x), y))
    near(learn.results['train_loss'], F.cross_entropy(learn.model(x), y))
    assert list(learn.results) == ['train_loss', 'train_accuracy', 'valid_loss', 'accuracy']
    assert sum(isinstance(cb, Metrics) for cb in learn.cbs) == 1


def test_torchmetrics():
    torchmetrics = pytest.importorskip('torchmetrics', reason='torchmetrics is not installed')
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average='micro')
    learn = new_learner(metrics=[accuracy, metric])
    learn.fit(2)
    near(learn.results['MulticlassAccuracy'], learn.results['accuracy'])


# Callbacks together

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('clip', [(), (GradientClip(0.05),)])
def test_accumulation_is_the_large_batch(n, clip):
    "Uneven pieces at the end included; clipping sees the whole gradient."
    x, y = data(75)[:]
    def train(bs, cbs):
        learn = new_learner(cbs, dls=([(x[i:i + bs], y[i:i + bs]) for i in range(0, 75, bs)], None), lr=0.5)
        learn.fit(2)
        assert 'backward' not in vars(learn)
        return params(learn)
    whole = train(10*n, clip)
    near(train(10, [GradientAccumulation(n), *clip]), whole, rtol=1e-4, atol=1e-6)
    if clip: assert not torch.allclose(whole, train(10*n, ()), rtol=1e-2)


def test_overfitting_and_what_it_leaves():
    learn = new_learner()
    dls = learn.dls
    learn.fit(1, lr=0.5, cbs=OverfitOneBatch(300))
    assert learn.recorder.losses[-1] < 0.3*learn.recorder.losses[0] and learn.dls is dls
    with pytest.raises(RuntimeError): learn.fit(1, cbs=[OverfitOneBatch(3), RaiseOnce('before_fit', RuntimeError())])
    assert learn.dls is dls


def test_mixed_precision_leaves_autocast():
    class Probe(Callback):
        order = 50
        def after_predict(self, learn): self.during, self.dtype = torch.is_autocast_enabled('cpu'), learn.pred.dtype
        def after_loss(self, learn): self.after = torch.is_autocast_enabled('cpu')
    learn = new_learner([MixedPrecision(), probe := Probe()])
    learn.fit(1)
    assert probe.during and probe.dtype is torch.bfloat16 and not probe.after
    with pytest.raises(RuntimeError): learn.fit(1, cbs=RaiseOnce('after_predict', RuntimeError()))
    assert not torch.is_autocast_enabled('cpu')
    with pytest.raises(ValueError, match='got torch.float64'): MixedPrecision(torch.float64)


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='needs a C++ compiler')
@pytest.mark.parametrize('opt_func', [torch.optim.SGD, SGD], ids=['torch.optim', 'ours'])
def test_compiled_equals_eager(opt_func):
    def train(cbs):
        learn = new_learner(cbs, model=lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), metrics=accuracy,
                            opt_func=opt_func)
        learn.fit(3)
        assert {'predict', 'get_loss', 'backward'}.isdisjoint(vars(learn))
        return learn
    eager, compiled = train(()), train([Compile(), GradientClip(0.05)])
    clipped = train([GradientClip(0.05)])
    near(compiled.recorder.losses, clipped.recorder.losses, rtol=1e-4)
    for a, b in zip(compiled.model.state_dict().values(), clipped.model.state_dict().values()): near(a, b, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(eager.recorder.losses, clipped.recorder.losses, rtol=1e-3)


def test_the_rate_of_a_fit_is_for_that_fit_on_a_device_too():
    "Device makes new parameter groups when it moves the optimizer's state."
    learn = new_learner(Device('cpu'), opt_func=torch.optim.Adam)
    learn.fit(1)
    learn.fit(1, lr=0.5)
    assert learn.recorder.lrs == [0.5]*3 and learn.opt.param_groups[0]['lr'] == 0.1


def test_defaults_can_be_replaced():
    class Mine(Recorder): pass
    learn = new_learner([Mine(), StopOnNaN(every=1)])
    assert [type(cb) for cb in learn.cbs] == [Metrics, Progress, Mine, StopOnNaN]
    assert len(Learner.default_cbs) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('precision', [(), (MixedPrecision(torch.float16), GradientClip(1.)), (MixedPrecision(torch.float16), GradientAccumulation(2))])
def test_on_cuda(precision):
    cpu, gpu = new_learner(dls=loaders(16), metrics=accuracy), new_learner([Device('cuda'), *precision], dls=loaders(16), metrics=accuracy)
    gpu.validate()
    for learn in (cpu, gpu): learn.fit(2)
    assert next(gpu.model.parameters()).is_cuda and gpu.recorder.losses.device.type == 'cpu'
    if not precision: near(gpu.recorder.losses, cpu.recorder.losses, rtol=1e-3)
    else: assert abs(gpu.results['valid_loss'] - cpu.results['valid_loss']) < 0.3


# What is shown

def test_lines_in_a_pipe(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, 'IPython', raising=False)
    learn = new_learner(metrics=accuracy)
    learn.progress = True
    learn.fit(2)
    out, err = capsys.readouterr()
    heading, *rows = out.splitlines()
    assert heading == 'epoch  train_loss  valid_loss  accuracy  seconds' and err == ''
    assert [row[:5] for row in rows] == ['    0', '    1'] and all(len(row) == len(heading) for row in rows)


def test_a_bar_in_a_terminal(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.delitem(sys.modules, 'IPython', raising=False)
    monkeypatch.setattr(sys, 'stderr', terminal := Terminal())
    learn = new_learner([Progress(every=0)], metrics=accuracy)
    learn.progress = True
    learn.fit(2)
    assert 'epoch 1' in terminal.getvalue() and '3/3' in terminal.getvalue() and 'loss=' in terminal.getvalue()
    assert terminal.getvalue().endswith('\r') and len(capsys.readouterr().out.splitlines()) == 3
    assert all(cb.screen is None for cb in learn.cbs if isinstance(cb, Progress))


def test_nothing_but_the_table_is_left_in_the_notebooks():
    pages = [json.loads(p.read_text()) for p in (Path(__file__).parent.parent/'nbs').glob('1*.ipynb')]
    html = [''.join(o['data']['text/html']) for nb in pages for c in nb['cells'] for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    assert html and all(h.startswith('<table>') and '<progress' not in h for h in html)


def test_the_record(tmp_path):
    learn = new_learner(metrics=accuracy)
    learn.fit(2)
    record = json.loads(json.dumps(learn.recorder.to_dict()))
    assert len(record['losses']) == len(record['lrs']) == 6 and [row['epoch'] for row in record['epochs']] == [0, 1]
    path = tmp_path/'epochs.csv'
    path.write_text('older')
    with pytest.raises(AttributeError): Recorder().to_csv(path)
    assert path.read_text() == 'older'
    learn.recorder.to_csv(path)
    assert path.read_text().splitlines()[0] == 'epoch,train_loss,valid_loss,accuracy,seconds' and [*tmp_path.iterdir()] == [path]
