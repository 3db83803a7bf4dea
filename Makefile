# Everything runs in .venv, made from nothing but Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test lint demo clean

install: .venv/installed

.venv/installed: pyproject.toml
	@echo "Installing torch, transformers and the rest into .venv: some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --editable ".[train]" --group dev
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: install
	$(BIN)/pytest

# Three models on the same text, a few minutes each: their losses side by side, a sample of each, and a page.
demo: install
	$(BIN)/mot compare Transformer-Nano MoT-Nano/32E/8 TC-Nano/32E --seeds 1 --steps 1000 --out runs/demo

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .hypothesis
