"The wheel in a clean environment: it trains and reads its data, and the first cell on Colab installs it, with a stand-in for Colab's shell."
import os, shutil, subprocess, sys
from places import ROOT

STAND_IN = '''
import os
from ipykernel.zmqshell import ZMQInteractiveShell
class Shell(ZMQInteractiveShell):
    "Colab's shell by its name; what is asked of pip is the wheel instead of the repository."
    def run_line_magic(self, name, line, *args, **kwargs):
        if name == 'pip':
            options, what = f'install -q --disable-pip-version-check -c {os.environ["CONSTRAINTS"]} ', line.removeprefix('install -q ')
            line = options + (os.environ['WHEEL'] if what.startswith('git+https://github.com/') else what)
        return super().run_line_magic(name, line, *args, **kwargs)
'''
RUN = '''
import sys, nbformat
from nbclient import NotebookClient
for path in sys.argv[1:]:
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.source.startswith('#| slow'): cell.source = ''
    NotebookClient(nb, timeout=600, kernel_name='colab').execute()
    print(path, sum(bool(c.get('outputs')) for c in nb.cells), 'cells with an output')
'''


def run(*command, **kwargs):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_the_first_three_notebooks(tmp_path):
    run(sys.executable, '-m', 'build', '--outdir', tmp_path, ROOT)  # the sdist, and the wheel from it
    wheel, = tmp_path.glob('*.whl')
    run(sys.executable, '-m', 'twine', 'check', '--strict', wheel, *tmp_path.glob('*.tar.gz'))
    python = tmp_path/'env/bin/python'
    run(sys.executable, '-m', 'venv', tmp_path/'env')
    run(python, '-m', 'pip', 'install', '-qq', '--disable-pip-version-check', '-c', ROOT/'constraints.txt', 'ipykernel', 'nbclient', 'nbformat', 'pip')
    folder = next((tmp_path/'env/lib').glob('python*'))/'site-packages/google/colab'
    folder.mkdir(parents=True)
    (folder/'_shell.py').write_text(STAND_IN)
    spec = tmp_path/'env/share/jupyter/kernels/colab'
    spec.mkdir(parents=True)
    launch = f'["{python}", "-m", "ipykernel_launcher", "--IPKernelApp.kernel_class=google.colab._kernel.Kernel", "-f", "{{connection_file}}"]'
    (folder/'_kernel.py').write_text('from ipykernel.ipkernel import IPythonKernel\nfrom google.colab._shell import Shell\nfrom traitlets import Type\nclass Kernel(IPythonKernel):\n    shell_class = Type(Shell)\n')
    (spec/'kernel.json').write_text(f'{{"argv": {launch}, "display_name": "colab", "language": "python"}}')
    work = tmp_path/'work'
    work.mkdir()
    for name in ('00_tools', '01_data', '02_model'): shutil.copy(ROOT/f'nbs/{name}.ipynb', work)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')} | dict(WHEEL=str(wheel), CONSTRAINTS=str(ROOT/'constraints.txt'), MPLBACKEND='')
    env.pop('MPLBACKEND')
    out = run(python, '-c', RUN, *sorted(work.glob('*.ipynb')), cwd=work, env=env)
    assert out.count('cells with an output') == 3
    assert str(tmp_path) in run(python, '-c', 'import exp; print(exp.__file__)', cwd=work, env=env)
    assert run(python.with_name('exp'), '--version', cwd=work, env=env).startswith('exp ')
    out = run(python.with_name('exp_train'), '--model', 'mlp', '--epochs', '1', '--test', cwd=work, env=env)
    assert 'test accuracy: 9' in out and (work/'runs').is_dir(), out
