"Folders of runs as they are after a year: odd runs among good ones, runs from other machines, full disks, readers that have gone."
import json, os, shutil, signal, struct, subprocess, sys
from dataclasses import asdict
from pathlib import Path
import numpy as np
import pytest
import torch
from exp import nb_14
from exp.nb_01 import get_data
from exp.nb_10 import Recorder
from exp.nb_14 import (MODELS, Settings, compare_runs, exp_runs, exp_train, list_runs, load_run, plot_runs, read_metrics, read_settings)

FEW = [t[:n] for t, n in zip(get_data(), (640, 640, 500, 500))]

@pytest.fixture
def small(monkeypatch, tmp_path):
    "In an empty folder, with few rows."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nb_14, 'get_data', lambda *a: FEW)
    monkeypatch.setattr(nb_14, 'get_test_data', lambda *a: FEW[2:])

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp('trained'))
        m.setattr(nb_14, 'get_data', lambda *a: FEW)
        m.setattr(nb_14, 'get_test_data', lambda *a: FEW[2:])
        exp_train(epochs=2, model='linear', name='first'), exp_train(epochs=2, model='linear', opt='sgd', name='second')
        return Path('runs').absolute()

@pytest.fixture
def good(small, trained):
    "Two good runs."
    shutil.copytree(trained, 'runs')
    return tuple(sorted(Path('runs').iterdir()))

def change(folder, **settings):
    config = json.loads((folder/'config.json').read_text())
    config['settings'] |= settings
    (folder/'config.json').write_text(json.dumps(config))

def odd(first, name, **files):
    "A copy of a run with other content in some files; None: without them."
    folder = Path('runs')/name
    shutil.copytree(first, folder)
    for file, content in files.items():
        path = folder/file.replace('__', '.')
        if path.is_dir(): shutil.rmtree(path)
        elif path.exists(): path.unlink()
        if isinstance(content, dict): path.mkdir()
        elif content is not None: path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder

def config_with(first, **extra):
    config = json.loads((first/'config.json').read_text())
    return json.dumps(config | {'settings': config['settings'] | extra.pop('settings', {})} | extra)


SETTINGS = {  # what is in config.json, and what the error says
    'cut': (lambda first: (first/'config.json').read_bytes()[:60], 'config.json: expected JSON'), 'empty': (lambda first: '', 'expected JSON'),
    'binary': (lambda first: b'\xff\xfe\0\x80', 'expected JSON'), 'a list': (lambda first: '[1]', 'found a list'),
    'a number': (lambda first: '3', 'found a int'), 'foreign': (lambda first: '{"name": "webpack", "version": 3}', 'made by another program'),
    'foreign settings': (lambda first: '{"settings": {"theme": "dark"}}', 'made by another program'),
    'settings a list': (lambda first: '{"settings": [1]}', 'made by another program'), 'deep': (lambda first: '['*100_000, 'expected JSON'),
    'newer': (lambda first: config_with(first, settings=dict(warmup=5)), r"found \['warmup'\] as well: made by a newer version"),
    'newer format': (lambda first: config_with(first, format='exp run, 9'), "found 'exp run, 9': made by a newer"),
    'wrong type': (lambda first: config_with(first, settings=dict(epochs='ten')), "--epochs to be a whole number, got 'ten'"),
    'nested': (lambda first: config_with(first, settings=dict(model=['mlp'])), r"--model to be a string, got \['mlp'\]"),
    'out of range': (lambda first: config_with(first, settings=dict(lr=-1)), '--lr above 0, got -1'),
    'a folder': (lambda first: {}, 'config.json')}

@pytest.mark.parametrize('content, words', SETTINGS.values(), ids=SETTINGS)
def test_one_odd_run_does_not_hide_the_others(content, words, good, capsys):
    first, second = good
    run = odd(first, '20200101-000000-odd', config__json=content(first))
    capsys.readouterr()
    assert [row['run'] for row in list_runs()] == [first.name, second.name]
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and str(run) in told
    exp_runs(plot='all.png')
    out, told = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ['run', first.name, second.name] and str(run) in told
    assert Path('all.png').read_bytes().startswith(b'\x89PNG')
    nb_14._exp_runs_command([])  # and the command ends well
    compare_runs(first, second), plot_runs(first, second), load_run(first)
    for ask in (exp_runs, load_run, lambda run: exp_train(resume=run), lambda run: compare_runs(first, run), lambda run: exp_runs(run, second)):
        with pytest.raises((ValueError, OSError), match=words if isinstance(content(first), (str, bytes)) else 'config.json') as error: ask(run.name)
        assert str(run) in str(error.value)
    with pytest.raises(SystemExit, match=run.name): nb_14._exp_runs_command([run.name])


FILES = {
    'metrics cut': ('metrics__csv', lambda text: text[:-9], 'metrics.csv: expected a line of numbers'),
    'metrics cut within a row': ('metrics__csv', lambda text: text[:text.rindex('0.')] + '\n', 'metrics.csv: expected a line of numbers'),
    'metrics of words': ('metrics__csv', lambda text: 'epoch,accuracy\n0,much\n', "metrics.csv: .*'much'"),
    'metrics of bytes': ('metrics__csv', lambda text: b'\xff\0\n', 'metrics.csv: '), 'metrics a folder': ('metrics__csv', lambda text: {}, 'metrics.csv'),
    'more fields': ('metrics__csv', lambda text: text.rstrip() + ',7\n', 'metrics.csv: expected a line of numbers'),
    'results cut': ('results__json', lambda text: text[:10], 'results.json: expected JSON'), 'results a list': ('results__json', lambda text: '[]', 'found a list'),
    'results of words': ('results__json', lambda text: '{"test_accuracy": "fine"}', "results.json: expected numbers, found .*'fine'"),
    'results a folder': ('results__json', lambda text: {}, 'results.json')}

@pytest.mark.parametrize('file, content, words', FILES.values(), ids=FILES)
def test_what_can_be_read_of_a_damaged_run_is_listed(file, content, words, good, capsys):
    first, second = good
    new = content((first/file.replace('__', '.')).read_text())
    run = odd(first, '20200101-000000-odd', **{file: new})
    capsys.readouterr()
    rows = list_runs()
    told = capsys.readouterr().err
    assert [row['run'] for row in rows] == [run.name, first.name, second.name] and rows[0]['model'] == 'linear' and rows[1]['seconds'] is not None
    assert len(told.splitlines()) == 1 and str(run) in told
    exp_runs(plot='all.png')
    with pytest.raises((ValueError, OSError), match=words) as error: exp_runs(run)
    assert str(run) in str(error.value)
    load_run(run.name)  # its weights are whole


def test_half_made_and_foreign_folders(good, capsys):
    first, second = good
    for name in ('20200101-000000-begun', '.cache', 'notes'): (Path('runs')/name).mkdir()
    Path('runs/readme.txt').write_text('mine')
    capsys.readouterr()
    assert len(list_runs()) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and 'runs/20200101-000000-begun: expected a run, found a folder without config.json' in told[0]
    for ask in (exp_runs, load_run, lambda run: exp_train(resume=run)):
        with pytest.raises(ValueError, match='runs/20200101-000000-begun: expected a run, found a folder without'): ask('20200101-000000-begun')
    with pytest.raises(ValueError, match=r"expected a run, got 'none'; there are \['20"): exp_runs('none')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads everything')
def test_a_run_that_may_not_be_read(good, capsys):
    first, second = good
    (first/'config.json').chmod(0)
    assert [row['run'] for row in list_runs()] == [second.name] and first.name in capsys.readouterr().err
    second.chmod(0)
    assert list_runs() == []
    second.chmod(0o700)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
@pytest.mark.parametrize('settings', [dict(device='cuda'), dict(device='cuda:3'), dict(device='mps'), dict(device='hpu'), dict(device='xla:1'), dict(device='meta'), dict(tensorboard=True),
                                      dict(device='cuda', tensorboard=True)], ids=str)
def test_a_run_from_another_machine(settings, good, capsys, monkeypatch):
    first, second = good
    monkeypatch.setattr(nb_14, 'find_spec', lambda name: None)
    if 'mps' in settings.values() and torch.backends.mps.is_available(): pytest.skip('is there')
    change(first, **settings)
    assert [row['run'] for row in list_runs()] == [first.name, second.name]
    exp_runs(), plot_runs(first, second)
    names = {row['']: row[first.name] for row in compare_runs(first, second)}
    assert {k: names[k] for k in settings} == settings
    assert asdict(read_settings(first)) | settings == asdict(read_settings(first))
    best = max(row['accuracy'] for row in read_metrics(first))
    for device in (None, 'cpu', torch.device('cpu')):
        learn = load_run(first, device=device)
        assert learn.validate()['accuracy'] == pytest.approx(best) and next(learn.model.parameters()).device.type in ('cpu', 'mps')
    with pytest.raises(ValueError, match='expected --device .* got .cuda:9' ): load_run(first, device='cuda:9')
    with pytest.raises(ValueError, match='tensorboard|--device'): exp_train(resume=first)  # a run begins where it can be as it was
    with pytest.raises(ValueError, match='tensorboard|--device'): exp_train(**settings)


def test_a_run_with_a_model_that_is_only_known_elsewhere(small, capsys):
    MODELS['mine'] = MODELS['linear']
    try: mine = exp_train(epochs=1, model='mine')
    finally: del MODELS['mine']
    other = exp_train(epochs=1, model='linear')
    assert sorted(row['model'] for row in list_runs()) == ['linear', 'mine'] and capsys.readouterr().err == ''
    compare_runs(mine, other), plot_runs(mine, other)
    for ask in (load_run, lambda run: exp_train(resume=run)):
        with pytest.raises(ValueError, match="expected --model in .*, got 'mine'"): ask(mine)


def test_a_run_before_its_first_epoch_has_no_weights(small, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(nb_14, '_train', lambda *a: None)
        folder = exp_train(epochs=1)
    with pytest.raises(ValueError, match='model.safetensors: expected the weights of the best epoch, found none'): load_run(folder)


def test_names_that_are_alike_and_names_with_signs(small, capsys):
    "Runs of one name in two folders; signs that pictures take for formulas; letters of other alphabets."
    a, b = (exp_train(epochs=e, model='linear', name='точность $x^$', out=out) for e, out in ((1, 'a'), (2, 'b')))
    if a.name != b.name: b = b.rename(b.with_name(a.name))
    assert {row['']: (row[str(a)], row[str(b)]) for row in compare_runs(a, b)}['epochs'] == (1, 2)
    plot_runs(a, b).savefig('a.png')
    exp_runs(out='a')
    assert a.name in capsys.readouterr().out


@pytest.mark.parametrize('settings, words', [
    (dict(lr='fast'), "--lr to be a number, got 'fast'"), (dict(lr='0.1'), "got '0.1'"), (dict(lr=True), 'got True'), (dict(lr=[0.1]), r'got \[0.1\]'),
    (dict(epochs=True), '--epochs to be a whole number, got True'), (dict(epochs=2.5), 'got 2.5'), (dict(epochs='3'), "got '3'"),
    (dict(epochs=None), 'got None'), (dict(bs=2.5), '--bs to be a whole number, got 2.5'), (dict(bs=float('nan')), 'got nan'),
    (dict(hidden='many'), "got 'many'"), (dict(seed=1.), 'got 1.0'), (dict(seed=-1), 'got -1'), (dict(model=3), '--model to be a string, got 3'),
    (dict(model=None), 'got None'), (dict(opt=['sgd']), r"got \['sgd'\]"), (dict(sched={}), r'got {}'), (dict(dataset=0), 'got 0'),
    (dict(device=0), '--device to be a string, got 0'), (dict(device=None), 'got None'), (dict(tensorboard='no'), "True or False, got 'no'"),
    (dict(tensorboard=1), 'got 1'), (dict(name=7), 'got 7'), (dict(lr=float('inf')), 'above 0, got inf'), (dict(lr=-0.1), 'above 0, got -0.1'),
    *((dict(name=name), 'expected --name') for name in ('', 'a:b', 'a?', 'a|b', 'a*', 'a<b', 'a>', 'a"', 'a\\b', 'a\nb', 'a.', 'a ', '..', 'a/', '\0')),
    (dict(data_dir=3), 'got 3')], ids=str)
def test_settings_of_the_wrong_kind(settings, words, small):
    with pytest.raises(ValueError, match=words): Settings(**settings)
    with pytest.raises(ValueError, match=words): exp_train(**settings)
    assert not Path('runs').exists()

def test_settings_that_nobody_knows(small):
    for name in ('epoch', 'here', 'batch_size'):
        with pytest.raises(ValueError, match=rf"expected settings in \['epochs', .*got \['{name}'\]"): exp_train(**{name: 1})

def test_settings_of_related_kinds_are_taken(small):
    s = Settings(epochs=np.int64(2), lr=np.float32(0.5), bs=torch.tensor(3).item(), data_dir=Path('x'), device=torch.device('cpu'), name='ä b-1.5$')
    assert asdict(s) == json.loads(json.dumps(asdict(s))) and (s.epochs, s.lr, s.data_dir, s.device) == (2, 0.5, 'x', 'cpu')
    assert type(s.epochs) is int and type(s.lr) is float


# Two processes, full disks, screens

HOLDER = '''
import sys, time
sys.path.insert(0, sys.argv[1])
from test_runs import *
nb_14.get_data, nb_14.get_test_data = (lambda *a: FEW), (lambda *a: FEW[2:])
class Wait(nb_14.Callback):
    def after_batch(self, learn):
        print('training', flush=True)
        time.sleep(60)
if len(sys.argv) > 3: nb_14.Learner.default_cbs += (Wait,)
nb_14._exp_train_command(['--resume', sys.argv[2]])
'''

@pytest.mark.skipif(os.name == 'nt', reason='kills')
def test_two_processes_resume_one_run(small, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(nb_14, '_train', lambda *a: None)
        folder = exp_train(epochs=1)
    command = [sys.executable, '-c', HOLDER, str(Path(__file__).parent), str(folder)]
    first = subprocess.Popen([*command, 'slowly'], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == 'training\n'
    before = sorted(folder.rglob('*'))
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and f'process {first.pid} on' in second.stderr and str(folder) in second.stderr
    assert len(second.stderr.splitlines()) == 1 and sorted(folder.rglob('*')) == before
    first.kill(), first.wait()
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.returncode == 0 and 'validation accuracy' in third.stdout and third.stderr == ''


def test_a_full_disk_does_not_end_a_training_through_its_log(small, monkeypatch, capsys):
    "The lines are written when there is room again, in their order and once; metrics as well."
    append, write, full, last = nb_14._append, Recorder.to_csv, [True], [True]
    def no_room(text, path):
        if full[0]: raise OSError(28, 'No space left on device')
        append(text, path)
    def to_csv(self, path):
        failed, last[0] = full[0] or len(self.epochs) == 4 and last[0], full[0] or len(self.epochs) < 4
        if failed: raise OSError(28, 'No space left on device')  # also the last one within the training
        write(self, path)
    class Room(nb_14.Callback):
        order = 9
        def after_epoch(self, learn): full[0] = learn.epoch < 2
    monkeypatch.setattr(nb_14, '_append', no_room)
    monkeypatch.setattr(Recorder, 'to_csv', to_csv)
    monkeypatch.setattr(nb_14.Learner, 'default_cbs', nb_14.Learner.default_cbs + (Room,))
    folder = exp_train(epochs=4)
    out, err = capsys.readouterr()
    assert (folder/'log.txt').read_text() == out and 'log.txt: No space left on device; the training goes on' in err
    assert [row['epoch'] for row in read_metrics(folder)] == [0, 1, 2, 3]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs resource limits')
def test_a_line_is_in_the_log_whole_or_not_at_all(tmp_path):
    import resource
    path, pid = tmp_path/'log.txt', os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        nb_14._append('a'*60 + '\n', path)
        try: nb_14._append('b'*60 + '\n', path)
        except OSError: os._exit(7)
        os._exit(0)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 7 and path.read_text() == 'a'*60 + '\n'


def shell(tmp_path, command, **env):
    bin = Path(sys.executable).parent
    env = os.environ | {'PATH': f'{bin}:{os.environ["PATH"]}', 'PYTHONPATH': str(Path(__file__).parent.parent)} | env
    return subprocess.run(['bash', '-c', f'set -o pipefail; {command}'], cwd=tmp_path, env=env, capture_output=True)

@pytest.mark.skipif(os.name == 'nt', reason='needs bash')
def test_screens_of_all_kinds(good, tmp_path):
    "A reader that goes, a console without the letters, none at all, a full one: nothing fails, nothing is said about it."
    first, second = good
    for i in range(40): shutil.copytree(first, f'runs/20300101-{i:06}-{"x"*200}')
    shutil.copytree(first, 'runs/20310101-000000-точность→')
    ascii = dict(PYTHONIOENCODING='ascii', LC_ALL='C.UTF-8')
    for command, env in (('exp_runs | head -1', {}), ('exp_runs >&-', {}), ('exp_runs', ascii), ('exp_runs > /dev/full', {}), ('exp_runs 2>&-', {}),
                         ('exp_runs | true', {})):
        done = shell(tmp_path, command, **env)
        assert done.returncode == 0 and done.stderr == b'', (command, done)
        if env: assert b'20310101-000000-????????' in done.stdout
    done = shell(tmp_path, 'exp_train --epochs 1 --model linear --out o --name ё | head -1', **ascii)
    assert done.returncode == 0 and done.stderr == b'' and len(list_runs('o')) == 1 and list_runs('o')[0]['valid'] > 0.8
    (Path('runs')/'20320101-000000-ё').mkdir()
    done = shell(tmp_path, 'exp_runs 2>&-')
    assert done.returncode == 0 and b'expected a run' not in done.stdout
    done = shell(tmp_path, 'exp_runs', **ascii)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and b'20320101-000000-' in done.stderr
    done = shell(tmp_path, 'exp_runs ничто', **ascii)
    assert done.returncode == 1 and b'Traceback' not in done.stderr


# Data of one's own, and what does not fit

def write_data(folder, n=10_100, shape=(8, 8), classes=10, least=0, test_shape=None, parts=('train', 't10k'), test_labels=None):
    "The four files, unpacked: images that show their label."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, rows, (h, w) in (('train', n, shape), ('t10k', 60, test_shape or shape)):
        if part not in parts: continue
        y = (rng.integers(0, classes, rows) + least).astype(np.uint8)
        if part == 't10k' and test_labels is not None: y[:] = test_labels
        x = rng.integers(0, 90, (rows, h*w)).astype(np.uint8)
        if h*w: x[np.arange(rows), y.astype(int) % (h*w)] = 255
        header = struct.pack('>4B3I', 0, 0, 8, 3, rows, h, w)
        (folder/f'{part}-images-idx3-ubyte').write_bytes(header + x.tobytes())
        (folder/f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>4BI', 0, 0, 8, 1, rows) + y.tobytes())
    return folder

QUICK = dict(epochs=1, model='linear', bs=100)

@pytest.mark.parametrize('shape', [(8, 8), (4, 8), (16, 4), (28, 28), (1, 7)], ids=str)
def test_images_of_any_size(shape, tmp_path, monkeypatch):
    "Trained, tested, and their mistakes drawn as they are."
    monkeypatch.chdir(tmp_path)
    drawn, show = [], nb_14.show_image
    monkeypatch.setattr(nb_14, 'show_image', lambda im, *args: (drawn.append(tuple(im.shape)), show(im, *args)))
    folder = exp_train(data_dir=write_data(tmp_path/'data', shape=shape), **QUICK | dict(lr=1e-6))
    assert {*drawn} == {shape} and (folder/'mistakes.png').read_bytes().startswith(b'\x89PNG')
    assert load_run(folder).model.weight.shape == (10, shape[0]*shape[1])

@pytest.mark.parametrize('model, side', [('cnn', 24), ('cnn', 32), ('resnet', 8), ('resnet', 15)])
def test_convolutions_on_images_of_any_side(model, side, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = exp_train(data_dir=write_data(tmp_path/'data', shape=(side, side)), **QUICK | dict(model=model))
    assert load_run(folder).validate()['accuracy'] >= 0

@pytest.mark.parametrize('model, shape, words', [('cnn', (16, 16), 'size of at least 24, got 16'), ('cnn', (25, 25), 'even size .*got 25'),
                                                 ('cnn', (4, 8), 'square images .*got 32 pixels'), ('resnet', (4, 8), 'square images')], ids=str)
def test_images_that_convolutions_cannot_take(model, shape, words, tmp_path, monkeypatch):
    "Said before anything is written."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words): exp_train(data_dir=write_data(tmp_path/'data', shape=shape), **QUICK | dict(model=model))
    assert not (tmp_path/'runs').exists()

UNFIT = {'no test files': (dict(parts=['train']), 'expected t10k-images'), 'test images of another size': (dict(test_shape=(4, 8)), 'test images of 64 pixels, .*found 32'),
         'labels up to 11': (dict(classes=12), 'training labels from 0 to 9, found 0 to 11'), 'labels from 1': (dict(least=1), 'labels from 0 to 9, found 1 to 10'),
         'a test label': (dict(test_labels=26), 'test labels from 0 to 9, found 26 to 26'), 'no pixels': (dict(shape=(0, 8)), 'training images, found shape')}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('options, words', UNFIT.values(), ids=UNFIT)
def test_data_that_do_not_fit_are_told_before_the_training(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path/'data', **options)
    def train(*args): raise AssertionError('it began')
    monkeypatch.setattr(nb_14, '_train', train)
    with pytest.raises((ValueError, OSError), match=words): exp_train(data_dir=data, **QUICK)
    assert not Path('runs').exists()
    with pytest.raises(SystemExit, match=words): nb_14._exp_train_command(['--data-dir', str(data)])

def test_a_run_whose_data_are_elsewhere(tmp_path, monkeypatch):
    "The folder is stored in full; without it there are the weights, with another the whole run."
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path/'data')
    run = exp_train(data_dir='data', **QUICK).absolute()
    (tmp_path/'other').mkdir()
    monkeypatch.chdir(tmp_path/'other')
    assert read_settings(run).data_dir == str((tmp_path/'data').resolve())
    best = load_run(run).validate()
    (tmp_path/'data').rename(tmp_path/'moved')
    with pytest.warns(UserWarning, match='without data.*data: expected train-images'): learn = load_run(run)
    x = torch.rand(5, 64)
    again = load_run(run, data_dir='../moved')
    assert again.validate() == best and torch.equal(again.model(x), learn.model(x)) and learn.predict(x).shape == (5, 10)
    with pytest.raises(ValueError, match='expected data'): learn.validate()
    with pytest.raises(OSError, match='nowhere'): load_run(run, data_dir='nowhere')
    with pytest.raises(OSError, match='data'): exp_train(resume=run)

@pytest.mark.parametrize('size', [10**11, 10**18, 10**40])
def test_sizes_that_no_memory_has_are_one_line(size, small):
    with pytest.raises(SystemExit) as error: nb_14._exp_train_command(['--hidden', str(size)])
    assert str(error.value).startswith('exp_train: ') and len(str(error.value).splitlines()) == 1 and not Path('runs').exists()

@pytest.mark.parametrize('error', [RuntimeError, IndexError, TypeError, KeyError, MemoryError, NotImplementedError])
def test_errors_of_commands_are_one_line(error):
    def command(): raise error('first\nsecond')
    with pytest.raises(SystemExit, match=f'exp_runs: {error.__name__}: .*first') as said: nb_14._run_command('exp_runs', command)
    assert len(str(said.value).splitlines()) == 1

@pytest.mark.skipif(sys.platform != 'linux', reason='names of folders are bytes there')
def test_a_name_with_bytes_of_another_alphabet_is_drawn(good, capsys):
    first, second = good
    os.rename(os.fsencode(first), os.fsencode(first) + b'-\xff\xe9')
    exp_runs(plot='all.png')
    assert Path('all.png').read_bytes().startswith(b'\x89PNG')
    labels = [text.get_text() for text in plot_runs(*sorted(Path('runs').iterdir())).axes[1].get_legend().get_texts()]
    assert any(r'-\udcff\udce9' in label for label in labels)
