"Runs: what is left in the folder, interrupted at any time, listed and compared; options that are wrong."
import json, os, re, signal, subprocess, sys
from pathlib import Path
import pytest
import torch
from exp import nb_14
from exp.nb_01 import get_data
from exp.nb_14 import (MODELS, OPTIMIZERS, SCHEDULES, Settings, compare_runs, exp_runs, exp_train, list_runs, load_run, make_learner, plot_runs, read_metrics,
                       read_settings)
from exp.nb_32 import exp_draw

FILES = ['checkpoint', 'config.json', 'curves.png', 'log.txt', 'metrics.csv', 'mistakes.png', 'model.safetensors', 'results.json']

MAKERS = 'vae', 'flow'  # they make images

FEW = [t[:n] for t, n in zip(get_data(), (640, 640, 500, 500))]

@pytest.fixture
def small(monkeypatch, tmp_path):
    "In an empty folder; 640 rows to train on, and 500 to validate and test on, so that a run takes a moment."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nb_14, 'get_data', lambda *a: FEW)
    monkeypatch.setattr(nb_14, 'get_test_data', lambda *a: FEW[2:])


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_default_reaches_97_percent(seed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = exp_train(seed=seed, test=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'seconds'] and len(lines) == 13
    assert float(re.match(r'test accuracy: ([0-9.]+)% of 10,000 images', lines[-2])[1]) >= 97
    assert lines[-1] == f'run: {folder}' and re.fullmatch(r'runs/\d{8}-\d{6}-mnist-mlp-adamw', str(folder))
    assert sorted(p.name for p in folder.iterdir()) == FILES and (folder/'log.txt').read_text().splitlines() == lines
    assert [p.name for p in (folder/'checkpoint').iterdir() if p.name.startswith('epoch0010')] and len([*(folder/'checkpoint').iterdir()]) == 2


@pytest.mark.parametrize('option, words', [
    (dict(epochs=0), '--epochs of at least 1, got 0'), (dict(bs=0), '--bs of at least 1 and at most 50000, got 0'), (dict(bs=50_001), 'at most 50000, got 50001'),
    (dict(lr=0.), '--lr above 0, got 0.0'), (dict(lr=float('nan')), 'got nan'), (dict(hidden=-1), 'got -1'), (dict(seed=-1), 'got -1'),
    (dict(dataset='mnits'), r"--dataset in \['mnist', 'fashion_mnist', 'kmnist'\], got 'mnits'"), (dict(data_dir='nowhere'), 'nowhere'),
    (dict(model='mpl'), r"--model in \['linear', 'mlp', 'deep', 'cnn', 'resnet', 'vae', 'flow'\], got 'mpl'"), (dict(opt='adamm'), "'muon'.*got 'adamm'"),
    (dict(sched='saw'), "'wsd'.*got 'saw'"), (dict(device='tpu9'), "got 'tpu9'"), (dict(name='a/b'), "without a folder, got 'a/b'"),
    (dict(resume='none'), "expected a run, got 'none'")])
def test_wrong_options_are_named_before_anything_is_made(option, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    with pytest.raises((ValueError, OSError), match=words): exp_train(**option)
    with pytest.raises(SystemExit, match=words): nb_14._exp_train_command([f'--{k.replace("_", "-")}={v}' for k, v in option.items()])
    assert torch.get_num_threads() == threads and not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_settings(small):
    folder = exp_train(epochs=1)
    with pytest.raises(ValueError, match=r"no settings with --resume.*got \['lr'\]"): exp_train(resume=folder, lr=0.1)
    with pytest.raises(SystemExit, match='no settings with --resume'): nb_14._exp_train_command(['--resume', str(folder), '--epochs', '9'])


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'))])
def test_a_device_by_name(device, small):
    folder = exp_train(epochs=1, device=device)
    assert next(load_run(folder).model.parameters()).device.type == device


@pytest.mark.parametrize('model, opt', [(model, 'adamw') for model in MODELS if model not in MAKERS] + [('mlp', opt) for opt in OPTIMIZERS])
def test_every_model_learns_with_every_optimizer_at_its_rate(model, opt, small):
    folder = exp_train(model=model, opt=opt, epochs=3, bs=16 if model in ('cnn', 'resnet') else 64)
    assert max(row['accuracy'] for row in read_metrics(folder)) > 0.6

@pytest.mark.parametrize('sched', SCHEDULES)
def test_every_schedule_is_the_one_that_is_recorded(sched, small):
    learn = None
    class Seen(nb_14.Scheduler):
        def cleanup_fit(self, seen):
            nonlocal learn
            learn = seen
            super().cleanup_fit(seen)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(nb_14, 'Scheduler', Seen)
        exp_train(sched=sched, epochs=2, opt='sgd', lr=0.5)
    expected = SCHEDULES[sched](0.5)
    assert learn.recorder.lrs == [expected(i/20) for i in range(20)]


def test_a_run_killed_or_interrupted_ends_with_the_same_files(small, capsys):
    "At the first batch, within an epoch, at an epoch's end; and resumed once it is over."
    whole = exp_train(epochs=3)
    def contents(folder):
        rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in read_metrics(folder)]
        return rows, (folder/'model.safetensors').read_bytes(), (folder/'mistakes.png').read_bytes()
    for event, epoch, i, how in (('before_batch', 0, 0, 'kill'), ('after_loss', 1, 5, 'Ctrl-C'), ('after_step', 1, 9, 'kill'), ('after_epoch', 2, 3, 'kill')):
        class Stop(nb_14.Callback):
            order = 1000
        def stop(self, learn):
            if (learn.epoch, learn.iter) != (epoch, i) or event != 'after_epoch' and not learn.training: return
            if how == 'kill': raise RuntimeError('killed')
            signal.raise_signal(signal.SIGINT)
        setattr(Stop, event, stop)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(nb_14.Learner, 'default_cbs', nb_14.Learner.default_cbs + (Stop,))
            with pytest.raises(KeyboardInterrupt if how == 'Ctrl-C' else RuntimeError): exp_train(epochs=3, name=event)
        folder, = Path('runs').glob(f'*-{event}')
        said = capsys.readouterr().out
        if how == 'Ctrl-C':
            assert said.splitlines()[-1] == f'interrupted; to go on: exp_train --resume {folder}' and said.splitlines()[-1] in (folder/'log.txt').read_text()
        for run in (folder, folder.name):
            exp_train(resume=str(run))
            assert contents(folder) == contents(whole)


def test_ctrl_c_in_the_shell(tmp_path):
    "One line that says how to go on, no traceback; and the command it names does."
    command = [str(Path(sys.executable).with_name('exp_train')), '--epochs', '60', '--model', 'linear']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ''
    resume = out.splitlines()[-1].removeprefix('interrupted; to go on: ').split()
    assert resume[:2] == ['exp_train', '--resume'] and [*(tmp_path/resume[2]/'checkpoint').glob('epoch*')]


def test_the_weights_are_those_of_the_most_accurate_epoch(small):
    folder = exp_train(epochs=8, sched='constant', seed=2)
    rows = read_metrics(folder)
    best = max(rows, key=lambda row: row['accuracy'])
    assert load_run(folder.name).validate()['accuracy'] == best['accuracy'] and best != min(rows, key=lambda row: row['valid_loss'])


def test_the_seed_is_that_of_weights_and_order(small):
    a, b, c = (make_learner(Settings(seed=seed)) for seed in (1, 1, 2))
    first = [(next(iter(l.model.parameters())), next(iter(l.dls[0]))[1]) for l in (a, b, c)]
    for x, y, z in zip(*first): assert torch.equal(x, y) and not torch.equal(x, z)


def test_two_runs_in_the_same_second(small, monkeypatch):
    monkeypatch.setattr(nb_14.time, 'strftime', lambda form: '20300101-000000')
    assert [exp_train(epochs=1, name='a').name for _ in range(3)] == ['20300101-000000-a', '20300101-000000-a-2', '20300101-000000-a-3']


def test_a_table_a_comparison_and_a_picture(small, capsys):
    exp_runs()
    assert capsys.readouterr().out == 'no runs in runs\n'
    a, b = exp_train(epochs=2, seed=1), exp_train(epochs=3, opt='sgd', hidden=20)
    (a/'results.json').unlink()
    capsys.readouterr()
    exp_runs()
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ['run', 'model', 'opt', 'sched', 'lr', 'epochs', 'valid', 'seconds'] and [l.split()[0] for l in lines] == [a.name, b.name]
    assert lines[0].split()[5] == '2/2' and len(lines[0].split()) == 7 and lines[1].split()[5] == '3/3'
    names = {row['']: (row[a.name], row[b.name]) for row in compare_runs(a, b.name)}
    assert names['opt'] == ('adamw', 'sgd') and names['lr'] == (0.005, 1.) and names['hidden'] == (100, 20) and 'bs' not in names
    assert [len(line.get_xdata()) for line in plot_runs(a, b).axes[0].lines] == [2, 3]
    nb_14._exp_runs_command([a.name, str(b), '--plot', 'runs.png'])
    assert Path('runs.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(SystemExit, match="exp_runs: expected a run, got 'c'; there are"): nb_14._exp_runs_command(['c'])
    capsys.readouterr()
    exp_runs(a, out='elsewhere')  # by its path, a run is found wherever it is
    assert capsys.readouterr().out.splitlines()[1].startswith(a.name)
    with pytest.raises(ValueError, match='at least one run'): plot_runs()


def test_a_run_that_has_only_begun_is_listed(small):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(nb_14, '_train', lambda *a: None)
        folder = exp_train(epochs=5)
    row, = list_runs()
    assert row['run'] == folder.name and row['epochs'] == '0/5' and row['valid'] is None and read_settings(folder) == Settings(epochs=5)


def test_a_model_of_ones_own(small, monkeypatch):
    monkeypatch.setitem(MODELS, 'mine', lambda n_in, nh, n_out: torch.nn.Linear(n_in, n_out, bias=False))
    assert [*make_learner(Settings(model='mine')).model.state_dict()] == ['weight']


def test_a_folder_that_cannot_be_made(small):
    Path('file').write_text('in the way')
    with pytest.raises(SystemExit, match='exp_train: .*file'): nb_14._exp_train_command(['--out', 'file', '--epochs', '1'])


def test_tensorboard(small, monkeypatch):
    if not nb_14.find_spec('tensorboard'):
        with pytest.raises(ValueError, match='pip install tensorboard'): Settings(tensorboard=True)
        pytest.skip('tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = exp_train(epochs=2, tensorboard=True)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.value for e in events.Scalars('epoch/accuracy')] == pytest.approx([row['accuracy'] for row in read_metrics(folder)])
    assert [e.step for e in events.Scalars('batch/loss')] == [*range(20)]


def test_the_log_is_what_was_said(small, capsys):
    torch.set_num_threads(2)
    folder = exp_train(epochs=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert (folder/'log.txt').read_text() == capsys.readouterr().out and json.loads((folder/'config.json').read_text())['settings']['epochs'] == 2
    assert os.listdir('runs') == [folder.name]


@pytest.mark.parametrize('model', MAKERS)
def test_a_model_that_makes_images_leaves_pictures_and_resumes_bit_for_bit(model, small):
    def kept(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.png', '.safetensors')}
    class Stop(nb_14.Callback):
        def after_epoch(self, learn):
            if learn.epoch == 0: raise KeyboardInterrupt
    whole = exp_train(model=model, epochs=2)
    assert [*sorted(kept(whole))] == ['curves.png', 'model.safetensors', 'samples-000.png', 'samples-001.png']
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(nb_14.Learner, 'default_cbs', (*nb_14.Learner.default_cbs, Stop))
        exp_train(model=model, epochs=2, name='stopped')
    again = exp_train(resume=list_runs()[-1]['run'])
    assert again.name.endswith('stopped') and kept(whole) == kept(again)
    assert len({kept(whole)[name] for name in ('samples-000.png', 'samples-001.png')}) == 2


def test_runs_that_make_images_among_others(small, capsys):
    made, read = exp_train(model='vae', epochs=1, test=True, name='made'), exp_train(model='linear', epochs=1, name='read')
    results, rows = json.loads((made/'results.json').read_text()), read_metrics(made)
    assert {*results} == {'seconds', 'loss', 'test_loss'} and results['loss'] == rows[0]['valid_loss'] and 'accuracy' not in rows[0]
    assert re.search(r'test loss: [0-9.]+ of 500 images', capsys.readouterr().out)
    assert [(row['valid'] is None, row['loss'] is None) for row in list_runs()] == [(True, False), (False, False)]
    exp_runs()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == 'loss' and len(lines) == 3
    exp_runs(read.name)
    assert 'loss' not in capsys.readouterr().out
    assert [len(line.get_xdata()) for ax in plot_runs(made, read).axes for line in ax.lines] == [1, 1, 0, 1]
    assert {'valid', 'loss'} <= {row[''] for row in compare_runs(made, read)}
    images = load_run(made).model.sample(3, torch.Generator().manual_seed(1))
    assert images.shape == (3, 1, 28, 28) and 0 <= images.min() and images.max() <= 1
    with pytest.raises(ValueError, match='expected a model that reads images, got one that makes them'): nb_14.final_accuracy(made)
    with pytest.raises(ValueError, match='expected a model that reads digits, got one that makes them'): exp_draw(str(made), serve=False)


@pytest.mark.parametrize('model', MAKERS)
def test_images_of_another_size_are_refused_before_there_is_a_folder(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    x, y = torch.rand(64, 32*32), torch.arange(64) % 10
    monkeypatch.setattr(nb_14, 'get_data', lambda *a: (x, y, x, y))
    with pytest.raises(ValueError, match='expected images of 28 x 28 for this model, got 1024 pixels'): exp_train(model=model)
    assert not list(tmp_path.iterdir())
