"""Are the stored outputs still what the cells give? Runs notebooks again, without the slow cells, and compares.

`python tests/drift.py nbs/*.ipynb` prints what differs. Text must be the same up to its numbers. Times may be anything. Other
numbers must lie within a band: 1e-4 of their size, or what `tests/drift.json` grants this one, by cell and place. That was measured:
`python tests/drift.py --measure OTHER nbs/*.ipynb` runs with another interpreter (another torch, another number of threads),
and widens the bands to three times the differences. Figures are compared by their presence, their size and their description.
"""
import argparse, base64, json, math, re, struct, subprocess, sys, tempfile
from pathlib import Path

BANDS = Path(__file__).with_suffix('.json')
LEFT_OUT = re.compile(r'^\s*#\|\s*(slow|notest)\b', re.M)
TIME = re.compile(r'[-+−]?\d[\d.,]*(?:e[-+]?\d+)?\s*(?:ns|µs|us|ms|s|min|seconds)\b')
NUMBER = re.compile(r'(?<![\w.])[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?![\w])|\b(?:nan|inf)\b')


def source(cell): return ''.join(cell['source'])


def picture_size(text):
    "(width, height) of the first PNG in a figure's tag, or None."
    m = re.search(r'data:image/png;base64,([A-Za-z0-9+/]{40})', text)
    return struct.unpack('>II', base64.b64decode(m[1])[16:24]) if m else None


def shown(cell):
    "(text, sizes of figures) of what a cell shows; tables and figures as their words."
    parts, sizes = [], []
    for o in cell['outputs']:
        if o.get('name') == 'stderr': continue
        data = {k: ''.join(v) for k, v in o.get('data', {}).items() if isinstance(v, (str, list))}
        size = picture_size(data.get('text/markdown', ''))
        if size: sizes.append(size)
        parts.append(without_seconds(''.join(o.get('text', '')) or data.get('text/plain', '')))
    return '\n'.join(parts), sizes


def without_seconds(text):
    "The table of a fit without its last column."
    lines, timed = [], False
    for line in text.splitlines():
        timed = line.rstrip().endswith(' seconds') or timed and bool(re.match(r'[\d\s.eE+-]+$', line))
        lines.append(line.rstrip().rpartition(' ')[0] if timed else line)
    return '\n'.join(lines)


def value(text):
    try: return float(text.replace(',', '').replace('−', '-'))
    except ValueError: return None


def parts(text):
    "(the words, the numbers) of a text without its times."
    text = TIME.sub('<time>', text)
    return re.sub(r'[\s\-─━|]+', ' ', NUMBER.sub('#', text)).strip(), [value(n) for n in NUMBER.findall(text)]


def difference(a, b):
    "The relative difference of two numbers, inf where only one is finite."
    if a is None or b is None or a == b or a != a and b != b or max(abs(a), abs(b)) <= 1e-6: return 0.
    return abs(a - b)/max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def faults(old, new, bands):
    "What is wrong with a cell's new output, as text, and how far its numbers are off, by their place; None for other words."
    (words, numbers), (new_words, new_numbers) = parts(shown(old)[0]), parts(shown(new)[0])
    sizes, new_sizes = shown(old)[1], shown(new)[1]
    if bands is None: return [], {}
    if len(sizes) != len(new_sizes): return [f'{len(new_sizes)} figures instead of {len(sizes)}'], {}
    for a, b in zip(sizes, new_sizes):
        if any(abs(i - j) > 0.1*max(i, j) for i, j in zip(a, b)): return [f'a figure of {b} instead of {a} pixels'], {}
    if words != new_words or len(numbers) != len(new_numbers): return [f'other words:\n    {words[:300]}\n    {new_words[:300]}'], None
    off = {str(i): difference(a, b) for i, (a, b) in enumerate(zip(numbers, new_numbers))}
    off = {i: gap for i, gap in off.items() if gap > bands.get(i, 1e-4)}
    return [f'number {i} is {new_numbers[int(i)]} instead of {numbers[int(i)]}, more than {bands.get(i, 1e-4):.2g} of it' for i in off], off


def rerun(path, python):
    "The cells of a notebook, run again without the slow ones."
    notebook = json.loads(path.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            if LEFT_OUT.search(source(cell)): cell['source'] = ''
            cell['outputs'] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/path.name
        copy.write_text(json.dumps(notebook), encoding='utf-8')
        result = subprocess.run([python, BANDS.with_name('execute.py'), copy], capture_output=True, text=True)
        if result.returncode: raise RuntimeError(f'{path.name} fails:\n{result.stderr[-3000:]}')
        return json.loads(copy.read_text(encoding='utf-8'))['cells']


def check(path, python, measure):
    "The number of faults of a notebook, printed; with `measure`, its bands are widened instead."
    bands = json.loads(BANDS.read_text()) if BANDS.exists() else {}
    mine, count = bands.get(path.stem, {}), 0
    old = json.loads(path.read_text(encoding='utf-8'))['cells']
    for a, b in zip(old, rerun(path, python)):
        if a['cell_type'] != 'code' or LEFT_OUT.search(source(a)): continue
        found, off = faults(a, b, mine.get(a['id'], {}))
        if measure and off is None: mine[a['id']] = None
        elif measure and off: mine[a['id']] = mine.get(a['id'], {}) | {i: min(2., float(f'{3*gap:.1g}')) for i, gap in off.items()}
        for text in found[:3]: print(f'{path.stem} {a["id"]}: {source(a).strip().splitlines()[0][:60]!r}: {text}')
        count += len(found)
    if measure and mine:
        bands[path.stem] = dict(sorted(mine.items()))
        BANDS.write_text(json.dumps(dict(sorted(bands.items())), indent=1) + '\n')
    return count


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--measure', metavar='PYTHON')
    parser.add_argument('notebooks', nargs='+', type=Path)
    args = parser.parse_args()
    count = sum(check(path, args.measure or sys.executable, bool(args.measure)) for path in args.notebooks)
    print(f'{len(args.notebooks)} notebooks, {count} cells with other outputs')
    sys.exit(bool(count) and not args.measure)
