"""The Learner with its defaults against the loop one writes by hand; its overhead per batch; a step of each optimizer.

Interleaved rounds in one process on one thread; CPU time, its medians, spread and ratios, printed and written to
`results/learner.json`. Wanted of our optimizers: a step of SGD in at most 0.6 of PyTorch's best on two layers and never slower
than it, Adam and AdamW not slower than PyTorch's fused, an epoch of the Learner in at most 0.82 of that with torch.optim.SGD.
"""
import contextlib, io, json, platform, statistics, time
from functools import partial
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed
from exp.nb_01 import get_data
from exp.nb_02 import Model
from exp.nb_03 import accuracy
from exp.nb_04 import Dataset, get_dls
from exp.nb_10 import Learner
from exp.nb_11 import Scheduler, sched_lin
from exp.nb_12 import SGD, Adam, AdamW, RMSProp

ROUNDS, LR = 15, 0.3
x_train, y_train, x_valid, y_valid = get_data()
DATA = Dataset(x_train, y_train), Dataset(x_valid, y_valid)
g = torch.Generator().manual_seed(0)
TINY = Dataset(torch.randn(64*1000, 4, generator=g), torch.randint(2, (64*1000,), generator=g)), None


def by_hand(model, dls, opt_func=torch.optim.SGD):
    "What one writes: train, then loss and accuracy over the validation rows."
    train_dl, valid_dl = dls
    opt = opt_func(model.parameters(), lr=LR)
    model.train()
    for xb, yb in train_dl:
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
    if valid_dl is None: return None
    model.eval()
    total = right = n = 0
    with torch.no_grad():
        for xb, yb in valid_dl:
            pred = model(xb)
            total = total + F.cross_entropy(pred, yb)*len(yb)
            right = right + (pred.argmax(-1) == yb).sum()
            n += len(yb)
    return (right/n).item() if (total/n).item() else None


def learner(model, dls, opt_func=torch.optim.SGD, schedule=True):
    "Everything that is on by default, a metric and a schedule (constant, so that both loops do the same)."
    learn = Learner(model, dls, opt_func=opt_func, lr=LR, metrics=accuracy, cbs=Scheduler(lr=sched_lin(LR, LR)) if schedule else ())
    with contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    return learn.results.get('accuracy')


LOOPS = {'by hand, torch.optim.SGD': by_hand, 'Learner, torch.optim.SGD': learner, 'Learner, our SGD': partial(learner, opt_func=SGD),
         'by hand, torch.optim.SGD, fused': partial(by_hand, opt_func=partial(torch.optim.SGD, fused=True))}

def epoch(loop, tiny):
    set_seed(42)
    if tiny:
        train_dl, _ = get_dls(TINY[0], DATA[1], 64, seed=42)
        return loop(nn.Linear(4, 2), (train_dl, None))
    return loop(Model(784, 50, 10), get_dls(*DATA, 64, seed=42))


def interleaved(ways):
    "Seconds and last result of each way, in turns; the first round is a warm-up."
    seconds, last = {k: [] for k in ways}, {}
    for r in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.process_time()
            last[name] = way()
            if r: seconds[name].append(time.process_time() - start)
    return seconds, last


def measure(tiny):
    seconds, last = interleaved({name: partial(epoch, loop, tiny) for name, loop in LOOPS.items()})
    base, n = seconds['by hand, torch.optim.SGD'], 1000 if tiny else 781
    return {name: dict(median_s=statistics.median(s), low_s=min(s), high_s=max(s), accuracy=last[name],
                       ratio=statistics.median(a/b for a, b in zip(s, base)),
                       over_us=statistics.median(a - b for a, b in zip(s, base))/n*1e6) for name, s in seconds.items()}


def epoch_ratio(rows): return rows['Learner, our SGD']['median_s']/rows['Learner, torch.optim.SGD']['median_s']


def ten_layers():
    sizes, layers = [1, 16, 16, 32, 32, 64, 64, 64, 64, 64], []
    for n_in, n_out in zip(sizes, sizes[1:]): layers += [nn.Conv2d(n_in, n_out, 3, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))

OPTIMIZERS = {'SGD': (SGD, torch.optim.SGD), 'SGD, momentum': (partial(SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
              'RMSProp': (RMSProp, torch.optim.RMSprop), 'Adam': (Adam, torch.optim.Adam), 'AdamW': (AdamW, torch.optim.AdamW)}
VARIANTS = {'for-loop': dict(foreach=False), 'foreach': dict(foreach=True), 'fused': dict(fused=True)}

def steps(model, make_opt):
    "A hundred steps, gradients cleared before a new one comes, as a loop does; the gradients are made elsewhere."
    params = list(model.parameters())
    opt, grads = make_opt(params, lr=1e-6), [torch.randn_like(p)*1e-3 for p in params]
    def accumulate():
        for p, grad in zip(params, grads):
            if p.grad is None: p.grad = grad
            else: p.grad.add_(grad)
    def timed():
        total = 0.
        for _ in range(100):
            accumulate()
            start = time.process_time()
            opt.step()
            opt.zero_grad()
            total += time.process_time() - start
        return total/100
    return timed

def measure_steps():
    found = {}
    for size, make_model in {'2 layers': lambda: Model(784, 50, 10), '10 layers': ten_layers}.items():
        for kind, (ours, theirs) in OPTIMIZERS.items():
            ways = {'ours': ours} | {name: partial(theirs, **options) for name, options in VARIANTS.items()
                                     if kind != 'RMSProp' or name != 'fused'}
            timers, times = {name: steps(make_model(), make) for name, make in ways.items()}, {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, timed in timers.items(): times[name].append(timed())
            found[f'{kind}, {size}'] = {name: statistics.median(t)*1e6 for name, t in times.items()}
    return found


if __name__ == '__main__':
    torch.set_num_threads(1)
    result = dict(machine=f'{platform.machine()}, {platform.system()}', python=platform.python_version(), torch=torch.__version__, rounds=ROUNDS,
                  epochs={'an epoch of digits': measure(tiny=False), 'a model too small to matter': measure(tiny=True)}, steps_us=measure_steps())
    for title, rows in result['epochs'].items():
        print(f'\n{title:32} median ms   low  high  ratio  over, µs a batch  accuracy')
        for name, r in rows.items():
            acc = f'{r["accuracy"]:.4f}' if r['accuracy'] else ''
            print(f"{name:32} {1e3*r['median_s']:9.0f} {1e3*r['low_s']:5.0f} {1e3*r['high_s']:5.0f}  {r['ratio']:5.2f}  {r['over_us']:16.1f}  {acc:>8}")
    ratio = epoch_ratio(result['epochs']['an epoch of digits'])
    print(f'\nan epoch of the Learner with our SGD, of that with torch.optim.SGD: {ratio:.3f}')
    print('\nstep and zero_grad, µs     ' + ''.join(f'{name:>10}' for name in ('ours', *VARIANTS)) + '   ours/best')
    for kind, times in result['steps_us'].items():
        best = min(t for name, t in times.items() if name != 'ours')
        print(f'{kind:27}' + ''.join(f'{times[name]:10.1f}' if name in times else ' '*10 for name in ('ours', *VARIANTS))
              + f'{times["ours"]/best:12.2f}')
    path = Path(__file__).parent/'results'/'learner.json'
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(f'\nwritten: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}')
