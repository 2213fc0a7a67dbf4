"JupyterLab as `make lab` starts it, in a browser, with the keyboard."
import json, os, shutil, signal, socket, subprocess, sys, time, urllib.request
import pytest
from places import ROOT

SETTINGS = {'@jupyterlab/notebook-extension/tracker.jupyterlab-settings': {'windowingMode': 'none'},
            '@jupyterlab/apputils-extension/notification.jupyterlab-settings': {'fetchNews': 'false', 'checkForUpdates': False, 'doNotDisturbMode': True}}
SLOW = 300_000  # ms; a notebook takes up to a minute
SCRATCH = ['''from exp.nb_01 import get_data
from exp.nb_02 import Model
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Accuracy, Learner
x, y, xv, yv = get_data()
learn = Learner(Model(784, 500, 10), get_dls(Dataset(x, y), Dataset(xv, yv)), metrics=Accuracy())''', 'learn.fit(3)', 'learn.fit(99)', '6*7']


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "(address, clone): `make lab` in a clone, with a home of its own."
    folder = tmp_path_factory.mktemp('lab')
    clone, home = folder/'exp', folder/'home'
    subprocess.run(['git', 'clone', '-q', ROOT, clone], check=True)
    for p in [*(ROOT/'nbs').iterdir(), ROOT/'Makefile', ROOT/'README.md']:
        if p.is_file(): shutil.copy(p, clone/p.relative_to(ROOT))
    (clone/'.venv').symlink_to(ROOT/'.venv')
    for name, value in SETTINGS.items():
        file = home/'.jupyter/lab/user-settings'/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    scratch = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), cells=[
        dict(cell_type='code', id=f'c{i}', metadata={}, source=text, outputs=[], execution_count=None) for i, text in enumerate(SCRATCH)])
    (clone/'scratch.ipynb').write_text(json.dumps(scratch))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith('JUPYTER')} | dict(HOME=str(home), IPYTHONDIR=str(home/'.ipython'))
    args = f'--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token=t --allow-root'
    log = open(folder/'log', 'w')
    process = subprocess.Popen(['make', '-o', '.venv/.dev', 'lab', f'ARGS={args}'], cwd=clone, env=env, stdout=log, stderr=log, start_new_session=True)
    for _ in range(240):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token=t', timeout=2)
            break
        except OSError:
            assert process.poll() is None, (folder/'log').read_text()
            time.sleep(0.25)
    yield f'http://127.0.0.1:{port}', clone
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


class Notebook:
    "A notebook in JupyterLab, worked with the keyboard; what it has come to is read from the saved file."
    PANEL = '.jp-NotebookPanel:not(.lm-mod-hidden)'

    def __init__(self, visit, lab, path):
        self.page, self.file = visit.page, lab[1]/path
        self.page.set_default_timeout(60_000)
        self.page.goto(f'{lab[0]}/lab/tree/{path}?token=t&reset')
        self.begin()

    def begin(self):
        self.page.wait_for_selector(f'{self.PANEL} .jp-Cell')
        self.idle(60_000)
        self.page.click(f'{self.PANEL} .jp-Cell .jp-InputPrompt, {self.PANEL} .jp-MarkdownCell')
        self.page.keyboard.press('Escape')

    def restart(self):
        "Now and then JupyterLab doesn't hear that the kernel is back and shows 'unknown' for ever: then, as anybody would, load the page anew."
        for _ in range(4):
            self.page.keyboard.press('0')
            self.page.keyboard.press('0')
            self.page.wait_for_selector('.jp-Dialog')
            self.page.keyboard.press('Enter')
            self.page.wait_for_selector('.jp-Dialog', state='detached')
            if self.is_idle(30_000): return
            self.page.reload()
            self.begin()
        raise AssertionError(f'the kernel is not back after four restarts, but {self.status()!r}')

    def status(self): return self.page.locator(f'{self.PANEL} .jp-Notebook-ExecutionIndicator').get_attribute('data-status')

    def is_idle(self, timeout):
        "Does the kernel come to rest, with no cell left to run, within so many ms?"
        end = time.time() + timeout/1000
        while time.time() < end:
            self.page.wait_for_timeout(300)
            waiting = self.page.locator(f'{self.PANEL} .jp-InputPrompt', has_text='*').count()
            if self.status() == 'idle' and not waiting: return True
        return False

    def idle(self, timeout=SLOW): assert self.is_idle(timeout), f'the kernel is {self.status()!r} after {timeout/1000:.0f} s'

    def active(self):
        "The index of the cell that the keys go to."
        return self.page.evaluate(f'''() => [...document.querySelectorAll('{self.PANEL} .jp-Cell')].findIndex(c => c.classList.contains('jp-mod-active'))''')

    def until(self, key, there):
        "Press a key until the active cell is `there(index)`: while the page is busy, a press may be lost."
        for _ in range(60):
            self.page.keyboard.press(key)
            for _ in range(20):
                if there(self.active()): return
                self.page.wait_for_timeout(25)
        raise AssertionError(f'{key} leaves the active cell at {self.active()}')

    def top(self):
        self.page.keyboard.press('Escape')
        self.until('Control+Home', lambda at: at == 0)

    def run(self, n):
        for _ in range(n):
            before = self.active()
            self.until('Shift+Enter', lambda at: at != before)

    def saved(self):
        self.page.keyboard.press('Escape')
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press('Control+s')
        for _ in range(600):
            if self.file.stat().st_mtime_ns != before: break
            self.page.wait_for_timeout(100)
        self.page.wait_for_timeout(200)
        return json.loads(self.file.read_text())['cells']


def test_the_front_page(visit, lab):
    "It renders, its pictures load, and a link opens a notebook."
    page = visit.page
    page.goto(f'{lab[0]}/lab/tree/nbs/index.ipynb?token=t&reset')
    page.wait_for_selector('.jp-RenderedMarkdown h1')
    page.wait_for_function('() => [...document.querySelectorAll(".jp-RenderedMarkdown img")].length >= 2')
    page.wait_for_function('() => [...document.querySelectorAll(".jp-RenderedMarkdown img")].every(i => i.complete && i.naturalWidth > 0 && i.alt)')
    assert page.locator('.jp-RenderedMarkdown table').count() >= 3
    page.click('.jp-RenderedMarkdown a >> text=00_tools')
    page.wait_for_selector('.lm-TabBar-tabLabel >> text=00_tools.ipynb')
    page.wait_for_selector('.jp-NotebookPanel:not(.lm-mod-hidden) h1')


@pytest.mark.parametrize('name', ['04_training', '10_learner'])
def test_a_notebook_from_a_restarted_kernel_to_the_end(name, visit, lab):
    file = lab[1]/f'nbs/{name}.ipynb'
    content = json.loads(file.read_text())
    for c in content['cells']:  # as nbdev_test does
        if c['cell_type'] == 'code' and ''.join(c['source']).startswith('#| slow'): c['source'] = ''
    file.write_text(json.dumps(content))
    notebook = Notebook(visit, lab, f'nbs/{name}.ipynb')
    notebook.restart()
    notebook.top()
    notebook.run(len(content['cells']))
    notebook.idle()
    cells = notebook.saved()
    code = [c for c in cells if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
    assert all(c['execution_count'] for c in code), [''.join(c['source'])[:60] for c in code if not c['execution_count']]
    faults = [o for c in code for o in c['outputs'] if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert faults == []


def test_a_fit_is_watched_and_interrupted(visit, lab):
    "The table grows and a bar moves while it runs; afterwards only the table is left; after an interrupt the kernel goes on."
    notebook, page = Notebook(visit, lab, 'scratch.ipynb'), visit.page
    notebook.restart()
    notebook.top()
    notebook.run(1)
    notebook.idle()
    notebook.run(1)
    seen, start = set(), time.time()
    while time.time() - start < 120:
        rows, bar, busy = page.evaluate('''() => { const c = document.querySelectorAll('.jp-CodeCell')[1], p = c.querySelector('progress');
            return [c.querySelectorAll('.jp-OutputArea tr').length, p ? p.value : null, c.querySelector('.jp-InputPrompt').textContent.includes('*')] }''')
        seen.add((rows, bar))
        if not busy and rows: break
        page.wait_for_timeout(50)
    assert {2, 3} <= {rows for rows, _ in seen} and len({bar for _, bar in seen if bar is not None}) >= 3, seen
    notebook.idle()
    cell = page.locator('.jp-CodeCell').nth(1)
    assert (cell.locator('progress').count(), cell.locator('.jp-OutputArea tr').count()) == (0, 4)  # heading and three epochs
    notebook.run(1)  # 99 epochs
    page.wait_for_timeout(3000)
    page.keyboard.press('Escape')
    page.keyboard.press('i')
    page.keyboard.press('i')
    notebook.idle()
    page.locator('.jp-CodeCell').nth(3).locator('.jp-InputPrompt').click()
    notebook.run(1)
    notebook.idle()
    cells = notebook.saved()
    assert '42' in json.dumps(cells[3]['outputs'])


def test_an_exercise(visit, lab):
    "The stub hears 'not yet'; a solution typed into its cell passes."
    sys.path.insert(0, str(ROOT/'tests'))
    from exercises import read, source
    before = json.loads((ROOT/'nbs/00_tools.ipynb').read_text())['cells']
    exercise = read(before)[0]
    place = next(i for i, c in enumerate(before) if source(c) == exercise.cells[0])
    notebook, page = Notebook(visit, lab, 'nbs/00_tools.ipynb'), visit.page
    notebook.restart()
    notebook.top()
    notebook.run(place + len(exercise.cells))
    notebook.idle()
    check = place + len(exercise.cells) - 1
    said = lambda: json.dumps(notebook.saved()[check]['outputs'])
    assert 'Not' in said()
    page.locator('.jp-Notebook .jp-Cell').nth(place).locator('.cm-content').click()
    page.keyboard.press('Control+a')
    page.keyboard.insert_text(exercise.solution.rstrip())
    notebook.run(len(exercise.cells))
    notebook.idle()
    assert 'Passed' in said()
