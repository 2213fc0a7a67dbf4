"Downloads, from servers of our own on the loopback: checksums, mirrors, the cache, two processes at once, no network."
import gzip, hashlib, struct, subprocess, sys, threading
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


def test_get_data_of_a_fetched_dataset(serve, mirrors, tmp_path):
    mirrors(serve().url)
    x_train, y_train, x_valid, y_valid = get_data('fashion_mnist', tmp_path)
    assert x_train.shape == (10_000, 4) and y_valid.shape == (10_000,) and y_train[:3].tolist() == [0, 1, 2]
    assert get_test_data('fashion_mnist', tmp_path)[0].shape == (20_000, 4)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"\['mnist', 'fashion_mnist', 'kmnist'\], got 'cifar'"): get_data('cifar')


def test_every_real_file_has_a_checksum_and_a_mirror(monkeypatch):
    monkeypatch.undo()
    assert nb_01.MIRRORS.keys() == nb_01.SHA256.keys()
    for name, sums in nb_01.SHA256.items():
        assert set(sums) == set(sum(IDX_FILES.values(), ())) and len(nb_01.MIRRORS[name]) >= 2
        assert all(len(s) == 64 for s in sums.values())
