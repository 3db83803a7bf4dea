# Everything runs in .venv, made from nothing but Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test lint demo clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --editable . --group dev
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: install
	$(BIN)/pytest

# Transformer-Nano and MoT-Nano/32E/4, a few minutes each, their losses side by side.
demo: install
	$(BIN)/mot train Transformer-Nano --out runs/demo/dense
	$(BIN)/mot train MoT-Nano/32E/4 --out runs/demo/mot
	$(BIN)/mot report runs/demo/dense runs/demo/mot

clean:
	rm -rf .venv runs
