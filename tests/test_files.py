"Files in other people's hands: wrapped models, extra state, losses with weights, several processes, names of results."
import copy, os, signal, socket, subprocess, sys, time
from collections import Counter, OrderedDict, defaultdict, namedtuple
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from exp.nb_00 import set_seed
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Callback, CancelFit, Learner, Metric, Metrics
from exp.nb_11 import get_rng_state
from exp.nb_12 import EMA, AdamW
from exp.nb_13 import (Checkpoint, CheckpointError, EarlyStopping, Monitor, SaveBest, _checkpoints, atomic_write, last_checkpoint,
                       load_checkpoint, load_weights, read_checkpoint, save_weights)

ROOT = Path(__file__).parent.parent

def net(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def new_learner(seed=0, model=None, loss_func=None, opt_func=AdamW, **kwargs):
    set_seed(seed)
    g = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g))
    dls = DataLoader(ds, 8, shuffle=True), DataLoader(ds, 20)
    loss_func = nn.functional.cross_entropy if loss_func is None else loss_func
    return Learner(net() if model is None else model, dls, loss_func, opt_func=opt_func, lr=0.01, metrics=accuracy, progress=False, **kwargs)

def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def clone(state): return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

def everything(learn):
    "All that a file which does not fit must leave alone."
    return [[clone(m.state_dict()) for m in learn.modules], learn.opt and copy.deepcopy(learn.opt.state_dict()), get_rng_state(learn.dls), learn.results]


# What is better

LOWER = '''loss valid_loss train_loss error valid_error mae MAE train_mae mse rmse RMSE RMSLE rmsle perplexity Perplexity ppl wer WER cer mape MAPE nll NLL
    MeanSquaredError MeanAbsoluteError MeanAbsolutePercentageError NormalizedRootMeanSquaredError MSELoss valid_MSE WordErrorRate CharErrorRate
    HammingDistance KLDivergence CalibrationError cross_entropy binary_cross_entropy log_loss error_rate top5_error brier_score fid EditDistance
    TranslationEditRate inaccuracy val_loss testloss LearnedPerceptualImagePatchSimilarity bits_per_dim'''.split()
HIGHER = '''accuracy Accuracy valid_accuracy train_acc acc f1 F1 F1Score f1_score BinaryF1Score auc AUC auroc AUROC MulticlassAUROC precision recall Recall
    AveragePrecision r2 R2Score iou IoU mIoU MeanIoU mean_iou JaccardIndex dice DiceScore bleu BLEUScore SacreBLEUScore map mAP mAP50
    RetrievalMAP top_k top_5 top1 TopKAccuracy top_k_accuracy ROUGEScore CohenKappa MatthewsCorrCoef PearsonCorrCoef ExplainedVariance
    PeakSignalNoiseRatio StructuralSimilarityIndexMeasure balanced_accuracy FBetaScore ExactMatch nDCG acuracy reward'''.split()
UNCLEAR = '''score Half foo lr epoch accuracy_loss loss_accuracy precision_error dice_loss accuracy_gap acc_drop 1-accuracy val_1-dice
    neg_mean_squared_error negative_accuracy one_minus_iou std_accuracy entropy seen'''.split() + ['', 'точность']

@pytest.mark.parametrize('names, mode', [(LOWER, 'min'), (HIGHER, 'max')])
def test_known_names(names, mode):
    assert {name: Monitor(name).mode for name in names} == dict.fromkeys(names, mode)

@pytest.mark.parametrize('name', UNCLEAR)
@pytest.mark.parametrize('make', [Monitor, partial(SaveBest, 'a.safetensors'), EarlyStopping])
def test_an_unknown_name_needs_a_mode(make, name):
    with pytest.raises(ValueError, match="expected mode='min' .*or mode='max' .*got None") as error: make(name)
    assert repr(name) in str(error.value)
    assert [make(name, mode=mode).mode for mode in ('min', 'max')] == ['min', 'max']

def test_checkpoints_know_modes_too(tmp_path):
    with pytest.raises(ValueError, match="mode='min'"): Checkpoint(tmp_path, monitor='score')
    assert Checkpoint(tmp_path, monitor='score', mode='max').mode == 'max' and Checkpoint(tmp_path, monitor=None).monitor is None

class Results(Callback):
    "Says what the results of each epoch are."
    def __init__(self, **values): self.values = values
    def after_epoch(self, learn): learn.results = {k: v[learn.epoch] for k, v in self.values.items()}

@pytest.mark.parametrize('name, values, mode, best', [
    ('mae', (3., 1., 2.), None, 1), ('f1', (1., 3., 2.), None, 1), ('score', (3., 1., 2.), 'min', 1), ('score', (1., 3., 2.), 'max', 1),
    ('rmse', (float('nan'), 5., float('nan')), None, 1), ('f1', (float('nan'), 0., float('inf')), None, 1),
    ('loss', (2., 1., -float('inf')), None, 1), ('accuracy', (.1, .3, .2), 'min', 0)])
def test_the_best_is_the_best(name, values, mode, best, tmp_path):
    "nan and infinity are never better."
    class Weights(Callback):
        def __init__(self): self.seen = []
        def after_epoch(self, learn): self.seen.append(clone(learn.model.state_dict()))
    learn, weights = new_learner(), Weights()
    learn.fit(3, cbs=[Results(**{name: values}), weights, SaveBest(tmp_path/'a', name, mode=mode),
                      Checkpoint(tmp_path/'c', keep=1, monitor=name, mode=mode)])
    assert same(clone(learn.model.state_dict()), weights.seen[best])
    assert _checkpoints(tmp_path/'c')[0].name == f'epoch000{best + 1}-batch000000.pt'

def test_patience_runs_out_with_nan_and_after_a_shorter_one(tmp_path):
    learn = new_learner()
    learn.fit(20, cbs=[Results(mae=[float('nan')]*20), EarlyStopping('mae', patience=2)])
    assert len(learn.recorder.epochs) == 2
    def cbs(patience): return [Results(mae=[*range(20)]), EarlyStopping('mae', patience=patience), Checkpoint(tmp_path, monitor=None, resume=True)]
    new_learner().fit(4, cbs=cbs(9))
    again = new_learner()
    again.fit(20, cbs=cbs(2))  # it has already waited for longer
    assert len(again.recorder.epochs) == 5

@pytest.mark.parametrize('make', [
    *(partial(EarlyStopping, patience=v) for v in (0, -1, 2.5, float('nan'), float('inf'), None, '3', True)),
    *(partial(Monitor, min_delta=v) for v in (float('nan'), -0.1, float('inf'), None, '0', True)),
    *(partial(Monitor, 'loss', mode=v) for v in ('up', 'MIN', True, 1)), *(partial(Monitor, v) for v in (None, 3, ['loss'])),
    *(partial(Checkpoint, 'a', every=v) for v in (0, -1, 2.5, float('nan'), '3', True)),
    *(partial(Checkpoint, 'a', keep=v) for v in (0, -1, 1.5, float('nan'), None, '3', True)),
    *(partial(Checkpoint, 'a', resume=v) for v in ('no', 1, None)), partial(SaveBest, 'a', min_delta=float('nan'))])
def test_pointless_values_are_refused_when_given(make):
    with pytest.raises(ValueError, match='expected .*got ') as error: make()
    given = [*make.args, *make.keywords.values()][-1]
    assert str(given) in str(error.value)

def test_numbers_of_numpy_are_numbers():
    assert EarlyStopping(patience=np.int64(2), min_delta=np.float32(0.5)).patience == 2 and Checkpoint('a', every=np.int32(5)).every == 5


# Ends

class End(Callback):
    order = 200
    def __init__(self, epoch, event='after_epoch', error=CancelFit):
        def end(learn):
            if learn.epoch == epoch and (event.endswith('epoch') or learn.training): raise error
        setattr(self, event, end)

@pytest.mark.parametrize('event', ['after_epoch', 'after_batch', 'before_epoch'])
@pytest.mark.parametrize('more', [[], [0.5]])
def test_the_best_weights_are_there_after_a_cancelled_fit(event, more, tmp_path):
    learn, best = new_learner(), tmp_path/'best.safetensors'
    learn.fit(9, cbs=[*map(EMA, more), Results(valid_loss=[3., 1., 2., 2., 2.]), SaveBest(best), End(3, event)])
    kept = net()
    load_weights(kept, best)
    assert same(learn.model.state_dict(), kept.state_dict())
    other = new_learner()
    other.fit(9, cbs=[*map(EMA, more), Results(valid_loss=[3., 1., 2., 2., 2.]), SaveBest(tmp_path/'b'), End(1)])
    assert same(other.model.state_dict(), kept.state_dict())  # the second epoch's, averaged or not

def test_a_fit_that_is_cancelled_before_it_begins_brings_no_old_weights_back(tmp_path):
    class Never(Callback):
        order = -100
        def before_fit(self, learn): raise CancelFit
    learn, best = new_learner(), SaveBest(tmp_path/'a')
    learn.fit(1, cbs=[Never(), best])
    learn.fit(2, cbs=best)
    learn.fit(1)
    before = clone(learn.model.state_dict())
    learn.fit(1, cbs=[Never(), best])
    assert same(clone(learn.model.state_dict()), before)

def test_after_an_error_the_weights_are_the_last_ones(tmp_path):
    learn = new_learner()
    last = []
    class Last(Callback):
        def after_epoch(self, learn): last[:] = [clone(learn.model.state_dict())]
    with pytest.raises(ZeroDivisionError):
        learn.fit(9, cbs=[Last(), Results(valid_loss=[1., 2., 3.]), SaveBest(tmp_path/'a'), End(2, error=ZeroDivisionError)])
    assert same(clone(learn.model.state_dict()), last[0])

def test_a_resume_without_the_best_weights_begins_to_look_for_them_anew(tmp_path):
    best = tmp_path/'best.safetensors'
    def cbs(): return [Results(valid_loss=[1., 2., 3., 4.]), SaveBest(best), Checkpoint(tmp_path/'c', resume=True)]
    new_learner().fit(2, cbs=cbs())
    best.unlink()
    with pytest.warns(UserWarning, match='best.safetensors: expected the best weights so far, found none'): new_learner().fit(4, cbs=cbs())
    assert best.is_file()


# A loss with weights

class Centers(nn.Module):
    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(3))
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))
    def forward(self, pred, target):
        if self.training: self.seen += len(target)
        return nn.functional.cross_entropy(pred + self.centers, target)

def test_a_loss_with_weights_is_resumed_saved_and_kept(tmp_path):
    whole = new_learner(loss_func=Centers())
    whole.fit(3)
    assert whole.loss_func.centers.any() and whole.loss_func.seen == 120
    with pytest.raises(KeyboardInterrupt):
        new_learner(loss_func=Centers()).fit(3, cbs=[Checkpoint(tmp_path/'c', every=1), End(1, 'after_batch', KeyboardInterrupt)])
    again = new_learner(7, loss_func=Centers())
    again.fit(3, cbs=Checkpoint(tmp_path/'c', resume=True))
    assert same(again.loss_func.state_dict(), whole.loss_func.state_dict()) and same(again.model.state_dict(), whole.model.state_dict())
    assert same(again.opt.state_dict(), whole.opt.state_dict())
    best = new_learner(loss_func=Centers())
    best.fit(3, cbs=[Results(valid_loss=[2., 1., 3.]), SaveBest(tmp_path/'best')])
    two = new_learner(loss_func=Centers())
    two.fit(2)
    assert same(best.loss_func.state_dict(), two.loss_func.state_dict()) and best.loss_func.seen == 80
    load_weights(net(), tmp_path/'best')  # the model's part alone is the model's
    from safetensors.torch import load_file
    assert sorted(k for k in load_file(tmp_path/'best') if k.startswith('loss_func.')) == ['loss_func.centers', 'loss_func.seen']

def test_a_model_that_has_a_loss_of_its_own(tmp_path):
    "Its names are its own; with another loss beside it, they could not be told apart in a file of weights."
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.loss_func = net(), Centers()
        def forward(self, x): return self.net(x)
    one, two = new_learner(model=Model()), new_learner(model=Model())
    one.fit(1, cbs=SaveBest(tmp_path/'a'))
    one.save(tmp_path/'b.pt'), one.save(tmp_path/'b.safetensors')
    for name in ('b.pt', 'b.safetensors'): assert same(two.load(tmp_path/name).model.state_dict(), one.model.state_dict())
    both = new_learner(model=Model(), loss_func=Centers())
    with pytest.raises(CheckpointError, match='found loss_func.centers'): both.fit(1, cbs=SaveBest(tmp_path/'c'))
    both.fit(1)
    both.save(tmp_path/'d.pt')
    assert same(new_learner(model=Model(), loss_func=Centers()).load(tmp_path/'d.pt').model.state_dict(), both.model.state_dict())

def test_learners_with_more_and_with_fewer_modules(tmp_path):
    plain, more = new_learner(), new_learner(loss_func=Centers())
    for learn, name in ((plain, 'plain'), (more, 'more')):
        learn.fit(1)
        learn.save(tmp_path/f'{name}.pt'), learn.save(tmp_path/f'{name}.safetensors')
    for learn, name, words in ((plain, 'more', r'loss_func.centers not at all, found \(3,\)'),
                               (more, 'plain', r'loss_func.centers \(3,\), found none')):
        for suffix in ('.pt', '.safetensors'):
            before = everything(learn)
            with pytest.raises(CheckpointError, match=f'{name}{suffix}: .*{words}'): learn.load(tmp_path/f'{name}{suffix}')
            assert same(everything(learn), before)

def test_a_plain_model_file_looks_as_it_did(tmp_path):
    from safetensors.torch import save
    model = net()
    save_weights(model, tmp_path/'a')
    assert (tmp_path/'a').read_bytes() == save({k: v.clone() for k, v in model.state_dict().items()}, metadata={'format': 'pt'})


# Extra state

class Extra(nn.Linear):
    "Remembers something that is no tensor."
    def __init__(self, value=None):
        super().__init__(4, 3)
        self.value = value
    def get_extra_state(self): return self.value
    def set_extra_state(self, value): self.value = value

PLAIN = [3, -0.5, float('inf'), 'vier', None, True, [1, [2.5]], (1, (2,)), {'a': {1: 'b', (1, 2): None}}, OrderedDict(a=1), b'\0\xff',
         {'t': torch.arange(3), 'u': [torch.ones(2, 2, dtype=torch.bfloat16)]}, torch.zeros(0), {}, [], 'ü\n"', 2**70]

@pytest.mark.filterwarnings('ignore:the checkpoint has the state')
@pytest.mark.parametrize('value', PLAIN, ids=repr)
def test_plain_extra_state_comes_back(value, tmp_path):
    "With weights, with a checkpoint, with a fit that is resumed, and from the best epoch."
    for save, load in ((save_weights, load_weights), (lambda m, p: new_learner(model=m).save(p.with_suffix('.pt')),
                                                      lambda m, p: new_learner(model=m).load(p.with_suffix('.pt')))):
        one, two = nn.Sequential(Extra(value)), nn.Sequential(Extra('other'))
        save(one, tmp_path/'a.safetensors')
        load(two, tmp_path/'a.safetensors')
        assert same(two[0].value, value) and type(two[0].value) in (type(value), dict) and torch.equal(two[0].weight, one[0].weight)
    learn = new_learner(model=Extra(value))
    learn.fit(1, cbs=[SaveBest(tmp_path/'best'), Checkpoint(tmp_path/'c')])
    assert same(learn.model.value, value)
    again = new_learner(model=Extra('other'))
    again.fit(2, cbs=Checkpoint(tmp_path/'c', resume=True))
    assert same(again.model.value, value)

@pytest.mark.parametrize('value', [object(), [lambda: 1], {'a': {1, 2}.__iter__()}, np.random.default_rng(0), Path('a')], ids=lambda v: type(v).__name__)
def test_other_extra_state_is_refused_before_the_training(value, tmp_path):
    model = nn.Sequential(Extra(value))
    before = model[0].weight.detach().clone()
    class Begun(Callback):
        order = -100
        def before_epoch(self, learn): raise ZeroDivisionError
    for cb in (SaveBest(tmp_path/'a'), Checkpoint(tmp_path/'c')):
        with pytest.raises(CheckpointError, match='expected .* found .*0._extra_state'): new_learner(model=model).fit(1, cbs=[cb, Begun()])
    for save in (lambda: save_weights(model, tmp_path/'a'), lambda: new_learner(model=model).save(tmp_path/'a.pt')):
        with pytest.raises(CheckpointError, match='0._extra_state'): save()
    assert torch.equal(model[0].weight, before) and not [*tmp_path.iterdir()]

def test_tensors_that_the_format_is_without_are_refused_before_the_training(tmp_path):
    model = nn.Linear(4, 3)
    model.register_buffer('odd', torch.eye(3).to_sparse())
    with pytest.raises(CheckpointError, match='expected tensors.*in odd'): new_learner(model=model).fit(1, cbs=SaveBest(tmp_path/'a'))

def test_a_model_that_has_no_shapes_yet(tmp_path):
    "It is refused until they are there, and takes a file's."
    lazy, model = nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(CheckpointError, match='no shape yet in 0.weight'): save_weights(lazy, tmp_path/'a')
    save_weights(model, tmp_path/'a')
    load_weights(lazy, tmp_path/'a')
    assert torch.equal(lazy[0].weight, model[0].weight)

def test_a_callback_that_keeps_odd_things_is_named_before_the_training(tmp_path):
    class Keeps(Callback):
        saved = ('thing',)
        def before_epoch(self, learn): self.thing = object()
    learn = new_learner()
    before = clone(learn.model.state_dict())
    with pytest.raises(CheckpointError, match=r"found a object in \['cbs'\].*'thing'"): learn.fit(1, cbs=[Keeps(), Checkpoint(tmp_path/'c')])
    assert same(clone(learn.model.state_dict()), before) and not (tmp_path/'c').exists()

def test_an_extra_state_that_the_model_refuses_changes_nothing(tmp_path):
    class Picky(Extra):
        def set_extra_state(self, value):
            if value == 'bad': raise RuntimeError('version bad is unknown')
            self.value = value
    save_weights(Picky('bad'), tmp_path/'a.safetensors')
    new_learner(model=Picky('bad')).save(tmp_path/'a.pt')
    for name in ('a.safetensors', 'a.pt'):
        learn = new_learner(3, model=Picky('good'))
        before = everything(learn)
        with pytest.raises(CheckpointError, match=f'{name}: .*version bad is unknown'): learn.load(tmp_path/name)
        assert same(everything(learn), before)


# Wrappers

class Pair(nn.Module):
    def __init__(self, inner=lambda m: m):
        super().__init__()
        self.encoder, self.head = inner(nn.Linear(4, 4)), nn.Linear(4, 3)
    def forward(self, x): return self.head(self.encoder(x))

def compiled(m): return torch.compile(m, backend='eager')
WRAPPED = {'DataParallel': lambda: nn.DataParallel(Pair()), 'compiled': lambda: compiled(Pair()),
           'both': lambda: nn.DataParallel(compiled(Pair())), 'both, the other way': lambda: compiled(nn.DataParallel(Pair())),
           'within': lambda: Pair(compiled), 'within a wrapper': lambda: nn.DataParallel(Pair(lambda m: nn.DataParallel(compiled(m))))}

@pytest.mark.parametrize('make', WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models(make, tmp_path):
    "Files have the plain names; they, and files with the wrappers' words, go into the plain model and into the wrapped one."
    x = torch.randn(5, 4)
    wrapped = make()
    save_weights(wrapped, tmp_path/'a')
    from safetensors.torch import load_file, save_file
    assert [*load_file(tmp_path/'a')] == sorted(Pair().state_dict())
    save_file({k: v.clone() for k, v in wrapped.state_dict().items()}, tmp_path/'words')
    torch.save(wrapped.state_dict(), tmp_path/'words.pth')
    for name in ('a', 'words', 'words.pth'):
        for other in (Pair(), make(), nn.DataParallel(Pair()), compiled(Pair())):
            load_weights(other, tmp_path/name)
            assert torch.equal(other(x), wrapped(x)), name

@pytest.mark.parametrize('make', WRAPPED.values(), ids=WRAPPED)
def test_a_training_goes_on_wrapped_or_not(make, tmp_path):
    whole = new_learner(model=(set_seed(1), Pair())[1])
    whole.fit(3)
    def learner(wrapper, seed): return new_learner(seed, model=(set_seed(1), wrapper())[1])
    for i, (first, second) in enumerate(((Pair, make), (make, Pair))):
        one = learner(first, 0)
        one.fit(1, cbs=Checkpoint(tmp_path/f'{i}'))
        one.save(tmp_path/f'{i}.pt')
        two, three = learner(second, 5), learner(second, 6)
        two.fit(3, cbs=Checkpoint(tmp_path/f'{i}', resume=True))
        three.load(tmp_path/f'{i}.pt').fit(2)
        assert [*read_checkpoint(tmp_path/f'{i}.pt')['model']] == [*Pair().state_dict()]
        for learn in (two, three):
            for a, b in zip(learn.model.parameters(), whole.model.parameters()): assert torch.equal(a, b)

class Named(nn.Module):
    "Really has the names that wrappers give."
    def __init__(self, both=False):
        super().__init__()
        self.module, self._orig_mod = nn.Linear(4, 3), nn.Linear(4, 3)
        if both: self.weight = nn.Parameter(torch.ones(3, 4))

@pytest.mark.parametrize('make', [Named, lambda: Named(True), lambda: nn.DataParallel(Named()), lambda: compiled(Named(True)),
                                  lambda: nn.Sequential(OrderedDict(module=nn.Linear(4, 3)))])
def test_names_that_a_model_really_has_stay(make, tmp_path):
    one, two = make(), make()
    save_weights(one, tmp_path/'a')
    torch.save(one.state_dict(), tmp_path/'b')
    from safetensors.torch import load_file
    plain = one if isinstance(one, (Named, nn.Sequential)) else next(one.children())
    assert [*load_file(tmp_path/'a')] == sorted(plain.state_dict())
    for name in 'ab':
        two = make()
        load_weights(two, tmp_path/name)
        assert same(two.state_dict(), one.state_dict())
    with pytest.raises(CheckpointError, match='made by another model'): load_weights(nn.Linear(3, 4), tmp_path/'a')


def test_names_that_would_be_the_same_without_the_words(tmp_path):
    "Nothing is guessed."
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.module = nn.Parameter(torch.ones(3, 4)), nn.Linear(4, 3, bias=False)
    save_weights(nn.Linear(4, 3, bias=False), tmp_path/'a')
    with pytest.raises(CheckpointError, match=r'made by another model: expected module.weight \(3, 4\), found none'):
        load_weights(Both(), tmp_path/'a')

def test_a_module_hears_which_version_of_its_class_wrote_a_checkpoint(tmp_path):
    class Versioned(nn.Linear):
        _version = 3
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.heard = local_metadata.get('version')
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
    def make(): return nn.Sequential(Versioned(4, 3))
    for first, second in ((make, make), (lambda: nn.DataParallel(make()), make), (make, lambda: nn.DataParallel(compiled(make())))):
        new_learner(model=first()).save(tmp_path/'a.pt')
        learn = new_learner(model=second()).load(tmp_path/'a.pt')
        assert [m.heard for m in learn.model.modules() if isinstance(m, Versioned)] == [3]


# What does not fit

def grouped(*sizes):
    def opt_func(params, lr):
        params, groups = list(params), []
        for n in sizes: groups, params = groups + [{'params': params[:n]}], params[n:]
        return torch.optim.AdamW(groups, lr=lr)
    return opt_func

def turned(params, lr): return torch.optim.AdamW(list(params)[::-1], lr=lr)

MISFITS = {
    'more groups': (dict(opt_func=grouped(2, 4)), r'groups of \[2, 4\] parameters, found \[6\]'),
    'fewer parameters': (dict(opt_func=lambda ps, lr: torch.optim.AdamW([*ps][:5], lr=lr)), r'\[5\] parameters, found \[6\]'),
    'another order': (dict(opt_func=turned), r'expected 3.bias \(3,\) in group 0 of the optimizer, found 0.weight \(8, 4\)'),
    'another optimizer': (dict(opt_func=torch.optim.SGD), 'state of SGD, found that of AdamW'),
    'other shapes': (dict(model=nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))), r'0.weight \(9, 4\), found \(8, 4\)'),
    'fewer names': (dict(model=nn.Sequential(nn.Linear(4, 8))), r'1.weight not at all, found \(8,\)'),
    'other numbers': (dict(model=nn.Sequential(nn.Linear(4, 8, dtype=torch.complex64), *net()[1:])), '0.weight complex, found floating')}

@pytest.mark.parametrize('options, words', MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize('used', [False, True])
def test_what_does_not_fit_leaves_everything_as_it_was(options, words, used, tmp_path):
    saved = new_learner(opt_func=torch.optim.AdamW)
    saved.fit(1, cbs=Checkpoint(tmp_path/'c'))
    saved.save(tmp_path/'a.pt')
    learn = new_learner(5, **options)
    learn.results = {'mine': 1.}
    if used:
        learn.create_opt()
        for p in learn.model.parameters(): p.grad = torch.ones_like(p)
        learn.opt.step()
    before, opt, groups = everything(learn), learn.opt, learn.opt and [*learn.opt.param_groups]
    with pytest.raises(CheckpointError, match=f'a.pt: .*{words}'): load_checkpoint(learn, tmp_path/'a.pt')
    assert same(everything(learn), before) and learn.opt is opt and (not opt or all(a is b for a, b in zip(opt.param_groups, groups)))
    if 'complex' in words or 'fewer names' in words: return
    before = [clone(learn.model.state_dict()), get_rng_state(learn.dls), learn.results]
    with pytest.raises((CheckpointError, RuntimeError)): learn.fit(1, cbs=Checkpoint(tmp_path/'c', resume=True))
    assert same([clone(learn.model.state_dict()), get_rng_state(learn.dls), learn.results], before) and not (tmp_path/'c'/'.lock').exists()

def test_an_older_checkpoint_without_names_of_parameters(tmp_path):
    "Its shapes are those of the running means."
    from exp.nb_13 import _write
    saved = new_learner(opt_func=torch.optim.AdamW)
    saved.fit(1)
    saved.save(tmp_path/'a.pt')
    state = read_checkpoint(tmp_path/'a.pt')
    del state['opt']['params'], state['modules']
    _write(state, tmp_path/'old.pt')
    new_learner(opt_func=torch.optim.AdamW).load(tmp_path/'old.pt')
    learn = new_learner(opt_func=turned)
    with pytest.raises(CheckpointError, match=r'old.pt: expected 3.bias \(3,\) in group 0'): learn.load(tmp_path/'old.pt')
    assert learn.opt is None

def test_an_optimizer_that_refuses_the_state(tmp_path):
    class Odd(torch.optim.AdamW):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            raise KeyError('warmup')
    Odd.__name__ = 'AdamW'
    saved = new_learner(opt_func=torch.optim.AdamW)
    saved.fit(1)
    saved.save(tmp_path/'a.pt')
    learn = new_learner(3, opt_func=Odd)
    learn.fit(1)
    before, group = everything(learn), learn.opt.param_groups[0]
    with pytest.raises(CheckpointError, match='a.pt: .*warmup'): learn.load(tmp_path/'a.pt')
    assert same(everything(learn), before) and learn.opt.param_groups[0] is group

@pytest.mark.parametrize('state, words', [
    (dict(), "without \\['versions'"), (dict(format='exp checkpoint, 2'), "found 'exp checkpoint, 2'"), ([1], "found 'a list'")])
def test_checkpoints_of_another_form(state, words, tmp_path):
    from exp.nb_13 import _write
    _write({'format': 'exp checkpoint, 1'} | state if isinstance(state, dict) else state, tmp_path/'a.pt')
    with pytest.raises(CheckpointError, match=f'a.pt: .*{words}'): new_learner().load(tmp_path/'a.pt')

def test_files_of_others_as_weights(tmp_path):
    model, other = net(), net()
    for name, old in (('new.pth', False), ('old.pth', True)):
        torch.save(model.state_dict(), tmp_path/name, _use_new_zipfile_serialization=not old)
        load_weights(other, tmp_path/name)
        assert same(other.state_dict(), model.state_dict())
        data = (tmp_path/name).read_bytes()
        (tmp_path/name).write_bytes(data[:len(data)//2])
        with pytest.raises(CheckpointError, match=name): load_weights(other, tmp_path/name)
    for value, words in ((model, 'not run'), ({'epoch': 1, 'state_dict': model.state_dict()}, "found a dict with \\['epoch', 'state_dict'\\]"),
                         ([1, 2], 'found a list'), ({k: v.half() for k, v in model.state_dict().items() if 'bias' in k}, 'found none')):
        torch.save(value, tmp_path/'a.pth')
        with pytest.raises(CheckpointError, match=f'a.pth: .*{words}'): load_weights(other, tmp_path/'a.pth')
    learn = new_learner()
    learn.fit(1)
    learn.save(tmp_path/'whole.pt')
    load_weights(other, tmp_path/'whole.pt')
    assert same(other.state_dict(), learn.model.state_dict())
    from safetensors.torch import save_file
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, tmp_path/'half.safetensors')
    load_weights(other, tmp_path/'half.safetensors')  # fewer digits of the same numbers are fine
    save_file({k: v.long() for k, v in model.state_dict().items()}, tmp_path/'whole.safetensors')
    with pytest.raises(CheckpointError, match='expected 0.weight floating, found whole numbers'): load_weights(other, tmp_path/'whole.safetensors')

def test_paths(tmp_path, monkeypatch):
    "Strings, `~`, folders to be made; a folder in the place of a file."
    monkeypatch.setenv('HOME', str(tmp_path)), monkeypatch.setenv('USERPROFILE', str(tmp_path))
    learn = new_learner()
    learn.fit(1, cbs=[SaveBest('~/x/best.safetensors'), Checkpoint('~/x/run')])
    learn.save('~/y/a.pt'), learn.save('~/y/z/a.SafeTensors'), save_weights(learn.model, '~/y/b')
    new_learner().load('~/y/a.pt').load('~/y/z/a.SafeTensors')
    load_weights(net(), '~/y/b')
    assert last_checkpoint('~/x/run').parent == tmp_path/'x'/'run' and (tmp_path/'x'/'best.safetensors').is_file()
    with pytest.raises(FileNotFoundError, match='none.pt'): learn.load(tmp_path/'none.pt')
    with pytest.raises(OSError, match='found a folder.*x'): learn.fit(1, cbs=SaveBest(tmp_path/'x'))
    with pytest.raises(OSError, match='y'): learn.save(tmp_path/'y')
    with pytest.raises(OSError, match='y'): load_weights(net(), tmp_path/'y')

def test_odd_things_among_the_checkpoints(tmp_path):
    "A folder with a checkpoint's name, foreign files, epochs beyond 9999."
    learn = new_learner()
    learn.fit(1, cbs=Checkpoint(tmp_path))
    (tmp_path/'epoch0009-batch000000.pt').mkdir()
    (tmp_path/'epochX-batchY.pt').write_text('?')
    with pytest.warns(UserWarning, match='epoch0009.*trying an older one'): assert last_checkpoint(tmp_path).name == 'epoch0001-batch000000.pt'
    (tmp_path/'epoch0009-batch000000.pt').rmdir()
    for name in ('epoch9999-batch000000.pt', 'epoch10000-batch000000.pt', 'epoch10000-batch1000000.pt', 'epoch10000-batch999999.pt'):
        (tmp_path/name).write_bytes((tmp_path/'epoch0001-batch000000.pt').read_bytes())
    assert last_checkpoint(tmp_path).name == 'epoch10000-batch1000000.pt'


# Several processes

WRITER = '''
import sys
from pathlib import Path
from exp.nb_13 import atomic_write
print('ready', flush=True)
sys.stdin.readline()
for i in range(100):
    with atomic_write('a.bin') as file:
        for _ in range(50): file.write(bytes([int(sys.argv[1])])*1000)
'''

def test_two_processes_write_one_file(tmp_path):
    "Neither takes the other's part away, and what is there is always one's or the other's."
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    writers = [subprocess.Popen([sys.executable, '-c', WRITER, str(i)], cwd=tmp_path, text=True, **pipes) for i in (1, 2)]
    for w in writers: w.stdout.readline()
    for w in writers: w.stdin.write('go\n'), w.stdin.flush()
    while any(w.poll() is None for w in writers):
        if (tmp_path/'a.bin').exists():
            data = (tmp_path/'a.bin').read_bytes()
            assert len(data) == 50_000 and len({*data}) == 1
        time.sleep(0.002)
    assert [w.stderr.read() for w in writers] == ['', ''] and [p.name for p in tmp_path.iterdir()] == ['a.bin']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_parts_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            with atomic_write(tmp_path/'a') as file:
                file.write(b'half')
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len([*tmp_path.glob('.a.*.part')]) == 1
    with atomic_write(tmp_path/'a') as living:
        living.write(b'slow')
        with atomic_write(tmp_path/'a') as file: file.write(b'fast')
        assert [p.name for p in tmp_path.iterdir() if p.name != 'a'] == [Path(living.name).name]
    assert (tmp_path/'a').read_bytes() == b'slow' and len([*tmp_path.iterdir()]) == 1

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_resumed_fit_removes_the_parts_of_the_killed_one(tmp_path):
    new_learner().fit(1, cbs=Checkpoint(tmp_path))
    (tmp_path/'.epoch0003-batch000001.pt.0123abcd.part').write_bytes(b'half')
    (tmp_path/'.notes.0123abcd.part').write_bytes(b"somebody else's")
    new_learner().fit(2, cbs=Checkpoint(tmp_path, resume=True))
    assert [p.name for p in tmp_path.glob('.*')] == ['.notes.0123abcd.part']

HOLDER = '''
import sys, time
sys.path.insert(0, sys.argv[1])
from test_files import *
class Wait(Callback):
    def after_batch(self, learn):
        print('training', flush=True)
        time.sleep(60)
new_learner().fit(1, cbs=[Wait(), Checkpoint(sys.argv[2], resume=True)])
'''

def hold(folder):
    process = subprocess.Popen([sys.executable, '-c', HOLDER, str(ROOT/'tests'), str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'training\n'
    return process

@pytest.mark.skipif(os.name == 'nt', reason='kills')
def test_two_processes_train_in_one_folder(tmp_path):
    "The second is told who is there, and changes nothing; a killed one is nobody."
    process = hold(tmp_path/'run')
    learn = new_learner(5)
    before = clone(learn.model.state_dict())
    with pytest.raises(CheckpointError, match=f'run: expected a folder in which nobody else trains, found .*process {process.pid} on {socket.gethostname()}'):
        learn.fit(1, cbs=Checkpoint(tmp_path/'run', resume=True))
    assert same(clone(learn.model.state_dict()), before) and (tmp_path/'run'/'.lock').exists() and process.poll() is None
    process.kill(), process.wait()
    learn.fit(1, cbs=Checkpoint(tmp_path/'run', resume=True))
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['epoch0001-batch000000.pt']

def test_two_fits_of_one_process_in_one_folder(tmp_path):
    class Within(Callback):
        def after_epoch(self, learn):
            with pytest.raises(CheckpointError, match=f'process {os.getpid()} on'): new_learner().fit(1, cbs=Checkpoint(tmp_path, resume=True))
    new_learner().fit(1, cbs=[Within(), Checkpoint(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ['epoch0001-batch000000.pt']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_children_do_not_hold_the_lock(tmp_path):
    "Such as workers of a loader, which live on for a moment after their parent was killed."
    class Fork(Callback):
        def after_epoch(self, learn):
            child = os.fork()
            if child == 0: time.sleep(30), os._exit(0)
            (tmp_path/'child').write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
    parent = os.fork()
    if parent == 0: new_learner().fit(1, cbs=[Fork(), Checkpoint(tmp_path/'run')]), os._exit(0)
    assert os.WTERMSIG(os.waitpid(parent, 0)[1]) == signal.SIGKILL and (tmp_path/'run'/'.lock').exists()
    try: new_learner().fit(1, cbs=Checkpoint(tmp_path/'run', resume=True))
    finally: os.kill(int((tmp_path/'child').read_text()), signal.SIGKILL)
    assert not (tmp_path/'run'/'.lock').exists()

@pytest.mark.parametrize('error', [CancelFit, ZeroDivisionError, KeyboardInterrupt])
def test_the_lock_is_given_back_however_the_fit_ends(error, tmp_path):
    try: new_learner().fit(3, cbs=[End(1, error=error), Checkpoint(tmp_path)])
    except (ZeroDivisionError, KeyboardInterrupt): pass
    assert not (tmp_path/'.lock').exists()
    new_learner().fit(3, cbs=Checkpoint(tmp_path, resume=True))

def test_a_folder_that_can_not_be_made_is_told_before_the_training(tmp_path):
    (tmp_path/'file').write_text('in the way')
    learn = new_learner()
    before = clone(learn.model.state_dict())
    for folder in (tmp_path/'file', tmp_path/'file'/'run'):
        with pytest.raises(OSError, match='nothing was written.*file'): learn.fit(1, cbs=Checkpoint(folder))
    assert same(clone(learn.model.state_dict()), before)


def test_a_checkpoint_of_a_machine_with_more_devices(tmp_path):
    "Random states of devices that are not here are left out."
    from exp.nb_13 import _write
    learn = new_learner()
    learn.fit(1)
    learn.save(tmp_path/'a.pt')
    state = read_checkpoint(tmp_path/'a.pt')
    state['random']['cuda'] = state['random'].get('cuda', []) + [torch.get_rng_state()[:16]]*3
    _write(state, tmp_path/'far.pt')
    near, far = new_learner(1).load(tmp_path/'a.pt'), new_learner(2)
    near.fit(1)
    far.load(tmp_path/'far.pt').fit(1)
    assert torch.equal(far.recorder.losses, near.recorder.losses)


def test_random_states_of_a_gpu_that_is_not_in_use(monkeypatch):
    "They are not asked for, since asking starts CUDA, and raises in a forked process."
    def refuse(): raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', refuse)
    assert 'cuda' not in get_rng_state()
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    with pytest.raises(RuntimeError): get_rng_state()


# Others who change the loaders, and numbers of theirs

def small_dls(n, bs=4, seed=3):
    g = torch.Generator().manual_seed(1)
    ds = Dataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))
    return DataLoader(ds, bs, shuffle=True, seed=seed), DataLoader(ds, 20)

class NewLoaders(Callback):
    "From its epoch on, another training set; made anew, or once."
    def __init__(self, at, anew): self.at, self.anew, self.made = at, anew, None
    def before_epoch(self, learn):
        if learn.epoch < self.at: return
        if self.made is None or self.anew: self.made = small_dls(24, seed=learn.epoch)
        learn.dls = self.made

class Stop(Callback):
    order = 200
    def __init__(self, epoch, iter): self.at = epoch, iter
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at, anew, stop', [(0, True, (0, 2)), (1, True, (1, 3)), (1, False, (1, 3)), (1, True, (2, 0)), (2, True, (0, 1))])
def test_a_callback_may_change_the_loaders(at, anew, stop, tmp_path):
    "Its change stays after the epoch, and the fit is resumed with it, with the order that its loader had."
    seen = []
    class See(Callback):
        order = 300
        def after_epoch(self, learn): seen.append(len(learn.dls[0]))
        def cleanup_fit(self, learn): seen.append(len(learn.dls[0]))
    whole = new_learner()
    whole.fit(3, cbs=[NewLoaders(at, anew), See(), Checkpoint(tmp_path/'whole', every=1)])
    assert seen == [6 if epoch >= at else 5 for epoch in (0, 1, 2, 2)]
    with pytest.raises(KeyboardInterrupt):
        new_learner().fit(3, cbs=[NewLoaders(at, anew), Stop(*stop), Checkpoint(tmp_path/'c', every=1)])
    again = new_learner(7)
    again.fit(3, cbs=[NewLoaders(at, anew), Checkpoint(tmp_path/'c', every=1, resume=True)])
    assert torch.equal(again.recorder.losses, whole.recorder.losses) and same(again.model.state_dict(), whole.model.state_dict())

def test_a_pass_within_a_resumed_epoch_goes_over_all_batches(tmp_path):
    class Passes(Callback):
        def __init__(self): self.rows = []
        def after_batch(self, learn):
            if learn.fitting and learn.training: self.rows.append(len(learn.get_preds(learn.dls[0])[0]))
    with pytest.raises(KeyboardInterrupt): new_learner().fit(1, cbs=[Stop(0, 2), Checkpoint(tmp_path, every=1)])
    passes = Passes()
    new_learner().fit(1, cbs=[passes, Checkpoint(tmp_path, resume=True)])
    assert passes.rows == [40, 40]

@pytest.mark.parametrize('before, after', [(2, None), (None, 2), (2, 3)])
def test_a_quick_look_is_no_epoch_of_another_fit(before, after, tmp_path):
    new_learner().fit(1, cbs=Checkpoint(tmp_path), max_batches=before)
    with pytest.raises(CheckpointError, match=f'expected max_batches {after}, as in this fit, found {before}'):
        new_learner().fit(2, cbs=Checkpoint(tmp_path, resume=True), max_batches=after)
    again = new_learner()
    again.fit(2, cbs=Checkpoint(tmp_path, resume=True), max_batches=before)
    assert len(again.recorder.losses) == 2*(before or 5)

def test_a_checkpoint_is_not_loaded_within_a_fit(tmp_path):
    "The record of the fit stays; weights may be loaded."
    new_learner(5).save(tmp_path/'a.pt'), new_learner(5).save(tmp_path/'a.safetensors')
    class Load(Callback):
        def after_epoch(self, learn):
            for load in (learn.load, partial(load_checkpoint, learn)):
                before, record, results = clone(learn.model.state_dict()), learn.recorder, learn.results
                with pytest.raises(CheckpointError, match='a.pt: expected a Learner between two fits, found one within'): load(tmp_path/'a.pt')
                assert same(clone(learn.model.state_dict()), before) and learn.recorder is record and learn.results is results
            learn.load(tmp_path/'a.safetensors')
            assert same(learn.model.state_dict(), new_learner(5).model.state_dict())
    learn = new_learner()
    learn.fit(2, cbs=Load())
    assert len(learn.recorder.epochs) == 2
    learn.load(tmp_path/'a.pt')

class Numbers(Callback):
    "Keeps numbers of numpy's, in dicts of all kinds."
    saved = ('count', 'sums', 'flag', 'seen')
    def before_fit(self, learn): self.count, self.sums, self.flag, self.seen = np.int64(0), defaultdict(float), np.bool_(False), Counter()
    def after_step(self, learn):
        learn.opt.param_groups[0]['lr'] = np.float64(0.01)/(1 + int(self.count)//3)
        self.count += 1
        self.sums[np.int64(learn.epoch)] += np.float32(0.5)
        self.flag, self.seen = np.bool_(True), self.seen + Counter([learn.iter])

class Sum(Metric):
    def __init__(self): super().__init__(accuracy, 'sum')
    def reset(self): super().reset(); self.rows_seen = defaultdict(int)
    def update(self, pred, target):
        super().update(pred, target)
        self.rows_seen['all'] += np.float64(len(target))

@pytest.mark.parametrize('stop', [(0, 3), (1, 2)])
def test_numbers_of_numpy_and_other_dicts_are_saved(stop, tmp_path):
    def learner(seed):
        learn = new_learner(seed, cbs=Metrics(train=True))
        learn.metrics = [Sum()]
        return learn
    whole, numbers = learner(0), Numbers()
    whole.fit(2, cbs=[numbers, Checkpoint(tmp_path/'whole', every=1)])
    with pytest.raises(KeyboardInterrupt): learner(0).fit(2, cbs=[Numbers(), Stop(*stop), Checkpoint(tmp_path/'c', every=1)])
    again, others = learner(7), Numbers()
    again.fit(2, cbs=[others, Checkpoint(tmp_path/'c', every=1, resume=True)])
    assert torch.equal(again.recorder.losses, whole.recorder.losses) and again.recorder.lrs == whole.recorder.lrs
    assert (others.count, others.sums, others.flag, others.seen) == (numbers.count, numbers.sums, numbers.flag, numbers.seen)
    assert type(others.sums) is defaultdict and type(others.seen) is Counter and others.sums == {0: 2.5, 1: 2.5}
    state = read_checkpoint(tmp_path/'c'/'epoch0002-batch000000.pt')
    assert type(dict(state['cbs'])['Numbers']['count']) is int and type(state['opt']['state']['param_groups'][0]['lr']) is float
    save_weights(Extra(np.float32(0.5)), tmp_path/'a')  # the same in a file of weights
    load_weights(other := Extra(), tmp_path/'a')
    assert other.value == 0.5 and type(other.value) is float

Point = namedtuple('Point', 'x y')

def test_sums_of_a_validation_need_not_be_saved(tmp_path):
    class Odd(Metric):
        def update(self, pred, target):
            super().update(pred, target)
            self.last = Point(1, 2)
    learn = new_learner()
    learn.metrics = [Odd(accuracy, 'odd')]
    learn.fit(2, cbs=Checkpoint(tmp_path, every=2))
    again = new_learner()
    again.metrics = [Odd(accuracy, 'odd')]
    again.fit(3, cbs=Checkpoint(tmp_path, resume=True))
    assert len(again.recorder.epochs) == 3


@pytest.mark.parametrize('name', '''d2_absolute_error_score d2_log_loss_score DeepImageStructureAndTextureSimilarity error_reduction loss_reduction mae_improvement
    mse_skill_score -mse error_free_rate error_detection_rate cost_savings non_error nonerror noloss sensitivity_at_fpr precision_at_fpr SpecificityAtSensitivity
    RecallAtFixedPrecision loss_gain 1/mse train_loss/valid_loss loss-valid_loss Δloss !loss нет_loss time_to_error loss_weight loss_scale error- lossless
    unaccuracy explained_error mean_time_between_errors'''.split() + ['1 - accuracy', 'loss - valid_loss', '- mse'])
def test_one_more_word_may_turn_a_name_round(name):
    with pytest.raises(ValueError, match="expected mode='min'"): Monitor(name)
    assert Monitor(name, mode='max').mode == 'max'

def test_names_of_known_words_alone():
    lower = 'val/loss train-loss test.loss valloss loss_0 valid_loss_epoch max_error median_absolute_error zero_one_loss CTCLoss MeanSquaredLogError'
    higher = '''recall@5 precision_at_k precision_at_10 RecallAt5 top-1-accuracy top1_acc acc@1 mAP@50 mAP_0.5 f1_macro roc_auc_score average-precision
        win_rate SignalNoiseRatio CosineSimilarity testacc'''
    assert {Monitor(name).mode for name in lower.split()} == {'min'} and {Monitor(name).mode for name in higher.split()} == {'max'}


# Files that torch and safetensors load

class Tied(nn.Module):
    def __init__(self, how='parameter'):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        if how == 'parameter': self.head.weight = self.embed.weight
        if how == 'data': self.head.weight.data = self.embed.weight.data

@pytest.mark.parametrize('how', ['parameter', 'data'])
@pytest.mark.parametrize('gone', ['embed.weight', 'head.weight'])
def test_two_names_of_one_tensor(how, gone, tmp_path):
    from safetensors.torch import save_file, save_model
    set_seed(1)
    one = Tied(how)
    save_file({k: v.clone() for k, v in one.state_dict().items() if k != gone}, tmp_path/'a')
    save_model(one, str(tmp_path/'b'))
    torch.save({k: v for k, v in one.state_dict().items() if k != gone}, tmp_path/'c')
    for name in 'abc':
        for wrap in (lambda m: m, nn.DataParallel):
            two = wrap(Tied(how))
            load_weights(two, tmp_path/name)
            assert same([*two.state_dict().values()], [*one.state_dict().values()])
        alone = Tied('not')
        before = clone(alone.state_dict())
        with pytest.raises(CheckpointError, match=r'made by another model: expected (embed|head).weight \(4, 4\), found none'):
            load_weights(alone, tmp_path/name)
        assert same(clone(alone.state_dict()), before)

def test_batch_norm_without_its_counter(tmp_path):
    from safetensors.torch import save_file
    one = net()
    one(torch.randn(9, 4))
    state = {k: v for k, v in one.state_dict().items() if 'num_batches' not in k}
    save_file(state, tmp_path/'a'), torch.save(state, tmp_path/'b')
    for name in 'ab':
        two = net()
        load_weights(two, tmp_path/name)
        assert torch.equal(two[1].running_mean, one[1].running_mean) and torch.equal(two[0].weight, one[0].weight)
    save_file({k: v for k, v in one.state_dict().items() if 'running_mean' not in k}, tmp_path/'c')
    with pytest.raises(CheckpointError, match=r'expected 1.running_mean \(8,\), found none'): load_weights(two, tmp_path/'c')

class Renamed(nn.Module):
    "Knows its old names, and that its weight was flat."
    def __init__(self):
        super().__init__()
        self.new = nn.Linear(4, 3)
        self._register_load_state_dict_pre_hook(self.rename, with_module=True)  # without an underscore from torch 2.5 on
    @staticmethod
    def rename(module, state, prefix, *args):
        if f'{prefix}old' in state: state[f'{prefix}new.weight'] = state.pop(f'{prefix}old').reshape(3, 4)

@pytest.mark.parametrize('wrap', [lambda m: m, nn.DataParallel, lambda m: nn.Sequential(nn.BatchNorm1d(4), m)])
def test_a_module_that_knows_its_old_names(wrap, tmp_path):
    from safetensors.torch import save_file
    one = wrap(Renamed())
    plain = one.module if isinstance(one, nn.DataParallel) else one
    old = {k.replace('new.weight', 'old'): v.flatten() if 'new.weight' in k else v for k, v in plain.state_dict().items()}
    save_file(old, tmp_path/'a'), torch.save(old, tmp_path/'b')
    for name in 'ab':
        two = wrap(Renamed())
        load_weights(two, tmp_path/name)
        assert same(two.state_dict(), one.state_dict())
    save_file(old | {'more': torch.ones(1)}, tmp_path/'c')
    before = clone(two.state_dict())
    for other in (two, wrap(nn.Linear(4, 3))):
        with pytest.raises(CheckpointError, match='made by another model'): load_weights(other, tmp_path/'c')
    assert same(clone(two.state_dict()), before)


def test_a_model_that_was_changed_after_its_best_epoch(tmp_path):
    "The fit ends well; a warning says why the model stays as it is."
    class Prune(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 2: prune.l1_unstructured(learn.model[0], 'weight', 0.5)
    class Last(Callback):
        def after_epoch(self, learn): self.weights = clone(learn.model.state_dict())
    for end in ([], [End(2)]):
        learn, last = new_learner(), Last()
        with pytest.warns(UserWarning, match='made by another model.*the model stays as the last epoch left it') as caught:
            learn.fit(3, cbs=[Prune(), Results(valid_loss=[2., 1., 3.]), SaveBest(tmp_path/'a'), last, *end])
        assert len(caught) == 1 and '0.weight_mask' in last.weights and same(clone(learn.model.state_dict()), last.weights)
    learn = new_learner()
    learn.fit(3, cbs=[Prune(), Results(valid_loss=[3., 2., 1.]), SaveBest(tmp_path/'a')])  # the best one is a pruned one
