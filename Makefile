# Two commands set everything up: `make demo` and `make test`.  Everything happens in $(VENV).

PYTHON    ?= python3
VENV      ?= .venv
# For make bench: --quick takes two minutes, --artifact pkg.tar measures a package of yours.
BENCH_FLAGS ?=
# On x86-64 Linux, where PyPI's torch brings CUDA: PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_FLAGS ?=
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# onnxruntime-training is imported as onnxruntime: an environment of its own, of CPython 3.11 on x86-64 Linux.
ORT_PYTHON ?= python3.11
ORT_VENV   ?= .venv-ort
ORT_INSTALLED := $(ORT_VENV)/.installed
SOURCES := $(CURDIR):$(CURDIR)/host:$(CURDIR)/device

.PHONY: help install install-ort demo docs docs-links test test-slow test-ort-training lint format bench pi-check clean

help:
	@echo "make demo      train MCUNet with LANCE and with backpropagation, side by side (about five minutes)"
	@echo "make test      run the tests"
	@echo "make test-ort-training   export and device against onnxruntime-training 1.19.2 (CPython 3.11, x86-64)"
	@echo "make docs      the documentation as a site, in build/docs; a warning or a broken link is an error"
	@echo "make docs-links   the addresses of other sites in it, too (needs the network)"
	@echo "make lint      formatting, lint, types, import contracts"
	@echo "make bench     step time and memory beside PyTorch's, on this machine (about ten minutes)"
	@echo "make pi-check  run the device runtime on an emulated Raspberry Pi (as root; downloads Debian and wheels)"
	@echo "make clean     remove what the above made"

install: $(INSTALLED)

install-ort: $(ORT_INSTALLED)

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
	LANCE_ORT_PYTHON=$(wildcard $(abspath $(ORT_VENV))/bin/python) $(BIN)/python -m pytest -m slow

$(ORT_INSTALLED): constraints-ort-training.txt
	$(ORT_PYTHON) -m venv $(ORT_VENV)
	$(ORT_VENV)/bin/python -m pip install $(PIP_FLAGS) --quiet --disable-pip-version-check \
	    -c constraints-ort-training.txt onnxruntime-training onnx torch numpy click pillow psutil threadpoolctl pytest
	touch $@

# Exports here and trains there; then the device's own tests there, where lance-edge is a folder, not installed.
test-ort-training: $(INSTALLED) $(ORT_INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=$(SOURCES) LANCE_ORT_PYTHON=$(abspath $(ORT_VENV))/bin/python \
	    $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests/ort_training
	OMP_NUM_THREADS=1 PYTHONPATH=$(SOURCES) \
	    $(ORT_VENV)/bin/python -m pytest tests/device/test_session.py tests/device/test_step.py tests/device/test_train.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

docs-links: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -b linkcheck docs build/docs-links

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

pi-check: $(INSTALLED)
	PYTHON="$(abspath $(BIN)/python)" scripts/pi_check.sh

clean:
	rm -rf $(VENV) $(ORT_VENV) demo-data demo-run build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
