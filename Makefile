# Two commands set everything up: `make demo` and `make test`.  Everything happens in $(VENV).

PYTHON    ?= python3
VENV      ?= .venv
# For make bench: --quick takes two minutes, --artifact pkg.tar measures a package of yours.
BENCH_FLAGS ?=
# On x86-64 Linux, where PyPI's torch brings CUDA: PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_FLAGS ?=
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow lint format bench pi-check clean

help:
	@echo "make demo      train MCUNet with LANCE and with backpropagation, side by side (about five minutes)"
	@echo "make test      run the tests"
	@echo "make lint      formatting, lint, types, import contracts"
	@echo "make bench     step time and memory beside PyTorch's, on this machine (about ten minutes)"
	@echo "make pi-check  run the device runtime on an emulated Raspberry Pi (as root; downloads Debian and wheels)"
	@echo "make clean     remove what the above made"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/demo.sh

test: $(INSTALLED)
	# One thread for each process: two pools of two threads on two cores wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

pi-check: $(INSTALLED)
	PYTHON="$(abspath $(BIN)/python)" scripts/pi_check.sh

clean:
	rm -rf $(VENV) demo-data demo-run build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
