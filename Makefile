# Two commands: `make demo` and `make test`. Both make .venv and install when something changed.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# onnxruntime and onnxruntime-gpu own the same module: one of them, never both.
RUNTIME := $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
OTHER := $(if $(filter gpu,$(RUNTIME)),cpu,gpu)
REMOVE := $(if $(filter gpu,$(RUNTIME)),onnxruntime,onnxruntime-gpu)
STAMP := $(VENV)/.installed-dev-$(RUNTIME)

.PHONY: help demo test test-slow lint install clean

help:
	@echo "make demo       install, train a small deconvolved U-Net, export it and draw what it sees"
	@echo "make test       install and run the tests"
	@echo "make test-slow  the whole-zoo sweeps as well"
	@echo "make lint       ruff and mypy"

install: $(STAMP)

$(VENV)/.installed-%-$(RUNTIME): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "segdeconv needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@if ls $(VENV)/.installed-*-$(OTHER) >/dev/null 2>&1; then $(BIN)/python -m pip uninstall --quiet --yes $(REMOVE); fi
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[$(RUNTIME),$*]'
	@rm -f $(VENV)/.installed-*
	@touch $@

# What trains is enough; where all is installed, nothing is.
demo: $(or $(wildcard $(STAMP)),$(VENV)/.installed-train-$(RUNTIME))
	$(BIN)/segdeconv demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
