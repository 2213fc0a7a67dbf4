"The form of the notebooks: lines that a browser shows whole, short cells, prose and checks throughout, and modules that keep to themselves."
import ast, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
MODULES = sorted((ROOT/'exp').glob('nb_*.py'))
by_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
by_module = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)


def cells(path, kind): return [c | {'source': ''.join(c['source'])} for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]
def code_lines(text): return [line for line in text.splitlines() if line.strip() and not line.strip().startswith('#')]


@by_notebook
def test_no_line_is_cut_off_by_a_browser(path):
    assert [line for c in cells(path, 'code') for line in c['source'].splitlines() if len(line) > 110] == []


@by_module
def test_no_line_of_a_module_is_long(path):
    text = path.read_text()
    written = text[text.index('\n# %% ../nbs'):]  # what is above is nbdev's: the subtitle, and the names
    assert [line for line in written.splitlines() if len(line) > 110] == []


@by_notebook
def test_exported_cells_are_short(path):
    exported = [c['source'] for c in cells(path, 'code') if re.match(r'#\| export', c['source'])]
    assert [source.splitlines()[1] for source in exported if len(code_lines(source)) > 30] == []


@by_notebook
def test_there_is_something_to_look_at(path):
    "No more than fourteen code cells in a row without an output."
    quiet, runs = 0, []
    for c in cells(path, 'code'):
        quiet = 0 if c['outputs'] else quiet + 1
        runs.append(quiet)
    assert max(runs) <= 14


@by_notebook
def test_prose_and_checks_go_on_to_the_end(path):
    "Three to six words of prose per line of code, and at least eight checks per hundred lines."
    code = [c['source'] for c in cells(path, 'code')]
    lines = sum(len(code_lines(source)) for source in code)
    plain = r'\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|^\|.*$|\]\([^)]*\)'  # formulas, code, tables, addresses
    prose = [re.sub(plain, ' ', c['source'], flags=re.S | re.M) for c in cells(path, 'markdown')]
    words = sum(len(re.findall(r'\w+', text)) for text in prose)
    checks = sum(len(re.findall(r'\b(?:test_\w+|expect_fail|assert)\b', source)) for source in code)
    assert 3 <= words/lines <= 6 and checks/lines >= 0.08, (round(words/lines, 2), round(checks/lines, 3))


@by_notebook
def test_the_way_on(path):
    "Question, minutes and prerequisites at the top; exercises, what was built, and links to the neighbours."
    text, names, i = [c['source'] for c in cells(path, 'markdown')], [p.name for p in NOTEBOOKS], NOTEBOOKS.index(path)
    neighbours = [f'← {name[:-6]}]({name})' for name in names[max(0, i - 1):i]] + [f'{name[:-6]} →]({name})' for name in names[i + 1:i + 2]]
    for link in [*neighbours, '[the map](index.ipynb)']: assert link in text[1].splitlines()[0]
    assert re.search(r'^\*About \d+ minutes', text[1], re.M)
    for title in ('## Exercises', '## What we built', '## Solutions'): assert any(t.startswith(title) for t in text), title
    i = next(i for i, t in enumerate(text) if t.startswith('## What we built'))
    assert '**Next:**' in '\n'.join(text[i:i + 2]), 'a sentence on what comes next'


@by_notebook
def test_the_map_says_what_the_notebook_says(path):
    "Minutes to read, minutes for the exercises, and their number."
    page = '\n'.join(c['source'] for c in cells(ROOT/'nbs/index.ipynb', 'markdown'))
    text = [c['source'] for c in cells(path, 'markdown')]
    reading, exercises, number = map(int, re.search(rf'^\| \[{path.stem}\].*\| (\d+) \+ (\d+) \| (\d+) \|$', page, re.M).groups())
    times = [int(n) for n in re.findall(r'\d+(?= (?:more )?(?:minutes|for))', re.search(r'^\*About .*$', text[1], re.M)[0])]
    assert (times[0], number) == (reading, sum(bool(re.match(r'\*\*\d+\. ', t)) for t in text)) and exercises in times and number >= 3


def defined(tree):
    "Names with an underscore that a module makes itself."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store): found.add(getattr(node, 'id', getattr(node, 'attr', None)))
    return {name for name in found if re.match('_[^_]', name)}


OWN = {p: defined(ast.parse(p.read_text())) for p in MODULES}


@by_module
def test_no_module_uses_an_underscore_name_of_another(path):
    tree, others = ast.parse(path.read_text()), set().union(*(names for p, names in OWN.items() if p != path)) - OWN[path]
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for a in node.names]
    used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [name for name in imported if name.startswith('_')] == []
    assert sorted(others.intersection(used) - {'_fields'}) == []  # _fields: of a namedtuple, too
