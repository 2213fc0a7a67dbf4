"Several processes train as one would: equal weights, results, decisions and files; they stop together, and go on bit for bit."
import copy, faulthandler, json, os, shutil, signal, socket, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import ProcessRaisedException, start_processes
from exp.nb_00 import set_seed
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Callback, CancelBatch, CancelFit, Learner
from exp.nb_11 import Scheduler, sched_one_cycle
from exp.nb_12 import EMA, SGD, Adam, AdamW, Muon, RMSProp
from exp.nb_13 import Checkpoint, CheckpointError, EarlyStopping, SaveBest
from exp.nb_15 import GradientAccumulation, GradientClip
from exp.nb_30 import Compile, MixedPrecision, Record
import exp.nb_31
from exp.nb_31 import Distributed, Team, load_sharded, save_sharded, share

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork') or not dist.is_available(), reason='needs fork and torch.distributed')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _child(rank, func, n, port, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    found = func(rank)
    torch.save(found, Path(folder)/f'{rank}.pt')
    if dist.is_initialized(): dist.barrier()


def ranks(func, n, folder, seconds=200):
    "What `func(rank)` gives in each of `n` processes; raises what one of them raised, or `TimeoutError`."
    folder.mkdir(exist_ok=True)
    context, until = start_processes(_child, (func, n, free_port(), folder), n, join=False, start_method='fork'), time.time() + seconds
    try:
        while not context.join(timeout=1):
            if time.time() > until: raise TimeoutError(f'{n} ranks, after {seconds} s')
    finally:
        for process in context.processes:
            if process.is_alive(): process.kill()
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in range(n)]


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=g)
    return Dataset(x, (x[:, :3] + 0.3*torch.randn(n, 3, generator=g)).argmax(1))


def mlp(*layers): return nn.Sequential(nn.Linear(16, 24), *layers, nn.ReLU(), nn.Linear(24, 3))


def new_learner(opt_func=partial(SGD, momentum=0.9), bs=64, rows=640, valid=130, drop_last=True, model=mlp, seed=42, metrics=accuracy, **options):
    set_seed(seed)
    dls = DataLoader(data(rows), bs, shuffle=True, drop_last=drop_last, seed=1), DataLoader(data(valid, 1), bs)
    return Learner(model(), dls, opt_func=opt_func, lr=0.05, metrics=metrics, progress=False, **options)


def weights(learn): return torch.cat([t.detach().reshape(-1) for t in learn.model.state_dict().values()])


def trained(rank, cbs=lambda: [], epochs=2, both=True, **options):
    learn = new_learner(**options)
    learn.fit(epochs, cbs=[*cbs(), *([Distributed()] if both else [])])
    return dict(weights=weights(learn), results=learn.results, losses=learn.recorder.losses, epochs=len(learn.recorder.epochs))


OPTIMIZERS = {'SGD': partial(SGD, momentum=0.9), 'AdamW': AdamW, 'Muon': Muon, "torch's AdamW": torch.optim.AdamW}

@pytest.mark.parametrize('opt_func', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_as_one_process(opt_func, tmp_path):
    "Two and three ranks, batches that don't divide by three: weights, losses and results; and all ranks have the same bits."
    one = trained(0, opt_func=opt_func, both=False)
    for n in (2, 3):
        found = ranks(partial(trained, opt_func=opt_func), n, tmp_path/str(n))
        for other in found:
            assert torch.equal(other['weights'], found[0]['weights']) and torch.equal(other['losses'], found[0]['losses'])
            assert other['results'] == found[0]['results']
        near = dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0]['weights'], one['weights'], **near)
        torch.testing.assert_close(found[0]['losses'], one['losses'], **near)
        assert found[0]['results']['accuracy'] == pytest.approx(one['results']['accuracy'], abs=1e-7)
        assert found[0]['results']['valid_loss'] == pytest.approx(one['results']['valid_loss'], rel=1e-5)


@pytest.mark.parametrize('opt_func', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_bit_for_bit_as_accumulation(opt_func, tmp_path):
    "The same sums: two ranks, and one process that accumulates two batches of half the size."
    two, again = (ranks(partial(trained, opt_func=opt_func), 2, tmp_path/name)[0]['weights'] for name in 'ab')
    halves = new_learner(opt_func=opt_func)
    class Halves:
        "Each batch as its two halves."
        def __iter__(self): return (tuple(f[i:i + 32] for f in b) for b in self.dl for i in (0, 32))
        def __len__(self): return 2*len(self.dl)
    dl = Halves()
    dl.dl, halves.dls = halves.dls[0], (dl, None)
    halves.fit(2, cbs=GradientAccumulation(2))
    assert torch.equal(two, weights(halves)) and torch.equal(two, again)


def test_uneven_tails(tmp_path):
    "645 rows in batches of 64: the last has 5, for three ranks."
    one = trained(0, rows=645, valid=129, drop_last=False, both=False)
    for n in (2, 3):
        found = ranks(partial(trained, rows=645, valid=129, drop_last=False), n, tmp_path/str(n))
        torch.testing.assert_close(found[0]['weights'], one['weights'], rtol=1e-5, atol=1e-5)
        assert found[-1]['results'] == found[0]['results']
        assert found[0]['results']['accuracy'] == pytest.approx(one['results']['accuracy'], abs=1e-7)


# What decides, decides alike

class Stop(Callback):
    "Ends the fit at a batch whose loss is low; draws on what each rank sees."
    def after_loss(self, learn):
        if learn.training and learn.loss.item() < 0.9: raise CancelFit


class Validates(Callback):
    "Validates within the fit."
    order = 50
    def before_fit(self, learn): self.found = []
    def after_epoch(self, learn): self.found.append((learn.validate(), learn.results))


def decided(rank, folder, both=True):
    best, stop, validates = SaveBest(folder/'best.safetensors'), EarlyStopping(patience=1, min_delta=0.05), Validates()
    more = [Distributed()] if both else []
    first = new_learner()
    first.fit(9, cbs=[*more, best, stop, validates])
    second = new_learner()
    second.fit(3, cbs=[*more, Stop()])
    third = new_learner(cbs=more)
    suggested = third.lr_find(start=1e-4, steps=40, plot=False)
    state = random_state = third.model[0].weight.detach().clone()
    return dict(epochs=len(first.recorder.epochs), weights=weights(first), batches=len(second.recorder.losses), lrs=[*suggested],
                validated=validates.found, put_back=torch.equal(state, new_learner().model[0].weight), random=random_state)


def test_all_ranks_decide_alike(tmp_path):
    (one,), *found = [decided(0, tmp_path, both=False)], *ranks(partial(decided, folder=tmp_path), 3, tmp_path/'a')
    for other in found:
        for key in ('epochs', 'batches', 'lrs', 'put_back'): assert other[key] == one[key], key
        assert torch.equal(other['weights'], found[0]['weights']) and one['put_back']
        for validated, results in other['validated']: assert validated['valid_loss'] == pytest.approx(results['valid_loss'], rel=1e-6)
    assert 1 < one['epochs'] < 9 and 1 < one['batches'] < 30
    torch.testing.assert_close(found[0]['weights'], one['weights'], rtol=1e-5, atol=1e-5)


def ignoring(pred, target): return F.cross_entropy(pred, target.where(target > 0, -100))
ignoring.weight_of = lambda pred, target: (target > 0).sum()

COMBINATIONS = {
    'clipping': dict(cbs=lambda: [GradientClip(0.1)]),
    'schedule': dict(cbs=lambda: [Scheduler(lr=sched_one_cycle(0.01, 0.1, 0.001))]),
    'EMA': dict(cbs=lambda: [EMA(0.9)]),
    'accumulation': dict(cbs=lambda: [GradientAccumulation(3)], rows=645, drop_last=False),  # the last window has 64 and 5 rows
    'accumulation and clipping': dict(cbs=lambda: [GradientAccumulation(3), GradientClip(0.1)]),
    'Record': dict(cbs=lambda: [Record()]),
    'bfloat16': dict(cbs=lambda: [MixedPrecision()], near=0.02),
    'weighted': dict(loss_func=ignoring),
    'two metrics': dict(metrics=[accuracy, lambda pred, target: dict(low=pred.min(1).values.mean(), high=pred.max(1).values.mean())])}

@pytest.mark.parametrize('options', COMBINATIONS.values(), ids=COMBINATIONS)
def test_together(options, tmp_path):
    options = dict(options)
    near = options.pop('near', 2e-5)
    one, found = trained(0, both=False, **options), ranks(partial(trained, **options), 2, tmp_path/'a')
    assert torch.equal(found[0]['weights'], found[1]['weights']) and found[0]['results'] == found[1]['results']
    torch.testing.assert_close(found[0]['weights'], one['weights'], rtol=near, atol=near)
    if 'accumulation' not in str(options): torch.testing.assert_close(found[0]['losses'], one['losses'], rtol=near, atol=near)
    for name, value in one['results'].items(): assert found[0]['results'][name] == pytest.approx(value, rel=max(near, 1e-4))


COMPILED = """
from functools import partial
from pathlib import Path
import torch
from test_distributed import Compile, ranks, trained
found = ranks(partial(trained, cbs=lambda: [Compile()]), 2, Path('a'), seconds=150)
torch.testing.assert_close(found[0]['weights'], trained(0, both=False)['weights'], rtol=2e-5, atol=2e-5)
assert found[0]['weights'].equal(found[1]['weights'])
"""

def test_compiled(tmp_path):
    "In a process that has compiled nothing itself, since what compiles has threads, and can't be forked."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]), OMP_NUM_THREADS='1')
    subprocess.run([sys.executable, '-c', COMPILED], cwd=tmp_path, env=env, check=True, timeout=200)


def batch_norm(): return mlp(nn.BatchNorm1d(24), nn.Dropout(0.2))

def test_running_statistics_become_one(tmp_path):
    found = ranks(partial(trained, model=batch_norm), 3, tmp_path/'a')
    for other in found: assert torch.equal(other['weights'], found[0]['weights']) and other['results'] == found[0]['results']


class Unlike(nn.Module):
    "A layer that only rank 0 has used, and one that nobody has."
    def __init__(self):
        super().__init__()
        self.always, self.first, self.never = nn.Linear(16, 3), nn.Linear(16, 3), nn.Linear(16, 3)
    def forward(self, x): return self.always(x) + (self.first(x) if dist.get_rank() == 0 and self.training else 0)

def unlike(rank):
    learn = new_learner(AdamW, model=Unlike)
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(1, cbs=Distributed())
    return weights(learn), [k for k, v in learn.model.state_dict().items() if v.equal(before[k])]

def test_gradients_that_only_one_rank_has(tmp_path):
    (a, same), (b, _) = ranks(unlike, 2, tmp_path/'a')
    assert a.equal(b) and same == ['never.weight', 'never.bias']


def other_order(rank, both=True):
    learn = new_learner(seed=rank)
    learn.dls[0].sampler.generator.manual_seed(rank)
    learn.fit(1, cbs=[Distributed()] if both else [])
    return weights(learn), torch.rand(1).item()

def test_rank_0_gives_weights_and_order_and_each_has_its_own_chance(tmp_path):
    (a, x), (b, y) = ranks(other_order, 2, tmp_path/'a')
    assert a.equal(b) and x != y
    torch.testing.assert_close(a, other_order(0, both=False)[0], rtol=1e-5, atol=1e-5)


# Refused

def foreign(learn): learn.dls = [*learn.dls[0]], None
class Foreign:
    name = 'foreign'
    def reset(self): pass
    def update(self, pred, target): pass
    def compute(self): return 0.

class Sparse(nn.Module):
    "A table of which a batch uses some rows."
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)
    def forward(self, x): return self.table((x[:, 0] > 0).long())

def refused(rank, change, words, **options):
    learn = new_learner(**options)
    cbs = change(learn) or []
    with pytest.raises(ValueError, match=words): learn.fit(1, cbs=[*cbs, Distributed()])
    assert learn.team is None and learn.progress is False and not hasattr(learn.dls[0], 'whole')
    learn.team = None

REFUSED = {
    'foreign loader': (foreign, 'expected a DataLoader of exp.nb_04', {}),
    'too few rows': (lambda learn: None, 'at least 2 rows', dict(bs=1)),
    'short tail': (lambda learn: None, 'at least 2 rows', dict(rows=641, drop_last=False)),
    'too few to validate on': (lambda learn: None, 'validation batches of at least 2 rows', dict(valid=1)),
    'a sum': (lambda learn: setattr(learn, 'loss_func', nn.CrossEntropyLoss(reduction='sum')), 'got a sum', {}),
    'closure': (lambda learn: None, 'without a closure, got LBFGS', dict(opt_func=torch.optim.LBFGS)),
    'sparse': (lambda learn: None, 'expected dense gradients, got sparse ones', dict(model=Sparse)),
    'complex': (lambda learn: learn.model.register_parameter('z', nn.Parameter(torch.zeros(2, dtype=torch.cfloat))), 'real weights, got complex', {}),
    'lazy': (lambda learn: None, 'know their shapes', dict(model=lambda: nn.Sequential(nn.LazyLinear(3)))),
    'metric': (lambda learn: None, 'expected metrics that can be added up over processes, got Foreign', dict(metrics=[Foreign()])),
    'compiled step': (lambda learn: [Compile(step=True)], 'expected nothing between gradients and step, got Distributed', {}),
    'other epochs': (lambda learn: setattr(learn, 'dls', (DataLoader(data(640 - 64*dist_rank()), 64, shuffle=True), None)), 'the same rows', {})}

def dist_rank(): return int(os.environ['RANK'])

@pytest.mark.parametrize('change, words, options', REFUSED.values(), ids=REFUSED)
def test_refused(change, words, options, tmp_path): ranks(partial(refused, change=change, words=words, **options), 2, tmp_path/'a')


class Within(Callback):
    "Tries a fit within the fit."
    def after_epoch(self, learn):
        with pytest.raises(ValueError, match='no fit within a fit'): learn.fit(1, cbs=[cb for cb in learn.running if isinstance(cb, Distributed)])

def test_no_fit_within_a_fit(tmp_path):
    "It is refused, and the one around it goes on with its parts."
    plain, found = (ranks(partial(trained, cbs=cbs), 2, tmp_path/name) for name, cbs in (('a', lambda: []), ('b', lambda: [Within()])))
    assert found[0]['weights'].equal(plain[0]['weights']) and found[0]['results'] == plain[0]['results']


def test_alone():
    with pytest.raises(ValueError, match='expected to be started by torchrun, found no RANK'): Distributed()
    with pytest.raises(ValueError, match="expected 'ddp' or 'fsdp', got 'dp'"): Distributed('dp')
    with pytest.raises(ValueError, match='above 0 seconds'): Team(0)


def in_use(rank):
    with pytest.raises(ConnectionError, match='rank 0: expected 2 processes to meet at 127.0.0.1:'): Team()

def test_a_port_in_use(monkeypatch):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=s.getsockname()[1]).items(): monkeypatch.setenv(name, str(value))
        in_use(0)


def team_of_one(rank):
    team = Team()
    return team.once(lambda: 5), team.sum(torch.ones(2)), team.gather('a'), trained(rank)['weights']

def test_a_team_of_one(tmp_path):
    (five, ones, gathered, found), = ranks(team_of_one, 1, tmp_path/'a')
    assert five == 5 and ones.tolist() == [1., 1.] and gathered == ['a'] and found.equal(trained(0, both=False)['weights'])


def raising(rank):
    team = Team()
    with pytest.raises(ZeroDivisionError if rank == 0 else RuntimeError, match='division by zero'): team.once(lambda: 1/0)

def test_an_error_of_rank_0_is_one_of_all(tmp_path): ranks(raising, 2, tmp_path/'a')


class Broken(Callback):
    def after_batch(self, learn):
        if learn.training and learn.iter == 3 and learn.team.rank == 1: raise ArithmeticError('of rank 1')

def test_an_error_of_one_rank_ends_all(tmp_path):
    with pytest.raises(ProcessRaisedException, match='of rank 1'): ranks(partial(trained, cbs=lambda: [Broken()]), 2, tmp_path/'a')


class Skips(Callback):
    "Skips a batch on rank 1 only."
    def after_loss(self, learn):
        if learn.training and learn.iter == 3 and learn.team.rank == 1: raise CancelBatch

def skipping(rank):
    faulthandler.disable()  # PyTorch aborts where two sums don't match
    new_learner().fit(1, cbs=[Distributed(timeout=3), Skips()])

def test_a_batch_skipped_by_one_rank_ends_all(tmp_path):
    with pytest.raises(Exception) as e: ranks(skipping, 2, tmp_path/'a')
    assert not isinstance(e.value, TimeoutError)


# Shares

@pytest.mark.parametrize('n', range(20))
@pytest.mark.parametrize('size', (1, 2, 3, 7))
def test_shares_are_all_rows_once(n, size):
    for idxs in (range(n), list(range(n)), torch.arange(n)):
        parts = [share(idxs, rank, size) for rank in range(size)]
        assert [int(i) for part in parts for i in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Checkpoints

class KillAt(Callback):
    "Sends a signal to one rank at a batch."
    order = -20
    def __init__(self, rank, epoch, batch, number): self.at, self.number = (rank, epoch, batch), number
    def before_batch(self, learn):
        if learn.training and (dist_rank(), learn.epoch, learn.iter) == self.at: os.kill(os.getpid(), self.number)


class Own(Callback):
    "A state that each rank has for itself."
    saved = ('seen',)
    def before_fit(self, learn): self.seen = 0.
    def after_predict(self, learn): self.seen += learn.pred.sum().item() + torch.rand(1).item()


def kept(rank, folder, epochs=3, cbs=lambda: [], resume=False, every=4):
    learn, own = new_learner(model=batch_norm), Own()
    signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(SystemExit('SIGTERM')))
    interrupted = None
    try: learn.fit(epochs, cbs=[Distributed(), Checkpoint(folder, every=every, keep=2, resume=resume), SaveBest(f'{folder}.safetensors'), own, *cbs()])
    except (KeyboardInterrupt, SystemExit) as e: interrupted = type(e).__name__
    return dict(weights=weights(learn), losses=learn.recorder.losses, results=learn.results, own=own.seen, interrupted=interrupted,
                rows=[{k: v for k, v in row.items() if k != 'seconds'} for row in learn.recorder.epochs], files=sorted(p.name for p in Path(folder).glob('*.pt')))


def same(found, plain):
    for a, b in zip(found, plain, strict=True):
        assert a['weights'].equal(b['weights']) and a['losses'].equal(b['losses']) and a['own'] == b['own']
        assert a['results'] == b['results'] and a['rows'] == b['rows']


@pytest.mark.parametrize('number', (signal.SIGINT, signal.SIGTERM), ids=lambda s: s.name)
@pytest.mark.parametrize('at', ((1, 1, 5), (0, 1, 5), (1, 1, 9)), ids=str)
def test_a_signal_to_one_rank_saves_once_and_ends_all(number, at, tmp_path):
    "All ranks stop at the same batch; the resumed run is bit for bit as one that was left alone, with dropout and BatchNorm."
    plain = ranks(partial(kept, folder=tmp_path/'plain'), 2, tmp_path/'a')
    stopped = ranks(partial(kept, folder=tmp_path/'run', every=None, cbs=lambda: [KillAt(*at, number)]), 2, tmp_path/'b')
    assert [s['interrupted'] for s in stopped] == [{signal.SIGINT: 'KeyboardInterrupt', signal.SIGTERM: 'SystemExit'}[number]]*2
    assert stopped[0]['files'][-1] == f'epoch0001-batch{at[2] + 1:06}.pt' and stopped[0]['weights'].equal(plain[0]['weights']) is False
    resumed = ranks(partial(kept, folder=tmp_path/'run', resume=True, every=None), 2, tmp_path/'c')
    same(resumed, plain)


def killed(rank, **options):
    kept(rank, **options)

def test_sigkill_to_one_rank_ends_all_and_nothing_is_lost(tmp_path):
    plain = ranks(partial(kept, folder=tmp_path/'plain'), 2, tmp_path/'a')
    with pytest.raises(Exception) as e: ranks(partial(killed, folder=tmp_path/'run', cbs=lambda: [KillAt(1, 1, 6, signal.SIGKILL)]), 2, tmp_path/'b')
    assert not isinstance(e.value, TimeoutError) and (tmp_path/'run/epoch0001-batch000004.pt').exists()
    same(ranks(partial(kept, folder=tmp_path/'run', resume=True), 2, tmp_path/'c'), plain)


def more_ranks(rank, folder, words=None, epochs=3, both=True):
    learn = new_learner(model=mlp)
    run = lambda: learn.fit(epochs, cbs=[*([Distributed()] if both else []), Checkpoint(folder, every=4, resume=True)])
    if words is None: run()
    else:
        with pytest.raises(CheckpointError, match=words): run()
    return weights(learn)

def test_other_numbers_of_ranks(tmp_path):
    "From the end of an epoch, with any number; within one, with the same."
    folder, plain = tmp_path/'run', ranks(partial(trained, epochs=3), 2, tmp_path/'a')[0]['weights']
    ranks(partial(more_ranks, folder=folder, epochs=2), 2, tmp_path/'b')
    within = folder/'epoch0001-batch000008.pt'
    for n in (1, 3):
        copied = tmp_path/f'run{n}'
        copied.mkdir()
        (copied/'epoch0002-batch000000.pt').write_bytes((folder/'epoch0002-batch000000.pt').read_bytes())
        (tmp_path/f'within{n}').mkdir()
        (tmp_path/f'within{n}'/within.name).write_bytes(within.read_bytes())
        found = ranks(partial(more_ranks, folder=copied), n, tmp_path/f'c{n}')
        torch.testing.assert_close(found[0], plain, rtol=1e-5, atol=1e-5)
        ranks(partial(more_ranks, folder=tmp_path/f'within{n}', words=f'expected {n} processes, as now, found a part of an epoch of 2'), n, tmp_path/f'd{n}')
    more_ranks(0, folder=tmp_path/'within1', words='expected 1 processes', both=False)


class Draws(Callback):
    "Notes the first random numbers of an epoch, after a checkpoint has put the states back."
    order = 200
    def before_epoch(self, learn): self.drawn = torch.rand(4).tolist()

def drawing(rank, folder, epochs, both=True):
    learn, draws = new_learner(), Draws()
    learn.fit(epochs, cbs=[*([Distributed()] if both else []), Checkpoint(folder, resume=True), draws])
    return dict(drawn=draws.drawn, weights=weights(learn))

@pytest.mark.parametrize('wrote, now', ((1, 2), (2, 3), (3, 2), ('one process', 2)))
def test_more_ranks_than_wrote_a_checkpoint_draw_other_numbers(wrote, now, tmp_path):
    "Those that were there go on with their own numbers, each further one has others; the order of the rows is the same for all."
    run, plain = tmp_path/'run', tmp_path/'plain'
    if wrote == 'one process': drawing(0, run, 1, both=False)
    else: ranks(partial(drawing, folder=run, epochs=1), wrote, tmp_path/'a')
    shutil.copytree(run, plain)
    found = ranks(partial(drawing, folder=run, epochs=2), now, tmp_path/'b')
    assert len({tuple(f['drawn']) for f in found}) == now
    for other in found[1:]: assert other['weights'].equal(found[0]['weights'])
    if wrote == 'one process': before = [drawing(0, plain, 2, both=False)]
    else: before = ranks(partial(drawing, folder=plain, epochs=2), wrote, tmp_path/'c')
    for a, b in zip(found, before): assert a['drawn'] == b['drawn']
    torch.testing.assert_close(found[0]['weights'], before[0]['weights'], rtol=1e-5, atol=1e-5)


# Parts of the weights

def test_one_name_asks_whether_a_tensor_is_sharded():
    source = (ROOT/'exp/nb_31.py').read_text()
    assert source.count("'full_tensor'") == 1


OLDEST = '.'.join(map(str, exp.nb_31._OLDEST))
needs_fsdp = pytest.mark.skipif(torch.__version__ < exp.nb_31._OLDEST, reason=f"'fsdp' needs PyTorch {OLDEST}, this is {torch.__version__}")

def test_fsdp_is_refused_by_an_old_pytorch(monkeypatch):
    monkeypatch.setattr(torch, '__version__', type(torch.__version__)('2.7.1+cpu'))
    with pytest.raises(ValueError, match=rf"expected PyTorch {OLDEST} or newer for 'fsdp', got 2.7.1\+cpu"): Distributed('fsdp')

def sharded_with(rank, folder=None, load=False, strategy='fsdp', epochs=2, cbs=lambda: [], rows=640, drop_last=True, opt_func=torch.optim.AdamW):
    learn = new_learner(opt_func, rows=rows, drop_last=drop_last, valid=135)
    if load == 'plain': load_sharded(learn, folder)
    else:
        learn.fit(1, cbs=Distributed(strategy))
        if load: load_sharded(learn, folder)
    if load: learn.dls[0].sampler.generator.manual_seed(7)
    learn.fit(epochs, cbs=[*cbs(), *([Distributed(strategy)] if load != 'plain' else [])])
    if folder and not load: save_sharded(learn, folder)
    full = [p.full_tensor() if hasattr(p, 'full_tensor') else p for p in learn.model.parameters()]
    return dict(weights=torch.cat([p.detach().reshape(-1) for p in full]), results=learn.results, losses=learn.recorder.losses,
                local=sum((p.to_local() if hasattr(p, 'to_local') else p).numel() for p in learn.model.parameters()))


@needs_fsdp
@pytest.mark.parametrize('rows, drop_last, opt_func, sizes', [
    (640, True, torch.optim.AdamW, (2, 3)), (645, False, AdamW, (2, 3)),
    *((640, True, opt_func, (3,)) for opt_func in (partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.1), RMSProp, Adam, Muon))],
    ids=['torch', 'AdamW', 'SGD', 'RMSProp', 'Adam', 'Muon'])
def test_fsdp_as_ddp(rows, drop_last, opt_func, sizes, tmp_path):
    options = dict(rows=rows, drop_last=drop_last, opt_func=opt_func, cbs=lambda: [GradientClip(0.5)])
    for n in sizes:
        plain, parts = (ranks(partial(sharded_with, strategy=s, **options), n, tmp_path/f'{s}{n}') for s in ('ddp', 'fsdp'))
        for part in parts:
            torch.testing.assert_close(part['weights'], plain[0]['weights'], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(part['losses'], plain[0]['losses'], rtol=1e-4, atol=1e-5)
            assert part['results'] == parts[0]['results'] and part['results']['accuracy'] == pytest.approx(plain[0]['results']['accuracy'], abs=1e-6)
        assert sum(part['local'] for part in parts) == plain[0]['local']


@needs_fsdp
@pytest.mark.parametrize('opt_func', [torch.optim.AdamW, AdamW, Muon], ids=['torch', 'AdamW', 'Muon'])
def test_sharded_checkpoints(opt_func, tmp_path):
    "Written by two ranks; read by two bit for bit, by three, and by one that has all weights."
    folder, sharded = tmp_path/'parts', partial(sharded_with, opt_func=opt_func)
    ranks(partial(sharded, folder=folder), 2, tmp_path/'a')
    two, again = (ranks(partial(sharded, folder=folder, load=True, epochs=1), 2, tmp_path/name) for name in 'bc')
    assert two[0]['weights'].equal(again[0]['weights'])
    three = ranks(partial(sharded, folder=folder, load=True, epochs=1), 3, tmp_path/'d')
    alone = ranks(partial(sharded, folder=folder, load='plain', epochs=1), 1, tmp_path/'e')
    for other in (three, alone): torch.testing.assert_close(other[0]['weights'], two[0]['weights'], rtol=1e-4, atol=1e-5)
    with pytest.raises(FileNotFoundError, match='save_sharded'): load_sharded(new_learner(), tmp_path)


def refused_sharded(rank, cbs, opt_func, words):
    learn = new_learner(opt_func)
    with pytest.raises(ValueError, match=words): learn.fit(1, cbs=[*cbs(), Distributed('fsdp')])

@pytest.mark.parametrize('cbs, opt_func, words', [
    (lambda: [EMA()], torch.optim.AdamW, "expected no EMA, which works with 'ddp'"),
    (lambda: [Record()], torch.optim.AdamW, 'expected no Record'),
    (lambda: [GradientAccumulation(2)], torch.optim.AdamW, 'expected no GradientAccumulation')])
@needs_fsdp
def test_fsdp_refuses(cbs, opt_func, words, tmp_path): ranks(partial(refused_sharded, cbs=cbs, opt_func=opt_func, words=words), 2, tmp_path/'a')


def after_steps(rank):
    learn = new_learner(torch.optim.AdamW)
    learn.fit(1, cbs=Distributed())
    with pytest.raises(ValueError, match='expected a new optimizer, got one that has taken steps'): learn.fit(1, cbs=Distributed('fsdp'))
    learn.fit(1, cbs=Distributed('fsdp'), reset_opt=True)

@needs_fsdp
def test_fsdp_begins_with_a_new_optimizer(tmp_path): ranks(after_steps, 2, tmp_path/'a')


# torchrun

def torchrun(*args, cwd, n=2, restarts=0, seconds=180, **environ):
    "Return code and output of a job; ended with SIGTERM, so that no worker is left, if it takes too long."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', n, '--max-restarts', restarts, *args]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1') | environ
    process = subprocess.Popen([*map(str, command)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try: text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try: text, _ = process.communicate(timeout=40)
        finally: process.kill()
        raise TimeoutError(text) from None
    return process.returncode, text


TRAIN = '''
import os, signal, sys, time
from exp.nb_10 import Callback
from exp.nb_14 import exp_train
import exp.nb_14
class Kill(Callback):
    def after_batch(self, learn):
        first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
        if learn.training and first and (os.environ['RANK'], learn.epoch, learn.iter) == ('1', 1, 20): os.kill(os.getpid(), signal.SIGKILL)
class Terminate(Callback):
    def after_batch(self, learn):
        if not learn.training or (learn.epoch, learn.iter) < (1, 20): return
        if (os.environ['RANK'], learn.iter) == ('0', 20): os.kill(os.getppid(), signal.SIGTERM)  # to torchrun
        time.sleep(0.05)  # until it has come
if 'kill' in sys.argv: exp.nb_14.Learner.default_cbs += (Kill,)
if 'term' in sys.argv: exp.nb_14.Learner.default_cbs += (Terminate,)
if 'resume' in sys.argv: exp_train(resume=os.listdir('runs')[0])
else: exp_train(epochs=2, bs=500, hidden=20, name='a')
'''

def folder_of(path):
    run, = (path/'runs').iterdir()  # one folder
    rows = [line.rpartition(',')[0] for line in (run/'metrics.csv').read_text().splitlines()]
    return run, rows, (run/'model.safetensors').read_bytes()


def test_exp_train_under_torchrun_after_a_kill_and_after_sigterm(tmp_path):
    "One folder, one table, one last line; neither a rank that is killed in mid-epoch nor SIGTERM to all changes a bit."
    found = []
    for name in ('plain', 'kill', 'term'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'train.py').write_text(TRAIN)
        code, text = torchrun('train.py', name, cwd=tmp_path/name, restarts=1)
        if name == 'term':
            assert code != 0 and len([*(tmp_path/name).glob('runs/*/checkpoint/epoch0001-batch0000[2-9]?.pt')]) == 1, text
            code, text = torchrun('train.py', 'resume', cwd=tmp_path/name)
        assert code == 0, text
        assert text.count('validation accuracy') == 1, text
        found.append(folder_of(tmp_path/name))
    assert found[0][1:] == found[1][1:] == found[2][1:] and len(found[0][1]) == 3
    assert json.loads((found[0][0]/'results.json').read_text())['accuracy'] > 0.8


def test_an_error_is_told_and_ends_the_job(tmp_path):
    (tmp_path/'train.py').write_text(TRAIN.replace('os.kill(os.getpid(), signal.SIGKILL)', "raise ArithmeticError('of rank 1')"))
    code, text = torchrun('train.py', 'kill', cwd=tmp_path)
    assert code == 1 and 'ArithmeticError: of rank 1' in text


NCCL = '''
import sys, torch
from exp.nb_00 import set_seed
from exp.nb_02 import Model
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Learner
from exp.nb_12 import AdamW
from exp.nb_14 import exp_train
from exp.nb_15 import Device
from exp.nb_31 import Distributed

def trained(*cbs):
    set_seed(42)
    train, valid = (Dataset(torch.randn(n, 20), torch.randint(10, (n,))) for n in (600, 100))
    model = Model(20, 50, 10)
    learn = Learner(model, get_dls(train, valid, bs=48, seed=1), opt_func=AdamW, lr=1e-2, cbs=[Device('cuda'), *cbs])
    learn.fit(2)
    return [p.full_tensor() if hasattr(p, 'full_tensor') else p for p in map(torch.Tensor.detach, model.parameters())]

together = [trained(Distributed(strategy)) for strategy in ('ddp', 'fsdp')]
for found in together:
    for a, b in zip(found, trained()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
exp_train(epochs=1, bs=500, device='cuda', name='a')
'''

@pytest.mark.parametrize('n', [pytest.param(n, marks=pytest.mark.skipif(torch.cuda.device_count() < n, reason=f'needs {n} CUDA devices')) for n in (1, 2)])
def test_nccl(n, tmp_path):
    "The same on GPUs, started afresh, since CUDA can't be forked."
    (tmp_path/'train.py').write_text(NCCL)
    code, text = torchrun('train.py', cwd=tmp_path, n=n)
    assert code == 0, text
    assert folder_of(tmp_path)[1]
