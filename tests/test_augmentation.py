"""Images moved, turned, covered and mixed as strangers use them: any shape, type and layout, the data left as they were, the same for the same
seed; in a Learner beside other callbacks, stopped anywhere; and predictions from several views."""
import copy, math, pickle, random, subprocess, sys
from contextlib import suppress
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Callback, Learner
from exp.nb_11 import get_rng_state
from exp.nb_12 import EMA, SGD, AdamW
from exp.nb_13 import Checkpoint
from exp.nb_15 import BatchTransform, Device, GradientAccumulation, GradientClip
from exp.nb_24 import TTA, affine, cutmix, flip, mixup, random_affine, random_copy, random_erase, random_flip, random_shift, shift
from exp.nb_30 import MixedPrecision, Record

FAST = settings(deadline=None, max_examples=25)
DTYPES = torch.uint8, torch.int16, torch.bfloat16, torch.float16, torch.float32, torch.float64

WAYS = {'flip': flip, 'random_flip': random_flip, 'shift': partial(shift, down=1, right=-1), 'random_shift': partial(random_shift, pixels=3),
        'affine': partial(affine, degrees=25, zoom=0.8), 'random_affine': partial(random_affine, degrees=40, zoom=1.5),
        'random_erase': partial(random_erase, area=(0.1, 0.5), p=0.7), 'random_copy': partial(random_copy, area=(0.1, 0.5), p=0.7)}
FILLING = 'shift', 'random_shift', 'affine', 'random_affine', 'random_erase'
MIXES = {'mixup': mixup, 'cutmix': cutmix}
EVERY = {**WAYS, **{name: lambda x, f=f: f(x, torch.arange(len(x)), classes=max(1, len(x))) for name, f in MIXES.items()}}
ways, mixes = pytest.mark.parametrize('name', WAYS), pytest.mark.parametrize('mix', MIXES.values(), ids=MIXES)


def seeded(func, *args, seed=0, **options):
    set_seed(seed)
    return func(*args, **options)

def leaves(out): return [out] if isinstance(out, torch.Tensor) else [*out]

def numbered(*shape):
    "Images (n, c, h, w) in which no two pixels are the same; 0 is none of them."
    return torch.arange(1., math.prod(shape) + 1).view(shape)

LAYOUTS = {'as it is': lambda x: x, 'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
           'rows last': lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0), 'every other': lambda x: x.repeat_interleave(2, -1)[..., ::2],
           'a part': lambda x: torch.cat([x, x], -1)[..., x.shape[-1]:], 'expanded': lambda x: x[:1].expand(x.shape) if len(x) else x,
           'channels last': lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x}

@st.composite
def images(draw, dtypes=DTYPES):
    "Rows, gray images or images with channels, of any type and layout; none, one or a few; one pixel or some."
    n, c, h, w = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    shape = draw(st.sampled_from([(n, h*h), (n, h, w), (n, c, h, w)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randint(256, shape, generator=g).to(draw(st.sampled_from(dtypes)))
    return LAYOUTS[draw(st.sampled_from([*LAYOUTS]))](x/8 if x.is_floating_point() else x)


# Whatever the images

@ways
@given(x=images(), fill=st.integers(0, 255))
@FAST
def test_of_any_form(name, x, fill):
    "Shape, type and range stay; the input isn't changed, nor by what is done with the output; how it lies in memory doesn't matter."
    before, fills, way = x.clone(), name in FILLING, WAYS[name]
    way = partial(way, fill=fill) if fills else way
    out = seeded(way, x)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device) and x.equal(before)
    assert out.equal(seeded(way, before.contiguous()))
    if x.numel():
        low, high = (min(x.min().item(), fill), max(x.max().item(), fill)) if fills else (x.min().item(), x.max().item())
        slack = 1e-4 if x.dtype in (torch.float32, torch.float64) and 'affine' in name else 0  # bilinear weights have a sum of one up to rounding
        assert low - slack <= out.min() and out.max() <= high + slack
    out.zero_()
    assert x.equal(before)


@mixes
@given(x=images(), data=st.data())
@FAST
def test_mixed_of_any_form(mix, x, data):
    n, before = len(x), x.clone()
    y = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=data.draw(st.sampled_from([torch.int64, torch.int32, torch.uint8])))
    labels = y.clone()
    out, soft = seeded(mix, x, y, classes=5)
    assert (out.shape, out.dtype) == (x.shape, x.dtype) and (soft.shape, soft.dtype) == ((n, 5), torch.float32)
    near(soft.sum(1), torch.ones(n), atol=1e-6)
    if x.numel(): assert x.min() - 1e-4 <= out.min() and out.max() <= x.max() + 1e-4
    assert all(a.equal(b) for a, b in zip((out, soft), seeded(mix, before.contiguous(), labels, classes=5)))
    for t in (out, soft): t.zero_()
    assert x.equal(before) and y.equal(labels)


@mixes
def test_soft_targets_are_not_changed_either(mix):
    for n in (1, 6):
        x, q = torch.rand(n, 1, 4, 4), torch.rand(n, 3)
        before, target = x.clone(), q.clone()
        for t in seeded(mix, x, q): t.zero_()
        assert x.equal(before) and q.equal(target)


@pytest.mark.parametrize('name', EVERY)
def test_one_generator_and_always_the_same_draws(name):
    "PyTorch's generator of the CPU, which ends in the same state whatever the pixels and how many channels; NumPy's and Python's stay."
    x = torch.rand(6, 1, 9, 9)
    others = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    states = []
    for images in (x, torch.zeros(6, 3, 9, 9), (255*x).byte(), x.flatten(1), x.double() - 5):
        torch.manual_seed(1)
        EVERY[name](images)
        states.append(torch.get_rng_state())
    torch.manual_seed(1)
    assert all(s.equal(states[0]) for s in states)
    assert states[0].equal(torch.get_rng_state()) == (name in ('flip', 'shift', 'affine'))
    assert others == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])


@pytest.mark.parametrize('name', [n for n in EVERY if 'random' in n or n in MIXES])
def test_the_seed_decides(name):
    x = torch.rand(8, 1, 9, 9)
    def run(seed): return torch.cat([t.flatten(1) for t in leaves(seeded(EVERY[name], x, seed=seed))], 1)
    assert run(3).equal(run(3)) and not run(3).equal(run(4))


@pytest.mark.parametrize('func', [random_flip, random_erase, random_copy])
def test_p_changes_no_other_draw(func):
    for p in (0., 0.3, 1.):
        x = numbered(50, 1, 9, 9)
        whole, some = seeded(func, x, p=1.), seeded(func, x, p=p)
        changed = (some != x).flatten(1).any(1)
        assert some[changed].equal(whole[changed]) and (p < 1 or some.equal(whole)) and (p > 0 or not changed.any())
        state = torch.get_rng_state()
        seeded(func, x)
        assert state.equal(torch.get_rng_state())


def moves(x, out):
    "By how much each image with numbered pixels was moved, (rows, columns), read off one pixel that is still there."
    found = []
    for image, moved in zip(x, out):
        i, j = (moved[0] != 0).nonzero()[0].tolist()
        at = (image[0] == moved[0, i, j]).nonzero()[0].tolist()
        found.append((i - at[0], j - at[1]))
    return found

def boxes(mask):
    "Top, left, height and width of the box in each mask (n, h, w), which has to be whole."
    found = []
    for m in mask:
        i, j = m.any(1).nonzero()[:, 0].tolist(), m.any(0).nonzero()[:, 0].tolist()
        if not i: found.append(None)
        else:
            assert m[i[0]:i[-1] + 1, j[0]:j[-1] + 1].all(), 'no box'
            found.append((i[0], j[0], len(range(i[0], i[-1] + 1)), len(range(j[0], j[-1] + 1))))
    return found

def mixed_with(q):
    "The partner of each row and its own share, of one-hot targets that were mixed."
    own = q.diagonal()
    rest = q - own.diag()
    return [i if not rest[i].any() else rest[i].argmax().item() for i in range(len(q))], own

def test_known_numbers():
    "What this seed gives on every machine; if another version of PyTorch gives others, experiments differ from those that are printed."
    x, y = numbered(6, 1, 12, 12), torch.arange(6)
    assert moves(x, seeded(random_shift, x, 3, seed=5)) == MOVES
    assert boxes((seeded(random_erase, x, p=1., seed=5) == 0)[:, 0]) == ERASED
    partner, share = mixed_with(seeded(mixup, x, y, classes=6, seed=5)[1])
    assert partner == PARTNERS and (1000*share).round().int().tolist() == SHARES
    assert (144*mixed_with(seeded(cutmix, x, y, classes=6, seed=5)[1])[1]).round().int().tolist() == KEPT
    assert (seeded(random_flip, x, seed=5) != x).flatten(1).any(1).int().tolist() == FLIPPED

MOVES = [(2, 2), (-2, 0), (1, -2), (0, -1), (-3, 3), (2, -3)]
ERASED = [(0, 0, 4, 6), (6, 10, 3, 2), (6, 4, 4, 7), (3, 2, 7, 3), (6, 0, 6, 5), (6, 8, 3, 2)]
PARTNERS, SHARES = [1, 2, 5, 0, 3, 4], [66, 807, 36, 5, 34, 997]
KEPT, FLIPPED = [80, 144, 144, 108, 23, 95], [0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize('name', EVERY)
def test_the_default_type_does_not_matter(name):
    "To the last bit."
    x, results = torch.rand(64, 1, 9, 9), []
    for dtype in (torch.float32, torch.float64):
        try:
            torch.set_default_dtype(dtype)
            results.append(leaves(seeded(EVERY[name], x)))
        finally: torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(*results))


@pytest.mark.parametrize('name', EVERY)
def test_the_default_device_does_not_matter(name):
    "Nothing is made there, and nothing drawn: the images are where they are."
    x, y = torch.rand(6, 1, 9, 9), torch.arange(6)
    way = WAYS.get(name) or (lambda x: MIXES[name](x, y, classes=6)[0])
    expected = seeded(way, x)
    try:
        torch.set_default_device('meta')
        torch.manual_seed(0)
        out = way(x)
    finally: torch.set_default_device(None)
    assert out.device.type == 'cpu' and out.equal(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU to compare with')
@pytest.mark.parametrize('name', EVERY)
def test_a_gpu_gives_the_same(name):
    x = torch.rand(6, 1, 9, 9)
    way = WAYS.get(name) or (lambda x: MIXES[name](x, torch.arange(6, device=x.device), classes=6))
    for a, b in zip(leaves(seeded(way, x)), leaves(seeded(way, x.cuda()))): near(a, b.cpu(), atol=1e-5)


@pytest.mark.parametrize('name', EVERY)
def test_gradients_flow_and_switches_are_kept(name):
    "Back to the images; with no_grad and in inference mode none do, and the values are the same."
    def first(x): return leaves(seeded(EVERY[name], x))[0]
    x = torch.rand(6, 2, 9, 9, requires_grad=True)
    out = first(x)
    out.sum().backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).any(1).all() and x.grad.max() < 20
    with torch.no_grad(): assert not (again := first(x)).requires_grad and again.equal(out)
    with torch.inference_mode(): assert (again := first(x)).is_inference() and again.equal(out)
    near((first(x.detach() + 1e-2*(v := torch.randn_like(x))) - out).sum()/1e-2, (x.grad*v).sum(), rtol=0.02, atol=0.1)  # linear in the pixels


# Moved

@given(n=st.integers(0, 4), h=st.integers(1, 6), w=st.integers(1, 6), pixels=st.integers(0, 8), seed=st.integers(0, 99))
@FAST
def test_random_shift_gives_a_window_of_the_padded_image(n, h, w, pixels, seed):
    x = numbered(n, 2, h, w)
    padded, out = F.pad(x, [pixels]*4, value=-1), seeded(random_shift, x, pixels, -1, seed=seed)
    for image, moved in zip(padded, out):
        assert any(moved.equal(image[:, i:i + h, j:j + w]) for i in range(2*pixels + 1) for j in range(2*pixels + 1))


def test_random_shift_gives_all_moves_as_often():
    x = numbered(1, 1, 8, 8).expand(5000, 1, 8, 8)
    counts = torch.zeros(5, 5)
    for i, j in moves(x, seeded(random_shift, x, 2)): counts[i + 2, j + 2] += 1
    assert 140 < counts.min() and counts.max() < 260  # 200 each, and four standard deviations


@given(h=st.integers(1, 6), w=st.integers(1, 6), data=st.data())
@FAST
def test_shift_by_hand(h, w, data):
    down, right = data.draw(st.integers(-h, h)), data.draw(st.integers(-w, w))
    x, out = numbered(2, 2, h, w), torch.full((2, 2, h, w), -7.)
    for i in range(h):
        for j in range(w):
            if 0 <= i + down < h and 0 <= j + right < w: out[:, :, i + down, j + right] = x[:, :, i, j]
    assert shift(x, down, right, -7.).equal(out)

@pytest.mark.parametrize('down, right', [(9, 0), (0, -9), (40, 40)])
def test_shift_out_of_the_image(down, right): assert shift(torch.rand(2, 1, 8, 8), down, right, 3.).eq(3).all()


@given(x=images())
@FAST
def test_flips(x):
    side = math.isqrt(x.shape[1]) if x.ndim == 2 else 0
    grid = x.reshape(-1, side, side) if x.ndim == 2 else x
    assert flip(x).equal(grid.flip(-1).reshape(x.shape)) and flip(flip(x)).equal(x) and seeded(random_flip, x, p=1.).equal(flip(x))
    for image, mirrored, out in zip(x, flip(x), seeded(random_flip, x)): assert out.equal(image) or out.equal(mirrored)

@pytest.mark.parametrize('p', [0.2, 0.5, 0.9])
def test_as_many_are_flipped_as_asked_for(p):
    x = numbered(1, 1, 1, 2).expand(4000, 1, 1, 2)
    near((seeded(random_flip, x, p=p) != x).flatten(1).any(1).float().mean(), p, atol=0.03)


# Turned and enlarged

def by_torch(x, degrees, zoom):
    "Matrices for the whole batch, for square images."
    a, z = torch.as_tensor(degrees).deg2rad().expand(len(x)), torch.as_tensor(zoom).expand(len(x))
    rows = [torch.stack(r, -1) for r in ((a.cos()/z, -a.sin()/z, 0*a), (a.sin()/z, a.cos()/z, 0*a))]
    return F.grid_sample(x, F.affine_grid(torch.stack(rows, 1).to(x.dtype), x.shape, align_corners=False), align_corners=False)

@given(n=st.integers(1, 3), c=st.integers(1, 3), side=st.integers(1, 9), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]))
@FAST
def test_affine_is_that_of_pytorch_for_squares(n, c, side, seed, dtype):
    "Values and gradients; an angle and a zoom for each image, or one for all."
    set_seed(seed)
    x, weights = torch.randn(n, c, side, side, dtype=dtype), torch.randn(n, c, side, side, dtype=dtype)
    for degrees, zoom in ((360*torch.rand(n) - 180, 0.3 + 2*torch.rand(n)), (33., 1.2), (torch.tensor(-70.), torch.rand(n) + 0.5)):
        found = []
        for f in (affine, by_torch):
            image = x.clone().requires_grad_()
            out = f(image, degrees, zoom)
            found.append((out.detach(), torch.autograd.grad((weights*out).sum(), image)[0]))
        for ours, theirs in zip(*found): near(ours, theirs, atol=2e-4)


@given(x=images(), turns=st.integers(-4, 4))
@FAST
def test_quarter_turns(x, turns):
    "To the left, as rot90; by half a turn of images of any form."
    if x.ndim == 2: side = math.isqrt(x.shape[1])
    grid = x.reshape(-1, side, side) if x.ndim == 2 else x
    if grid.shape[-1] != grid.shape[-2]: turns *= 2
    out, expected = affine(x, 90.*turns), grid.rot90(turns, (-2, -1)).reshape(x.shape)
    if not x.is_floating_point(): assert out.equal(expected)
    elif x.numel(): near(out.float(), expected.float(), atol=1e-3, rtol=1e-2 if x.element_size() == 2 else 1e-5)

@pytest.mark.parametrize('h, w', [(8, 4), (7, 3), (4, 8)])
def test_a_quarter_turn_of_what_is_not_square(h, w):
    "About the middle; what goes out is lost, and what comes in is `fill`."
    x, small, up, left = numbered(2, 2, h, w), min(h, w), max(0, h - w)//2, max(0, w - h)//2
    inner = x[:, :, up:up + small, left:left + small]
    expected = torch.full_like(x, -5.)
    expected[:, :, up:up + small, left:left + small] = inner.rot90(1, (2, 3))
    near(affine(x, 90, fill=-5.), expected, atol=1e-3)


@given(x=images())
@FAST
def test_no_turn_and_no_zoom_is_no_change(x):
    for out in (affine(x), affine(x, fill=3.), seeded(random_affine, x, 0., 1.)):
        if not x.is_floating_point(): assert out.equal(x)
        elif x.numel(): near(out.float(), x.float(), atol=1e-4)

def test_angles_and_zooms_are_drawn_evenly():
    "A slope stays one when it is turned, so angle and zoom can be read off its middle."
    slope = (torch.arange(9.) - 4).expand(4000, 1, 9, 9)
    out = seeded(random_affine, slope, 30., 1.5)[:, 0]
    right, down = out[:, 4, 5] - out[:, 4, 4], out[:, 5, 4] - out[:, 4, 4]
    degrees, log_zoom = torch.atan2(-down, right).rad2deg()/30, -(right**2 + down**2).sqrt().log()/math.log(1.5)
    for drawn in (degrees, log_zoom):
        assert -1 - 1e-4 <= drawn.min() < -0.99 and 0.99 < drawn.max() <= 1 + 1e-4
        near(drawn.mean(), 0., atol=0.05)
        near(drawn.var(), 1/3, atol=0.03)
    near((30*degrees - (30*degrees).round()).abs().mean(), 0.25, atol=0.02)  # not in whole degrees
    near(torch.stack([degrees, log_zoom]).corrcoef()[0, 1], 0., atol=0.06)

def test_affine_keeps_the_digits_of_float64():
    x, change = torch.rand(2, 1, 9, 9).double(), torch.rand(2, 1, 9, 9).double()
    near((affine(x + 1e-7*change, 25, 1.2) - affine(x, 25, 1.2))/1e-7, affine(change, 25, 1.2), atol=1e-6)

@pytest.mark.parametrize('zoom', [2., 0.5])
def test_zoom_enlarges(zoom):
    x = torch.zeros(2, 1, 17, 17)
    x[:, :, 6:11, 6:11] = 1
    near(affine(x, 20, zoom).sum(), x.sum()*zoom**2, rtol=0.1)

@pytest.mark.parametrize('degrees, zoom', [(0., 0.), (float('nan'), 1.), (0., float('nan'))])
def test_affine_by_what_can_not_be(degrees, zoom):
    with pytest.raises(ValueError): affine(torch.rand(2, 1, 8, 8), degrees, zoom)


# Covered and copied

@given(n=st.integers(0, 5), h=st.integers(5, 12), c=st.integers(1, 3), seed=st.integers(0, 99), low=st.floats(0.05, 0.4), more=st.floats(0, 0.1))
@FAST
def test_random_erase_covers_one_box(n, h, c, seed, low, more):
    "Wholly inside, the same in all channels; its share as asked for, and at most twice as long one way, but for rounding."
    x = numbered(n, c, h, h)
    out = seeded(random_erase, x, (low, low + more), 1., -1., seed=seed)
    hidden = out == -1
    assert hidden.eq(hidden[:, :1]).all() and out.equal(x.masked_fill(hidden, -1))
    for top, left, height, width in boxes(hidden[:, 0]):
        assert (height - 0.5)*(width - 0.5) <= (low + more)*h*h + 1e-3 and (height + 0.5)*(width + 0.5) >= low*h*h - 1e-3
        assert (height - 0.5)/(width + 0.5) <= 2 + 1e-5 and (width - 0.5)/(height + 0.5) <= 2 + 1e-5

@pytest.mark.parametrize('h, w', [(6, 24), (24, 6)])
def test_shares_of_images_that_are_not_square(h, w):
    hidden = 1 - seeded(random_erase, torch.ones(500, 1, h, w), (0.08, 0.12), 1.)
    near(hidden.mean(), 0.1, atol=0.01)
    assert hidden.mean((1, 2, 3)).min() > 0.04 and hidden.mean((1, 2, 3)).max() < 0.18

def test_random_erase_covers_every_place_and_all_shares():
    x = torch.ones(3000, 1, 28, 28)
    hidden = 1 - seeded(random_erase, x, (0.1, 0.4), 1.)
    shares = hidden.mean((1, 2, 3))
    near([shares.min(), shares.mean(), shares.max(), shares.var()], [0.1, 0.25, 0.4, 0.3**2/12], atol=0.015)
    near(torch.tensor([b[2]/b[3] for b in boxes(hidden[:, 0] > 0)]).log().mean(), 0., atol=0.05)  # as often wide as high
    often = hidden.mean((0, 1))
    assert often.min() > 0 and all(often.allclose(often.rot90(k), atol=0.06) for k in (1, 2, 3))
    near((seeded(random_erase, x, p=0.3) == 0).flatten(1).any(1).float().mean(), 0.3, atol=0.03)

@pytest.mark.parametrize('shape, area', [((28, 28), (0.9, 1.)), ((10, 100), (0.2, 0.2)), ((100, 10), (0.5, 0.6))])
@pytest.mark.parametrize('func', [random_erase, random_copy])
def test_the_share_is_as_asked_for_in_every_image(func, shape, area):
    x = numbered(300, 1, *shape)
    shares = (seeded(func, x, area, 1.) != x).float().mean((1, 2, 3))
    shares = shares[shares > 0]  # a box may be copied to where it was
    assert shares.min() > area[0] - 0.08 and shares.max() < area[1] + 0.08


@given(n=st.integers(0, 5), h=st.integers(1, 12), w=st.integers(1, 12), c=st.integers(1, 3), seed=st.integers(0, 99))
@FAST
def test_random_copy_takes_a_part_of_the_same_image(n, h, w, c, seed):
    x = numbered(n, c, h, w)
    out = seeded(random_copy, x, (0.1, 0.4), 1., seed=seed)
    for i, ((image, new), box) in enumerate(zip(zip(x, out), boxes((out != x)[:, 0]))):
        if box is None: continue  # copied to where it was
        top, left, height, width = box
        source = (image[0] == new[0, top, left]).nonzero()
        assert len(source) == 1, 'of another image'
        (a, b), expected = source[0].tolist(), image.clone()
        assert a + height <= h and b + width <= w
        expected[:, top:top + height, left:left + width] = image[:, a:a + height, b:b + width]
        assert new.equal(expected)

def test_random_copy_covers_what_random_erase_does():
    "The same box, by the same draws; the part that is copied comes from every place."
    x = numbered(2000, 1, 11, 13)
    copied, erased = seeded(random_copy, x, seed=2), seeded(random_erase, x, seed=2)
    changed, hidden = copied != x, erased == 0
    assert not (changed & ~hidden).any() and changed.sum() > 0.9*hidden.sum()
    came = torch.zeros(11*13).index_add_(0, ((copied[changed] - 1) % (11*13)).long(), torch.ones(int(changed.sum())))
    assert came.min() > 0


# A fill that isn't of this type

FILLS = dict(shift=partial(shift, down=1), random_shift=random_shift, affine=partial(affine, degrees=45),
             random_erase=partial(random_erase, p=1.))

@pytest.mark.parametrize('func', FILLS.values(), ids=FILLS)
def test_a_fill_that_bytes_can_not_hold(func):
    with pytest.raises(ValueError, match='expected fill'): seeded(func, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), fill=-1)


@pytest.mark.parametrize('call', [
    lambda x: random_shift(x, -1), lambda x: random_shift(x, 1.5), lambda x: random_flip(x, -0.1), lambda x: random_flip(x, float('nan')),
    lambda x: random_affine(x, 5, 0.9), lambda x: random_affine(x, 5, float('nan')), lambda x: random_affine(x, 5, float('inf')), lambda x: random_affine(x, float('nan')),
    lambda x: random_affine(x, -1), lambda x: random_erase(x, (0.3, 0.1)),
    lambda x: random_erase(x, (-0.1, 0.1)), lambda x: random_erase(x, (0.1, 1.1)), lambda x: random_erase(x, p=2), lambda x: random_copy(x, (0.3, 0.1)),
    lambda x: random_copy(x, p=2), lambda x: mixup(x, torch.arange(4), classes=4, alpha=1e-3), lambda x: mixup(x, torch.arange(4), classes=4, alpha=float('nan')),
    lambda x: cutmix(x, torch.arange(4), classes=4, alpha=-1.), lambda x: cutmix(x, torch.arange(4), classes=4, p=1.5)])
def test_options_that_can_not_be(call):
    with pytest.raises(ValueError, match='expected'): call(torch.rand(4, 1, 8, 8))


# Mixed

@given(n=st.integers(1, 6), alpha=st.sampled_from([0.01, 0.1, 0.4, 1., 5., 100.]), seed=st.integers(0, 99))
@FAST
def test_mixup_mixes_inputs_as_it_mixes_labels(n, alpha, seed):
    "Each row with one other, or itself; all inputs with the same share."
    set_seed(seed)
    x, other = torch.rand(n, 2, 3), torch.rand(n, 5, dtype=torch.float64)
    a, b, q = mixup(x, other, torch.arange(n), classes=n, alpha=alpha)
    partner, share = mixed_with(q)
    assert sorted(partner) == [*range(n)] or (share == 0).any() or (share == 1).any()
    near(q.sum(1), torch.ones(n), atol=1e-6)
    for old, new in ((x, a), (other, b)): near(new.flatten(1).float(), (q.to(old.dtype) @ old.flatten(1)).float(), atol=1e-5)

@mixes
@pytest.mark.parametrize('alpha', [0.1, 0.4, 1., 10., 100.])
def test_shares_are_of_the_beta_distribution(mix, alpha):
    "Mean a half and variance 1/(4(2 alpha + 1)); as many of mixup's below any limit as of NumPy's."
    n = 1500
    _, share = mixed_with(seeded(mix, torch.zeros(n, 16, 16), torch.arange(n), classes=n, alpha=alpha)[1])
    share = share.double()  # about one row is its own partner
    near(share.mean(), 0.5, atol=0.05)
    near(share.var(), 1/(4*(2*alpha + 1)), rtol=0.12, atol=0.005)  # atol: whole pixels
    if mix is cutmix: return
    theirs = torch.from_numpy(np.random.default_rng(0).beta(alpha, alpha, 100_000))
    for limit in torch.linspace(0.05, 0.95, 19): near((share < limit).float().mean(), (theirs < limit).float().mean(), atol=0.05)

def test_a_small_alpha_mixes_next_to_nothing():
    q = seeded(mixup, torch.zeros(1000, 1), torch.arange(1000), classes=1000, alpha=0.01)[1]
    assert (q.max(1).values > 0.9).float().mean() > 0.95

@mixes
@pytest.mark.parametrize('alpha', [0.01, 100., 1e6])
def test_any_alpha_is_finite(mix, alpha):
    for n in (1, 50):
        x, q = seeded(mix, torch.rand(n, 8, 8), torch.arange(n), classes=n, alpha=alpha)
        assert x.isfinite().all() and q.isfinite().all() and 0 <= q.min() and q.max() <= 1


@given(n=st.integers(1, 6), h=st.integers(1, 9), w=st.integers(1, 9), c=st.integers(1, 3), seed=st.integers(0, 99), p=st.sampled_from([0., 0.5, 1.]))
@FAST
def test_cutmix_pastes_one_box_and_labels_are_shares_of_pixels(n, h, w, c, seed, p):
    x = numbered(n, c, h, w)
    out, twin, q = seeded(cutmix, x, -x, torch.arange(n), classes=n, p=p, seed=seed)
    partner, share = mixed_with(q)
    pasted = out != x
    assert twin.equal(-out) and pasted.eq(pasted[:, :1]).all() and out.equal(x[partner].where(pasted, x))
    kept = h*w - pasted[:, 0].sum((1, 2))
    assert (h*w*share).round().equal(kept.float().round()) and (h*w*share - kept).abs().max() <= 1e-4*h*w
    assert len(boxes(pasted[:, 0])) == n  # one in each image, and whole
    if p == 0: assert out.equal(x) and (share == 1).all()

@pytest.mark.parametrize('h, w', [(4, 20), (20, 4)])
def test_cutmix_boxes_have_the_form_of_the_image(h, w):
    x = numbered(300, 1, h, w)
    for box in boxes((seeded(cutmix, x, torch.arange(300), classes=300)[0] != x)[:, 0]):
        assert box is None or abs(box[2]/h - box[3]/w) <= 1/h + 1/w

def test_cutmix_covers_every_place_and_as_many_as_asked_for():
    n = 2000
    x = torch.arange(float(n))[:, None, None].expand(n, 12, 12)
    out, q = seeded(cutmix, x, torch.arange(n), classes=n, p=0.4)
    pasted = (out != x).float()
    near(pasted.flatten(1).any(1).float().mean(), 0.4, atol=0.04)
    assert pasted.mean(0).min() > 0.04 and pasted.mean(0).allclose(pasted.mean(0).flip(0, 1), atol=0.06)


def test_whole_numbers_are_mixed_to_the_nearest():
    "And two of the same number give that number."
    for dtype in (torch.uint8, torch.int16, torch.int64):
        x = torch.randint(256, (60, 9)).to(dtype)
        out, q = seeded(mixup, x, torch.arange(60), classes=60)
        assert (out - q.double() @ x.double()).abs().max() <= 0.5001
        assert seeded(mixup, torch.full_like(x, 255 if dtype is torch.uint8 else -333), torch.arange(60), classes=60)[0].unique().numel() == 1

@mixes
def test_targets_of_every_kind(mix):
    x = torch.rand(6, 1, 4, 4)
    for y in (torch.arange(6), torch.arange(6).int(), torch.arange(6).byte(), torch.arange(6).short()):
        q = seeded(mix, x, y, classes=7)[1]
        assert q.equal(seeded(mix, x, F.one_hot(y.long(), 7).float())[1]) and q[:, 6].eq(0).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        soft = seeded(mix, x, F.one_hot(torch.arange(6), 7).to(dtype))[1]
        assert soft.dtype == dtype
        near(soft.float(), q, atol=0.01)
    values = torch.randn(6)
    near(seeded(mix, x, values)[1], q[:, :6] @ values, atol=1e-5)  # one number to predict
    with pytest.raises(ValueError, match='expected classes='): mix(x, torch.arange(6))

def test_maps_of_classes_and_sequences():
    for shape in ((6, 5, 4), (6, 9)):
        y = torch.randint(3, shape)
        x, q = seeded(mixup, torch.rand(6, 2), y, classes=3)
        near(q, seeded(mixup, torch.rand(6, 2), F.one_hot(y, 3).movedim(-1, 1).float())[1], atol=0)
        near(q.sum(1), torch.ones(shape), atol=1e-6)
        assert F.cross_entropy(torch.randn(q.shape), q).isfinite()
        with pytest.raises(ValueError, match='one label for each image'): cutmix(torch.rand(6, 8, 8), y, classes=3)
    with pytest.raises(ValueError, match='one label for each image'): cutmix(torch.rand(6, 8, 8), torch.rand(6, 3, 8))

@mixes
@pytest.mark.parametrize('y', [[0, 1, 5], [0, -1, 2], [0, -100, 2]])
def test_labels_out_of_range(mix, y):
    with pytest.raises((ValueError, RuntimeError), match='[Cc]lass|label'): mix(torch.rand(3, 4, 4), torch.tensor(y), classes=5)

@mixes
@pytest.mark.parametrize('call', [lambda mix: mix(torch.rand(3, 4, 4), torch.tensor([0, 1, 2]), classes=-1),
                                  lambda mix: mix(torch.rand(6, 4, 4), torch.tensor([1]), classes=3)], ids=['classes=-1', 'rows'])
def test_batches_that_can_not_be(mix, call):
    with pytest.raises(ValueError): call(mix)

@mixes
def test_one_row_and_none(mix):
    x, y = torch.rand(1, 3, 4, 5), torch.tensor([2])
    out, q = seeded(mix, x, y, classes=3)
    near(out, x)
    near(q, torch.tensor([[0., 0., 1.]]))
    out, q = mix(x[:0], y[:0], classes=3)
    assert out.shape == (0, 3, 4, 5) and q.shape == (0, 3)


@mixes
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_losses_take_it(mix, dtype):
    "Cross-entropy of the mixed labels is the mixed cross-entropy, with smoothed labels and weights of classes, too."
    y, scores, weight = torch.arange(6) % 4, torch.randn(6, 4).to(dtype).requires_grad_(), (torch.rand(4) + 0.5).to(dtype)
    q, pairs = seeded(mix, torch.rand(6, 8, 8), y, classes=4)[1], seeded(mix, torch.rand(6, 8, 8), torch.arange(6), classes=6)[1]
    for options in ({}, dict(label_smoothing=0.1), dict(weight=weight), dict(weight=weight, label_smoothing=0.1)):
        loss = nn.CrossEntropyLoss(**options)(scores, q)
        exact = {k: v.double() if k == 'weight' else v for k, v in options.items()}
        expected = sum(pairs[:, j]*F.cross_entropy(scores.double(), y[j].expand(6), reduction='none', **exact) for j in range(6)).mean()
        near(loss.double(), expected.double(), rtol=0.03 if dtype == torch.bfloat16 else 1e-4)
        grad, = torch.autograd.grad(loss, scores)
        assert grad.dtype == dtype and grad.isfinite().all() and grad.any()

@mixes
def test_one_after_the_other(mix):
    x, q = seeded(cutmix, *mix(torch.rand(8, 1, 6, 6), torch.arange(8) % 3, classes=3))
    near(q.sum(1), torch.ones(8), atol=1e-6)
    assert x.shape == (8, 1, 6, 6)


# In a Learner

def data(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 64, generator=g), torch.randint(3, (n,), generator=g))

class Net(nn.Module):
    "Rows of 8 x 8 pixels to three scores."
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    def forward(self, x): return self.layers(x)

def new_learner(cbs=(), seed=42, lr=0.01, train=None, valid=None, **options):
    set_seed(seed)
    model, dls = Net(), (DataLoader(train or data(), 8, shuffle=True), DataLoader(valid or data(20, 1), 8))
    return Learner(model, dls, lr=lr, cbs=cbs, progress=False, **dict(dict(opt_func=AdamW, metrics=accuracy), **options))

def move(x): return random_affine(random_shift(x, 1), 10., 1.1)
def mixing(): return [BatchTransform(move), BatchTransform(partial(mixup, classes=3)), BatchTransform(partial(cutmix, classes=3))]
def on(event, do, **attributes): return type('Doing', (Callback,), {event: lambda self, learn: do(learn), **attributes})()
def weights(learn): return torch.cat([p.detach().reshape(-1) for p in learn.model.state_dict().values()])

def run(cbs=(), epochs=2, **options):
    learn = new_learner(cbs, **options)
    learn.fit(epochs)
    return learn

def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def outcome(learn):
    return dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), losses=learn.recorder.losses, results=learn.results, random=get_rng_state(learn.dls))

@pytest.mark.parametrize('func', [*WAYS.values(), partial(mixup, classes=3), partial(cutmix, classes=3)], ids=EVERY)
def test_only_what_is_trained_on_is_changed(func):
    "And the data aren't; labels only by those that mix; what is validated on and predicted for is as in the data, bit for bit."
    train, valid, seen = data(), data(20, 1), {True: [], False: []}
    look = on('after_predict', lambda learn: seen[learn.training].append([None if t is None else t.clone() for t in learn.batch]), everywhere=True)
    learn = new_learner([BatchTransform(func), look], train=train, valid=valid)
    learn.fit(2)
    assert train.x.equal(data().x) and train.y.equal(data().y) and valid.x.equal(data(20, 1).x)
    xs, ys = map(torch.cat, zip(*seen[False]))
    assert xs.equal(valid.x.repeat(2, 1)) and ys.equal(valid.y.repeat(2))
    xs, ys = map(torch.cat, zip(*seen[True]))
    rows = {tuple(x.tolist()) for x in train.x}
    assert not all(tuple(x.tolist()) in rows for x in xs) and xs.shape == (80, 64)
    mixed = getattr(func, 'func', None) in (mixup, cutmix)
    assert ys.shape == ((80, 3) if mixed else (80,)) and (mixed or ys.sort().values.equal(train.y.repeat(2).sort().values))
    model, before = learn.model.eval(), torch.get_rng_state()
    with torch.no_grad(): expected = model(valid.x)
    near(learn.get_preds()[0], expected, atol=1e-6)
    assert learn.predict(valid.x).equal(expected) and learn.get_preds()[1].equal(valid.y) and torch.get_rng_state().equal(before)

def test_validation_is_that_of_the_plain_data():
    "With a rate of zero the weights stay, and so do all results of validation but for the running statistics, which there are none of here."
    def fit(cbs):
        set_seed(1)
        learn = Learner(nn.Linear(64, 3), (DataLoader(data(), 8), DataLoader(data(20, 1), 8)), lr=0., opt_func=SGD, metrics=accuracy, cbs=cbs, progress=False)
        learn.fit(2)
        return learn.results['valid_loss'], learn.results['accuracy'], learn.validate()
    assert fit(mixing()) == fit(())

class Mix(nn.Module):
    def forward(self, *batch): return mixup(*batch, classes=3)
class Move(nn.Module):
    def forward(self, x): return random_shift(x)

@pytest.mark.parametrize('form, plain', [(lambda x: random_shift(x), random_shift), (Move(), random_shift), (nn.Sequential(Move()), random_shift),
                                         (partial(random_shift, pixels=2), random_shift), (lambda x, y: (random_shift(x), y), random_shift),
                                         (Mix(), partial(mixup, classes=3)), (lambda x, y: mixup(x, y, classes=3), partial(mixup, classes=3))])
def test_functions_of_every_form(form, plain):
    learn = run(BatchTransform(form))
    assert same(outcome(learn), outcome(run(BatchTransform(plain)))) and not weights(learn).equal(weights(run()))

@pytest.mark.parametrize('limit', [0.1, 1000.])
def test_the_gradient_of_accumulated_batches_of_mixed_labels(limit):
    "Two halves make the step of the whole, of the same mixed rows; and clipping sees that gradient."
    set_seed(0)
    halves = [(torch.randn(8, 64), torch.randint(3, (8,))) for _ in range(2)]
    mixed, norms = [], []
    watch = on('after_backward', lambda learn: norms.append(sum(p.grad.pow(2).sum() for p in learn.model.parameters()).sqrt()), order=5)
    def fit(batches, *cbs):
        torch.manual_seed(3)
        model = nn.Linear(64, 3)
        Learner(model, (batches, None), lr=1., opt_func=SGD, cbs=[*cbs, GradientClip(limit), watch], progress=False).fit(1)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    keep = on('after_predict', lambda learn: mixed.append(learn.batch))
    accumulated = fit(halves, BatchTransform(partial(mixup, classes=3)), GradientAccumulation(2), keep)
    near(accumulated, fit([tuple(map(torch.cat, zip(*mixed)))]), atol=1e-5)
    assert mixed[0][1].shape == (8, 3) and len(norms) == 2 and (limit > 1 or 0.09 < norms[0] < 0.1001) and (limit < 1 or norms[0] > 0.5)

COMPANY = {'accumulation': lambda: [GradientAccumulation(2)], 'average': lambda: [EMA(0.5)], 'clipped': lambda: [GradientClip(0.5)],
           'device': lambda: [Device('cpu')], 'all': lambda: [Device('cpu'), GradientAccumulation(3), EMA(0.9), GradientClip(0.1)],
           'mixed precision': lambda: [MixedPrecision(), EMA(0.9)]}

@pytest.mark.parametrize('name', COMPANY)
def test_in_company(name):
    "It is as if the changed batches were the data: a training of batches that were kept gives the same weights."
    kept = []
    keep = on('after_predict', lambda learn: kept.append(tuple(t.clone() for t in learn.batch)) if learn.training else None)
    def fit(train, cbs):
        set_seed(5)
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
        learn = Learner(model, (train, DataLoader(data(20, 1), 8)), lr=0.05, opt_func=AdamW, cbs=[*cbs, *COMPANY[name]()], progress=False)
        learn.fit(1)
        return outcome(learn)
    torch_loader = torch.utils.data.DataLoader(data(), 8)
    a = fit(torch_loader, [*mixing(), keep])
    b = fit(kept.copy(), [])
    assert len(kept) == 5 and all(same(a[k], b[k]) for k in ('model', 'opt', 'losses', 'results'))


def test_a_fit_within_a_callback():
    "It has the transform only if it is given one; the outer one goes on with its own."
    shapes, inner = [], []
    watch = on('after_predict', lambda learn: inner.append(learn.yb.ndim) if learn.training else None)
    def fit_another(learn):
        if learn.iter != 2 or learn.epoch: return
        other = new_learner(seed=7)
        other.fit(1, cbs=[BatchTransform(partial(cutmix, classes=3)), watch])
        learn.fit(1, cbs=watch)
    look = on('after_predict', lambda learn: shapes.append(learn.yb.ndim) if learn.training and learn.depth == 1 else None)
    learn = new_learner()
    learn.fit(2, cbs=[BatchTransform(partial(mixup, classes=3)), on('after_backward', fit_another), look])
    assert shapes == [2]*10 and len(inner) == 10 and inner[:5] == [2]*5 and learn.recorder.losses.isfinite().all()


# Recorded

@pytest.mark.parametrize('cbs', [mixing, lambda: [BatchTransform(move)], lambda: [BatchTransform(partial(mixup, classes=3)), EMA(0.9), GradientClip(0.5)],
                                 lambda: [*mixing(), MixedPrecision()]], ids=['mixed', 'moved', 'averaged', 'sixteen bits'])
def test_recorded_is_eager(cbs):
    "The transform is no part of the recording: each batch is changed anew, with the same bits."
    record = Record()
    a, b = run(cbs(), epochs=3), run([*cbs(), record], epochs=3)
    assert same(outcome(a), outcome(b)) and len(a.recorder.losses) == 15 and len(record.made) == 1
    assert len(set(a.recorder.losses.tolist())) == 15

def test_recorded_when_labels_change_their_form():
    "Mixed in every other batch: two recordings."
    turn = []
    def sometimes(x, y):
        turn.append(1)
        return mixup(x, y, classes=3) if len(turn) % 2 else (x, y)
    a = run(BatchTransform(sometimes))
    turn.clear()
    record = Record()
    b = run([BatchTransform(sometimes), record])
    assert same(outcome(a), outcome(b)) and len(record.made) == 2


# Stopped, and gone on with

class Stop(Callback):
    "Raises after so many training batches, behind or before the checkpoint."
    def __init__(self, batches, order): self.left, self.order = batches, order
    def after_batch(self, learn):
        self.left -= learn.training
        if learn.training and self.left == 0: raise InterruptedError

def test_resumed_after_any_batch(tmp_path):
    "In a new Learner with another seed: weights, optimizer, losses, results and random states, bit for bit."
    def cbs(): return [*mixing(), BatchTransform(lambda x: random_copy(random_erase(random_flip(x)))), EMA(0.9)]
    whole = outcome(run(cbs()))
    for batches in range(1, 11):
        for order in (99, 101) if batches in (4, 5, 6) else (101,):
            folder = tmp_path/f'{batches}-{order}'
            with suppress(InterruptedError): new_learner().fit(2, cbs=[*cbs(), Stop(batches, order), Checkpoint(folder, every=1)])
            learn = new_learner(seed=batches)
            learn.fit(2, cbs=[*cbs(), Checkpoint(folder, every=1, resume=True)])
            assert same(outcome(learn), whole), (batches, order)

SCRIPT = '''
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_augmentation import *
def die(learn):
    if learn.training and (learn.epoch, learn.iter) == (1, 1): os._exit(9)
new_learner().fit(2, cbs=[*mixing(), Checkpoint(sys.argv[2], every=1), on('after_batch', die, order=101)])
'''

def test_resumed_where_the_process_was_killed(tmp_path):
    done = subprocess.run([sys.executable, '-c', SCRIPT, str(Path(__file__).parent), str(tmp_path/'run')], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    learn = new_learner(seed=3)
    learn.fit(2, cbs=[*mixing(), Checkpoint(tmp_path/'run', every=1, resume=True)])
    assert same(outcome(learn), outcome(run(mixing())))


# Several views

def up(x): return shift(x, -1, 0)
def swapped(a, b): return b, a
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)
    def forward(self, a, b): return self.left(a) + 2*self.right(b)

def conv(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))

@pytest.mark.parametrize('views', [[], [flip], [flip, up, lambda x: flip(up(x))], [nn.Identity(), partial(affine, degrees=10)]])
def test_mean_of_the_views_by_hand(views):
    model, x = conv().eval(), torch.rand(5, 1, 8, 8)
    expected = torch.stack([model(x), *(model(view(x)) for view in views)]).mean(0)
    near(TTA(model, views).eval()(x), expected, atol=1e-6)
    near(TTA(model, iter(views)).eval()(x), expected, atol=1e-6)  # used up the first time it is read
    tta = TTA(model, (view for view in views)).eval()
    for _ in range(2): near(tta(x), expected, atol=1e-6)

def test_models_of_two_inputs():
    model, a, b = Two(), torch.rand(5, 4), torch.rand(5, 4)
    near(TTA(model, [swapped])(a, b), (model(a, b) + model(b, a))/2, atol=1e-6)
    near(TTA(model, [swapped, lambda a, b: (2*a, b)])(a, b), (model(a, b) + model(b, a) + model(2*a, b))/3, atol=1e-6)
    near(TTA(nn.Linear(4, 3), [lambda x: (x,)])(a).shape, (5, 3))

def test_it_is_a_module_as_others_are():
    "Modes, parameters, state_dict, deepcopy and pickle."
    tta, x = TTA(conv(), [flip, up]), torch.rand(5, 1, 8, 8)
    assert all(m.training for m in tta.modules()) and not TTA(conv().eval(), [flip]).model.training
    assert [*tta.state_dict()] == [f'model.{k}' for k in tta.model.state_dict()] and len([*tta.parameters()]) == 6
    tta.eval()
    assert not tta.model.training and not any(m.training for m in tta.modules())
    other = TTA(conv(), [flip, up]).eval()
    assert not other(x).equal(tta(x))
    other.load_state_dict(tta.state_dict())
    for twin in (other, copy.deepcopy(tta), pickle.loads(pickle.dumps(tta))):
        assert twin(x).equal(tta(x)) and twin.model is not tta.model and not twin.training
    copied = copy.deepcopy(tta)
    with torch.no_grad(): copied.model[0].weight.zero_()
    assert not copied(x).equal(tta(x))
    tta.train()
    assert all(m.training for m in tta.modules()) and not tta(x).equal(tta(x))  # dropout
    assert tta.double()(x.double()).dtype == torch.float64

def test_gradients_of_the_mean():
    model, x = conv().eval(), torch.rand(5, 1, 8, 8, requires_grad=True)
    def grads(out): return torch.autograd.grad(out.pow(2).sum(), [x, *model.parameters()])
    for ours, theirs in zip(grads(TTA(model, [flip, up])(x)), grads((model(x) + model(flip(x)) + model(up(x)))/3)): near(ours, theirs, atol=1e-5)

@pytest.mark.parametrize('views', [[None], [flip, 'up'], [torch.rand(3)]])
def test_views_that_can_not_be(views):
    with pytest.raises(TypeError, match='expected functions as views'): TTA(nn.Identity(), views)

def test_views_in_a_learner():
    "Validated and predicted with; trained through."
    learn = run(mixing())
    tta = TTA(learn.model, [flip, up])
    views = Learner(tta, learn.dls, metrics=accuracy, progress=False)
    x, y = data(20, 1).x, data(20, 1).y
    results, (preds, targets) = views.validate(), views.get_preds()
    with torch.no_grad(): expected = tta.eval()(x)
    near(preds, expected, atol=1e-6)
    near([results['valid_loss'], results['accuracy']], [F.cross_entropy(expected, y), accuracy(expected, y)], atol=1e-5)
    assert targets.equal(y) and not expected.equal(learn.predict(x)) and views.predict(x).equal(expected)
    before = weights(learn)
    views.fit(1)
    assert not weights(learn).equal(before)


# What strangers try

def test_one_colour_image_is_three_gray_ones():
    "(3, h, w) can't be told from three images, so each channel is changed on its own; [None] makes a batch of it."
    x = numbered(3, 9, 9)
    assert len({*moves(x[:, None], seeded(random_shift, x, 3)[:, None])}) > 1
    assert len({*moves(x[:, None], seeded(random_shift, x[None], 3)[0][:, None])}) == 1
    assert flip(x).equal(x.flip(2))

@pytest.mark.parametrize('shape', [(9,), (5, 7), (28, 29), (2, 1, 3, 4, 4), ()])
@ways
def test_no_images(name, shape):
    with pytest.raises((ValueError, IndexError, TypeError)): WAYS[name](torch.rand(shape))

@pytest.mark.parametrize('make', [lambda x: x.numpy(), lambda x: x.tolist()], ids=['numpy', 'list'])
@pytest.mark.parametrize('name', EVERY)
def test_what_is_no_tensor(name, make):
    "An error of its type, and no result that looks right."
    with pytest.raises((TypeError, AttributeError)): EVERY[name](make(torch.rand(4, 8, 8)))

@pytest.mark.parametrize('name', EVERY)
def test_functions_have_names_and_say_what_they_do(name):
    func = getattr(EVERY[name], 'func', EVERY[name])
    assert name in MIXES or func.__name__ == name and len(func.__doc__) > 10
    if name in WAYS: assert pickle.loads(pickle.dumps(func)) is func
