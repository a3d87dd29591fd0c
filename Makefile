# Everything happens in .venv inside this checkout. `make help` lists the targets.

PYTHON ?= python3
# Another build of torch:  make setup TORCH="torch --index-url <address of the build you want>"
TORCH ?= torch==2.13.0
# Test processes.
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
# One thread a test process: more would only compete for the same cores.
TEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --timeout 600

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## make .venv and install knowsam with its tools into it

# torch first, then everything else under a constraint that names it: pip then never swaps it for another build.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "knowsam needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "hint: make setup PYTHON=python3.11" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	$(PY) -m pip install --quiet -c $(VENV)/torch.txt -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## train the quick start and its supervised twin, then compare them
	$(PY) tools/train.py experiments/quickstart.yaml method.name=supervised run=runs/demo/supervised
	$(PY) tools/train.py experiments/quickstart.yaml run=runs/demo/knowsam
	$(PY) tools/evaluate.py runs/demo/supervised runs/demo/knowsam

test: setup  ## the quick tests
	$(TEST) -m "not slow and not gpu"

test-slow: setup  ## the tests that take minutes
	$(TEST) -m "slow and not gpu"

lint: setup  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# A folder of its own for the strict cache: the two runs have different settings and would throw out each other's.
types: setup  ## mypy: strict on losses, methods and models, plain on the rest
	$(PY) -m mypy --strict --cache-dir .mypy_cache/strict knowsam/losses knowsam/methods knowsam/models
	$(PY) -m mypy knowsam

docs: setup  ## the documentation as web pages, docs/_build/html/index.html; needs no network
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:  ## remove caches and build leftovers; .venv, data and runs stay
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
