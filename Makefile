# Everything runs in .venv. It is made once, and brought up to date when what is installed into it changes.
#   make demo                    generate a video with PSA on, on any machine
#   make test                    run the tests
#   make test PYTHON=python3.12  with another Python (3.11 or newer)

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# one thread a worker: the tests are small, and more threads than cores only get in each other's way
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: install demo test bench lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "psa_diffusers needs Python 3.11 or newer; say make PYTHON=python3.12")'
	$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python scripts/generate.py --model demo --use_psa --compare --output_dir outputs/demo

# TRITON_INTERPRET is read when a kernel is defined: interpreted and compiled kernels need a process each
test: install
	$(if $(wildcard tests/kernels),TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests/kernels)
	$(PYTEST) -m "not interpreter"

bench: install
	$(BIN)/python scripts/benchmark.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf outputs dist build .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
