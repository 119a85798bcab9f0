# Two commands for a newcomer: `make bench` and `make test`. Everything is installed into $(VENV).
VENV   ?= .venv
PYTHON ?= python3
# Torch is needed by the tests and by export, never by bench, run or serve. On x86-64 the package index's build brings
# gigabytes of CUDA libraries; a CPU build that is installed in $(VENV) beforehand is kept.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.PHONY: bench test lint tensorrt-api clean
bench: $(VENV)/.installed
	$(BIN)/sage-edge bench

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NVIDIA's own bindings of three releases, fetched and read without TensorRT: do the names that we use exist in each?
tensorrt-api: $(VENV)/.installed-dev
	$(BIN)/python -m tests.tensorrt_api.stubs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
