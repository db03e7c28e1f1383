# make demo | serve | test | test-faults | test-kernels | test-walk | check | sbom | train-demo | clean
#
# Every pip call is bound by constraints.txt; without it pip brings gigabytes of CUDA packages to a machine without a GPU.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
PROMPT := a red circle moving right at sunset
RUNS := runs
TESTS :=
PORT := 8000
DATA := skylapse-data
comma := ,

# The first Python of 3.11 or newer; PYTHON=... overrides.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

# pip's output is a page of notices about indexes; it is shown when pip fails and kept in $(LOG) otherwise.
install = echo "installing $(1) (log: $(LOG))"; \
	$(BIN)/python -m pip install -c constraints.txt $(2) >$(LOG) 2>&1 || { tail -n 40 $(LOG) >&2; exit 1; }

.PHONY: help demo serve test test-faults test-kernels test-walk check sbom train-demo clients triton-3.6 tensorrt-bindings clean

help:
	@echo "make demo        a prompt becomes out/demo.mp4, on the CPU"
	@echo "make serve       the OpenAI Videos API on this machine, with the demo model; PORT=8000, DATA=skylapse-data"
	@echo "make test        the tests; TESTS='tests/runtime -k solver' for some of them"
	@echo "make test-faults the tests that kill parts of a running service, and its load (a quarter of an hour)"
	@echo "make test-kernels  every configuration of every kernel, compiled by two Tritons for GPUs that need not be there (ten minutes)"
	@echo "make test-walk   README from the top in a fresh clone and a fresh account (needs root; five minutes, at most ten)"
	@echo "make check       ruff and mypy, as CI runs them"
	@echo "make sbom        dist/: the wheel, and the list of what it is installed with (CycloneDX)"
	@echo "make train-demo  train the embedded model anew into $(RUNS)/ (hours; resumes where it stopped)"
	@echo "make clean       remove what was built; the environment and $(RUNS)/ stay"

demo: $(VENV)/.runtime
	@mkdir -p out
	@$(BIN)/skylapse generate "$(PROMPT)" -o out/demo.mp4 --sheet out/demo.png >/dev/null
	@echo "video:         $(CURDIR)/out/demo.mp4"
	@echo "contact sheet: $(CURDIR)/out/demo.png"

serve: $(VENV)/.runtime
	@$(BIN)/skylapse serve --port $(PORT) --data $(DATA)

# All tests in two processes, then those that must have the machine to themselves; named ones in one process.
QUICK := not faults and not kernels and not walk
test: $(VENV)/.dev clients tensorrt-bindings
	@$(BIN)/python -m pytest $(if $(TESTS),-m "$(QUICK)" $(TESTS),-n 2 --dist worksteal -m "$(QUICK) and not alone")
	@$(if $(TESTS),,$(BIN)/python -m pytest -m "$(QUICK) and alone")

# What is killed at the wrong moment on a busy machine gets a second try; what fails twice has failed.
test-faults: $(VENV)/.dev
	@$(BIN)/python -m pytest -m faults -s tests/faults || $(BIN)/python -m pytest -m faults -s --last-failed tests/faults

test-kernels: $(VENV)/.dev triton-3.6
	@$(BIN)/python -m pytest -m kernels tests/kernels

test-walk: $(VENV)/.dev
	@$(BIN)/python -m pytest -m walk -s tests/walk

# The oldest Triton that is served, beside the one in the environment; where it cannot be had, its test skips and says so.
triton-3.6: $(VENV)/.dev
	@$(MAKE) --silent $(VENV)/triton-3.6/.installed || echo "Triton 3.6 could not be installed: its test skips" >&2

$(VENV)/triton-3.6/.installed: tests/kernels/triton-3.6.txt
	@rm -rf $(@D)
	@echo "installing Triton 3.6 (log: $(LOG))"
	@$(BIN)/python -m pip install --no-deps --target $(@D) -r $< >$(LOG) 2>&1
	@touch $@

# NVIDIA's bindings without its libraries, for the signatures that compile/tensorrt*.py is judged by (tests/compile/bindings.py);
# where they or a C compiler cannot be had, those tests skip and mypy takes the calls as they are.
tensorrt-bindings: $(VENV)/.dev
	@$(MAKE) --silent $(VENV)/tensorrt/.installed || echo "TensorRT's bindings could not be installed: their tests skip" >&2

$(VENV)/tensorrt/.installed: tests/compile/tensorrt.txt tests/compile/bindings.py
	@rm -rf $(@D)
	@echo "installing TensorRT's bindings (log: $(LOG))"
	@$(BIN)/python -m pip install --no-deps --target $(@D) -r $< >$(LOG) 2>&1
	@$(BIN)/python tests/compile/bindings.py $(@D) >>$(LOG) 2>&1
	@touch $@

# mypy is given the name `skylapse` by a link to this folder: it does not find editable packages, and a checkout may have any name.
check: $(VENV)/.dev tensorrt-bindings
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/skylapse
	@set -o pipefail; MYPYPATH=$(VENV)/typing:$(VENV)/tensorrt $(BIN)/mypy -p skylapse | sed 's|^$(VENV)/typing/skylapse/||'

# OpenAI's SDKs that tests/serve judges the service with, beside the one in the environment: each in a folder of its own.
# Where one cannot be had, its tests skip and say so.
clients: $(VENV)/.dev
	@$(MAKE) --silent $(VENV)/openai-2/.installed || echo "openai 2.x could not be installed: its tests skip" >&2
	@$(MAKE) --silent $(VENV)/javascript/.installed || echo "npm's openai could not be installed: its tests skip" >&2

$(VENV)/openai-2/.installed: tests/serve/openai-2.txt
	@rm -rf $(@D)
	@echo "installing openai 2.x (log: $(LOG))"
	@$(BIN)/python -m pip install --no-deps --target $(@D) -r $< >$(LOG) 2>&1
	@touch $@

$(VENV)/javascript/.installed: tests/serve/javascript/package-lock.json
	@mkdir -p $(@D) && cp tests/serve/javascript/package*.json $(@D)
	@echo "installing npm's openai (log: $(LOG))"
	@cd $(@D) && npm ci --ignore-scripts --no-audit --no-fund >$(CURDIR)/$(LOG) 2>&1
	@touch $@

# Of the wheel as it is installed: in an environment of its own, with the extras that `make demo` brings.
sbom: $(VENV)/.dev
	@rm -rf build dist $(VENV)/wheel && mkdir -p dist
	@echo "building the wheel and installing it (log: $(LOG))"
	@{ $(BIN)/python -m build --wheel --outdir dist . && $(BIN)/python -m venv $(VENV)/wheel \
		&& $(VENV)/wheel/bin/python -m pip install -c constraints.txt "$$(echo dist/*.whl)[serve$(comma)compile]"; } \
		>$(LOG) 2>&1 || { tail -n 40 $(LOG) >&2; exit 1; }
	@$(BIN)/python deploy/sbom.py --python $(VENV)/wheel/bin/python -o $$(echo dist/*.whl | sed 's/-py3-none-any.whl//').cdx.json

train-demo: $(VENV)/.runtime
	@$(BIN)/python -m skylapse.benchmarks.demo_model.train_vae --out $(RUNS)/vae
	@$(BIN)/python -m skylapse.benchmarks.demo_model.train_dit --vae $(RUNS)/vae --out $(RUNS)/dit
	@$(BIN)/python -m skylapse.benchmarks.demo_model.export --vae $(RUNS)/vae --dit $(RUNS)/dit --out $(RUNS)/demo
	@$(BIN)/python -m skylapse.benchmarks.demo_model.evaluate --model $(RUNS)/demo

clean:
	@rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(if $(PYTHON),,echo "skylapse needs Python 3.11 or newer, and none is on the PATH (PYTHON=/path/to/python3 names one)" >&2; exit 1)
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	@$(call install,skylapse,-e '.[serve$(comma)compile]')
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(call install,the tools of development,-e '.[serve$(comma)compile$(comma)s3$(comma)dev]')
	@touch $@
