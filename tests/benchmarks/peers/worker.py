"""Runs the rows of one library, one at a time, as it is asked on its standard input: a line of JSON in, a line of JSON out.

What libraries print goes to the standard error, a file: `python worker.py FILE_OF_FIRST_WEIGHTS`.
"""
import json, os, resource, sys, time
from pathlib import Path
import torch
from work import ROWS, SIZES, load_rows, make_job


def peak_memory():
    "The most memory this process has held, in bytes."
    if not (status := Path('/proc/self/status')).exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1])*1024 for line in status.read_text().splitlines() if line.startswith('VmHWM'))


def run_row(request, weights):
    "Seconds, accuracy and memory of one run; what it trained, or loaded last, is saved where the request says."
    name, library, variant = request['row']
    job = make_job(name, weights.get(name), SIZES[variant] if name == 'data' else None)
    run = ROWS[library, variant].prepare(job, variant)
    start = time.perf_counter()
    accuracy = run()
    seconds = time.perf_counter() - start
    if 'save' in request:
        result = job.last if name == 'loading' else [p.detach() for p in job.model.parameters()]
        torch.save([t.clone() for t in result], request['save'])
    return dict(seconds=seconds, accuracy=accuracy, peak=peak_memory(), data=job.x.nbytes + job.y.nbytes)


if __name__ == '__main__':
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # from here on, what is printed goes to the standard error
    load_rows()
    threads = int(os.environ['OMP_NUM_THREADS'])
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # all on the same core
    weights = torch.load(sys.argv[1])
    for line in sys.stdin: print(json.dumps(run_row(json.loads(line), weights)), file=answers, flush=True)
