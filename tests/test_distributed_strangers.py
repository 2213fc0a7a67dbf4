"What programs do that were not written with several processes in mind: each case once went wrong in silence, or hung."
import faulthandler, os, re, shutil, signal, time, traceback
from functools import partial
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import data as torch_data
from exp.nb_00 import set_seed
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset, Sampler
from exp.nb_05 import Metric
from exp.nb_10 import Callback, CancelBatch, CancelEpoch, CancelFit, Learner
from exp.nb_12 import SGD, AdamW
from exp.nb_13 import Checkpoint, CheckpointError, EarlyStopping, SaveBest
from exp.nb_31 import Distributed, Team, load_sharded, save_sharded
from test_distributed import batch_norm, data, dist_rank, mlp, new_learner, needs_fsdp, OLDEST, pytestmark as needs_fork, ranks

pytestmark = needs_fork

CASES = {}
def case(func):
    "A function of the rank and a folder, run by two processes; the processes of all cases are the same two."
    CASES[func.__name__] = func
    return func

def run_cases(rank, names, folder):
    found, team = {}, Team(timeout=20)
    for name in names:
        path = folder/name
        path.mkdir(exist_ok=True)
        team.wait()
        try: found[name] = CASES[name](rank, path)
        except BaseException: found[name] = traceback.format_exc()
        torch.save(found, folder/f'found{rank}.pt')
    return found

@pytest.fixture(scope='module')
def found(request, tmp_path_factory):
    "Of each rank, name of the case -> None, or what was raised; as far as they came."
    names = [item.callspec.params['name'] for item in request.session.items if item.name.startswith('test_case[')]
    folder, gone = tmp_path_factory.mktemp('cases'), None
    try: ranks(partial(run_cases, names=names, folder=folder), 2, folder/'ranks', seconds=100)
    except Exception as e: gone = f'the processes ended with {e!r}'
    told = [torch.load(path) if path.exists() else {} for path in (folder/f'found{rank}.pt' for rank in (0, 1))]
    return [{name: f.get(name, gone) for name in names} for f in told]


class Do(Callback):
    "Does something at one event."
    def __init__(self, event, func, order=0):
        self.order = order
        setattr(self, event, func)

def on_rank_1(func):
    "Only there, in the fourth batch."
    def go(learn):
        if learn.training and learn.epoch == 0 and learn.iter == 3 and learn.team.rank == 1: func(learn)
    return go

def skip(learn): raise CancelBatch

def vector(learn):
    whole = [p.full_tensor() if hasattr(p, 'full_tensor') else p for m in learn.modules for p in m.parameters()]
    return torch.cat([p.detach().double().reshape(-1) for p in whole])

def alike(*values): Team().same('values', [v.tolist() if isinstance(v, torch.Tensor) else v for v in values])
def near(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
def refused(words, run, error=ValueError):
    with pytest.raises(error, match=words): run()

def fit(learn, *cbs, epochs=2, strategy='ddp', **options):
    learn.fit(epochs, cbs=[Distributed(strategy), *cbs], **options)
    alike(learn.results)
    return learn

def unlike(rank):
    "As without a seed."
    torch.manual_seed(rank)
    learn = new_learner(seed=rank)
    learn.dls[0].sampler.generator.manual_seed(rank)
    return learn

torch_learner = partial(new_learner, torch.optim.AdamW)

# Tensors that are not as usual

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer('mask', torch.full((4, 4), -torch.inf).triu(1))
    def forward(self, x): return self.net(x) + (x[:, :4, None]*x[:, None, :4] + self.mask).softmax(-1).mean((1, 2))[:, None]

@case
def a_causal_mask(rank, folder):
    one = new_learner(model=Masked)
    one.fit(2)
    two = fit(new_learner(model=Masked))
    near(vector(two), vector(one))
    assert two.model.mask.equal(Masked().mask) and two.results['valid_loss'] == pytest.approx(one.results['valid_loss'], rel=1e-4)

class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(16, 16)[:, :4]), nn.Parameter(torch.randn(4, 3))
    def forward(self, x): return x @ self.u @ self.v

@case
def tensors_with_gaps(rank, folder):
    x = torch.ones(3, 4)*(rank + 1)
    assert Team().sum(x[:, 1]).tolist() == [3.]*3 and x.tolist() == [[rank + 1., 3., rank + 1., rank + 1.]]*3
    def model():
        low = LowRank()
        low.register_buffer('wide', torch.zeros(1, 64).expand(64, 64))
        return low
    set_seed(rank)
    learn = new_learner(model=model, seed=rank)
    first = Team().broadcast(learn.model.u.detach().clone())
    seen = []
    fit(learn, Do('before_fit', lambda learn: seen.append(learn.model.u.detach().clone())))
    assert seen[0].equal(first)
    alike(vector(learn))


# Other networks

@case
def a_rate_that_each_found_alone(rank, folder):
    learn = unlike(rank)
    refused('the same learning rates on all ranks', lambda: fit(learn, lr=0.01*(rank + 1)))
    learn.fit_one_cycle(1, lr_max=0.05, cbs=Distributed())
    refused('after epoch 0, got others in', lambda: learn.fit_one_cycle(1, lr_max=0.01*(rank + 1), cbs=Distributed()))

@case
def a_fit_alone_before(rank, folder):
    learn = unlike(rank)
    learn.fit(1)
    fit(learn)
    alike(vector(learn), learn.opt.state[learn.opt.param_groups[0]['params'][0]]['momentum_buffer'])

PARTS = {
    'a new layer': Do('before_epoch', lambda learn: learn.epoch == 1 and learn.model.__setitem__(2, nn.Linear(24, 3))),
    'initialized': Do('before_fit', lambda learn: nn.init.normal_(learn.model[0].weight)),
    'noise on gradients': Do('after_backward', lambda learn: [p.grad.add_(0.01*torch.randn_like(p)) for p in learn.model.parameters()]),
    'a fit within': Do('after_epoch', lambda learn: learn.fit(1, max_batches=2)),
    'a step skipped': Do('after_backward', on_rank_1(skip))}

@case
def networks_that_part(rank, folder):
    for cb in PARTS.values():
        refused('expected the same weights on all ranks after epoch', lambda: fit(new_learner(), cb))
    refused('got others in 2.weight, 2.bias', lambda: fit(new_learner(), PARTS['a new layer']))
    refused(r'got \[10, 9\] steps', lambda: fit(torch_learner(), PARTS['a step skipped'], strategy='fsdp'))

@case
def what_must_be_alike(rank, folder):
    for words, run in {
            'same optimizer on all ranks, got ..SGD., .AdamW': lambda: fit(new_learner((SGD, AdamW)[rank])),
            'epochs, and max_batches on all ranks, got .3, 4.': lambda: fit(new_learner(), max_batches=3 + rank),
            'same rows, batches and data': lambda: fit(new_learner(rows=650, drop_last=bool(rank))),
            'same metrics on all ranks, got': lambda: fit(new_learner(metrics=[accuracy, F.cross_entropy][:rank + 1])),
            'which are trained on all ranks, got .True, False': lambda: fit(frozen_on_1(rank)),
            "watch a result on all ranks, got ...Checkpoint.., ...": lambda: fit(new_learner(), *[Checkpoint(folder/'a')][rank:]),
            "watch a result on all ranks, got ...SaveBest..": lambda: fit(new_learner(), *[SaveBest(folder/'b.safetensors')][rank:]),
            "watch a result on all ranks, got ...EarlyStopping": lambda: fit(new_learner(), *[EarlyStopping()][rank:])}.items():
        refused(words, run)

def frozen_on_1(rank):
    learn = new_learner()
    if rank: learn.freeze_to(-1)
    return learn

@case
def only_what_differs_is_told(rank, folder):
    refused(re.escape('same things on all ranks, got [5, 6]'), lambda: Team().same('things', [[1]*1000, (4, 5 + rank), 'a']))


# Data

@case
def another_split_on_each_rank(rank, folder):
    def learner(a, b): return Learner(mlp(), (DataLoader(a, 64, shuffle=True), DataLoader(b, 64)), metrics=accuracy, progress=False)
    torch.manual_seed(rank)
    whole = torch_data.TensorDataset(*data(600).tensors)
    refused('same rows, batches and data', lambda: fit(learner(*torch_data.random_split(whole, [480, 120]))))
    idxs = torch.randperm(600)
    refused('same rows, batches and data', lambda: fit(learner(*(Dataset(*data(600)[part]) for part in (idxs[:480], idxs[480:])))))
    set_seed(0)
    for _ in range(3):  # the folds of one seed stay the same on all
        idxs = torch.randperm(600)
        alike(idxs)
        fit(learner(*(Dataset(*data(600)[part]) for part in (idxs[:480], idxs[480:]))), epochs=1)

@case
def chance_goes_on_after_a_fit(rank, folder):
    torch.manual_seed(5)
    learn = new_learner(model=batch_norm)
    seen = []
    note = Do('before_epoch', lambda learn: seen.append(torch.rand(1).item()))
    for _ in range(2): fit(learn, note, epochs=1)
    alike(torch.rand(3))
    all_seen = Team().gather_all(seen)
    assert len({v for seen in all_seen for v in seen}) == 4  # neither alike on two ranks nor in two fits

class Weighted(Sampler):
    "Draws by torch's own generator."
    def __iter__(self): return (torch.randperm(self.n)[:self.bs] for _ in range(len(self)))

@case
def a_sampler_of_ones_own(rank, folder):
    torch.manual_seed(rank)
    learn, seen = new_learner(), []
    learn.dls = DataLoader(data(640), batch_sampler=Weighted(640, 64)), learn.dls[1]
    fit(learn, Do('before_batch', lambda learn: learn.training and seen.append(learn.xb[0][:, 0].tolist())))
    first, second = Team().gather_all(seen)
    assert len(first) == 20 and all(len({*a, *b}) == 64 for a, b in zip(first, second))
    alike(vector(learn))

@case
def batches_that_were_given(rank, folder):
    learn = new_learner()
    learn.dls = DataLoader(data(40), batch_sampler=Sampler(40, 1)), None
    refused('at least 2 rows, one for each process, got one of 1', lambda: fit(learn))
    learn.dls = DataLoader(data(41), batch_sampler=Sampler(41, 10)), None
    refused('at least 2 rows, one for each process, got one of 1', lambda: fit(learn))
    learn.dls = new_learner().dls[0], DataLoader(data(1), 64)
    refused('validation batches of at least 2 rows', lambda: fit(learn))
    learn.dls = DataLoader(data(40), batch_sampler=Sampler(40, 10)), None
    fit(learn)

class Stream(torch_data.IterableDataset):
    def __iter__(self): return iter([])

@case
def loaders_that_cant_be_divided(rank, folder):
    ds, learn = torch_data.TensorDataset(*data(640).tensors), new_learner()
    order = dict(sampler=torch_data.DistributedSampler(ds, 2, rank)), dict(shuffle=True, generator=torch.Generator())
    for words, dl in [('got one of an IterableDataset', DataLoader(Stream())), ("got one of torch's: the other takes the same dataset", torch_data.DataLoader(ds)),
                      *(("one with an order of torch's: leave out sampler and generator", DataLoader(ds, **o)) for o in order)]:
        learn.dls = dl, None
        refused(f'expected a DataLoader of exp.nb_04 .*{words}', lambda: fit(learn))

@case
def two_callbacks_of_one_kind(rank, folder):
    refused('to be the only one in a fit', lambda: fit(new_learner(cbs=[Distributed()])))

@case
def statistics_without_validation(rank, folder):
    learn = new_learner(model=batch_norm)
    learn.dls = learn.dls[0], None
    fit(learn)
    alike(learn.model[1].running_mean, learn.model[1].running_var)


# Metrics

class Scores(Metric):
    "Collects, and adds up nothing."
    def __init__(self): super().__init__(None, 'scores')
    def reset(self):
        super().reset()
        self.scores = []
    def update(self, pred, target): self.scores.append(pred.amax(1))
    def compute(self): return torch.cat(self.scores).mean()

def recall(pred, target): return (pred.argmax(1)[target == 2] == 2).float().mean()
recall.weight_of = lambda pred, target: int((target == 2).sum())
def both_kinds(pred, target): return dict(a=recall(pred, target), b=1 - recall(pred, target))
both_kinds.weight_of = recall.weight_of

@case
def metrics_that_one_rank_has(rank, folder):
    def learner(metric):
        learn = new_learner(metrics=metric)
        target = learn.dls[1].ds.y
        target[target == 2] = 1
        target[0] = 2  # of rank 0
        return learn
    for metric in (recall, both_kinds):
        one = learner(metric)
        one.fit(2)
        assert fit(learner(metric)).results == pytest.approx(one.results, rel=1e-4)

@case
def metrics_that_add_up_nothing(rank, folder):
    refused('add up by Metric.add, got Scores, whose own sums stay on their rank', lambda: fit(new_learner(metrics=Scores())))
    learn = new_learner(metrics=Scores())
    learn.dls = learn.dls[0], None
    fit(learn)


# Numbers of one's own

def smooth(pred, target): return F.cross_entropy(pred, target, label_smoothing=0.1)
def put_smooth(learn):
    if learn.training: learn.loss = smooth(learn.pred, learn.yb)

@case
def a_loss_of_ones_own(rank, folder):
    one, two = new_learner(), new_learner()
    one.fit(2, cbs=Do('after_loss', put_smooth, order=-9))
    fit(two, Do('after_loss', put_smooth, order=-9))
    near(vector(two), vector(one))
    near(two.recorder.losses, one.recorder.losses)
    alike(two.recorder.losses)

@case
def a_result_of_ones_own(rank, folder):
    sizes = []
    def measure(learn):
        pred, target = learn.get_preds()
        sizes.append(len(pred))
        learn.results['own'] = learn.team.broadcast(accuracy(pred, target).item())
    learn = fit(new_learner(), Do('after_epoch', measure), EarlyStopping('own', patience=1, mode='max'), epochs=6)
    assert set(sizes) == {65}
    alike(len(learn.recorder.epochs))


# Parts of the weights

class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.position = nn.Linear(16, 16), nn.Linear(16, 3), nn.Parameter(torch.randn(16))
    def forward(self, x): return self.head(self.body(x + self.position).relu())

class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]), nn.Linear(16, 3)
        self.scales = nn.ParameterList([torch.ones(16), torch.ones(16)])
    def forward(self, x):
        for layer, scale in zip(self.layers, self.scales): x = layer(x).relu()*scale
        return self.head(x)

def by_both(make, **options):
    plain, parts = (fit(make(), strategy=s, **options) for s in ('ddp', 'fsdp'))
    near(vector(parts), vector(plain))
    assert parts.results == pytest.approx(plain.results, rel=1e-3)
    return parts

@case
def weights_of_the_model_itself(rank, folder):
    for model in (Vit, partial(nn.Linear, 16, 3), Lists):
        learn = by_both(lambda: torch_learner(model=model), epochs=3)
        assert len(learn.opt.state) == len([*learn.model.parameters()])

class Scaled(nn.Module):
    "A loss with a weight of its own."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, pred, target): return F.cross_entropy(pred*self.scale, target)

@case
def a_loss_with_weights(rank, folder):
    learn = by_both(lambda: torch_learner(loss_func=Scaled()), epochs=3)
    save_sharded(learn, folder/'save')
    again, seen = torch_learner(loss_func=Scaled(), seed=7), []
    load = Do('before_fit', lambda learn: (load_sharded(learn, folder/'save'), seen.append(vector(learn))))
    fit(again, load, strategy='fsdp', epochs=1)
    assert seen[0].equal(vector(learn))

@case
def a_new_head_on_sharded_weights(rank, folder):
    learn = fit(torch_learner(), strategy='fsdp')
    torch.manual_seed(rank)
    learn.model[2] = nn.Linear(24, 3)
    alike(vector(fit(learn, strategy='fsdp')))

def by_hand():
    learn = new_learner()
    params = [*learn.model.parameters()]
    learn.opt = torch.optim.AdamW([dict(params=params[:2], lr=0.002), dict(params=params[2:], lr=0.02, weight_decay=0.3)])
    return learn

@case
def an_optimizer_made_by_hand(rank, folder):
    learn = by_both(by_hand)
    assert isinstance(learn.opt, torch.optim.AdamW) and [g['weight_decay'] for g in learn.opt.param_groups] == [0.01, 0.3]

class MyCheckpoint(Checkpoint): pass

@case
def whole_weights_are_asked_for(rank, folder):
    refused("expected no Checkpoint, which works with 'ddp'", lambda: fit(torch_learner(), MyCheckpoint(folder/'a'), strategy='fsdp'))
    learn = torch_learner(cbs=[Distributed('fsdp')])
    before = vector(learn)
    refused("expected no lr_find, which works with 'ddp'", lambda: learn.lr_find(plot=False))
    assert vector(learn).equal(before)
    learn.fit(1)
    for name in ('a.pt', 'a.safetensors'): refused('sharded', lambda: learn.save(folder/name), CheckpointError)
    assert not [*folder.glob('a.*')]

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.second.weight = self.first.weight
    def forward(self, x): return self.head(self.second(self.first(x).relu()))

class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.tensor(1.))
    def forward(self, x): return self.net(x)*self.scale

@case
def what_fsdp_refuses_is_left_whole(rank, folder):
    for model, words in ((Tied, 'got first.weight, which several layers share'), (Number, 'got a single number, scale')):
        learn = torch_learner(model=model)
        refused(words, lambda: fit(learn, strategy='fsdp'))
        fit(learn)

@case
def not_back_to_whole_weights(rank, folder):
    learn = fit(torch_learner(), strategy='fsdp')
    refused("expected whole weights, got sharded ones, with which only 'fsdp' goes on", lambda: fit(learn))


# Sharded checkpoints

@case
def loaded_in_a_new_process(rank, folder):
    "As the message says: in the before_fit of a callback."
    learn = fit(torch_learner(), strategy='fsdp')
    save_sharded(learn, folder/'save')
    learn.dls[0].sampler.generator.manual_seed(7)
    fit(learn, strategy='fsdp', epochs=1)
    again = torch_learner(seed=3)
    load_sharded(again, folder/'save')
    refused('a new optimizer, got one that has taken steps: .* call it in the before_fit of a callback', lambda: fit(again, strategy='fsdp'))
    again = torch_learner(seed=3)
    again.dls[0].sampler.generator.manual_seed(7)
    fit(again, Do('before_fit', lambda learn: load_sharded(learn, folder/'save')), strategy='fsdp', epochs=1)
    assert vector(again).equal(vector(learn))

def fewer(): return nn.Sequential(nn.Linear(16, 24), nn.ReLU())
def other(): return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3))
def renamed(): return mlp(nn.Dropout(0.1))

def damaged(rank, folder, name, change):
    "A copy of the save with one of its files changed."
    copied = folder/f'damaged{len([*folder.glob("damaged*")])}'
    Team().wait()
    if rank == 0:
        shutil.copytree(folder/'save', copied)
        change(copied/name)
    Team().wait()
    return copied

@case
def a_misfit_changes_nothing(rank, folder):
    learn = fit(torch_learner(), strategy='fsdp', epochs=1)
    save_sharded(learn, folder/'save')
    def load(words, path=folder/'save', strategy=None, **options):
        learn = new_learner(**dict(dict(opt_func=torch.optim.AdamW, seed=7), **options))
        if strategy: fit(learn, strategy=strategy, epochs=1)
        before = vector(learn)
        with pytest.raises(CheckpointError, match=words) as e: load_sharded(learn, path)
        assert vector(learn).equal(before) and len(str(e.value).splitlines()) == 1 and str(folder) in str(e.value)
    for strategy in (None, 'fsdp'):
        load('made by another Learner: expected model.0.weight .20, 16., found .24, 16.', model=other, strategy=strategy)
    load('another Learner: expected model.2.weight None, found', model=fewer)
    load('another Learner: expected model.3.weight .3, 24., found None', model=renamed)
    load('another Learner: expected opt.state', opt_func=torch.optim.SGD)
    load('another Learner: expected opt.state', opt_func=partial(torch.optim.SGD, momentum=0.9))
    for strategy in (None, 'fsdp'):
        cut = damaged(rank, folder, '__1_0.distcp', lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size//2]))
        load('damaged, or a part is missing', cut, strategy)
        load('damaged, or a part is missing', damaged(rank, folder, '__1_0.distcp', Path.unlink), strategy)
    load('expected what save_sharded wrote, got', damaged(rank, folder, '.metadata', lambda path: path.write_bytes(b'rubbish')))

@case
def a_folder_with_other_files(rank, folder):
    learn = torch_learner()
    Team().once(lambda: (folder/'notes.txt').write_text('mine'))
    Team().once(lambda: ((folder/'save').mkdir(), (folder/'save/__0_0.distcp').write_text('never complete'))[1])
    refused('expected a folder of its own, found notes.txt in it', lambda: save_sharded(learn, folder))
    assert (folder/'notes.txt').read_text() == 'mine'
    for seed in (1, 2):  # and a second one in the place of the first
        learn = torch_learner(seed=seed)
        save_sharded(learn, folder/'save')
    again = torch_learner(seed=3)
    load_sharded(again, folder/'save')
    assert vector(again).equal(vector(learn)) and sorted(p.name for p in folder.iterdir()) == ['notes.txt', 'save']


@pytest.mark.parametrize('name', CASES)
def test_case(name, found):
    told = [f[name] for f in found]
    if f"PyTorch {OLDEST} or newer for 'fsdp'" in str(told): pytest.skip(f"'fsdp' needs PyTorch {OLDEST}, this is {torch.__version__}")
    assert told == [None, None], '\n'.join(map(str, told))


# What ends processes, each in a group of its own

def kills_itself(rank, folder):
    learn = torch_learner()
    fit(learn, strategy='fsdp', epochs=1)
    save_sharded(learn, folder)
    if rank == 0: torch.save(vector(learn), f'{folder}.pt')
    else: vector(learn)
    fit(learn, strategy='fsdp', epochs=1)
    from torch.distributed.checkpoint import filesystem
    if rank == 1: filesystem.FileSystemWriter.write_data = lambda *args, **options: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGKILL))
    save_sharded(learn, folder)

@needs_fsdp
def test_killed_while_it_saves(tmp_path):
    "The old save is whole."
    with pytest.raises(Exception): ranks(partial(kills_itself, folder=tmp_path/'save'), 2, tmp_path/'a')
    learn = torch_learner(seed=3)
    load_sharded(learn, tmp_path/'save')
    assert vector(learn).equal(torch.load(tmp_path/'save.pt'))
    (tmp_path/'save').rename(tmp_path/'.save.old')  # killed between two renamings
    learn = torch_learner(seed=3)
    load_sharded(learn, tmp_path/'save')
    assert vector(learn).equal(torch.load(tmp_path/'save.pt'))


def left_alone(rank, path):
    Team(timeout=2)
    team = Team(timeout=600)  # the first one counts
    if rank == 1: return time.sleep(4)
    with pytest.raises(ConnectionError, match='rank 0 of 2, in sum: another rank has ended, or does something else'): team.sum(torch.ones(1))
    path.write_text('told')
    os._exit(0)

def test_who_waits_is_told(tmp_path):
    try: ranks(partial(left_alone, path=tmp_path/'told'), 2, tmp_path/'a', seconds=30)
    except Exception: pass  # rank 1 finds nobody at the end
    assert (tmp_path/'told').read_text() == 'told'


class UsedByOne(nn.Module):
    "A layer that only rank 0 uses."
    def __init__(self):
        super().__init__()
        self.always, self.first = nn.Linear(16, 3), nn.Linear(16, 3)
    def forward(self, x): return self.always(x) + (self.first(x) if dist_rank() == 0 and self.training else 0)

def leave(learn): raise CancelFit
def leave_epoch(learn): raise CancelEpoch

PARTING = {
    'a fit that one rank leaves': dict(cbs=[Do('after_batch', on_rank_1(leave))]),
    'an epoch that one rank leaves': dict(cbs=[Do('after_batch', on_rank_1(leave_epoch))]),
    'a batch that one rank skips': dict(cbs=[Do('after_backward', on_rank_1(skip), order=-20)]),
    'a validation by one rank': dict(cbs=[Do('after_epoch', lambda learn: learn.team.rank or learn.validate(), order=50)]),
    'a layer of one rank': dict(model=UsedByOne, strategy='fsdp')}

def parting(rank, cbs=(), strategy='ddp', **options):
    faulthandler.disable()  # PyTorch aborts where two sums don't match
    torch_learner(**options).fit(3, cbs=[Distributed(strategy, timeout=2), *cbs])

@pytest.mark.parametrize('options', [pytest.param(o, marks=needs_fsdp if 'strategy' in o else ()) for o in PARTING.values()], ids=PARTING)
def test_what_ends_the_job(options, tmp_path):
    "No rank goes on alone."
    with pytest.raises(Exception) as e: ranks(partial(parting, **options), 2, tmp_path/'a', seconds=40)
    assert not isinstance(e.value, TimeoutError)
