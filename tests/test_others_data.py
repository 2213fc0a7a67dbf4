"More of other people's data: pixels and seeds of other kinds, batches of names, datasets that grow."
import struct
from contextlib import suppress
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, show_image, test_near as near
from exp.nb_01 import IDX_FILES, IdxError, get_data, get_test_data, read_idx
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset, fit, train_epoch, validate

CODES = {'u1': 8, 'i4': 12, 'f4': 13, 'f8': 14}

def idx(array, kind):
    return bytes([0, 0, CODES[kind], array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape) + array.astype(f'>{kind}').tobytes()

def folder_of(tmp_path, images, kind):
    labels = np.zeros(len(images), 'u1')
    for part in IDX_FILES.values():
        for name, array, k in ((part[0], images, kind), (part[1], labels, 'u1')): (tmp_path/name.removesuffix('.gz')).write_bytes(idx(array, k))
    return tmp_path

@pytest.mark.parametrize('kind', ['f4', 'f8', 'i4', 'u1'])
def test_pixels_of_every_kind_end_up_between_0_and_1(kind, tmp_path):
    images = np.random.default_rng(0).random((10_001, 2, 2))
    if kind in ('i4', 'u1'): images = (images*255).round()
    images[0, 0, 0] = images.max() if kind[0] == 'f' else 255
    found = get_test_data('mnist', folder_of(tmp_path, images, kind))[0]
    assert found.dtype is torch.float32
    near(found, torch.tensor(images.reshape(len(images), -1)/(1 if kind[0] == 'f' else 255)))


@pytest.mark.parametrize('wrong', [-1., 300., np.nan])
def test_pixels_that_are_none(wrong, tmp_path):
    images = np.full((10_001, 2, 2), 0.5)
    images[3, 1, 1] = wrong
    with pytest.raises(IdxError, match='expected pixels from 0 to 255'): get_data('mnist', folder_of(tmp_path, images, 'f4'))


def test_an_empty_name_of_a_folder_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (get_data, get_test_data):
        with pytest.raises(FileNotFoundError, match='train-|t10k-'): load('mnist', '')


def test_bytes_of_other_kinds():
    data = idx(np.arange(6).reshape(2, 3), 'u1')
    assert torch.equal(read_idx(memoryview(data)), read_idx(data))
    for wrong in (np.arange(3), None, 3):
        with pytest.raises(TypeError, match='expected a path, bytes or a binary file, got'): read_idx(wrong)


@pytest.mark.parametrize('seed', [np.int64(3), np.uint32(3), torch.tensor(3)])
def test_seeds_of_other_kinds(seed):
    set_seed(3)
    expected = torch.rand(2), np.random.rand()
    set_seed(seed)
    assert torch.equal(torch.rand(2), expected[0]) and np.random.rand() == expected[1]


@pytest.mark.parametrize('seed', [1.5, True, '3', -1, 2**32])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match='expected a seed in 0'): set_seed(seed)


def test_an_image_in_sixteen_bits():
    assert show_image(torch.rand(4, 4).bfloat16()).images[0].get_array().shape == (4, 4)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x): return self.layer(x['a'] + x['b'])

def test_the_plain_loop_counts_the_rows_of_the_target():
    set_seed(0)
    x, y = torch.randn(31, 4), torch.randint(3, (31,))
    named = [({'a': x[i], 'b': x[i]}, y[i]) for i in (slice(30), slice(30, 31))]
    model = Named()
    pred = model({'a': x, 'b': x})
    near(validate(model, F.cross_entropy, named), (F.cross_entropy(pred, y).item(), accuracy(pred, y).item()))
    opt = torch.optim.SGD(model.parameters(), 1e-9)
    near(train_epoch(model, F.cross_entropy, opt, named), F.cross_entropy(pred, y).item())
    fit(1, model, F.cross_entropy, opt, named, named, log=None)


class Grows(torch.utils.data.Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.tensor(float(i)), i

@pytest.mark.parametrize('shuffle', [False, True])
def test_a_dataset_may_grow_and_shrink(shuffle):
    ds = Grows(8)
    dl = DataLoader(ds, 4, shuffle=shuffle)
    for n in (8, 16, 5):
        ds.n = n
        assert len(dl) == -(-n//4) and sorted(i for _, ys in dl for i in ys.tolist()) == list(range(n))
    dl.ds = Dataset(torch.arange(7), torch.arange(7))
    with suppress(AttributeError): assert sorted(i for _, ys in dl for i in ys.tolist()) == list(range(7))


def test_sparse_tensors_are_refused():
    with pytest.raises(ValueError, match='expected dense tensors'): Dataset(torch.eye(4).to_sparse(), torch.zeros(4))
