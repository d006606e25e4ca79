# make quickstart | test | lint: each makes .venv and installs what it needs the first time, nothing the second.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The newest Python is not always one that every dependency has a wheel for: the known-good one first.
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3 python
# A GPU counts where its driver answers.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TORCH_WANTED := >=2.11,<3
# Much of the tests' time is waiting for Ray to start: two at once, even on two cores.
TEST_WORKERS ?= 2

export PATH := $(CURDIR)/$(BIN):$(PATH)
export RAY_USAGE_STATS_ENABLED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help quickstart test lint format clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(VENV)/.ready-run ## see the whole method work on a simulated population; ARGS="--help" lists its settings
	$(BIN)/mta quickstart $(ARGS)

test: $(VENV)/.ready-test ## run the tests; ARGS="-k floors" runs some
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.ready-test ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-test ## mend style where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and what tools left behind; results stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.ready-run: $(VENV)/.ready-torch pyproject.toml
	$(BIN)/python -m pip install -qq --editable '.[$(EXTRA)]'
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready-run
	$(BIN)/python -m pip install -qq --editable '.[$(EXTRA),test]'
	touch $@

# Without a GPU: the CPU build of torch (a tenth of the size) where an index or a folder that pip is configured with
# offers one in the wanted range, else whatever pip takes.
$(VENV)/.ready-torch: $(VENV)/.ready-python
	@echo "installing torch and what mta-ray needs into $(VENV): minutes, once"
	@if [ '$(EXTRA)' = cpu ]; then \
		cpu=$$($(BIN)/python -m pip index versions torch 2>/dev/null \
			| sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' | grep -m1 '+cpu$$' || true); \
	fi; \
	if [ -z "$${cpu:-}" ] || ! $(BIN)/python -m pip install -qq "torch==$$cpu,$(TORCH_WANTED)"; then \
		$(BIN)/python -m pip install -qq 'torch$(TORCH_WANTED)'; \
	fi
	touch $@

$(VENV)/.ready-python:
	@for python in $(PYTHONS); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			echo "making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV); touch $@; exit 0; \
		fi; \
	done; \
	echo 'no Python 3.11 or newer (with venv) was found; install one, or say which: make PYTHON=/path/to/python3' >&2; \
	exit 1
