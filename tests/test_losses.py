"Losses and accuracy against torch, in value and gradient, over random shapes, dimensions, dtypes and reductions."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from exp.nb_03 import accuracy, cross_entropy, log_softmax, logsumexp, nll

relaxed = settings(deadline=None, derandomize=True, max_examples=150)
reductions = st.sampled_from(['mean', 'sum', 'none'])


@st.composite
def scores(draw, masked=True):
    "Scores of 1 to 4 dimensions, large, masked, transposed or plain, and a dimension."
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    x = torch.randn(shape, dtype=draw(st.sampled_from([torch.float32, torch.float64])), generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    x = x * draw(st.sampled_from([1, 100, 1e4]))
    dim = draw(st.integers(-x.ndim, x.ndim - 1))
    if masked and draw(st.booleans()): x = x.masked_fill(x < x.amax(dim, keepdim=True) - x.std(correction=0), -torch.inf)
    if draw(st.booleans()): x, dim = x.transpose(0, -1), {0: x.ndim - 1, x.ndim - 1: 0}.get(dim % x.ndim, dim)
    return x, dim


def targets(x, dim):
    "A random class for each position."
    return torch.randint(x.shape[dim], x.movedim(dim, -1).shape[:-1])


def same(ours, torchs, x, equal_nan=False):
    "Two functions of one tensor agree in value and in gradient; nan is equal only where a test says that torch has it."
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    out_a, out_b = ours(a), torchs(b)
    assert_close(out_a, out_b, equal_nan=equal_nan)
    weights = torch.randn(out_a.shape, dtype=x.dtype)
    assert_close(*[torch.autograd.grad(out, t, weights)[0] for out, t in ((out_a, a), (out_b, b))], equal_nan=equal_nan)


def classes_second(x, dim):
    "The arrangement that torch's losses want: (n, C, rest)."
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


@relaxed
@given(scores(), st.booleans())
def test_logsumexp(case, keepdim):
    x, dim = case
    same(lambda x: logsumexp(x, dim, keepdim), lambda x: torch.logsumexp(x, dim, keepdim), x)


@relaxed
@given(scores())
def test_log_softmax(case):
    x, dim = case
    same(lambda x: log_softmax(x, dim), lambda x: F.log_softmax(x, dim), x)


@relaxed
@given(scores(), reductions)
def test_nll(case, reduction):
    (x, dim), kwargs = case, dict(reduction=reduction)
    y = targets(x, dim)
    same(lambda x: nll(x, y, dim, **kwargs).flatten(), lambda x: F.nll_loss(classes_second(x, dim), y.flatten(), **kwargs).flatten(), x)


@relaxed
@given(scores(masked=False), reductions, st.sampled_from([0., 0.1, 1.]))
def test_cross_entropy(case, reduction, smoothing):
    (x, dim), kwargs = case, dict(reduction=reduction, label_smoothing=smoothing)
    y = targets(x, dim)
    same(lambda x: cross_entropy(x, y, dim, **kwargs).flatten(),
         lambda x: F.cross_entropy(classes_second(x, dim), y.flatten(), **kwargs).flatten(), x)


@relaxed
@given(scores(), reductions, st.sampled_from([0.1, 1.]))
def test_smoothing_over_masked_classes(case, reduction, smoothing):
    "Infinite as torch's is, and nan where torch multiplies infinity by zero."
    (x, dim), kwargs = case, dict(reduction=reduction, label_smoothing=smoothing)
    y = targets(x, dim)
    same(lambda x: cross_entropy(x, y, dim, **kwargs).flatten(),
         lambda x: F.cross_entropy(classes_second(x, dim), y.flatten(), **kwargs).flatten(), x, equal_nan=True)


@relaxed
@given(scores(), reductions)
def test_cross_entropy_of_masked_classes(case, reduction):
    x, dim = case
    y = x.argmax(dim)  # a class that is not masked out
    same(lambda x: cross_entropy(x, y, dim, reduction).flatten(),
         lambda x: F.cross_entropy(classes_second(x, dim), y.flatten(), reduction=reduction).flatten(), x)


@relaxed
@given(scores())
def test_accuracy(case):
    x, dim = case
    y = targets(x, dim)
    expected = sum(int(row.argmax()) == int(t) for row, t in zip(classes_second(x, dim), y.flatten())) / y.numel()
    assert_close(accuracy(x, y, dim), torch.tensor(expected, dtype=torch.float32))


def test_edges():
    assert cross_entropy(torch.randn(3, 1), torch.zeros(3).long()) == 0
    assert logsumexp(torch.full((2, 3), -torch.inf)).tolist() == [-torch.inf]*2
    assert logsumexp(torch.tensor([torch.inf, 0.])) == torch.inf
    assert log_softmax(torch.full((2,), -torch.inf)).isnan().all() and F.log_softmax(torch.full((2,), -torch.inf), -1).isnan().all()
    assert cross_entropy(torch.randn(0, 3), torch.zeros(0).long()).isnan()  # as torch's: the mean of nothing
    assert cross_entropy(torch.randn(0, 3), torch.zeros(0).long(), reduction='sum') == 0


@pytest.mark.parametrize('loss', [nll, cross_entropy, accuracy])
@pytest.mark.parametrize('target, words', [
    (torch.zeros(4, 1).long(), r'shape \(4,\).*got \(4, 1\)'), (torch.zeros(3).long(), r'got \(3,\)'), (torch.zeros(4), 'torch.float32'),
    (torch.zeros(4).bool(), 'torch.bool')])
def test_targets_that_do_not_fit(loss, target, words):
    with pytest.raises(ValueError, match=words): loss(torch.randn(4, 3), target)


@pytest.mark.parametrize('loss', [nll, cross_entropy])
@pytest.mark.parametrize('wrong', [-1, 3, -100])
def test_classes_out_of_range(loss, wrong):
    with pytest.raises(ValueError, match=f'in 0 to 2, got {min(wrong, 0)} to {max(wrong, 0)}'): loss(torch.randn(2, 3), torch.tensor([0, wrong]))


def test_unknown_reduction_and_smoothing():
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'avg'"): cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), reduction='avg')
    with pytest.raises(ValueError, match='got 1.1'): cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), label_smoothing=1.1)
