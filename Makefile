# `make demo` and `make test` need only Python 3.11+ and make: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
PEER_VENV := .venv-peer
GPU_VENV := .venv-gpu
ZOO_VENV := .venv-models
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
SCREENSHOTS ?= docs/images

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format published bench-search bench-audit bench-emission bench-overhead bench-determinism bench-carry bench-chip bench-overlap bench-reports bench-uneven bench-moe bench-peers peaks models models-test parallelism calibration frontier bench-large bench-sweep browser-test screenshots docs first-user wheel clean
.NOTPARALLEL:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.tpu  ## lay out PaLM 540B, audit it with the TPU compiler, run a tiny one
	$(BIN)/python examples/demo.py $(ARGS)

# One worker per processor; `--dist worksteal` keeps most tests of a file together, which share plans. Host programs run once
# or twice each: without LLVM's expensive passes they are compiled in two thirds of the time.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

test: $(VENV)/.test $(VENV)/.tpu  ## the tests without the long ones (ARGS="-k name" picks some)
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: $(VENV)/.test $(VENV)/.tpu  ## all tests, with more examples (ARGS="-m slow" runs sweeps of many minutes)
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(BIN)/python -m pytest $(PARALLEL) -m "not slow" --hypothesis-profile=$(if $(CI),ci,all) --durations=25 $(ARGS)

lint: $(VENV)/.dev  ## style, types, the layer contract and the prose
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python docs/prose_lint.py

format: $(VENV)/.dev  ## put the code in house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

published: $(VENV)/.tpu  ## the cost model against published numbers: a table, and benchmarks/results/published.json (ARGS="--only book")
	$(BIN)/python benchmarks/published.py $(ARGS)

bench-search: $(VENV)/.core  ## how long proven plans take: a table, and benchmarks/results/search.json
	$(BIN)/python benchmarks/search_times.py

bench-audit: $(VENV)/.tpu $(GPU_VENV)/.gpu  ## compiled TPU, GPU and host programs against their plans (ARGS="--resume" goes on)
	$(BIN)/python benchmarks/audits.py --gpu-python $(GPU_VENV)/bin/python $(ARGS)

bench-emission: $(VENV)/.tpu  ## what each planned collective compiles to, alone: a table, and benchmarks/results/emission.json
	$(BIN)/python benchmarks/emission.py $(ARGS)

bench-overhead: $(VENV)/.core  ## what using a plan costs: a table, and benchmarks/results/overhead.json
	$(BIN)/python benchmarks/overhead.py

bench-determinism: $(VENV)/.core  ## whether every run finds the same plan (ARGS="--runs 4 --other PYTHON" asks another JAX, too)
	$(BIN)/python benchmarks/determinism.py $(ARGS)

bench-carry: $(VENV)/.tpu  ## plans carried by specs, by constraints and by hand: a table, and benchmarks/results/carry.json (ARGS="--resume", ARGS="--only CASE")
	$(BIN)/python benchmarks/carry.py $(ARGS)

bench-chip: $(VENV)/.tpu  ## compiled TPU steps, replayed, against their plans and the bytes they must read: a table, and benchmarks/results/on_chip.json (ARGS="--resume", ARGS="--only CASE", ARGS="--list")
	$(BIN)/python benchmarks/on_chip.py $(ARGS)

bench-overlap: $(VENV)/.tpu  ## compiled steps with rings against those without, replayed: a table, and benchmarks/results/overlap.json (ARGS="--resume", ARGS="--only CASE")
	$(BIN)/python benchmarks/overlap.py $(ARGS)

bench-uneven: $(VENV)/.tpu  ## models whose dimensions do not divide, with and without padding: a table, and benchmarks/results/uneven.json (ARGS="--only CASE", ARGS="--audit")
	PYTHONPATH=. $(BIN)/python benchmarks/uneven.py $(ARGS)

bench-moe: $(VENV)/.tpu  ## mixtures of experts against the rules of public code: a table, and benchmarks/results/moe.json (ARGS="--only CASE", ARGS="--no-tpu", ARGS="--resume")
	PYTHONPATH=. $(BIN)/python benchmarks/moe.py $(ARGS)

bench-reports: $(VENV)/.tpu  ## public bug reports, rebuilt: a table, and benchmarks/results/reports.json (ARGS="--only NAME", ARGS="--no-tpu")
	PYTHONPATH=. $(BIN)/python benchmarks/reports.py $(ARGS)

peaks: $(VENV)/.test $(VENV)/.tpu  ## planned peaks of 200 random programs against the TPU compiler's (15 minutes; ARGS="-k 17" runs one)
	$(BIN)/python -m pytest -n0 -m slow tests/search/memory/test_random_peaks.py $(ARGS)

models: $(ZOO_VENV)/.zoo  ## transformers of other people's libraries: a table, and benchmarks/results/models.json (ARGS="--audit", ARGS="--only NAME")
	$(ZOO_VENV)/bin/python benchmarks/models.py $(ARGS)

models-test: $(ZOO_VENV)/.zoo  ## the same models in tiny sizes, run on eight host devices and compared
	$(ZOO_VENV)/bin/python -m pytest tests/whole/test_models.py -m "slow or long or not slow" $(ARGS)

parallelism: $(VENV)/.core  ## which parallelism comes out at which size: sweeps, and benchmarks/results/parallelism.json
	$(BIN)/python benchmarks/parallelism.py

calibration: $(VENV)/.core  ## measure eight host devices, predict sizes held out: a table, and benchmarks/results/calibration.json
	$(BIN)/python benchmarks/calibration.py

bench-peers: $(VENV)/.tpu $(PEER_VENV)/.jax  ## our plans against XLA AutoSharding and expert layouts (ARGS="--only CASE" runs one)
	$(BIN)/python benchmarks/peers.py --peer-python $(PEER_VENV)/bin/python $(ARGS)

frontier: $(VENV)/.core $(VENV)/.test  ## PaLM's latency against cost as in Pope et al. 2022: a table, and benchmarks/results/frontier.json
	$(BIN)/python benchmarks/frontier.py $(ARGS)

bench-large: $(VENV)/.tpu  ## a hundred thousand equations traced, folded, solved and emitted: a table, and benchmarks/results/large_trace.json
	$(BIN)/python benchmarks/large_trace.py $(ARGS)

bench-sweep: $(VENV)/.test $(VENV)/.ray  ## points a minute with one and two workers, on Dask and on Ray: a table, and benchmarks/results/sweep_scaling.json
	$(BIN)/python benchmarks/sweep_scaling.py $(ARGS)

browser-test: $(VENV)/.test $(VENV)/.browser  ## the reports in a headless Chromium (Debian: apt-get install chromium), screenshots in docs/images
	@mkdir -p $(SCREENSHOTS)
	AUTOSHARD_SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest -m browser tests/report/test_browser.py $(ARGS)

screenshots: $(VENV)/.test $(VENV)/.tpu $(VENV)/.browser  ## the docs' pictures of PaLM's reports, taken again (needs Chromium)
	PYTHONPATH=. $(BIN)/python docs/screenshots.py

docs: $(VENV)/.docs  ## the documentation site, in site/, its notebooks run
	$(BIN)/python -m mkdocs build --strict

first-user:  ## every snippet of README and docs as printed: fresh environments outside the repository, the wheel, Python 3.11 and 3.12 (ARGS="--python python3.12 docs/index.md")
	$(PYTHON) docs/first_user.py $(ARGS)

wheel: $(VENV)/.build  ## dist/*.whl and the source archive it is built from
	$(BIN)/python -m build

clean:  ## forget the environment and everything built
	rm -rf $(VENV) $(PEER_VENV) $(GPU_VENV) $(ZOO_VENV) dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# One environment, one stamp for each thing that was put into it.
$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "autoshard needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): JAX, OR-Tools and the rest of the core..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) --editable .
	@touch $@

# A wheel needs neither JAX nor the tests.
$(VENV)/.build:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) build
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.browser $(VENV)/.docs $(VENV)/.ray: $(VENV)/.%: $(VENV)/.core
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

# The libraries whose models are planned; transformers 4.57 is its last line with Flax models.
$(ZOO_VENV)/.zoo: pyproject.toml
	@echo "Setting up $(ZOO_VENV): JAX and the libraries of the model zoo (about 2 GB)..."
	@$(PYTHON) -m venv $(ZOO_VENV)
	@$(ZOO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]' 'jax==0.10.2' \
		'transformers==4.57.6' equinox 'penzai==0.2.5' keras-hub dm-haiku flax optax pytest hypothesis
	@touch $@
