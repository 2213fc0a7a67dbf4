"""Every row of every work in turns, round after round, each library in a process of its own; then the tables and the picture.

`python run.py` measures all and writes `results/peers.json`, `.md` and `.png`, and the table in the README. `--only mlp tiny`
measures some works and prints their tables, without writing anything; `--rounds` says how often.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
import torch
import report
from work import ROWS, TRAINING, WORKS, first_weights, load_rows

# glibc keeps freed memory: whether it gives it back depends on how the heap of a process happens to lie, and costs up to a quarter.
MALLOC = dict(MALLOC_TRIM_THRESHOLD_='1073741824', MALLOC_MMAP_THRESHOLD_='1073741824')
LIBRARIES = 'torch', 'fastai', 'lightning', 'pytorch-ignite', 'skorch', 'accelerate', 'keras', 'jax', 'optax', 'flax', 'tinygrad'
XLA = dict(XLA_FLAGS='--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1', JAX_PLATFORMS='cpu')
TINYGRAD = dict(DEV='CPU', NUM_CPU_THREADS='1', PARALLEL='0')


class Worker:
    "A process that runs rows when asked to; what its library prints goes to a file."
    def __init__(self, name, threads, weights, folder):
        self.name, self.folder = name, folder/f'{name}, {threads}'
        self.folder.mkdir()
        self.log = (self.folder/'log.txt').open('w+')
        env = os.environ | MALLOC | XLA | TINYGRAD | dict(OMP_NUM_THREADS=str(threads), KERAS_BACKEND='torch', KERAS_HOME=str(self.folder),
                                                          CACHEDB=str(self.folder/'tinygrad.db'))
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name('worker.py'), weights], cwd=self.folder, env=env,
                                        stderr=self.log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **request):
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f'{self.name} stopped at {request["row"]}:\n{self.log.read()[-3000:]}') from None

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def take_turns(name, workers, rounds, folder):
    """The runs of each row: seconds, and their ratio to the base row, timed again just before the rows of each process.
    The first round warms up; what it trained is compared with the base's."""
    base, groups = WORKS[name].base, {}
    for key, row in ROWS.items():
        if name in row.works: groups.setdefault(row.worker, []).append(key)
    runs = {key: dict(seconds=[], ratio=[], over=[]) for keys in groups.values() for key in keys}
    def run(key, **request): return workers[ROWS[key].worker, WORKS[name].threads](row=[name, *key], **request)
    for r in range(rounds + 1):
        print(f'\r{name}: round {r} of {rounds} ' if r else f'{name}: warm-up ', end='', file=sys.stderr, flush=True)
        for worker, keys in groups.items():
            before = run(base)
            for key in keys:
                if r == 0:
                    runs[key] |= trained(run, key, base, folder)
                    continue
                result, found = before if key == base else run(key), runs[key]
                found['seconds'].append(result['seconds'])
                found['ratio'].append(result['seconds']/before['seconds'])
                found['over'].append(result['seconds'] - before['seconds'])
                found['beyond_data'] = result['peak'] - result['data']
    print(file=sys.stderr)
    return runs


def trained(run, key, base, folder):
    "Accuracy of a row, and how far its final weights (or its last batch) are from the base row's."
    mine, theirs = (folder/f'{"-".join(k)}.pt' for k in (key, base))
    if not theirs.exists(): run(base, save=str(theirs))
    result = run(key, save=str(mine))
    pairs = list(zip(torch.load(mine), torch.load(theirs)))
    same_shapes = all(a.shape == b.shape for a, b in pairs)
    return dict(accuracy=result['accuracy'], difference=max((a - b).abs().max().item() for a, b in pairs) if same_shapes else None)


def measure(names, rounds):
    "All runs of the works: name -> (library, variant) -> what was found."
    needed = dict.fromkeys((row.worker, WORKS[name].threads) for row in ROWS.values() for name in names if name in row.works)
    with tempfile.TemporaryDirectory() as folder:
        folder, workers = Path(folder), {}
        torch.save(first_weights(), folder/'first.pt')
        try:
            for worker, threads in needed: workers[worker, threads] = Worker(worker, threads, folder/'first.pt', folder)
            found = {}
            for name in names:
                (folder/f'weights of {name}').mkdir()
                found[name] = take_turns(name, workers, rounds, folder/f'weights of {name}')
            return found
        finally:
            for worker in workers.values(): worker.close()


def cpu():
    "The processor's name, where the system tells."
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: lines = []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or 'an unknown processor'


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--only', nargs='+', choices=WORKS, metavar='WORK')
    args = parser.parse_args()
    if args.rounds < (least := 2 if args.only else 7): parser.error(f'expected --rounds of at least {least}, got {args.rounds}')
    load_rows()
    start, load = time.perf_counter(), os.getloadavg()[0]
    names = args.only or list(WORKS)
    found = {}
    for part in ([*TRAINING, 'loading'], ['data', 'callbacks']):  # the first processes have gone before the others fill the memory
        found |= measure([name for name in part if name in names], args.rounds)
    machine = dict(machine=f'{platform.machine()}, {platform.system()}', cpu=cpu(), cores=os.cpu_count(), load_before=load,
                   python=platform.python_version(), versions={name: version(name) for name in LIBRARIES})
    result = machine | dict(rounds=args.rounds, minutes=(time.perf_counter() - start)/60, works=report.summary(found))
    print(report.tables(result))
    if not args.only: report.write(result)
