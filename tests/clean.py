"The filter of `make hooks`: a notebook from stdin as git shall see it, without what JupyterLab adds to it."
import sys
from execnb.nbio import dict2nb, nb2str
from json import loads
from nbdev.clean import clean_nb
from nbdev.config import get_config

text = sys.stdin.buffer.read().decode('utf-8')
cfg = get_config()
notebook = dict2nb(loads(text))
clean_nb(notebook, cfg.clear_all, cfg.allowed_metadata_keys.split(), cfg.allowed_cell_metadata_keys.split(), cfg.clean_ids)
sys.stdout.buffer.write(nb2str(notebook).encode('utf-8'))
