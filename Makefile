# Every target sets up .venv by itself; a machine needs Python 3.11 or newer and make.
# PYTHON=/path/to/python3.x chooses the interpreter.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	command -v $(name) >/dev/null 2>&1 && $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $(name))))
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed
# The exact pin, stated once: with a bare "torch" an installer may choose a build with gigabytes of CUDA libraries.
TORCH := $(shell grep '^torch==' constraints.txt)

DEMO_FLAGS ?= --model resnet20 --data digits --image-size 48 --batch-size 64 --epochs 3 --train-limit 1000 \
	--budget 330MB --baseline full --run-dir runs/demo --force
BENCHMARKS := $(filter-out benchmarks/models.py, $(sort $(wildcard benchmarks/[a-z]*.py)))

# Else every process that a test or a run starts would compile the package anew (0.5 s).
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench bench-crash bench-models clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install the project with its tools

# The stamp is written last: a set-up that was interrupted starts again, and pip keeps what is already in place.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer not found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python %d.%d is too old, 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" % v[:2])'
	@rm -f $@
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m venv --clear $(VENV); fi
	@echo "installing into $(VENV): $(TORCH) first, then the rest (a minute or two)" >&2
	@$(PIP) '$(TORCH)'
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train under a budget on real data, show the saving, write runs/demo
	$(VENV)/bin/trgl-device train $(DEMO_FLAGS)

test: $(STAMP) ## run the tests, but for the longest (ten minutes)
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not long"

test-all: $(STAMP) ## run all tests
	$(PY) -m pytest -q -n 2 --dist worksteal

check: $(STAMP) ## format, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP) ## produce every number that the README quotes (takes hours)
	@test -n "$(BENCHMARKS)" || { echo "no scripts in benchmarks/" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "$$script" >&2; $(PY) "$$script"; done

bench-crash: $(STAMP) ## kill runs (CRASH_FLAGS="--kills 200"), cut the power (POWER_FLAGS="--states 400"), damage files (FUZZ_FLAGS="--files 10000")
	$(PY) benchmarks/crash.py $(CRASH_FLAGS)
	$(PY) benchmarks/power_cut.py $(POWER_FLAGS)
	$(PY) benchmarks/fuzz.py $(FUZZ_FLAGS)

bench-models: $(STAMP) ## which networks of torchvision, timm and Hugging Face are cut (installs the last two; hours)
	@$(PIP) --editable '.[models]'
	$(PY) benchmarks/models.py $(MODELS_FLAGS)

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
