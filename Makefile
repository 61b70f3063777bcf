# Every goal sets up what it needs in .venv; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export PYTHONUNBUFFERED := 1
# Processes that share the tests, about 4 GiB each; one file's tests stay together.
TEST_WORKERS ?= 2

.PHONY: help setup demo test test-slow parity lint types format clean

help: ## list the goals
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxpost needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(BIN)/python
	@start=$$(date +%s); $(PIP) install -e '.[report]' && \
	  echo "installed jaxpost in $$(($$(date +%s) - start)) s (not part of the demo's time)"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@start=$$(date +%s); $(PIP) install -e '.[test]' && \
	  echo "installed the test dependencies in $$(($$(date +%s) - start)) s"
	@touch $@

$(VENV)/.parity: pyproject.toml | $(BIN)/python
	@start=$$(date +%s); $(PIP) install torch==2.13.0 && $(PIP) install -e '.[parity]' && \
	  echo "installed the parity dependencies in $$(($$(date +%s) - start)) s"
	@touch $@

setup: $(VENV)/.base ## create .venv and install jaxpost

# Compiled programs are kept between runs; huge pages are worth 9-28% to XLA on CPU.
demo: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
demo: $(VENV)/.base ## train, fine-tune, optimise and export a small model
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/jaxpost demo

test: $(VENV)/.test ## everything that needs no torch and no accelerator
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow and not parity" tests

test-slow: $(VENV)/.test ## what takes too long for `make test`
	$(BIN)/python -m pytest -m "slow and not parity" tests

parity: $(VENV)/.parity ## compare with transformers on torch
	$(BIN)/python -m pytest -m parity tests

lint: $(VENV)/.test ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test ## pyright
	$(BIN)/pyright

format: $(VENV)/.test ## rewrite the tree in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .cache runs build *.egg-info
