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


# positions that don't count, classes that count for more

@st.composite
def incomplete(draw, ignore=st.sampled_from([-100, -1, 0, 1])):
    "Scores in float64, targets of which some are to be ignored, and what marks these."
    x, dim = draw(scores(masked=False))
    y, marker = targets(x, dim), draw(ignore)
    share = draw(st.sampled_from([0., 0.3, 1.]))
    return x.double(), y.masked_fill(torch.rand(y.shape) < share, marker), dim, dict(ignore_index=marker)


@relaxed
@given(incomplete(), reductions, st.booleans())
def test_nll_of_incomplete_targets(case, reduction, weighted):
    x, y, dim, kwargs = case
    kwargs |= dict(reduction=reduction, weight=torch.rand(x.shape[dim]).double() if weighted else None)
    same(lambda x: nll(x, y, dim, **kwargs).flatten(), lambda x: F.nll_loss(classes_second(x, dim), y.flatten(), **kwargs).flatten(), x, equal_nan=True)


@relaxed
@given(incomplete(), reductions, st.sampled_from([0., 0.1, 1.]), st.booleans())
def test_cross_entropy_of_incomplete_targets(case, reduction, smoothing, weighted):
    x, y, dim, kwargs = case
    kwargs |= dict(reduction=reduction, label_smoothing=smoothing, weight=torch.rand(x.shape[dim]).double() if weighted else None)
    same(lambda x: cross_entropy(x, y, dim, **kwargs).flatten(),
         lambda x: F.cross_entropy(classes_second(x, dim), y.flatten(), **kwargs).flatten(), x, equal_nan=True)


@relaxed
@given(incomplete())
def test_accuracy_of_incomplete_targets(case):
    x, y, dim, kwargs = case
    if x.shape[dim] == 1 and kwargs['ignore_index'] == 1: return
    rows = [(int(row.argmax()), int(t)) for row, t in zip(classes_second(x, dim), y.flatten()) if t != kwargs['ignore_index']]
    expected = sum(a == b for a, b in rows)/len(rows) if rows else float('nan')
    assert_close(accuracy(x, y, dim, **kwargs), torch.tensor(expected), equal_nan=True)


def test_minus_hundred_is_ignored_when_asked():
    "By accuracy, which is only read, without being asked."
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, -100, 2, -100])
    ignored = dict(ignore_index=-100)
    assert_close(cross_entropy(x, y, **ignored), F.cross_entropy(x, y))
    assert_close(nll(log_softmax(x), y, **ignored), F.nll_loss(F.log_softmax(x, -1), y))
    assert accuracy(x, y) == accuracy(x[::2], y[::2])
    for f in (nll, cross_entropy, accuracy):
        with pytest.raises(ValueError, match='in 0 to 2, got -100 to 2'): f(x, y, ignore_index=-1)
    assert cross_entropy(x, y.to(torch.int8), **ignored) == cross_entropy(x, y, **ignored)
    assert accuracy(torch.eye(200), torch.arange(200).to(torch.uint8)) == 1  # 156 is -100 in eight bits


def test_when_nothing_counts():
    x, y = torch.randn(4, 3, requires_grad=True), torch.full((4,), -100)
    for kwargs in ({}, dict(weight=torch.rand(3)), dict(label_smoothing=0.1), dict(label_smoothing=0.1, weight=torch.rand(3))):
        loss, torchs = cross_entropy(x, y, ignore_index=-100, **kwargs), F.cross_entropy(x, y, **kwargs)
        assert loss.isnan() and torchs.isnan() and cross_entropy(x, y, reduction='sum', ignore_index=-100, **kwargs) == 0
        assert torch.equal(*[torch.autograd.grad(l, x)[0] for l in (loss, torchs)])
    assert accuracy(x, y).isnan()


def test_class_weights_that_do_not_fit():
    x, y = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    for weight in (torch.ones(2), torch.ones(5), torch.ones(3, 1), torch.tensor(1.)):
        for f in (nll, cross_entropy):
            with pytest.raises(ValueError, match='a weight for each of 3 classes, got shape'): f(x, y, 1, weight=weight)
    assert_close(cross_entropy(x, y, 1, weight=[1, 2, 3]), F.cross_entropy(x, y, weight=torch.tensor([1., 2, 3])))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_holds_the_sum_of_many_losses(dtype):
    x, y = torch.randn(60_000, 10).to(dtype), torch.randint(10, (60_000,))
    for kwargs in ({}, dict(weight=torch.rand(10).to(dtype)), dict(label_smoothing=0.1)):
        assert_close(cross_entropy(x, y, **kwargs).float(), F.cross_entropy(x.float(), y, **{k: v.float() if k == 'weight' else v for k, v in kwargs.items()}),
                     rtol=2e-2, atol=0)


@pytest.mark.parametrize('shape, dim', [((8, 1), -1), ((8, 1, 4), 1), ((1,), -1)], ids=str)
def test_accuracy_of_one_column_is_refused(shape, dim):
    target = torch.ones(torch.zeros(shape).select(dim, 0).shape).long()
    with pytest.raises(ValueError, match='a score for each class, got one column'): accuracy(torch.randn(shape), target, dim)
    if len(shape) > 1:
        with pytest.raises(ValueError, match='one column'): accuracy(torch.randn(8, 1), torch.arange(8) % 2)


@pytest.mark.parametrize('wrong', [-1, 3, -99])
def test_accuracy_of_targets_outside_the_classes(wrong):
    with pytest.raises(ValueError, match=f'in 0 to 2, got {min(wrong, 0)} to {max(wrong, 0)}'): accuracy(torch.randn(2, 3), torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match='in 0 to 2'): accuracy(torch.randn(2, 3, 4), torch.full((2, 4), wrong), 1)


def test_no_look_at_the_values_on_a_device():
    "The meta device has shapes and no values: whatever asks for one fails there."
    out, target = torch.empty(8, 3, device='meta'), torch.empty(8, dtype=torch.long, device='meta')
    assert accuracy(out, target).shape == () and cross_entropy(out, target, weight=torch.ones(3), label_smoothing=0.1).shape == ()
