# Every target does its own set-up: a virtual environment in .venv, filled again only when what it holds has changed.
#
#   make demo         train, evaluate and sample small models on this machine
#   make test         the tests that need neither minutes nor a GPU
#   make test-all     all tests; those for a GPU are skipped where there is none
#   make kernels      compile the fused kernels now, and not when they are first used
#   make parity       every system under every parallel layout beside one process; the table is in parity.md
#   make gpu-check    the tests for a GPU and the benchmarks on it, with their results in gpu-check.json
#   make lint         ruff
#   make clean        remove what these targets made; runs/ and data/ stay
#
# Python 3.11 or newer: make PYTHON=python3.12 test
# On Linux a plain torch is the CUDA build; PyTorch's index of CPU builds saves gigabytes where there is no GPU:
#   make PIP_EXTRA_INDEX_URL=URL_OF_THAT_INDEX demo

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(VENV)/bin/pytest
# Two processes, for two cores: of several that a test runs, most wait for each other. A file stays in one of them, and
# files go in the order of their names: those with the most tests are not those that take longest.
BESIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder
BUILD := setup.py pyproject.toml constraints.txt

# DeepSpeed comes as source: its kernels are compiled when one is first used, not here.
export DS_BUILD_OPS := 0

ifdef PIP_EXTRA_INDEX_URL
export PIP_EXTRA_INDEX_URL
endif

.PHONY: demo test test-all kernels parity gpu-check lint clean

demo: $(VENV)/core
	$(VENV)/bin/braid demo

test: $(VENV)/test
	$(PYTEST) -m "not slow and not gpu" $(BESIDE) $(PYTEST_ARGS)

test-all: $(VENV)/test
	$(PYTEST) $(BESIDE) $(PYTEST_ARGS)

kernels: $(VENV)/core
	$(VENV)/bin/python -m braid.kernels.library

parity: $(VENV)/test
	$(PYTEST) tests/parity --parity parity.md $(PYTEST_ARGS)

gpu-check: $(VENV)/test
	$(VENV)/bin/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: torch sees no CUDA device')"
	$(PYTEST) -m gpu --summary gpu-check.json $(PYTEST_ARGS); code=$$?; \
	$(VENV)/bin/braid bench all --into gpu-check.json && exit $$code

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build braid_lm.egg-info .ruff_cache .hypothesis gpu-check.json parity.md
	find pretrain parallel data_pipeline kernels launch tests -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone, so that nothing else chooses its version.
$(VENV)/core: $(BUILD)
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Braid needs Python 3.11 or newer; try make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	@echo "Installing Braid and what it needs into $(VENV); the first time takes a minute or a few."
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps mosaicml-streaming==0.13.0
	touch $@
