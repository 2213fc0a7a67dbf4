"""A cellular automaton against loops, its pool of states, and both as strangers use them."""
import copy, math, pickle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_10 import Callback, Learner
from exp.nb_12 import Adam
from exp.nb_13 import Checkpoint, load_weights, save_weights
from exp.nb_44 import ALIVE, CellularAutomaton, NormalizeGradients, Pool, PutBack, as_target, erase_disc, growth_loss, living

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)
sides = st.integers(1, 6)


def generator(seed=0): return torch.Generator().manual_seed(seed)

def automaton(seed=0, channels=5, hidden=6, rate=0.5, std=0.3):
    "One whose last layer isn't zero, so that it does something."
    set_seed(seed)
    model = CellularAutomaton(channels, hidden, rate)
    nn.init.normal_(model.rule[-1].weight, std=std)
    return model

def random_state(n, channels, h, w, seed=0): return torch.randn(n, channels, h, w, generator=generator(seed))

def bar(side=8):
    "A target: an upright stroke."
    image = torch.zeros(4, 4)
    image[:, 1:3] = 1.
    return as_target(image, side)


# The rule

def perceive_by_loops(state):
    kernels = [[[0, 0, 0], [0, 1, 0], [0, 0, 0]], [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]]
    n, channels, h, w = state.shape
    out = torch.zeros(n, 3*channels, h, w)
    for c in range(channels):
        for k, (kernel, size) in enumerate(zip(kernels, (1, 8, 8))):
            for i in range(h):
                for j in range(w):
                    for u in range(3):
                        for v in range(3):
                            if 0 <= i + u - 1 < h and 0 <= j + v - 1 < w:
                                out[:, 3*c + k, i, j] += kernel[u][v]/size*state[:, c, i + u - 1, j + v - 1]
    return out

@FAST
@given(seeds, st.integers(1, 2), st.integers(2, 3), sides, sides)
def test_perception_equals_loops(seed, n, channels, h, w):
    state = random_state(n, channels, h, w, seed)
    near(CellularAutomaton(channels, 1).perceive(state), perceive_by_loops(state))

def test_perception_measures_slopes():
    "On a plane a*x + b*y, inside: the number itself, a, b."
    y, x = torch.meshgrid(torch.arange(6.), torch.arange(7.), indexing='ij')
    seen = CellularAutomaton(2, 1).perceive(torch.stack([2*x - 3*y, x])[None])[0, :, 1:-1, 1:-1]
    near(seen[0], (2*x - 3*y)[1:-1, 1:-1])
    for channel, slope in ((1, 2.), (2, -3.), (4, 1.), (5, 0.)): near(seen[channel], torch.full_like(seen[channel], slope), atol=1e-4)

def step_by_loops(model, state, awake):
    "The rule cell by cell, as two matrix products."
    seen, (n, _, h, w) = perceive_by_loops(state), state.shape
    first, last = model.rule[0], model.rule[2]
    new = state.clone()
    for b in range(n):
        for i in range(h):
            for j in range(w):
                if awake[b, 0, i, j]: new[b, :, i, j] += last.weight[:, :, 0, 0] @ F.relu(first.weight[:, :, 0, 0] @ seen[b, :, i, j] + first.bias)
    def alive(state, b, i, j): return state[b, 1, max(0, i - 1):i + 2, max(0, j - 1):j + 2].max() > ALIVE
    kept = torch.tensor([[[[bool(alive(state, b, i, j) and alive(new, b, i, j)) for j in range(w)] for i in range(h)]] for b in range(n)])
    return new*kept

@FAST
@given(seeds, st.integers(1, 2), st.integers(2, 4), sides, sides, st.sampled_from([0.3, 0.5, 1.]))
def test_a_step_equals_loops(seed, n, channels, h, w, rate):
    model, state = automaton(seed, channels, 3, rate), random_state(n, channels, h, w, seed)
    awake = torch.rand(n, 1, h, w, generator=generator(seed)) < rate
    with torch.no_grad(): near(model.step(state, generator(seed)), step_by_loops(model, state, awake), atol=1e-4)

@FAST
@given(seeds, sides, sides)
def test_a_last_layer_of_zeros_changes_nothing(seed, h, w):
    "But for what is far from life."
    set_seed(seed)
    model, state = CellularAutomaton(3, 4), random_state(2, 3, h, w, seed)
    assert model.step(state).equal(state*living(state))
    assert model.grow(state, 3).equal(state*living(state))

@FAST
@given(seeds, st.integers(1, 6))
def test_life_spreads_by_one_cell_a_step_at_most(seed, steps):
    "What is farther away is zero, and stays zero, also where the rule would change it."
    model = automaton(seed)
    nn.init.ones_(model.rule[0].bias)  # the rule has something to say about empty cells
    with torch.no_grad(): state = model.grow(model.one_cell(15), steps, generator(seed))
    row = (torch.arange(15) - 7).abs()
    near_enough = torch.maximum(row[:, None], row) <= steps
    assert not state[..., ~near_enough].any()
    dead = torch.zeros(2, 5, 4, 4)
    dead[:, [0, 2]] = 1.  # gray and hidden numbers are no life
    with torch.no_grad(): assert not model.grow(dead, steps).any()

@FAST
@given(seeds, st.integers(-2, 2), st.integers(-2, 2))
def test_where_a_form_stands_makes_no_difference(seed, dx, dy):
    "With all cells awake, and away from the border, a moved start grows into the same form, moved."
    model = automaton(seed, rate=1.)
    start = torch.zeros(1, 5, 15, 15)
    start[..., 6:9, 6:9] = random_state(1, 5, 3, 3, seed)
    with torch.no_grad(): near(model.grow(start.roll((dy, dx), (2, 3)), 3), model.grow(start, 3).roll((dy, dx), (2, 3)))

def test_a_turned_form_is_another():
    "Sobel's kernels tell right from left and up from down, so a rule may, too."
    model, state = automaton(0, rate=1.), random_state(1, 5, 6, 6)
    with torch.no_grad():
        for turned in (state.flip(2), state.flip(3), state.transpose(2, 3)):
            undone = model.step(turned).flip(2) if turned is state.flip(2) else model.step(turned)
            assert not torch.allclose(undone, model.step(state))

@FAST
@given(seeds)
def test_grids_of_a_batch_dont_see_each_other(seed):
    model, state = automaton(seed, rate=1.), random_state(3, 5, 4, 4, seed)
    with torch.no_grad(): near(model.grow(state, 3), torch.cat([model.grow(part, 3) for part in state.split(1)]))

def test_growth_has_a_seed():
    "The same seed gives the same growth, by a generator or PyTorch's own; another one another growth. The state given stays."
    model = automaton()
    start = model.one_cell(9, 2)
    with torch.no_grad(): a, b, c = (model.grow(start, 6, generator(seed)) for seed in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and not a[0].equal(a[1])
    torch.manual_seed(0)
    with torch.no_grad(): assert model(start, 6).equal(a)
    assert start.equal(model.one_cell(9, 2))

def test_some_cells_sleep():
    "About `rate` of them change; with rate 1 all do."
    for rate in (0.25, 0.5, 1.):
        model = automaton(rate=rate)
        state = torch.ones(4, 5, 40, 40)
        state[:, 0] = random_state(4, 1, 40, 40)[:, 0]
        with torch.no_grad(): changed = (model.step(state, generator()) != state).any(1).float().mean().item()
        assert abs(changed - rate) < 0.03

def test_one_cell():
    state = CellularAutomaton(4, 1).one_cell(5, 3)
    assert state.shape == (3, 4, 5, 5) and state.sum() == 9 and (state[:, 1:, 2, 2] == 1).all()
    assert CellularAutomaton(4, 1).double().one_cell(5).dtype is torch.float64

def test_gradients_reach_the_rule_through_all_steps():
    model = automaton().double()
    start = torch.rand(1, 5, 4, 4, generator=generator(), dtype=torch.float64) + 1.
    def loss(weight):
        state = start
        for i in range(3):
            awake = (torch.rand(1, 1, 4, 4, generator=generator(i)) < 0.5).double()
            state = state + F.conv2d(F.relu(model.rule[0](model.perceive(state))), weight)*awake
        return state.square().mean()
    assert torch.autograd.gradcheck(loss, model.rule[2].weight.detach().mul(0.1).requires_grad_())
    model.grow(start, 3, generator()).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())

def test_state_dict_round_trip(tmp_path):
    "The weights are all there is, 3,136 of them; the kernels are fixed."
    model = automaton(0, 12, 64)
    assert sum(v.numel() for v in model.state_dict().values()) == 3136
    save_weights(model, tmp_path/'model.safetensors')
    for other in (automaton(1, 12, 64), pickle.loads(pickle.dumps(automaton(2, 12, 64))), copy.deepcopy(model)):
        load_weights(other, tmp_path/'model.safetensors')
        with torch.no_grad(): assert other.grow(other.one_cell(8), 5, generator()).equal(model.grow(model.one_cell(8), 5, generator()))


# Targets and damage

@FAST
@given(sides, sides, st.integers(0, 5))
def test_a_target_stands_in_the_middle(h, w, more):
    image, side = torch.rand(h, w, generator=generator(h)), max(h, w) + more
    gray, alive = as_target(image, side)
    assert gray.shape == (side, side) and alive.equal((gray > ALIVE).float())
    top, left = (side - h)//2, (side - w)//2
    assert gray[top:top + h, left:left + w].equal(image)
    near(gray.sum(), image.sum())

@FAST
@given(seeds, st.integers(1, 4))
def test_a_disc_is_dead(seed, n):
    "What isn't dead is as it was; some cell is dead; the same seed gives the same disc, and each state its own."
    states = torch.rand(n, 3, 16, 16, generator=generator(seed)) + 1
    hurt = erase_disc(states, generator(seed))
    dead = hurt[:, 0] == 0
    assert hurt.equal(states*~dead[:, None]) and states.min() >= 1
    shares = dead.float().mean((1, 2))
    assert (shares > 0.05).all() and (shares < 0.32).all()  # pi*r**2 for a radius of 0.15 to 0.3, in whole cells
    assert hurt.equal(erase_disc(states, generator(seed)))
    if n > 1: assert not dead[0].equal(dead[1])

def test_growth_loss():
    state, target = random_state(3, 5, 8, 8), bar()
    near(growth_loss(state, target), F.mse_loss(state[:, :2], target.expand(3, -1, -1, -1)))
    near(growth_loss(state, target.expand(3, -1, -1, -1)), growth_loss(state, target))


# The pool

def pool_of(model, **options): return Pool(model.one_cell(8), bar(), **dict(size=10, bs=4, batches=5, steps=(3, 6)) | options)

def test_a_pool_gives_batches():
    model = automaton()
    pool, seen = pool_of(model, batches=60), set()
    for states, steps, targets in pool:
        assert states.shape == (4, 5, 8, 8) and targets.shape == (4, 2, 8, 8) and 3 <= steps <= 6
        assert len(set(pool.rows.tolist())) == 4
        seen.add(steps)
    assert len(pool) == 60 and seen == {3, 4, 5, 6}

@FAST
@given(seeds, st.integers(1, 6), st.integers(0, 6))
def test_a_pool_replaces_what_it_should(seed, bs, more):
    "The rows that were drawn, and no other; what is in stock is no part of a graph, and a batch is no view of the stock."
    model = automaton()
    pool = pool_of(model, size=bs + more, bs=bs, seed=seed)
    pool.states = random_state(bs + more, 5, 8, 8, seed)
    before = pool.states.clone()
    states, _, _ = pool.draw()
    rows = pool.rows
    others = torch.tensor([row not in rows for row in range(bs + more)])
    states.mul_(5)
    assert pool.states.equal(before)
    new = random_state(bs, 5, 8, 8, seed + 1).requires_grad_()
    pool.put_back(new)
    assert pool.states[rows].equal(new) and pool.states[others].equal(before[others]) and not pool.states.requires_grad

def test_the_worst_begins_anew_and_the_best_are_damaged():
    model = automaton()
    pool = pool_of(model, size=4, bs=4, damage=2)
    for row, size in enumerate((0.2, 0.9, 0.1, 0.5)): pool.states[row, :, 0, 0] = torch.tensor(size)*3
    pool.states[:, 2:] = 1.
    states, _, _ = pool.draw()
    errors = (pool.states[pool.rows, :2] - bar()).square().mean((1, 2, 3))
    assert (errors.diff() <= 0).all() and sorted(pool.rows.tolist()) == [0, 1, 2, 3]
    assert states[0].equal(model.one_cell(8)[0]) and states[1].equal(pool.states[pool.rows[1]])
    for i in (2, 3):
        dead = states[i, 2] == 0
        assert dead.any() and states[i].equal(pool.states[pool.rows[i]]*~dead)

def test_a_pool_has_a_seed():
    def drawn(seed):
        pool = pool_of(automaton(), seed=seed)
        return [(pool.rows.tolist(), steps) for _, steps, _ in pool]
    assert drawn(0) == drawn(0) != drawn(1)
    pool = pool_of(automaton())
    before = torch.get_rng_state()
    list(pool)
    assert torch.get_rng_state().equal(before)

def learner(seed=0, batches=5, **options):
    set_seed(seed)
    model = CellularAutomaton(5, 16)
    pool = pool_of(model, batches=batches, **options)
    cbs = [NormalizeGradients(), PutBack(pool)]
    return Learner(model, (pool, None), growth_loss, Adam, 5e-3, cbs=cbs, progress=False), pool

def test_trains_with_a_learner():
    "The loss falls, the stock fills, and the same seed gives the same bits."
    learn, pool = learner(batches=40)
    learn.fit(2)
    losses = learn.recorder.losses
    assert losses[-10:].mean() < 0.7*losses[:10].mean()
    assert not pool.states.equal(learn.model.one_cell(8).repeat(10, 1, 1, 1)) and pool.states.isfinite().all()
    again, other_pool = learner(batches=40)
    again.fit(2)
    assert again.recorder.losses.equal(losses) and other_pool.states.equal(pool.states)
    start = learn.model.one_cell(8)
    assert learn.predict(start, 3).shape == (1, 5, 8, 8)

def test_validation_leaves_the_stock_alone():
    learn, pool = learner()
    start = learn.model.one_cell(8, 2)
    learn.dls = pool, [(start, 4, bar().expand(2, -1, -1, -1))]
    class Watch(Callback):
        def before_batch(self, learn):
            if not learn.training: self.before = pool.states.clone()
        def after_batch(self, learn):
            if not learn.training: assert pool.states.equal(self.before)
    learn.fit(1, cbs=Watch())
    assert math.isfinite(learn.results['valid_loss'])

@pytest.mark.parametrize('at', [(2, None), (2, 3)])
def test_resumes_exactly(at, tmp_path):
    "Stock, coins and draws go on where they were, after an epoch or within one."
    class Stop(Exception): pass
    class Break(Callback):
        order = 1000
        def before_epoch(self, learn):
            if (learn.epoch, None) == at: raise Stop
        def after_batch(self, learn):
            if (learn.epoch, learn.iter + 1) == at: raise Stop
    whole, pool = learner(damage=1)
    whole.fit(4, cbs=Checkpoint(tmp_path/'whole', monitor=None))
    part, _ = learner(damage=1)
    with pytest.raises(Stop): part.fit(4, cbs=[Checkpoint(tmp_path/'part', every=1, monitor=None), Break()])
    torch.manual_seed(99)
    again, other_pool = learner(seed=7, damage=1)
    again.fit(4, cbs=Checkpoint(tmp_path/'part', resume=True, monitor=None))
    assert all(v.equal(again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert other_pool.states.equal(pool.states)

def test_normalized_gradients():
    "Each tensor's has length 1; zeros stay zeros, and none stays none."
    learn, _ = learner()
    found = []
    class Look(Callback):
        order = 1
        def after_backward(self, learn): found.append([p.grad.norm().item() for p in learn.model.rule.parameters()])
    learn.model.unused = nn.Parameter(torch.ones(2), requires_grad=False)
    learn.fit(1, cbs=Look())
    assert found[0][:2] == [0., 0.]  # behind a last layer of zeros
    near(torch.tensor(found[1:]), torch.ones(len(found) - 1, 3))


# What is refused, by name

@pytest.mark.parametrize('options, words', [
    (dict(channels=1), 'the channels to be a whole number of at least 2, got 1'), (dict(channels=2.5), 'the channels'), (dict(hidden=0), 'the hidden units'),
    (dict(rate=0), r'a rate in \(0, 1\], got 0'), (dict(rate=1.5), 'got 1.5'), (dict(rate=math.nan), 'got nan')])
def test_automata_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words): CellularAutomaton(**options)

@pytest.mark.parametrize('shape', [(5, 4, 4), (1, 4, 4, 4), (1, 5, 4), (2, 6, 4, 4)])
def test_states_of_another_shape(shape):
    for grow in (lambda s: automaton().step(s), lambda s: automaton().grow(s, 2)):
        with pytest.raises(ValueError, match=r'states \(n, 5, h, w\), got \('): grow(torch.zeros(shape))

def test_counts():
    model = automaton()
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match='the steps to be a whole number of at least 1'): model.grow(model.one_cell(4), steps)
    for bad in ((0,), (4, 0)):
        with pytest.raises(ValueError, match='at least 1, got 0'): model.one_cell(*bad)

def test_targets():
    for shape, found in (((5, 3), '5 x 3'), ((2, 5), '2 x 5')):
        with pytest.raises(ValueError, match=f'at least as large as the target, {found}, got 4 x 4'): as_target(torch.zeros(shape), 4)
    with pytest.raises(ValueError, match=r'an image \(h, w\), got shape \(1, 4, 4\)'): as_target(torch.zeros(1, 4, 4), 8)
    with pytest.raises(ValueError, match='the side of the grid'): as_target(torch.zeros(4, 4), 0)
    with pytest.raises(ValueError, match=r'a target \(2, 8, 8\), got \(2, 9, 9\)'): growth_loss(torch.zeros(1, 5, 8, 8), torch.zeros(2, 9, 9))

@pytest.mark.parametrize('options, words', [
    (dict(size=3), 'the size of the pool to be a whole number of at least 4, got 3'), (dict(bs=0), 'the batch size'), (dict(batches=0), 'the batches'),
    (dict(damage=-1), 'the damage'), (dict(damage=4), 'damage to fewer states than a batch has, got 4 of 4'), (dict(steps=(0, 5)), 'the steps'),
    (dict(steps=(6, 5)), 'got 6 to 5'), (dict(steps=5), 'fewest and most steps')])
def test_pools_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words): pool_of(automaton(), **options)

def test_pools_that_dont_fit():
    model = automaton()
    with pytest.raises(ValueError, match=r'a target \(2, 9, 9\), got \(2, 8, 8\)'): Pool(model.one_cell(9), bar())
    with pytest.raises(ValueError, match=r'one state \(1, channels, h, w\), got \(2, 5, 8, 8\)'): Pool(model.one_cell(8, 2), bar())
    for shape in ((5, 8, 8), (1, 1, 5, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match='one state'): Pool(torch.zeros(shape), bar())
    pool = pool_of(model)
    with pytest.raises(ValueError, match='draw a batch first'): pool.put_back(torch.zeros(4, 5, 8, 8))
    pool.draw()
    with pytest.raises(ValueError, match=r'states \(4, 5, 8, 8\), got \(3, 5, 8, 8\)'): pool.put_back(torch.zeros(3, 5, 8, 8))
