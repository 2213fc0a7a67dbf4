# Two commands to everything: `make train` and `make test` make the environment that they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
META := settings.ini setup.py constraints.txt
NOTEBOOKS := $(wildcard nbs/*.ipynb)
# In the README the notebooks and the picture lie one folder down.
LINKS := sed -E 's,\]\(([^)/:]+\.(ipynb|png))\),](nbs/\1),g'
# The models here are so small that a second thread slows them down.
export OMP_NUM_THREADS ?= 1

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /: /' | awk -F': ' '{printf "make %-8s %s\n", $$1, $$2}'

train: .venv/.run  ## train on MNIST, show the results; options in ARGS='--epochs 3'
	@$(BIN)/exp_train $(ARGS)

test: .venv/.dev  ## run every notebook from a cold kernel, then the tests
	$(BIN)/nbdev_test --timing --n_workers 2
	$(BIN)/python -m pytest -q tests

lab: .venv/.dev  ## open JupyterLab on the front page
	$(BIN)/jupyter lab nbs/index.ipynb

run: .venv/.dev  ## execute every notebook in place and clean it
	$(BIN)/python tests/execute.py $(NOTEBOOKS)
	$(BIN)/nbdev_clean

export: .venv/.dev  ## write the modules and README.md from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir .venv --output front nbs/index.ipynb
	$(LINKS) .venv/front.md > README.md

check: .venv/.dev  ## clean, export, nothing out of step, lint, test
	$(BIN)/nbdev_clean
	$(MAKE) export
	git diff --exit-code && test -z "$$(git status --porcelain)"
	$(BIN)/python -m pyflakes exp/nb_*.py tests
	$(MAKE) test

bench: .venv/.dev  ## time the training loop, the Learner, the optimizers and the imports
	$(BIN)/python tests/benchmarks/loop.py
	$(BIN)/python tests/benchmarks/learner.py

# Stamps: an environment is made anew when its requirements change, and finished if it was interrupted.
.venv/.run: $(META)
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.dev: $(META)
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	@touch $@ .venv/.run

.PHONY: help train test lab run export check bench
