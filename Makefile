# Two commands for a newcomer: `make bench` and `make test`. Everything is installed into $(VENV).
VENV   ?= .venv
PYTHON ?= python3
# Torch is needed by the tests and by export, never by bench, run or serve. On x86-64 the package index's build brings
# gigabytes of CUDA libraries; a CPU build that is installed in $(VENV) beforehand is kept.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
NATIVE_PYTHON ?= $(BIN)/python

.PHONY: bench test lint native tensorrt-api clean
bench: $(VENV)/.installed
	$(BIN)/sage-edge bench

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NVIDIA's own bindings of three releases, fetched and read without TensorRT: do the names that we use exist in each?
tensorrt-api: $(VENV)/.installed-dev
	$(BIN)/python -m tests.tensorrt_api.stubs

# The compiled core in place, for a source tree that is imported as it lies (PYTHONPATH) rather than installed:
# builds sage_edge/mailbox/_native*.so, which git and wheels leave out. Again after a change under mailbox/.
native:
	$(NATIVE_PYTHON) -m nanobind --cmake_dir > /dev/null || $(NATIVE_PYTHON) -m pip install --quiet "nanobind>=2.2" "numpy>=2" "cmake>=3.18" ninja
	PATH="$(dir $(NATIVE_PYTHON)):$$PATH" cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE=$(NATIVE_PYTHON) > /dev/null
	PATH="$(dir $(NATIVE_PYTHON)):$$PATH" cmake --build build/native
	for module in build/native/_native*.so; do \
	  cp $$module sage_edge/mailbox/.new && mv -f sage_edge/mailbox/.new sage_edge/mailbox/$${module##*/}; done

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
