"""An epoch of training by hand, with torch's DataLoader and with ours; and what an import costs.

Interleaved rounds in one process on one thread; medians, spread and ratios, printed and written to `results/loop.json`.
"""
import json, platform, statistics, subprocess, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from exp.nb_00 import set_seed
from exp.nb_01 import get_data
from exp.nb_03 import accuracy
from exp.nb_04 import DataLoader, Dataset, fit, get_model

ROUNDS, BS = 11, 64
x_train, y_train, x_valid, y_valid = get_data()
train_ds, valid_ds = Dataset(x_train, y_train), Dataset(x_valid, y_valid)
valid_dl = DataLoader(valid_ds, 2*BS)


def slices():
    for i in range(0, len(x_train), BS): yield x_train[i:i + BS], y_train[i:i + BS]

def permuted():
    for idxs in torch.randperm(len(x_train)).split(BS): yield x_train[idxs], y_train[idxs]

def by_hand(batches, model, opt):
    for xb, yb in batches:
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad(): return accuracy(model(x_valid), y_valid).item()

def torchs(shuffle): return TorchLoader(TensorDataset(x_train, y_train), BS, shuffle=shuffle)
def ours(shuffle, model, opt):
    return fit(1, model, F.cross_entropy, opt, DataLoader(train_ds, BS, shuffle), valid_dl, log=None)[1]

WAYS = {
    'in order': {'by hand, slices': lambda *a: by_hand(slices(), *a),
                 "by hand, torch's DataLoader": lambda *a: by_hand(torchs(False), *a),
                 'by hand, our DataLoader': lambda *a: by_hand(DataLoader(train_ds, BS), *a),
                 'fit, our DataLoader': lambda *a: ours(False, *a)},
    'shuffled': {'by hand, x[randperm]': lambda *a: by_hand(permuted(), *a),
                 "by hand, torch's DataLoader": lambda *a: by_hand(torchs(True), *a),
                 'by hand, our DataLoader': lambda *a: by_hand(DataLoader(train_ds, BS, True), *a),
                 'fit, our DataLoader': lambda *a: ours(True, *a)}}


def measure(ways):
    "Seconds and last accuracy of each way, the ways taking turns; the first round is a warm-up."
    seconds, accs = {k: [] for k in ways}, {}
    for r in range(ROUNDS + 1):
        for name, way in ways.items():
            set_seed(r)
            start = time.perf_counter()
            accs[name] = way(*get_model())
            if r: seconds[name].append(time.perf_counter() - start)
    base = next(iter(ways))
    return {name: dict(median_s=statistics.median(s), low_s=min(s), high_s=max(s), accuracy=accs[name],
                       ratio=statistics.median(a/b for a, b in zip(s, seconds[base]))) for name, s in seconds.items()}


def import_seconds(module):
    code = f'import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)'
    return float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)


def measure_imports():
    "Median seconds to import, each time in a fresh process, taking turns."
    times = {m: [] for m in ('torch', *(f'exp.{p.stem}' for p in sorted(Path(__file__).parents[2].glob('exp/nb_*.py'))))}
    for _ in range(ROUNDS):
        for m in times: times[m].append(import_seconds(m))
    return {m: statistics.median(t) for m, t in times.items()}


if __name__ == '__main__':
    torch.set_num_threads(1)
    result = dict(machine=f'{platform.machine()}, {platform.system()}', python=platform.python_version(), torch=torch.__version__,
                  rounds=ROUNDS, epochs={order: measure(ways) for order, ways in WAYS.items()}, imports=measure_imports())
    for order, rows in result['epochs'].items():
        print(f'\nOne epoch, {order:20} median ms   low  high  ratio  accuracy')
        for name, r in rows.items():
            print(f"{name:32} {1e3*r['median_s']:8.0f} {1e3*r['low_s']:5.0f} {1e3*r['high_s']:5.0f}  {r['ratio']:5.2f}  {r['accuracy']:.3f}")
    print('\nimport, seconds: ' + ', '.join(f'{m} {t:.2f}' for m, t in result['imports'].items()))
    path = Path(__file__).parent/'results'/'loop.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(f'written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}')
