"Convolutions by hand in every form, and a summary that leaves no trace, of models that strangers bring."
import ast, copy, json, pickle
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from exp.nb_02 import Model
from exp.nb_10 import Callback, Learner
from exp.nb_20 import SimpleCNN, as_images, conv, summary

NOTEBOOK = Path(__file__).parent.parent/'nbs/20_convolutions.ipynb'


def by_hand():
    "The functions that the notebook defines and doesn't export."
    cells = [''.join(c['source']) for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
    trees = [ast.parse(source) for source in cells if '%pip' not in source]
    found = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = dict(torch=torch, F=F, nn=nn)
    wanted = 'n_windows', 'conv_loops', 'places', 'im2col', 'conv_matmul', 'pool', 'largest', 'mean', 'receptive_field'
    for node in found:
        if node.name in wanted: exec(compile(ast.Module([node], []), str(NOTEBOOK), 'exec'), names)
    return names

HAND = by_hand()
sizes = dict(n=st.integers(1, 3), groups=st.sampled_from([1, 2, 3]), c=st.integers(1, 3), o=st.integers(1, 3), h=st.integers(1, 9),
             w=st.integers(1, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 3),
             dilation=st.integers(1, 3), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))


def parts(f, x, w, b, **options):
    x, w, b = [t.clone().requires_grad_() for t in (x, w, b)]
    out = f(x, w, b, **options)
    behind = torch.linspace(-1, 1, out.numel()).to(out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, (x, w, b), behind)


@pytest.mark.parametrize('name', ['conv_loops', 'conv_matmul'])
def test_the_convolution_by_hand_is_pytorchs(name):
    @settings(max_examples=60 if name == 'conv_matmul' else 25, deadline=None, derandomize=True)
    @given(**sizes)
    def check(n, groups, c, o, h, w, kernel, stride, padding, dilation, dtype):
        span = dilation*(kernel - 1) + 1
        assume(h + 2*padding >= span and w + 2*padding >= span)
        g = torch.Generator().manual_seed(0)
        def rand(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        x, weight, b = rand(n, c*groups, h, w), rand(o*groups, c, kernel, kernel), rand(o*groups)
        options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        tol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
        for ours, theirs in zip(parts(HAND[name], x, weight, b, **options), parts(F.conv2d, x, weight, b, **options)):
            assert ours.dtype == theirs.dtype == dtype
            torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)
    check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(h=st.integers(1, 9), w=st.integers(1, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 3),
       dilation=st.integers(1, 3))
def test_the_columns_are_those_of_unfold(h, w, kernel, stride, padding, dilation):
    span = dilation*(kernel - 1) + 1
    assume(h + 2*padding >= span and w + 2*padding >= span)
    x = torch.arange(2.*3*h*w).view(2, 3, h, w)
    options = dict(stride=stride, padding=padding, dilation=dilation)
    columns = HAND['im2col'](x, kernel, **options)
    assert columns.flatten(1, 2).equal(F.unfold(x, kernel, **options))
    n = [HAND['n_windows'](side, kernel, **options) for side in (h, w)]
    assert columns.shape[-1] == n[0]*n[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(h=st.integers(1, 20), w=st.integers(1, 20), kernel=st.sampled_from([1, 3, 5, 7]), stride=st.integers(1, 4))
def test_the_block_divides_the_size_by_its_stride_and_rounds_up(h, w, kernel, stride):
    assert conv(2, 3, kernel, stride)(torch.zeros(1, 2, h, w)).shape == (1, 3, -(-h//stride), -(-w//stride))


def test_what_the_block_is_made_of():
    names = [type(layer).__name__ for layer in conv(1, 2, act=None)]
    assert names == ['Conv2d'] and conv(1, 2)[0].bias is not None
    normed = conv(1, 2, norm=nn.BatchNorm2d, act=nn.GELU)
    assert [type(layer).__name__ for layer in normed] == ['Conv2d', 'BatchNorm2d', 'GELU'] and normed[0].bias is None
    for even in (2, 4):
        with pytest.raises(ValueError, match=f'odd kernel, which has a middle, got {even}'): conv(1, 2, even)


def test_the_network_as_others_use_it():
    model = SimpleCNN(norm=nn.BatchNorm2d, act=nn.GELU).to(torch.bfloat16, memory_format=torch.channels_last)
    assert model(torch.zeros(2, 784, dtype=torch.bfloat16)).shape == (2, 10)
    model = SimpleCNN(3, (4,), n_in=2).double()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(5, 2, 9, 6, dtype=torch.float64)
    assert again(x).equal(model(x)) and model(x[:0]).shape == (0, 3)
    for shape in [(784,), (2, 785), (2, 3, 28, 28), (2, 1, 1, 28, 28)]:
        with pytest.raises(ValueError, match='rows of square ones, got'): SimpleCNN()(torch.zeros(shape))


def test_the_windows_of_the_network():
    assert [block[0].kernel_size for block in SimpleCNN().body] == [(5, 5), (3, 3), (3, 3), (3, 3)]


def test_images_are_looked_at_and_not_copied():
    x = torch.rand(4, 784)
    assert as_images(x).data_ptr() == x.data_ptr() and as_images(x[::2]).shape == (2, 1, 28, 28)
    assert as_images(x[:, :9]).shape == (4, 1, 3, 3)  # rows of a wider table are no view of it with other strides
    assert as_images(x.T.contiguous().T).equal(as_images(x))
    channels_last = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert as_images(channels_last, 3) is channels_last


# ---- summary

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
    def forward(self, x): return {'a': self.two(self.one(x)), 'b': [x, None]}


class Gated(nn.Module):
    "Products of its own beside those of a layer."
    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(4, 6), nn.Parameter(torch.randn(4, 6))
    def forward(self, x): return self.layer(x)*(x @ self.gate)


class Counting(nn.Module):
    "Changes a buffer in evaluation mode, draws numbers, and keeps what it saw."
    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    def forward(self, x):
        self.calls += 1
        return self.body(x) + torch.randn(4)


def trace(model):
    hooks = [len(getattr(m, name)) for m in model.modules() for name in vars(m) if name.endswith('_hooks')]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return hooks, state, grads, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], torch.get_rng_state()

def same(a, b):
    if isinstance(a, torch.Tensor): return a.equal(b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b

def x4(): return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

MODELS = {'tied': (Twice, x4), 'own products': (Gated, x4), 'counting': (Counting, x4), 'plain': (lambda: Model(4, 5, 2), x4),
          'convolutions': (lambda: SimpleCNN(norm=nn.BatchNorm2d), lambda: torch.zeros(2, 784)),
          'attention': (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.randn(2, 5, 8)),
          'decoder': (lambda: nn.TransformerDecoderLayer(8, 2, 16), lambda: (torch.randn(5, 2, 8), torch.randn(4, 2, 8))),
          'recurrent': (lambda: nn.GRU(4, 5, 2), lambda: torch.randn(6, 2, 4)),
          'words': (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), lambda: torch.tensor([[1, 2], [3, 4]])),
          'nothing': (lambda: nn.Sequential(), x4), 'one layer': (lambda: nn.Linear(4, 2), x4)}

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('training', [True, False])
def test_a_summary_leaves_no_trace_and_counts_every_weight(name, training):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, xb = make().train(training), inputs()
    if len([*model.parameters()]) > 2: next(model.parameters()).requires_grad_(False)
    before = trace(model)
    found = summary(model, xb)
    assert same(before, trace(model))
    assert found.weights == sum(p.numel() for p in model.parameters()) == sum(row['weights'] for row in found.rows) + found.unused
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.unused == 0 and str(found) and found._repr_html_().count('<tr>') == len(found.rows) + 1
    assert found.rows == summary(model, xb).rows


def test_the_products_of_each_layer_are_its_own():
    found = {row['name']: row['madds'] for row in summary(Gated(), x4()).rows}
    assert found == {'layer': 3*4*6, '': 3*4*6}


def test_a_weight_that_two_layers_share_counts_once():
    found = summary(Twice(), x4())
    assert [row['weights'] for row in found.rows] == [20, 4] and found.madds == 2*3*16


def test_products_in_fused_kernels_are_counted_and_the_kernels_stay_on():
    x = torch.randn(2, 5, 16)
    torch.backends.mha.set_fastpath_enabled(True)
    for attention in (nn.MultiheadAttention(16, 4, batch_first=True), nn.MultiheadAttention(16, 4, batch_first=True, bias=False)):
        assert summary(attention, (x, x, x)).madds == 2*(5*4*16*16 + 2*5*5*16)
    assert summary(nn.LSTM(16, 8), x).madds == 2*5*4*8*(16 + 8) and summary(nn.GRU(16, 8), x).madds == 2*5*3*8*(16 + 8)
    assert torch.backends.mha.get_fastpath_enabled() and torch._C._get_mkldnn_enabled()
    with pytest.raises(RuntimeError): summary(nn.Sequential(nn.LSTM(16, 8), nn.Linear(3, 3)), x[..., :3])
    assert torch.backends.mha.get_fastpath_enabled() and torch._C._get_mkldnn_enabled()


class Attends(nn.Module):
    def forward(self, x): return F.scaled_dot_product_attention(x, x, x)

def test_products_of_attention_as_a_function():
    assert summary(Attends(), torch.randn(2, 4, 5, 8)).madds == 2*(2*4*5*5*8)  # scores, and means by scores


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(1, 3), groups=st.integers(1, 3), c=st.integers(1, 3), o=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 2))
def test_multiply_adds_of_a_convolution(n, groups, c, o, kernel, stride):
    layer = nn.Conv2d(c*groups, o*groups, kernel, stride, groups=groups)
    x = torch.zeros(n, c*groups, 6, 7)
    assert summary(layer, x).madds == layer(x).numel()*c*kernel*kernel


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Counting()
    def forward(self, x):
        self.layer(x)
        raise KeyboardInterrupt

def test_an_interrupted_summary_leaves_no_trace():
    model = Fails()
    before = trace(model)
    with pytest.raises(KeyboardInterrupt): summary(model, x4())
    assert same(before, trace(model))


def test_hooks_of_others_stay_and_are_called():
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    before = trace(model)
    summary(model, x4())
    assert same(before, trace(model)) and calls == [1]


def test_a_summary_within_a_fit_changes_nothing():
    class Look(Callback):
        def after_batch(self, learn): self.found = summary(learn.model, learn.xb)
    def weights(cbs):
        torch.manual_seed(0)
        batches = [(x4(), torch.tensor([0, 1, 0]))]*3
        learn = Learner(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)), (batches, batches), progress=False)
        learn.fit(2, cbs=cbs)
        return learn.model.state_dict()
    look = Look()
    assert same(dict(weights(())), dict(weights(look))) and look.found.rows[0]['output'] == '(3, 4)'


def test_modes_in_which_others_call_it():
    model = Counting()
    with torch.inference_mode(): assert summary(model, x4()).madds == 48
    with torch.autocast('cpu', torch.bfloat16): assert summary(model, x4()).madds == 48
    with torch.enable_grad(): assert summary(model, x4().requires_grad_()).madds == 48
    assert summary(Twice(), {'x': x4()}).rows == summary(Twice(), [x4()]).rows


def test_a_compiled_model_is_summed_up_as_the_one_within():
    model = nn.Sequential(nn.Linear(4, 4))
    assert summary(torch.compile(model, backend='eager'), x4()).rows == summary(model, x4()).rows


@pytest.mark.parametrize('wrong', [F.relu, None, 'resnet', nn.Linear])
def test_what_is_no_model(wrong):
    with pytest.raises(TypeError, match='expected a model, an nn.Module, got'): summary(wrong, x4())


def test_a_lazy_model_is_refused_before_it_takes_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match='lazy'): summary(model, x4())
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_between_forward_and_backward():
    "Buffers that did not change are not written, so that autograd finds them as they were."
    model = SimpleCNN(norm=torch.nn.BatchNorm2d).eval()
    x = torch.rand(4, 784)
    loss = model(x).sum()
    summary(model, x)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
