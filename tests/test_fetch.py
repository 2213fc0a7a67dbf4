"Downloads, from servers of our own on the loopback: checksums, mirrors, the cache, two processes at once, no network."
import gzip, hashlib, io, struct, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pooch
import pytest
import exp.nb_01 as nb_01
from exp.nb_01 import IDX_FILES, fetch, get_data, get_test_data

DEAD = 'http://127.0.0.1:9/'


def idx(shape, values): return gzip.compress(struct.pack(f'>4B{len(shape)}I', 0, 0, 8, len(shape), *shape) + values, mtime=0)

FILES = {name: idx((20_000, 2, 2), bytes(80_000)) if 'images' in name else idx((20_000,), bytes(i % 10 for i in range(20_000)))
         for name in sum(IDX_FILES.values(), ())}
NAME = IDX_FILES['train'][1]


@pytest.fixture
def serve():
    "A function that starts a server; `answer(name)` gives the bytes it sends, or (bytes, length it announces)."
    servers = []
    def start(answer=FILES.get):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.hits += 1
                body = answer(self.path[1:])
                body, length = body if isinstance(body, tuple) else (body, len(body))
                self.send_response(200)
                self.send_header('Content-Length', str(length))
                self.end_headers()
                self.wfile.write(body)
            def log_message(self, *args): pass
        server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.hits, server.url = 0, f'http://127.0.0.1:{server.server_port}/'
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    "A made-up dataset instead of the real one, and no word from pooch."
    monkeypatch.setitem(nb_01.SHA256, 'fashion_mnist', {k: hashlib.sha256(v).hexdigest() for k, v in FILES.items()})
    pooch.get_logger().setLevel('ERROR')


@pytest.fixture
def mirrors(monkeypatch): return lambda *urls: monkeypatch.setitem(nb_01.MIRRORS, 'fashion_mnist', list(urls))


def right(folder): return (folder/NAME).read_bytes() == FILES[NAME]


def test_first_download_then_cache(serve, mirrors, tmp_path):
    server = serve()
    mirrors(server.url)
    for _ in range(2): assert fetch('fashion_mnist', NAME, tmp_path) == tmp_path/NAME and right(tmp_path)
    assert server.hits == 1 and [p.name for p in tmp_path.iterdir()] == [NAME]
    mirrors(DEAD)
    assert fetch('fashion_mnist', NAME, tmp_path) == tmp_path/NAME  # offline, from the cache


def test_the_users_cache_is_the_default(serve, mirrors, tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, 'os_cache', lambda name: tmp_path/name)
    mirrors(serve().url)
    assert fetch('fashion_mnist', NAME) == tmp_path/'exp'/'fashion_mnist'/NAME


@pytest.mark.parametrize('bad', [lambda name: b'<html>404', lambda name: (FILES[name][:20], len(FILES[name])), None],
                         ids=['wrong bytes', 'cut short', 'dead'])
def test_a_bad_mirror_is_passed_over(bad, serve, mirrors, tmp_path):
    mirrors(serve(bad).url if bad else DEAD, serve().url)
    fetch('fashion_mnist', NAME, tmp_path)
    assert right(tmp_path) and [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize('bad', [lambda name: b'<html>404', lambda name: (FILES[name][:20], len(FILES[name]))], ids=['wrong bytes', 'cut short'])
def test_nothing_is_left_of_a_failed_download(bad, serve, mirrors, tmp_path):
    mirrors(serve(bad).url)
    with pytest.raises(ConnectionError): fetch('fashion_mnist', NAME, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named_set_aside_and_fetched_again(serve, mirrors, tmp_path):
    mirrors(serve().url)
    (tmp_path/NAME).write_bytes(b'damaged')
    with pytest.warns(UserWarning, match=f'{NAME}: wrong checksum'): fetch('fashion_mnist', NAME, tmp_path)
    assert right(tmp_path) and (tmp_path/f'{NAME}.damaged').read_bytes() == b'damaged'


def test_a_damaged_file_stays_where_it_is_when_offline(mirrors, tmp_path):
    mirrors(DEAD)
    (tmp_path/NAME).write_bytes(b'damaged')
    with pytest.warns(UserWarning, match='wrong checksum'), pytest.raises(ConnectionError): fetch('fashion_mnist', NAME, tmp_path)
    assert (tmp_path/NAME).read_bytes() == (tmp_path/f'{NAME}.damaged').read_bytes() == b'damaged'


def test_offline_says_what_works(mirrors, tmp_path):
    mirrors(DEAD, 'http://127.0.0.1:7/')
    with pytest.raises(ConnectionError) as e: fetch('fashion_mnist', NAME, tmp_path)
    for words in (NAME, 'fashion_mnist', "'mnist' is embedded and works without the network", DEAD, '127.0.0.1:7'): assert words in str(e.value)


CHILD = '''
import sys, warnings
import exp.nb_01 as nb_01
url, name, sha256, folder = sys.argv[1:]
nb_01.MIRRORS['fashion_mnist'], nb_01.SHA256['fashion_mnist'] = [url], {name: sha256}
warnings.simplefilter('ignore')
print(nb_01.read_idx(nb_01.fetch('fashion_mnist', name, folder)).sum().item())
'''


@pytest.mark.parametrize('before', [None, b'damaged'], ids=['empty cache', 'damaged file'])
def test_two_processes_at_once(before, serve, mirrors, tmp_path):
    if before: (tmp_path/NAME).write_bytes(before)
    both = threading.Barrier(2)
    def slowly(name):  # both ask before either is answered
        try: both.wait(timeout=10)
        except threading.BrokenBarrierError: pass  # the other found the file in time
        return FILES[name]
    args = [sys.executable, '-c', CHILD, serve(slowly).url, NAME, nb_01.SHA256['fashion_mnist'][NAME], str(tmp_path)]
    children = [subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out) == (0, '90000\n'), err
    assert right(tmp_path)


def test_get_data_of_a_fetched_dataset(serve, mirrors, tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, 'os_cache', lambda name: tmp_path)
    mirrors(serve().url)
    x_train, y_train, x_valid, y_valid = get_data('fashion_mnist')
    assert x_train.shape == (10_000, 4) and y_valid.shape == (10_000,) and y_train[:3].tolist() == [0, 1, 2]
    assert get_test_data('fashion_mnist')[0].shape == (20_000, 4)
    assert sorted(p.name for p in (tmp_path/'fashion_mnist').iterdir()) == sorted(FILES)


# a folder of one's own

def contents(folder): return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}

WAYS = {'as downloaded': lambda n: n, 'unpacked': lambda n: n[:-3], 'with a dot': lambda n: n.replace('-idx', '.idx'),
        'unpacked, with a dot': lambda n: n[:-3].replace('-idx', '.idx'), 'in capitals': str.upper, 'mixed': lambda n: n[:-3].replace('-', '_').title()}

@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'kmnist'])
@pytest.mark.parametrize('packed', [lambda b: gzip.decompress(b), lambda b: gzip.compress(gzip.decompress(b), 1)], ids=['unpacked', 'packed again'])
@pytest.mark.parametrize('way', WAYS)
def test_a_folder_of_ones_own_is_read_as_it_is(name, packed, way, tmp_path, monkeypatch):
    def never(*args, **kwargs): raise AssertionError('asked the network')
    monkeypatch.setattr(nb_01, 'fetch', never)
    monkeypatch.setattr(pooch, 'retrieve', never)
    for file, data in FILES.items(): (tmp_path/WAYS[way](file)).write_bytes(packed(data))  # whatever the name says
    before = contents(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        assert get_data(name, folder)[1][:3].tolist() == [0, 1, 2] and get_test_data(name, folder)[0].shape == (20_000, 4)
    assert contents(tmp_path) == before


def test_the_usual_name_comes_first_and_folders_do_not_count(tmp_path):
    images, labels = IDX_FILES['train']
    (tmp_path/images[:-3]).mkdir()  # an archive unpacked into a folder of its own name
    (tmp_path/images.replace('-idx', '.idx')).write_bytes(FILES[images])
    (tmp_path/labels.upper()).write_bytes(idx((20_000,), bytes(20_000)))
    (tmp_path/labels[:-3]).write_bytes(FILES[labels])
    assert get_data('kmnist', tmp_path)[1][:3].tolist() == [0, 1, 2]
    (tmp_path/labels).write_bytes(idx((20_000,), bytes([7])*20_000))
    assert get_data('kmnist', tmp_path)[1][:3].tolist() == [7, 7, 7]


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_what_is_missing_is_told_at_once_with_all_names_that_would_do(name, tmp_path):
    images, labels = IDX_FILES['train']
    (tmp_path/'other.gz').write_bytes(b'')
    for folder in (tmp_path, tmp_path/'nowhere', tmp_path/'other.gz'):
        with pytest.raises(FileNotFoundError) as e: get_data(name, folder)
        for words in (str(folder), images, images[:-3], 'train-images.idx3-ubyte.gz', 'train-labels.idx1-ubyte', labels): assert words in str(e.value)
        assert ('no folder' in str(e.value)) == (folder != tmp_path)
    (tmp_path/images).write_bytes(FILES[images])
    with pytest.raises(FileNotFoundError) as e: get_data(name, tmp_path)
    assert 'labels' in str(e.value) and 'images' not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other.gz', images]


def test_a_damaged_file_of_ones_own_is_named_and_left_alone(tmp_path, monkeypatch):
    for file, data in FILES.items(): (tmp_path/file).write_bytes(data)
    (tmp_path/NAME).write_bytes(b'damaged')
    before = contents(tmp_path)
    with pytest.raises(nb_01.IdxError) as e: get_data('fashion_mnist', tmp_path)
    assert str(tmp_path/NAME) in str(e.value) and contents(tmp_path) == before
    (tmp_path/NAME).write_bytes(FILES[IDX_FILES['train'][0]])
    with pytest.raises(nb_01.IdxError, match='expected n images and n labels') as e: get_data('fashion_mnist', tmp_path)
    assert str(tmp_path/NAME) in str(e.value)
    monkeypatch.setenv('HOME', str(tmp_path.parent))
    assert get_test_data('kmnist', f'~/{tmp_path.name}')[1][:3].tolist() == [0, 1, 2]


class Closed(io.StringIO):
    "A screen that was closed."
    def __init__(self):
        super().__init__()
        self.close()

@pytest.mark.filterwarnings('ignore:.*wrong checksum')
@pytest.mark.parametrize('screen', [lambda: None, Closed], ids=['none', 'closed'])
def test_a_download_does_not_depend_on_the_screen(screen, serve, mirrors, tmp_path, monkeypatch):
    mirrors(DEAD, serve().url)
    pooch.get_logger().setLevel('INFO')
    pooch.get_logger()._cache.clear()  # of the level that the tests before had
    for stream in ('stdout', 'stderr'): monkeypatch.setattr(sys, stream, screen())
    for handler in pooch.get_logger().handlers: monkeypatch.setattr(handler, 'stream', sys.stderr)  # as if imported only now
    (tmp_path/NAME).write_bytes(b'damaged')
    fetch('fashion_mnist', NAME, tmp_path)
    monkeypatch.undo()
    assert right(tmp_path)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"\['mnist', 'fashion_mnist', 'kmnist'\], got 'cifar'"): get_data('cifar')


def test_every_real_file_has_a_checksum_and_a_mirror(monkeypatch):
    monkeypatch.undo()
    assert nb_01.MIRRORS.keys() == nb_01.SHA256.keys()
    for name, sums in nb_01.SHA256.items():
        assert set(sums) == set(sum(IDX_FILES.values(), ())) and len(nb_01.MIRRORS[name]) >= 2
        assert all(len(s) == 64 for s in sums.values())
