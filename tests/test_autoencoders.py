"""The score of images against closed forms, scipy and its own definition, and autoencoders as strangers use them."""
import copy, math, pickle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.distributions import Normal, kl_divergence
from exp.nb_00 import set_seed, test_near as near
from exp.nb_04 import Dataset, evaluating, get_dls
from exp.nb_10 import Learner
from exp.nb_12 import AdamW
from exp.nb_13 import Checkpoint, load_weights, save_weights
from exp.nb_30 import Record
from exp.nb_41 import (VAE, Autoencoder, Moments, Scorer, as_digits, as_table, frechet_distance, gaussian_kl, kid, matrix_sqrt, moments, pixel_loss,
                       train_scorer, vae_loss)

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)


def cloud(n, d, seed, dtype=torch.float64):
    "Points whose features depend on each other and differ in size."
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g, dtype=dtype) @ torch.randn(d, d, generator=g, dtype=dtype)
            + torch.randn(d, generator=g, dtype=dtype))

def digits(n=40, seed=0): return torch.rand(n, 784, generator=torch.Generator().manual_seed(seed))


# The Fréchet distance

@FAST
@given(seeds, st.integers(1, 12), st.integers(1, 40))
def test_frechet_distance_equals_scipys_square_root(seed, d, more):
    linalg = pytest.importorskip('scipy.linalg', reason='scipy is not installed')
    a, b = cloud(d + more + 10, d, seed), cloud(d + more + 20, d, seed + 1)
    (m1, c1), (m2, c2) = moments(a), moments(b)
    root = linalg.sqrtm((c1 @ c2).numpy())
    expected = (m1 - m2).square().sum().item() + c1.trace().item() + c2.trace().item() - 2*root.trace().real
    near(frechet_distance(a, b), expected, rtol=1e-5, atol=1e-6)

@FAST
@given(seeds, st.integers(1, 20))
def test_closed_forms(seed, d):
    "Equal covariances leave the means; diagonal ones the differences of the spreads; a factor a multiple of the trace."
    c = moments(cloud(d + 30, d, seed)).cov
    g = torch.Generator().manual_seed(seed)
    m1, m2, s1, s2 = torch.rand(4, d, generator=g, dtype=torch.float64)
    near(frechet_distance(Moments(m1, c), Moments(m2, c)), (m1 - m2).square().sum(), atol=1e-6)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    near(frechet_distance(Moments(m1, s1.square().diag()), Moments(m2, s2.square().diag())), expected, rtol=1e-6, atol=1e-7)
    near(frechet_distance(Moments(m1, c), Moments(m1, 9*c)), 4*c.trace(), rtol=1e-6, atol=1e-6)

@FAST
@given(seeds, st.integers(1, 12))
def test_a_distance(seed, d):
    "Symmetric, zero on itself, at least 0, the same for another order, another orthogonal basis, and for its moments."
    a, b = cloud(d + 20, d, seed), cloud(d + 30, d, seed + 1)
    found = frechet_distance(a, b)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(cloud(d, d, seed + 2)).Q
    assert found >= 0
    for other in (frechet_distance(b, a), frechet_distance(a[order], b), frechet_distance(moments(a), b), frechet_distance(a @ q, b @ q)):
        near(other, found, rtol=1e-6, atol=1e-6)
    near(frechet_distance(a, a[order]), 0., atol=1e-5*a.var(0).sum().item())

def test_flat_clouds_have_a_distance():
    "A feature that never changes, in one cloud or both, and moments without any spread."
    a = cloud(50, 5, 0)
    flat = a.clone()
    flat[:, 2] = 1.
    near(frechet_distance(flat, flat), 0., atol=1e-6)
    assert math.isfinite(frechet_distance(a, flat))
    point = Moments(torch.zeros(5).double(), torch.zeros(5, 5).double())
    near(frechet_distance(point, Moments(torch.ones(5).double(), torch.zeros(5, 5).double())), 5.)
    near(frechet_distance(point, moments(a)), moments(a).mean.square().sum() + moments(a).cov.trace())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_any_numbers_become_doubles(dtype):
    a = (10*cloud(60, 4, 0)).round().to(dtype)
    assert moments(a).cov.dtype is torch.float64
    near(frechet_distance(a, a.double()), 0., atol=1e-4)
    near(frechet_distance(a.double().numpy(), a), 0., atol=1e-4)

@FAST
@given(seeds, st.integers(1, 15), st.integers(0, 15))
def test_matrix_sqrt(seed, d, rank):
    "S S = A, S symmetric without negative eigenvalues, also where A has not its full rank."
    x = cloud(max(1, min(rank, d)), d, seed)
    a = x.T @ x
    s = matrix_sqrt(a)
    near(s @ s, a, rtol=1e-6, atol=1e-8*a.abs().max().item() + 1e-12)
    near(s, s.T, rtol=1e-9, atol=1e-9*s.abs().max().item())
    assert torch.linalg.eigvalsh(s)[0] > -1e-7*s.abs().max()

@pytest.mark.parametrize('features, words', [
    (torch.zeros(5, 5), 'more than 5 images for a covariance of 5 features, got 5'), (torch.zeros(8), r'features \(n, d\), got shape \(8,\)'),
    (torch.zeros(0, 4), r'got shape \(0, 4\)'), (torch.zeros(9, 2, 2), r'got shape \(9, 2, 2\)'),
    (torch.tensor([[1.], [math.nan], [math.inf], [2.]]), 'got others in 2 of 4 rows')])
def test_features_that_have_no_moments(features, words):
    for func in (moments, lambda a: frechet_distance(a, torch.randn(9, 1)), lambda a: frechet_distance(torch.randn(9, 1), a)):
        with pytest.raises(ValueError, match=words): func(features)

def test_a_table_of_any_numbers():
    "Lists, arrays and tensors with a gradient, as doubles without one; kid refuses what is none, too."
    for features in ([[1, 2], [3, 4]], torch.tensor([[1., 2.], [3., 4.]]).numpy(), torch.tensor([[1., 2.], [3., 4.]], requires_grad=True)):
        table = as_table(features)
        assert table.dtype is torch.float64 and not table.requires_grad and table.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r'features \(n, d\), got shape \(3,\)'): kid(torch.zeros(3), torch.zeros(3, 1))

def test_widths_must_agree():
    for func in (frechet_distance, kid):
        with pytest.raises(ValueError, match='one width, got 3 and 4'): func(torch.randn(20, 3), torch.randn(20, 4))

@pytest.mark.parametrize('a, words', [(torch.zeros(2, 3), 'a square matrix'), (torch.zeros(3), 'a square matrix'), (torch.tensor([[math.nan]]), 'finite'),
                                      (torch.tensor([[1., 2.], [3., 4.]]), 'symmetric'), (-torch.eye(3), 'negative eigenvalue, got -1')])
def test_matrices_without_a_root(a, words):
    with pytest.raises(ValueError, match=words): matrix_sqrt(a)


# KID

def plain_kid(a, b):
    def k(x, y): return (float(x @ y)/len(x) + 1)**3
    n, m = len(a), len(b)
    aa = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j)/(n*(n - 1))
    bb = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j)/(m*(m - 1))
    return aa + bb - 2*sum(k(x, y) for x in a for y in b)/(n*m)

@FAST
@given(seeds, st.integers(1, 6), st.integers(2, 9), st.integers(2, 9))
def test_kid_is_its_definition(seed, d, n, m):
    a, b = cloud(n, d, seed), cloud(m, d, seed + 1)
    expected = plain_kid(a, b)
    scale = max(1., (a.square().sum(1).max().item()/d + b.square().sum(1).max().item()/d + 1)**3)
    near(kid(a, b), expected, rtol=1e-9, atol=1e-10*scale)
    near(kid(b, a), expected, rtol=1e-9, atol=1e-10*scale)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    near(kid(a[order], b), expected, rtol=1e-9, atol=1e-10*scale)

def test_kid_is_unbiased():
    "Over all ways to choose 3 points of 5 for the one and 2 for the other of one source, its mean is that of drawing without a choice: 0."
    from itertools import permutations
    points = cloud(5, 3, 0)
    found = [kid(points[list(p[:3])], points[list(p[3:])]) for p in permutations(range(5))]
    near(sum(found)/len(found), 0., atol=1e-9)

def test_kid_over_many_parts():
    "More rows than one part has."
    a, b = cloud(2100, 4, 0), cloud(1001, 4, 1)
    def k(x, y): return (x @ y.T/4 + 1).pow(3)
    def own(x): return (k(x, x).sum() - k(x, x).diag().sum())/(len(x)*(len(x) - 1))
    near(kid(a, b), own(a) + own(b) - 2*k(a, b).mean(), rtol=1e-9)

def test_kid_needs_two():
    for a, b, n in ((1, 5, 1), (5, 1, 1)):
        with pytest.raises(ValueError, match=f'at least 2 images, got {n}'): kid(torch.randn(a, 3), torch.randn(b, 3))
    with pytest.raises(ValueError, match='others in 1 of 3 rows'): kid(torch.tensor([[1.], [2.], [math.nan]]), torch.randn(3, 1))


# The scorer

@pytest.fixture(scope='module')
def small():
    "400 images of two kinds, and a scorer for them."
    x = digits(400)
    y = torch.arange(400) % 2
    x[y == 1, :392] = 0.
    return x, y, train_scorer(3, x, y, epochs=2)

def test_scorer_has_a_seed(small):
    "The same seed gives the same scorer and score; PyTorch's random numbers stay as they were; another seed gives another scorer."
    x, y, scorer = small
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = train_scorer(3, x, y, epochs=2), train_scorer(4, x, y, epochs=2)
    assert torch.get_rng_state().equal(before)
    assert all(v.equal(again.state_dict()[k]) for k, v in scorer.state_dict().items())
    assert scorer.distance(x[:200]) == again.distance(x[:200]) != other.distance(x[:200])

def test_scorers_features(small):
    "Standardised over the training images; in evaluation mode whatever mode it is in, which stays; distance zero from its own images."
    x, y, scorer = small
    seen = scorer.features(x)
    near(seen.mean(0), torch.zeros(64), atol=1e-4)
    kept = scorer.scale > 1e-6
    near(seen.std(0)[kept], torch.ones(int(kept.sum())), rtol=1e-3)
    near(scorer.distance(x), 0., atol=1e-2)
    scorer.train()
    try:
        state = copy.deepcopy(scorer.state_dict())
        assert scorer.features(x[:100]).equal(seen[:100]) or torch.allclose(scorer.features(x[:100]), seen[:100], atol=1e-5)
        assert scorer.training and not scorer.features(x[:3]).requires_grad
        assert all(v.equal(state[k]) for k, v in scorer.state_dict().items())
    finally: scorer.eval()
    near(scorer.features(x[:50].view(-1, 1, 28, 28)), scorer.features(x[:50].view(-1, 28, 28)))

def test_scorer_survives_a_file(small, tmp_path):
    x, y, scorer = small
    save_weights(scorer, tmp_path/'scorer.safetensors')
    other = Scorer(classes=2)
    load_weights(other, tmp_path/'scorer.safetensors')
    assert other.distance(x) == scorer.distance(x) == pickle.loads(pickle.dumps(scorer)).distance(x)

@pytest.mark.parametrize('x, words', [
    (2*digits() - 1, r'pixels in \[0, 1\], got -0\.99'), (255*digits(), r'pixels in \[0, 1\], got'), (torch.full((40, 784), math.nan), 'got nan'),
    (torch.zeros(0, 784), 'at least one image'), (torch.zeros(3, 1, 32, 32), '28 x 28'), (torch.zeros(3, 100), '28 x 28'), (torch.zeros(3, 783), 'images')])
def test_what_is_no_digit(x, words):
    with pytest.raises(ValueError, match=words): Scorer().features(x)

def test_too_few_digits_for_a_distance():
    with pytest.raises(ValueError, match='more than 64 images for a covariance of 64 features, got 64'): Scorer().distance(digits(64))

def test_scorer_wants_labels():
    for x, y in ((digits(), None), (None, torch.zeros(3))):
        with pytest.raises(ValueError, match='images and labels'): train_scorer(0, x, y)
    with pytest.raises(ValueError, match='equal lengths'): train_scorer(0, digits(5), torch.zeros(4, dtype=torch.long))

def test_as_digits_gives_a_view():
    x = digits(3)
    assert as_digits(x).data_ptr() == x.data_ptr() and as_digits(x).shape == (3, 1, 28, 28)

def test_evaluating_puts_modes_back():
    model = VAE().train()
    model.encoder[0].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError):
        with evaluating(model):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            raise KeyError
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


# Autoencoders

@FAST
@given(seeds, st.integers(1, 5), st.integers(1, 20))
def test_kl_equals_torchs(seed, n, d):
    set_seed(seed)
    mean, log_var = torch.randn(2, n, d, dtype=torch.float64, requires_grad=True)
    ours, theirs = gaussian_kl(mean, log_var), kl_divergence(Normal(mean, (log_var/2).exp()), Normal(0., 1.)).sum(1)
    near(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (ours >= 0).all()
    for a, b in zip(torch.autograd.grad(ours.sum(), (mean, log_var)), torch.autograd.grad(theirs.sum(), (mean, log_var))): near(a, b, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('shape', [(3, 784), (3, 28, 28), (3, 1, 28, 28)])
def test_pixel_loss(shape):
    set_seed(0)
    logits, x = torch.randn(3, 1, 28, 28), torch.rand(shape)
    near(pixel_loss(logits, x), F.binary_cross_entropy_with_logits(logits.flatten(1), x.flatten(1), reduction='sum')/3)

def test_losses_refuse_other_shapes():
    with pytest.raises(ValueError, match=r'got \(3, 784\) and \(2, 784\)'): pixel_loss(torch.zeros(3, 784), torch.zeros(2, 784))
    with pytest.raises(ValueError, match=r'got \(3, 2\) and \(3, 1\)'): gaussian_kl(torch.zeros(3, 2), torch.zeros(3, 1))

@pytest.mark.parametrize('cls', [Autoencoder, VAE])
@pytest.mark.parametrize('code, channels', [(16, (16, 32)), (3, (4, 6))])
def test_shapes(cls, code, channels):
    model, x = cls(code, channels).eval(), digits(5)
    z = model.encode(x)
    image = model.decode(z)
    assert z.shape == (5, code) and image.shape == (5, 1, 28, 28) and 0 <= image.min() <= image.max() <= 1
    near(model.encode(x.view(5, 1, 28, 28)), z)
    near(model.logits(z).sigmoid(), image)
    for bad in (torch.zeros(5, code + 1), torch.zeros(code)):
        with pytest.raises(ValueError, match=rf'codes \(n, {code}\)'): model.decode(bad)
    with pytest.raises(ValueError, match='28 x 28'): model(torch.zeros(2, 1, 32, 32))

def test_a_code_needs_a_length():
    for code in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match='the length of a code'): Autoencoder(code)

@pytest.mark.parametrize('cls', [Autoencoder, VAE])
def test_state_dict_round_trip(cls, tmp_path):
    set_seed(0)
    model, x = cls(), digits(6)
    model(x)  # statistics of BatchNorm
    save_weights(model, tmp_path/'model.safetensors')
    set_seed(1)
    for other in (cls(), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        load_weights(other, tmp_path/'model.safetensors')
        with evaluating(model), evaluating(other): assert other.decode(other.encode(x)).equal(model.decode(model.encode(x)))

def test_vae_draws_from_its_posterior():
    "The mean of many draws is the code, their spread is what the encoder says, and the draws have gradients."
    set_seed(0)
    model = VAE(2, (2, 2)).eval()
    seen = []
    model.logits = lambda z: seen.append(z) or z
    x = digits(1).expand(20_000, 784)
    z, mean, log_var = model(x)
    near(z.mean(0), mean[0], atol=0.05)
    near(z.std(0), (log_var[0]/2).exp(), rtol=0.05)
    assert z.requires_grad and mean.equal(model.encode(x))

def test_vae_loss_is_the_bound():
    set_seed(0)
    model, x = VAE(4, (2, 2)), digits(7)
    pred = model(x)
    near(vae_loss(pred, x), pixel_loss(pred[0], x) + gaussian_kl(*pred[1:]).mean())
    near(vae_loss(pred, x, beta=0.), pixel_loss(pred[0], x))
    near(vae_loss(pred, x, beta=3.) - vae_loss(pred, x), 2*gaussian_kl(*pred[1:]).mean(), rtol=1e-2)

def test_samples_have_a_seed_and_leave_the_model_alone():
    model = VAE(4, (2, 2)).train()
    state = copy.deepcopy(model.state_dict())
    a, b, c = (model.sample(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and a.shape == (5, 1, 28, 28) and not a.requires_grad
    assert model.training and all(v.equal(state[k]) for k, v in model.state_dict().items())
    torch.manual_seed(0)
    assert model.sample(5).equal(a)
    for n in (0, 2.5):
        with pytest.raises(ValueError, match='the number of images'): model.sample(n)

def learner(cls, loss, **options):
    set_seed(0)
    x = digits(60)
    return Learner(cls(4, (4, 4)), get_dls(Dataset(x, x), Dataset(x, x), 20, seed=0), loss, AdamW, 2e-3, progress=False, **options)

@pytest.mark.parametrize('cls, loss', [(Autoencoder, pixel_loss), (VAE, vae_loss)])
def test_trains_with_a_learner(cls, loss):
    "The loss falls; recorded, the losses and weights are the same bits; predictions come for inputs alone."
    plain, recorded = learner(cls, loss), learner(cls, loss)
    torch.manual_seed(1)
    plain.fit(4)
    torch.manual_seed(1)
    recorded.fit(4, cbs=Record())
    assert plain.recorder.losses[-3:].mean() < plain.recorder.losses[:3].mean()
    assert plain.recorder.losses.equal(recorded.recorder.losses)
    assert all(v.equal(recorded.model.state_dict()[k]) for k, v in plain.model.state_dict().items())
    pred = plain.predict(digits(3))
    assert (pred[0] if cls is VAE else pred).shape == (3, 1, 28, 28)

def test_vae_resumes_exactly(tmp_path):
    "The noise of the codes goes on where it was."
    whole, part = learner(VAE, vae_loss), learner(VAE, vae_loss)
    whole.fit(4, cbs=Checkpoint(tmp_path/'whole'))
    set_seed(0)
    torch.manual_seed(0)
    class Stop(Exception): pass
    from exp.nb_10 import Callback
    class Break(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 2: raise Stop
    part = learner(VAE, vae_loss)
    with pytest.raises(Stop): part.fit(4, cbs=[Checkpoint(tmp_path/'part'), Break()])
    torch.manual_seed(99)
    again = learner(VAE, vae_loss)
    again.fit(4, cbs=Checkpoint(tmp_path/'part', resume=True))
    assert all(v.equal(again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
