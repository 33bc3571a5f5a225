# Every target sets .venv up first. PYTHON picks the interpreter that .venv is made of: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp

DEMO_RUN := runs/quickstart
DEMO_EXPORT := out/quickstart

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint chaos bench clean

help: ## Show the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(INSTALLED) ## Make .venv with everything that training and testing needs

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "dsllm needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.11 setup" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv, or your system's like" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the tested versions into $(VENV): minutes the first time, seconds later"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

demo: setup ## Train a small model on two ranks, export it, let it write Python
	$(BIN)/dsllm launch quickstart --num-gpus 2 --run-dir $(DEMO_RUN)
	rm -rf $(DEMO_EXPORT)
	$(BIN)/dsllm export $(DEMO_RUN) $(DEMO_EXPORT)
	$(BIN)/dsllm generate $(DEMO_RUN) --prompt "def main("

# By file, because a file's tests share starts of DeepSpeed.
test: setup ## Run all tests but the slow ones, as CI does
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: setup ## Run every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup ## Check style, format and the light half's types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: setup ## Kill runs a hundred times at random moments, and hold them to what they promise: half an hour
	DS_ACCELERATOR=cpu OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.distributed.chaos --kills 100 \
	    --output benchmarks/results/chaos-cpu.json

bench: setup ## Measure tokens/s against a bare DeepSpeed loop and the Hugging Face Trainer
	$(BIN)/python benchmarks/bench.py

clean: ## Remove .venv and what tools left behind; runs, data and exports stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
