# `make demo` and `make test` need only Python 3.11+ and make: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
PEER_VENV := .venv-peer
GPU_VENV := .venv-gpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench-search bench-audit bench-emission bench-overhead bench-peers calibration wheel clean
.NOTPARALLEL:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.tpu  ## lay out PaLM 540B, audit it with the TPU compiler, run a tiny one
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test $(VENV)/.tpu  ## the tests (ARGS="-k name" picks some, ARGS="-m slow" runs the long sweeps)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## style, types and the layer contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## put the code in house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench-search: $(VENV)/.core  ## how long proven plans take: a table, and benchmarks/results/search.json
	$(BIN)/python benchmarks/search_times.py

bench-audit: $(VENV)/.tpu $(GPU_VENV)/.gpu  ## compiled TPU, GPU and host programs against their plans (ARGS="--resume" goes on)
	$(BIN)/python benchmarks/audits.py --gpu-python $(GPU_VENV)/bin/python $(ARGS)

bench-emission: $(VENV)/.tpu  ## what each planned collective compiles to, alone: a table, and benchmarks/results/emission.json
	$(BIN)/python benchmarks/emission.py $(ARGS)

bench-overhead: $(VENV)/.core  ## what using a plan costs: a table, and benchmarks/results/overhead.json
	$(BIN)/python benchmarks/overhead.py

calibration: $(VENV)/.core  ## measure eight host devices, predict sizes held out: a table, and benchmarks/results/calibration.json
	$(BIN)/python benchmarks/calibration.py

bench-peers: $(VENV)/.tpu $(PEER_VENV)/.jax  ## our plans against XLA AutoSharding and expert layouts (ARGS="--only CASE" runs one)
	$(BIN)/python benchmarks/peers.py --peer-python $(PEER_VENV)/bin/python $(ARGS)

wheel: $(VENV)/.test  ## dist/*.whl and the source archive it is built from
	$(BIN)/python -m build

clean:  ## forget the environment and everything built
	rm -rf $(VENV) $(PEER_VENV) $(GPU_VENV) dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# One environment, one stamp for each thing that was put into it.
$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "autoshard needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): JAX, OR-Tools and the rest of the core..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.core
	@echo "Setting up $(VENV): the $* tools..."
	@$(PIP) --group $*
	@touch $@

$(VENV)/.tpu: $(VENV)/.core
	@echo "Setting up $(VENV): libtpu, the TPU compiler (about 200 MB)..."
	@$(PIP) --editable '.[tpu]' || \
		echo "libtpu could not be installed: going on without the TPU compiler ('rm $@' to try again)"
	@touch $@

# The last JAX that AutoSharding runs with: removed in 0.10.1, and measured with this one and the libtpu that it pins.
$(PEER_VENV)/.jax:
	@echo "Setting up $(PEER_VENV): jax 0.9.2 with libtpu 0.0.37, which has XLA AutoSharding (about 400 MB)..."
	@$(PYTHON) -m venv $(PEER_VENV)
	@$(PEER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'jax[tpu]==0.9.2' 'libtpu==0.0.37' \
		&& touch $@ || echo "jax 0.9.2 could not be installed: going on without AutoSharding; its rows will say so"

# The GPU compiler beside a JAX of its own: 4.4 GB that no test needs.
$(GPU_VENV)/.gpu: pyproject.toml
	@echo "Setting up $(GPU_VENV): jax[cuda13], which has the GPU compiler (4.4 GB)..."
	@$(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[gpu]' \
		&& touch $@ || echo "jax[cuda13] could not be installed: going on without the GPU compiler; its rows will say so"
