# Everything runs in .venv, which is made from nothing but Python (3.11 or later) and its pip. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := torch,cpu,dev
DEMO := demo
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check clean

help:  ## List the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "Another Python: make PYTHON=python3.12 ... ; more test processes: make WORKERS=8 test"

setup: $(STAMP)  ## Make .venv and install the package into it, editable.

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is missing or older than Python 3.11; name another one, for example: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## Prune, remove, prove and time a small network; results in demo/.
	rm -rf $(DEMO)
	$(BIN)/p2d run models/digits/recipe.toml -o $(DEMO)

test: $(STAMP)  ## Run the quick tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: $(STAMP)  ## Run the static checks, then all tests but those that need a GPU.
	PYTHON=$(BIN)/python tools/check --no-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu"

check: $(STAMP)  ## Run the static checks and the quick tests.
	PYTHON=$(BIN)/python tools/check

clean:  ## Remove .venv, the demo's results and the tools' caches.
	rm -rf $(VENV) $(DEMO) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
