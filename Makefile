# Every target sets up .venv by itself. Other Python: make test PYTHON=python3.12
# On a machine whose python3 already has torch: make test VENV_FLAGS=--system-site-packages
PYTHON ?= python3
VENV_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/installed
TORCH := $(shell sed -n 's/^torch==/&/p' constraints.txt)

.PHONY: train test lint bench clean

train: $(STAMP)
	$(BIN)/aepo-fast train first-light --overwrite

# One thread a test process: threads that wait for each other are what makes two cores slow.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m bench $(or $(ARGS),entropy)

clean:
	rm -rf .venv

# torch goes first and alone: the exact pin finds a CPU build where pip is set up for one, while a
# range would fetch gigabytes of CUDA libraries onto a machine without a GPU. It is left out of the
# constraints afterwards, which would replace a torch that the system brought.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install --quiet --constraint .venv/constraints.txt --editable '.[dev]'
	touch $(STAMP)
