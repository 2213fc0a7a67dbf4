"""Normalization and Dropout as strangers use them: any shape and type, PyTorch's value, gradients and buffers, and no trace where
something is refused."""
import copy, gc, io, math, pickle, subprocess, sys, weakref
from contextlib import suppress
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from exp.nb_00 import set_seed
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Callback, Learner
from exp.nb_12 import EMA
from exp.nb_13 import Checkpoint
from exp.nb_20 import SimpleCNN, summary
from exp.nb_22 import BatchNorm, Dropout, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, standardize
from exp.nb_30 import Record

FAST = settings(deadline=None, max_examples=40)
BN, IN = [{n: getattr(nn, f'{kind}Norm{d}d') for n, d in ((2, 1), (3, 1), (4, 2), (5, 3))} for kind in ('Batch', 'Instance')]

@st.composite
def pairs(draw, kinds='BGILR'):
    "(our layer, PyTorch's, the shape of an input)."
    n, c = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    places = draw(st.lists(st.integers(1, 4), max_size=3))
    kind, eps, affine = draw(st.sampled_from(kinds)), draw(st.sampled_from([1e-5, 0.3])), draw(st.booleans())
    shape, each = (n, c, *places), math.prod(places)
    if kind == 'B':
        if n*each == 1: shape, n = (2, *shape[1:]), 2
        momentum = draw(st.sampled_from([0.1, 0.8, None]))
        options = dict(eps=eps, momentum=momentum, affine=affine)
        return BatchNorm(c, **options), BN[len(shape)](c, **options), shape
    if kind in 'GI' and each == 1: shape, each = (n, c, 5), 5
    if kind == 'G':
        groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
        return GroupNorm(groups, c, eps, affine), nn.GroupNorm(groups, c, eps, affine), shape
    if kind == 'I': return InstanceNorm(c, eps, affine), IN[len(shape)](c, eps, affine=affine), shape
    last = shape[-draw(st.integers(1, len(shape) - 1)):]
    if kind == 'L':
        if math.prod(last) == 1: shape, last = (n, 3), (3,)
        bias = draw(st.booleans())
        return LayerNorm(last, eps, affine, bias), nn.LayerNorm(last, eps, affine, bias), shape
    eps = draw(st.sampled_from([None, 0.3]))
    return RMSNorm(last, eps, affine), nn.RMSNorm(last, eps, affine), shape

TOLERANCE = {torch.float64: dict(rtol=1e-7, atol=1e-7), torch.float32: dict(rtol=1e-3, atol=2e-3), torch.bfloat16: dict(rtol=0.04, atol=0.06)}

def results(layer, x, behind):
    x = x.detach().requires_grad_()
    y = layer(x)
    params = [p for p in layer.parameters()]
    return [y, *torch.autograd.grad(y, [x, *params], behind), *layer.buffers()]

def alike(ours, theirs, dtype=torch.float32):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], equal_nan=True)

def same_weights(ours, theirs, dtype):
    for p in theirs.parameters(): nn.init.uniform_(p, 0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)

@FAST
@given(pairs(), st.integers(0, 9), st.booleans())
def test_value_gradients_and_buffers_are_pytorchs(pair, seed, training):
    ours, theirs, shape = pair
    dtype = torch.float64  # in float32, the gradient of two numbers that share a mean is nothing but rounding
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    set_seed(seed)
    ours, theirs = same_weights(ours, theirs, dtype)
    for i in range(3):
        for layer in (ours, theirs): layer.train(training or i < 2)
        x, behind = torch.randn(shape, dtype=dtype) + i, torch.randn(shape, dtype=dtype)
        alike(results(ours, x, behind), results(theirs, x, behind), dtype)

def test_float32():
    for ours, theirs, shape in ((BatchNorm(4), nn.BatchNorm2d(4), (8, 4, 5, 5)), (GroupNorm(2, 4), nn.GroupNorm(2, 4), (8, 4, 5, 5)),
                                (InstanceNorm(4), nn.InstanceNorm2d(4), (8, 4, 5, 5)), (LayerNorm(20), nn.LayerNorm(20), (8, 4, 20)),
                                (RMSNorm(20), nn.RMSNorm(20), (8, 4, 20))):
        ours, theirs = same_weights(ours, theirs, torch.float32)
        x, behind = 3*torch.randn(shape) + 10, torch.randn(shape)
        alike(results(ours, x, behind), results(theirs, x, behind))

@FAST
@given(pairs(), st.integers(0, 9))
def test_half_precision_is_as_exact_as_pytorchs(pair, seed):
    ours, theirs, shape = pair
    set_seed(seed)
    ours, theirs = same_weights(ours, theirs, torch.float32)
    x = (torch.randn(shape) + 10).bfloat16()
    y = ours(x)
    assert y.dtype is torch.bfloat16 and all(b.dtype is not torch.bfloat16 for b in ours.buffers())
    torch.testing.assert_close(y, theirs(x.float()).bfloat16(), rtol=0.02, atol=0.02)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_whole_models_of_half_precision(dtype):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm(4), nn.ReLU(), GroupNorm(2, 4), InstanceNorm(4, affine=True), Dropout(),
                          nn.Flatten(), nn.Linear(4*36, 8), LayerNorm(8), RMSNorm(8)).to(dtype)
    y = model(torch.randn(3, 1, 8, 8, dtype=dtype))
    y.sum().backward()
    assert y.dtype is dtype and model[1].running_mean.dtype is dtype and model[1].num_batches_tracked == 1
    assert all(p.grad.dtype is dtype and p.grad.isfinite().all() for p in model.parameters())

def test_autocast():
    for ours, theirs in ((BatchNorm(4), nn.BatchNorm2d(4)), (GroupNorm(2, 4), nn.GroupNorm(2, 4))):
        x = torch.randn(3, 2, 9, 9)
        set_seed(0)
        conv = nn.Conv2d(2, 4, 3)
        with torch.autocast('cpu', dtype=torch.bfloat16): a, b = [layer(conv(x)) for layer in (ours, theirs)]
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)

@FAST
@given(st.lists(st.integers(0, 9), max_size=8), st.sampled_from([0.1, 0.6, None]))
def test_batches_of_any_size_one_after_another(sizes, momentum):
    "Empty ones leave no trace, and the others count as PyTorch's."
    ours, theirs = BatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for n in sizes:
        x = torch.randn(n, 3, 2)
        if n: theirs(x)
        assert ours(x).shape == x.shape
    alike(ours.buffers(), theirs.buffers())

@pytest.mark.parametrize('layer, bad', [(BatchNorm(3), (1, 3)), (BatchNorm(3), (1, 3, 1, 1)), (BatchNorm(3), (4, 2)), (BatchNorm(3), (3,)),
    (BatchNorm(3), ()), (GroupNorm(3, 3), (2, 3)), (GroupNorm(1, 3), (2, 4)), (InstanceNorm(3), (2, 3)), (InstanceNorm(3), (2, 3, 1, 1)),
    (InstanceNorm(3), (2, 4, 5)), (LayerNorm(3), (2, 4)), (LayerNorm((2, 3)), (3,)), (LayerNorm(1), (2, 1)), (RMSNorm(3), (3, 2)), (RMSNorm(3), ())])
def test_what_is_refused_leaves_no_trace(layer, bad):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match='expected'): layer(torch.ones(bad))
    alike(layer.state_dict().values(), before.values())

@pytest.mark.parametrize('make', [lambda: GroupNorm(4, 6), lambda: GroupNorm(0, 6), lambda: Dropout(-0.1), lambda: Dropout(math.nan), lambda: Dropout(1.1)])
def test_options_without_a_meaning(make):
    with pytest.raises(ValueError, match='expected'): make()

def test_memory_order_stays():
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    volume = torch.randn(2, 4, 3, 6, 6).to(memory_format=torch.channels_last_3d)
    for layer in (BatchNorm(4), BatchNorm(4).eval(), GroupNorm(2, 4), InstanceNorm(4), LayerNorm(6), RMSNorm((6, 6)), Dropout()):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
        assert layer(volume).is_contiguous(memory_format=torch.channels_last_3d)
        crossed = torch.randn(6, 6, 4, 2).permute(3, 2, 0, 1)
        torch.testing.assert_close(layer.eval()(crossed), layer(crossed.contiguous()))

def test_the_gradient_of_the_gradient():
    x = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    for layer in (BatchNorm(4), GroupNorm(2, 4), InstanceNorm(4), LayerNorm(3), RMSNorm(3)):
        assert torch.autograd.gradgradcheck(layer.double(), x)

def test_an_input_is_not_kept_nor_changed():
    for layer in (BatchNorm(3), GroupNorm(1, 3), LayerNorm(4), RMSNorm(4), Dropout()):
        x = torch.randn(2, 3, 4)
        old, gone = x.clone(), weakref.ref(x)
        layer(x).sum()
        assert x.equal(old)
        del x
        gc.collect()
        assert gone() is None


class Twice(nn.Module):
    "A shared norm, a list of them, and several outputs."
    def __init__(self, norm):
        super().__init__()
        self.norm, self.more, self.conv = norm(4), nn.ModuleList([norm(4), norm(4)]), nn.Conv2d(1, 4, 3)
    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.norm(x*2 + 1), {'more': [m(x) for m in self.more]}

def test_nested_and_shared_layers_move_both_ways():
    set_seed(0)
    ours, theirs = Twice(BatchNorm), Twice(nn.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = torch.randn(2, 1, 8, 8)
        (a, more_a), (b, more_b) = ours(x), theirs(x)
        alike([a, *more_a['more']], [b, *more_b['more']])
    alike(ours.state_dict().values(), theirs.state_dict().values())
    assert ours.norm.num_batches_tracked == 6
    for source, target in ((ours, Twice(nn.BatchNorm2d)), (theirs, Twice(BatchNorm))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        alike(target.eval()(x)[0][None], source.eval()(x)[0][None])

def test_copies_are_independent():
    for layer in (BatchNorm(3, momentum=None, affine=False), GroupNorm(1, 3), InstanceNorm(3), LayerNorm((2, 3)), RMSNorm((2, 3)), Dropout(0.2)):
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(other) == repr(layer) and other.state_dict().keys() == layer.state_dict().keys()
    layer = BatchNorm(3)
    other = copy.deepcopy(layer)
    other(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0 and layer.running_mean.abs().max() == 0

def test_without_gradients_and_in_inference_mode():
    layer, x = BatchNorm(3), torch.randn(4, 3)
    with torch.no_grad(): layer(x)
    with torch.inference_mode(): layer(x)
    layer(x).sum().backward()
    assert layer.num_batches_tracked == 3 and not layer.running_mean.requires_grad

def test_summary_leaves_the_statistics():
    model = SimpleCNN(norm=BatchNorm)
    model(torch.randn(8, 784))
    before = copy.deepcopy(model.state_dict())
    found = summary(model, torch.randn(4, 784))
    alike(model.state_dict().values(), before.values())
    assert found.weights == summary(SimpleCNN(norm=nn.BatchNorm2d), torch.randn(4, 784)).weights

def test_nan_in_one_row_stays_there_except_in_batchnorm():
    x = torch.randn(4, 4, 3)
    x[1, 2, 0] = math.nan
    for layer in (GroupNorm(2, 4), InstanceNorm(4), LayerNorm(3), LayerNorm((4, 3)), RMSNorm(3), BatchNorm(4).eval()):
        y = layer(x)
        assert y[1].isnan().any() and y[[0, 2, 3]].isfinite().all()
        assert all(b.isfinite().all() for b in layer.buffers())
    assert BatchNorm(4)(x)[:, 2].isnan().all()

def test_standardize_takes_dims_of_any_kind():
    x = torch.randn(3, 4, 5)
    for dims in ((1, 2), [1, 2], range(1, 3), (-1, -2)): torch.testing.assert_close(standardize(x, dims), standardize(x, (1, 2)))
    with pytest.raises(ValueError): standardize(x[:1], (0,))


# Dropout

@FAST
@given(st.lists(st.integers(0, 5), max_size=4), st.floats(0, 1), st.integers(0, 99))
def test_the_mask_is_that_of_torch_rand(shape, p, seed):
    torch.manual_seed(seed)
    y = Dropout(p)(torch.ones(shape))
    torch.manual_seed(seed)
    keep = torch.rand(shape) >= p if p else torch.ones(shape).bool()
    assert (y != 0).equal(keep)
    if 0 < p < 1: torch.testing.assert_close(y, keep/(1 - p))

def test_the_mask_depends_on_seed_and_shape_alone():
    "Not on type, memory order, the default type or device, threads, or whether gradients are wanted."
    def mask(x=None):
        torch.manual_seed(5)
        return (Dropout(0.3)(torch.ones(2, 3, 20, 20) if x is None else x) != 0).cpu()
    ones, expected = torch.ones(2, 3, 20, 20), mask()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64): assert mask(ones.to(dtype)).equal(expected)
    assert mask(ones.to(memory_format=torch.channels_last)).equal(expected)
    assert mask(torch.ones(20, 20, 3, 2).permute(3, 2, 0, 1)).equal(expected)
    assert mask(ones.clone().requires_grad_()).equal(expected)
    if torch.cuda.is_available(): assert mask(ones.cuda()).equal(expected)
    torch.set_default_dtype(torch.float64)
    try: assert mask().equal(expected)
    finally: torch.set_default_dtype(torch.float32)
    with torch.device('meta'): layer = Dropout(0.3)
    torch.manual_seed(5)
    with torch.device('meta'): y = layer(ones)
    assert (y != 0).equal(expected)
    assert layer(torch.ones(2, 3, device='meta')).device.type == 'meta'

def test_the_mask_in_another_process():
    program = 'import torch; from exp.nb_22 import Dropout; torch.manual_seed(9); print(Dropout(0.4)(torch.ones(50)).tolist())'
    out = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120, check=True).stdout
    torch.manual_seed(9)
    assert out.strip() == str(Dropout(0.4)(torch.ones(50)).tolist())

def test_modes_that_draw_no_numbers():
    x = torch.randn(3, 4)
    for layer in (Dropout(0), Dropout(0.5).eval()):
        state = torch.get_rng_state()
        assert layer(x) is x and torch.get_rng_state().equal(state)

def test_nan_and_infinity_are_treated_as_pytorch_treats_them():
    x = torch.tensor([math.nan, math.inf, 1.])  # times 0 is nan
    for p in (0.5, 1.):
        for layer in (Dropout(p), nn.Dropout(p)):
            y = layer(x)
            assert y[0].isnan() and (y[1].isnan() or y[1] == math.inf) and y[2] in (0, 1/(1 - p) if p < 1 else 0)

def test_recomputed_activations_have_the_same_mask():
    model = nn.Sequential(nn.Linear(6, 6), Dropout(), nn.Linear(6, 2))
    x, grads = torch.randn(4, 6), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        set_seed(3)
        grads.append(torch.autograd.grad(run(x).sum(), model.parameters()))
    alike(*grads)


# Training

class Crash(Exception): pass

class CrashAt(Callback):
    def __init__(self, epoch, i): self.epoch, self.i = epoch, i
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == (self.epoch, self.i): raise Crash

def new_learner(norm=BatchNorm, **options):
    set_seed(1)
    x, y = torch.randn(200, 784), torch.randint(0, 10, (200,))
    model = SimpleCNN(channels=(4, 8), norm=norm)
    model.head = nn.Sequential(Dropout(0.3), model.head)
    return Learner(model, get_dls(Dataset(x, y), Dataset(x[:40], y[:40]), 20, seed=3), progress=False, **options)

@pytest.mark.parametrize('cbs', [list, lambda: [EMA(0.9)]], ids=['plain', 'EMA'])
def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_bit_for_bit(tmp_path, cbs):
    "Masks and running statistics included."
    whole = new_learner()
    whole.fit(3, cbs=cbs())
    with suppress(Crash): new_learner().fit(3, cbs=[*cbs(), CrashAt(1, 6), Checkpoint(tmp_path, every=2)])
    again = new_learner()
    torch.manual_seed(77)
    again.fit(3, cbs=[*cbs(), Checkpoint(tmp_path, every=2, resume=True)])
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True): assert a.equal(b)

def test_a_training_is_the_same_as_with_pytorchs():
    losses = []
    for norm in (BatchNorm, nn.BatchNorm2d):
        learn = new_learner(norm)
        learn.fit(1, lr=0.01)
        losses.append(learn.recorder.losses)
    torch.testing.assert_close(*[torch.as_tensor(each) for each in losses], rtol=1e-3, atol=1e-4)

def test_a_validation_within_a_fit_leaves_the_statistics():
    class Look(Callback):
        def after_batch(self, learn):
            if not learn.training or learn.iter != 3: return
            before = copy.deepcopy(learn.model.state_dict())
            learn.validate()
            alike(learn.model.state_dict().values(), before.values())
    learn = new_learner()
    learn.fit(1, cbs=Look())
    assert learn.model.body[0][1].num_batches_tracked == 10

def test_an_error_within_the_model_leaves_whole_statistics():
    "The layers before it have counted the batch, none has half of an update."
    class Broken(nn.Module):
        def forward(self, x): raise RuntimeError('broken')
    first, last = BatchNorm(3), BatchNorm(3)
    with pytest.raises(RuntimeError): nn.Sequential(first, Broken(), last)(torch.randn(4, 3) + 5)
    assert (first.num_batches_tracked, last.num_batches_tracked) == (1, 0)
    assert first.running_mean.min() > 0 and last.running_mean.abs().max() == 0

def test_compiled_in_one_graph():
    "By PyTorch's tracer, without its compiler."
    for layer in (BatchNorm(4), BatchNorm(4, momentum=None), GroupNorm(2, 4), InstanceNorm(4), LayerNorm(3), RMSNorm(3), Dropout()):
        other, x = copy.deepcopy(layer), torch.randn(5, 4, 3, 3)
        for _ in range(2):
            torch.manual_seed(1)
            y = torch.compile(layer, fullgraph=True, backend='eager')(x)
            torch.manual_seed(1)
            torch.testing.assert_close(y, other(x))
        alike(layer.buffers(), other.buffers())

@pytest.mark.parametrize('momentum', [0.1, None])
def test_recorded_trainings_have_masks_and_statistics_of_their_own(momentum):
    runs = []
    for cbs in ([], [Record()]):
        learn = new_learner(lambda n: BatchNorm(n, momentum=momentum))
        learn.fit(2, cbs=cbs)
        runs.append([*learn.model.state_dict().values(), torch.as_tensor(learn.recorder.losses)])
    for a, b in zip(*runs, strict=True): assert a.equal(b)
