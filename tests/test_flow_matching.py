"""Flow matching and diffusion against formulas, and as strangers use them: solvers, losses, networks, samplers, seeds and bad input."""
import copy, math, pickle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Callback
from exp.nb_12 import AdamW
from exp.nb_13 import Checkpoint, load_weights, save_weights
from exp.nb_30 import Record
from exp.nb_42 import (SOLVERS, Condition, FlowMLP, GenerativeLearner, MLPBlock, TimeEmbedding, UNet, UNetBlock, cosine_schedule, ddim, ddpm_loss,
                       draw_problem, flow_loss, guided, integrate, sample)

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def mlp(classes=10, n=4, seed=0): set_seed(seed); return FlowMLP(n, width=16, depth=2, classes=classes)

def unet(classes=10, shape=(1, 8, 12), seed=0):
    "A small one, as if it were trained: without zeros."
    set_seed(seed)
    net = UNet(shape, (8, 16), classes, dim=16)
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, 0, 0.2)
    return net

class Known(nn.Module):
    "A model that is a function of x and t."
    def __init__(self, f, *shape):
        super().__init__()
        self.f, self.shape, self.classes, self.one = f, shape, 0, nn.Parameter(torch.ones(1))
    def forward(self, x, t, labels=None): return self.f(x, t.reshape(-1, *[1]*(x.ndim - 1)))


# Solvers

def normal_flow(m, s):
    "Velocity and end of the flow on arcs from N(0, 1) to N(m, s)."
    def v(x, t):
        sin, cos = math.sin(math.pi*t/2), math.cos(math.pi*t/2)
        return math.pi/2*m*cos + math.pi/2*(s**2 - 1)*sin*cos/(cos**2 + s**2*sin**2)*(x - m*sin)
    return v, lambda x: m + s*x

@pytest.mark.parametrize('method, order', [('euler', 1), ('midpoint', 2), ('heun', 2)])
@FAST
@given(st.floats(-3, 3), st.floats(0.3, 0.8))
def test_orders(method, order, m, s):
    v, end = normal_flow(m, s)
    x = torch.tensor([-2., -0.5, 1.5]).double()
    error = {steps: (integrate(v, x, steps, method) - end(x)).norm().item() for steps in (100, 200)}
    near(math.log2(error[100]/error[200]), float(order), atol=0.25)

@FAST
@given(seeds, st.integers(1, 7))
def test_solvers_are_exact_where_they_should_be(seed, steps):
    "Constant velocities for all; velocities that are linear in time for those of order 2."
    x, v = torch.randn(2, 5, generator=seeded(seed)).double()
    for method in SOLVERS: near(integrate(lambda x, t: v, x, steps, method), x + v, rtol=1e-9)
    for method in ('midpoint', 'heun'): near(integrate(lambda x, t: 2*t*v, x, steps, method), x + v, rtol=1e-9)
    near(integrate(lambda x, t: 2*t*v, x, steps), x + v*(1 - 1/steps), rtol=1e-9)

def test_how_often_the_solvers_ask():
    for method, calls in (('euler', 1), ('midpoint', 2), ('heun', 2)):
        times = []
        integrate(lambda x, t: times.append(t) or x, torch.zeros(1), 5, method)
        assert len(times) == 5*calls and 0 <= min(times) <= max(times) <= 1


# Networks

@FAST
@given(seeds, st.integers(1, 20))
def test_time_embedding(seed, half):
    t = torch.rand(6, generator=seeded(seed))
    found = TimeEmbedding(2*half)(t)
    for i in range(half):
        angle = t.double()*1000/10_000**(i/half)
        near(found[:, i], angle.cos(), atol=1e-3)
        near(found[:, half + i], angle.sin(), atol=1e-3)

@FAST
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_blocks_equal_their_formulas(seed, n, width):
    set_seed(seed)
    block, x, c = MLPBlock(width, 3), torch.randn(n, width), torch.randn(n, 3)
    h = F.layer_norm(x, (width,), block.norm.weight, block.norm.bias) @ block.first.weight.T + block.first.bias
    h = h + c @ block.shift.weight.T + block.shift.bias
    near(block(x, c), x + (h*h.sigmoid()) @ block.last.weight.T + block.last.bias, atol=1e-5)
    block, x = UNetBlock(8, 16, 3), torch.randn(n, 8, 4, 5)
    near(block(x, c), block.shortcut(x))  # before any training
    nn.init.normal_(block.last[-1].weight)
    h = F.conv2d(F.silu(F.group_norm(x, 8)), block.first[2].weight, block.first[2].bias, padding=1)
    h = h + (c @ block.shift.weight.T + block.shift.bias).view(n, 16, 1, 1)
    h = F.conv2d(F.silu(F.group_norm(h, 8)), block.last[2].weight, block.last[2].bias, padding=1)
    near(block(x, c), h + F.conv2d(x, block.shortcut.weight, block.shortcut.bias), rtol=1e-3, atol=1e-4)

def test_condition():
    "No labels are the last label; without classes there are none."
    set_seed(0)
    condition, t = Condition(8, 3), torch.rand(5)
    assert condition(t).equal(condition(t, torch.full((5,), 3)))
    assert not condition(t).equal(condition(t, torch.zeros(5).long()))
    near(condition(t), F.silu(condition.time(t) + condition.label.weight[3]))
    with pytest.raises(ValueError, match='without classes'): Condition(8)(t, torch.zeros(5).long())

@pytest.mark.parametrize('shape', [(1, 28, 28), (3, 8, 12), (2, 4, 4)])
@pytest.mark.parametrize('classes', [0, 5])
def test_unet_shapes(shape, classes):
    net, x = unet(classes, shape), torch.randn(3, *shape)
    labels = torch.tensor([0, 4, 5]) if classes else None
    out = net(x, torch.rand(3), labels)
    assert out.shape == x.shape and out.requires_grad
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

def test_a_new_unet():
    "Its size; at first it says 0 everywhere."
    net, x = UNet(classes=10), torch.randn(2, 1, 28, 28)
    assert sum(p.numel() for p in net.parameters()) == 171_364
    assert not net(x, torch.rand(2)).any()

def test_each_row_by_itself():
    "A row's output doesn't depend on the others, and does on time and label."
    for net, x in ((mlp(), torch.randn(6, 4)), (unet(), torch.randn(6, 1, 8, 12))):
        t, labels = torch.rand(6), torch.arange(6)
        whole = net(x, t, labels)
        near(net(x[2:3], t[2:3], labels[2:3]), whole[2:3], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(net(x, t/2, labels), whole) and not torch.allclose(net(x, t, labels + 1), whole)

@pytest.mark.parametrize('make', [mlp, unet])
def test_state_dict_round_trip(make, tmp_path):
    net, other = make(seed=0), make(seed=1)
    save_weights(net, tmp_path/'net.safetensors')
    load_weights(other, tmp_path/'net.safetensors')
    for same in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert sample(same, 3, 1, 2, generator=seeded()).equal(sample(net, 3, 1, 2, generator=seeded()))


# Losses

def test_flow_loss_is_smallest_for_the_mean_velocity():
    "Data are -1 and 1; any change of the known mean velocity costs its mean square."
    g = seeded()
    x = (2*torch.randint(2, (200_000, 1), generator=g) - 1).float()
    def mean(x, t): return (torch.tanh(t*x/(1 - t)**2) - x)/(1 - t)
    least = flow_loss(Known(mean, 1), x, generator=seeded(1))
    for change in (lambda x, t: 0.3 + 0*x, lambda x, t: 0.3*x, lambda x, t: t - 0.5, lambda x, t: (3*x).sin()):
        noise, t, _ = draw_problem(Known(mean, 1), x, generator=seeded(1))
        x_t = (1 - t[:, None])*noise + t[:, None]*x
        more = flow_loss(Known(lambda x, t: mean(x, t) + change(x, t), 1), x, generator=seeded(1))
        near(more - least, change(x_t, t[:, None]).square().mean(), atol=0.02)

@FAST
@given(seeds, st.integers(1, 5))
def test_losses_equal_their_formulas(seed, n):
    x = torch.randn(n, 2, 3, generator=seeded(seed))
    def model(x, t): return (1 + t)*x
    noise, t, _ = draw_problem(Known(model, 2, 3), x, generator=seeded(seed))
    t = t.view(n, 1, 1)
    flow = (model((1 - t)*noise + t*x, t) - x + noise).square().mean()
    near(flow_loss(Known(model, 2, 3), x, generator=seeded(seed)), flow)
    a, s = cosine_schedule(t)
    near(ddpm_loss(Known(model, 2, 3), x, generator=seeded(seed)), (model(a*x + s*noise, t) - noise).square().mean())

def test_labels_are_dropped():
    net, labels = mlp(), torch.arange(10_000) % 10
    x = torch.zeros(10_000, 4)
    for drop in (0., 0.1, 1.):
        noise, t, kept = draw_problem(net, x, labels, drop, seeded())
        near((kept == 10).float().mean(), drop, atol=0.01)
        assert kept[kept < 10].equal(labels[kept < 10]) and 0 <= t.min() <= t.max() < 1
    near(noise.std(), 1., rtol=0.02)
    assert draw_problem(mlp(0), x, labels)[2] is None and labels.max() == 9


# Diffusion

@FAST
@given(st.floats(0, 1))
def test_schedule(t):
    a, s = cosine_schedule(t)
    near(a**2 + s**2, 1.)
    def f(u): return math.cos((u + 0.008)/1.008*math.pi/2)**2  # Nichol and Dhariwal, eq. 17
    near(a**2, f(1 - t)/f(0), atol=1e-5)

@FAST
@given(seeds, st.integers(2, 40))
def test_small_steps_add_up(seed, steps):
    "Mean and variance of x_t do not depend on the number of steps in which the noise came."
    t = torch.rand(steps, generator=seeded(seed)).double().sort(descending=True).values
    mean, variance = 1., 0.
    a0, s0 = torch.tensor(1.), torch.tensor(0.)
    for a, s in map(cosine_schedule, t):
        r = a/a0
        mean, variance = mean*r, variance*r**2 + s**2 - r**2*s0**2
        a0, s0 = a, s
    near(mean, a, atol=1e-6)
    near(variance, s**2, atol=1e-6)

@pytest.mark.parametrize('eta', [0., 0.5, 1.])
@pytest.mark.parametrize('steps', [1, 3, 30])
def test_the_true_noise_gives_the_image_back(steps, eta):
    x = torch.rand(5, 1, 4, 4, generator=seeded())
    def noise(x_t, t):
        a, s = cosine_schedule(t)
        return (x_t - a*x)/s
    for clip in (None, 2.): near(ddim(Known(noise, 1, 4, 4), 5, steps=steps, eta=eta, clip=clip, generator=seeded(1)), x, atol=1e-2)

def test_samples_of_a_known_distribution():
    "For data from N(0.5, 0.4) the mean noise is known; all samplers draw from it."
    def noise(x, t):
        a, s = cosine_schedule(t)
        return s*(x - 0.5*a)/(0.16*a**2 + s**2)
    def velocity(x, t): return 0.5 + (0.16*t - (1 - t))/((1 - t)**2 + 0.16*t**2)*(x - 0.5*t)
    for x in (ddim(Known(noise, 1), 20_000, steps=200, generator=seeded()), ddim(Known(noise, 1), 20_000, steps=200, eta=1., generator=seeded()),
              sample(Known(velocity, 1), 20_000, steps=200, generator=seeded())):
        near(x.mean(), 0.5, atol=0.02)
        near(x.std(), 0.4, rtol=0.03)

def test_clip_holds_the_guess():
    wrong = Known(lambda x, t: 0*x, 3)
    assert ddim(wrong, 50, steps=1, generator=seeded()).abs().max() > 100
    assert ddim(wrong, 50, steps=1, clip=2., generator=seeded()).abs().max() <= 2


@pytest.mark.parametrize('clip', [None, 0.7])
@pytest.mark.parametrize('eta', [0., 1.])
def test_ddim_step_by_step(eta, clip):
    "With eta 1 a step draws from the distribution that Bayes' rule gives for the guess; with 0 the noise stays, as far as the guess allows."
    model, steps = Known(lambda x, t: 0.8*x + 0.3*t, 6), 5
    g = seeded()
    x = torch.randn(4, 6, generator=g)
    times = torch.linspace(0.001, 1, steps + 1)
    for t, u in zip(times, times[1:]):
        (a, s), (a_u, s_u) = cosine_schedule(t), cosine_schedule(u)
        guess = (x - s*model(x, t.expand(4)))/a
        if clip: guess = guess.clamp(-clip, clip)
        r = a/a_u
        more = s**2 - r**2*s_u**2
        if eta: x = (a_u*guess*more + r*x*s_u**2)/s**2 + (more/s**2).sqrt()*s_u*torch.randn(4, 6, generator=g)
        else: x = a_u*guess + s_u*(x - a*guess)/s
    near(ddim(model, 4, steps=steps, eta=eta, clip=clip, generator=seeded()), x.detach(), rtol=1e-2, atol=1e-3)


# Samples

@pytest.mark.parametrize('make', [mlp, unet])
def test_guidance(make):
    "1 equals none, bit for bit; 0 ignores the label; others are on the line of both."
    net = make()
    labels, x, t = torch.arange(4), torch.randn(4, *net.shape), 0.3
    times = torch.full((4,), t)
    with torch.no_grad():
        assert guided(net, labels, 1.)(x, t).equal(net(x, times, labels)) and guided(net)(x, t).equal(net(x, times))
        without, with_label = net(x, times), net(x, times, labels)
        near(guided(net, labels, 0.)(x, t), without)
        near(guided(net, labels, 2.5)(x, t), without + 2.5*(with_label - without), rtol=1e-3, atol=1e-5)
    plain = integrate(lambda x, t: net(x, torch.full((4,), t), labels).detach(), torch.randn(4, *net.shape, generator=seeded()), 5)
    assert sample(net, 4, labels, 5, w=1, generator=seeded()).equal(plain)

@pytest.mark.parametrize('draw', [sample, ddim])
def test_seeds(draw):
    "The same seed gives the same samples, whatever PyTorch's own generator does, which is left alone; modes are put back."
    net = unet().train()
    options = dict(eta=1.) if draw is ddim else {}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = draw(net, 4, 2, 3, w=1.5, generator=seeded(), **options)
    assert torch.get_rng_state().equal(before) and net.training and not first.requires_grad
    torch.rand(3)
    assert draw(net, 4, [2]*4, 3, w=1.5, generator=seeded(), **options).equal(first)
    assert not draw(net, 4, 2, 3, w=1.5, generator=seeded(1), **options).equal(first)
    torch.manual_seed(0)
    assert draw(net, 4, 2, 3, w=1.5, **options).equal(first)
    assert draw(net, 3, None, 2).shape == (3, 1, 8, 12)


# With a Learner

def learner(make=mlp, loss=flow_loss, **options):
    net = make()
    x = torch.randn(64, *net.shape, generator=seeded())/4 + 1
    ds = Dataset(x, torch.arange(64) % 10)
    return GenerativeLearner(net, get_dls(ds, ds, 16, seed=0), loss, AdamW, 3e-3, progress=False, **options)

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@pytest.mark.parametrize('make', [mlp, unet])
@pytest.mark.parametrize('loss', [flow_loss, ddpm_loss])
def test_trains(make, loss):
    "The loss falls; recorded, the weights are the same bits; the validation's noise is the same for each epoch."
    plain, recorded = learner(make, loss), learner(make, loss)
    first = plain.validate()['valid_loss']
    for learn, cbs in ((plain, ()), (recorded, Record())):
        torch.manual_seed(1)
        learn.fit(8, cbs=cbs)
    assert weights(plain).equal(weights(recorded))
    assert plain.results['valid_loss'] < 0.9*first
    assert plain.validate() == plain.validate()

@pytest.mark.parametrize('make', [mlp, unet])
def test_resumes_exactly(make, tmp_path):
    class Break(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 2: raise KeyboardInterrupt
    whole, part, again = (learner(make) for _ in range(3))
    torch.manual_seed(1)
    whole.fit(4)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt): part.fit(4, cbs=[Checkpoint(tmp_path), Break()])
    torch.manual_seed(99)
    again.fit(4, cbs=Checkpoint(tmp_path, resume=True))
    assert weights(again).equal(weights(whole)) and not weights(part).equal(weights(whole))

def test_a_learner_predicts_nothing():
    with pytest.raises(TypeError, match='sample'): learner().predict(torch.zeros(2, 4))


# What can't be done

@pytest.mark.parametrize('call, words', [
    (lambda draw: draw(mlp(), 0), 'the number of samples to be a whole number of at least 1, got 0'),
    (lambda draw: draw(mlp(), 2.5), 'the number of samples'),
    (lambda draw: draw(mlp(), 2, steps=0), 'steps to be a whole number of at least 1, got 0'),
    (lambda draw: draw(mlp(), 2, 10), 'labels from 0 to 9, got 10'),
    (lambda draw: draw(mlp(), 2, [0, -1]), 'labels from 0 to 9, got -1'),
    (lambda draw: draw(mlp(), 2, [0, 1, 2]), r'expected 2 labels, got shape \(3,\)'),
    (lambda draw: draw(mlp(), 2, [0.5, 1.]), 'whole numbers as labels, got torch.float32'),
    (lambda draw: draw(mlp(), 2, torch.tensor([True, False])), 'whole numbers as labels, got torch.bool'),
    (lambda draw: draw(mlp(), 2, w=2.), 'expected labels for guidance of 2.0, got none'),
    (lambda draw: draw(mlp(0), 2, 1), 'expected no labels for a network without classes'),
    (lambda draw: draw(mlp(0), 2, 1, w=2.), 'expected no labels for a network without classes'),
    (lambda draw: draw(mlp(), 2, 1, w=math.inf), 'a finite guidance scale, got inf'),
    (lambda draw: draw(mlp(), 2, 1, w='2'), "a finite guidance scale, got '2'")])
@pytest.mark.parametrize('draw', [sample, ddim])
def test_samplers_refuse(draw, call, words):
    with pytest.raises(ValueError, match=words): call(draw)

def test_solvers_refuse():
    for method in ('rk4', 'Euler', None):
        with pytest.raises(ValueError, match=r"expected a method in \['euler', 'midpoint', 'heun'\], got"): integrate(lambda x, t: x, torch.ones(1), 5, method)
        with pytest.raises(ValueError, match='expected a method'): sample(mlp(), 2, method=method)
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match='steps'): integrate(lambda x, t: x, torch.ones(1), steps)

@pytest.mark.parametrize('options, words', [(dict(eta=-0.1), 'eta in'), (dict(eta=1.1), 'eta in'), (dict(eta=math.nan), 'eta in'), (dict(clip=0), 'clip above 0'),
                                            (dict(clip=math.nan), 'clip above 0')])
def test_ddim_refuses(options, words):
    with pytest.raises(ValueError, match=words): ddim(mlp(), 2, **options)

@pytest.mark.parametrize('loss', [flow_loss, ddpm_loss])
def test_losses_refuse(loss):
    labels = torch.zeros(3).long()
    for x, words in ((torch.zeros(3, 5), r'shape \(n, 4\), got \(3, 5\)'), (torch.zeros(4), r'got \(4,\)'), (torch.zeros(3, 4).long(), 'expected floats, got torch.int64')):
        with pytest.raises(ValueError, match=words): loss(mlp(), x, labels)
    with pytest.raises(ValueError, match=r'shape \(n, 1, 8, 12\), got \(3, 96\)'): loss(unet(), torch.zeros(3, 96), labels)
    for drop in (-0.1, 1.5):
        with pytest.raises(ValueError, match='share drop'): loss(mlp(), torch.zeros(3, 4), labels, drop)

def test_networks_refuse():
    for shape in ((1, 30, 28), (1, 28, 7), (28, 28)):
        with pytest.raises(ValueError, match='whose sides 4 divides'): UNet(shape)
    for channels in ((20, 40), (24, 4)):
        with pytest.raises(ValueError, match='channels that 8 divides'): UNet(channels=channels)
    for call, words in ((lambda: TimeEmbedding(7), 'even dim, got 7'), (lambda: TimeEmbedding(0), 'dim'), (lambda: FlowMLP(0), 'expected n'),
                        (lambda: FlowMLP(4, depth=0), 'depth'), (lambda: FlowMLP(4, classes=-1), 'classes'), (lambda: UNet(classes=2.5), 'classes')):
        with pytest.raises(ValueError, match=words): call()
    with pytest.raises(ValueError, match=r'shape \(n, 1, 8, 12\), got \(2, 1, 8, 8\)'): unet()(torch.zeros(2, 1, 8, 8), torch.zeros(2))
