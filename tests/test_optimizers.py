"Optimizers in the hands of people who freeze, move, copy, save and hook; the mathematics is checked in the notebook."
import copy, io, pickle
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_04 import Dataset, DataLoader
from exp.nb_10 import Device, GradientAccumulation, GradientClip, Learner
from exp.nb_12 import EMA, SGD, Adam, AdamW, BaseOptimizer, Muon, RMSProp, newton_schulz

PAIRS = {'SGD': (partial(SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1)),
         'momentum': (partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
                      partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)),
         'RMSProp': (partial(RMSProp, lr=0.01, weight_decay=0.1), partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.1)),
         'Adam': (partial(Adam, lr=0.01, weight_decay=0.1), partial(torch.optim.Adam, lr=0.01, weight_decay=0.1)),
         'AdamW': (partial(AdamW, lr=0.01, weight_decay=0.1), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1))}
pairs = pytest.mark.parametrize('ours, theirs', PAIRS.values(), ids=PAIRS)
ours_only = pytest.mark.parametrize('ours', [o for o, _ in PAIRS.values()] + [partial(Muon, lr=0.02)], ids=[*PAIRS, 'Muon'])

def new_model():
    set_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()

def run(model, opt, n, seed=0, before=lambda i: None):
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        before(i)
        x, y = torch.randn(16, 6, generator=g, dtype=next(model.parameters()).dtype), torch.randint(3, (16,), generator=g)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()

def same(a, b, rtol=1e-9):
    for p, q in zip(a.parameters(), b.parameters(), strict=True): near(p, q, rtol, 1e-12)

def both(ours, theirs, use):
    "Two models, one trained by each in the same way."
    models = []
    for make_opt in (ours, theirs):
        model = new_model()
        use(model, make_opt)
        models.append(model)
    return models


@pairs
def test_a_checkpoint_file_goes_both_ways(ours, theirs):
    "Through torch.save and a load that runs no code."
    def through_file(first, second):
        model = new_model()
        opt = first(model.parameters())
        run(model, opt, 20)
        file = io.BytesIO()
        torch.save(dict(model=model.state_dict(), opt=opt.state_dict()), file)
        file.seek(0)
        saved, model = torch.load(file, weights_only=True), new_model()
        model.load_state_dict(saved['model'])
        opt = second(model.parameters())
        opt.load_state_dict(saved['opt'])
        run(model, opt, 20, seed=1)
        return model
    expected = through_file(theirs, theirs)
    for first, second in ((ours, ours), (ours, theirs), (theirs, ours)): same(through_file(first, second), expected)


@pairs
def test_gradients_put_in_by_hand_cleared_by_the_model_or_clipped(ours, theirs):
    def use(model, make_opt):
        opt = make_opt(model.parameters())
        run(model, opt, 3)
        for p in model.parameters(): p.grad = torch.ones_like(p)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        model.zero_grad()
        run(model, opt, 3)
        for p in model.parameters(): p.grad = torch.full_like(p, 9.)
        opt.zero_grad()
        run(model, opt, 3)
    same(*both(ours, theirs, use))


@pairs
def test_a_layer_frozen_at_first_and_thawed_later(ours, theirs):
    "Its step count begins when it first moves, as PyTorch's does."
    def use(model, make_opt):
        opt = make_opt(model.parameters())
        model[0].requires_grad_(False)
        run(model, opt, 10, before=lambda i: model[0].requires_grad_(i >= 5))
        assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) <= 6
    same(*both(ours, theirs, use))


@pairs
def test_a_layer_frozen_in_the_middle(ours, theirs):
    def use(model, make_opt):
        def freeze(i):
            model[0].requires_grad_(not 5 <= i < 10)
            if i == 5: model[0].zero_grad()  # PyTorch would go on with the last gradient
        run(model, make_opt(model.parameters()), 15, before=freeze)
    same(*both(ours, theirs, use))


@pairs
def test_a_group_added_later(ours, theirs):
    def use(model, make_opt):
        opt = make_opt(model[4].parameters())
        run(model, opt, 5)
        opt.add_param_group(dict(params=list(model[0].parameters()), lr=0.003))
        model.zero_grad()
        run(model, opt, 5)
    same(*both(ours, theirs, use))


@ours_only
def test_copies_and_pickles_go_on_alike(ours):
    model = new_model()
    opt = ours(model.parameters())
    run(model, opt, 10)
    copied, pickled = copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), copied, pickled): run(m, o, 10, seed=1)
    same(copied[0], model)
    same(pickled[0], model)


@ours_only
def test_precision_and_place_may_change_on_the_way(ours):
    model = new_model()
    opt = ours(model.parameters())
    run(model, opt, 5)
    model.float()
    run(model, opt, 5)
    assert all(v.dtype is torch.float32 for s in opt.state_dict()['state'].values() for v in s.values())
    before = [p.clone() for p in model.parameters()]
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    opt2 = ours(model.parameters())
    run(model, opt2, 1)
    assert not any(map(torch.equal, before, model.parameters()))


def test_steps_by_themselves_move_nothing_that_has_no_gradient():
    model = new_model()
    opt = SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    opt.step()
    assert all(map(torch.equal, before, model.parameters()))
    model(torch.ones(1, 6).double()).sum().backward()
    model.zero_grad()
    opt.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_memory_order_is_kept():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    opt = SGD(conv.parameters(), lr=0.1)
    before = conv.weight.detach().clone()
    conv(torch.randn(2, 3, 5, 5)).sum().backward()
    grad = conv.weight.grad.clone()
    opt.step()
    assert conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    near(conv.weight, before - 0.1*grad)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.a(x))[:, :3]
    models = []
    for cls in (SGD, torch.optim.SGD):
        set_seed(0)
        models.append(Tied().double())
        run(models[-1], cls(models[-1].parameters(), lr=0.1, momentum=0.9), 10)
    same(*models)
    assert models[0].a.weight is models[0].b.weight


def test_hooks_closures_and_schedulers():
    model, calls = new_model(), []
    opt = SGD(model.parameters(), lr=0.1)
    handles = [opt.register_step_pre_hook(lambda *a: calls.append('pre')), opt.register_step_post_hook(lambda *a: calls.append('post'))]
    def closure():
        opt.zero_grad()
        loss = model(torch.ones(1, 6).double()).square().sum()
        loss.backward()
        return loss
    assert opt.step(closure) > opt.step(closure) and calls == ['pre', 'post']*2
    for handle in handles: handle.remove()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.step(closure)
    scheduler.step()
    assert opt.param_groups[0]['lr'] == 0.05 and calls == ['pre', 'post']*2


@pytest.mark.parametrize('options, said', [(dict(lr=-1), 'lr of at least 0, got -1'), (dict(weight_decay=-0.1), 'weight_decay'), (dict(momentum=1), 'below 1'),
                                           (dict(nesterov=True), 'momentum above 0')])
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said): SGD(new_model().parameters(), **options)


def test_wrong_checkpoints_and_parameters():
    with pytest.raises(ValueError, match='betas'): Adam(new_model().parameters(), betas=(0.9, 1.))
    with pytest.raises(ValueError, match='empty'): SGD([])
    amsgrad = torch.optim.Adam(new_model().parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match='amsgrad=False, got True'): Adam(new_model().parameters()).load_state_dict(amsgrad)
    with pytest.raises(ValueError, match='group'): Adam(new_model().parameters()).load_state_dict(torch.optim.Adam([torch.zeros(1)]).state_dict())


def test_an_optimizer_of_ones_own():
    class Sign(BaseOptimizer):
        def __init__(self, params, lr=0.1): super().__init__(params, lr=lr)
        def update(self, params, grads, lr): torch._foreach_add_(params, torch._foreach_sign(grads), alpha=-lr)
    w = nn.Parameter(torch.tensor([1., -2.]))
    opt = Sign([w])
    (w*w).sum().backward()
    opt.step()
    near(w, [0.9, -1.9])


def test_muon_takes_the_hidden_matrices():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    groups = Muon(conv.parameters()).param_groups
    assert [(g['muon'], [p.ndim for p in g['params']]) for g in groups] == [(True, [4, 4]), (False, [1, 1, 1, 1, 2, 1])]
    assert [g['muon'] for g in Muon(nn.Linear(2, 2).parameters()).param_groups] == [False]
    with pytest.raises(ValueError, match='ratio'): Muon(conv.parameters(), ratio=-1)


@pytest.mark.parametrize('shape', [(1, 1), (7, 7), (3, 50), (50, 3), (1, 9)])
def test_newton_schulz_against_svd(shape):
    "All singular values near one, the same singular vectors, for every shape."
    set_seed(1)
    g = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    out = newton_schulz(g)
    middle = u.T @ out @ v.T
    near(middle, middle.diag().diag(), atol=1e-9)
    assert (s/s.norm()).min() < 0.003 or 0.6 < middle.diag().min() and middle.diag().max() < 1.25


# In a Learner

def data(n): return Dataset(torch.randn(n, 6), torch.randint(3, (n,)))

def new_learner(opt_func, cbs=(), **kwargs):
    set_seed(42)
    return Learner(Model(6, 8, 3), (DataLoader(data(96), 8, seed=0, shuffle=True), DataLoader(data(32), 8)), opt_func=opt_func, lr=0.05,
                   cbs=cbs, progress=False, **kwargs)

@pytest.mark.parametrize('cbs', [(), (Device('cpu'),), (GradientClip(0.1),), (GradientAccumulation(3), GradientClip(0.1))], ids=['plain', 'device', 'clip', 'accumulate'])
@pytest.mark.parametrize('ours, theirs', [(SGD, torch.optim.SGD), (Adam, torch.optim.Adam)], ids=['SGD', 'Adam'])
def test_in_a_learner(ours, theirs, cbs):
    ours, theirs = new_learner(ours, cbs), new_learner(theirs, cbs)
    for learn in (ours, theirs): learn.fit(2)
    near(ours.recorder.losses, theirs.recorder.losses, rtol=1e-4)


def test_an_averaged_model():
    "Validated with the mean, trained without it, interrupted without harm."
    plain, ema, single = new_learner(SGD), new_learner(SGD, EMA(0.9)), new_learner(SGD, EMA(0.))
    for learn in (plain, ema, single): learn.fit(3)
    assert torch.equal(plain.recorder.losses, ema.recorder.losses)
    assert ema.validate() == {k: v for k, v in ema.results.items() if k != 'train_loss'} != plain.validate()
    assert single.validate() == plain.validate()
    with pytest.raises(ValueError, match='got 1'): EMA(1)


def test_an_averaged_model_interrupted_while_validating():
    class Stop(Exception): pass
    def loss_func(pred, yb):
        if not torch.is_grad_enabled(): raise Stop
        return F.cross_entropy(pred, yb)
    plain, ema = new_learner(SGD, loss_func=loss_func), new_learner(SGD, EMA(0.9), loss_func=loss_func)
    for learn in (plain, ema):
        with pytest.raises(Stop): learn.fit(1)
    assert all(map(torch.equal, plain.model.parameters(), ema.model.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('ours', [SGD, Adam, Muon])
def test_the_model_moves_to_cuda(ours):
    cpu, gpu = new_learner(ours), new_learner(ours, Device('cuda'))
    for learn in (cpu, gpu): learn.fit(2)
    near(gpu.recorder.losses, cpu.recorder.losses, rtol=1e-2)
    gpu.model.cpu()
    gpu.fit(1)
    assert next(gpu.model.parameters()).is_cuda
