"Datasets of every kind and what becomes of their items: indices as TensorDataset takes them, batches as torch's loader makes them."
import copy, inspect, pickle
from collections import UserDict, namedtuple
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import (ConcatDataset, DataLoader as TorchLoader, IterableDataset, RandomSampler, Subset, TensorDataset, WeightedRandomSampler,
                              default_collate, get_worker_info)
from torch.utils.data.distributed import DistributedSampler
from exp.nb_04 import DataLoader, Dataset, Sampler, collate, get_dls

relaxed = settings(deadline=None, derandomize=True, max_examples=150)
Point = namedtuple('Point', 'x y')


def same(a, b):
    "Equal batches, whatever holds them; a tuple may stand for a list."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, UserDict)): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def all_same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) and all(map(same, a, b))
    return len(a)


# Dataset

N = 10

def index(draw):
    ints = st.integers(-N, N - 1)
    lists = st.lists(ints, max_size=12)
    kind = draw(st.sampled_from(['int', 'numpy int', 'slice', 'range', 'list', 'array', 'tensor', 'int32', '0-d', '2-d', 'mask', 'mask array', 'mask list']))
    bits = st.lists(st.booleans(), min_size=N, max_size=N)
    match kind:
        case 'int': return (i := draw(ints)), i
        case 'numpy int': return np.int64(i := draw(ints)), i
        case '0-d': return (i := torch.tensor(draw(ints))), i
        case 'slice': return (i := slice(draw(st.none() | st.integers(-15, 15)), draw(st.none() | st.integers(-15, 15)), draw(st.integers(1, 4)))), i
        case 'range':
            i = range(draw(ints), draw(ints), draw(st.integers(-3, 3).filter(bool)))
            return i, torch.tensor([*i], dtype=torch.long)
        case 'list': return (i := draw(lists)), torch.tensor(i, dtype=torch.long)
        case 'array': return np.array(i := draw(lists), dtype=draw(st.sampled_from([np.int64, np.int32, np.int8]))), torch.tensor(i, dtype=torch.long)
        case 'tensor': return (i := torch.tensor(draw(lists), dtype=torch.long)), i
        case 'int32': return (i := torch.tensor(draw(lists), dtype=torch.int32)), i.long()
        case '2-d': return (i := torch.tensor(draw(st.lists(st.tuples(ints, ints), min_size=1, max_size=5)))), i
        case 'mask': return (i := torch.tensor(draw(bits))), i
        case 'mask array': return np.array(i := draw(bits)), torch.tensor(i)
        case 'mask list': return (i := draw(bits)), torch.tensor(i)


@relaxed
@given(st.data(), st.integers(1, 3))
def test_every_index_as_a_tensor_dataset(draw, fields):
    tensors = [torch.randn(N, 2), torch.arange(N), torch.randn(N, 3, 1).double()][:fields]
    ours, theirs = index(draw.draw)
    found = Dataset(*tensors)[ours]
    assert type(found) is tuple and all_same(found, TensorDataset(*tensors)[theirs]) == fields


@pytest.mark.parametrize('i', [N, -N - 1, [0, N], torch.tensor([0, N]), torch.tensor([-N - 1]), np.array([N]), range(8, 12), range(-12, -8), [True]*3,
                               torch.ones(3).bool(), 1.5, [1.5], np.array([0.]), 'a', ['a'], torch.tensor([0.5])], ids=str)
def test_wrong_indices_are_refused(i):
    with pytest.raises((IndexError, TypeError)): Dataset(torch.randn(N, 2), torch.arange(N))[i]


def test_reversed_and_unsigned_arrays():
    ds = Dataset(torch.arange(N))
    assert ds[np.arange(3)[::-1]][0].tolist() == [2, 1, 0]
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64): assert ds[np.array([2, 1], dtype)][0].tolist() == [2, 1]
    assert ds[[np.int64(4), 1]][0].tolist() == ds[[torch.tensor(4), torch.tensor(1)]][0].tolist() == [4, 1]
    assert ds[range(8, 2, -2)][0].tolist() == [8, 6, 4] and ds[[[0, 1], [2, 3]]][0].shape == (2, 2)


@pytest.mark.parametrize('i', [range(4), range(0, 4, 2), [0, 1], np.array([0, 1]), torch.tensor([0, 1]), torch.tensor([-1, 1]), torch.tensor([[0, 1]]),
                               torch.ones(N).bool()], ids=str)
def test_a_batch_of_indices_is_a_copy(i):
    x = torch.ones(N, 2)
    for t in Dataset(x, x)[i]: t.zero_()
    assert x.min() == 1


@pytest.mark.parametrize('kwargs', [{}, dict(shuffle=True), dict(drop_last=True), dict(num_workers=1), dict(pin_memory=False), dict(sampler=range(N))], ids=str)
@pytest.mark.parametrize('bs', [1, 4, N, 64])
def test_batches_never_alias_the_data(bs, kwargs):
    x, y = torch.ones(N, 2), torch.ones(N)
    for xb, yb in DataLoader(Dataset(x, y), bs, **kwargs):
        xb.zero_()
        yb.zero_()
    assert x.min() == y.min() == 1


def test_number_of_tensors():
    a, b, c = torch.randn(N, 2), torch.randn(N), torch.arange(N)
    one, two, three = Dataset(a), Dataset(a, b), Dataset(a, b, c)
    assert (one.tensors, two.tensors, three.tensors) == ((a,), (a, b), (a, b, c))
    assert [ds.x is a for ds in (one, two, three)] == [True]*3 and (two.y, three.y) == (b, c) and one.y is a
    assert [len(ds[0]) for ds in (one, two, three)] == [1, 2, 3]
    two.x = a + 1  # what is put in its place counts
    assert torch.equal(two[:][0], a + 1)
    three.y = c + 1
    assert torch.equal(three[2:4][2], c[2:4] + 1)
    x1, x2, y = next(iter(DataLoader(three, 4)))
    assert torch.equal(x2, b[:4]) and y.tolist() == [1, 2, 3, 4]


def test_lengths_must_agree_and_there_must_be_one():
    with pytest.raises(ValueError, match='equal lengths, got 3 and 4'): Dataset(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match='equal lengths, got 3 and 3 and 2'): Dataset(torch.ones(3), [1, 2, 3], np.ones(2))
    with pytest.raises(ValueError, match=r'first dimension, got shapes \[\(\), \(3,\)\]'): Dataset(torch.tensor(1.), torch.ones(3))
    with pytest.raises(ValueError, match='first dimension'): Dataset(3., 4.)
    assert len(Dataset(torch.ones(0, 3), torch.ones(0))) == 0 and list(DataLoader(Dataset(torch.ones(0, 3)), shuffle=True)) == []


@pytest.mark.parametrize('data, dtype', [
    (np.ones((N, 2), np.float32), torch.float32), (np.ones((N, 2)), torch.float64), (np.ones(N, '>i4'), torch.int32), (np.ones(N, '>f8'), torch.float64),
    (np.ones((N, 2))[::-1], torch.float64), (np.ones(N, bool), torch.bool), (np.broadcast_to(np.float32(1), (N, 2)), torch.float32),
    ([1., 1.]*5, torch.float32), ([1]*N, torch.int64), ([True]*N, torch.bool), ([[1., 1.]]*N, torch.float32), ((1,)*N, torch.int64),
    ([torch.ones(2)]*N, torch.float32), ([np.ones(2, np.int16)]*N, torch.int16), ([np.float32(1)]*N, torch.float32)], ids=str)
def test_arrays_and_lists_become_tensors_once(data, dtype):
    ds = Dataset(data, [0]*N)
    assert isinstance(ds.x, torch.Tensor) and ds.x.dtype == dtype and (ds.x == 1).all() and len(ds) == N
    for shuffle in (False, True):
        xb, yb = next(iter(DataLoader(ds, 4, shuffle)))
        assert xb.dtype == dtype and xb.shape == (4, *ds.x.shape[1:]) and yb.dtype == torch.int64


@pytest.mark.parametrize('data', [['a', 'b'], [[1, 2], [3]], np.array(['a', 'b']), np.array([None, 1]), 'ab', [None, None], [torch.ones(2), torch.ones(3)],
                                  {'a': 1}, [{'a': 1}]], ids=str)
def test_what_is_no_tensor_is_refused(data):
    with pytest.raises(ValueError, match='expected'): Dataset(data)


@pytest.mark.filterwarnings('error')
def test_a_memmap_stays_on_disk_and_as_it_is(tmp_path):
    np.save(tmp_path/'x.npy', np.arange(20, dtype=np.float32).reshape(N, 2))
    before = (tmp_path/'x.npy').read_bytes()
    ds = Dataset(np.load(tmp_path/'x.npy', mmap_mode='r'), np.arange(N))
    for i in (3, slice(2, 5), range(2, 5), [2, 3], torch.ones(N).bool()): ds[i][0].add_(1)  # a write to the file's memory would end the process
    assert ds.x[3].tolist() == [6, 7] and (tmp_path/'x.npy').read_bytes() == before
    assert sum(xb.sum() for xb, _ in DataLoader(ds, 4, shuffle=True)) == 190
    array = np.ones(N)
    array.flags.writeable = False
    Dataset(array)[:3][0].zero_()
    Dataset(array).x.zero_()
    assert array.min() == 1


def test_copies_pickles_and_torchs_helpers():
    ds = Dataset(torch.randn(N, 2), torch.randn(N), torch.arange(N))
    for other in (copy.deepcopy(ds), pickle.loads(pickle.dumps(ds))): all_same(other[:], ds[:])
    assert all_same(DataLoader(Subset(ds, [3, 1]), 2), [ds[[3, 1]]]) == 1
    assert sum(len(b[0]) for b in DataLoader(ConcatDataset([ds, ds]), 3)) == 2*N


# collate

tensor = torch.arange(3.)
ITEMS = [
    [(tensor, 1), (tensor + 1, 2)], [{'a': tensor, 'b': 1}, {'b': 2, 'a': tensor}], [({'a': tensor}, 1), ({'a': tensor}, 2)],
    [('a', 1), ('b', 2)], [(tensor, 'cat'), (tensor, 'dog')], [((tensor, tensor), 1), ((tensor, tensor), 2)], [((1, 2), 0), ((3, 4), 1)],
    [Point(tensor, 1), Point(tensor, 2)], [(Point(1, 2), 0), (Point(3, 4), 1)], [(np.ones(3), np.float64(0.5)), (np.ones(3), np.float64(1))],
    [(np.array(0.5, np.float32), np.bool_(True))]*2, [(np.array(3), torch.tensor(True))]*2, [tensor, tensor], [np.ones(2), np.ones(2)], ['a', 'b'],
    [1, 2], [(b'a',), (b'b',)], [{'a': {'b': [tensor, 'x']}}]*2, [({'a': {'b': (1, 'x')}}, [1, tensor])]*2, [(True, 1), (False, 2)],
    [[tensor, 1], [tensor, 2]], [(np.int32(1), np.uint8(2))]*2]


@pytest.mark.parametrize('items', ITEMS, ids=str)
def test_collate_is_torchs_default(items):
    try: default_collate(items)
    except TypeError as e: pytest.skip(f'this torch and this numpy: {e}')
    assert same(collate(items), default_collate(items))
    assert isinstance(collate(items), type(default_collate(items)) if not isinstance(items[0], (tuple, list)) or hasattr(items[0], '_fields') else tuple)


def test_what_collate_adds():
    xb, yb = collate([(tensor, 0.5), (tensor, 1.)])
    assert yb.dtype == torch.float32  # a target for float32 predictions; torch's default would be float64
    assert collate([(tensor, 1), (tensor, torch.tensor(2))])[1].tolist() == [1, 2]
    batch = collate([Point(tensor, 1), Point(tensor, 2)])
    assert type(batch) is Point and batch.y.tolist() == [1, 2]


@pytest.mark.parametrize('items, words', [
    ([(1, 2), (1, 2, 3)], 'got 2 in item 0 and 3 in item 1'), ([(1, 2)]*5 + [(1,)], 'got 2 in item 0 and 1 in item 5'),
    ([{'a': 1}, {'a': 1, 'b': 2}], r"got \{'a'\} in item 0 and \{'[ab]', '[ab]'\} in item 1"), ([{'a': 1, 'b': 2}, {'a': 1}], 'items of equal fields'),
    ([(1, 2), 3], 'got 2 in item 0 and None in item 1'), ([tensor, (tensor, 1)], 'items of equal fields'), ([{'a': 1}, (1,)], 'items of equal fields'),
    ([({'a': 1}, 0), ({'a': 1, 'b': 2}, 0)], 'items of equal fields'), ([], 'at least one item, got none')], ids=str)
def test_uneven_items_are_refused(items, words):
    with pytest.raises(ValueError, match=words): collate(items)


def test_what_torch_refuses_is_refused():
    class Picture: pass
    with pytest.raises(TypeError, match='Picture'): collate([(Picture(), 1)])
    with pytest.raises(TypeError, match='NoneType'): collate([(None, 1)])
    with pytest.raises(RuntimeError, match='equal size'): collate([((1, 2), 0), ((1, 2, 3), 0)])
    with pytest.raises(RuntimeError, match='equal size'): collate([(torch.ones(2), 0), (torch.ones(3), 0)])


# DataLoader: whose methods are used

class Squares(Dataset):
    "Written for torch: one int in, one item out; no word to the base class."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if type(i) is not int: raise TypeError(f'expected an int, got {type(i)}')
        return torch.tensor([float(i)]), i**2


class Doubled(Dataset):
    "Changes one row at a time."
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x*2 if y % 2 else x), y


@pytest.mark.parametrize('workers', [0, 2])
def test_a_getitem_of_ones_own_is_honoured(workers):
    batches = list(DataLoader(Squares(5), 2, num_workers=workers))
    assert [yb.tolist() for _, yb in batches] == [[0, 1], [4, 9], [16]] and batches[0][0].shape == (2, 1)
    x = torch.ones(6, 1)
    found = torch.cat([xb for xb, _ in DataLoader(Doubled(x, torch.arange(6)), 4, num_workers=workers)])
    assert found.flatten().tolist() == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_collate_fn_is_honoured(workers):
    dl = DataLoader(Dataset(torch.arange(6.), torch.arange(6)), 3, collate_fn=lambda items: [float(x)*10 + int(y) for x, y in items], num_workers=workers)
    assert list(dl) == [[0., 11., 22.], [33., 44., 55.]]
    assert all_same(DataLoader(Dataset(tensor, tensor), 2, collate_fn=default_collate), DataLoader(Dataset(tensor, tensor), 2, collate_fn=None)) == 2


class Table:
    "As datasets of Hugging Face are: columns, rows as dicts, many rows at once."
    def __init__(self): self.calls = []
    def __len__(self): return 7
    def __getitem__(self, i): return {'input': [i, i + 1], 'label': i}
    def __getitems__(self, idxs):
        self.calls.append(idxs)
        return [self[i] for i in idxs]


def test_batched_fetch_of_rows():
    ours, theirs = Table(), Table()
    assert all_same(DataLoader(ours, 3), TorchLoader(theirs, 3, collate_fn=collate)) == 3
    assert ours.calls == theirs.calls == [[0, 1, 2], [3, 4, 5], [6]]
    class Batched(Dataset):
        def __getitems__(self, idxs): return [(i, -i) for i in idxs]
    assert [b.tolist() for b in next(iter(DataLoader(Batched(tensor, tensor), 2)))] == [[0, 1], [0, -1]]


@pytest.mark.parametrize('ds', [[(i, str(i)) for i in range(7)], torch.arange(14.).view(7, 2), np.arange(14).reshape(7, 2), {i: i*2 for i in range(7)}, Table(),
                                [Point(i, tensor) for i in range(7)], TensorDataset(torch.arange(7))], ids=lambda ds: type(ds).__name__)
def test_anything_with_a_length_and_an_index(ds):
    for kwargs in ({}, dict(drop_last=True), dict(num_workers=1)): all_same(DataLoader(ds, 3, **kwargs), TorchLoader(ds, 3, **kwargs))
    assert len(DataLoader(ds, 3, shuffle=True)) == 3


class Stream(IterableDataset):
    def __iter__(self):
        info = get_worker_info()
        yield from range(info.id if info else 0, 10, info.num_workers if info else 1)

class Measured(Stream):
    def __len__(self): return 10


@pytest.mark.parametrize('kwargs', [dict(), dict(drop_last=True), dict(num_workers=2), dict(pin_memory=False)], ids=str)
def test_an_iterable_dataset(kwargs):
    for ds in (Stream(), Measured()):
        dl = DataLoader(ds, 4, **kwargs)
        for _ in range(2): all_same(dl, TorchLoader(ds, 4, **kwargs))
        assert dl.sampler is None and dl.batch_size == 4 and dl.dataset is ds
    assert len(DataLoader(Measured(), 4)) == 3 and len(DataLoader(Measured(), 4, drop_last=True)) == 2
    with pytest.raises(TypeError, match='no len'): len(DataLoader(Stream(), 4))
    with pytest.raises(ValueError, match='order of its own: expected no shuffle'): DataLoader(Stream(), 4, shuffle=True)
    for name in ('sampler', 'batch_sampler'):
        with pytest.raises(ValueError, match=f'order of its own: expected no {name}'): DataLoader(Stream(), 4, **{name: [0]})


def test_what_is_no_dataset():
    with pytest.raises(ValueError, match='with a length, or an IterableDataset, got generator'): DataLoader(i for i in range(3))
    with pytest.raises(ValueError, match='got NoneType'): DataLoader(None)


# DataLoader: options

@pytest.mark.parametrize('bs', [2.5, 0, -1, True, False, '64', None, 2., np.float64(2), np.True_, torch.tensor(2.), torch.tensor(True), [2]], ids=repr)
def test_batch_sizes_that_make_no_sense(bs):
    for make in (lambda: DataLoader(Dataset(tensor), bs), lambda: Sampler(3, bs), lambda: get_dls(Dataset(tensor), Dataset(tensor), bs),
                 lambda: DataLoader(Stream(), bs)):
        with pytest.raises(ValueError, match='batch size of at least 1, a whole number, got'): make()


def test_batch_sizes_that_do():
    for bs in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        dl = DataLoader(Dataset(tensor), bs)
        assert len(dl) == 2 and dl.batch_size == 2 and type(dl.bs) is int
    with pytest.raises(ValueError, match='number of workers of at least 0, a whole number, got -1'): DataLoader(Dataset(tensor), num_workers=-1)
    with pytest.raises(ValueError, match='got 1.5'): DataLoader(Dataset(tensor), num_workers=1.5)


def test_unknown_options_are_refused_by_name():
    for name, words in (('shufle', "got 'shufle'"), ('batch_size', 'expected bs'), ('dataset', 'expected ds')):
        with pytest.raises(TypeError, match=words): DataLoader(Dataset(tensor), **{name: 1})


@pytest.mark.parametrize('options, words', [
    (dict(sampler=[0], shuffle=True), r"\['sampler', 'shuffle=True'\]"), (dict(sampler=[0], batch_sampler=[[0]]), "'batch_sampler'"),
    (dict(batch_sampler=[[0]], shuffle=True), "'batch_sampler', 'shuffle=True'"), (dict(batch_sampler=[[0]], bs=8), 'no bs, drop_last'),
    (dict(batch_sampler=[[0]], drop_last=True), 'no bs, drop_last'), (dict(sampler=[0], seed=1), 'no seed'),
    (dict(generator=torch.Generator(), shuffle=True, seed=1), 'no seed'), (dict(persistent_workers=True), 'num_workers > 0'),
    (dict(prefetch_factor=2), 'multiprocessing'), (dict(timeout=-1), 'non-negative')], ids=lambda v: str(v).split(' object at')[0])
def test_what_does_not_go_together_is_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words): DataLoader(Dataset(tensor), **options)


def both(ds, n_epochs=2, **kwargs):
    "Epochs of our loader and of torch's, each from the same seed, with the same options made anew."
    loaders = []
    for make, ds_ in ((lambda ds, bs=64, **kw: DataLoader(ds, bs, **kw), ds), (lambda ds, bs=1, **kw: TorchLoader(ds, bs, **kw), TensorDataset(*ds.tensors))):
        torch.manual_seed(3)
        loaders.append([batch for dl in [make(ds_, **{k: v() if callable(v) else v for k, v in kwargs.items()})] for _ in range(n_epochs) for batch in dl])
    return loaders


@pytest.mark.parametrize('kwargs', [
    dict(bs=4, sampler=lambda: RandomSampler(range(N))), dict(bs=4, sampler=lambda: WeightedRandomSampler(range(N), 30), drop_last=True),
    dict(bs=3, sampler=lambda: DistributedSampler(range(N), 2, 1)), dict(bs=3, sampler=[5, 1, 1, 0]), dict(bs=3, sampler=torch.tensor([5, 1])),
    dict(batch_sampler=[[0, 1, 2], [5], [9, 8]]), dict(bs=4, shuffle=True, generator=lambda: torch.Generator().manual_seed(7)),
    dict(bs=4, generator=lambda: torch.Generator().manual_seed(7)), dict(bs=4, shuffle=True, generator=lambda: torch.Generator().manual_seed(7), num_workers=1)],
    ids=lambda k: '-'.join(k))
@pytest.mark.parametrize('cls', [Dataset, Doubled])
def test_samplers_and_generators_as_in_torchs(kwargs, cls):
    ours, theirs = both(cls(torch.ones(N, 2), torch.arange(N)*2), **kwargs)
    assert all_same(ours, theirs) > 1


def test_lengths_and_names_with_samplers():
    ds, sampler = Dataset(torch.arange(N)), RandomSampler(range(N), generator=torch.Generator())
    dl = DataLoader(ds, 4, sampler=sampler, drop_last=True)
    assert len(dl) == 2 and dl.sampler is sampler and dl.drop_last and dl.batch_size == 4 and dl.dataset is ds
    assert len(DataLoader(ds, batch_sampler=[[0], [1]])) == 2
    generator = torch.Generator()
    dl = DataLoader(ds, 4, shuffle=True, generator=generator)
    assert dl.generator is dl.sampler.generator is generator
    plain = DataLoader(ds, 4, shuffle=True, seed=1, pin_memory=False, sampler=None, timeout=0)  # torch's defaults are no options
    assert isinstance(plain.sampler, Sampler) and plain.generator is None and all_same(plain, DataLoader(ds, 4, shuffle=True, seed=1)) == 3


def test_options_change_no_order():
    ds = Dataset(torch.randn(N, 2), torch.arange(N))
    expected = [list(DataLoader(ds, 4, shuffle=True, seed=1)) for _ in range(1)][0]
    newer = [dict(in_order=True)] if 'in_order' in inspect.signature(torch.utils.data.DataLoader).parameters else []
    for kwargs in (*newer, dict(num_workers=2, prefetch_factor=4), dict(num_workers=1, worker_init_fn=print_nothing),
                   dict(num_workers=1, multiprocessing_context='fork'), dict(num_workers=2, timeout=60), dict(num_workers=2, persistent_workers=True)):
        assert all_same(DataLoader(ds, 4, shuffle=True, seed=1, **kwargs), expected) == 3

def print_nothing(worker): pass


class Workers(Dataset):
    "Tells which process it was read in, and how often that process has been asked."
    asked = 0
    def __getitem__(self, i):
        Workers.asked += 1
        return get_worker_info().id, Workers.asked


def test_persistent_workers_really_persist():
    keep, forget = (DataLoader(Workers(torch.arange(8)), 2, num_workers=2, persistent_workers=p) for p in (True, False))
    assert [max(b[1].max().item() for b in dl) for dl in (keep, forget) for _ in range(3)] == [4, 8, 12, 4, 4, 4]


def test_persistent_workers_keep_our_order():
    ds = Dataset(torch.arange(20))
    keep, plain = (DataLoader(ds, 4, shuffle=True, seed=1, num_workers=k, persistent_workers=bool(k)) for k in (1, 0))
    for _ in range(3): all_same(keep, plain)
    next(iter(keep)), next(iter(plain))  # left early
    all_same(keep, plain)
    assert len(list(zip(keep, keep))) == 5  # two passes at the same time
    other = pickle.loads(pickle.dumps(keep))
    all_same(copy.deepcopy(keep), other)


def test_pairs_of_loaders_pass_options_on():
    ds = Dataset(torch.arange(20), torch.arange(20))
    train_dl, valid_dl = get_dls(ds, ds, 4, num_workers=1, persistent_workers=True, seed=1)
    assert train_dl.options == valid_dl.options == {'persistent_workers': True} and len(list(train_dl)) == 5 and len(list(valid_dl)) == 3
    with pytest.raises(TypeError, match='persistent'): get_dls(ds, ds, 4, persistent=True)
