"More of other people's habits, kind by kind: rates that are tensors, layers that come late, records within records, odd screens."
import math, warnings
from collections import defaultdict
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_03 import accuracy, cross_entropy
from exp.nb_04 import Dataset
from exp.nb_05 import n_rows
from exp.nb_10 import Accuracy, Callback, CancelEpoch, CancelFit, Learner, Progress, Recorder, StopOnNaN
from exp.nb_15 import GradientAccumulation, GradientClip, OverfitOneBatch
from exp.nb_16 import confusion_matrix
from exp.nb_11 import Scheduler
from exp.nb_12 import EMA, AdamW
from exp.nb_13 import SaveBest
from exp.nb_30 import MixedPrecision, Record

def mlp(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def batches(n=64, bs=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return [(a, b) for a, b in zip(x.split(bs), (x @ torch.randn(4, 3, generator=g)).argmax(-1).split(bs))]

def new_learner(cbs=(), dls=None, model=mlp, cls=Learner, **kwargs):
    set_seed(42)
    return cls(model(), dls or (batches(), batches(40, seed=1)), cbs=cbs, progress=False, **kwargs)

def params(learn): return torch.cat([p.detach().reshape(-1) for p in learn.model.parameters()])

def on(event, do, **attributes): return type('Doing', (Callback,), {event: lambda self, learn: do(learn), **attributes})()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_a_confusion_matrix_of_small_integers(dtype):
    set_seed(0)
    pred, target = torch.randn(500, 12), torch.randint(12, (500,))
    assert torch.equal(confusion_matrix(pred, target.to(dtype)), confusion_matrix(pred, target))


@pytest.mark.parametrize('opt_func', [torch.optim.SGD, AdamW, torch.optim.AdamW])
@pytest.mark.parametrize('fit', [lambda l: l.fit_one_cycle(2), lambda l: l.fit_flat_cos(2), lambda l: l.fit_one_cycle(2, l.opt.param_groups[0]['lr'])])
def test_a_rate_that_is_a_tensor_stays_as_it_was(opt_func, fit):
    def rates(lr):
        learn = new_learner(lr=lr, opt_func=opt_func)
        learn.create_opt()
        fit(learn)
        return learn.recorder.lrs, learn
    lr = torch.tensor(0.1)
    (ours, learn), (expected, _) = rates(lr), rates(0.1)
    near(ours, expected)
    assert lr == 0.1 and learn.lr == 0.1


def test_a_torch_scheduler_does_not_change_the_learners_own_rate():
    class Step(Callback):
        def before_fit(self, learn): self.s = torch.optim.lr_scheduler.StepLR(learn.opt, 1, 0.5)
        def after_epoch(self, learn): self.s.step()
    learn = new_learner(Step(), lr=torch.tensor(0.1))
    learn.fit(2)
    near(learn.lr, 0.1)


def test_a_fit_within_autocast_sees_its_own_weights():
    losses = []
    def nested(learn):
        if learn.depth > 1 or learn.iter or not learn.training: return
        dls, learn.dls = learn.dls, ([batches()[0]]*6, None)
        learn.fit(1, lr=0.5)
        learn.dls = dls
    note = on('after_loss', lambda learn: losses.append(learn.loss.item()) if learn.depth == 2 else None, order=50)
    new_learner([on('before_batch', nested, order=50), note, MixedPrecision()]).fit(1)
    assert len(losses) == 6 and all(b < a - 0.01 for a, b in zip(losses, losses[1:]))


def test_an_average_within_autocast_is_not_trained_on():
    def run(look):
        learn = new_learner([EMA(0.5), MixedPrecision(), on('before_batch', look, order=50)], lr=0.5)
        learn.fit(2)
        return learn.recorder.losses
    assert torch.equal(run(lambda learn: learn.validate() if learn.depth == 1 and learn.training else None), run(lambda learn: None))


class Squares(Learner):
    def n_rows(self): return len(self.yb)
    def get_loss(self): self.loss = ((self.pred - self.yb)**2).sum(1).mean()

def test_a_loss_of_ones_own_is_weighed_by_rows():
    b = [(torch.zeros(8, 3), torch.ones(8, 3).long()), (torch.zeros(8, 9), 3*torch.ones(8, 9).long())]
    near(Squares(nn.Identity(), (b, b), progress=False).validate()['valid_loss'], 42.)
    class Absolute(Learner):
        def get_loss(self): self.loss = (self.pred[:, 0] - self.yb).abs().mean()
    b = [(torch.zeros(4, 3), torch.tensor([1, -100, 3, 4])), (torch.zeros(4, 3), torch.tensor([1, 2, 3, 4]))]
    near(Absolute(nn.Identity(), (b, b), progress=False).validate()['valid_loss'], (108/4 + 10/4)/2)
    class Regularised(Learner):
        "Adds to what the loss function gives: the mean goes over the same as before."
        def get_loss(self):
            super().get_loss()
            self.loss = self.loss + 1
    b = [(torch.randn(4, 3), torch.tensor([1, -100, -100, -100])), (torch.randn(4, 3), torch.tensor([1, 2, 0, 1]))]
    plain = Learner(nn.Identity(), (b, b), progress=False).validate()['valid_loss']
    near(Regularised(nn.Identity(), (b, b), progress=False).validate()['valid_loss'], plain + 1)


def test_soft_targets_are_weighed_by_the_rows_that_the_learner_counts():
    class Rows(Learner):
        def n_rows(self): return self.yb.shape[1]
    g = torch.Generator().manual_seed(0)
    b = [(torch.randn(t, n, 3, generator=g), torch.rand(t, n, 3, generator=g)) for t, n in ((5, 2), (5, 8))]
    by_hand = sum(F.cross_entropy(x, y)*x.shape[1] for x, y in b)/10
    near(Rows(nn.Identity(), (b, b), progress=False).validate()['valid_loss'], by_hand)


class NoLength:
    def __init__(self, batches): self.batches = batches
    def __iter__(self): return iter(self.batches)

def test_the_last_step_of_an_accumulation_is_clipped_too():
    def run(dl):
        learn = new_learner([GradientAccumulation(3), GradientClip(0.05)], dls=(dl, None))
        learn.fit(2)
        return params(learn)
    near(run(NoLength(batches())), run(batches()), rtol=1e-6)


def test_callbacks_change_the_gradients_of_closures():
    lbfgs = partial(torch.optim.LBFGS, max_iter=3)
    def zero(learn):
        for p in learn.model.parameters(): p.grad.zero_()
    learn = new_learner(on('after_backward', zero), opt_func=lbfgs)
    before = params(learn)
    learn.fit(1)
    assert torch.equal(before, params(learn))
    with pytest.raises(ValueError, match='without a closure'): new_learner(MixedPrecision(), opt_func=lbfgs).fit(1)


@pytest.mark.parametrize('head', [lambda: nn.Linear(8, 3), lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))])
@pytest.mark.parametrize('opt_func', [AdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_a_sweep_after_a_new_head(head, opt_func):
    def run(sweep):
        learn = new_learner(opt_func=opt_func, lr=0.01)
        learn.fit(2)
        learn.model[2] = head()
        with warnings.catch_warnings(action='ignore'):
            if sweep: learn.lr_find(plot=False, steps=20)
        learn.fit(1)
        return params(learn)
    assert torch.equal(run(True), run(False))


def test_a_fit_within_a_fit_leaves_results_and_record():
    class Nested(Callback):
        order = 0
        def after_epoch(self, learn):
            if learn.depth > 1: return
            self.was, dls = learn.results['valid_loss'], learn.dls
            learn.dls = batches(), None
            learn.fit(1, lr=1e-9, cbs=Recorder())
            learn.dls = dls
    learn = new_learner(nested := Nested())
    learn.fit(2)
    assert learn.recorder.epochs[1]['valid_loss'] == nested.was and len(learn.recorder.losses) == 8 and len(learn.recorder.epochs) == 2


def test_a_new_rate_is_used_in_proportion_or_it_is_said():
    def groups(ps, lr): return torch.optim.SGD([dict(params=list(ps)[:2], lr=lr/10), dict(params=list(ps)[2:], lr=lr)], lr)
    learn = new_learner(opt_func=groups, lr=0.1)
    learn.fit(1)
    learn.lr = 1.
    learn.fit(1)
    near([g['lr'] for g in learn.opt.param_groups], [0.1, 1.])
    learn.opt.param_groups[0]['lr'] = 0.7
    learn.lr = 2.
    with pytest.warns(UserWarning, match='lr is 2 now, but something else has changed the rates'): learn.fit(1)
    for wrong in (-1., math.nan, math.inf):
        learn.lr = wrong
        with pytest.raises(ValueError, match='at least 0, got'): learn.fit(1)
    learn.lr, learn.opt.param_groups[0]['lr'] = 2., -1.
    with pytest.raises(ValueError, match='at least 0, got -1'): learn.fit(1)


def test_top_losses_by_the_learners_own_loss():
    class Own(Learner):
        def get_loss(self): self.loss = F.mse_loss(self.pred[:, 0], self.yb.float())
    learn = new_learner(cls=Own)
    preds, targets = learn.get_preds()
    near(learn.top_losses(3)[0], (preds[:, 0] - targets).square().sort(descending=True).values[:3])
    weight = torch.tensor([1., 5., 0.1])
    learn = new_learner(loss_func=nn.CrossEntropyLoss(weight))
    preds, targets = learn.get_preds()
    near(learn.top_losses(3)[0], F.cross_entropy(preds, targets, weight, reduction='none').sort(descending=True).values[:3])


def test_rows_of_targets_of_several_fields():
    assert n_rows((torch.zeros(24), torch.full((8,), 3)), [torch.zeros(8, 5)]) == 8
    assert n_rows(dict(scale=torch.ones(2), y=torch.zeros(30)), [torch.zeros(30, 4)]) == 30
    with pytest.raises(ValueError, match='found 2 or 30'): n_rows(dict(scale=torch.ones(2), y=torch.zeros(30)), [torch.zeros(7, 4)])


def test_gradients_that_nobody_uses_do_not_clip_the_others():
    def run(freeze):
        learn = new_learner(GradientClip(0.1), opt_func=lambda ps, lr: torch.optim.SGD(list(ps)[-2:], lr))
        if freeze: learn.model[0].requires_grad_(False)
        learn.fit(5)
        return params(learn)
    near(run(True), run(False))


def test_a_recorded_step_notices_another_loss():
    swap = lambda: on('after_epoch', lambda learn: setattr(learn, 'loss_func', lambda p, t: 0.5*F.cross_entropy(p, t)))
    losses = []
    for cbs in ([swap()], [Record(), swap()]):
        learn = new_learner(cbs)
        learn.fit(2)
        losses.append(learn.recorder.losses)
    assert torch.equal(*losses)


def test_a_layer_that_comes_during_the_last_epoch_is_told():
    late = on('after_batch', lambda learn: learn.model.__setitem__(2, nn.Linear(8, 3)) if learn.training and learn.iter == 1 else None)
    with pytest.warns(UserWarning, match='2.weight, 2.bias came during the last epoch'): new_learner(late).fit(1)


def test_a_new_head_trains_at_the_rate_of_the_old_one():
    def groups(ps, lr): return torch.optim.SGD([dict(params=list(ps)[2:]), dict(params=list(ps)[:2], lr=lr/100)], lr)
    learn = new_learner(opt_func=groups)
    learn.fit(1)
    learn.model[2] = nn.Linear(8, 3)
    learn.fit(1)
    assert [len(g['params']) for g in learn.opt.param_groups] == [2, 2] and learn.opt.param_groups[0]['params'][0] is learn.model[2].weight


class Subclass(nn.CrossEntropyLoss): pass

@pytest.mark.parametrize('make', [Subclass, lambda w: torch.compile(nn.CrossEntropyLoss(w), backend='eager'), lambda w: partial(F.cross_entropy, weight=w),
                                  lambda w: partial(cross_entropy, weight=w.tolist())])
def test_losses_that_are_cross_entropies_in_other_clothes(make):
    weight = torch.tensor([1., 5., 0.1])
    expected = new_learner(GradientAccumulation(2), loss_func=nn.CrossEntropyLoss(weight))
    learn = new_learner(GradientAccumulation(2), loss_func=make(weight))
    for each in (learn, expected): each.fit(1)
    near([*learn.results.values()], [*expected.results.values()])
    near(params(learn), params(expected))


def test_a_loss_that_is_changed_between_fits_is_asked_again():
    learn = new_learner(loss_func=nn.CrossEntropyLoss(torch.ones(3)))
    learn.validate()
    learn.loss_func.weight = torch.tensor([1., 5., 0.1])
    near(learn.validate()['valid_loss'], learn.loss_func(*learn.get_preds()))


@pytest.mark.parametrize('bs', [5, 10, 40])
def test_a_sum_is_shown_per_row(bs):
    learn = new_learner(loss_func=nn.CrossEntropyLoss(reduction='sum'), metrics=partial(F.cross_entropy, reduction='sum'))
    expected = new_learner().validate()['valid_loss']
    found = learn.validate(batches(40, bs, seed=1))
    near([*found.values()], [expected]*2)
    with pytest.raises(ValueError, match='that is a mean'): learn.fit(1, cbs=GradientAccumulation(2))


def test_a_loader_with_an_attribute_start():
    class Mine(list): start = 100
    learn = new_learner(dls=(Mine(batches()), None))
    learn.fit_one_cycle(1, 0.1, max_batches=2)
    assert len(learn.recorder.losses) == 2


def test_one_batch_is_the_same_each_time():
    shrink = on('before_batch', lambda learn: learn.batch[0].mul_(0.5))
    means = []
    note = on('after_batch', lambda learn: means.append(learn.batch[0].abs().mean().item()))
    new_learner([shrink, note, OverfitOneBatch(4)]).fit(1)
    assert len(set(means)) == 1


def test_buffers_that_no_file_has_come_back_from_a_sweep():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer('n', torch.zeros(()), persistent=False)
        def forward(self, x):
            self.n += 1
            return super().forward(x)
    learn = new_learner(model=Counts)
    learn.lr_find(plot=False, steps=20)
    assert learn.model.n == 0


def test_a_lazy_model_can_be_swept_first():
    learn = new_learner(model=lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)))
    learn.lr_find(plot=False, steps=20)
    learn.fit(1)


def test_datasets_are_taken_in_batches_or_refused():
    x, y = (torch.cat(f) for f in zip(*batches(40, seed=1)))
    learn = new_learner()
    for ds in (Dataset(x, y), torch.utils.data.TensorDataset(x, y)):
        near(learn.get_preds(ds)[0], learn.get_preds()[0])
        near(learn.validate(ds)['valid_loss'], learn.validate()['valid_loss'])
        with pytest.raises(TypeError, match='loaders of batches in dls, got a dataset'): Learner(mlp(), (ds, None))


class FromDicts(Learner):
    @property
    def xb(self): return [self.batch['x']]
    @property
    def yb(self): return self.batch['y']

def test_inputs_alone_for_a_learner_with_batches_of_its_own():
    x = batches()[0][0]
    learn = new_learner(cls=FromDicts)
    near(learn.predict(dict(x=x)), new_learner().predict(x))
    assert learn.get_preds([dict(x=x)])[1] is None
    with pytest.raises(TypeError, match='one batch as this Learner takes them, got 2 inputs'): learn.predict(x, x)


@pytest.mark.parametrize('error', [RuntimeError, TypeError, KeyError, NotImplementedError, OSError])
def test_a_screen_that_fails_in_any_way(error, monkeypatch):
    class Screen:
        live, rows = True, []
        def update(self, learn): raise error('gone')
        def row(self, row): raise error('gone')
        def close(self): raise error('gone')
    monkeypatch.setattr(Progress, 'find_screen', lambda self, progress: Screen())
    learn = new_learner(Progress(every=0))
    learn.fit(2)
    assert len(learn.recorder.epochs) == 2


def test_a_model_with_whole_numbers_can_be_frozen():
    class Counted(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 8), nn.Linear(8, 3))
            self.n = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)
    learn = new_learner(model=Counted)
    learn.freeze_to(-1)
    learn.unfreeze()


def test_metrics_by_name_and_what_is_none():
    learn = new_learner(metrics={'acc': accuracy, 'again': Accuracy().func})
    learn.fit(1)
    assert learn.results['acc'] == learn.results['again']
    for wrong, said in ((Accuracy, 'class Accuracy: call it'), ('accuracy', "got 'accuracy'"), ([accuracy, None], 'got None'), (3, 'got 3')):
        with pytest.raises(TypeError, match=said): new_learner(metrics=wrong).fit(1)


@pytest.mark.parametrize('call, error, said', [
    (lambda: Scheduler(lr=0.1), ValueError, 'function of progress for lr, got 0.1'), (lambda: GradientClip('1'), ValueError, "max_norm above 0, got 1"),
    (lambda: new_learner(dls=(batches(), None)).show_results(), ValueError, 'got None'), (lambda: new_learner().fit_one_cycle(1, 0.1, moms=0.9), ValueError, 'three momenta'),
    (lambda: new_learner().fit(1, lr=slice('a', 'b')), ValueError, 'numbers in a slice'), (lambda: new_learner(opt_func=lambda ps, lr: object()).fit(1), TypeError, 'as in torch.optim')])
def test_clear_words(call, error, said):
    with pytest.raises(error, match=said): call()


@pytest.mark.parametrize('cancel', [CancelFit, CancelEpoch])
def test_a_pass_that_is_cut_short(cancel):
    class Single(Callback):
        def after_batch(self, learn): raise cancel
    learn = new_learner(Single())
    near(learn.validate()['valid_loss'], new_learner().validate(batches(40, seed=1)[:1])['valid_loss'])


@pytest.mark.parametrize('name', ['validation_end', 'test_begin', 'optimizer_step', 'trigger_epoch', 'loss_computed', 'run_start', 'epoch_completed'])
def test_more_names_of_events(name):
    with pytest.raises(TypeError, match=f'Ported.{name}: did you mean'): type('Ported', (Callback,), {name: lambda self, learn: None})


def test_an_optimizer_without_a_rate():
    class Adafactor(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, 0.1)
            for g in self.param_groups: g['lr'] = None
        def step(self, closure=None):
            for g in self.param_groups: g['lr'] = 0.1
            super().step(closure)
            for g in self.param_groups: g['lr'] = None
    learn = new_learner(StopOnNaN(), opt_func=Adafactor)
    learn.fit(1)
    assert all(math.isnan(lr) for lr in learn.recorder.to_dict()['lrs'])


def test_numbers_of_numpy_in_a_metric():
    class Mine:
        def __init__(self): self.reset()
        def reset(self): self.values, self.v, self.by = [], np.float64(0), defaultdict(list)
        def update(self, pred, target): self.v = np.mean([self.v, 1.])
        def compute(self): return self.v
    learn = new_learner(metrics=Mine())
    learn.fit(1)
    state = learn.cbs[0].state_dict()[False][1]
    assert type(state['v']) is float and 'by' not in state


def test_averaged_and_best(tmp_path):
    learn = new_learner([EMA(0.5), SaveBest(tmp_path/'best.safetensors')])
    learn.fit(3)
    near(learn.validate()['valid_loss'], min(row['valid_loss'] for row in learn.recorder.epochs))


def test_a_loader_that_fills_the_same_tensors_again():
    class Reused:
        def __init__(self, batches): self.batches = batches
        def __iter__(self):
            x, y = torch.empty(4, 4), torch.empty(4, dtype=torch.long)
            for a, b in self.batches:
                x.copy_(a), y.copy_(b)
                yield x, y
    g = torch.Generator().manual_seed(0)
    b = [(torch.randn(4, 4, generator=g), torch.where(torch.arange(4) < i % 4, -100, torch.randint(3, (4,), generator=g))) for i in range(8)]
    learn = new_learner()
    near([*learn.validate(Reused(b)).values()], [*learn.validate(b).values()])
    preds, targets = learn.get_preds(b)
    near(learn.validate(Reused(b))['valid_loss'], F.cross_entropy(preds, targets))
    assert torch.equal(learn.get_preds(Reused(b))[1], targets)
