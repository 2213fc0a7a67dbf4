"Schedules as functions, whatever their numbers; and what the sweep and the scheduler leave behind."
import random
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from exp.nb_00 import set_seed
from exp.nb_02 import Model
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Callback, Learner
from exp.nb_15 import GradientClip
from exp.nb_11 import (Scheduler, combine_scheds, get_rng_state, sched_const, sched_cos, sched_exp, sched_lin, sched_one_cycle,
                       sched_poly, sched_wsd, set_rng_state)

VALUES = st.floats(1e-12, 1e6)
POSITIONS = st.floats(0, 1)
MAKERS = [sched_lin, sched_cos, sched_exp, sched_poly]

@pytest.mark.parametrize('maker', MAKERS, ids=lambda m: m.__name__)
@given(VALUES, VALUES, POSITIONS)
def test_exact_at_the_ends_and_between_them(maker, a, b, pos):
    sched = maker(a, b)
    assert sched(0) == a and sched(1) == b
    assert min(a, b)*(1 - 1e-12) <= sched(pos) <= max(a, b)*(1 + 1e-12)


@pytest.mark.parametrize('maker', MAKERS, ids=lambda m: m.__name__)
@given(VALUES, VALUES, POSITIONS, POSITIONS)
def test_monotone(maker, a, b, p, q):
    sched, (p, q) = maker(max(a, b), min(a, b)), sorted((p, q))
    assert sched(p) >= sched(q)*(1 - 1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), POSITIONS)
def test_combinations(weights, pos):
    "The parts cover [0, 1] without a gap: a staircase shows which part answers, a ramp how far it has got."
    fractions = [w/sum(weights) for w in weights]
    n = len(fractions)
    stairs, ramps = (combine_scheds(fractions, [maker(i) for i in range(n)]) for maker in (sched_const, lambda i: sched_lin(i, i + 1)))
    assert stairs(0) == 0 and stairs(1) == n - 1 and ramps(0) == 0 and ramps(1) == n
    i = stairs(pos)
    assert sum(fractions[:i]) <= pos + 1e-12 and pos <= sum(fractions[:i + 1]) + 1e-12
    assert abs(ramps(pos) - i - (pos - sum(fractions[:i]))/fractions[i]) < 1e-9


def test_where_two_parts_meet_the_second_answers():
    assert combine_scheds([0.5, 0.5], [sched_const(0), sched_const(1)])(0.5) == 1


@pytest.mark.parametrize('fractions', [[0.3, 0.3], [0.5, 0.6], [1.5, -0.5], [1, 0]])
def test_wrong_fractions(fractions):
    with pytest.raises(ValueError, match='add up to 1'): combine_scheds(fractions, [sched_const(1)]*2)


@pytest.mark.parametrize('pos', [-1e-9, 1.0001, float('nan')])
def test_progress_outside(pos):
    for sched in (sched_one_cycle(0.1, 1, 0), sched_wsd(0, 1, 0), sched_cos(0, 1)):
        with pytest.raises(ValueError, match='progress in'): sched(pos)


def data(n): return Dataset(torch.randn(n, 4), torch.randint(3, (n,)))

def new_learner(opt_func=torch.optim.SGD, model=None, **kwargs):
    set_seed(42)
    dls = DataLoader(data(96), 8, shuffle=True, seed=0), DataLoader(data(16), 8)
    return Learner(model() if model else Model(4, 8, 3), dls, opt_func=opt_func, progress=False, **kwargs)

def two_groups(params, lr):
    params = list(params)
    return torch.optim.Adam([dict(params=params[::2]), dict(params=params[1::2], lr=lr*10)], lr=lr)


class Watch(Callback):
    order = 1
    def __init__(self): self.seen = []
    def before_batch(self, learn):
        if learn.training: self.seen.append([(g['lr'], g['betas'][0]) for g in learn.opt.param_groups])

def test_groups_have_schedules_of_their_own():
    learn, watch = new_learner(two_groups), Watch()
    learn.fit(2, cbs=[Scheduler(lr=[sched_lin(1, 0), sched_const(3)], momentum=sched_lin(0.9, 0.5)), watch])
    assert len(watch.seen) == 24 and watch.seen[0] == [(1, 0.9), (3, 0.9)]
    assert watch.seen[12][0][0] == 0.5 and abs(watch.seen[-1][0][0] - 1/24) < 1e-12
    assert [(g['lr'], g['betas']) for g in learn.opt.param_groups] == [(0.1, (0.9, 0.999)), (1., (0.9, 0.999))]


def test_one_cycle_for_each_group():
    learn, watch = new_learner(two_groups), Watch()
    learn.fit_one_cycle(1, [0.1, 0.5], div=10, cbs=watch)
    assert watch.seen[0] == [(0.01, 0.95), (0.05, 0.95)] and max(s[1][0] for s in watch.seen) == 0.5
    plain = new_learner()
    plain.fit_one_cycle(1, 0.1)
    assert set(plain.recorder.momenta) == {0}, 'an optimizer without momentum must not get any'


def test_an_interrupted_schedule_is_put_back():
    class Stop(Callback):
        def after_step(self, learn):
            if learn.iter == 5: raise KeyboardInterrupt
    learn = new_learner(lr=0.1)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[Scheduler(lr=sched_lin(5, 0)), Stop()])
    assert learn.opt.param_groups[0]['lr'] == 0.1


def test_the_sweep_leaves_nothing_behind():
    "Buffers, generators, callbacks, optimizer, mode, and what the last fit recorded."
    model = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    learn = new_learner(model=model, cbs=GradientClip())
    learn.fit(1)
    def everything():
        return ([t.clone() for t in learn.model.state_dict().values()], learn.recorder.losses, learn.results, learn.dls, learn.opt, list(learn.cbs),
                torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), learn.dls[0].sampler.generator.get_state())
    before = everything()
    learn.model[2].eval()
    learn.lr_find(plot=False)
    assert [m.training for m in learn.model] == [True, True, False, True]
    for a, b in zip(before, everything()):
        if isinstance(a, list) and isinstance(a[0], torch.Tensor): assert all(map(torch.equal, a, b))
        elif isinstance(a, torch.Tensor): assert torch.equal(a, b)
        else: assert a is b or a == b


def test_a_sweep_before_the_first_fit_makes_no_optimizer():
    learn = new_learner()
    learn.lr_find(plot=False)
    assert learn.opt is None


def test_an_interrupted_sweep_restores_too():
    class Stop(Callback):
        def after_step(self, learn): raise KeyboardInterrupt
    learn = new_learner(cbs=(stop := Stop()))
    before, dls = [p.detach().clone() for p in learn.model.parameters()], learn.dls
    with pytest.raises(KeyboardInterrupt): learn.lr_find(plot=False)
    assert all(map(torch.equal, before, learn.model.parameters())) and learn.dls is dls and stop in learn.cbs


def test_all_generators():
    dl = DataLoader(data(8), 2, shuffle=True)
    torch_dl = torch.utils.data.DataLoader(data(8), 2, shuffle=True, generator=torch.Generator())
    def draw(): return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item(), [b[1].tolist() for d in (dl, torch_dl) for b in d]
    np.random.randn()  # leaves the second of a pair behind
    state = get_rng_state([dl, torch_dl])
    first = draw()
    set_rng_state(state, [dl, torch_dl])
    assert draw() == first != draw()
