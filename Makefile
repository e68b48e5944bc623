# `make demo` and `make test` set everything up on a bare machine and reuse it the second time.
# Needs Python 3.11 or 3.12 with venv; PYTHON=... chooses one.
# SGLANG_SOURCE=FOLDER: a checkout of that SGLang for `make test-long`, which else downloads it.
# HOST=VERSION takes another SGLang, in an environment of its own: `make test HOST=0.5.23`.

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv; sys.exit(not (3,11) <= sys.version_info < (3,13))' \
	&& echo $$p && break; done)
OLDEST := 0.5.17
HOST ?= $(OLDEST)
VENV := .venv$(if $(filter-out $(OLDEST),$(HOST)),-$(HOST))
BIN := $(VENV)/bin
LOCK := locks/sglang-$(HOST).txt
MODEL := .model/smollm2-135m
DEMO_ARGS ?=
# Test processes, of one thread and up to 4 GB each; 0 runs all in one, as a single GPU wants.
WORKERS ?= $(shell command -v nvidia-smi >/dev/null && echo 0 || echo 2)
# Tests that measure time or talk to servers in other processes have the machine for themselves.
ALONE := tests/transfer tests/serving/test_metrics.py \
	tests/benchmarks/test_links.py tests/benchmarks/test_multi_agent.py
# Tests that run without SGLang and a model; those of tests/transfer measure time.
FAST := tests/formats tests/memory_pool tests/kernels tests/attention tests/test_config.py \
	tests/test_imports.py tests/test_pythons.py
# Tests of GPU kernels that Triton's interpreter can run.
INTERPRETED := tests/kernels/triton tests/attention/triton tests/serving/triton
PYTEST := $(BIN)/python -m pytest

.PHONY: install lock model demo demo-pd test test-fast test-long check docs bench clean

install: $(VENV)/.installed

# pip checks every download against the lock file; the one that Python 3.11 brings cannot with extras.
$(VENV)/.installed: pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "error: expected Python 3.11 or 3.12 with venv on PATH; install one or set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Resolve the dependencies anew; names, versions and hashes only, so that any index will do.
lock:
	echo "sglang==$(HOST)" | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade \
		--extra dev --output-file $(LOCK) --constraints - pyproject.toml

model: $(MODEL)/model.safetensors

$(MODEL)/model.safetensors: | install
	mkdir -p $(dir $(MODEL))
	$(BIN)/python scripts/fetch_model.py $(MODEL)

demo: install model
	$(BIN)/python -m benchmarks.agents.demo $(DEMO_ARGS)

demo-pd: install model
	$(BIN)/python -m benchmarks.pd.demo $(DEMO_ARGS)

test: install model docs
	$(PYTEST) -m "not long" $(ALONE:%=--ignore=%) \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(PYTEST) -m "not long" $(ALONE)
	TRITON_INTERPRET=1 $(PYTEST) -m "not long" -n $(WORKERS) $(INTERPRETED)

test-fast: install
	TRITON_INTERPRET=1 $(PYTEST) -p tests.support.without_sglang -m fast \
		-n $(WORKERS) --dist worksteal $(wildcard $(FAST))
	$(PYTEST) -p tests.support.without_sglang -m fast tests/transfer

test-long: install model
	$(PYTEST) -m long
	TRITON_INTERPRET=1 $(PYTEST) -m long $(INTERPRETED)
	$(BIN)/python -m scripts.host_tests $(SGLANG_SOURCE:%=--source %)

check: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: install model
	$(BIN)/python -m benchmarks.kernels.cpu_decode

clean:
	rm -rf .venv .venv-* .model out
