# Two commands to everything: `make train` and `make test` make the environment that they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
META := settings.ini setup.py constraints.txt
# The peers have an environment of their own, with pins of their own. fastai goes in without its dependencies: it asks for torchvision
# and spacy, which what is used of it doesn't import. 2.8.7 is the last one that runs with fastcore 1, as exp does.
BENCH := .venv-bench/bin/python
BENCH_PINS := tests/benchmarks/peers/constraints.txt
BENCH_PIP := $(BENCH) -m pip install -qq --disable-pip-version-check -c $(BENCH_PINS)
PEERS := lightning pytorch-ignite skorch accelerate keras jax optax flax tinygrad fastprogress fastdownload fasttransform pandas requests
NOTEBOOKS := $(wildcard nbs/*.ipynb)
# In the README the notebooks and their picture lie one folder down, and everything else one folder less far up.
LINKS := sed -E 's,\]\(([^)/:]+\.(ipynb|png))\),](nbs/\1),g; s,\]\(\.\./,](,g'
# The models here are so small that a second thread slows them down.
export OMP_NUM_THREADS ?= 1

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /: /' | awk -F': ' '{printf "make %-11s %s\n", $$1, $$2}'

train: .venv/.run  ## train on MNIST, show the results; options in ARGS='--epochs 3'
	@$(BIN)/exp_train --model cnn --test $(ARGS)

test: .venv/.dev  ## run every notebook from a cold kernel, then the tests
	$(BIN)/nbdev_test --timing --n_workers 2
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

lab: .venv/.dev  ## open JupyterLab on the front page; options in ARGS='--no-browser'
	@git config filter.notebook.clean >/dev/null || echo "Running a notebook changes its file. 'make hooks', once, keeps what JupyterLab adds out of git; 'git restore nbs' brings all back."
	$(BIN)/jupyter lab --ServerApp.root_dir=. $(ARGS) nbs/index.ipynb

hooks: .venv/.dev  ## let git look at notebooks without what JupyterLab adds to them, in this clone
	git config filter.notebook.clean '$(BIN)/python tests/clean.py'

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
	$(BIN)/python -m pyflakes exp/nb_*.py exp/__main__.py tests docs
	$(MAKE) test

student: .venv/.dev  ## write the notebooks without solutions, for a class, into student/
	$(BIN)/python tests/exercises.py student nbs student

speedrun: .venv/.dev  ## run 23's race again, on an otherwise quiet machine, and store its table and picture
	$(BIN)/python tests/execute.py nbs/23_resnet.ipynb
	$(BIN)/nbdev_clean --fname nbs/23_resnet.ipynb

site: .venv/.site  ## build the site into _docs/, from the notebooks as they are stored
	$(BIN)/python docs/build.py

browser: site  ## walk through the site, JupyterLab and the cell for Colab, in Chromium
	BROWSER_TESTS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/browser

drift: .venv/.dev  ## run the notebooks again and compare with the stored outputs
	$(BIN)/python tests/drift.py nbs/[0-9]*.ipynb

links: .venv/.dev  ## list the addresses that notebooks, README and site point to; ARGS=--check asks for each
	$(BIN)/python tests/links.py $(ARGS)

bench: .venv/.dev  ## time the training loop, the Learner, the optimizers and the imports
	$(BIN)/python tests/benchmarks/loop.py
	$(BIN)/python tests/benchmarks/learner.py

bench-peers: .venv-bench/.done  ## time other training libraries side by side with ours; options in ARGS='--rounds 15'
	$(BENCH) tests/benchmarks/peers/run.py $(ARGS)

# Stamps: an environment is made anew when its requirements change, and finished if it was interrupted.
# `uv sync` takes out what `uv run` doesn't need; then the stamps are no longer true.
$(shell test -x $(BIN)/nbdev_export || rm -f .venv/.dev .venv/.site)
.venv/.run: $(META)
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.dev: $(META)
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	@touch $@ .venv/.run

# MathJax and axe-core are no Python packages, so npm brings them.
.venv/.site: $(META)
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev,site]'
	rm -rf .venv/npm && mkdir -p .venv/npm
	cd .venv/npm && for package in mathjax@3.2.2 axe-core@4.14.1; do \
	  npm pack --silent $$package | xargs tar xzf && mv package $${package%@*}; done
	@touch $@ .venv/.dev .venv/.run

.venv-bench/.done: $(META) $(BENCH_PINS)
	$(PYTHON) -m venv .venv-bench
	$(BENCH_PIP) -e . $(PEERS)
	$(BENCH_PIP) --no-deps fastai
	@touch $@

.PHONY: help train test lab hooks run export check student speedrun site browser drift links bench bench-peers
