"""Heads, freezing, rates by part and Grad-CAM as strangers use them: frozen means bit for bit, the optimizer's memory included, and whatever
is looked at stays as it was."""
import copy, functools, pickle
from contextlib import suppress
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Callback, CancelBatch, CancelEpoch, CancelFit, Learner
from exp.nb_12 import EMA, SGD, Adam, AdamW, Muon, RMSProp
from exp.nb_13 import Checkpoint, load_weights, save_weights
from exp.nb_15 import GradientAccumulation
from exp.nb_20 import SimpleCNN, summary
from exp.nb_22 import BatchNorm
from exp.nb_25 import ByPart, FreezeStatistics, grad_cam, replace_head
from exp.nb_30 import MixedPrecision, Record

FAST = settings(deadline=None, max_examples=25)


def net(norm=nn.BatchNorm2d): return SimpleCNN(3, (4, 6, 8), norm=norm)
def parts(model): return [*model.body, model.head]

def new_learner(model=None, **options):
    set_seed(1)
    x, y = torch.randn(60, 1, 8, 8), torch.randint(3, (60,))
    return Learner(model or net(), get_dls(Dataset(x, y), Dataset(x[:20], y[:20]), 10, seed=3), progress=False, **options)

def state(learn, part):
    "Weights, and all that the optimizer remembers of them."
    remembered = [torch.as_tensor(v).clone() for p in part.parameters() if learn.opt for v in learn.opt.state.get(p, {}).values() if v is not None]
    return [*(p.detach().clone() for p in part.parameters()), *remembered]

def same(a, b): return len(a) == len(b) and all(x.dtype == y.dtype and x.equal(y) for x, y in zip(a, b))
def modes(model): return [m.training for m in model.modules()]
def n_hooks(model): return sum(len(d) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))
def on(event, do, **attributes): return type('Doing', (Callback,), {event: lambda self, learn: do(learn), **attributes})()


# Frozen

OPTIMIZERS = {'SGD': lambda ps, lr: SGD(ps, lr, momentum=0.9, weight_decay=0.1), 'Adam': Adam, 'AdamW': AdamW, 'RMSProp': RMSProp, 'Muon': Muon,
              'torch SGD': lambda ps, lr: torch.optim.SGD(ps, lr, momentum=0.9, weight_decay=0.1, nesterov=True),
              'torch AdamW': lambda ps, lr: torch.optim.AdamW(ps, lr, amsgrad=True), 'fused': lambda ps, lr: torch.optim.AdamW(ps, lr, fused=True),
              'foreach': lambda ps, lr: torch.optim.Adam(ps, lr, weight_decay=0.1, foreach=True), 'Adagrad': torch.optim.Adagrad,
              'by part': ByPart(AdamW, parts)}

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_frozen_in_the_middle_of_an_epoch(name):
    "From the batch on at which it is frozen, a part and the optimizer's memory of it stay bit for bit, and go on after `unfreeze`."
    seen = {}
    def look(learn):
        if not learn.training or (learn.epoch, learn.iter) != (1, 2): return
        learn.freeze_to(2)
        seen['body'], seen['rest'] = state(learn, learn.model[:2]), state(learn, learn.model[2:])
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
                          nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 3))
    opt_func = ByPart(AdamW, lambda model: [*model]) if name == 'by part' else OPTIMIZERS[name]
    learn = new_learner(model, opt_func=opt_func, lr=0.01)
    learn.fit(3, cbs=on('before_batch', look))
    assert len(seen['body']) >= 6 and same(state(learn, model[:2]), seen['body'])
    assert not any(a.equal(b) for a, b in zip(weights(model[2:]), seen['rest']))
    learn.unfreeze()
    learn.fit(1)
    assert not same(state(learn, model[:2]), seen['body'])

def weights(part): return [p.detach().clone() for p in part.parameters()]

@pytest.mark.parametrize('cbs', [lambda: [EMA(0.9)], lambda: [GradientAccumulation(2)], lambda: [MixedPrecision(dtype=torch.bfloat16)],
                                 lambda: [Record()], lambda: [EMA(0.5), FreezeStatistics(), GradientAccumulation(3)]],
                         ids=['EMA', 'accumulation', 'mixed', 'recorded', 'several'])
def test_frozen_beside_other_callbacks(cbs):
    learn = new_learner(opt_func=AdamW, lr=0.01)
    learn.fit(1)
    learn.freeze_to(-1)
    before, head = state(learn, learn.model.body), weights(learn.model.head)
    learn.fit_one_cycle(2, 0.01, cbs=cbs())
    assert same(state(learn, learn.model.body), before) and not same(weights(learn.model.head), head)

@pytest.mark.filterwarnings("ignore:the loss fell at no rate")
def test_a_search_for_a_rate_leaves_what_is_frozen():
    learn = new_learner(opt_func=AdamW, cbs=FreezeStatistics())
    learn.freeze_to(-1)
    before = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(steps=20, plot=False)
    assert same([*learn.model.state_dict().values()], [*before.values()]) and [p.requires_grad for p in learn.model.head.parameters()] == [True]*2


# Statistics

def statistics(model): return [b.clone() for b in model.buffers()]

@pytest.mark.parametrize('norm', [nn.BatchNorm2d, BatchNorm, nn.SyncBatchNorm, lambda n: nn.BatchNorm2d(n, momentum=None),
                                  lambda n: nn.BatchNorm2d(n, affine=False), lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)])
def test_statistics_of_frozen_layers_stay(norm):
    learn = new_learner(net(norm)) if norm is not nn.SyncBatchNorm else new_learner(nn.Sequential(*net().body, nn.Flatten(), nn.Linear(8, 3)))
    if norm is nn.SyncBatchNorm: learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)  # refuses to train on a CPU, unless kept
    learn.freeze_to(-1)
    before = statistics(learn.model)
    learn.fit(2, cbs=FreezeStatistics())
    assert same(statistics(learn.model), before)

def test_layers_that_learn_keep_moving():
    learn = new_learner()
    learn.model.body[0].requires_grad_(False)
    before = [statistics(block) for block in learn.model.body]
    learn.fit(1, cbs=FreezeStatistics())
    assert [same(statistics(block), old) for block, old in zip(learn.model.body, before)] == [True, False, False]
    learn = new_learner()
    learn.fit(1, cbs=FreezeStatistics(learn.model.body[2][1]))
    assert [same(statistics(block), old) for block, old in zip(learn.model.body, before)] == [False, False, True]

def test_unfrozen_from_epoch_to_epoch():
    seen = []
    def unfreeze(learn): learn.freeze_to([2, 1, 0][learn.epoch])
    def note(learn):
        if learn.training and learn.iter == 0: seen.append([m.training for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)])
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
                          nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    new_learner(model).fit(3, cbs=[FreezeStatistics(), on('before_epoch', unfreeze), on('before_batch', note)])
    assert seen == [[False, False], [False, True], [True, True]]

@pytest.mark.parametrize('error', [KeyError, KeyboardInterrupt, CancelBatch, CancelEpoch, CancelFit])
@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_batch', 'after_loss', 'after_backward', 'after_batch', 'after_epoch'])
@pytest.mark.parametrize('training', [True, False])
def test_modes_are_as_before_however_a_fit_ends(event, error, training):
    learn = new_learner()
    learn.model.train(training)
    learn.model.body[1].train(not training)
    learn.freeze_to(-1)
    before, kept = modes(learn.model), statistics(learn.model)
    def stop(learn): raise error
    if error is not CancelBatch or 'batch' in event or 'loss' in event or 'ward' in event:
        with suppress(KeyError, KeyboardInterrupt, CancelEpoch, CancelFit): learn.fit(1, cbs=[FreezeStatistics(), on(event, stop)])
    assert modes(learn.model) == before and same(statistics(learn.model), kept)

def test_fits_and_validations_within_a_fit():
    learn = new_learner(cbs=FreezeStatistics())
    learn.freeze_to(-1)
    before, seen = statistics(learn.model), []
    def within(learn):
        if not learn.training or learn.depth > 1: return
        learn.validate()
        learn.get_preds(learn.dls[0])
        if learn.iter == 1: learn.fit(1, max_batches=2)
        seen.append([m.training for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)])
    learn.fit(1, cbs=on('after_batch', within))
    assert seen == [[False]*3]*6 and same(statistics(learn.model), before)

def test_a_callback_for_two_learners_and_its_copies():
    cb = FreezeStatistics()
    for cb in (cb, copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
        learn = new_learner(cbs=cb)
        learn.freeze_to(-1)
        before = statistics(learn.model)
        learn.fit(1)
        assert same(statistics(learn.model), before)

def test_modes_are_as_before_after_an_error_in_a_pass():
    learn = new_learner()
    learn.freeze_to(-1)
    with suppress(KeyError), FreezeStatistics().around_pass(learn):
        assert sum(not m.training for m in learn.model.modules()) == 3
        raise KeyError
    assert all(modes(learn.model))

@pytest.mark.parametrize('layers', [[nn.Linear(2, 2)], nn.ReLU(), ['body'], [nn.BatchNorm2d(3, track_running_stats=False)]])
def test_layers_without_statistics_are_refused(layers):
    with pytest.raises(ValueError, match='running statistics'): FreezeStatistics(layers)

@pytest.mark.parametrize('resume', ['fit', 'fit_one_cycle'])
def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_bit_for_bit(tmp_path, resume):
    class Crash(Exception): pass
    def crash(learn):
        if learn.training and (learn.epoch, learn.iter) == (1, 4): raise Crash
    def learner():
        learn = new_learner(opt_func=ByPart(AdamW, parts))
        learn.model.body[:2].requires_grad_(False)
        return learn
    def fit(learn, *cbs): getattr(learn, resume)(3, slice(1e-4, 1e-2), cbs=[FreezeStatistics(), *cbs])
    whole = learner()
    fit(whole)
    with suppress(Crash): fit(learner(), on('after_batch', crash), Checkpoint(tmp_path, every=2))
    again = learner()
    fit(again, Checkpoint(tmp_path, every=2, resume=True))
    assert same([*again.model.state_dict().values()], [*whole.model.state_dict().values()])
    assert same(state(again, again.model), state(whole, whole.model))


# Heads

class Named(nn.Module):
    "A head that is put in first, under two names, and a list of bodies."
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3, bias=False)
        self.parts = nn.ModuleDict({'a': nn.Linear(4, 6), 'more': nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
        self.again = self.out
    def forward(self, x):
        for m in (self.parts['a'], *self.parts['more']): x = m(x).relu()
        return self.out(x), self.again(x)

def test_a_head_under_two_names():
    model = Named()
    before = [*model.parts.parameters()]
    head = replace_head(model, 5)
    assert model.out is head is model.again and head.bias is None
    a, b = model(torch.randn(2, 4))
    assert a.shape == (2, 5) and a.equal(b) and all(p is q for p, q in zip(before, model.parts.parameters()))
    inner = replace_head(model, 6, 'parts.more.1')
    assert model.parts['more'][1] is inner and model(torch.randn(2, 4))[0].shape == (2, 5)

@FAST
@given(st.lists(st.integers(0, 3), max_size=4), st.integers(1, 9), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans())
def test_a_head_anywhere(depth, n_out, bias, dtype, training):
    model = nn.Linear(7, 4, bias)
    for n in depth: model = nn.Sequential(*[nn.Identity() for _ in range(n)], model, nn.Identity())
    model = nn.Sequential(nn.Linear(5, 7), model).to(dtype).train(training)
    first = model[0]
    model.requires_grad_(False)
    head = replace_head(model, n_out)
    assert model(torch.randn(3, 5, dtype=dtype)).shape == (3, n_out) and model[0] is first
    assert head.weight.dtype is dtype and (head.bias is not None) == bias and head.training == training
    assert all(p.requires_grad for p in head.parameters()) and not first.weight.requires_grad

def test_heads_of_strangers():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(encoder, nn.MultiheadAttention(8, 2))
    assert replace_head(model, 3) is encoder.linear2  # attention's own linear layer is not called, and so not taken
    model = nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    assert replace_head(model, 5) is model[1] and model(torch.randn(2, 4)).shape == (2, 5)
    with torch.device('meta'): model = SimpleCNN()
    assert replace_head(model, 5).weight.device.type == 'meta'
    compiled = torch.compile(net(), backend='eager')
    replace_head(compiled, 7)
    assert compiled(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    wrapped = nn.DataParallel(net())
    assert replace_head(wrapped, 7) is wrapped.module.head
    for model, said in ((nn.Linear(2, 2), 'no linear layer'), (nn.Sequential(), 'no linear layer'), (nn.Sequential(nn.LazyLinear(3)), 'lazy')):
        with pytest.raises(ValueError, match=said): replace_head(model, 3)
    for name in ('', 'body', 'head.weight', 'missing', 3):
        with pytest.raises(ValueError, match='found head'): replace_head(net(), 3, name)
    for n in (0, -1, 2.5, None, True):
        with pytest.raises(ValueError, match='n_out'): replace_head(net(), n)

def test_a_head_in_a_file_and_in_a_summary(tmp_path):
    old, new = net(), net()
    save_weights(old, tmp_path/'old.safetensors')
    load_weights(new, tmp_path/'old.safetensors')
    replace_head(new, 9)
    save_weights(new, tmp_path/'new.safetensors')
    again = net()
    replace_head(again, 9)
    load_weights(again, tmp_path/'new.safetensors')
    x = torch.randn(4, 1, 8, 8)
    assert again.eval()(x).equal(new.eval()(x)) and summary(again, x).weights == summary(old, x).weights + 6*9

def test_a_head_replaced_between_two_fits():
    learn = new_learner(opt_func=ByPart(AdamW, parts))
    learn.fit(1, slice(1e-4, 1e-2))
    remembered = state(learn, learn.model.body)
    head = replace_head(learn.model, 3)
    before = weights(head)
    learn.freeze_to(-1)
    learn.fit(1, slice(1e-4, 1e-2))
    assert same(state(learn, learn.model.body), remembered) and not same(weights(head), before)
    assert [len(group['params']) for group in learn.opt.param_groups] == [3, 3, 3, 2]


# Rates by part

def groups_of(model, make, *others, opt_func=torch.optim.SGD): return [len(g['params']) for g in ByPart(opt_func, make).split_params(model, *others)]

def test_parts_of_every_kind():
    class WithToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.body, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3), nn.Linear(3, 2)
    model = WithToken()
    assert groups_of(model, lambda m: [m.token, m.body, m.head]) == [1, 2, 2]
    assert groups_of(model, lambda m: ([m.token, m.body], (m.head,))) == [3, 2]
    assert groups_of(model, lambda m: [nn.ReLU(), m.body, m, m.head]) == [2, 3]  # none empty, each parameter once
    assert groups_of(model, lambda m: (part for part in [m.token, m.body, m.head])) == [1, 2, 2]
    assert groups_of(model, lambda m: [m], nn.Linear(1, 1)) == [7]
    with pytest.raises(ValueError, match='got none with token, body.weight'): groups_of(model, lambda m: [m.head, m.body.bias])
    with pytest.raises(TypeError, match='modules or parameters'): groups_of(model, lambda m: ['head'])
    with pytest.raises(TypeError, match='a function'): ByPart(AdamW, [model.body])
    for opt_func in (Muon, functools.partial(Muon, momentum=0.9)):
        with pytest.raises(ValueError, match='makes its own'): ByPart(opt_func, parts)

def test_shared_weights_learn_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    groups = ByPart(AdamW, lambda m: [*m]).split_params(model)
    assert [len(g['params']) for g in groups] == [2, 1]
    AdamW(groups, lr=0.1)

@pytest.mark.parametrize('opt_func', [SGD, AdamW, torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_rates_of_slices_and_lists(opt_func):
    learn = new_learner(opt_func=ByPart(opt_func, parts), lr=0.1)
    seen = []
    look = on('before_batch', lambda learn: seen.append([g['lr'] for g in learn.opt.param_groups]))
    for rates in (slice(1e-4, 1e-1), [1e-4, 1e-3, 1e-2, 1e-1]): learn.fit(1, rates, cbs=look, max_batches=1)
    for rates in seen: near(rates, [1e-4, 1e-3, 1e-2, 1e-1])
    assert [g['lr'] for g in learn.opt.param_groups] == [0.1]*4
    learn.lr = 0.2
    learn.fit(1, max_batches=1)
    assert [g['lr'] for g in learn.opt.param_groups] == [0.2]*4
    with pytest.raises(ValueError, match='4 learning rates'): learn.fit(1, [0.1, 0.2])

def test_one_rate_for_all_parts_is_a_plain_training():
    runs = []
    for opt_func in (AdamW, ByPart(AdamW, parts)):
        learn = new_learner(opt_func=opt_func)
        learn.fit_one_cycle(2, 0.01)
        runs.append([*learn.model.state_dict().values()])
    assert same(*runs)

def test_a_loss_with_weights_goes_with_the_last_part():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, pred, y): return F.cross_entropy(pred*self.scale, y)
    learn = new_learner(opt_func=ByPart(AdamW, parts), loss_func=Scaled())
    learn.fit(1, slice(1e-4, 1e-2))
    assert learn.loss_func.scale != 1 and len(learn.opt.param_groups[-1]['params']) == 3


# Grad-CAM

def reference(model, x, layer, target):
    "By a retained gradient of the whole pass, with weights that learn, row by row."
    model, rows = copy.deepcopy(model), []
    layer = model.get_submodule(layer)
    model.eval().requires_grad_(True)
    for row, t in zip(x.split(1), target.tolist()):
        kept = []
        handle = layer.register_forward_hook(lambda layer, inputs, output: kept.append(output))
        with torch.enable_grad():
            grad, = torch.autograd.grad(model(row)[0, t], kept)
        handle.remove()
        rows.append((grad.mean((2, 3), keepdim=True)*kept[0]).sum(1).clamp(min=0).detach())
    return torch.cat(rows)

@st.composite
def cases(draw):
    "(model, x, name of a layer that puts out a map, target)."
    torch.manual_seed(draw(st.integers(0, 99)))
    n, c, side = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(5, 9))
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    layers, width = [], c
    for w in widths:
        layers.append(nn.Conv2d(width, w, draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2])), padding=1))
        if draw(st.booleans()): layers.append(nn.BatchNorm2d(w))
        layers.append(draw(st.sampled_from([nn.Tanh(), nn.SiLU(), nn.Sigmoid()])))
        width = w
    names = [str(i) for i in range(len(layers))]
    k = draw(st.integers(2, 4))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(draw(st.sampled_from([1, 2]))), nn.Flatten(), nn.LazyLinear(k)).double()
    x = torch.randn(n, c, side, side, dtype=torch.float64)
    model(torch.randn(3, c, side, side, dtype=torch.float64))
    if draw(st.booleans()): x, model = x.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    return model, x, draw(st.sampled_from(names)), torch.randint(k, (n,))

@FAST
@given(cases(), st.booleans(), st.booleans(), st.booleans())
def test_maps_are_those_of_plain_autograd(case, learns, training, grad_mode):
    model, x, name, target = case
    model.requires_grad_(learns).train(training)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    before, was, states = copy.deepcopy(model.state_dict()), modes(model), torch.get_rng_state()
    with torch.set_grad_enabled(grad_mode): cam = grad_cam(model, x, model.get_submodule(name), target)
    assert not cam.requires_grad and modes(model) == was and n_hooks(model) == 0 and torch.get_rng_state().equal(states)
    assert same([*model.state_dict().values()], [*before.values()])
    assert all(p.requires_grad == learns and p.grad.eq(1).all() for p in model.parameters())
    near(cam, reference(model, x, name, target), rtol=1e-7, atol=1e-10)

def test_targets_of_every_form():
    model, x = net().eval(), torch.randn(5, 1, 8, 8)
    best = model(x).argmax(1)
    near(grad_cam(model, x), grad_cam(model, x, target=best))
    for target in (1, torch.tensor(1), [1]*5, torch.ones(5).int()): near(grad_cam(model, x, target=target), grad_cam(model, x, target=torch.ones(5).long()))
    for target in (3, -1, 0.5, True, [0, 1], torch.zeros(5, 1).long(), torch.zeros(5)):
        with pytest.raises(ValueError, match='expected'): grad_cam(model, x, target=target)
    assert n_hooks(model) == 0

@pytest.mark.parametrize('n', [0, 1])
def test_batches_of_no_row_and_of_one(n):
    for target in (None, 1): assert grad_cam(net(), torch.randn(n, 1, 16, 16), target=target).shape == (n, 4, 4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = net().eval(), torch.randn(4, 1, 16, 16)
    near(grad_cam(copy.deepcopy(model).to(dtype), x.to(dtype), target=1).float(), grad_cam(model, x, target=1), rtol=0.1, atol=0.02)
    with torch.autocast('cpu', dtype=torch.bfloat16): cam = grad_cam(model, x, target=1)
    near(cam.float(), grad_cam(model, x, target=1), rtol=0.1, atol=0.02)

class Odd(nn.Module):
    "A shared convolution, ReLUs in place, two inputs, numbers drawn and counted in each pass."
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.act, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(3, 2)
        self.unused = nn.Conv2d(3, 3, 1)
        self.register_buffer('calls', torch.zeros(()))
    def forward(self, x, y):
        self.calls += 1
        z = self.act(self.first(x + y))
        for _ in range(2): z = self.act(self.conv(z))
        self.unused(z)
        return self.fc(z.mean((2, 3)) + 0*torch.rand(3))

def test_odd_models():
    model, args = Odd(), (torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6))
    states = torch.get_rng_state()
    for layer in (model.first, model.conv, model.act): assert grad_cam(model, args, layer).shape == (4, 6, 6)
    near(grad_cam(model, args, model.act), grad_cam(model, [*args], target=None, layer=model.act))
    with torch.inference_mode(): near(grad_cam(model, (args[0].clone(), args[1] + 0), model.act), grad_cam(model, args, model.act))
    assert model.calls == 0 and torch.get_rng_state().equal(states) and n_hooks(model) == 0
    for layer in (None, model.unused, nn.Conv2d(1, 1, 1)):  # the last map is that of a layer which leads nowhere
        for learns in (True, False):
            with pytest.raises(ValueError, match='scores come from'): grad_cam(model.requires_grad_(learns), args, layer)
    with pytest.raises(TypeError): grad_cam(model, args, 'conv')

def test_of_several_calls_the_last_counts():
    "Which ends in a mean and a linear layer: so the map can be computed without a gradient."
    model, args = Odd().eval(), (torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6))
    nn.init.ones_(model.fc.weight)
    z = args[0] + args[1]
    for layer in (model.first, model.conv, model.conv): z = layer(z).relu()
    cam = torch.einsum('k,nkij->nij', model.fc.weight[1], z).relu()/36
    near(grad_cam(model, args, model.act, 1), cam, rtol=1e-4, atol=1e-6)

def test_inputs_made_in_inference_mode():
    model = net()
    with torch.inference_mode():
        x = torch.randn(3, 1, 8, 8)
        inside = grad_cam(model, x)
    near(inside, grad_cam(model, x))
    near(inside, grad_cam(model, x.clone()))

@pytest.mark.parametrize('side, n', [((3, 5), 15), ((4, 4), 16), ((2, 8), 16)])
def test_maps_of_few_places_have_to_be_named(side, n):
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(2, 1, *side)
    if n < 16:
        with pytest.raises(ValueError, match='at least 16 places'): grad_cam(model, x)
    assert grad_cam(model, x, model[0] if n < 16 else None).shape == (2, *side)

class Failing(nn.Module):
    def forward(self, x): raise KeyError('broken')

@pytest.mark.parametrize('model, error', [(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(), Failing()), KeyError), (nn.Sequential(nn.Conv2d(1, 2, 3)), ValueError),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), ValueError), (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LSTM(72, 2)), ValueError),
    (nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()), ValueError)])
@pytest.mark.parametrize('layer', [None, 0])
def test_no_trace_after_an_error(model, error, layer):
    model.train()
    if layer == 0 and isinstance(model[-1], nn.Flatten): return  # a map of one place is a map
    with pytest.raises(error): grad_cam(model, torch.randn(2, 1, 8, 8), model[0] if layer == 0 else None)
    assert n_hooks(model) == 0 and all(modes(model)) and torch.is_grad_enabled()

def test_hooks_of_strangers_stay_and_are_called():
    model, seen = net(), []
    model.body[0].register_forward_hook(lambda *args: seen.append(1))
    grad_cam(model, torch.randn(2, 1, 8, 8), model.body[1])
    assert n_hooks(model) == 1 and seen == [1]

def test_compiled_and_copied_models():
    model, x = net().eval(), torch.randn(3, 1, 8, 8)
    expected = grad_cam(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model, backend='eager')): near(grad_cam(other, x), expected)

def test_within_a_training():
    "A look in the middle of each batch changes nothing, bit for bit."
    runs = []
    for cbs in ([], [on('after_loss', lambda learn: grad_cam(learn.model, learn.xb[0])), FreezeStatistics()]):
        learn = new_learner(opt_func=AdamW)
        learn.fit(2, 0.01, cbs=cbs)
        runs.append([*learn.model.state_dict().values()])
    assert same(*runs)


@pytest.mark.parametrize('opt_func', (torch.optim.SGD, torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)))
def test_frozen_between_backward_and_step(opt_func):
    "A gradient that was there before is not used any more."
    class Freeze(Callback):
        def after_backward(self, learn):
            if learn.iter == 1:
                learn.freeze_to(-1)
                self.before = learn.model[0].weight.detach().clone()
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]*4
    learn, freeze = Learner(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), (batches, None), opt_func=opt_func, progress=False), Freeze()
    learn.fit(1, cbs=freeze)
    assert torch.equal(learn.model[0].weight, freeze.before)
