"Every exercise can be failed and passed: by its stub, by plausible wrong answers, and by its solution. And figures speak."
import json, re, subprocess, sys
from contextlib import suppress
from pathlib import Path
import pytest
import torch
from packaging.version import Version
from exercises import LEFT_OUT, faults, read, source

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
WITH = [p for p in NOTEBOOKS if any(source(c).startswith('## Exercises') for c in json.loads(p.read_text())['cells'])]
UNNEEDED = json.loads((ROOT/'tests/exercises.json').read_text())  # the longest cells, without which the exercises can be tried sooner
with_exercises = pytest.mark.parametrize('path', WITH, ids=lambda p: p.stem)


def cells(path): return json.loads(path.read_text())['cells']


NEEDED = {'31_distributed': '2.9', '32_deployment': '2.8'}  # PyTorch

@with_exercises
def test_exercises_can_be_failed_and_passed(path):
    needed = NEEDED.get(path.stem, '0')
    if Version(torch.__version__) < Version(needed): pytest.skip(f'{path.stem} needs PyTorch {needed}')
    assert len(read(cells(path))) >= 3
    without = UNNEEDED.get(path.stem, [])
    assert set(without) <= {c['id'] for c in cells(path)}
    with suppress(Exception):
        if without and not faults(cells(path), path.parent, without): return
    assert faults(cells(path), path.parent) == []


@with_exercises
def test_their_answers_are_not_shown(path):
    "In the stored outputs, every judge says that nothing has been done yet."
    judged = [''.join(''.join(o.get('text', '')) for o in c['outputs']) for c in cells(path)
              if c['cell_type'] == 'code' and re.search(r'^judge\(', source(c), re.M)]
    assert judged and all(text.startswith('Not') for text in judged)


def edited(path, old, new):
    found = cells(path)
    cell = next(c for c in found if c['cell_type'] == 'code' and old in source(c))
    cell['source'] = source(cell).replace(old, new, 1)
    return found


DAMAGE = {'the judge looks at the solution': ('judge(check_guess, my_guess)', "judge(check_guess, lambda: ['passes', 'raises', 'raises', 'passes'])", 'stub'),
          'nobody judges': ('judge(check_guess, my_guess)', 'check_guess(my_guess)', 'nobody judges'),
          'a check without cases': ("        yield f'number", "        if False: yield f'number", 'Passed'),
          'a check that lets everything pass': ("yield f'number {i + 1}', lambda: guess()[i], happens", "yield f'number {i + 1}', guess and 1, 1", 'stub'),
          'a name from a later notebook': ('def check_guess(guess):', 'from exp.nb_99 import missing\ndef check_guess(guess):', 'nb_99')}

@pytest.mark.parametrize('old, new, said', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_check_is_noticed(old, new, said):
    try: found = ' '.join(faults(edited(ROOT/'nbs/00_tools.ipynb', old, new), ROOT/'nbs'))
    except ModuleNotFoundError as e: found = str(e)
    assert said in found


@with_exercises
def test_only_names_of_this_and_earlier_notebooks(path):
    for e in read(cells(path)):
        for text in [*e.cells, e.solution, *(code for code, _ in e.wrong)]:
            assert all(int(n) < int(path.stem[:2]) for n in re.findall(r'exp\.nb_(\d+)', text))


def test_the_notebooks_of_a_class(tmp_path):
    subprocess.run([sys.executable, ROOT/'tests/exercises.py', 'student', ROOT/'nbs', tmp_path/'student'], check=True)
    for path in WITH:
        found = cells(tmp_path/'student'/path.name)
        assert '<details>' not in ''.join(map(source, found)) and len(found) < len(cells(path))
        assert [e.title for e in read(found)] == [e.title for e in read(cells(path))]


# Figures

def figures(path):
    "(alt text, cell) of each image in a notebook's outputs, as nbconvert renders it."
    from nbconvert import HTMLExporter
    page = HTMLExporter().from_filename(str(path))[0]
    return [re.sub(r'\s+', ' ', tag) for tag in re.findall(r'<img\b[^>]*>', page, re.S)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_speaks(path):
    "The alternative text is in the page that a reader gets, and so is the figure itself."
    drawn = sum('describe(' in source(c) and not LEFT_OUT.search(source(c)) and 'def describe' not in source(c) for c in cells(path) if c['cell_type'] == 'code')
    shown = figures(path)
    assert len(shown) >= drawn
    for tag in shown:
        alt = re.search(r'alt="([^"]*)"', tag)
        assert alt and len(alt[1]) > 20 and 'No description' not in alt[1], tag[:200]
        assert 'src="data:image/png;base64,' in tag or 'alt="An image' in tag
    assert not any('image/png' in o.get('data', {}) for c in cells(path) if c['cell_type'] == 'code' for o in c['outputs'])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_size(path): assert path.stat().st_size <= 600*1024
