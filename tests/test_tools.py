"What the tools promise when the screen does not: a line never stops the work, whatever is wrong with where it goes."
import io, os, subprocess, sys
import pytest
import exp.nb_00
from exp.nb_00 import is_terminal, say

TEXT = 'точность → 0.97'


class Broken(io.StringIO):
    "A screen that raises `error` when written to."
    encoding = 'utf-8'
    def __init__(self, error):
        super().__init__()
        self.error = error
    def write(self, text): raise self.error


@pytest.mark.parametrize('encoding, seen', [
    ('ascii', b'???????? ? 0.97'), ('cp1252', b'???????? ? 0.97'), ('cp1251', 'точность ? 0.97'.encode('cp1251')), ('utf-8', TEXT.encode())])
def test_letters_that_the_screen_does_not_have(encoding, seen, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline='\n')
    monkeypatch.setattr(sys, 'stdout', screen)
    say('точность', '→', 0.97)
    assert screen.buffer.getvalue() == seen + b'\n'


def test_a_name_of_undecodable_bytes(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', newline='\n')
    monkeypatch.setattr(sys, 'stdout', screen)
    say(os.fsdecode(b'run-\xff'))
    assert screen.buffer.getvalue() == b'run-?\n'


@pytest.mark.parametrize('error', [BrokenPipeError(), OSError(28, 'No space left on device'), ValueError('closed'), AttributeError('flush'),
                                   RuntimeError('the window is gone')], ids=lambda e: type(e).__name__)
def test_a_screen_that_raises(error, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', Broken(error))
    say(TEXT)


def test_no_screen_and_a_closed_one(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for screen in (None, closed, object()):
        monkeypatch.setattr(sys, 'stdout', screen)
        say(TEXT)


def test_it_prints_as_print_does(capsys):
    say('epoch', 1, sep=': ')
    say()
    assert capsys.readouterr().out == 'epoch: 1\n\n'


def test_what_is_wrong_with_the_text_or_the_user_is_not_hidden(monkeypatch):
    class Bad:
        def __str__(self): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): say(Bad())
    monkeypatch.setattr(sys, 'stdout', Broken(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): say(TEXT)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='pipes as POSIX has them')
def test_a_reader_that_leaves_does_not_spoil_the_exit_status():
    code = 'from exp.nb_00 import say\nimport time\nfor i in range(200): say("line", i)\nopen(3, "w").write("done")'
    read, write = os.pipe()
    result, told = os.pipe()
    child = subprocess.Popen(['bash', '-c', f'exec 3>&{told}; exec "$0" -c "$1"', sys.executable, code], stdout=write,
                             stderr=subprocess.PIPE, pass_fds=[told])
    os.close(write)
    os.close(told)
    os.close(read)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err, os.read(result, 100)) == (0, b'', b'done')
    os.close(result)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device that is always full')
def test_a_full_disk():
    code = 'from exp.nb_00 import say\nsay("lost")\nimport sys; sys.stderr.write("done")'
    with open('/dev/full', 'w') as full:
        child = subprocess.run([sys.executable, '-c', code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert child.stderr.startswith('done')


def test_is_terminal():
    class Yes:
        def isatty(self): return 1
    class Odd:
        def isatty(self): raise OSError
    closed = io.StringIO()
    closed.close()
    assert [is_terminal(s) for s in (Yes(), None, closed, io.StringIO(), object(), Odd())] == [True] + [False]*5


def test_pytest_does_not_take_a_tool_for_a_test(tmp_path):
    (tmp_path/'test_mine.py').write_text('from exp.nb_00 import *\nfrom exp.nb_00 import test_near\n\ndef test_own(): test_near(1, 1)\n')
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(tmp_path)], cwd=tmp_path,
                         env=os.environ | {'PYTHONPATH': os.path.dirname(os.path.dirname(exp.nb_00.__file__))}, capture_output=True, text=True)
    assert run.returncode == 0 and '1 passed' in run.stdout, run.stdout
