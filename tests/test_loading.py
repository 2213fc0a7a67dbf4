"Samplers and loaders: which rows, in which order, the same as torch's on the same order."
import io, sys
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from exp.nb_04 import DataLoader, Dataset, Sampler, collate, fit, get_dls, get_model, print_row, train_epoch, validate

relaxed = settings(deadline=None, derandomize=True, max_examples=100)
sizes, batches, seeds = st.integers(0, 200), st.integers(1, 70), st.integers(0, 2**32)


def epoch(sampler):
    "The order of one epoch, as a list, after a look at the sizes of its batches."
    parts = [list(map(int, idxs)) for idxs in sampler]
    assert len(parts) == len(sampler) and all(len(p) == sampler.bs for p in parts[:-1])
    return sum(parts, [])


@relaxed
@given(sizes, batches, st.booleans(), seeds)
def test_every_index_once_an_epoch(n, bs, shuffle, seed):
    sampler = Sampler(n, bs, shuffle, seed=seed)
    for _ in range(2): assert sorted(epoch(sampler)) == list(range(n))
    if not shuffle: assert epoch(sampler) == list(range(n))


@relaxed
@given(sizes, batches, seeds)
def test_drop_last_drops_only_a_short_batch(n, bs, seed):
    order = epoch(Sampler(n, bs, True, drop_last=True, seed=seed))
    assert len(order) == n - n % bs
    assert order == epoch(Sampler(n, bs, True, seed=seed))[:len(order)]


@relaxed
@given(st.integers(30, 200), batches, seeds)
def test_equal_seeds_agree_and_epochs_differ(n, bs, seed):
    one, other = Sampler(n, bs, True, seed=seed), Sampler(n, bs, True, seed=seed)
    first, second = epoch(one), epoch(one)
    assert first == epoch(other) and second == epoch(other) and first != second


def test_the_generator_is_its_own():
    sampler = Sampler(100, 10, shuffle=True, seed=3)
    expected = [epoch(sampler) for _ in range(2)]
    sampler, found = Sampler(100, 10, shuffle=True, seed=3), []
    for _ in range(2):
        torch.rand(7)  # somebody else draws from torch's generator
        found.append(epoch(sampler))
    assert found == expected


def test_without_a_seed_torchs_decides():
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(epoch(Sampler(100, 10, shuffle=True)))
    assert orders[0] == orders[1] != orders[2]


class Items:
    "A dataset that can only be asked for one item at a time."
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if not isinstance(i, int): raise TypeError(f'expected an int, got {type(i)}')
        return self.x[i], self.y[i]


@relaxed
@given(sizes, batches, st.booleans(), st.booleans(), seeds)
def test_the_same_batches_as_torchs(n, bs, shuffle, drop_last, seed):
    x, y = torch.randn(n, 3), torch.arange(n)
    order = [list(map(int, idxs)) for idxs in Sampler(n, bs, shuffle, drop_last, seed)]
    expected = list(TorchLoader(TensorDataset(x, y), batch_sampler=order))
    for ds in (Dataset(x, y), TensorDataset(x, y), Items(x, y)):
        dl = DataLoader(ds, bs, shuffle, drop_last, seed)
        found = list(dl)
        assert len(found) == len(dl) == len(expected)
        for (xa, ya), (xb, yb) in zip(found, expected): assert torch.equal(xa, xb) and torch.equal(ya, yb)


def test_worker_processes_give_the_same_batches():
    x, y = torch.randn(50, 3), torch.arange(50)
    plain, workers = (list(DataLoader(Dataset(x, y), 8, shuffle=True, seed=1, num_workers=k)) for k in (0, 2))
    assert len(plain) == len(workers) == 7
    for (xa, ya), (xb, yb) in zip(plain, workers): assert torch.equal(xa, xb) and torch.equal(ya, yb)


def test_batches_stay_as_they_were_when_the_next_is_made():
    dl = DataLoader(Dataset(torch.randn(64, 2), torch.arange(64)), 8, shuffle=True, seed=0)
    kept = [(xb, xb.clone()) for xb, _ in dl]
    assert all(torch.equal(a, b) for a, b in kept)


def test_dataset_forms_of_index():
    ds = Dataset(torch.randn(10, 2, 3), torch.arange(10))
    for i in (slice(2, 5), range(2, 5), torch.tensor([2, 3, 4])):
        assert ds[i][1].tolist() == [2, 3, 4] and torch.equal(ds[i][0], ds.x[2:5])
    assert ds[slice(2, 5)][0].data_ptr() == ds.x[2:].data_ptr()
    with pytest.raises(IndexError): ds[10]


def test_collate_scalars_tensors_and_dicts():
    xb, yb = collate([(torch.zeros(2), 1), (torch.ones(2), 2)])
    assert xb.shape == (2, 2) and yb.tolist() == [1, 2]
    assert collate([{'a': torch.ones(2)}, {'a': torch.ones(2)}])['a'].shape == (2, 2)


def little(n=40):
    "A learnable little problem: a pair of loaders, a model and an optimizer."
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    ds = Dataset(x, (x.sum(-1) > 0).long())
    return get_dls(ds, ds, 8, seed=0), *get_model(4, 8, 2, lr=0.1)


def test_fit_reports_learns_and_is_repeatable():
    rows = []
    for _ in range(2):
        dls, model, opt = little()
        result = fit(3, model, torch.nn.functional.cross_entropy, opt, *dls, log=rows.append)
    assert [r.epoch for r in rows] == [0, 1, 2]*2 and result == (rows[-1].valid_loss, rows[-1].accuracy)
    assert [r[1:4] for r in rows[:3]] == [r[1:4] for r in rows[3:]]
    assert rows[2].valid_loss < rows[0].valid_loss


def test_validate_restores_the_mode_even_after_an_error():
    (_, dl), model, _ = little()
    for training in (True, False):
        model.train(training)
        validate(model, torch.nn.functional.cross_entropy, dl)
        assert model.training is training
        with pytest.raises(ZeroDivisionError): validate(model, lambda pred, y: 1/0, dl)
        assert model.training is training


def test_no_batches_is_an_error_that_says_so():
    _, model, opt = little()
    empty, _ = get_dls(Dataset(torch.randn(3, 4), torch.zeros(3).long()), [], 8)
    with pytest.raises(ValueError, match='drop_last'): train_epoch(model, torch.nn.functional.cross_entropy, opt, empty)


class Gone(io.StringIO):
    "A screen that nobody reads any more."
    encoding = 'ascii'
    def isatty(self): return False
    def write(self, text): raise BrokenPipeError


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize('screen', [lambda: None, closed, Gone, lambda: io.TextIOWrapper(io.BytesIO(), encoding='ascii')],
                         ids=['none', 'closed', 'gone', 'ascii'])
def test_a_fit_does_not_depend_on_its_screen(screen, monkeypatch):
    expected = run = None
    for stream in ('as it is', 'replaced'):
        if stream == 'replaced':
            for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, screen())
        dls, model, opt = little()
        expected, run = run, fit(2, model, torch.nn.functional.cross_entropy, opt, *dls, log=print_row)
    monkeypatch.undo()
    assert run == expected
