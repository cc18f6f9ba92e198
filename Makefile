# make install   .venv with penstock and everything pinned
# make run       serve the bundled demo model and ask it one question
# make test      lint, types, import contract, tests
# make test-clients   the clients that people have, each in its own venv (downloads some 3 GB once)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

KERNELS := $(wildcard src/penstock/kernels/cpu/*)
FOLDERS := $(shell find src -type d ! -name __pycache__)
PORT ?= 3000
ASK ?= "How do I list my jobs on Slurm?"

.PHONY: install dev run test test-clients lint clean

install: $(VENV)/.installed
dev: $(VENV)/.dev

# torch comes first and pinned: left to a range, pip takes the newest build with gigabytes of CUDA.
# The folders are there because an editable install must learn of new and removed modules.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(KERNELS) $(FOLDERS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "penstock needs Python 3.11 or newer; this is `$(PYTHON) --version`. Try: make PYTHON=python3.11" >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(VENV)/.installed
	@$(BIN)/penstock serve demo --port $(PORT) --ask $(ASK)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

test-clients: $(VENV)/.dev
	$(BIN)/python -m pytest tests/clients/suite.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
