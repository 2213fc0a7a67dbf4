"A fit that is stopped anywhere goes on bit for bit; a file is whole or refused; signals and errors leave everything usable."
import errno, json, os, pickle, random, signal, subprocess, sys, threading
from contextlib import suppress
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from exp.nb_00 import set_seed
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import EVENTS, Callback, Learner
from exp.nb_15 import Device, GradientAccumulation
from exp.nb_11 import Scheduler, get_rng_state, sched_cos, sched_one_cycle
from exp.nb_12 import EMA, SGD, AdamW, Muon
from exp.nb_13 import (Checkpoint, CheckpointError, EarlyStopping, SaveBest, _checkpoints, _seal, atomic_write, last_checkpoint, load_checkpoint,
                       load_weights, read_checkpoint, save_checkpoint, save_weights)
from exp.nb_30 import MixedPrecision, Record

ROOT = Path(__file__).parent.parent
EPOCHS, BATCHES = 2, 5


class Noisy(Dataset):
    "Rows with noise from every generator there is."
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1*torch.randn_like(x) + 0.1*float(np.random.rand()) + 0.1*random.random(), y

def data(n=40, cls=Dataset):
    g = torch.Generator().manual_seed(0)
    return cls(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))

def our_loader(): return DataLoader(data(cls=Noisy), 8, shuffle=True)
def torch_loader(): return TorchLoader(TensorDataset(*data()[:]), 8, shuffle=True)

class Draws(Callback):
    "Takes random numbers at every event but the cleanups, which come after a save."
for event in EVENTS:
    if not event.startswith('cleanup'): setattr(Draws, event, lambda self, learn: torch.rand(1))

class Half:
    "A metric as torchmetrics has them, with a list in it."
    def reset(self): self.seen = []
    def to(self, device): return self
    def update(self, pred, target): self.seen.append((pred.argmax(-1) == target).float().mean())
    def compute(self): return sum(self.seen)/2

class LessDecay(Callback):
    "Halves an option of the optimizer after each epoch."
    def after_epoch(self, learn):
        for group in learn.opt.param_groups: group['weight_decay'] /= 2

def new_learner(seed, loader=our_loader, opt_func=AdamW, cbs=(), **kwargs):
    set_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 3))
    return Learner(model, (loader(), DataLoader(data(10), 5)), opt_func=opt_func, lr=0.01, metrics=[accuracy, Half()], progress=False, **kwargs)

def same(a, b):
    "Whether two nests are the same to the last bit."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def outcome(learn):
    "All that has to be the same."
    record = learn.recorder.to_dict()
    record['epochs'] = [{k: v for k, v in row.items() if k != 'seconds'} for row in record['epochs']]
    return dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), random=get_rng_state(learn.dls), results=learn.results, record=record)

class Crash(RuntimeError): pass

class CrashAt(Callback):
    "Raises after so many training batches, before or after the checkpoint is written."
    def __init__(self, batches, order): self.left, self.order = batches, order
    def after_batch(self, learn):
        self.left -= learn.training
        if learn.training and self.left == 0: raise Crash


def cycle(): return Scheduler(lr=sched_one_cycle(0.001, 0.02, 0))

SETTINGS = {
    'AdamW, EMA': (dict(opt_func=AdamW), lambda: [cycle(), EMA(0.9)]),
    "torch's loader and AdamW": (dict(opt_func=torch.optim.AdamW, loader=torch_loader), lambda: [cycle()]),
    'momentum, scheduled': (dict(opt_func=partial(SGD, momentum=0.9)), lambda: [Scheduler(momentum=sched_cos(0.5, 0.9), lr=sched_cos(0.1, 0))]),
    'Muon, mixed precision': (dict(opt_func=Muon), lambda: [cycle(), MixedPrecision()]),
    'an option that a callback changes': (dict(opt_func=AdamW), lambda: [LessDecay()]),
    'accumulation': (dict(opt_func=torch.optim.SGD), lambda: [GradientAccumulation(2)]),
    'random numbers at every event': (dict(opt_func=torch.optim.Adam), lambda: [Draws(), EMA(0.5)]),
    'device': (dict(opt_func=torch.optim.Adam), lambda: [cycle(), Device('cpu')]),
    'recorded': (dict(opt_func=AdamW), lambda: [cycle(), Record(), EMA(0.9)]),
    'recorded, accumulation': (dict(opt_func=Muon), lambda: [GradientAccumulation(2), MixedPrecision(), Record()])}

@pytest.mark.parametrize('options, make_cbs', SETTINGS.values(), ids=SETTINGS)
def test_resumed_after_any_batch(options, make_cbs, tmp_path):
    "And once more two batches later: another seed, a new Learner; weights, optimizer, losses, results and random states to the last bit."
    class Count(Callback):
        n = 0
        def after_batch(self, learn): self.n += learn.training
    whole = new_learner(42, **options)
    whole.fit(EPOCHS, cbs=[*make_cbs(), count := Count()])
    for batches in range(1, count.n + 1):
        for order in (99, 101):
            folder, crash = tmp_path/f'{batches}-{order}', CrashAt(batches, order)
            with pytest.raises(Crash): new_learner(42, **options).fit(EPOCHS, cbs=[*make_cbs(), crash, Checkpoint(folder, every=1)])
            again = new_learner(1 if _checkpoints(folder) else 42, **options)
            with suppress(Crash): again.fit(EPOCHS, cbs=[*make_cbs(), CrashAt(2, 101), Checkpoint(folder, every=1, resume=True)])
            learn = new_learner(2, **options)
            learn.fit(EPOCHS, cbs=[*make_cbs(), Checkpoint(folder, every=1, resume=True)])
            assert same(outcome(learn), outcome(whole)), (batches, order)
            assert learn.opt.param_groups[0]['lr'] == 0.01


SCRIPT = '''
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_checkpoints import *
seed, load, save = int(sys.argv[2]), *sys.argv[3:]
learn = new_learner(seed)
if load != '-': load_checkpoint(learn, load)
learn.fit(1)
save_checkpoint(learn, save)
'''

def test_one_epoch_and_another_in_a_new_process(tmp_path):
    for args in ((42, '-', tmp_path/'half.pt'), (1, tmp_path/'half.pt', tmp_path/'whole.pt')):
        subprocess.run([sys.executable, '-c', SCRIPT, str(ROOT/'tests'), *map(str, args)], check=True, cwd=tmp_path)
    learn = new_learner(42)
    first = []
    for _ in range(2):
        learn.fit(1)
        first.append(learn.recorder.losses)
    saved = read_checkpoint(tmp_path/'whole.pt')
    assert same(saved['model'], learn.model.state_dict()) and same(saved['opt']['state'], learn.opt.state_dict())
    assert same(saved['random'], get_rng_state(learn.dls)) and saved['results'] == learn.results
    for path, losses in zip((tmp_path/'half.pt', tmp_path/'whole.pt'), first):
        fresh = new_learner(1)
        load_checkpoint(fresh, path)
        assert torch.equal(fresh.recorder.losses, losses)


# Killed

NURSERY = '''
import json, os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_checkpoints import *
new_learner(0).fit(1)  # so that all is loaded which loads at the first step
folder, when, kills, unfinished, finished, lives = Path('run'), random.Random(0), 0, 0, 0, 0

def train(seed):
    learn = new_learner(seed)
    learn.fit(8, cbs=[cycle(), EMA(0.9), Checkpoint(folder, every=2, resume=True)])
    save_checkpoint(learn, f'end{finished}.pt')

while kills < 50 or not finished or folder.exists():
    lives += 1
    pid = os.fork()
    if pid == 0:
        train(lives if [*folder.glob('epoch*')] else 42)
        os._exit(0)
    if kills < 50:
        time.sleep(when.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        kills += 1
        unfinished += len([*folder.glob('.*.part')])
    else:
        assert os.WEXITSTATUS(status) == 0
        finished += 1
        shutil.rmtree(folder)
print(json.dumps(dict(kills=kills, finished=finished, unfinished=unfinished)))
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_fifty_random_moments(tmp_path):
    "SIGKILL, again and again; every run that ends has the weights of one that was never killed."
    out = subprocess.run([sys.executable, '-c', NURSERY, str(ROOT/'tests')], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    said, whole = json.loads(out.stdout), new_learner(42)
    assert said['kills'] == 50 and said['finished'] == len([*tmp_path.glob('end*.pt')])
    whole.fit(8, cbs=[cycle(), EMA(0.9)])
    for path in tmp_path.glob('end*.pt'):
        end = read_checkpoint(path)
        assert same(end['model'], whole.model.state_dict()) and same(end['opt']['state'], whole.opt.state_dict()), path
        assert end['results'] == whole.results


def fail_at(step, error, monkeypatch):
    "Make one of the steps of an atomic write fail."
    def fail(*args, **kwargs):
        if callable(error): error()
        raise error
    if step == 'open': monkeypatch.setattr(Path, 'open', fail)
    if step == 'content': monkeypatch.setattr(os, 'fsync', fail)
    if step == 'rename': monkeypatch.setattr(Path, 'replace', fail)

STEPS = ('open', 'content', 'rename')

@pytest.mark.parametrize('step', STEPS)
def test_an_error_at_any_step_of_a_save(step, tmp_path, monkeypatch):
    "The error says that nothing is lost, and nothing is; the Learner goes on."
    learn, path = new_learner(42), tmp_path/'a.pt'
    save_checkpoint(learn, path)
    before = path.read_bytes()
    learn.fit(1)
    with monkeypatch.context() as m:
        fail_at(step, OSError(errno.ENOSPC, 'No space left on device'), m)
        with pytest.raises(OSError, match='No space left on device; nothing was written, and an older file is as it was.*a.pt') as caught: save_checkpoint(learn, path)
        assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    save_checkpoint(learn, path)
    assert path.read_bytes() != before


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('step', STEPS)
def test_killed_at_any_step_of_a_save(step, tmp_path, monkeypatch):
    learn, path = new_learner(42), tmp_path/'a.pt'
    save_checkpoint(learn, path)
    before, pid = path.read_bytes(), os.fork()
    if pid == 0:
        fail_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        learn.results = {'new': 1.}
        save_checkpoint(learn, path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == before
    save_checkpoint(learn, path)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and resource limits')
def test_a_disk_that_runs_full(tmp_path):
    "The kernel's own error, in the middle of a write: a limit on the size of files."
    import resource
    learn, path = new_learner(42), tmp_path/'a.pt'
    save_checkpoint(learn, path)
    before, pid = path.read_bytes(), os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before)//2, len(before)//2))
        try: save_checkpoint(learn, path)
        except OSError as e: os._exit(7 if e.errno == errno.EFBIG and 'an older file is as it was' in str(e) else 1)
        os._exit(0)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 7
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(OSError, match='nothing was written.*file'): save_checkpoint(new_learner(42), tmp_path/'file'/'a.pt')
    learn = new_learner(42)
    with pytest.raises(OSError, match='nothing was written'): learn.fit(1, cbs=Checkpoint(tmp_path/'file'/'run'))
    learn.fit(1)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root writes everywhere')
def test_a_read_only_folder(tmp_path):
    path = tmp_path/'a.pt'
    save_checkpoint(new_learner(42), path)
    before = path.read_bytes()
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match='an older file is as it was'): save_checkpoint(new_learner(42), path)
    tmp_path.chmod(0o700)
    assert path.read_bytes() == before


# Damaged, foreign, malicious

@pytest.fixture(scope='module')
def good():
    from tempfile import TemporaryDirectory
    with TemporaryDirectory() as folder:
        save_checkpoint(new_learner(42), Path(folder)/'a.pt')
        return (Path(folder)/'a.pt').read_bytes()

@settings(deadline=None, max_examples=200)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_goes_unnoticed(good, tmp_path_factory, share, bit, cut):
    "Any length that is too short, and any bit that is wrong, in the content or the checksum itself."
    at, path = int(share*len(good)), tmp_path_factory.mktemp('damaged')/'a.pt'
    path.write_bytes(good[:at] if cut else good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1:])
    with pytest.raises(CheckpointError, match='a.pt: '): read_checkpoint(path)


class Evil:
    def __reduce__(self): return os.system, (f'touch {self.path}',)
    def __init__(self, path): self.path = path

@pytest.mark.parametrize('sealed', [False, True])
def test_a_malicious_file_does_not_run(sealed, tmp_path):
    path = tmp_path/'a.pt'
    torch.save({'format': 'exp checkpoint, 1', 'model': Evil(tmp_path/'ran')}, path)
    if sealed: path.write_bytes(_seal(path.read_bytes()))
    with pytest.raises(CheckpointError, match='not run' if sealed else 'checksum'): read_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil(tmp_path/'ran')))
    with pytest.raises(CheckpointError, match='begins with'): load_checkpoint(new_learner(42), path)
    assert not (tmp_path/'ran').exists()


def test_a_damaged_one_is_refused_by_name_and_an_older_offered(tmp_path):
    learn = new_learner(42)
    learn.fit(3, cbs=Checkpoint(tmp_path))
    newest, middle, oldest = _checkpoints(tmp_path)[::-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f'{newest.name}: .*; {middle.name} beside it is good'): load_checkpoint(learn, newest)
    middle.write_bytes(b'')
    with pytest.warns(UserWarning, match='trying an older one'): assert last_checkpoint(tmp_path) == oldest
    with pytest.warns(UserWarning): new_learner(1).fit(3, cbs=Checkpoint(tmp_path, resume=True))
    assert [p.name for p in _checkpoints(tmp_path)] == [p.name for p in (oldest, middle, newest)] and read_checkpoint(newest)
    oldest.write_bytes(b'')
    for path in (newest, middle): path.unlink()
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='found 1, all of them damaged'): last_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path/'none') is None


def test_what_does_not_fit_changes_nothing(tmp_path):
    learn = new_learner(42)
    learn.fit(1, cbs=Checkpoint(tmp_path, every=2, keep=9))
    save_checkpoint(learn, tmp_path/'between.pt')
    other = new_learner(1, opt_func=torch.optim.SGD)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match='state of SGD, found that of AdamW'): load_checkpoint(other, tmp_path/'between.pt')
    other.model[0] = nn.Linear(4, 9)
    with pytest.raises(CheckpointError, match=r'expected 0.weight \(9, 4\), found \(8, 4\)'): load_checkpoint(other, tmp_path/'between.pt')
    other.model[0] = nn.Linear(4, 8, bias=False)
    with pytest.raises(CheckpointError, match=r'expected 0.bias not at all, found \(8,\)'): load_checkpoint(other, tmp_path/'between.pt')
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items() if not k.startswith('0.'))
    with pytest.raises(ValueError, match='generators'):
        load_checkpoint(new_learner(1, loader=lambda: [data()[:8]]), tmp_path/'between.pt')
    with pytest.raises(FileNotFoundError): load_checkpoint(new_learner(1), tmp_path/'nothing.pt')


def test_a_checkpoint_from_before_any_fit(tmp_path):
    fresh, trained = new_learner(42), new_learner(1)
    save_checkpoint(fresh, tmp_path/'a.pt')
    trained.fit(1)
    load_checkpoint(trained, tmp_path/'a.pt')
    assert trained.opt is None and same(trained.model.state_dict(), fresh.model.state_dict())


def test_a_fit_of_another_kind_is_not_resumed(tmp_path):
    new_learner(42).fit(1, cbs=Checkpoint(tmp_path))
    with pytest.raises(FileExistsError, match='resume=True, found'): new_learner(42).fit(1, cbs=Checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=r'expected learning rates and batches an epoch \(\[0.5\], 5\)'):
        new_learner(42).fit(1, lr=0.5, cbs=Checkpoint(tmp_path, resume=True))
    with pytest.raises(CheckpointError, match=r'\[0.01\], 2\), as in this fit, found \(\[0.01\], 5\)'):
        new_learner(42, loader=lambda: DataLoader(data(), 20)).fit(1, cbs=Checkpoint(tmp_path, resume=True))
    new_learner(42).fit(2, cbs=[EMA(), Checkpoint(tmp_path, resume=True)])  # callbacks may come, and epochs
    with pytest.warns(UserWarning, match="has the state of .'EMA'."): new_learner(42).fit(2, cbs=Checkpoint(tmp_path, resume=True))


def test_checkpoints_of_torchs_optimizer_and_of_ours(tmp_path):
    theirs, ours = new_learner(42, opt_func=torch.optim.AdamW), new_learner(1)
    theirs.fit(1)
    save_checkpoint(theirs, tmp_path/'a.pt')
    load_checkpoint(ours, tmp_path/'a.pt')
    for learn in (theirs, ours):
        set_seed(0)
        learn.fit(1)
    torch.testing.assert_close(ours.recorder.losses, theirs.recorder.losses)


# Which ones stay

def test_the_last_and_the_best_stay(tmp_path):
    class Pretend(Callback):
        "Results as if the third epoch had been the best."
        order = 0
        def after_epoch(self, learn): learn.results['valid_loss'] = abs(learn.epoch - 2.)
    cbs = lambda: [Pretend(), Checkpoint(tmp_path, every=2, keep=2, resume=True)]
    learn = new_learner(42)
    with pytest.raises(Crash): learn.fit(8, cbs=[*cbs(), CrashAt(6*BATCHES + 1, 99)])
    assert [p.name for p in _checkpoints(tmp_path)] == ['epoch0003-batch000000.pt', 'epoch0005-batch000004.pt', 'epoch0006-batch000000.pt']
    new_learner(1).fit(8, cbs=cbs())
    assert [p.name for p in _checkpoints(tmp_path)] == ['epoch0003-batch000000.pt', 'epoch0007-batch000004.pt', 'epoch0008-batch000000.pt']


def test_every_counts_from_where_a_fit_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt): new_learner(42).fit(1, cbs=[Send('after_loss', signal.SIGINT), Checkpoint(tmp_path, keep=9)])
    new_learner(42).fit(1, cbs=Checkpoint(tmp_path, every=2, keep=9, resume=True))
    assert [p.name[10:] for p in _checkpoints(tmp_path)] == ['batch000002.pt', 'batch000004.pt', 'batch000000.pt']


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    class Poison(Callback):
        def before_batch(self, learn):
            if learn.training and learn.iter == 2: learn.batch = (learn.batch[0]*float('nan'), learn.batch[1])
    with pytest.raises(FloatingPointError): new_learner(42).fit(1, cbs=[Poison(), Checkpoint(tmp_path, every=1)])
    assert [p.name for p in _checkpoints(tmp_path)] == ['epoch0000-batch000001.pt', 'epoch0000-batch000002.pt']


# Signals

class Send(Callback):
    "Sends signals at an event of the second training batch, or of the first validation batch."
    def __init__(self, event, *numbers, training=True):
        def send(learn):
            if learn.training == training and learn.iter == int(training):
                for number in numbers: signal.raise_signal(number)
        setattr(self, event, send)

BATCH = ('before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_step', 'after_batch')

@pytest.mark.parametrize('event', BATCH)
def test_ctrl_c_at_any_event(event, tmp_path):
    whole = new_learner(42)
    whole.fit(EPOCHS)
    learn = new_learner(42)
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt): learn.fit(EPOCHS, cbs=[Send(event, signal.SIGINT), Checkpoint(tmp_path)])
    assert [p.name for p in _checkpoints(tmp_path)] == ['epoch0000-batch000002.pt']
    assert old == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) and learn.batch is None
    resumed = new_learner(1)
    resumed.fit(EPOCHS, cbs=Checkpoint(tmp_path, resume=True))
    assert same(outcome(resumed), outcome(whole))


def test_ctrl_c_twice_while_validating_and_in_another_thread(tmp_path):
    with pytest.raises(KeyboardInterrupt): new_learner(42).fit(1, cbs=[Send('after_predict', signal.SIGINT, signal.SIGINT), Checkpoint(tmp_path/'a')])
    assert not (tmp_path/'a').exists()
    with pytest.raises(KeyboardInterrupt): new_learner(42).fit(2, cbs=[Send('after_loss', signal.SIGINT, training=False), Checkpoint(tmp_path/'b')])
    assert [p.name for p in _checkpoints(tmp_path/'b')] == ['epoch0001-batch000000.pt']
    thread = threading.Thread(target=lambda: new_learner(42).fit(1, cbs=Checkpoint(tmp_path/'c')))
    thread.start(), thread.join()
    assert len(_checkpoints(tmp_path/'c')) == 1


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_terminated(tmp_path):
    "SIGTERM saves, and then does what it always did."
    pid = os.fork()
    if pid == 0: new_learner(42).fit(1, cbs=[Send('after_loss', signal.SIGTERM), Checkpoint(tmp_path)]), os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
    assert last_checkpoint(tmp_path).name == 'epoch0000-batch000002.pt'


@pytest.mark.parametrize('event', EVENTS)
def test_an_exception_at_any_event_puts_everything_back(event, tmp_path):
    class Fail(Callback):
        order = -100
    def fail(self, learn): raise Crash
    setattr(Fail, event, fail)
    learn, old = new_learner(42), signal.getsignal(signal.SIGINT)
    dls = learn.dls
    with pytest.raises(Crash): learn.fit(1, cbs=[Fail(), Checkpoint(tmp_path, every=1)])
    assert signal.getsignal(signal.SIGINT) is old and learn.dls is dls and learn.running == ()
    learn.fit(1, cbs=Checkpoint(tmp_path, every=1, resume=True))


# Enough

def test_an_early_stop_is_still_one_after_a_resume(tmp_path):
    def cbs(resume): return [EMA(0.5), SaveBest(tmp_path/'best.safetensors', 'accuracy'), EarlyStopping('accuracy', patience=2, min_delta=2.),
                             Checkpoint(tmp_path/'run', resume=resume)]
    learn, again = new_learner(42), new_learner(1)
    learn.fit(20, cbs=cbs(False))
    assert len(learn.recorder.epochs) == 3
    again.fit(20, cbs=cbs(True))
    assert len(again.recorder.epochs) == 3 and same(again.model.state_dict(), learn.model.state_dict())


def test_the_best_weights_come_back(tmp_path):
    "Those that earned the result, averaged ones if there is a mean."
    for cbs in ([], [EMA(0.5)]):
        learn = new_learner(42)
        learn.fit(6, lr=0.3, cbs=[*cbs, SaveBest(tmp_path/'a.safetensors')])
        assert learn.validate()['valid_loss'] == min(row['valid_loss'] for row in learn.recorder.epochs)


def test_a_result_that_is_not_there():
    with pytest.raises(ValueError, match=r"expected monitor in \['train_loss', 'valid_loss', 'accuracy', 'Half'\], got 'acuracy'"):
        new_learner(42).fit(1, cbs=EarlyStopping('acuracy'))
    with pytest.raises(ValueError, match='patience of at least 1, got 0'): EarlyStopping(patience=0)


def test_weights_of_tied_and_transposed_parameters(tmp_path):
    "Shared ones, views of a flat tensor and columns first: the same numbers in another model."
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.c = nn.Parameter(torch.randn(3, 5).T)
    first, second = Tied(), Tied()
    opt = SGD(first.parameters(), lr=0.1)
    first.c.grad = torch.ones_like(first.c)
    opt.step()
    save_weights(first, tmp_path/'a.safetensors')
    load_weights(second, tmp_path/'a.safetensors')
    assert same(first.state_dict(), second.state_dict()) and second.b.weight is second.a.weight


@settings(deadline=None, max_examples=50)
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_cut_short(tmp_path_factory, share):
    path = tmp_path_factory.mktemp('cut')/'a.safetensors'
    save_weights(nn.Linear(3, 2), path)
    data = path.read_bytes()
    path.write_bytes(data[:int(share*len(data))])
    with pytest.raises(CheckpointError, match='a.safetensors'): load_weights(nn.Linear(3, 2), path)


def test_atomic_write_makes_folders(tmp_path):
    with atomic_write(tmp_path/'a'/'b'/'c') as file: file.write(b'x')
    assert (tmp_path/'a'/'b'/'c').read_bytes() == b'x' and len([*(tmp_path/'a'/'b').iterdir()]) == 1
