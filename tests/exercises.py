"""The exercises of a notebook: what they are, whether they can be failed and passed, and the notebooks without solutions.

`python tests/exercises.py student nbs student` writes the notebooks for a class; `... verdicts nbs/NN.ipynb` writes what the
judge says of each wrong answer into the solutions; `... unneeded nbs/NN.ipynb` looks for long cells that no exercise misses, and
puts them into exercises.json, so that the tests leave them out.
"""
import json, re, sys, time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STATEMENT = re.compile(r'^\*\*(\d+)\. (.+?)\*\* \((easy|medium|hard), (\d+) minutes?\)\.')
SOLUTION = re.compile(r'^<details>\n<summary>(\d+)\. (.+?)</summary>')
FENCE = re.compile(r'```python\n(.*?)```(?:\n\n> (.*?)\n)?', re.S)
LEFT_OUT = re.compile(r'^\s*#\|\s*(slow|notest)\b', re.M)


@dataclass
class Exercise:
    number: int
    title: str
    level: str
    minutes: int
    cells: list = field(default_factory=list)  # code: the stub first, the check last
    place: int = 0                             # of the first of them in the notebook
    solution: str = ''
    wrong: list = field(default_factory=list)  # pairs (code, what the judge says)


NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e[-+]\d+)?')


def as_pinned():
    "Whether this torch is the one that wrote the verdicts."
    import torch
    pinned = re.search(r'^torch==(.+)$', (Path(__file__).parent.parent/'constraints.txt').read_text(), re.M)[1]
    return torch.__version__.partition('+')[0] == pinned


def source(cell): return ''.join(cell['source'])


def read(cells):
    "The exercises in a notebook's cells."
    found, current = {}, None
    for i, cell in enumerate(cells):
        text = source(cell)
        if cell['cell_type'] == 'code':
            if current:
                current.cells.append(text)
                current.place = current.place or i
            continue
        current = None
        if m := STATEMENT.match(text): current = found[m[1]] = Exercise(int(m[1]), m[2], m[3], int(m[4]))
        if m := SOLUTION.match(text):
            first, *wrong = FENCE.findall(text)
            found[m[1]].solution, found[m[1]].wrong = first[0], wrong
            assert found[m[1]].title == m[2], f'{m[2]}: another title than in the statement'
    return list(found.values())


class Kernel:
    "Runs cells as a notebook does, and says what they print."
    def __init__(self, folder):
        from execnb.shell import CaptureShell
        import exp.all
        classes = {v for v in vars(exp.all).values() if isinstance(v, type) and v.__module__.startswith('exp.')}
        self.methods = {cls: dict(vars(cls)) for cls in classes}
        self.shell = CaptureShell(path=folder)

    def close(self):
        "From now on there is no IPython here, as before, and the library's classes have no method of the notebook's."
        for cls, before in self.methods.items():
            for name in [name for name, value in vars(cls).items() if before.get(name) is not value]:
                if name in before: setattr(cls, name, before[name])
                elif not name.startswith('__'): delattr(cls, name)
        from IPython.core.interactiveshell import InteractiveShell
        InteractiveShell._instance = None
        for prompt in ('ps1', 'ps2', 'ps3'): vars(sys).pop(prompt, None)

    def run(self, text):
        if LEFT_OUT.search(text): return ''
        outputs = self.shell.run(text)
        if self.shell.exc: raise self.shell.exc
        return ''.join(''.join(o.get('text', '')) for o in outputs if o.get('output_type') == 'stream' and o.get('name') == 'stdout')


def verdicts(cells, folder, without=()):
    "(what was run, what the judge said, what was expected) for stub, solution and wrong answers, each after all cells above but some."
    kernel, done = Kernel(folder), 0
    try:
        for e in read(cells):
            for cell in cells[done:e.place]:
                if cell['cell_type'] != 'code' or cell['id'] in without: continue
                try: kernel.run(source(cell))
                except Exception:
                    if not without: raise  # otherwise it may have needed one of those
            done = e.place + len(e.cells)
            *before, check = e.cells
            name = f'{e.number}. {e.title}'
            for part in before: kernel.run(part)
            yield f'{name}, stub', kernel.run(check), 'Not'
            for i, (wrong, said) in enumerate(e.wrong):
                kernel.run(wrong)
                yield f'{name}, wrong answer {i + 1}', kernel.run(check), said or 'Not yet.'
            kernel.run(e.solution)
            yield f'{name}, solution', kernel.run(check), 'Passed'
    finally: kernel.close()


def faults(cells, folder, without=()):
    "What is wrong with the exercises of a notebook, as text; `without` some cells, by id."
    found, exercises = [], read(cells)
    for e in exercises:
        name = f'{e.number}. {e.title}'
        if len(e.cells) < 2 or 'NotImplementedError' not in e.cells[0]: found.append(f'{name}: no stub, or no check')
        elif 'judge(' not in e.cells[-1]: found.append(f'{name}: nobody judges')
        if not e.solution or not e.wrong: found.append(f'{name}: no solution, or no wrong answer')
    if found: return found
    for what, said, expected in verdicts(cells, folder, without):
        if not as_pinned(): said, expected = NUMBER.sub('#', said), NUMBER.sub('#', expected)  # other random numbers
        if not said.strip().startswith(expected) or said.count('\n') != 1: found.append(f'{what}: {said!r} instead of {expected!r}')
    return found


def unneeded(path):
    "The ids of the cells that take longest and that no exercise misses."
    cells, times, found = json.loads(path.read_text())['cells'], {}, []
    kernel = Kernel(path.parent)
    try:
        for cell in cells[:max(e.place for e in read(cells))]:
            if cell['cell_type'] != 'code': continue
            start = time.perf_counter()
            with suppress(NotImplementedError): kernel.run(source(cell))
            times[cell['id']] = time.perf_counter() - start
    finally: kernel.close()
    for id in sorted(times, key=times.get, reverse=True):
        if times[id] < 0.6: break
        with suppress(Exception):
            if not faults(cells, path.parent, [*found, id]): found.append(id)
    return sorted(found)


def student(notebook):
    "The notebook without its solutions."
    cells = notebook['cells']
    end = next((i for i, c in enumerate(cells) if source(c).startswith('## Solutions')), len(cells))
    return notebook | {'cells': cells[:end]}


def write_verdicts(path):
    "Put what the judge says of the wrong answers into the solutions of a notebook."
    notebook = json.loads(path.read_text())
    said = {what: text.strip() for what, text, _ in verdicts(notebook['cells'], path.parent)}
    for cell in notebook['cells']:
        if m := SOLUTION.match(text := source(cell)):
            blocks = text.split('```python\n')
            for i in range(2, len(blocks)):
                code, after = blocks[i].split('```', 1)
                after = re.sub(r'^\n\n> .*?\n', '\n', after)
                blocks[i] = f'{code}```\n\n> {said[f"{m[1]}. {m[2]}, wrong answer {i - 1}"]}\n{after.removeprefix(chr(10))}'
            cell['source'] = '```python\n'.join(blocks).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    command, *args = sys.argv[1:]
    if command == 'verdicts':
        for path in map(Path, args): write_verdicts(path)
    elif command == 'unneeded':
        file = Path(__file__).with_suffix('.json')
        known = json.loads(file.read_text())
        for path in map(Path, args): known[path.stem] = unneeded(path)
        file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + '\n')
    elif command == 'student':
        folder, out = map(Path, args)
        out.mkdir(exist_ok=True)
        for path in sorted(folder.glob('*.ipynb')):
            (out/path.name).write_text(json.dumps(student(json.loads(path.read_text())), indent=1, ensure_ascii=False) + '\n')
