"Exported programs give the scores of their network; nothing is written that was not compared; every error is one clear sentence."
import _thread, contextlib, copy, importlib.util, inspect, logging, os, re, signal, socket, struct, subprocess, sys, threading, time, urllib.request
from random import Random
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
import exp.nb_32
from exp.nb_01 import get_test_data
from exp.nb_02 import Model
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Learner
from exp.nb_14 import MODELS, exp_train
from exp.nb_15 import BatchTransform
from exp.nb_20 import SimpleCNN
from exp.nb_23 import ResNet, load_pretrained
from exp.nb_32 import dequantize, exp_draw, export_model, load_exported, quantize

EXTRA = all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript', 'onnxruntime'))
needs_extra = pytest.mark.skipif(not EXTRA, reason="needs the extra: pip install 'exp-foundations[export]'")
FORMS = ['.pt2', pytest.param('.onnx', marks=needs_extra), '.html']
TOLERANCE = {'.pt2': 1e-6, '.onnx': 1e-5, '.html': 0.05}  # as a share of the largest score


OLD = torch.__version__ < exp.nb_32._OLDEST


@pytest.fixture(autouse=True)
def new_enough(request):
    "Tests with files .pt2 want a PyTorch that can export them; one with several forms wants it for that form alone."
    params = getattr(getattr(request.node, 'callspec', None), 'params', {})
    uses = params['form'] == '.pt2' if 'form' in params else '.pt2' in inspect.getsource(request.function)
    if OLD and uses: pytest.skip(f'expected PyTorch {".".join(map(str, exp.nb_32._OLDEST))} or newer for files .pt2, got {torch.__version__}')


@pytest.fixture(scope='module')
def test_set(): return get_test_data()


def one_line(error): return '\n' not in str(error) and len(str(error)) < 300


def trained_a_little(net, x, y):
    "So that BatchNorm has seen something."
    Learner(net, (DataLoader(Dataset(x, y), 50, shuffle=True, seed=0), None), lr=0.05, progress=False).fit(1)
    return net


# the same scores

@pytest.mark.parametrize('form', FORMS)
def test_all_test_images(form, tmp_path, test_set):
    x, y = test_set
    model = load_pretrained()
    run = load_exported(export_model(model, tmp_path/f'cnn{form}', x[:64]))
    with torch.no_grad(): expected = model(x)
    got = run(x)
    if form == '.pt2': assert torch.equal(got, expected)
    assert (got - expected).abs().max() <= TOLERANCE[form]*expected.abs().max()
    changed = (got.argmax(1) != expected.argmax(1)).sum().item()
    assert changed == 0 if form != '.html' else changed <= 10
    for n in (1, 2, 7, 512): torch.testing.assert_close(run(x[:n]), got[:n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['linear', 'mlp', 'deep', 'cnn', 'simple'])
def test_what_exp_train_makes(name, form, tmp_path, test_set):
    x, y = (t[:500] for t in test_set)
    net = trained_a_little(SimpleCNN(norm=nn.BatchNorm2d) if name == 'simple' else MODELS[name](784, 50, 10), x, y)
    run = load_exported(export_model(net, tmp_path/f'net{form}', x[:20]))
    with torch.no_grad(): expected = net.eval()(x)
    assert (run(x) - expected).abs().max() <= TOLERANCE[form]*expected.abs().max()


@pytest.mark.parametrize('form', FORMS[:2])
def test_a_residual_network(form, tmp_path, test_set):
    x, y = (t[:100] for t in test_set)
    net = trained_a_little(ResNet(), x, y)
    with torch.no_grad(): torch.testing.assert_close(load_exported(export_model(net, tmp_path/f'n{form}', x))(x), net.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('form', FORMS)
def test_images_as_input(form, tmp_path, test_set):
    x = test_set[0][:30].view(-1, 1, 28, 28)
    model = load_pretrained()
    run = load_exported(export_model(model, tmp_path/f'a{form}', x))
    with torch.no_grad(): assert (run(x[:9]).argmax(1) == model(x[:9]).argmax(1)).all()


# the network stays as it was

def test_a_learner_and_its_model_stay(tmp_path, test_set):
    x, y = (t[:200] for t in test_set)
    net = nn.Sequential(nn.Linear(784, 20), nn.BatchNorm1d(20), nn.Dropout(), nn.Linear(20, 10))
    learn = Learner(net, (DataLoader(Dataset(x, y), 50), None), progress=False)
    learn.fit(1)
    net.train()
    net[2].eval()
    before, modes, random = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_rng_state()
    run = load_exported(export_model(learn, tmp_path/'a.pt2', x))
    assert [m.training for m in net.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.requires_grad for p in net.parameters())
    assert torch.equal(run(x), copy.deepcopy(net).eval()(x))


def test_a_model_with_an_attribute_model(tmp_path, test_set):
    "It is exported whole, and not what it holds."
    class Doubled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def forward(self, x): return 2*self.model(x)
    net, x = Doubled(Model(784, 8, 10)), test_set[0][:9]
    assert torch.equal(load_exported(export_model(net, tmp_path/'a.pt2', x))(x), net(x))


@pytest.mark.parametrize('n', [1, 20])
def test_the_example_may_be_a_view_or_one_row(n, tmp_path, test_set):
    x = test_set[0]
    path = export_model(Model(784, 8, 10), tmp_path/'a.pt2', x[:n])
    assert path.stat().st_size < 200_000
    assert load_exported(path)(x[:5]).shape == (5, 10)


# what can't be exported

class Decides(nn.Module):
    def forward(self, x): return x/255 if x.max() > 1 else x

class Rows(nn.Module):
    def forward(self, x): return x.reshape(len(x), -1)

class Restless(nn.Module):
    def forward(self, x): return F.dropout(x, 0.5, training=True)

class Drifting(nn.Module):
    def forward(self, x): return x*torch.tensor(time.time() % 1000).float()


@pytest.mark.parametrize('net, words', [(Decides(), 'decides by numbers'), (Rows(), r'not free, for its code specialized it to be a constant .2. .by len'), (Restless(), 'nothing was written'),
                                        (Drifting(), 'nothing was written')], ids=['decides', 'rows', 'restless', 'drifting'])
def test_what_breaks(net, words, tmp_path, capfd):
    path = tmp_path/'a.pt2'
    path.write_text('older')
    with pytest.raises(ValueError, match=words) as error: export_model(net, path, torch.rand(50, 4) + 0.5)
    assert one_line(error.value) and [p.name for p in tmp_path.iterdir()] == ['a.pt2'] and path.read_text() == 'older'
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('net, words', [(ResNet(), 'no ResNet'), (nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Tanh()), 'no Tanh'), (nn.Sequential(nn.Flatten(), nn.LSTM(784, 10)), 'no LSTM'),
                                        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 28, 28))), 'no Unflatten'),
                                        (nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2)), r'dilation=\(2, 2\)'), (nn.Sequential(nn.Conv2d(1, 4, (3, 5))), r'not Conv2d\(1, 4, kernel_size=\(3, 5\)'),
                                        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(3, 2)), 'stride=2'), (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)), 'track_running_stats'),
                                        (nn.Sequential(nn.BatchNorm2d(1, affine=False)), 'affine=False')], ids=lambda v: v if isinstance(v, str) else '')
def test_what_can_not_be_drawn_is_named(net, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error: export_model(net, tmp_path/'a.html', torch.rand(4, 1, 28, 28))
    assert one_line(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize('learn, path, example, error, words', [
    (nn.Linear(4, 2), 'a.pt', torch.randn(2, 4), ValueError, 'ends with .pt2, .onnx, .html'), (nn.Linear(4, 2), 'a', torch.randn(2, 4), ValueError, "got 'a'"),
    ('cnn', 'a.pt2', torch.randn(2, 4), TypeError, 'a Learner or a model'), (nn.Linear(4, 2), 'a.pt2', torch.randn(0, 4), ValueError, 'expected an example'),
    (nn.Linear(4, 2), 'a.pt2', [[1., 2., 3., 4.]], ValueError, 'expected an example'), (nn.Linear(4, 2), 'a.pt2', (), ValueError, 'expected an example'),
    (nn.Bilinear(4, 4, 2), 'a.pt2', (torch.randn(3, 4), torch.randn(2, 4)), ValueError, 'as many rows, got 3, 2'),
    (nn.Linear(4, 2), 'a.pt2', torch.randn(2, 5), ValueError, r'an example that Linear takes, got \(2, 5\)'), (nn.Linear(4, 2), 'a.html', torch.randn(2, 4), ValueError, '28 x 28')])
def test_bad_input(learn, path, example, error, words, tmp_path):
    with pytest.raises(error, match=words) as found: export_model(learn, tmp_path/path, example)
    assert one_line(found.value) and not any(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError) as error: export_model(nn.Linear(4, 2), tmp_path/'file/a.pt2', torch.randn(2, 4))
    assert one_line(error.value)


@pytest.mark.parametrize('form', FORMS)
def test_damaged_files(form, tmp_path, test_set):
    path = export_model(Model(784, 8, 10), tmp_path/f'a{form}', test_set[0][:4])
    good = path.read_bytes()
    for bad in (b'', good[:200], good[:len(good)//2], b'x'*500):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged file or another') as error: load_exported(path)
        assert one_line(error.value)
    with pytest.raises(FileNotFoundError): load_exported(tmp_path/f'none{form}')


@pytest.mark.parametrize('form', FORMS)
def test_wrong_inputs_of_a_program(form, tmp_path, test_set):
    run = load_exported(export_model(load_pretrained(), tmp_path/f'a{form}', test_set[0][:4]))
    for inputs in ((torch.randn(2, 100),), (test_set[0][:2], test_set[0][:2]), ()):
        with pytest.raises(ValueError, match='expected inputs as in the export') as error: run(*inputs)
        assert one_line(error.value)


def test_without_the_extra(tmp_path, monkeypatch):
    "One sentence; the other two forms don't need it."
    monkeypatch.setattr(exp.nb_32, 'find_spec', lambda name: None)
    (tmp_path/'b.onnx').write_bytes(b'')
    for call in (lambda: export_model(Model(784, 8, 10), tmp_path/'a.onnx', torch.rand(2, 784)), lambda: load_exported(tmp_path/'b.onnx')):
        with pytest.raises(ImportError, match=r"found no onnx: pip install 'exp-foundations\[export\]'") as error: call()
        assert one_line(error.value)
    for form in ('.pt2', '.html'): export_model(Model(784, 8, 10), tmp_path/f'a{form}', torch.rand(2, 784))


def test_an_older_pytorch(tmp_path, monkeypatch, test_set):
    "Files .pt2 are refused by name, written or read, and the other forms are not."
    path = export_model(Model(784, 8, 10), tmp_path/'a.pt2', test_set[0][:4])
    monkeypatch.setattr(exp.nb_32, '_OLDEST', (99, 1))
    for call in (lambda: export_model(Model(784, 8, 10), tmp_path/'b.pt2', test_set[0][:4]), lambda: load_exported(path)):
        with pytest.raises(ImportError, match=r'expected PyTorch 99.1 or newer for files .pt2, got \d+\.\d+\.\d+$') as error: call()
        assert one_line(error.value)
    load_exported(export_model(Model(784, 8, 10), tmp_path/'a.html', test_set[0][:4]))


# whole numbers

def test_quantize():
    w = torch.randn(6, 3, 5, 5)*torch.logspace(-6, 3, 6).view(-1, 1, 1, 1)
    for bits in range(2, 9):
        q, scale = quantize(w, bits)
        assert q.dtype == torch.int8 and q.abs().max() == 2**(bits - 1) - 1 and scale.shape == (6,)
        assert ((dequantize(q, scale) - w).abs() <= scale.view(-1, 1, 1, 1)*0.5001).all()
    q, scale = quantize(torch.tensor([[0., 0.], [1., -1.]]))
    assert q.tolist() == [[0, 0], [127, -127]] and torch.isfinite(scale).all()
    for bad in ((w, 1), (w, 9), (w[0, 0, 0], 8)):
        with pytest.raises(ValueError): quantize(*bad)


# what would be wrong without a word

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_quantize_other_floats(dtype):
    "Rounding a quotient in bfloat16 gives 128, which is -128 as int8; a scale of half may be 0."
    torch.manual_seed(0)
    for w in (torch.randn(1000, 100), 1e-6*torch.randn(20, 100)):
        w = w.to(dtype).requires_grad_()
        q, scale = quantize(w)
        assert scale.dtype == dequantize(q, scale).dtype == torch.float32 and not scale.requires_grad and q.abs().max() == 127
        assert ((dequantize(q, scale) - w).abs() <= scale[:, None]*0.5001).all()


@pytest.mark.parametrize('w', [torch.tensor([[1., torch.nan]]), torch.tensor([[1., -torch.inf]]), torch.tensor([[1., 1e300]]).double()*1e300,
                               torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.int), torch.zeros(3, 0), [[1., 2.]]], ids=str)
def test_quantize_refuses(w):
    with pytest.raises(ValueError, match='expected (finite )?weights') as error: quantize(w)
    assert one_line(error.value)


@pytest.mark.parametrize('bits', [2.5, '8', None, True, 1, 9])
def test_quantize_wants_whole_bits(bits):
    with pytest.raises(ValueError, match='expected 2 to 8 bits, got'): quantize(torch.randn(2, 3), bits)


class Capped(nn.Linear):
    def forward(self, x): return super().forward(x)*(1 if x.shape[0] <= 25 else 2)

class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(30, 1))
    def forward(self, x): return x + self.p[:x.shape[0]]


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('net', [Capped(4, 2), Positions()], ids=['if', 'slice'])
def test_a_number_of_rows_with_an_end(net, form, tmp_path):
    with pytest.raises(ValueError, match='number of rows is not free') as error: export_model(net, tmp_path/f'a{form}', torch.randn(20, 4))
    assert one_line(error.value) and not any(tmp_path.iterdir())


def test_many_threads_at_once(tmp_path):
    path, errors, out = export_model(Model(784, 8, 10), tmp_path/'a.pt2', torch.rand(4, 784)), [], sys.stdout
    def load(i):
        try:
            time.sleep(i/100)
            load_exported(path)
        except ValueError as error: errors.append(error)
    for _ in range(3):
        threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert not errors and sys.stdout is out and logging.root.manager.disable == 0


class Shifts(nn.Module):
    def forward(self, x):
        x -= 1
        return 2*x


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('net', [Shifts(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3))], ids=['shifts', 'relu'])
def test_the_example_stays(net, form, tmp_path):
    x = torch.randn(20, 8)
    before = x.clone()
    run = load_exported(export_model(net, tmp_path/f'a{form}', x))
    assert torch.equal(x, before)
    torch.testing.assert_close(run(x.clone()), net(x.clone()).detach())


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        self.n += 1
        return x + self.n


def test_the_first_call_of_a_program_is_the_first_of_the_model(tmp_path):
    x = torch.zeros(20, 8)
    run = load_exported(export_model(Counts(), tmp_path/'a.pt2', x))
    assert [run(x)[0, 0].item() for _ in range(3)] == [1, 2, 3]


class Negative(Learner):
    def predict(self): self.pred = self.model(-self.xb[0])


def test_a_learner_that_prepares_its_inputs(tmp_path, test_set):
    x, y = (t[:100] for t in test_set)
    net, dls = Model(784, 8, 10), (DataLoader(Dataset(x, y), 50), None)
    prepares = Learner(net, dls, cbs=BatchTransform(lambda x: (x - 0.13)/0.31, valid=True))
    for learn, words in ((prepares, 'BatchTransform'), (Negative(net, dls), 'predict')):
        with pytest.raises(ValueError, match=f'changes inputs.*{words}.*or export learn.model') as error: export_model(learn, tmp_path/'a.pt2', x)
        assert one_line(error.value) and not any(tmp_path.iterdir())
        export_model(learn.model, tmp_path/'a.pt2', x).unlink()
    trains = Learner(net, dls, cbs=BatchTransform(lambda x: x.flip(1)))
    run = load_exported(export_model(trains, tmp_path/'a.pt2', x))
    assert torch.equal(run(x), trains.predict(x))


def test_a_page_is_compared_without_what_all_scores_share(tmp_path, test_set):
    "Softmax doesn't see it, and a tenth of it hides everything."
    x, net = test_set[0][:500], load_pretrained()
    with torch.no_grad():
        dead = (net.body(net.stem(x.view(-1, 1, 28, 28))).flatten(1).amax(0) == 0).nonzero()[0]
        net.head.bias += 200
        net.head.weight[:, dead] = 300.
    with pytest.raises(ValueError, match='nothing was written'): export_model(net, tmp_path/'a.html', x)


class Louder(Model):
    def forward(self, x): return 1.02*super().forward(x)


def test_a_page_has_no_code_of_a_subclass_or_a_hook(tmp_path, test_set):
    hooked = Model(784, 8, 10)
    hooked.layers[0].register_forward_hook(lambda m, args, out: 1.02*out)
    for net, words in ((Louder(784, 8, 10), 'no Louder'), (hooked, 'no hooks')):
        with pytest.raises(ValueError, match=words): export_model(net, tmp_path/'a.html', test_set[0][:20])


class Mixed(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return torch.stack([1e6*y[:, 0], F.dropout(y[:, 1], 0.5, training=True)], 1)


@pytest.mark.parametrize('form', FORMS[:2])
def test_noise_in_a_column_of_small_scores(form, tmp_path):
    with pytest.raises(ValueError, match='same scores each time') as error: export_model(Mixed(8, 2), tmp_path/f'a{form}', torch.randn(20, 8))
    assert one_line(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize('form', ['.pt2', '.html'])
def test_one_wrong_bit_is_seen(form, tmp_path, test_set):
    x, random = test_set[0][:20], Random(0)
    path = export_model(nn.Linear(784, 10), tmp_path/f'a{form}', x)
    good, expected = path.read_bytes(), load_exported(path)(x)
    for _ in range(40):
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        path.write_bytes(bad)
        try: torch.testing.assert_close(load_exported(path)(x), expected, atol=1e-6, rtol=0)
        except ValueError as error: assert one_line(error)


# clear words

class Ends(nn.Module):
    "A layer, and what a function makes of its scores."
    def __init__(self, func):
        super().__init__()
        self.layer, self.func = nn.Linear(8, 3), func
    def forward(self, x): return self.func(self.layer(x))


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('func, kind', [(lambda z: dict(logits=z), 'dict'), (lambda z: (z, z), 'tuple'), (lambda z: None, 'NoneType')], ids=['dict', 'tuple', 'None'])
def test_scores_that_are_no_tensor(func, kind, form, tmp_path):
    with pytest.raises(ValueError, match=f'gives one Tensor, got one of Ends that gives {kind}') as error: export_model(Ends(func), tmp_path/f'a{form}', torch.randn(9, 8))
    assert one_line(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('func', [lambda z: z > 0, lambda z: z[:, :0], lambda z: z.masked_fill(torch.tensor([True, False, False]), -torch.inf), lambda z: z*torch.tensor([1, torch.nan, 1])],
                         ids=['mask', 'empty', 'inf', 'nan'])
def test_scores_of_other_kinds(func, form, tmp_path):
    net, x = Ends(func), torch.randn(9, 8)
    run = load_exported(export_model(net, tmp_path/f'a{form}', x))
    torch.testing.assert_close(run(x), net(x).detach(), equal_nan=True)


def test_a_page_with_one_score_is_compared_too(tmp_path, monkeypatch):
    forms = exp.nb_32._FORMS
    monkeypatch.setitem(forms, '.html', forms['.html']._replace(read=lambda data: lambda x: torch.zeros(len(x), 1)))
    with pytest.raises(ValueError, match='nothing was written'): export_model(nn.Linear(784, 1), tmp_path/'a.html', torch.rand(9, 784))


@pytest.mark.parametrize('func', [lambda z: z.sum(1), lambda z: z.mean(), lambda z: z[:, 0][:0]], ids=['column', 'number', 'nothing'])
def test_scores_of_few_dimensions(func, tmp_path):
    net, x = Ends(func), torch.randn(9, 8)
    torch.testing.assert_close(load_exported(export_model(net, tmp_path/'a.pt2', x))(x), net(x).detach())


def test_a_program_that_is_wrong_about_inf(tmp_path, monkeypatch):
    "An infinity on one side only is a difference."
    x, forms = torch.randn(9, 8), exp.nb_32._FORMS
    monkeypatch.setitem(forms, '.pt2', forms['.pt2']._replace(read=lambda data: lambda x: torch.full((len(x), 3), torch.inf)))
    with pytest.raises(ValueError, match='nothing was written'): export_model(Ends(lambda z: z), tmp_path/'a.pt2', x)


def lazy(): return nn.LazyLinear(3)
def meta(): return nn.Linear(8, 3, device='meta')
def scripted(): return torch.jit.trace(nn.Linear(8, 3), torch.randn(2, 8))
def pruned():
    net = nn.Linear(8, 3)
    torch.nn.utils.prune.l1_unstructured(net, 'weight', 0.5)
    net(torch.randn(2, 8))
    return net
def without_statistics(): return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make, words', [(lazy, 'got a lazy one: call it once before'), (meta, 'a model that can be copied to the CPU, got one of Linear'),
                                         (scripted, 'a model that can be copied to the CPU, got one of TopLevelTracedModule'), (pruned, 'a model that can be copied'),
                                         (without_statistics, 'expected a model that takes any number of rows, got an error for 1:')])
def test_models_that_can_not_be_exported(make, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error: export_model(make(), tmp_path/'a.pt2', torch.randn(9, 8))
    assert one_line(error.value) and not any(tmp_path.iterdir())


def test_a_model_around_a_model(tmp_path):
    net, x = nn.Linear(8, 3), torch.randn(9, 8)
    assert torch.equal(load_exported(export_model(nn.DataParallel(net), tmp_path/'a.pt2', x))(x), net(x))


@pytest.mark.parametrize('inputs, words', [((torch.randn(2, 4).double(),), r'got \(2, 4\) float64'), ((torch.randn(2, 4).numpy(),), 'got ndarray: expected Tensors'), (([1., 2.],), 'got list: expected Tensors')],
                         ids=['double', 'array', 'list'])
def test_inputs_of_another_kind(inputs, words, tmp_path):
    run = load_exported(export_model(nn.Linear(4, 2), tmp_path/'a.pt2', torch.randn(9, 4)))
    with pytest.raises(ValueError, match=words) as error: run(*inputs)
    assert one_line(error.value)


def test_weights_in_place_of_a_program(tmp_path):
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path/'a.pt2')
    with pytest.raises(ValueError, match='made by another version of PyTorch, or no program at all') as error: load_exported(tmp_path/'a.pt2')
    assert one_line(error.value)


@pytest.mark.parametrize('layers, words', [((nn.Conv2d(1, 4, 3, padding='same'), nn.Linear(3136, 10)), 'padding=same'),
                                           ((nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Linear(16, 10)), r'AdaptiveAvgPool2d\(output_size=1\), and not AdaptiveAvgPool2d\(output_size=2\)')], ids=['padding', 'mean'])
def test_options_that_a_page_does_not_have(layers, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error: export_model(nn.Sequential(*layers[:-1], nn.Flatten(), layers[-1]), tmp_path/'a.html', torch.rand(9, 1, 28, 28))
    assert one_line(error.value)


def test_a_page_leaves_out_dropout_and_escapes_a_name(tmp_path):
    net = type('<b>', (nn.Sequential,), {})(nn.Conv2d(1, 4, 3), nn.Dropout2d(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.AlphaDropout(), nn.Linear(4, 10))
    assert '&lt;b&gt;, with 90 weights' in export_model(net, tmp_path/'a.html', torch.rand(9, 1, 28, 28)).read_text()


# what a stranger would try

class Many(nn.Module):
    def forward(self, *inputs): return sum(inputs)


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('n', [1, 3])
def test_a_forward_that_takes_any_inputs(n, form, tmp_path):
    inputs = tuple(torch.randn(9, 4) for _ in range(n))
    run = load_exported(export_model(Many(), tmp_path/f'a{form}', inputs))
    torch.testing.assert_close(run(*(x[:5] for x in inputs)), sum(inputs)[:5])


@pytest.mark.parametrize('form', FORMS[:2])
def test_another_number_of_inputs(form, tmp_path):
    "Or of rows, which a runtime would spread without a word."
    x, one = torch.randn(9, 4), torch.randn(1, 4)
    run = load_exported(export_model(nn.Bilinear(4, 4, 2), tmp_path/f'a{form}', (x, x)))
    for inputs, words in (((x,), 'another number of inputs'), ((x, x, x), 'another number of inputs'), ((x, one), 'expected as many rows of each')):
        with pytest.raises(ValueError, match=f'expected inputs as in the export, got .*: {words}') as error: run(*inputs)
        assert one_line(error.value)


@pytest.mark.parametrize('name', ['.pt2', 'a.PT2', 'a.Html'])
def test_a_name_that_only_looks_right(name, tmp_path):
    with pytest.raises(ValueError, match=f'in small letters, such as model.pt2, got {name!r}'): export_model(nn.Linear(4, 2), tmp_path/name, torch.randn(2, 4))


def test_an_example_by_name(tmp_path):
    with pytest.raises(ValueError, match=r'a Tensor \(n, ...\) of inputs or a tuple of such, got'): export_model(nn.Linear(4, 2), tmp_path/'a.pt2', dict(input=torch.randn(2, 4)))


@needs_extra
def test_an_operation_that_onnx_does_not_have(tmp_path):
    with pytest.raises(ValueError, match='No ONNX function found for .*_linalg_svd') as error:
        export_model(Ends(lambda z: torch.linalg.svdvals(z[:, None]*z[:, :, None])), tmp_path/'a.onnx', torch.randn(9, 8))
    assert one_line(error.value) and '\x1b' not in str(error.value)


@needs_extra
def test_onnx_within_autocast(tmp_path):
    "Its 16 bits would stay in the file for ever, where a program of PyTorch's follows autocast as the network does."
    net, x = nn.Linear(8, 3), torch.randn(9, 8)
    with torch.autocast('cpu', torch.bfloat16):
        with pytest.raises(ValueError, match='16 bits of autocast') as error: export_model(net, tmp_path/'a.onnx', x)
        export_model(net, tmp_path/'a.pt2', x)
    assert one_line(error.value)
    assert torch.equal(load_exported(tmp_path/'a.pt2')(x), net(x))


def test_long_words_of_torch_are_cut(tmp_path):
    class Speaks(nn.Module):
        def forward(self, x): raise RuntimeError('no '*300)
    with pytest.raises(ValueError, match='no no') as error: export_model(Speaks(), tmp_path/'a.pt2', torch.randn(2, 4))
    assert one_line(error.value)


@pytest.mark.parametrize('bias', [torch.inf, -torch.inf, torch.nan])
def test_a_page_has_finite_numbers(bias, tmp_path):
    net = nn.Linear(784, 10)
    net.bias.data[3] = bias
    with pytest.raises(ValueError, match='expected finite') as error: export_model(net, tmp_path/'a.html', torch.rand(9, 784))
    assert one_line(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize('net', [nn.Sequential(nn.Conv2d(1, 3, 3)), nn.Sequential(nn.ReLU())], ids=['conv', 'relu'])
def test_a_page_shows_a_score_for_each_class(net, tmp_path):
    "And not planes of numbers, each as a bar."
    with pytest.raises(ValueError, match=r'a page shows scores \(n, classes\), and no \(2, ') as error: export_model(net, tmp_path/'a.html', torch.rand(9, 1, 28, 28))
    assert one_line(error.value) and not any(tmp_path.iterdir())


class Interrupted(nn.Module):
    "Ctrl-C comes while it is exported, once or twice."
    def __init__(self, after):
        super().__init__()
        self.after = after  # functions to call after each
    def forward(self, x):
        if type(x).__name__ == 'FakeTensor':
            for func in self.after:
                signal.raise_signal(signal.SIGINT)
                func()
        return 2*x


@pytest.mark.parametrize('form', FORMS[:2])
@pytest.mark.parametrize('times', [1, 2])
def test_ctrl_c_waits_for_the_exporter(times, form, tmp_path):
    "torch, stopped within an export, may take all tensors for stand-ins from then on; a second Ctrl-C doesn't wait."
    seen, path, handler = [], tmp_path/f'a{form}', signal.getsignal(signal.SIGINT)
    def after(): seen.append('went on')
    path.write_text('older')
    with pytest.raises(KeyboardInterrupt): export_model(Interrupted([after]*times), path, torch.randn(9, 4))
    assert seen == ['went on']
    assert signal.getsignal(signal.SIGINT) is handler and logging.root.manager.disable == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == 'older'
    export_model(nn.Linear(4, 2), path, torch.randn(9, 4))


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        export_model(nn.Linear(4, 2), tmp_path/'a.pt2', torch.randn(9, 4))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)


# the command

@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')
    return exp_train(out=str(out), model='mlp', epochs=1, device='cpu', hidden=20, bs=512)


def test_a_page_of_a_run(run_folder, capsys, test_set, monkeypatch):
    folder = run_folder
    for run, out in ((str(folder), 'runs'), (folder.name, str(folder.parent))):
        page = exp_draw(run, out=out, serve=False)
        assert page == folder/'draw.html' and 'Model, with 15,910 weights' in page.read_text()
        page.unlink()
    with pytest.raises(ValueError, match='expected a run, got'): exp_draw('none', serve=False)
    monkeypatch.setattr(exp.nb_32, 'load_run', lambda *args, **kwargs: Learner(ResNet(), (None, None)))
    with pytest.raises(ValueError, match='no ResNet') as error: exp_draw(str(folder), serve=False)
    assert one_line(error.value)
    config = (folder/'config.json').read_text()
    (folder/'config.json').write_text(config.replace('"dataset": "mnist"', '"dataset": "kmnist"'))
    with pytest.raises(ValueError, match='learned mnist, got kmnist') as error: exp_draw(str(folder), serve=False)


def command(*args, **kwargs):
    return [sys.executable, '-c', 'from exp.nb_32 import _exp_draw_command; _exp_draw_command()', *args]


def test_the_page_is_served_until_ctrl_c(tmp_path):
    process = subprocess.Popen(command('--no-browser'), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(PYTHONUNBUFFERED='1', PYTHONPATH=os.pathsep.join(sys.path)))
    try:
        assert re.match(r'page: draw.html, 14\d kB$', process.stdout.readline())
        address = re.search(r'http://127\.0\.0\.1:(\d+)/', process.stdout.readline())
        with urllib.request.urlopen(address[0], timeout=10) as answer: assert answer.read() == (tmp_path/'draw.html').read_bytes()
        taken = subprocess.run(command('--no-browser', '--port', address[1], '--file', 'b.html'), cwd=tmp_path, capture_output=True, text=True,
                               env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path)))
        assert taken.returncode == 1 and taken.stderr == f'exp_draw: expected a free port, got {address[1]}, which is in use; 0 takes any that is free\n'
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and err == ''
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize('args, words', [(['none'], "expected a run, got 'none'"), (['--file', 'a.txt'], "ends with .html, got 'a.txt'"), (['--port', '99999'], 'expected a free port, got 99999')])
def test_one_sentence_in_the_shell(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(words)) as error: exp.nb_32._exp_draw_command(['--no-browser', *args])
    assert one_line(error.value)


def test_a_page_of_somebody_else_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path/'draw.html'
    page.write_text('my own')
    with pytest.raises(ValueError, match='draw.html: expected a page of exp_draw.s, found another file: give a name by --file') as error: exp_draw(serve=False)
    assert one_line(error.value) and page.read_text() == 'my own'
    assert exp_draw(file='draw.html', serve=False).stat().st_size > 100_000
    assert exp_draw(serve=False).name == 'draw.html'


def test_a_folder_of_the_same_name(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/run_folder.name).mkdir()
    config = run_folder/'config.json'
    config.write_text(config.read_text().replace('kmnist', 'mnist'))
    assert exp_draw(run_folder.name, out=str(run_folder.parent), serve=False) == run_folder/'draw.html'


def test_a_browser_that_stays_in_the_shell(tmp_path, monkeypatch, capsys):
    "Such a one is over only when it has read the page."
    monkeypatch.chdir(tmp_path)
    answers = []
    def browse(address):
        try: answers.append(urllib.request.urlopen(address, timeout=5).read())
        except OSError as error: answers.append(error)
        _thread.interrupt_main()
    monkeypatch.setattr(exp.nb_32.webbrowser, 'open', browse)
    with contextlib.suppress(KeyboardInterrupt): exp_draw()
    assert answers == [(tmp_path/'draw.html').read_bytes()]


def test_a_browser_that_hangs_up(capfd):
    with exp.nb_32._server(bytes(30_000_000), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for _ in range(3):
            client = socket.create_connection(('127.0.0.1', server.server_port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            client.sendall(b'GET / HTTP/1.0\r\n\r\n')
            client.recv(100)
            client.close()
        time.sleep(0.3)
        server.shutdown()
        thread.join()
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('error, code', [(KeyboardInterrupt(), 130), (RuntimeError('no memory\nat all'), 'exp_draw: RuntimeError: no memory')], ids=['ctrl-c', 'memory'])
def test_an_export_that_ends_early(error, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def fails(*args): raise error
    monkeypatch.setattr(exp.nb_32, 'export_model', fails)
    with pytest.raises(SystemExit) as found: exp.nb_32._exp_draw_command(['--no-serve'])
    assert found.value.code == code
