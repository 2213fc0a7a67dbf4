"What no single notebook can say: notebooks and modules agree, every module stands alone, stored outputs are clean, the package is whole."
import ast, configparser, gzip, hashlib, importlib.util, json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
MODULES = sorted((ROOT/'exp').glob('nb_*.py'))
CONFIG = configparser.ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini')
by_name = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


def run(*args, cwd=ROOT, **kwargs):
    "A command of this environment; its output, or the failure with what it said."
    result = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def cells(path, kind='code'): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])


# Notebooks and modules agree

def copy_project(folder):
    "The files that exporting reads and writes."
    for name in ('nbs', 'exp'): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'data'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, folder)
    return folder


def tracked(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.suffix in ('.py', '.ipynb')}


def out_of_step(folder):
    "Files of a copied project that differ from what exporting and cleaning its notebooks gives."
    before = tracked(folder)
    for p in (folder/'exp').glob('nb_*.py'): p.unlink()
    for command in ('nbdev_export', 'nbdev_clean'): run(Path(sys.executable).with_name(command), cwd=folder)
    after = tracked(folder)
    return sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE = {
    'none': (lambda d: None, []),
    'edited module': (lambda d: edit(d/'exp/nb_00.py', 'seed < 2**32', 'seed < 2**31'), ['exp/nb_00.py']),
    'missing module': (lambda d: (d/'exp/nb_02.py').unlink(), ['exp/nb_02.py']),
    'stale module': (lambda d: shutil.copy(d/'exp/nb_02.py', d/'exp/nb_99.py'), ['exp/nb_99.py']),
    'dirty notebook': (lambda d: edit(d/'nbs/00_tools.ipynb', '"execution_count": null', '"execution_count": 7'), ['nbs/00_tools.ipynb'])}


@pytest.mark.parametrize('damage, expected', DAMAGE.values(), ids=DAMAGE)
def test_sync(damage, expected, tmp_path):
    damage(copy_project(tmp_path))
    assert out_of_step(tmp_path) == expected


def test_readme_is_the_front_page():
    text = run('-m', 'nbconvert', '--log-level', 'ERROR', '--to', 'markdown', '--stdout', 'nbs/index.ipynb').stdout
    assert (ROOT/'README.md').read_text() == re.sub(r'\]\(([^)/:]+\.(ipynb|png))\)', r'](nbs/\1)', text).replace('](../', '](')
    for target in re.findall(r'\]\(([^):]+)\)', (ROOT/'README.md').read_text()): assert (ROOT/target).exists(), target


OLD_DIRECTIVE = re.compile(r'^\s*#\s*(exporti?s?|default_exp|hide|slow|notest)(\s|$)', re.M)

def test_no_directive_without_its_bar():
    "`#export`, the spelling of nbdev 1, is ignored in silence."
    assert OLD_DIRECTIVE.search('#export\nx = 1') and OLD_DIRECTIVE.search('# default_exp a') and not OLD_DIRECTIVE.search('#| export\n# exported')
    found = [(p.name, source(c)) for p in NOTEBOOKS for c in cells(p) if OLD_DIRECTIVE.search(source(c))]
    assert found == []


# Modules

SILENT = '''
import socket, sys
def refuse(*args, **kwargs): raise OSError('no network in this test')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import importlib
importlib.import_module(sys.argv[1])
print(' '.join(m for m in ('matplotlib.pyplot', 'IPython', 'pooch', 'requests', 'ipywidgets') if m in sys.modules))
if 'matplotlib.pyplot' in sys.modules: assert not sys.modules['matplotlib.pyplot'].get_fignums()
'''

@pytest.mark.parametrize('module', [f'exp.{p.stem}' for p in MODULES] + ['exp.all'])
def test_every_module_imports_alone(module, tmp_path):
    "In a fresh process: silent, without a network or a display, and nothing slow loaded."
    env = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}
    result = run('-c', SILENT, module, cwd=tmp_path, env=env)
    if module == 'exp.all':  # it loads matplotlib, which on a new machine may say that it builds its font cache
        assert all('font cache' in line for line in result.stderr.splitlines()), result
    else: assert result.stdout.split() == [] and result.stderr == '', result


def test_a_folder_called_exp_hides_nothing(tmp_path):
    "A clone is one: from the folder that it lies in, the package must still be found."
    (tmp_path/'exp').mkdir()
    run('-c', 'import exp.nb_01; assert exp.__file__ and exp.__version__', cwd=tmp_path)


def test_pyflakes():
    run('-m', 'pyflakes', ROOT/'exp/__main__.py', *MODULES, *(ROOT/'tests').rglob('*.py'), *(ROOT/'docs').glob('*.py'))


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_all_is_complete(path):
    module, defined = importlib.import_module(f'exp.{path.stem}'), set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and 'patch' not in map(ast.unparse, node.decorator_list): defined.add(node.name)
        if isinstance(node, ast.Assign): defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    assert set(module.__all__) == {name for name in defined if not name.startswith('_')}


def test_exp_all_has_everything():
    names, expected = {}, set('torch nn F optim np plt mpl Path math tensor partial'.split())
    exec('from exp.all import *', names)
    for path in MODULES: expected |= set(importlib.import_module(f'exp.{path.stem}').__all__)
    assert expected <= names.keys()


def imported_from(text):
    "(number, names) of each import of an exported module."
    return [(int(n), names) for n, names in re.findall(r'^\s*from exp\.nb_(\d+) import (.+)$', text, re.M)]


@by_name
def test_imports_run_one_way(path):
    for cell in cells(path):
        text = source(cell)
        assert 'exp.all' not in text
        for number, names in imported_from(text): assert number < int(path.stem[:2]) and names.strip() != '*'
        if text.startswith('#| export'): assert not re.search(r'import \*', text)


# Notebooks

@by_name
def test_stored_outputs_are_clean(path):
    outputs = [o for c in cells(path) for o in c['outputs']]
    assert outputs or not cells(path), 'not run'
    for o in outputs:
        data, text = o.get('data', {}), json.dumps(o)
        assert o['output_type'] != 'error' and o.get('name') != 'stderr' and not o.get('execution_count')
        assert not any('widget' in k for k in data) and len(text) < 140_000
        readable = json.dumps([o.get('text'), data.get('text/plain')])
        assert not re.search(r'/(home|root|tmp|Users|work|private|var)/|[A-Z]:\\\\', readable), readable
        assert 'image/png' not in data, 'a figure without describe'
    assert not any(c['execution_count'] for c in cells(path)) and 'widgets' not in json.loads(path.read_text())['metadata']


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if cells(p)], ids=lambda p: p.stem)
def test_colab_cell(path, monkeypatch):
    "The first code cell installs the package of settings.ini on Colab, and does nothing elsewhere."
    from IPython.core.inputtransformer2 import TransformerManager
    code, asked = TransformerManager().transform_cell(source(cells(path)[0])), []
    class Shell:
        def __init__(self, name): self.name = name
        def __str__(self): return self.name
        def run_line_magic(self, *args): asked.append(args)
    for name in ('<ipykernel.zmqshell.ZMQInteractiveShell>', '<google.colab._shell.Shell>'): exec(code, {'get_ipython': lambda: Shell(name)})
    assert asked[0] == ('pip', f"install -q git+{CONFIG['DEFAULT']['git_url']}")
    more = re.findall(r'"([^"]+)"', ' '.join(line for _, line in asked[1:]))  # 00 shows how nbdev exports
    assert {re.split('[<>]', r)[0] for r in more} <= {re.split('[<>]', r)[0] for r in CONFIG['DEFAULT']['dev_requirements'].split()}
    assert bool(more) == (path.stem == '00_tools')


def test_the_filter_of_make_hooks(tmp_path):
    "Git doesn't see what JupyterLab adds to a notebook, and goes on seeing what somebody writes."
    git = lambda *args: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *args], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    (tmp_path/'nbs').mkdir()
    for name in ('.gitattributes', 'settings.ini', 'pyproject.toml', 'nbs/00_tools.ipynb'): shutil.copy(ROOT/name, tmp_path/name)
    git('init', '-q')
    line, = re.findall(r'^\tgit config filter.notebook.clean .*$', (ROOT/'Makefile').read_text(), re.M)
    folder = Path(sys.executable).parent
    subprocess.run(line.replace('$(BIN)', str(folder)).replace('tests/clean.py', str(ROOT/'tests/clean.py')), shell=True, check=True, cwd=tmp_path)
    git('add', '.')
    git('commit', '-qm', 'a')
    edit(tmp_path/'nbs/00_tools.ipynb', '"execution_count": null', '"execution_count": 7')
    edit(tmp_path/'nbs/00_tools.ipynb', '"metadata": {}', '"metadata": {"trusted": true}')
    assert git('diff') == ''
    git('add', '.')
    assert git('status', '--porcelain') == ''
    edit(tmp_path/'nbs/00_tools.ipynb', '# ', '# New: ')
    assert git('diff', '--stat').startswith(' nbs/00_tools.ipynb | 2')


# The package

def test_nbdev_2_and_3_read_the_same():
    "pyproject.toml, for nbdev 3, says what settings.ini says to nbdev 2."
    import tomllib
    cfg, toml = CONFIG['DEFAULT'], tomllib.loads((ROOT/'pyproject.toml').read_text())
    project, nbdev = toml['project'], toml['tool']['nbdev']
    assert (project['name'], project['requires-python']) == (cfg['lib_name'], f'>={cfg["min_python"]}')
    assert all(nbdev[k] == cfg[k] for k in ('lib_path', 'nbs_path'))
    assert all(nbdev[k] == cfg[k].split() for k in ('tst_flags', 'allowed_cell_metadata_keys'))


def test_how_to_begin(tmp_path):
    version = CONFIG['DEFAULT']['version']
    assert run('-m', 'exp', '--version', cwd=tmp_path).stdout == f'exp {version}\n'
    command = Path(sys.executable).with_name('exp')
    assert subprocess.run([command, '--version'], capture_output=True, text=True, cwd=tmp_path).stdout == f'exp {version}\n'
    text = run('-m', 'exp', cwd=tmp_path).stdout
    for name in re.findall(r'from (exp\.\w+) import', text): assert importlib.util.find_spec(name)
    for name in re.findall(r'^    (exp\w*)', text, re.M): assert Path(sys.executable).with_name(name).exists(), name


def test_embedded_files_are_the_official_ones():
    folder = ROOT/'exp/data/mnist'
    sums = dict(reversed(line.split()) for line in (folder/'SHA256SUMS').read_text().splitlines())
    assert len(sums) == 4
    for name, expected in sums.items():
        assert hashlib.sha256(gzip.open(folder/f'{name}.gz').read()).hexdigest() == expected


def test_a_wheel_carries_modules_and_data(tmp_path):
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'MANIFEST.in', 'LICENSE', 'constraints.txt'): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/'exp', tmp_path/'exp', ignore=shutil.ignore_patterns('__pycache__'))
    run('-m', 'build', cwd=tmp_path)  # the sdist, and the wheel from the sdist
    wheel, = (tmp_path/'dist').glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(p.relative_to(ROOT)) for p in [*MODULES, ROOT/'exp/all.py', *(ROOT/'exp/data/mnist').iterdir(), *(ROOT/'exp/data/pretrained').iterdir(), *(ROOT/'exp/data/shakespeare').iterdir()]} <= names
