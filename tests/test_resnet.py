"Residual blocks of any shape, the fast network in other people's hands, recipes, and the weights in the package."
import copy, pickle
from dataclasses import FrozenInstanceError, replace
from functools import partial
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp.nb_01 import get_data, get_test_data
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Callback, Learner
from exp.nb_12 import AdamW, Muon
from exp.nb_13 import CheckpointError, load_weights, save_weights
from exp.nb_20 import summary
from exp.nb_21 import Hooks
from exp.nb_23 import PRETRAINED, RECIPES, Crop, FastCNN, Recipe, ResBlock, ResNet, Unshuffle, load_pretrained, speed_run
from exp.nb_30 import MixedPrecision, Record

digits = torch.rand(8, 784, generator=torch.Generator().manual_seed(0))
labels = torch.arange(8) % 4


def reference(block, x):
    "The block in evaluation, by PyTorch's functions."
    def run(layers, x):
        for layer in layers:
            c, norm = layer[0], layer[1]
            x = F.conv2d(x, c.weight, None, c.stride, c.kernel_size[0]//2)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            if len(layer) > 2: x = F.relu(x)
        return x
    short = x if isinstance(block.shortcut, nn.Identity) else run([block.shortcut], x)
    return F.relu(short + run(block.convs, x))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3), n_in=st.integers(1, 9), n_out=st.integers(1, 9), stride=st.integers(1, 3), squeeze=st.sampled_from([1, 2, 4]),
       h=st.integers(1, 9), w=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seed=st.integers(0, 99))
def test_a_block_of_any_shape(n, n_in, n_out, stride, squeeze, h, w, dtype, seed):
    torch.manual_seed(seed)
    block, x = ResBlock(n_in, n_out, stride, squeeze).eval(), torch.randn(n, n_in, h, w)
    for name, t in block.state_dict().items():
        if t.is_floating_point(): t.uniform_(0.5, 1.5) if 'var' in name else t.normal_()
    y = block.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and y.shape == (n, n_out, -(-h//stride), -(-w//stride))
    if dtype is torch.bfloat16: return
    x = x.to(dtype).requires_grad_()
    ours, theirs, behind = block(x), reference(block, x), torch.randn(y.shape).to(dtype)
    wanted, found = [torch.autograd.grad(out, [x, *block.parameters()], behind) for out in (theirs, ours)]
    torch.testing.assert_close([ours, *found], [theirs, *wanted], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('squeeze', (1, 4))
@pytest.mark.parametrize('n_out, stride', [(8, 1), (16, 1), (8, 2)])
def test_a_new_block_gives_its_shortcut(squeeze, n_out, stride):
    block, x = ResBlock(8, n_out, stride, squeeze), torch.randn(4, 8, 6, 6)
    assert torch.equal(block(x), F.relu(block.shortcut(x)))
    block(x).sum().backward()
    last = block.convs[-1][-1]
    assert last.weight.grad.any() and last.bias.grad.any() and not block.convs[0][0].weight.grad.any()


@pytest.mark.parametrize('norm', (None, nn.Identity, lambda n: nn.GroupNorm(1, n), lambda n: nn.GroupNorm(1, n, affine=False), nn.InstanceNorm2d))
def test_any_norm(norm):
    block = ResBlock(4, 8, 2, norm=norm if norm is not nn.Identity else lambda n: nn.Identity(), act=nn.GELU)
    assert block(torch.randn(2, 4, 6, 6)).shape == (2, 8, 3, 3)
    assert all(p.isfinite().all() for p in block.parameters())


def test_one_or_no_images_and_channels_last():
    for model in (ResNet(), FastCNN()):
        model.eval()
        assert model(digits[:0]).shape == (0, 10)
        one, many = model(digits[:1]), model(digits)
        torch.testing.assert_close(one[0], many[0], rtol=1e-4, atol=1e-5)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(digits), many, rtol=1e-4, atol=1e-5)
        for shape in ((8, 784), (8, 28, 28), (8, 1, 28, 28)): assert torch.equal(model(digits.view(shape)), many)


@pytest.mark.parametrize('x', (torch.rand(2, 783), torch.rand(2, 1, 27, 27), torch.rand(2, 3, 28, 28), torch.rand(784)))
def test_other_images_are_refused_by_name(x):
    with pytest.raises(ValueError, match='expected'): FastCNN()(x)


@pytest.mark.parametrize('options', (dict(size=27), dict(size=16), dict(jitter=3), dict(jitter=-1), dict(crop=-1), dict(channels=(8,)*5)))
def test_networks_that_cannot_be(options):
    with pytest.raises(ValueError, match='expected'): FastCNN(**options)


@settings(max_examples=30, deadline=None)
@given(border=st.integers(0, 3), jitter=st.integers(0, 3), h=st.integers(7, 10), w=st.integers(7, 10), seed=st.integers(0, 99))
def test_a_crop_is_a_part_of_the_image(border, jitter, h, w, seed):
    torch.manual_seed(seed)
    if jitter > border: return
    crop, x = Crop(border, jitter), torch.arange(2.*h*w).view(2, 1, h, w)
    y = crop(x)
    assert y.shape == (2, 1, h - 2*border, w - 2*border)
    top, left = divmod(int(y[0, 0, 0, 0]), w)
    assert abs(top - border) <= jitter and abs(left - border) <= jitter
    assert torch.equal(y, x[:, :, top:top + y.shape[2], left:left + y.shape[3]])
    assert torch.equal(crop.eval()(x), x[:, :, border:h - border, border:w - border])


def test_all_places_of_a_crop_occur_and_it_follows_the_seed():
    crop, x = Crop(2, 1), torch.arange(64.).view(1, 1, 8, 8)
    torch.manual_seed(3)
    first = [crop(x)[0, 0, 0, 0].item() for _ in range(100)]
    torch.manual_seed(3)
    assert first == [crop(x)[0, 0, 0, 0].item() for _ in range(100)]
    assert {*first} == {8.*row + column for row in (1, 2, 3) for column in (1, 2, 3)}


def test_sixteen_bits_in_training_only():
    model, seen = FastCNN(bf16=True), []
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with Hooks(convs, lambda layer, inputs, output: seen.append(output.dtype)):
        model(digits).sum().backward()
        model.eval()(digits)
    assert seen == 3*[torch.bfloat16] + 3*[torch.float32]
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_copies_files_and_summary():
    for model in (ResNet(squeeze=4, blocks=2), FastCNN(jitter=1, bf16=True)):
        model(digits)
        model.eval()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(other(digits), model(digits))
        assert summary(model, digits).weights == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('make', (ResNet, partial(FastCNN, jitter=1, bf16=True), partial(ResNet, blocks=2, squeeze=2)))
def test_with_the_callbacks_of_others(make):
    "Recorded, in 16 bits, with Muon: a loss that is finite and falls."
    for opt_func, cbs in ((AdamW, [MixedPrecision()]), (Muon, [])):
        torch.manual_seed(0)
        data = Dataset(digits, labels)
        learn = Learner(make(classes=4), get_dls(data, data, 4, seed=0), opt_func=opt_func, lr=0.01, progress=False, cbs=cbs)
        learn.fit(8)
        losses = [row['train_loss'] for row in learn.recorder.epochs]
        assert all(map(lambda loss: loss == loss, losses)) and losses[-1] < losses[0]


def test_recorded_and_eager_are_the_same():
    found = []
    for cbs in ([], [Record()]):
        torch.manual_seed(0)
        data = Dataset(digits, labels)
        learn = Learner(ResNet(channels=(4, 8)), get_dls(data, data, 4, seed=0), lr=0.1, progress=False, cbs=cbs)
        learn.fit(3)
        found.append(learn.model.state_dict())
    for a, b in zip(*map(dict.values, found)): assert torch.equal(a, b)


quick = Recipe((4, 8), 0.5, bs=4, lr=0.1)
x, y = torch.rand(64, 784, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 10


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_depends_on_its_seed_alone():
    before, labels_before = x.clone(), y.clone()
    first = speed_run(quick, x, y, 3)[0]
    torch.manual_seed(99)
    again, other = speed_run(quick, x, y, 3)[0], speed_run(quick, x, y, 4)[0]
    assert same(first, again) and not same(first, other) and not first.training
    assert torch.equal(x, before) and torch.equal(y, labels_before)


@pytest.mark.parametrize('epochs, steps', [(0.25, 4), (0.5, 8), (0.01, 1), (1, 16), (3, 48), (1.5, 24), (2.25, 36)])
def test_the_number_of_steps(epochs, steps):
    counts = []
    class Count(Callback):
        def after_step(self, learn): counts.append(1)
    speed_run(replace(quick, epochs=epochs, cbs=(Count,)), x, y)
    assert len(counts) == steps


def test_the_rate_goes_up_and_down():
    rates = []
    class Rates(Callback):
        def after_step(self, learn): rates.append(learn.opt.param_groups[0]['lr'])
    speed_run(replace(quick, epochs=2, cbs=(Rates,)), x, y)
    top = max(range(len(rates)), key=rates.__getitem__)
    assert rates[0] == pytest.approx(0.01) and rates[top] == pytest.approx(0.1, rel=0.01) and rates[-1] < 0.01
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize('epochs', (0, -1, float('nan'), float('inf'), '2', None))
def test_epochs_that_cannot_be(epochs):
    with pytest.raises((ValueError, TypeError)): speed_run(replace(quick, epochs=epochs), x, y)


def test_a_recipe_does_not_change():
    with pytest.raises(FrozenInstanceError): quick.bs = 8
    assert [*RECIPES] == [98, 99, 99.4, 99.5] and all(isinstance(r, Recipe) for r in RECIPES.values())
    assert replace(RECIPES[99], bs=8).channels == RECIPES[99].channels


def test_a_change_sees_the_model_before_it_trains():
    seen = []
    def change(model, images):
        seen.append((type(model), len(images)))
        model.head.weight.requires_grad_(False).zero_()
    model, seconds = speed_run(replace(quick, change=change), x, y)
    assert seen == [(FastCNN, 64)] and not model.head.weight.any() and seconds > 0


def test_the_package_has_a_trained_network():
    state = torch.get_rng_state()
    model = load_pretrained()
    assert torch.equal(torch.get_rng_state(), state), 'random numbers were used'
    images, answers = get_test_data()
    with torch.no_grad(): right = (model(images).argmax(1) == answers).float().mean().item()
    assert right > 0.994 and not model.training and PRETRAINED.stat().st_size < 500_000
    assert load_pretrained() is not model


def test_its_file_is_safetensors_and_fits_no_other_network(tmp_path):
    from safetensors.torch import load_file
    held = load_file(PRETRAINED)
    assert {t.dtype for t in held.values()} <= {torch.float32, torch.int64}
    with pytest.raises(CheckpointError): load_weights(FastCNN(), PRETRAINED)
    save_weights(load_pretrained(), tmp_path/'again.safetensors')
    model = FastCNN(channels=(32, 64, 128))
    load_weights(model, tmp_path/'again.safetensors')
    assert same(model, load_pretrained())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('change', [None, lambda model, x: model.compile(mode='reduce-overhead')], ids=['as it is', 'CUDA graph'])
def test_a_run_on_a_gpu(change):
    data = get_data()
    images, answers, valid, valid_answers = [t.cuda() for t in data]
    model, seconds = speed_run(replace(RECIPES[99], change=change), images, answers)
    with torch.no_grad(): assert (model(valid).argmax(1) == valid_answers).float().mean() > 0.98


def test_the_stages_of_a_resnet():
    "All blocks of a stage give images of the same size; each stage but the first halves them once."
    model, shapes = ResNet(channels=(4, 8, 12), blocks=2), []
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    with Hooks(blocks, lambda layer, inputs, output: shapes.append(tuple(output.shape[1:]))): model(digits)
    assert shapes == [(4, 14, 14)]*2 + [(8, 7, 7)]*2 + [(12, 4, 4)]*2
    assert ResBlock(3, 3, squeeze=4).convs[0][0].out_channels == 1


def test_unshuffle_is_that_of_pytorch():
    for shape in ((2, 1, 4, 6), (3, 3, 2, 2), (1, 5, 8, 4)):
        x = torch.randn(shape)
        assert torch.equal(Unshuffle()(x), F.pixel_unshuffle(x, 2))
    assert Unshuffle()(torch.rand(0, 3, 4, 4)).shape == (0, 12, 2, 2)


def test_the_smallest_images():
    assert FastCNN(size=24)(torch.rand(2, 1, 24, 24)).shape == (2, 10)
    with pytest.raises(ValueError, match='an even size of at least 24, got 22'): FastCNN(size=22)


def test_what_a_recipe_says_is_what_is_trained():
    seen = []
    class Look(Callback):
        def after_step(self, learn):
            if learn.iter == 0: seen.append((learn.batch[1].tolist(), learn.loss_func.label_smoothing, learn.opt.param_groups[0]['weight_decay']))
    def run(seed, **changes): return speed_run(replace(quick, cbs=(Look,), **changes), x, y, seed)[0]
    last, plain = run(1), run(2, channels_last=False, smoothing=0.3, options=dict(jitter=1, crop=2), opt_func=partial(AdamW, weight_decay=0.5))
    run(1)
    weights = [model.body[4].weight for model in (last, plain)]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [True, False]
    assert (last.stem[0].jitter, plain.stem[0].jitter) == (0, 1) and last.bf16
    assert [s[1:] for s in seen] == [(0.1, 0.), (0.3, 0.5), (0.1, 0.)]
    assert seen[0][0] == seen[2][0] != seen[1][0], 'the order follows the seed'
