# Two commands: `make train` and `make test`. Both make .venv first if it is not there; a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean

train: .venv/.installed
	$(BIN)/disttrain train configs/quickstart.toml

test: .venv/.installed-test
	$(BIN)/python -m pytest

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, alone: held by the constraints it is one small wheel on machines without a GPU.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "disttrain needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,oracles,hf,wandb,tensorboard,prometheus,report,deepspeed,accelerate]'
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
