"Optimizers in the hands of people who freeze, move, copy, save and hook; the mathematics is checked in the notebook."
import copy, io, math, pickle
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_04 import Dataset, DataLoader
from exp.nb_10 import Callback, CancelBatch, CancelEpoch, CancelFit, Learner
from exp.nb_15 import Device, GradientAccumulation, GradientClip
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


# Nothing is moved, and nothing is kept elsewhere

def pair_of_runs(make_ours, make_theirs, use):
    "The parameters after `use(model, make_opt)` with each."
    same(*both(make_ours, make_theirs, use))


@ours_only
def test_every_parameter_keeps_its_storage(ours, tmp_path):
    model = new_model()
    places = [p.data_ptr() for p in model.parameters()]
    seen = model[0].weight.detach().numpy()
    kept = model[2].weight.data
    run(model, ours(model.parameters()), 3)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 6
    assert (seen == model[0].weight.detach().numpy()).all() and torch.equal(kept, model[2].weight)
    torch.save(model[4].bias, tmp_path/'bias.pt')
    assert (tmp_path/'bias.pt').stat().st_size < 2500


@ours_only
def test_safetensors_takes_the_whole_model(ours, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    model = new_model()
    run(model, ours(model.parameters()), 2)
    safetensors.save_model(model, tmp_path/'model.safetensors')
    assert safetensors.load_file(tmp_path/'model.safetensors').keys() == model.state_dict().keys()


@pairs
@pytest.mark.parametrize('tie', [lambda a, b: setattr(b.weight, 'data', a.weight.data), lambda a, b: setattr(b, 'weight', nn.Parameter(a.weight.data)),
                                 lambda a, b: setattr(b, 'weight', nn.Parameter(a.weight.data.t()))], ids=['data', 'parameter', 'transposed'])
def test_two_parameters_on_one_storage_stay_together(ours, theirs, tie):
    if ours.func is RMSProp: theirs = partial(theirs, foreach=True)  # adds all the decay before the first of them moves, as ours
    def use(model, make_opt):
        a, b = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        tie(a, b)
        opt = make_opt([*a.parameters(), *b.parameters()])
        for _ in range(3):
            b(a(torch.ones(2, 8).double())).square().sum().backward()
            opt.step()
            opt.zero_grad()
        assert a.weight.untyped_storage().data_ptr() == b.weight.untyped_storage().data_ptr()
        with torch.no_grad(): model[2].weight.copy_(b.weight)
    pair_of_runs(ours, theirs, use)


@ours_only
def test_shared_memory_stays_shared(ours):
    model = new_model().share_memory()
    other = [p.detach().view_as(p) for p in model.parameters()]  # what another process would see
    run(model, ours(model.parameters()), 2)
    assert all(p.is_shared() for p in model.parameters()) and all(map(torch.equal, model.parameters(), other))


@pairs
def test_a_gradient_exchanged_by_its_data(ours, theirs):
    def use(model, make_opt):
        opt = make_opt(model.parameters())
        for i in range(10):
            model.zero_grad(set_to_none=i % 3 == 0)
            model(torch.ones(4, 6).double()).square().sum().backward()
            for p in model.parameters(): p.grad.data = p.grad.data*(p.grad.data > 0)
            opt.step()
    pair_of_runs(ours, theirs, use)


@pairs
def test_a_model_converted_between_a_step_and_the_next_gradient(ours, theirs):
    def use(model, make_opt):
        opt = make_opt(model.parameters())
        for i in range(4):
            if i == 2: model.float().double()
            opt.zero_grad()
            model(torch.ones(4, 6, dtype=torch.float64)).square().sum().backward()
            opt.step()
    pair_of_runs(ours, theirs, use)


@pairs
def test_parameter_groups_edited_by_hand(ours, theirs):
    "A new head put in, one taken out, a group appended, a group popped."
    def use(model, make_opt):
        extra = [nn.Linear(8, 3).double() for _ in range(2)]
        opt = make_opt([dict(params=list(model[0].parameters())), dict(params=list(model[2].parameters()), lr=0.02)])
        def step():
            for p in [*model.parameters(), *extra[0].parameters(), *extra[1].parameters()]: p.grad = torch.ones_like(p)
            opt.step()
        step()
        opt.param_groups[0]['params'] += extra[0].parameters()
        step()
        opt.param_groups[0]['params'] = opt.param_groups[0]['params'][1:]
        opt.param_groups.append({**opt.param_groups[1], 'params': list(extra[1].parameters()), 'lr': 0.03})
        step()
        opt.param_groups.pop(0)
        step()
        with torch.no_grad():
            for p, q in zip(model[4].parameters(), extra[0].parameters()): p.copy_(q)
            model[2].weight[:3] += extra[1].weight
    pair_of_runs(ours, theirs, use)


@pytest.mark.parametrize('ours, theirs', [PAIRS[k] for k in ('momentum', 'RMSProp', 'Adam', 'AdamW')])
def test_state_may_be_read_edited_and_cleared(ours, theirs):
    def use(model, make_opt):
        opt = make_opt(model.parameters())
        run(model, opt, 3)
        assert opt.state.keys() == set(model.parameters())
        for record in opt.state.values():
            for v in record.values(): v.mul_(0.5) if v.ndim else v.fill_(1.)
        run(model, opt, 2, seed=1)
        opt.state.clear()
        run(model, opt, 2, seed=2)
        opt.state = type(opt.state)(dict)
        run(model, opt, 2, seed=3)
        del opt.state[model[0].weight]
        run(model, opt, 2, seed=4)
    pair_of_runs(ours, theirs, use)


@pairs
def test_a_parameter_without_a_gradient_is_left_alone(ours, theirs):
    "No momentum, no decay, no count."
    def use(model, make_opt):
        opt = make_opt(model.parameters())
        run(model, opt, 2)
        before = model[0].weight.detach().clone()
        for _ in range(3):
            model[4](torch.ones(2, 8).double()).square().sum().backward()
            opt.step()
            opt.zero_grad()
        assert torch.equal(model[0].weight, before)
        run(model, opt, 2)
    pair_of_runs(ours, theirs, use)


@pairs
def test_a_tensor_that_asks_for_no_gradient_but_has_one(ours, theirs):
    values = []
    for make_opt in (ours, theirs):
        t = torch.ones(3, dtype=torch.float64)
        t.grad = torch.full_like(t, 0.5)
        make_opt([t]).step()
        values.append(t)
    near(values[0], values[1])
    assert not torch.equal(values[0], torch.ones(3).double())


def test_gradients_that_somebody_keeps():
    p, kept = nn.Parameter(torch.zeros(2)), []
    opt = SGD([p], lr=0.1, momentum=0.9)
    for i in range(3):
        (p*(i + 1.)).sum().backward()
        kept.append(p.grad)
        opt.step()
        opt.zero_grad()
        assert p.grad is None
    assert [g[0].item() for g in kept] == [1., 2., 3.]


@ours_only
def test_a_graph_older_than_the_step_is_noticed(ours):
    a, b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
    loss = ((a*a) @ b).square().sum()
    a.grad, b.grad = torch.ones(3, 3), torch.ones(3, 3)
    ours([a, b]).step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


@pairs
@pytest.mark.parametrize('gaps', [False, True])
def test_memory_in_an_unusual_order(ours, theirs, gaps):
    "Gradients in another order than the weights, transposed weights, and weights with gaps between them."
    def go(make_opt):
        set_seed(0)
        params = [nn.Parameter(torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)),
                  nn.Parameter(torch.randn(5, 4, dtype=torch.float64).t())]
        if gaps: params.append(nn.Parameter(torch.randn(4, 9, dtype=torch.float64)[:, 2:5]))
        opt = make_opt(params)
        for _ in range(4):
            for p in params: p.grad = torch.randn(p.shape, dtype=torch.float64)
            opt.step()
        return params
    mine, their = go(ours), go(theirs)
    for p, q in zip(mine, their): near(p, q, rtol=1e-9, atol=1e-12)
    if not gaps: return
    around = [torch.as_strided(params[2].detach(), (36,), (1,), 0) for params in (mine, their)]
    near(*around, rtol=1e-9, atol=1e-12)  # the numbers in the gaps are as they were


@pytest.mark.parametrize('ours, theirs', [PAIRS[k] for k in ('momentum', 'RMSProp', 'Adam', 'AdamW')])
def test_what_is_remembered_follows_the_order_of_memory(ours, theirs):
    "A checkpoint in the usual order, loaded for a model with channels last."
    def go(make_opt):
        set_seed(0)
        conv = nn.Conv2d(3, 4, 3).double()
        opt = make_opt(conv.parameters())
        for p in conv.parameters(): p.grad = torch.randn_like(p)
        opt.step()
        saved, conv = copy.deepcopy(opt.state_dict()), conv.to(memory_format=torch.channels_last)
        opt = make_opt(conv.parameters())
        opt.load_state_dict(saved)
        for p in conv.parameters(): p.grad = torch.randn_like(p)
        opt.step()
        return conv, opt
    (mine, opt), (their, _) = go(ours), go(theirs)
    same(mine, their)
    assert all(v.stride() == mine.weight.stride() for v in opt.state[mine.weight].values() if v.ndim)


@pairs
def test_storage_that_comes_and_goes(ours, theirs):
    def use(model, make_opt):
        opt, p = make_opt(model.parameters()), model[2].weight
        run(model, opt, 2)
        values = p.detach().clone()
        p.untyped_storage().resize_(0)
        model[4].weight.grad = torch.ones_like(model[4].weight)
        opt.step()
        p.untyped_storage().resize_(values.numel()*8)
        with torch.no_grad(): p.copy_(values)
        opt.zero_grad()
        run(model, opt, 2)
    pair_of_runs(ours, theirs, use)


def test_half_precision_momentum_is_the_momentum_of_single_precision():
    "PyTorch's fused kernel goes wrong here on CPUs, so it must not be used."
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        set_seed(0)
        p = nn.Parameter(torch.randn(100).to(dtype))
        opt = SGD([p], lr=0.1, momentum=0.9)
        for _ in range(5):
            p.grad = torch.randn(100).to(dtype)
            opt.step()
        results.append(p.detach().float())
    near(*results, rtol=0.02, atol=0.05)


# Other numbers

@pairs
def test_complex_weights(ours, theirs):
    def go(make_opt):
        set_seed(0)
        params = [nn.Parameter(torch.randn(3, 2, dtype=torch.complex128)), nn.Parameter(torch.randn(4, dtype=torch.float64))]
        opt = make_opt(params)
        for _ in range(4):
            for p in params: p.grad = torch.randn_like(p)
            opt.step()
        return params, opt
    (mine, opt), (their, twin) = go(ours), go(theirs)
    for p, q in zip(mine, their):
        near(torch.view_as_real(p) if p.is_complex() else p, torch.view_as_real(q) if q.is_complex() else q, rtol=1e-9, atol=1e-12)
        for k, v in opt.state.get(p, {}).items(): assert v.dtype is twin.state[q][k].dtype and v.shape == twin.state[q][k].shape


def test_muon_refuses_complex_weights():
    params = [nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)) for _ in range(2)]
    for p in params: p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match='Muon does not support complex'): Muon(params).step()


def sparse_run(make_opt, **options):
    set_seed(0)
    words = nn.Embedding(10, 4, sparse=True).double()
    opt = make_opt(words.parameters(), lr=0.1, **options)
    for i in range(5):
        opt.zero_grad()
        words(torch.tensor([1, i, i + 2])).square().sum().backward()
        opt.step()
    return words, opt

@pytest.mark.parametrize('options', [{}, dict(momentum=0.9), dict(momentum=0.9, nesterov=True)])
def test_sparse_gradients(options):
    (ours, _), (theirs, twin) = sparse_run(SGD, **options), sparse_run(torch.optim.SGD, **options)
    near(ours.weight, theirs.weight, rtol=1e-9)
    words, opt = sparse_run(SGD, **options)
    opt.load_state_dict(twin.state_dict())
    for p in words.parameters(): p.grad = torch.ones_like(p)
    opt.step()

@pytest.mark.parametrize('make_opt, options', [(RMSProp, {}), (Adam, {}), (AdamW, {}), (Muon, {}), (SGD, dict(weight_decay=0.1))])
def test_sparse_gradients_are_refused_by_name(make_opt, options):
    name = make_opt.__name__
    with pytest.raises(RuntimeError, match=f'sparse.*{name} does not support|{name} does not support sparse|sparse gradients {name}'):
        sparse_run(make_opt, **options)


@pairs
@pytest.mark.parametrize('shape', [(), (1,)])
def test_a_rate_that_is_a_tensor(ours, theirs, shape):
    def go(make_opt, shape):
        rate = torch.full(shape, 0.05, dtype=torch.float64)
        model = new_model()
        opt = make_opt(model.parameters(), lr=rate)
        run(model, opt, 3)
        opt.param_groups[0]['lr'].mul_(0.5)
        run(model, opt, 3)
        near(rate, torch.full(shape, 0.025).double())
        return model
    same(go(ours, shape), go(theirs, ()))  # an older PyTorch takes no other shape


def test_muon_leaves_a_rate_that_is_a_tensor_as_it_is():
    rate, models = torch.tensor(0.02), []
    for lr in (rate, 0.02):
        models.append(new_model())
        run(models[-1], Muon(models[-1].parameters(), lr=lr), 3)
    assert rate == 0.02
    same(*models, rtol=1e-5)


@pytest.mark.parametrize('cls', [SGD, RMSProp, Adam, AdamW, Muon])
@pytest.mark.parametrize('lr', ['0.1', None, -0.1, float('nan'), float('inf'), torch.tensor(-1.), torch.tensor([0.1, 0.2]), torch.tensor(float('nan')), [0.1]],
                         ids=repr)
def test_a_rate_that_is_none(cls, lr):
    if lr == [0.1]: lr = {}
    params = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match='lr'): cls(params, lr=lr)
    with pytest.raises(ValueError, match='lr'): cls([dict(params=params, lr=lr)])
    opt = cls(params)
    saved = opt.state_dict()
    saved['param_groups'][0]['lr'] = lr
    with pytest.raises(ValueError, match='lr'): opt.load_state_dict(saved)
    with pytest.raises(ValueError, match='lr'): opt.add_param_group(dict(params=[nn.Parameter(torch.ones(1))], lr=lr))
    assert opt.param_groups[0]['lr'] == opt.defaults['lr'] and len(opt.param_groups) == 1


@pytest.mark.parametrize('cls, options', [(SGD, dict(momentum=-0.1)), (SGD, dict(weight_decay='1')), (SGD, dict(weight_decay=float('nan'))), (RMSProp, dict(alpha=1.)),
                                          (RMSProp, dict(eps=-1e-8)), (Adam, dict(betas=(0.9,))), (Adam, dict(betas=0.9)), (Adam, dict(betas=(0.9, None))),
                                          (Adam, dict(betas=(0.9, -0.1))), (AdamW, dict(weight_decay=-1)), (AdamW, dict(eps=None)), (Muon, dict(ratio=-1)),
                                          (Muon, dict(momentum=1.5)), (Muon, dict(betas=(0.9, 1.)))], ids=repr)
def test_other_values_that_make_no_sense(cls, options):
    name, params = next(iter(options)), [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match=f'expected {name}'): cls(params, **options)
    group = dict(params=params, muon=name == 'momentum') if cls is Muon else dict(params=params)
    with pytest.raises(ValueError, match=f'expected {name}'): cls([group | options])


def test_a_rate_below_zero_that_comes_later():
    p = nn.Parameter(torch.ones(2))
    opt = SGD([p])
    p.grad = torch.ones(2)
    for rate in (-0.1, float('nan')):
        opt.param_groups[0]['lr'] = rate
        with pytest.raises(ValueError, match='lr of at least 0'): opt.step()
    assert torch.equal(p, torch.ones(2))


# Options that only others have

@pytest.mark.parametrize('cls', [SGD, RMSProp, Adam, AdamW, Muon])
@pytest.mark.parametrize('option', ['maximize', 'amsgrad', 'dampening', 'centered', 'foreach', 'fused', 'capturable', 'differentiable'])
def test_an_option_of_others(cls, option):
    params = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError, match=option): cls(params, **{option: True})
    with pytest.raises(ValueError, match=f'expected {option}'): cls([{'params': params, option: True}])
    opt = cls(params)
    params[0].grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=f'expected {option}'): opt.add_param_group({'params': [nn.Parameter(torch.ones(1))], option: 0.5})
    opt.param_groups[0][option] = True
    for _ in range(2):
        with pytest.raises(ValueError, match=f'expected {option}'): opt.step()
    assert torch.equal(params[0], torch.ones(2, 2))
    opt.param_groups[0][option] = False  # off: nothing is lost
    opt.step()
    assert not torch.equal(params[0], torch.ones(2, 2))


@pairs
def test_checkpoints_that_cannot_be_taken_over_change_nothing(ours, theirs):
    model = new_model()
    opt = ours(model.parameters())
    run(model, opt, 2)
    before = copy.deepcopy(opt.state_dict())
    wrong = [theirs(nn.Linear(6, 8).parameters()).state_dict(), theirs([dict(params=[p]) for p in model.parameters()]).state_dict()]
    for change in (dict(maximize=True), dict(lr=-1.)):
        wrong.append(copy.deepcopy(before))
        wrong[-1]['param_groups'][0].update(change)
    other = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)]).double()
    twin = theirs(other.parameters())
    for p in other.parameters(): p.grad = torch.ones_like(p)
    twin.step()
    if twin.state[other[0].weight]: wrong.append(twin.state_dict())
    for state in wrong:
        with pytest.raises(ValueError): opt.load_state_dict(state)
        after = opt.state_dict()
        assert after['param_groups'] == before['param_groups'] and after['state'].keys() == before['state'].keys()
        assert all(torch.equal(v, before['state'][i][k]) for i, record in after['state'].items() for k, v in record.items())


@pairs
def test_a_checkpoint_has_the_options_of_the_twin(ours, theirs):
    mine, twin = ours(new_model().parameters()), theirs(new_model().parameters())
    assert mine.state_dict()['param_groups'][0].keys() == twin.state_dict()['param_groups'][0].keys()
    assert 'maximize' not in mine.param_groups[0] and 'maximize' not in mine.defaults
    mine.load_state_dict(twin.state_dict())
    assert 'maximize' not in mine.param_groups[0] and 'differentiable' not in copy.deepcopy(mine).defaults
    fused = theirs(new_model().parameters(), foreach=True)
    mine.load_state_dict(fused.state_dict())  # says how it was computed, not what


def test_schedulers_that_look_for_a_momentum():
    with pytest.raises(ValueError, match='momentum'):
        torch.optim.lr_scheduler.CyclicLR(RMSProp(new_model().parameters()), 0.01, 0.1)
    for ours, theirs in (PAIRS['momentum'], PAIRS['Adam']):
        def use(model, make_opt):
            opt = make_opt(model.parameters())
            scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=10)
            for i in range(8):
                run(model, opt, 1, seed=i)
                scheduler.step()
        pair_of_runs(ours, theirs, use)


def test_each_kind_of_muons_groups_has_its_own_options():
    matrices, others = Muon(new_model().parameters(), momentum=0.8, betas=(0.7, 0.9)).param_groups
    assert matrices['momentum'] == 0.8 and 'betas' not in matrices and others['betas'] == (0.7, 0.9) and 'momentum' not in others
    for wrong, said in ((dict(muon=False, momentum=0.5), 'momentum=0.95, got 0.5'), (dict(muon=True, betas=(0.5, 0.5)), 'betas')):
        with pytest.raises(ValueError, match=said): Muon([dict(params=list(new_model().parameters()), **wrong)])
    opt = Muon(new_model().parameters())
    with pytest.raises((ValueError, KeyError), match='betas'): torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)
    opt.param_groups[1]['momentum'] = 0.5
    for p in opt.param_groups[1]['params']: p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match='momentum'): opt.step()


def test_muon_refuses_a_bias_among_its_matrices():
    params = list(new_model().parameters())
    with pytest.raises(ValueError, match=r'expected matrices .* got shapes \[\(8,\), \(8,\), \(3,\)\]'): Muon([dict(params=params)])
    opt = Muon(params)
    with pytest.raises(ValueError, match='matrices'): opt.add_param_group(dict(params=[nn.Parameter(torch.ones(3))]))
    assert len(opt.param_groups) == 2
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(3))], muon=False))


def test_options_of_ones_own_may_be_anything():
    class Mine(BaseOptimizer):
        def __init__(self, params, lr=0.1, rule='sign', hook=None, maximize=False): super().__init__(params, lr=lr, rule=rule, hook=hook, maximize=maximize)
        def update(self, params, grads, lr, rule, hook, maximize):
            for p, g, sums in zip(params, grads, self.recall(params, 'sums')):
                sums.add_(g)
                p.add_(getattr(sums, rule)(), alpha=lr if maximize else -lr)
    p = nn.Parameter(torch.zeros(2))
    opt = Mine([p], maximize=True)
    for _ in range(2):
        p.grad = torch.tensor([1., -3.])
        opt.step()
    near(p, [0.2, -0.2])
    opt = pickle.loads(pickle.dumps((Mine.__name__, opt.state_dict())))
    again = Mine([p])
    again.load_state_dict(opt[1])
    assert again.param_groups[0]['maximize'] is True
    near(again.state[p]['sums'], [2., -6.])


# Whoever else has a hand in a step

@pairs
def test_a_wrapper_that_puts_options_of_its_own_into_the_groups_and_defaults(ours, theirs):
    "As Lookahead does (Zhang et al., 2019), and goes on after copies and checkpoints."
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, base):
            self.base, self.defaults, self.param_groups, self.state = base, base.defaults, base.param_groups, base.state
            for options in (self.defaults, *self.param_groups): options.update(every=2, share=0.5)
            self.n, self.slow = 0, {p: p.detach().clone() for g in self.param_groups for p in g['params']}
        def step(self, closure=None):
            self.base.step(closure)
            self.n += 1
            for g in self.param_groups:
                if self.n % g['every']: continue
                for p in g['params']: p.data.copy_(self.slow[p].lerp_(p.data, g['share']))
        def zero_grad(self): self.base.zero_grad()
    def use(model, make_opt):
        base = make_opt(model.parameters())
        run(model, Lookahead(base), 5)
        base.load_state_dict(base.state_dict())
        base.add_param_group(dict(params=[nn.Parameter(torch.ones(1).double())], lr=0.1))
        assert all(g['every'] == 2 for g in base.param_groups)
        run(model, base, 2)
    pair_of_runs(ours, theirs, use)


def test_hooks_see_what_pytorchs_see():
    def seen(make_opt):
        p, calls = nn.Parameter(torch.ones(1)), []
        opt = make_opt([p], lr=0.1)
        def pre(o, args, kwargs):
            calls.append((o is opt, len(args), sorted(kwargs)))
            if 'closure' in kwargs: return args, {'closure': lambda: calls.append('mine')}
        opt.register_step_pre_hook(pre)
        opt.register_step_post_hook(lambda o, args, kwargs: calls.append(('post', len(args), sorted(kwargs))))
        p.grad = torch.ones(1)
        opt.step()
        opt.step(lambda: calls.append('first'))
        opt.step(closure=lambda: calls.append('never'))
        return calls
    assert seen(SGD) == seen(torch.optim.SGD)


def test_hooks_for_all_optimizers_and_the_profiler():
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    p, calls = nn.Parameter(torch.ones(1)), []
    p.grad = torch.ones(1)
    handles = [register(lambda opt, args, kwargs: calls.append(type(opt).__name__))
               for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)]
    try: Adam([p]).step()
    finally:
        for handle in handles: handle.remove()
    Adam([p]).step()
    assert calls == ['Adam', 'Adam']
    opt = SGD([p])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert 'Optimizer.step#SGD.step' in names and 'Optimizer.zero_grad#SGD.zero_grad' in names


def test_a_closure_runs_with_gradients_on():
    p = nn.Parameter(torch.ones(2))
    opt = Adam([p], lr=0.1)
    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = (p*p).sum()
        loss.backward()
        return loss
    with torch.no_grad(): assert opt.step(closure) == 2
    assert p[0] < 1


@pairs
def test_a_gradient_scaler(ours, theirs):
    "A step with an infinite gradient is left out, by ours as by PyTorch's."
    def use(model, make_opt):
        opt, scaler = make_opt(model.parameters()), torch.amp.GradScaler('cpu', init_scale=16.)
        for i in range(5):
            scaler.scale(model(torch.ones(2, 6).double()).square().sum()).backward()
            if i == 2: model[0].weight.grad[0, 0] = math.inf
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert scaler.get_scale() == 8.
    pair_of_runs(ours, theirs, use)


@ours_only
def test_a_compiled_step(ours):
    "From the first step on, through the graph that a compiler sees."
    models = []
    for compiled in (False, True):
        torch._dynamo.reset()
        models.append(new_model())
        opt = ours(models[-1].parameters())
        step = torch.compile(opt.step, backend='aot_eager') if compiled else opt.step
        for i in range(3):
            models[-1](torch.ones(2, 6).double()*(i + 1)).square().sum().backward()
            step()
            opt.zero_grad()
    same(*models, rtol=1e-9)


@pairs
def test_parameters_swapped_on_conversion(ours, theirs):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        def use(model, make_opt):
            opt = make_opt(model.parameters())
            run(model, opt, 2)
            model.float()
            opt.zero_grad()
            model.double()
            opt.zero_grad()
            run(model, opt, 2)
        models = both(ours, theirs, use)
    finally: torch.__future__.set_swap_module_params_on_conversion(before)
    same(*models, rtol=1e-6)


@pytest.fixture
def one_process(tmp_path):
    dist = pytest.importorskip('torch.distributed')
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip('PyTorch was built without gloo')
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()

@ours_only
def test_parameters_that_are_distributed_tensors(ours, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from exp.nb_31 import _OLDEST
    if torch.__version__ < _OLDEST: pytest.skip(f"fully_shard of PyTorch {torch.__version__} is not right, see nb_31")
    from torch.distributed.fsdp import fully_shard
    models = []
    for shard in (False, True):
        models.append(new_model())
        if shard: fully_shard(models[-1], mesh=init_device_mesh('cpu', (1,)))
        run(models[-1], ours(models[-1].parameters()), 3)
    for p, q in zip(models[0].parameters(), models[1].parameters()): near(q.full_tensor(), p, rtol=1e-9, atol=1e-12)

@pairs
def test_data_in_parallel(ours, theirs, one_process):
    def use(model, make_opt):
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        run(parallel, make_opt(parallel.parameters()), 3)
    pair_of_runs(ours, theirs, use)


# What a parameter is for

def kinds(*modules):
    "The names of those that are for Muon."
    names = {id(p): name for m in modules for name, p in m.named_parameters()}
    groups = Muon.split_params(*modules)
    assert sorted(names[id(p)] for g in groups for p in g['params']) == sorted(names.values())
    return [names[id(p)] for g in groups if g['muon'] for p in g['params']]

class Custom(nn.Module):
    "A linear layer of one's own."
    def __init__(self, n_in, n_out):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

class Scale(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n, 1, 1))

class Picture(nn.Module):
    "A transformer for pictures, with all that hangs about in one."
    def __init__(self, tied=False):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(17, 8))
        self.queries = nn.Parameter(torch.zeros(5, 8))
        self.patches, self.norm = nn.Conv2d(3, 8, 4), nn.LayerNorm([4, 8])
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.scale, self.custom = Scale(8), Custom(8, 8)
        self.head = nn.Linear(8, 10)

def test_matrices_and_kernels_are_for_muon():
    assert kinds(Picture()) == ['patches.weight', 'block.self_attn.in_proj_weight', 'block.self_attn.out_proj.weight',
                                'block.linear1.weight', 'block.linear2.weight', 'custom.w']
    conv = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Linear(8, 3))
    assert kinds(conv) == ['0.weight', '1.weight']
    assert kinds(nn.Sequential(nn.LSTM(4, 5), nn.GRUCell(5, 5), nn.Bilinear(5, 5, 5), nn.Linear(5, 2))) == [
        '0.weight_ih_l0', '0.weight_hh_l0', '1.weight_ih', '1.weight_hh', '2.weight']
    assert kinds(nn.Linear(4, 4)) == [] and kinds(nn.ReLU()) == []
    with_biases = nn.MultiheadAttention(8, 2, add_bias_kv=True)  # of three dimensions
    assert kinds(nn.Sequential(with_biases, nn.Linear(8, 2))) == ['0.in_proj_weight', '0.out_proj.weight']

def test_embeddings_and_what_is_tied_to_them_are_not():
    class Language(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.words, self.bags = nn.Embedding(20, 8), nn.EmbeddingBag(9, 8)
            self.mix, self.decoder = nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            if tied: self.decoder.weight = self.words.weight
    assert kinds(Language(False)) == kinds(Language(True)) == ['mix.weight']
    middle = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    middle[1].weight = middle[0].weight  # tied, and no head
    assert kinds(middle) == ['2.weight']
    first = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    first[2].weight = first[0].weight  # the head is tied to the first layer
    assert kinds(first) == ['1.weight']

def test_heads_wherever_they_stand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
            self.body, self.aux_classifier, self.out = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 2)
    assert kinds(Two()) == ['head.0.weight', 'body.weight']
    class Centres(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(10, 8))
    assert kinds(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), Centres()) == ['0.weight']

def test_layers_under_a_parametrization_and_frozen_ones():
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 2))
    assert kinds(weighted) == ['0.parametrizations.weight.original1', '1.parametrizations.weight.original']
    model = new_model()
    model[0].requires_grad_(False)
    assert kinds(model) == ['0.weight', '2.weight']

def test_the_groups_train():
    model = new_model()
    before = copy.deepcopy(model)
    run(model, Muon(Muon.split_params(model), lr=0.02), 2)
    assert not any(map(torch.equal, model.parameters(), before.parameters()))

@pytest.mark.skipif(torch.__version__ < (2, 6), reason=f'PyTorch {torch.__version__} takes no names of parameters')
def test_the_groups_keep_names():
    named = Muon(new_model().named_parameters())
    assert [(g['muon'], g['param_names']) for g in named.param_groups] == [
        (True, ['0.weight', '2.weight']), (False, ['0.bias', '2.bias', '4.weight', '4.bias'])]

def test_a_learner_asks_the_optimizer():
    learn = new_learner(partial(Muon, momentum=0.9))
    learn.fit(1, lr=0.01)
    assert [g['muon'] for g in learn.opt.param_groups] == [True, False] and learn.opt.param_groups[0]['momentum'] == 0.9


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


# Averaged weights, however a pass or a fit begins and ends

class Shadow(Callback):
    "The plain weights and their mean, kept apart from the fit, as they should be."
    order = -50
    def before_fit(self, learn): self.mean = [p.detach().clone() for p in learn.model.parameters()]
    def after_step(self, learn):
        self.plain = [p.detach().clone() for p in learn.model.parameters()]
        for m, p in zip(self.mean, self.plain): m.lerp_(p, 0.1)

def has(learn, values):
    return all(torch.allclose(p, v, rtol=1e-5, atol=1e-7) for p, v in zip(learn.model.parameters(), values))

class RaiseAt(Callback):
    "Raises at an event, from a certain batch or epoch on."
    def __init__(self, event, error, training=None, iter=0, epoch=0):
        self.error, self.when = error, (training, iter, epoch)
        setattr(self, event, self.act)
    def act(self, learn):
        if not learn.fitting: return
        training, iter, epoch = self.when
        if learn.epoch >= epoch and (iter is None or learn.iter >= iter) and (training is None or learn.training == training): raise self.error

PLACES = {'before the first epoch': ('before_epoch', None, None, 0), 'while it trains': ('after_batch', True, 5, 0), 'in a later epoch': ('after_predict', True, 3, 1),
          'while it validates': ('after_loss', False, 1, 0), 'after an epoch': ('after_epoch', None, None, 1), 'in the last one': ('after_batch', True, 5, 2),
          'while the last one validates': ('after_batch', False, 1, 2), 'after the last one': ('after_epoch', None, None, 2)}

@pytest.mark.parametrize('event, training, iter, epoch', PLACES.values(), ids=PLACES)
@pytest.mark.parametrize('error', [CancelFit, RuntimeError('no'), KeyboardInterrupt])
def test_a_fit_that_ends_early(error, event, training, iter, epoch):
    "Cancelled: the mean is in the model, once; with an error: the plain weights."
    shadow = Shadow()
    learn = new_learner(SGD, [shadow, EMA(0.9), RaiseAt(event, error, training, iter, epoch)])
    try: learn.fit(3)
    except (RuntimeError, KeyboardInterrupt): assert error is not CancelFit
    expected = shadow.mean if error is CancelFit else getattr(shadow, 'plain', shadow.mean)
    assert has(learn, expected)
    learn.cbs.pop()
    learn.fit(1)
    assert has(learn, shadow.mean)

@pytest.mark.parametrize('error', [CancelEpoch, CancelBatch])
def test_an_epoch_that_ends_early(error):
    shadow = Shadow()
    learn = new_learner(SGD, [shadow, EMA(0.9), RaiseAt('after_predict', error, True, 6)])
    learn.fit(2)
    assert has(learn, shadow.mean)

def test_without_validation_and_with_a_callback_that_looks_at_the_end():
    class Look(Callback):
        def after_fit(self, learn): self.seen = has(learn, shadow.mean)
    for valid in (None, DataLoader(data(32), 8)):
        shadow, look = Shadow(), Look()
        set_seed(42)
        learn = Learner(Model(6, 8, 3), (DataLoader(data(96), 8, seed=0), valid), opt_func=SGD, lr=0.05, cbs=[shadow, EMA(0.9), look], progress=False)
        learn.fit(2)
        assert look.seen and has(learn, shadow.mean)


class Validates(Callback):
    "A validation, or predictions, in the middle of a batch."
    def __init__(self, event, how='validate'):
        self.how, self.seen, self.inside = how, [], False
        setattr(self, event, self.act)
    def act(self, learn):
        if not learn.training or learn.iter != 4 or self.inside: return
        self.inside = True
        try: self.seen.append(getattr(learn, self.how)())
        finally: self.inside = False

@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_step', 'after_batch'])
def test_a_validation_within_a_batch_leaves_everything_as_it_was(event):
    "Also between a prediction and its gradient; and it looks at the mean."
    plain, ema, nested = new_learner(SGD), new_learner(SGD, EMA(0.9)), new_learner(SGD, [EMA(0.9), looks := Validates(event)])
    for learn in (plain, ema, nested): learn.fit(2)
    assert torch.equal(nested.recorder.losses, plain.recorder.losses) and nested.results == ema.results
    assert all(map(torch.equal, nested.model.parameters(), ema.model.parameters()))
    early = new_learner(SGD, [EMA(0.9), RaiseAt('before_batch', CancelFit, True, 5 if event == 'after_batch' else 4)])
    early.fit(1)
    assert looks.seen[0] == early.validate()

def test_a_validation_within_a_batch_that_fails():
    class Fail(Exception): pass
    class Tries(Validates):
        def act(self, learn):
            def fail(*args): raise Fail
            loss_func, learn.loss_func = learn.loss_func, fail
            try: super().act(learn)
            except Fail: self.seen.append('failed')
            finally: learn.loss_func = loss_func
    plain, ema, nested = new_learner(SGD), new_learner(SGD, EMA(0.9)), new_learner(SGD, [EMA(0.9), tries := Tries('after_loss')])
    for learn in (plain, ema, nested): learn.fit(2)
    assert tries.seen == ['failed']*2 and torch.equal(nested.recorder.losses, plain.recorder.losses)
    assert all(map(torch.equal, nested.model.parameters(), ema.model.parameters()))

def test_predictions_and_rates_tried_while_averaged():
    class Tries(Callback):
        def after_epoch(self, learn): self.seen = learn.get_preds()[0], learn.validate()
    plain, ema, nested = new_learner(SGD), new_learner(SGD, EMA(0.9)), new_learner(SGD, [EMA(0.9), tries := Tries()])
    for learn in (plain, ema, nested): learn.fit(2)
    assert torch.equal(nested.recorder.losses, plain.recorder.losses)
    assert torch.equal(tries.seen[0], nested.get_preds()[0]) and tries.seen[1]['valid_loss'] == nested.results['valid_loss']

def test_the_best_of_averaged_weights():
    "Whoever keeps the best epoch, and puts it back after the fit or, if it is cancelled, when it is cleaned up, has the last word."
    class Best(Callback):
        order = 20
        def before_fit(self, learn): self.best, self.done = None, False
        def after_epoch(self, learn):
            if self.best is None: self.best, self.loss = [p.detach().clone() for p in learn.model.parameters()], learn.results['valid_loss']
        def put_back(self, learn):
            with torch.no_grad():
                for p, b in zip(learn.model.parameters(), self.best): p.copy_(b)
        def after_fit(self, learn):
            self.put_back(learn)
            self.done = True
        def cleanup_fit(self, learn):
            if not self.done and not learn.failed: self.put_back(learn)
    for stop in ([], [RaiseAt('after_batch', CancelFit, True, 5, 1)], [RaiseAt('after_batch', CancelFit, False, 1, 2)]):
        for first in (True, False):
            best = Best()
            learn = new_learner(SGD, [*([EMA(0.9), best] if first else [best, EMA(0.9)]), *stop])
            learn.fit(3)
            assert has(learn, best.best) and learn.validate()['valid_loss'] == pytest.approx(best.loss)

def test_the_parameters_of_a_loss_are_averaged():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))
        def forward(self, pred, yb): return F.cross_entropy(pred + self.logits, yb)
    class Follow(Callback):
        def before_fit(self, learn): self.mean = torch.zeros(3)
        def after_step(self, learn): self.mean.lerp_(learn.loss_func.logits.detach(), 0.1)
    learn = new_learner(SGD, [EMA(0.9), follow := Follow()], loss_func=Weighted())
    learn.fit(1)
    assert follow.mean.abs().sum() > 0
    near(learn.loss_func.logits, follow.mean, rtol=1e-5)

def test_a_layer_thawed_within_the_fit_is_averaged():
    shadow, learn = Shadow(), new_learner(SGD)
    learn.model.layers[0].requires_grad_(False)
    class Thaw(Callback):
        def before_epoch(self, learn): learn.model.layers[0].requires_grad_(learn.epoch > 0)
    learn.fit(2, cbs=[shadow, EMA(0.9), Thaw()])
    assert has(learn, shadow.mean)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('ours', [SGD, Adam, Muon])
def test_the_model_moves_to_cuda(ours):
    cpu, gpu = new_learner(ours), new_learner(ours, Device('cuda'))
    for learn in (cpu, gpu): learn.fit(2)
    near(gpu.recorder.losses, cpu.recorder.losses, rtol=1e-2)
    gpu.model.cpu()
    gpu.fit(1)
    assert next(gpu.model.parameters()).is_cuda


@pytest.mark.parametrize('name', ['heads', 'actor', 'critic', 'class_embed', 'fc', 'classifier'])
def test_names_of_heads(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 2)]) if name == 'heads' else nn.Linear(8, 3))
            self.one, self.two, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    assert kinds(Net()) == ['one.weight', 'two.weight']


def test_an_average_takes_in_a_layer_that_comes_later():
    class Replace(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1: learn.model.layers[-1] = nn.Linear(8, 3)
    def trained(cbs):
        learn = new_learner(SGD, cbs)
        learn.fit(3)
        return learn
    plain, averaged = trained([Replace()]), trained([EMA(0.9), Replace()])
    assert torch.equal(plain.recorder.losses, averaged.recorder.losses)
    assert not any(map(torch.equal, plain.model.parameters(), averaged.model.parameters()))


@pytest.mark.parametrize('cls', [SGD, RMSProp, Adam, AdamW, Muon])
def test_a_rate_that_is_a_tensor_is_not_read_in_a_step(cls, monkeypatch):
    "To read it would wait for the device that it is on, and break the graph of a compiled step."
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    opt = cls(model.parameters(), lr=torch.tensor(0.1))
    for p in model.parameters(): p.grad = torch.ones_like(p)
    def read(*args): raise AssertionError('read')
    for name in ('item', 'tolist', '__float__', '__bool__'): monkeypatch.setattr(torch.Tensor, name, read)
    opt.step()
