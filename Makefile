# `make demo` and `make test` set everything up on a bare machine and reuse it the second time.
# Needs Python 3.11 or 3.12 with venv; PYTHON=... chooses one.

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv; sys.exit(not (3,11) <= sys.version_info < (3,13))' \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
MODEL := .model/smollm2-135m
DEMO_ARGS ?=
# Test processes, of one thread and up to 4 GB each; 0 runs all in one, as a single GPU wants.
WORKERS ?= $(shell command -v nvidia-smi >/dev/null && echo 0 || echo 2)
# Tests that measure time or talk to servers in other processes have the machine for themselves.
ALONE := tests/transfer tests/serving/test_metrics.py \
	tests/benchmarks/test_links.py tests/benchmarks/test_multi_agent.py

.PHONY: install model demo demo-pd test test-long check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: expected Python 3.11 or 3.12 with venv on PATH; install one or set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

model: $(MODEL)/model.safetensors

$(MODEL)/model.safetensors: | install
	mkdir -p $(dir $(MODEL))
	$(BIN)/python scripts/fetch_model.py $(MODEL)

demo: install model
	$(BIN)/python -m benchmarks.agents.demo $(DEMO_ARGS)

demo-pd: install model
	$(BIN)/python -m benchmarks.pd.demo $(DEMO_ARGS)

test: install model
	$(BIN)/python -m pytest -m "not long" $(ALONE:%=--ignore=%) \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "not long" $(ALONE)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not long" -n $(WORKERS) tests/kernels/triton

test-long: install model
	$(BIN)/python -m pytest -m long
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m long tests/kernels/triton

check: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

bench: install model
	$(BIN)/python -m benchmarks.kernels.cpu_decode

clean:
	rm -rf $(VENV) .model out
