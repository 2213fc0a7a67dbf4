"Run notebooks from cold kernels, in place, their outputs stored in one piece: `python tests/execute.py nbs/*.ipynb`."
import sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    print(path)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name='python3', coalesce_streams=True, record_timing=False,
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    nbformat.write(notebook, path)
