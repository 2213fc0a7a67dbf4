"Exported programs give the scores of their network; nothing is written that was not compared; every error is one clear sentence."
import copy, importlib.util, logging, os, re, signal, subprocess, sys, threading, time, urllib.request
from random import Random
import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize('net, words', [(Decides(), 'decides by numbers'), (Rows(), 'number of rows is not free'), (Restless(), 'nothing was written'),
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
