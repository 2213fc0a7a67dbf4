"Recorded and compiled steps: the same bits, or the same to twelve digits; what can't be recorded is refused by name."
import copy, pickle, random, shutil, warnings
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Callback, CancelBatch, Learner
from exp.nb_11 import Scheduler, sched_one_cycle
from exp.nb_12 import EMA, SGD, Adam, AdamW, Muon, RMSProp
from exp.nb_15 import BatchTransform, GradientAccumulation, GradientClip, OverfitOneBatch
from exp.nb_30 import Compile, MixedPrecision, Record

N_IN, N_OUT = 20, 4
OPTIMIZERS = {'SGD': (SGD, 0.1), 'momentum': (partial(SGD, momentum=0.9), 0.05), 'RMSProp': (RMSProp, 1e-3), 'Adam': (Adam, 1e-3),
              'Nesterov, decay': (partial(SGD, momentum=0.9, nesterov=True, weight_decay=1e-2), 0.05),
              'AdamW': (AdamW, 1e-3), 'Muon': (Muon, 0.02)}


def data(n=200, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, N_IN, generator=g, dtype=dtype)
    return x, (x @ torch.randn(N_IN, N_OUT, generator=g, dtype=dtype)).argmax(-1)


def deep(): return nn.Sequential(nn.Linear(N_IN, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, N_OUT))


def train(cbs=(), model=deep, epochs=2, dtype=torch.float32, opt_func=SGD, lr=0.1, n=200, dls=None, cls=Learner, **options):
    "A fit from a fixed seed; 200 rows in batches of 16 leave a short one of 8."
    torch.manual_seed(3)
    x, y = data(n, dtype)
    made = model().to(dtype)
    dls = dls or (DataLoader(Dataset(x, y), 16, shuffle=True, seed=1), DataLoader(Dataset(x[:50], y[:50]), 16))
    learn = cls(made, dls, opt_func=opt_func, lr=lr, cbs=cbs, progress=False, **options)
    learn.fit(epochs)
    return learn


def tensors(learn):
    state = learn.opt.state_dict()['state']
    return [t for m in learn.modules for t in m.state_dict().values()] + [t for r in state.values() for t in r.values()]


def assert_same(a, b):
    assert torch.equal(a.recorder.losses, b.recorder.losses) and a.results == b.results
    assert all(torch.equal(t, u) for t, u in zip(tensors(a), tensors(b), strict=True))


def assert_near(a, b, atol):
    torch.testing.assert_close(a.recorder.losses, b.recorder.losses, atol=1e-12, rtol=0)
    for t, u in zip(tensors(a), tensors(b), strict=True): torch.testing.assert_close(t, u, atol=atol, rtol=atol, check_dtype=False)


# recorded is eager, bit for bit

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_recorded_is_eager(name):
    "Dropout, batch normalization, a short last batch, whatever the optimizer."
    opt_func, lr = OPTIMIZERS[name]
    assert_same(train(opt_func=opt_func, lr=lr), train(Record(), opt_func=opt_func, lr=lr))


@pytest.mark.parametrize('opt_func', [torch.optim.SGD, torch.optim.AdamW])
def test_with_optimizers_of_pytorch(opt_func): assert_same(train(opt_func=opt_func, lr=1e-2), train(Record(), opt_func=opt_func, lr=1e-2))


def mixed_up(x, y): return x + 0.1*torch.randn_like(x), y

class Penalty(Callback):
    def after_loss(self, learn):
        if learn.training: learn.loss = 0.5*learn.loss + 1e-3*sum(p.pow(2).sum() for p in learn.model.parameters())

class SkipSome(Callback):
    def __init__(self, event): setattr(self, event, self.skip)
    def skip(self, learn):
        if learn.training and learn.iter % 3 == 1: raise CancelBatch

class Wilder(Callback):
    "Changes the share of dropout from batch to batch, freezes a layer at the second epoch, and validates within an epoch."
    def before_batch(self, learn):
        if learn.training: learn.model[3].p = 0.1*(learn.iter % 3)
    def before_epoch(self, learn): learn.model[0].requires_grad_(learn.epoch == 0)
    def after_step(self, learn):
        if learn.iter == 4: learn.validate()

class OneNumber(Learner):
    "A loss of shape (1,), which PyTorch takes as well."
    def get_loss(self): self.loss = F.cross_entropy(self.pred, self.yb).reshape(1)

def test_a_loss_of_one_number():
    for cbs in ([], [GradientAccumulation(2)]): assert_same(train(cbs, cls=OneNumber), train([Record(), *cbs], cls=OneNumber))


COMPANY = {'clip': lambda: [GradientClip(0.1)], 'accumulate': lambda: [GradientAccumulation(3)], 'EMA': lambda: [EMA(0.9)],
           'accumulate, clip, bf16': lambda: [GradientAccumulation(3), GradientClip(0.1), MixedPrecision()], 'bf16': lambda: [MixedPrecision()],
           'one cycle': lambda: [Scheduler(lr=sched_one_cycle(0.01, 0.3, 0.001))], 'transform': lambda: [BatchTransform(mixed_up)],
           'penalty': lambda: [Penalty()], 'skip after predict': lambda: [SkipSome('after_predict')], 'skip after loss': lambda: [SkipSome('after_loss')],
           'skip after backward': lambda: [SkipSome('after_backward')], 'wilder': lambda: [Wilder()], 'one batch': lambda: [OverfitOneBatch(5)]}

@pytest.mark.parametrize('name', COMPANY)
def test_in_company(name):
    eager = train(COMPANY[name]())
    assert_same(eager, train([Record(), *COMPANY[name]()]))
    assert_same(eager, train([*COMPANY[name](), Record()]))  # the order in which they are given does not matter


class Two(nn.Module):
    "Two inputs, a dict of outputs, a tensor that is no buffer, weights used twice, and one that nobody uses."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(N_IN, 16), nn.Linear(16, N_OUT), torch.full((N_OUT,), 2.)
        self.tied = nn.Linear(N_IN, 16)
        self.tied.weight, self.unused = self.a.weight, nn.Parameter(torch.ones(3))
    def forward(self, x, z): return dict(score=self.b(F.gelu(self.a(x) + self.tied(z)))*self.scale, extra=x.mean())

class OfDict(Learner):
    @property
    def xb(self): return self.batch['x'], self.batch['z']
    @property
    def yb(self): return self.batch['y']
    def get_loss(self): self.loss = F.cross_entropy(self.pred['score'], self.yb) + 0.1*self.pred['score'].pow(2).mean()

def test_nests():
    x, y = data()
    dls = [dict(x=x[i:i+16], z=x[i:i+16].flip(0), y=y[i:i+16], name='some text') for i in range(0, 200, 16)], None
    assert_same(train(model=Two, cls=OfDict, dls=dls), train(Record(), model=Two, cls=OfDict, dls=dls))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(N_IN, 2, 32, batch_first=True, dropout=0.1), nn.Linear(N_IN, N_OUT)
    def forward(self, x): return self.out(self.layer(x[:, None].expand(-1, 3, -1)).mean(1))

class Checkpointed(nn.Sequential):
    def forward(self, x): return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return 2*x
    @staticmethod
    def backward(ctx, g): return 2*g

class Odd(nn.Module):
    "Masks, numbers read from a tensor and multiplied, a function with a way back of its own, a buffer that counts."
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(N_IN, N_OUT))
        self.register_buffer('mean', torch.zeros(()))
    def forward(self, x):
        h = Doubled.apply(self.layer(x))
        self.mean.mul_(0.9).add_(h.detach().mean())
        return h + h[h > 0].mean() + x.mean().item() - self.mean

def conv(layout=torch.contiguous_format):
    return nn.Sequential(nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, N_OUT)).to(memory_format=layout)

MODELS = {'attention': Attention, 'odd': Odd, 'conv': conv, 'channels_last': partial(conv, torch.channels_last), 'float64': deep,
          'checkpointed': lambda: Checkpointed(nn.Linear(N_IN, 16), nn.Tanh(), nn.Linear(16, N_OUT)), 'one layer': lambda: nn.Linear(N_IN, N_OUT)}

@pytest.mark.parametrize('name', MODELS)
def test_models_of_others(name):
    options = dict(model=MODELS[name], dtype=torch.float64 if name == 'float64' else torch.float32, opt_func=partial(SGD, momentum=0.9))
    assert_same(train(**options), train(Record(), **options))


class Scale(nn.Module):
    "A loss with a parameter, whose gradient is the seed itself."
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
    def forward(self, pred, target): return F.cross_entropy(pred, target) + self.bias

@pytest.mark.parametrize('loss_func', [lambda: Scale(), lambda: partial(F.cross_entropy, ignore_index=2), lambda: nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_losses(loss_func):
    for cbs in ([], [GradientClip(1e-3)]):
        assert_same(train(cbs, loss_func=loss_func()), train([Record(), *cbs], loss_func=loss_func()))


def test_gradients_are_of_their_own():
    "A sum gives the same gradient to both terms; whoever changes one in place leaves the other one alone."
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(N_OUT)), nn.Parameter(torch.zeros(N_OUT))
        def forward(self, x): return x[:, :N_OUT] + self.a + self.b
    class Half(Callback):
        def after_backward(self, learn): learn.model.a.grad.mul_(0.5)
    assert_same(train(Half(), model=Sum), train([Half(), Record()], model=Sum))


def test_what_comes_between_epochs():
    "Weights that are loaded or averaged, and layers that are replaced."
    class Swap(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1: learn.model[4] = nn.Linear(16, N_OUT)
            if learn.epoch == 2: learn.model.load_state_dict({k: 0.9*v if v.is_floating_point() else v for k, v in learn.model.state_dict().items()})
    assert_same(train(Swap(), epochs=3), train([Swap(), Record()], epochs=3))

    class Late(Callback):
        def after_batch(self, learn):
            if learn.training and learn.iter == 3: learn.model[4] = nn.Linear(16, N_OUT)
    with pytest.raises(ValueError, match='between epochs'): train([Late(), Record()])


def test_more_kinds_than_are_recorded():
    x, y = data()
    dls = [(x[:n], y[:n]) for n in range(2, 40)], None
    record = Record()
    record.limit = 5
    with pytest.warns(UserWarning, match='met 5 kinds'): recorded = train(record, dls=dls)
    assert_same(train(dls=dls), recorded)


def test_it_leaves_no_trace():
    record = Record()
    learn = train(record)
    assert not {'predict', 'get_loss', 'backward'} & vars(learn).keys() and record.recording is record.inputs is None
    copy.deepcopy(learn).fit(1)
    learn.lr_find(plot=False)
    learn.fit(1)
    assert learn.predict(data()[0]).shape == (200, N_OUT)


class Careful(nn.Module):
    "A part that computes in 32 bits, whatever is around it."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(N_IN, 16), nn.Linear(16, N_OUT)
    def forward(self, x):
        with torch.autocast('cpu', enabled=False): h = self.a(x.float())
        return self.b(h.relu())

class SometimesHalf(Callback):
    "16 bits in every other batch."
    def before_batch(self, learn):
        self.cast = torch.autocast('cpu', torch.bfloat16, enabled=learn.iter % 2 == 0)
        self.cast.__enter__()
    def after_loss(self, learn): self.cast.__exit__(None, None, None)

@pytest.mark.parametrize('cb', [MixedPrecision, SometimesHalf])
def test_sixteen_bits_in_places(cb): assert_same(train(cb(), model=Careful), train([cb(), Record()], model=Careful))


class Focal:
    "A loss that is no module, with a number that somebody changes."
    gamma = 1.
    def __init__(self): self.gamma = 1.
    def __call__(self, pred, target): return self.gamma*F.cross_entropy(pred, target)

class Weighted(Learner):
    "A step that looks at an attribute of the Learner's."
    def get_loss(self): self.loss = self.share*self.loss_func(self.pred, self.yb)

class Tune(Callback):
    def before_fit(self, learn): learn.share = 1.
    def before_batch(self, learn):
        if learn.iter == 2: learn.share = learn.loss_func.gamma = 0.5

def test_numbers_that_somebody_changes():
    options = dict(cls=Weighted, loss_func=Focal())
    eager = train(Tune(), **options)
    options['loss_func'].gamma = 1.
    assert_same(eager, train([Tune(), Record()], **options))


class NewLoss(Callback):
    "Another loss function in each epoch; the old one is gone, and the new one may lie at its address."
    def before_epoch(self, learn):
        learn.loss_func, share = None, 1/(1 + learn.epoch)
        learn.loss_func = lambda pred, target: share*F.cross_entropy(pred, target)

def test_loss_functions_that_come_and_go(): assert_same(train(NewLoss(), epochs=6), train([NewLoss(), Record()], epochs=6))


class WithArray(Learner):
    "Batches (x, array, y), whose array the model's Python may look into."
    @property
    def xb(self): return self.batch[:1]
    def get_loss(self): self.loss = F.cross_entropy(self.pred, self.yb)*float(self.batch[1].mean())

def test_fields_that_nothing_is_known_of():
    x, y = data()
    dls = [(x[i:i+16], np.full(2, 1. + i), y[i:i+16]) for i in range(0, 192, 16)], None
    with pytest.raises(ValueError, match='a field of type ndarray'): train(Record(), cls=WithArray, dls=dls)
    with pytest.warns(UserWarning, match='a field of type ndarray'): compiled = train(Compile(), cls=WithArray, dls=dls)
    assert_same(train(cls=WithArray, dls=dls), compiled)


def test_a_second_fit_uses_what_was_recorded_in_the_first():
    record, made = Record(), []
    original, record.record = record.record, lambda *args: made.append(1) or original(*args)
    learn = train(record)
    assert len(made) == 2  # a whole batch, and the last one
    learn.fit(1, lr=0.01)
    assert len(made) == 2
    before = copy.deepcopy(learn.model.state_dict())
    copy.deepcopy(learn).fit(1)  # with tensors of its own
    assert all(torch.equal(t, before[k]) for k, t in learn.model.state_dict().items())
    learn.model[4] = nn.Linear(16, N_OUT)
    learn.fit(1)
    assert len(made) == 4


def test_copies_have_its_options_alone():
    "In memory and in a file; a recording belongs to the Learner whose weights it holds."
    record, compiled = Record(), Compile(step=True)
    record.limit, compiled.works = 5, False
    for cb in (record, compiled):
        trained = train(cb, model=shallow)
        for mine in (copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
            assert mine.made == mine.owned == [] and mine.limit == cb.limit and cb.made and cb.owned
            assert [getattr(mine, name, None) for name in ('whole', 'works')] == [getattr(cb, name, None) for name in ('whole', 'works')]
            assert_same(trained, train(mine, model=shallow))


# refused by name

class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen, self.n = nn.Linear(N_IN, N_OUT), [], 0
        self.register_buffer('mean', torch.zeros(N_OUT))

class IfData(Bad):
    def forward(self, x): return self.layer(x) if x.sum() > 1e9 else 2*self.layer(x)
class ToNumpy(Bad):
    def forward(self, x): return self.layer(x)*float(x.numpy().mean())
class Counts(Bad):
    def forward(self, x):
        self.n += 1
        return self.layer(x)/self.n
class Collects(Bad):
    def forward(self, x):
        self.seen.append(self.layer(x))
        return self.seen[-1]
class NewBuffer(Bad):
    def forward(self, x):
        h = self.layer(x)
        self.mean = 0.9*self.mean + h.detach().mean(0)
        return h - self.mean
class Draws(Bad):
    def forward(self, x): return self.layer(x)*random.random()
class DrawsNumpy(Bad):
    def forward(self, x): return self.layer(x)*np.random.rand()
class Momentless(Bad):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(N_OUT, momentum=None)
    def forward(self, x): return self.norm(self.layer(x))
class Recurrent(Bad):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(N_IN, N_OUT, batch_first=True)
    def forward(self, x): return self.lstm(x[:, None])[0][:, 0]
def hooked():
    model = nn.Sequential(nn.Linear(N_IN, N_OUT))
    model[0].register_forward_hook(look_on)
    return model
def look_on(module, inputs, output): pass

def doubled(grad): return 2*grad
def halved(p): p.grad.mul_(0.5)
def with_tensor_hook():
    model = nn.Sequential(nn.Linear(N_IN, N_OUT))
    model[0].weight.register_hook(doubled)
    return model
def with_accumulation_hook():
    model = nn.Sequential(nn.Linear(N_IN, N_OUT))
    model[0].weight.register_post_accumulate_grad_hook(halved)
    return model
class Gated(Recurrent):
    def __init__(self):
        super().__init__()
        self.lstm = nn.GRU(N_IN, N_OUT, batch_first=True)

REFUSED = {with_tensor_hook: 'doubled', with_accumulation_hook: 'halved', Gated: 'its GRU', IfData: 'decides by numbers', ToNumpy: 'decides by numbers', Counts: 'changes model.n', Collects: 'changes model.seen', NewBuffer: 'in place of mean',
           Draws: 'random numbers', DrawsNumpy: 'random numbers', Momentless: 'decides by numbers', Recurrent: 'its LSTM', hooked: 'look_on'}

@pytest.mark.parametrize('model', REFUSED, ids=lambda m: m.__name__)
def test_refused(model):
    with pytest.raises(ValueError, match=f"can be recorded.*{REFUSED[model]}"): train(Record(), model=model)
    with pytest.warns(UserWarning, match='trained as usual'): compiled = train(Compile(), model=model, epochs=1)
    random.seed(0), np.random.seed(0)
    if model not in (Draws, DrawsNumpy): assert_same(compiled, train(model=model, epochs=1))


def test_refused_leaves_the_model_as_it_was():
    for model in (Collects, Counts, NewBuffer):
        torch.manual_seed(0)
        made = model()
        with warnings.catch_warnings(action='ignore'): train(Compile(), model=lambda: made, epochs=1)
        assert made.n in (0, 17) and len(made.seen) in (0, 17) and all(type(t) is torch.Tensor for t in [*made.seen, made.mean])


def test_a_wrong_model_has_its_own_error():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'): train(Record(), model=lambda: nn.Linear(7, N_OUT))


class Looks(Learner):
    def get_loss(self): self.loss = F.cross_entropy(self.pred, self.yb)*(1 + self.epoch)
class OwnBackward(Learner):
    def backward(self): self.loss.backward()

def test_learners_refused():
    with pytest.raises(ValueError, match='learn.epoch, which changes'): train(Record(), cls=Looks)
    with pytest.raises(ValueError, match='plain backward for Record'): train(Record(), cls=OwnBackward)
    lbfgs = partial(torch.optim.LBFGS, max_iter=2)
    with pytest.raises(ValueError, match='without a closure for Compile'): train(Compile(), opt_func=lbfgs)


class NewPred(Callback):
    def after_predict(self, learn): learn.pred = learn.pred + 0
class NewBatch(Callback):
    def after_predict(self, learn): learn.batch = tuple(learn.batch)[:1] + (learn.yb.flip(0),)
class LossOfPred(Callback):
    def after_loss(self, learn):
        if learn.training: learn.loss = learn.loss + 0.1*learn.pred.pow(2).mean()
class InPlace(Callback):
    def after_predict(self, learn): learn.pred.clamp_(-1, 1)

@pytest.mark.parametrize('cb, message', [(NewPred, 'the pred that was recorded'), (NewBatch, 'the batch that was recorded'), (LossOfPred, 'made of pred')])
def test_callbacks_refused(cb, message):
    with pytest.raises(ValueError, match=message): train([Record(), cb()])

def test_pred_in_place_is_no_silence():
    with pytest.raises(RuntimeError, match='in-place'): train([Record(), InPlace()])


# compiled

needs_compiler = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='needs a C++ compiler')

def shallow(): return nn.Sequential(nn.Linear(N_IN, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, N_OUT))

@needs_compiler
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_compiled_step_is_eager(name):
    "In float64, where rounding does not hide an error, with rates that change from batch to batch."
    opt_func, lr = OPTIMIZERS[name]
    options = dict(model=shallow, dtype=torch.float64, opt_func=opt_func, lr=lr, epochs=1, n=192)
    cycle = dict(lr=sched_one_cycle(lr/10, lr, lr/100)) | (dict(momentum=sched_one_cycle(0.95, 0.85, 0.95)) if name == 'momentum' else {})
    with warnings.catch_warnings(action='error', category=UserWarning):
        eager, compiled = [train([*cbs, Scheduler(**cycle)], **options) for cbs in ([], [Compile(step=True)])]
    assert_near(eager, compiled, 1e-12 if isinstance(eager.opt, SGD) else 1e-6)  # the others divide by what may be tiny


@needs_compiler
def test_compiled_is_eager():
    "With a short last batch, with dropout and in company; two compiled runs are the same bits."
    cbs = lambda: [GradientAccumulation(2), GradientClip(0.1), EMA(0.9)]
    eager, one, other = [train([*cbs(), *more], dtype=torch.float64, epochs=1) for more in ([], [Compile()], [Compile()])]
    assert_near(eager, one, 1e-12)
    assert_same(one, other)


@needs_compiler
@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
def test_compiled_step_with_a_short_last_batch(name):
    "Each kind of batch has a recording of its own, and all of them go by the rates of now."
    opt_func, lr = OPTIMIZERS[name]
    options = dict(model=shallow, dtype=torch.float64, opt_func=opt_func, epochs=3)
    eager, compiled = [train([*cbs, Scheduler(lr=sched_one_cycle(lr/10, lr, lr/100))], **options) for cbs in ([], [Compile(step=True)])]
    assert_near(eager, compiled, 1e-12 if name == 'SGD' else 1e-6)


@needs_compiler
def test_compiled_in_float32():
    eager, compiled = [train(cbs, model=shallow, n=16, epochs=1) for cbs in ([], [Compile(step=True)])]  # one step
    for a, b in zip(tensors(eager), tensors(compiled), strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_without_a_compiler(monkeypatch):
    "Nothing is compiled; a warning says so, and the operations are replayed."
    def no_compiler(*args, **kwargs): raise RuntimeError('No working C++ compiler found')
    import torch._inductor
    monkeypatch.setattr(torch._inductor, 'compile', no_compiler)
    for cb in (Compile(), Compile(step=True)):
        with pytest.warns(UserWarning, match='replayed, and not compiled: No working'): replayed = train(cb)
        eager = train()
        if cb.whole: torch.testing.assert_close(replayed.recorder.losses, eager.recorder.losses)
        else: assert_same(eager, replayed)


def test_what_a_compiled_step_has_no_room_for():
    for cbs in ([GradientClip(1.)], [GradientAccumulation(2)]):
        with pytest.raises(ValueError, match=f'got {type(cbs[0]).__name__}: Compile'): train([Compile(step=True), *cbs])
    with pytest.raises(ValueError, match='made of parameters'): train([Compile(step=True), Penalty()], model=shallow, n=16)
    with pytest.warns(UserWarning, match='the step of RMSprop is not compiled'):
        train(Compile(step=True), opt_func=torch.optim.RMSprop, lr=1e-3, model=shallow, n=16, epochs=1)
