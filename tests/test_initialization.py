"Looking inside and starting well, as strangers do: layers of every kind, errors in the middle, and no trace left."
import copy, math, pickle
from contextlib import suppress
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_10 import Callback, CancelBatch, CancelEpoch, CancelFit, Learner
from exp.nb_12 import EMA
from exp.nb_13 import Checkpoint
from exp.nb_15 import BatchTransform, GradientAccumulation
from exp.nb_20 import SimpleCNN, conv, summary
from exp.nb_21 import ActivationStats, GeneralReLU, Hooks, init_weights, lsuv_init
from exp.nb_30 import Compile, MixedPrecision, Record


def batches(n=4, rows=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, 6, generator=g), torch.randint(3, (rows,), generator=g)) for _ in range(n)]

def new_learner(cbs=(), model=None, dls=None, lr=0.1, **kwargs):
    set_seed(0)
    return Learner(model() if model else Model(6, 8, 3), dls or (batches(), batches(2)), lr=lr, cbs=cbs, progress=False, **kwargs)

def n_hooks(model): return sum(len(d) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))
def params(model): return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])
def on(event, do, **attributes): return type('Doing', (Callback,), {event: lambda self, learn: do(learn), **attributes})()
def nothing(*args): pass

def same_fit(a, b): return torch.equal(params(a.model), params(b.model)) and torch.equal(a.recorder.losses, b.recorder.losses)


# Hooks

def test_layers_in_every_form():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    for layers, n in ((net, 1), (net[0], 1), ([net[0], net[0]], 1), ((m for m in net), 3), (dict.fromkeys(net), 3), (net.children(), 3)):
        calls = []
        with Hooks(layers, lambda *args: calls.append(args)): net(torch.zeros(1, 2))
        assert len(calls) == n and n_hooks(net) == 0
    with pytest.raises(TypeError, match="expected layers, got 'body'"): Hooks(['body'], nothing)
    with pytest.raises(TypeError, match='expected layers'): Hooks(dict(net.named_children()), nothing)

def test_strangers_hooks_stay():
    net, seen = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []
    net[0].register_forward_hook(lambda *args: seen.append(1))
    with Hooks(net, nothing), Hooks(net[0], nothing), Hooks(net[0], nothing, backward=True): net(torch.zeros(1, 2))
    net(torch.zeros(1, 2))
    assert n_hooks(net) == 1 and len(seen) == 2

def test_a_registration_that_fails_leaves_none():
    class Sealed(nn.Linear):
        def register_forward_hook(self, *args, **kwargs): raise RuntimeError('sealed')
    net = nn.Sequential(nn.Linear(2, 2), Sealed(2, 2))
    with pytest.raises(RuntimeError, match='sealed'), Hooks(net.children(), nothing): pass
    assert n_hooks(net) == 0
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with Hooks(traced, nothing): pass

def test_what_func_returns_takes_the_place():
    layer, x = nn.Linear(2, 2), torch.randn(3, 2)
    with Hooks(layer, lambda layer, inputs, output: output*0): assert not layer(x).any()
    assert layer(x).any()
    x.requires_grad_()
    with Hooks(layer, lambda layer, grads_in, grads_out: (grads_in[0]*0,), backward=True): layer(x).sum().backward()
    assert not x.grad.any() and layer.weight.grad.any()

def test_nested_and_again():
    layer, calls = nn.Linear(2, 2), []
    hooks = Hooks(layer, lambda *args: calls.append(1))
    for _ in range(2):
        with hooks, Hooks(layer, lambda *args: calls.append(2)): layer(torch.zeros(1, 2))
        with suppress(ZeroDivisionError), hooks: 1/0
    hooks.remove()
    assert calls == [1, 2, 1, 2] and n_hooks(layer) == 0

def test_removed_by_hand_within():
    layer, calls = nn.Linear(2, 2), []
    with Hooks(layer, lambda *args: calls.append(1)) as hooks:
        hooks.remove()
        layer(torch.zeros(1, 2))
    assert not calls and n_hooks(layer) == 0


# ActivationStats only looks

def quiet_model(): return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))

@pytest.mark.parametrize('options', [{}, dict(every=1), dict(every=3, layers=lambda m: True), dict(every=1, live=True), dict(unit_dim=-1, bins=2)], ids=' '.join)
def test_the_training_is_the_same(options):
    plain = new_learner(model=quiet_model)
    plain.fit(2)
    watched = new_learner(ActivationStats(**options), model=quiet_model)
    watched.fit(2)
    assert same_fit(plain, watched) and plain.results == watched.results and n_hooks(watched.model) == 0
    assert all(map(torch.equal, plain.model.buffers(), watched.model.buffers()))

@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_step', 'after_batch', 'before_epoch', 'after_epoch'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, CancelBatch, CancelEpoch, CancelFit])
def test_however_a_fit_ends(event, error):
    def stop(learn):
        if learn.epoch == 0 and (learn.iter is None or learn.iter >= 1): raise error
    stats = ActivationStats(every=1)
    learn = new_learner([stats, on(event, stop)])
    with suppress(KeyboardInterrupt, ValueError, CancelBatch): learn.fit(1)
    assert n_hooks(learn.model) == 0 and 'predict' not in vars(learn) and stats.plain is None
    n = len(stats.rows)
    learn.model(torch.zeros(2, 6))
    assert len(stats.rows) == n
    learn.cbs = [cb for cb in learn.cbs if type(cb).__name__ != 'Doing']
    learn.fit(1)
    assert stats.batches == [0, 1, 2, 3]

def test_an_error_in_the_model_leaves_none():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.calls = nn.Linear(6, 3), nn.ReLU(), 0
        def forward(self, x):
            x, self.calls = self.act(self.a(x)), self.calls + 1
            if self.calls == 3: raise RuntimeError('in the middle')
            return x
    stats = ActivationStats(every=1)
    learn = new_learner(stats, Fails)
    with pytest.raises(RuntimeError, match='in the middle'): learn.fit(1)
    assert n_hooks(learn.model) == 0 and stats.batches == [0, 1]

def test_validations_and_nested_fits_are_not_counted():
    "A validation, predictions, and another fit of the same Learner, in the middle of a batch."
    def more(learn):
        if learn.depth > 1 or not learn.training: return
        learn.validate()
        learn.predict(torch.zeros(2, 6))
        learn.get_preds()
    for event in ('before_batch', 'after_predict', 'after_batch'):
        stats = ActivationStats(every=1)
        learn = new_learner([stats, on(event, more)])
        learn.fit(2)
        assert stats.batches == [*range(8)] and stats.names == ['layers.1'] and n_hooks(learn.model) == 0
    def fit_again(learn):
        if learn.depth == 1 and learn.epoch == 0: learn.fit(1, max_batches=1)
    stats = ActivationStats(every=1)
    learn = new_learner([stats, on('after_epoch', fit_again)])
    learn.fit(2)
    assert stats.batches == [*range(8)]

def test_the_sweep_of_lr_find_is_left_out():
    stats = ActivationStats(every=1)
    learn = new_learner(stats)
    learn.fit(1)
    learn.lr_find(plot=False)
    assert stats.batches == [0, 1, 2, 3]

def test_copies_of_the_model_have_no_hooks():
    copies = []
    learn = new_learner([ActivationStats(every=1), EMA(), on('after_batch', lambda learn: copies.append(copy.deepcopy(learn.model)))])
    learn.fit(1)
    assert [n_hooks(m) for m in copies] == [0]*len(copies)

def test_a_closure_counts_once():
    stats = ActivationStats(every=2)
    learn = new_learner(stats, opt_func=torch.optim.LBFGS)
    learn.fit(1)
    assert stats.batches == [0, 2] and stats.names == ['layers.1']

def test_with_other_callbacks():
    stats = ActivationStats(every=1)
    new_learner([stats, GradientAccumulation(2), BatchTransform(lambda x: 2*x), MixedPrecision()]).fit(1)
    assert len(stats.rows) == 4 and stats.means.isfinite().all()

def test_record_refuses():
    for order in (lambda a, b: [a, b], lambda a, b: [b, a]):
        learn = new_learner(order(ActivationStats(every=100), Record()))
        with pytest.raises(ValueError, match='it has a hook, look_at_activations'): learn.fit(1)
        assert n_hooks(learn.model) == 0
    learn = new_learner(Record())
    learn.fit(1)
    with pytest.raises(ValueError, match="can't be seen"): learn.fit(1, cbs=ActivationStats())
    learn.fit(1)

@pytest.mark.parametrize('step', [False, True])
def test_compile_says_so_and_trains_as_usual(step):
    stats = ActivationStats(every=1)
    learn = new_learner([stats, Compile(step=step)])
    with pytest.warns(UserWarning, match='not compiled: it has a hook, look_at_activations'): learn.fit(1)
    assert stats.batches == [0, 1, 2, 3] and n_hooks(learn.model) == 0
    plain = new_learner()
    plain.fit(1)
    near(params(learn.model), params(plain.model))

def test_a_compiled_model_is_seen_or_refused():
    stats = ActivationStats(every=1)
    learn = new_learner(stats, lambda: torch.compile(Model(6, 8, 3), backend='eager'))
    with suppress(ValueError): learn.fit(1)
    assert n_hooks(learn.model) == 0 and len(stats.rows) in (0, 4)


# What it sees

@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 4), min_size=0, max_size=5), dim=st.sampled_from([1, -1, 0, 2]),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]), seed=st.integers(0, 9))
def test_rows_of_every_shape(shape, dim, dtype, seed):
    from exp.nb_21 import _row
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed))*3).to(dtype)
    row = _row(x, dim, -1., 5., 30)
    assert row.shape == (33,) and row.dtype == torch.float32 and not row.requires_grad
    if not x.numel(): assert row.isnan().all()
    else:
        numbers = (torch.view_as_real(x) if x.is_complex() else x).float()
        near(row[:2], [numbers.mean(), numbers.std(correction=0)], atol=1e-4)
        near(row[3:].sum(), 1.)
        inside = numbers[(numbers > -0.8) & (numbers < 4.8)]
        near((row[4:-1].sum()*numbers.numel()).round() >= inside.numel(), True)

def test_what_is_beyond_the_limits():
    from exp.nb_21 import _row
    row = _row(torch.tensor([[-math.inf, -9., -1., 0., 4.99, 5., 9., math.inf, math.nan, 1e38]]), 1, -1., 5., 6)
    near(row[3:]*10, [3., 1., 0., 0., 0., 6.])

def test_dead_units():
    from exp.nb_21 import _row
    x = torch.randn(8, 4, 5, 5)
    x[:, 0], x[:, 1] = 0, -0.4
    def dead(x, dim=1): return _row(x, dim, -1., 5., 6)[2].item()
    assert dead(x) == 0.5 and dead(x.to(memory_format=torch.channels_last)) == 0.5 and dead(x.movedim(1, -1), -1) == 0.5
    assert dead(x[:1]) == 0.5 and math.isnan(dead(torch.randn(1, 4))) and math.isnan(dead(torch.randn(4)))
    assert dead(x*math.nan) == 0

class Busy(nn.Module):
    "A layer called twice, one called sometimes, one that gives a tuple, one never called."
    def __init__(self):
        super().__init__()
        self.act, self.gate, self.rnn, self.unused = nn.ReLU(inplace=True), nn.Sigmoid(), nn.GRU(6, 6), nn.Tanh()
        self.head, self.calls = nn.Linear(6, 3), 0
    def forward(self, x):
        x, _ = self.rnn(self.act(self.act(x*1.)))
        if self.calls % 2: x = self.gate(x)
        self.calls += 1
        return self.head(x)

def test_models_of_every_form():
    stats = ActivationStats(every=1)
    learn = new_learner(stats, Busy, dls=(batches(), None))
    learn.fit(1)
    assert stats.names == ['act', 'act, call 2', 'gate'] and stats.means.shape == (4, 3)
    assert stats.stds.isnan().tolist() == [[False, False, True], [False]*3]*2
    stats.plot()
    stats = ActivationStats(lambda m: isinstance(m, (nn.GRU, nn.Tanh)), every=1)
    learn = new_learner(stats, Busy, dls=(batches(), None))
    learn.fit(1)
    assert stats.names == ['rnn']
    for layers in (nn.GRU, [nn.GRU], [learn.model.rnn], learn.model.rnn, (nn.GRU, nn.Tanh)):
        stats = ActivationStats(layers, every=1)
        learn.fit(1, cbs=stats)
        assert stats.names == ['rnn']
    with pytest.raises(ValueError, match='layers of the model, got another'): new_learner(ActivationStats([nn.ReLU()])).fit(1)
    with pytest.raises(ValueError, match='expected something to draw'): ActivationStats().plot()

def test_layers_that_give_no_tensor():
    class Named(nn.Module):
        def forward(self, x): return 'words'
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = Named(), nn.Linear(6, 3)
        def forward(self, x):
            self.words(x)
            return self.out(x)
    with pytest.raises(TypeError, match="words: expected a Tensor to look at, got 'words'"):
        new_learner(ActivationStats(lambda m: isinstance(m, Named)), Odd).fit(1)

def test_batches_of_no_rows_and_of_one():
    sizes = [(torch.randn(n, 6), torch.randint(3, (n,))) for n in (16, 1, 3)]
    stats = ActivationStats(every=1)
    new_learner(stats, dls=(sizes, None)).fit(1)
    assert stats.means.isfinite().all() and stats.dead.isnan().flatten().tolist() == [False, True, False]

def test_numbers_that_make_no_sense():
    for wrong in (dict(every=0), dict(bins=1), dict(limits=(1, 1)), dict(limits=(0, math.inf)), dict(limits=(math.nan, 1)), dict(every=2.5)):
        with pytest.raises(ValueError, match='expected'): ActivationStats(**wrong)

@pytest.mark.parametrize('n_layers', [1, 5, 30])
def test_pictures_of_any_depth(n_layers):
    import matplotlib.pyplot as plt
    def deep(): return nn.Sequential(nn.Linear(6, 6), *[m for _ in range(n_layers) for m in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 3))
    stats = ActivationStats(every=2)
    new_learner(stats, deep).fit(1)
    open_before = plt.get_fignums()
    fig = stats.plot()
    fig.canvas.draw()
    plt.close(fig)
    assert plt.get_fignums() == open_before

def test_a_picture_of_nothing_but_zeros_and_nan():
    class Zero(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.out, self.act, self.value = nn.Linear(6, 3), nn.ReLU(), value
        def forward(self, x): return self.out(x) + self.act(x*0 + self.value).sum()*0
    for value in (0., math.nan):
        stats = ActivationStats(every=1)
        with suppress(FloatingPointError): new_learner(stats, lambda: Zero(value)).fit(1)
        stats.plot().canvas.draw()


# Live, in a notebook

class Handle:
    def __init__(self, shown): self.shown = shown
    def update(self, data, raw): self.shown.append(data)

def in_a_notebook(monkeypatch, broken=False):
    import IPython, IPython.display
    shown = []
    monkeypatch.setattr(IPython, 'get_ipython', lambda: type('Shell', (), {'kernel': True})())
    def display(data, raw, display_id):
        if broken: raise OSError('no screen')
        shown.append(data)
        return Handle(shown)
    monkeypatch.setattr(IPython.display, 'display', display)
    return shown

def test_live_draws_seldom_and_at_the_end(monkeypatch):
    import matplotlib.pyplot as plt
    shown = in_a_notebook(monkeypatch)
    plain = new_learner()
    plain.fit(5)
    figures = plt.get_fignums()
    learn = new_learner(ActivationStats(every=1, live=True))
    learn.fit(5)
    assert 2 <= len(shown) <= 10 and same_fit(plain, learn) and plt.get_fignums() == figures
    assert 'up to batch 19' in shown[-1]['text/plain'] and 'alt="Activations' in shown[-1]['text/markdown']

def test_live_survives_a_broken_screen_and_errors(monkeypatch):
    in_a_notebook(monkeypatch, broken=True)
    learn = new_learner(ActivationStats(every=1, live=True))
    learn.fit(1)
    shown = in_a_notebook(monkeypatch)
    def stop(learn): raise KeyboardInterrupt
    stats = ActivationStats(every=1, live=True)
    with suppress(KeyboardInterrupt): new_learner([stats, on('after_loss', stop)]).fit(1)
    assert shown and stats.screen is None
    def again(learn):
        if learn.depth == 1: learn.fit(1)
    n = len(shown)
    monkeypatch.setattr(Handle, 'update', nothing)  # so that only what is begun counts
    new_learner([ActivationStats(every=1, live=True), on('after_fit', again)]).fit(1)
    assert len(shown) == n + 1  # one picture at a time


# To keep

def test_copies_and_pickles():
    stats = ActivationStats(every=2)
    new_learner(stats).fit(1)
    for other in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert torch.equal(other.table()[2], stats.table()[2]) and other.batches == [0, 2]
        new_learner(other).fit(2)
        assert other.batches == [0, 2, 4, 6]
    act = pickle.loads(pickle.dumps(GeneralReLU(0.1, 0.4, 6.)))
    assert (act.leak, act.shift, act.cap) == (0.1, 0.4, 6.)

def test_within_a_fit():
    "A copy, and a pickle, of a callback in use."
    copies = []
    stats = ActivationStats(every=1)
    learn = new_learner([stats, on('after_batch', lambda learn: copies.append(pickle.loads(pickle.dumps(stats))))])
    learn.fit(1)
    assert copies[-1].plain is None

def test_a_fit_that_goes_on_goes_on_counting(tmp_path):
    def learner(stop=False):
        def end(learn):
            if stop and learn.epoch == 1 and learn.iter == 2 and learn.training: raise KeyboardInterrupt
        stats = ActivationStats(every=3)
        return new_learner([stats, on('after_batch', end), Checkpoint(tmp_path, every=1, resume=not stop)], dls=(batches(), batches(2))), stats
    whole = ActivationStats(every=3)
    new_learner(whole).fit(3)
    learn, _ = learner(True)
    with suppress(KeyboardInterrupt): learn.fit(3)
    learn, stats = learner()
    learn.fit(3)
    assert stats.batches == whole.batches == [0, 3, 6, 9]
    near(stats.table()[2], whole.table()[2])


# GeneralReLU

@settings(max_examples=60, deadline=None)
@given(leak=st.floats(0, 1), shift=st.floats(-1, 1), cap=st.none() | st.floats(1.5, 9), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_general_relu(leak, shift, cap, dtype):
    x = torch.linspace(-4, 4, 77).to(dtype).requires_grad_()
    expected = F.leaky_relu(x, leak) - shift
    if cap is not None: expected = expected.clamp(max=cap)
    out = GeneralReLU(leak, shift, cap)(x)
    assert out.dtype == dtype and torch.equal(out, expected)
    assert torch.equal(*[torch.autograd.grad(o.sum(), x)[0] for o in (out, expected)])

def test_general_relu_at_the_edges():
    assert GeneralReLU()(torch.tensor([-math.inf, math.inf])).tolist() == [0, math.inf]
    assert GeneralReLU()(torch.zeros(0, 3)).shape == (0, 3)
    for wrong in (dict(leak=math.nan), dict(shift=math.inf), dict(cap=0.), dict(shift=1., cap=-1.), dict(cap=math.nan)):
        with pytest.raises(ValueError, match='expected'): GeneralReLU(**wrong)
    x = torch.ones(2, requires_grad=True)
    GeneralReLU(0.1, 0.4, 2.)(x)
    assert x.tolist() == [1, 1]
    assert conv(1, 4, act=GeneralReLU)(torch.randn(1, 1, 8, 8)).shape == (1, 4, 8, 8)
    assert torch.jit.script(GeneralReLU(0.1))(x).tolist() == [1, 1]


# init_weights

@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]), groups=st.sampled_from([1, 2, 4]), kernel=st.integers(1, 3), leak=st.floats(0, 1), seed=st.integers(0, 99))
def test_convolutions_as_pytorchs(kind, groups, kernel, leak, seed):
    layer, other = kind(4, 8, kernel, groups=groups), kind(4, 8, kernel, groups=groups)
    set_seed(seed)
    assert init_weights(layer, leak) is layer
    set_seed(seed)
    nn.init.kaiming_normal_(other.weight, a=leak)
    assert torch.equal(layer.weight, other.weight) and not layer.bias.any()

@pytest.mark.parametrize('kind, sides', [(nn.ConvTranspose1d, (60,)), (nn.ConvTranspose2d, (16, 16)), (nn.ConvTranspose3d, (8, 8, 8))])
@pytest.mark.parametrize('options', [dict(kernel_size=4, stride=2), dict(kernel_size=3, stride=2), dict(kernel_size=3), dict(kernel_size=2, stride=2, groups=4)], ids=str)
def test_transposed_convolutions(kind, sides, options):
    layer = init_weights(kind(32, 32, **options))
    with torch.no_grad(): out = layer(torch.randn(4, 32, *sides))
    for d in range(2, out.ndim): out = out.narrow(d, 3, out.shape[d] - 7)
    assert 1.6 < out.var().item() < 2.4

def test_what_init_weights_leaves():
    model = nn.ModuleDict(dict(norm=nn.LayerNorm(4), emb=nn.Embedding(3, 4), att=nn.MultiheadAttention(4, 2), rnn=nn.LSTM(4, 4), frozen=nn.Linear(4, 4),
                               small=nn.Linear(4, 4).bfloat16(), empty=nn.Linear(4, 0), plain=nn.Linear(4, 4, bias=False)))
    model['frozen'].requires_grad_(False)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    init_weights(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'small.weight', 'small.bias', 'plain.weight'} and model['small'].weight.dtype == torch.bfloat16
    assert not model['plain'].training and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith('frozen'))
    with pytest.raises(TypeError, match='expected a model'): init_weights([nn.Linear(2, 2)])

@pytest.mark.parametrize('start', [init_weights, lambda m: lsuv_init(m, torch.randn(9, 4))])
def test_weights_that_cant_be_set(start):
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
        with pytest.raises(ValueError, match='1: expected weights to set, got some that are computed'):
            start(nn.Sequential(nn.Linear(4, 4), norm(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match='0: expected weights that have a shape'): start(nn.Sequential(nn.LazyLinear(4)))


# lsuv_init

class Residual(nn.Module):
    "The order of the calls is not the order of the names."
    def __init__(self):
        super().__init__()
        self.late, self.early, self.side = nn.Linear(8, 3), nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
    def forward(self, x): return self.late((self.early(x) + self.side(x)).relu())

def spreads(model, x, layers=None):
    found = []
    def note(layer, inputs, output): found.append((output.float().mean().item(), output.float().std(correction=0).item()))
    with torch.no_grad(), Hooks(layers or [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d))], note): model(*x if isinstance(x, tuple) else (x,))
    return found

MODELS = {
    'residual': (Residual, torch.randn(40, 6)), 'cnn': (SimpleCNN, torch.rand(8, 784)),
    'shifted': (lambda: SimpleCNN(act=lambda: GeneralReLU(0.1, 0.4, 6.)), torch.rand(8, 1, 28, 28)),
    'batchnorm': (lambda: nn.Sequential(conv(1, 4, norm=nn.BatchNorm2d), conv(4, 4, norm=nn.BatchNorm2d)), torch.rand(8, 1, 9, 9)),
    'transposed': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3, groups=1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, groups=2)), torch.rand(8, 1, 9, 9)),
    'sequences': (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(4, 5, 6)),
    'channels_last': (lambda: SimpleCNN().to(memory_format=torch.channels_last), torch.rand(8, 1, 28, 28).contiguous(memory_format=torch.channels_last)),
    'one image': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3)), torch.rand(1, 1, 9, 9)), 'unbatched': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3)), torch.rand(1, 9, 9)),
    'double': (lambda: Residual().double(), torch.randn(40, 6).double())}

@pytest.mark.parametrize('name', MODELS)
def test_mean_0_and_std_1(name):
    make, x = MODELS[name]
    set_seed(0)
    model = make()
    assert lsuv_init(model, x) is model
    has_bias = [m.bias is not None for m in model.modules() if hasattr(m, 'weight') and not isinstance(m, nn.BatchNorm2d)]
    for mean, std in spreads(model, x):
        assert abs(std - 1) < 2e-3
        if all(has_bias): assert abs(mean) < 2e-3
    assert n_hooks(model) == 0

def test_half_precision():
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16()
    x = torch.randn(64, 6).bfloat16()
    lsuv_init(model, x)
    assert all(abs(std - 1) < 0.02 and abs(mean) < 0.02 for mean, std in spreads(model, x))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())

def test_a_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    out_before = layer.self_attn.out_proj.weight.clone()
    x = torch.randn(4, 5, 8)
    lsuv_init(layer, x)
    assert torch.equal(out_before, layer.self_attn.out_proj.weight)
    layer.eval()
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with torch.no_grad(): assert model(x).isfinite().all()

def test_inputs_of_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
        def forward(self, x, y): return self.a(x + y)
    x, y = torch.randn(20, 4), torch.randn(20, 4)
    for xb in ((x, y), [x, y], dict(y=y, x=x)):
        set_seed(0)
        model = lsuv_init(Two(), xb)
        near(model(x, y).std(correction=0), 1.)

def state(model):
    return ([t.tolist() for t in model.buffers()], torch.get_rng_state().tolist(), [m.training for m in model.modules()], n_hooks(model),
            [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()])

def test_no_trace():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3), nn.Dropout())
    model[2].eval()
    model(torch.randn(9, 6)).sum().backward()
    model.register_forward_hook(nothing)
    before = state(model)
    lsuv_init(model, torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))
    assert state(model) == before
    weights = params(model)
    with pytest.raises(RuntimeError): lsuv_init(model, torch.randn(30, 7, generator=torch.Generator().manual_seed(0)))
    assert state(model) == before and torch.equal(params(model), weights)

def test_after_an_error_in_the_middle_nothing_has_changed():
    class Fails(Residual):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt
    model = Fails()
    weights = params(model)
    with pytest.raises(KeyboardInterrupt): lsuv_init(model, torch.randn(9, 6))
    assert torch.equal(params(model), weights) and n_hooks(model) == 0

def test_what_cant_be_measured():
    x = torch.randn(9, 6)
    def refused(model, said, x=x, layers=None, kind=ValueError):
        weights = params(model)
        with pytest.raises(kind, match=said): lsuv_init(model, x, layers)
        assert torch.equal(params(model), weights) and n_hooks(model) == 0
    refused(Residual(), 'early: expected outputs that differ', x[:1])
    refused(Residual(), 'early: expected outputs that differ', x[:1].expand(9, 6))
    refused(Residual(), 'early: expected finite outputs', x[:0])
    refused(Residual(), 'early: expected finite outputs', x*math.nan)
    zero = Residual()
    nn.init.zeros_(zero.late.weight)
    refused(zero, 'late: expected outputs that differ from row to row')
    refused(Residual(), 'expected linear layers or convolutions, got', layers=[nn.Linear(2, 2)])
    refused(Residual(), 'to start, found none', layers=[])
    tied = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    refused(tied, '1: expected weights of its own', torch.arange(6))
    with pytest.raises(TypeError, match='expected a model'): lsuv_init(F.relu, x)

def test_some_layers():
    model, x = Residual(), torch.randn(30, 6)
    early = model.early.weight.clone()
    model.early.requires_grad_(False)
    with pytest.raises(ValueError, match='early: expected weights to train'): lsuv_init(model, x)
    lsuv_init(model, x, (m for m in (model.late, model.side)))
    assert torch.equal(model.early.weight, early)
    near(spreads(model, x, [model.late])[0], (0., 1.), atol=1e-3)

def test_a_compiled_model():
    model = torch.compile(Residual(), backend='eager')
    x = torch.randn(30, 6)
    assert lsuv_init(model, x) is model
    near(model(x).std(correction=0), 1.)

def test_twice_changes_nothing_more():
    set_seed(0)
    model, x = init_weights(SimpleCNN()), torch.rand(16, 784)
    first = params(lsuv_init(model, x))
    near(params(lsuv_init(model, x)), first, atol=1e-4)
    assert summary(model, x).weights == 25162
