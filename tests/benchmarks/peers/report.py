"""From the runs to numbers, tables, the picture, and the table in the README."""
import json, math
from itertools import combinations
from pathlib import Path
from statistics import median, quantiles
from work import BY_HAND, ROWS, SIZES, TRAINING, WORKS

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parents[1]/'results'
BEGIN, END = '<!-- peers: written by make bench-peers -->', '<!-- peers: end -->'
TOLERANCE = 1e-4                          # between the weights that two libraries have trained
OWN_ORDER = 'Keras', 'defaults'            # it takes arrays, and shuffles them for itself
FLOOR, AGAIN = 'matrix products alone', 'by hand, again'


# Numbers

def name_of(key): return ', '.join(filter(None, key))

def spread(values):
    "Median and quartiles."
    low, mid, high = quantiles(values, method='inclusive')
    return dict(median=mid, low=low, high=high)

def told_apart(a, b):
    "Whether one of two rows was the faster in so many rounds that chance would do it in less than 1 of 20 runs (a sign test)."
    n, wins = len(a), sum(x < y for x, y in zip(a, b))
    return 2*sum(math.comb(n, k) for k in range(min(wins, n - wins) + 1))/2**n < 0.05

def summary(found):
    "What the tables and the picture are made of: name of the work -> name of the row -> numbers."
    works = {}
    for name, runs in found.items():
        work, rows = WORKS[name], {}
        if name not in ('data', 'callbacks'): runs = dict(sorted(runs.items(), key=lambda item: median(item[1]['ratio'])))
        for key, run in runs.items():
            n_batches = SIZES.get(key[1], work.n)//work.bs*work.passes
            rows[name_of(key)] = dict(
                library=key[0], variant=key[1], seconds=spread(run['seconds']), ratio=spread(run['ratio']),
                over_us=spread([s/n_batches*1e6 for s in run['over']]), accuracy=run['accuracy'], difference=run['difference'],
                beyond_data=run['beyond_data'], rounds=run)
        for a, b in combinations(rows.values(), 2):
            if not told_apart(a['rounds']['ratio'], b['rounds']['ratio']):
                for one, other in ((a, b), (b, a)): one.setdefault('like', []).append(name_of((other['library'], other['variant'])))
        for r in rows.values(): r['rounds'] = r['rounds']['seconds']
        works[name] = rows
    return works


# Tables

def number(x, digits=2): return f'{x:.{digits}f}'.replace('-', '−')
def interval(s, digits=2): return f"{number(s['median'], digits)} ({number(s['low'], digits)} to {number(s['high'], digits)})"
def table(head, rows): return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in (head, ['---']*len(head), *rows))

def noise(rows):
    "What the loop says against itself, as a sentence."
    base, again = rows[name_of(BY_HAND)], rows[AGAIN]['ratio']
    s = base['seconds']
    between = (s['high'] - s['low'])/s['median']
    text = (f"The loop by hand takes {1e3*s['median']:.0f} ms ({1e3*s['low']:.0f} to {1e3*s['high']:.0f}); run twice, "
            f"the second time is {interval(again)} times the first.")
    if max(again['high'] - 1, 1 - again['low']) > 0.1 or between > 0.25: text += ' **Too noisy: run it again on a quiet machine.**'
    return text

def same_weights(row):
    if row['difference'] is None or row['library'] == FLOOR: return ''
    if row['difference'] < TOLERANCE: return 'yes'
    return 'own order' if (row['library'], row['variant']) == OWN_ORDER else 'no'

def full_table(name, rows):
    "A line a row; the last column has the numbers of the rows that can't be told from it."
    numbers, floor = {row: i for i, row in enumerate(rows, 1)}, rows.get(FLOOR)
    work, training, loading = WORKS[name], name in TRAINING, name == 'loading'
    head = ['', 'row', 'ratio (quartiles)', 'ms']
    if training: head += ['over the loop, µs a batch'] + ['times the floor']*bool(floor) + ['accuracy']*bool(work.n_valid) + ['same weights']
    if loading: head += ['samples/s', 'same batch']
    if name == 'data': head += ['ratio a row', 'memory beyond the data, MB']
    if name == 'callbacks': head += ['µs a batch and callback']
    lines = []
    for label, r in rows.items():
        line = [numbers[label], label, interval(r['ratio']), number(1e3*r['seconds']['median'], 0)]
        if training:
            line += [interval(r['over_us'], 0)] + ([number(r['ratio']['median']/floor['ratio']['median'], 1)] if floor else [])
            line += [f"{r['accuracy']:.4f}" if r['accuracy'] else '']*bool(work.n_valid) + [same_weights(r)]
        if loading: line += [f"{work.n//work.bs*work.bs*work.passes/r['seconds']['median']:,.0f}", same_weights(r)]
        if name == 'data':
            line += [number(r['ratio']['median']*SIZES['1x']/SIZES[r['variant']]), number(r['beyond_data']/1e6, 0)]
        if name == 'callbacks':
            k = int(r['variant'].split()[0])
            line += [number(r['over_us']['median']/k) if k else '']
        lines.append([*line, ' '.join(str(numbers[o]) for o in r.get('like', ()))])
    return table([*head, 'not told from'], lines)

def libraries_of(rows): return list(dict.fromkeys(r['library'] for r in rows.values() if r['variant'] in ('lean', 'defaults')))

def front_table(works, machine):
    "The table of the README: the first two works, a line a library."
    mlp, tiny = works['mlp'], works['tiny']
    def columns(library, variant):
        row = name_of((library, variant))
        if row not in mlp: return '', ''
        return interval(mlp[row]['ratio']), number(tiny[row]['over_us']['median'], 0)
    def accuracies(library): return dict.fromkeys(f"{r['accuracy']:.4f}" for r in mlp.values() if r['library'] == library)
    lines = [[lib, *columns(lib, 'lean'), *columns(lib, 'defaults'), ' / '.join(accuracies(lib))] for lib in libraries_of(mlp)]
    head = ['', 'lean: an epoch', 'µs a batch', 'defaults: an epoch', 'µs a batch', 'accuracy']
    said = "Rows that are near each other can't be told apart by so few rounds: the last column of all tables says which."
    floor = mlp[FLOOR]['ratio']['median']
    return (f'{table(head, lines)}\n\n{noise(mlp)} Its matrix products alone take {number(floor)} of its time. {said} '
            f'{machine["rounds"]} rounds on one thread of {machine["cpu"]} with {machine["cores"]} cores.')

PROTOCOL = """A row is timed in every round, each library in a process of its own, one thing at a time, on one thread pinned to a core
but where the title says two. A ratio is to the base row as timed just before in the same round; medians, and quartiles in brackets.
Rows are told apart by a sign test over the rounds, at 1 in 20. Making model, data and trainer is not timed; training, validation and
whatever a library sets up in its fit are. What libraries print goes to a file. The C library is told to keep freed memory, for all alike.""".replace('\n', ' ')

def goals(works):
    "What the project set itself, against what was found."
    mlp, load = works['mlp'], works['loading']
    def ratio(row, rows=mlp): return rows[row]['ratio']['median']
    def line(text, value, met): return f"{'reached' if met else 'NOT reached'}: {text}: {number(value)}"
    ours, full, lean = ratio('exp, our SGD, defaults'), ('fastai', 'Lightning', 'Keras'), ('skorch', 'Ignite')
    lines = [line('Learner with its defaults and our SGD, times the loop by hand, at most 1', ours, ours <= 1)]
    for row, least in [(f'{p}, defaults', 2) for p in full] + [(f'{p}, lean', 1) for p in lean]:
        lines.append(line(f'{row}, times the same, at least {least}', ratio(row)/ours, ratio(row) >= least*ours))
    faster = ratio('torch, DataLoader, default', load)/ratio('exp, DataLoader', load)
    return [*lines, line("torch's DataLoader with its defaults, times our DataLoader, at least 5", faster, faster >= 5)]

def tables(result):
    "All that was measured, as markdown."
    works = result['works']
    machine = [result['machine'], result['cpu'], f"{result['cores']} cores", f"load {result['load_before']:.1f} before the run",
               f"Python {result['python']}", *(f'{k} {v}' for k, v in result['versions'].items())]
    parts = ['# Side by side', f"Made by `make bench-peers`: {result['rounds']} rounds after a warm-up, in {result['minutes']:.0f} "
             f"minutes. {', '.join(machine)}.", PROTOCOL]
    if {'mlp', 'tiny'} <= works.keys(): parts += ['## In short', front_table(works, result)]
    if 'mlp' in works: parts += [f'![{ALT}](peers.png)']
    for name, rows in works.items():
        parts += [f'## {WORKS[name].title}', *([noise(rows)] if name in TRAINING else []), full_table(name, rows)]
    if {'mlp', 'loading'} <= works.keys(): parts += ['## What was to be reached', '\n'.join(f'- {line}' for line in goals(works))]
    settings = {}
    for key, row in ROWS.items():
        if row.prepare.__doc__: settings.setdefault(' '.join(row.prepare.__doc__.split()), []).append(name_of(key))
    parts += ['## What each row is', '\n'.join(f"- **{'; '.join(names)}**: {text}" for text, names in settings.items())]
    return '\n\n'.join(parts) + '\n'


# The picture

ALT = ('Bars of the time that each library takes, lean and with its defaults, as a multiple of a loop written by hand, '
       'on a logarithmic scale: for an epoch of digits, and for a model so small that only the overhead counts.')

def draw(works, path):
    "Bars from the loop by hand to each library: to the left the faster ones, to the right the slower."
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    fig = Figure(figsize=(10, 6.5), layout='constrained')
    axes = fig.subplots(1, 2, sharey=True)
    libraries = libraries_of(works['mlp'])[::-1]
    for ax, name, title in zip(axes, ('mlp', 'tiny'), ('An epoch of digits', 'A model too small to matter')):
        rows = works[name]
        for variant, color, shift in (('lean', 'tab:blue', 0.2), ('defaults', 'tab:orange', -0.2)):
            names = [name_of((library, variant)) for library in libraries]
            s = [rows[name]['ratio'] for name in names if name in rows]
            y, mid = [i + shift for i, name in enumerate(names) if name in rows], [r['median'] for r in s]
            errors = [[r['median'] - r['low'] for r in s], [r['high'] - r['median'] for r in s]]
            ax.barh(y, [m - 1 for m in mid], 0.38, left=1, xerr=errors, color=color, label=variant, error_kw=dict(lw=1, capsize=2))
            for yi, r in zip(y, s):
                ax.annotate(f"{r['median']:.2f}", (max(r['high'], 1), yi), (4, 0), textcoords='offset points', va='center',
                            fontsize=8)
        ax.axvline(1, color='black', lw=0.8)
        if FLOOR in rows: ax.axvline(rows[FLOOR]['ratio']['median'], color='tab:gray', ls='--', lw=1, label=FLOOR)
        ax.set(xscale='log', xlabel='time, times a loop written by hand (log scale)', title=title)
        ax.set_xlim(0.7*min(r['ratio']['low'] for r in rows.values()), 2.6*max(r['ratio']['high'] for r in rows.values()))
        ax.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0].set_yticks(range(len(libraries)), libraries)
    axes[0].legend(loc='upper right', fontsize=8)
    fig.savefig(path, dpi=100, metadata={'Software': None})


# Files

def between(text, block):
    "The text with what stands between the two markers replaced."
    before, rest = text.split(BEGIN)
    return f'{before}{BEGIN}\n\n{block}\n\n{END}{rest.split(END)[1]}'

def write(result):
    "results/peers.json, .md and .png, and the table in the front page and the README."
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/'peers.json').write_text(json.dumps(result, indent=1) + '\n')
    (RESULTS/'peers.md').write_text(tables(result))
    draw(result['works'], RESULTS/'peers.png')
    block, front, readme = front_table(result['works'], result), ROOT/'nbs/index.ipynb', ROOT/'README.md'
    notebook = json.loads(front.read_text())
    cell = next(c for c in notebook['cells'] if c['id'] == 'peers0')
    cell['source'] = between(''.join(cell['source']), block).splitlines(keepends=True)
    front.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
    readme.write_text(between(readme.read_text(), block))
    print(f"written: {', '.join(str(p.relative_to(ROOT)) for p in (*sorted(RESULTS.glob('peers.*')), front, readme))}")
