# Everything runs in .venv. It is made once, and brought up to date when what is installed into it changes.
#   make demo                    generate a video with PSA on, on any machine
#   make test                    run the tests
#   make test PYTHON=python3.12  with another Python (3.11 or newer)
#   make check                   format, lint, types, and the docs as a site: a minute, so first
#   make test-oldest             run the tests that touch diffusers with the oldest that pyproject.toml allows
#   make test-oldest DIFFUSERS=0.38.0   with any other
#   make test-extras             run the tests that need packages which nothing else needs
#   make fuzz                    run the tests of random cases for hours, with other cases each time

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# one thread a worker: the tests are small, and more threads than cores only get in each other's way
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

# a folder in front of what is installed: another diffusers needs no second torch
DIFFUSERS ?= $(shell sed -n 's/.*"diffusers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OTHER := $(VENV)/diffusers-$(DIFFUSERS)

# the folders whose tests run code of diffusers
ON_DIFFUSERS := tests/models tests/pipelines tests/processors tests/lora tests/calibration tests/cli

# the same for what PSA is tested together with and does not need: the versions are in constraints.txt
EXTRAS := torchao bitsandbytes cache-dit
EXTRAS_DIR := $(VENV)/extras

.PHONY: install demo check lint types docs test test-oldest test-extras fuzz bench bench-video clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "psa_diffusers needs Python 3.11 or newer; say make PYTHON=python3.12")'
	$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# passive: threads that wait leave the cores to whatever else runs, which would slow the demo down many times
demo: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/generate.py --model demo --use_psa --compare --output_dir outputs/demo

# TRITON_INTERPRET is read when a kernel is defined: interpreted and compiled kernels need a process each
test: install
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests/ops
	$(PYTEST) -m "not interpreter"

# from 0.36 to 0.40 diffusers wants the old httpx, which the hub no longer brings along
test-oldest: install
	test -d $(OTHER) || $(BIN)/python -m pip install --quiet -c constraints.txt --target $(OTHER).part 'httpx<1'
	test -d $(OTHER) || $(BIN)/python -m pip install --quiet --target $(OTHER).part --no-deps diffusers==$(DIFFUSERS)
	test -d $(OTHER) || mv $(OTHER).part $(OTHER)
	PYTHONPATH=$(CURDIR)/$(OTHER) $(PYTEST) -m "not interpreter and not fuzz" $(ON_DIFFUSERS)

test-extras: $(EXTRAS_DIR)/.installed
	PYTHONPATH=$(CURDIR)/$(EXTRAS_DIR) $(PYTEST) tests/pipelines -k "torchao or bitsandbytes or cache_dit"

$(EXTRAS_DIR)/.installed: constraints.txt | install
	rm -rf $(EXTRAS_DIR)
	$(BIN)/python -m pip install --quiet -c constraints.txt --target $(EXTRAS_DIR) --no-deps $(EXTRAS)
	touch $@

# PSA_FUZZ: tests/support/fuzz.py
fuzz: install
	PSA_FUZZ=1 $(PYTEST) -m "fuzz and not interpreter"
	PSA_FUZZ=1 TRITON_INTERPRET=1 $(PYTEST) -m "fuzz and interpreter" tests/ops

bench: install
	$(BIN)/python -m scripts.benchmarks.attention

bench-video: install
	$(BIN)/python -m scripts.benchmarks.video --settings eager compiled

check: lint types docs

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf outputs dist build site .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
