"Damaged files: always an `IdxError` that says what was found, never a hang, a crash or a huge allocation."
import gzip, io, struct, tracemalloc
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from exp.nb_01 import EMBEDDED, IDX_FILES, IdxError, get_data, get_test_data, read_idx

DTYPES = {0x08: '>u1', 0x09: '>i1', 0x0B: '>i2', 0x0C: '>i4', 0x0D: '>f4', 0x0E: '>f8'}  # as the format's page has them
relaxed = settings(deadline=None, derandomize=True, max_examples=200)
codes, shapes = st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 6), min_size=1, max_size=4)


def idx_bytes(code, shape, seed=0):
    "An IDX file of random bytes, none of them a nan, and its numbers."
    a = np.random.default_rng(seed).integers(0, 100, shape).astype(DTYPES[code])
    return struct.pack(f'>4B{len(shape)}I', 0, 0, code, len(shape), *shape) + a.tobytes(), a


def refused(data, words='expected|promises|ended|gzip|compress|CRC|invalid|Error|shape'):
    "`read_idx` refuses the bytes, says why, and does not allocate what they promise."
    tracemalloc.start()
    try:
        with pytest.raises(IdxError, match=words): read_idx(data)
        assert tracemalloc.get_traced_memory()[1] < len(data)*20 + 4*2**20
    finally: tracemalloc.stop()


@relaxed
@given(codes, shapes, st.booleans(), st.sampled_from([bytes, bytearray, io.BytesIO]))
def test_round_trip(code, shape, zipped, source):
    data, a = idx_bytes(code, shape)
    t = read_idx(source(gzip.compress(data) if zipped else data))
    assert t.shape == a.shape and t.dtype == torch.from_numpy(a.astype(a.dtype.newbyteorder('='))).dtype
    assert t.tolist() == a.tolist()


@pytest.mark.parametrize('kind', [str, lambda p: p])
@pytest.mark.parametrize('zipped', [False, True])
def test_paths_and_open_files(tmp_path, kind, zipped):
    data, a = idx_bytes(8, [3, 4])
    path = tmp_path/'file'
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_idx(kind(path)).tolist() == a.tolist()
    with open(path, 'rb') as f:
        assert read_idx(f).tolist() == a.tolist()
        assert not f.closed


@relaxed
@given(codes, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 1, exclude_max=True), st.booleans())
def test_truncated(code, shape, share, zipped):
    data, _ = idx_bytes(code, shape)
    if zipped: data = gzip.compress(data)
    refused(data[:int(share*len(data))])


@relaxed
@given(codes, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_bit_flips_in_the_header(code, shape, draw):
    data, a = idx_bytes(code, shape)
    bit = draw.draw(st.integers(0, 8*(4 + 4*len(shape)) - 1))
    flipped = bytearray(data)
    flipped[bit//8] ^= 1 << bit % 8
    twins = {frozenset(p) for p in ((8, 9), (0x0C, 0x0D))}  # types of equal size: IDX has no checksum that could tell
    if bit//8 == 2 and frozenset((code, flipped[2])) in twins: assert read_idx(bytes(flipped)).shape == a.shape
    else: refused(bytes(flipped))


@relaxed
@given(st.binary(max_size=200), st.binary(max_size=20))
def test_random_bytes_and_what_comes_after_the_end(data, more):
    if data[:2] != b'\0\0': refused(data)
    whole, _ = idx_bytes(8, [2, 3])
    if more: refused(whole + more, 'has more')


@relaxed
@given(st.data())
def test_bit_flips_in_a_gzip_stream(draw):
    data, a = idx_bytes(8, [40, 5])
    flipped = bytearray(gzip.compress(data, mtime=0))
    bit = draw.draw(st.integers(0, 8*len(flipped) - 1))
    flipped[bit//8] ^= 1 << bit % 8
    try: assert read_idx(bytes(flipped)).tolist() == a.tolist()  # a bit that nobody reads, such as the time
    except IdxError: pass


@pytest.mark.parametrize('shape', [(2**32 - 1,), (2**31, 2**31), (2**32 - 1,)*8, (2**20, 2**20), (0,) + (2**32 - 1,)*4])
@pytest.mark.parametrize('zipped', [False, True])
def test_sizes_that_overflow(shape, zipped):
    data = struct.pack(f'>4B{len(shape)}I', 0, 0, 0x0E, len(shape), *shape) + (b'few bytes' if shape[0] else b'')
    refused(gzip.compress(data) if zipped else data, 'no tensor can have shape|and the file has 9')


@pytest.mark.parametrize('data, words', [
    (b'', 'found 0'), (b'\0\0\x08', 'found 3'), (b'hello, world', "found b'hell'"), (b'<!DOCTYPE html>', "b'<!DO'"), (b'\x89PNG\r\n', 'magic'),
    (b'\0\0\x0a\1\0\0\0\1\0', 'found 0xa'), (b'\0\0\x08\0', 'found 0'), (b'\0\0\x08\xff' + bytes(1020), 'found 255'), (b'\x1f\x8b', 'ended'),
    (gzip.compress(b'', mtime=0), 'found 0'), (gzip.compress(b'text', mtime=0), "b'text'")])
def test_other_files(data, words): refused(data, words)


def test_directory_text_mode_and_missing(tmp_path):
    with pytest.raises(IdxError, match='found a directory'): read_idx(tmp_path)
    (tmp_path/'a.txt').write_text('some text')
    with pytest.raises(IdxError, match="a.txt: .* found b'some'"): read_idx(tmp_path/'a.txt')
    (tmp_path/'a.gz').write_bytes(gzip.compress(b'text'))
    for name in ('a.txt', 'a.gz'):
        with open(tmp_path/name) as f, pytest.raises(IdxError, match='binary mode, found text'): read_idx(f)
    with pytest.raises(FileNotFoundError, match='nowhere'): read_idx(tmp_path/'nowhere')


@pytest.mark.parametrize('kind', [str, lambda p: p, lambda p: type('Entry', (), {'__fspath__': lambda self: str(p)})()],
                         ids=['str', 'Path', 'PathLike'])
def test_the_error_names_the_whole_path(kind, tmp_path):
    path = tmp_path/'a.idx'
    path.write_bytes(b'text')
    with pytest.raises(IdxError) as e: read_idx(kind(path))
    assert str(e.value).startswith(f'{path}: expected')
    with open(path, 'rb') as f, pytest.raises(IdxError) as e: read_idx(f)
    assert str(e.value).startswith(f'{path}: expected')
    with pytest.raises(IdxError) as e: read_idx(kind(tmp_path))
    assert str(e.value).startswith(f'{tmp_path}: expected')


@pytest.mark.filterwarnings('error')
def test_embedded_mnist():
    x_train, y_train, x_valid, y_valid = get_data()
    x_test, y_test = get_test_data()
    for x, y, n in ((x_train, y_train, 50_000), (x_valid, y_valid, 10_000), (x_test, y_test, 10_000)):
        assert x.shape == (n, 784) and y.shape == (n,) and (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.min() == 0 and x.max() == 1 and y.unique().tolist() == list(range(10))
        x[:1].add_(0)  # writable
    assert y_train[:3].tolist() == [5, 0, 4]


def test_data_dir_with_the_wrong_files(tmp_path):
    for train, test in zip(IDX_FILES['train'], IDX_FILES['test']): (tmp_path/train).write_bytes((EMBEDDED/test).read_bytes())
    with pytest.raises(IdxError, match='found 10,000'): get_data(data_dir=tmp_path)
    for name in sum(IDX_FILES.values(), ()): (tmp_path/name).write_bytes((EMBEDDED/name).read_bytes())
    assert get_test_data(data_dir=tmp_path)[0].shape == (10_000, 784)
    images, labels = (tmp_path/n for n in IDX_FILES['test'])
    labels.write_bytes((tmp_path/IDX_FILES['train'][1]).read_bytes())
    with pytest.raises(IdxError, match='expected n images and n labels'): get_test_data(data_dir=tmp_path)
    labels.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(IdxError, match=labels.name): get_test_data(data_dir=tmp_path)
