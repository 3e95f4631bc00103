# `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
PYTEST_WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
DEMO_ARGS ?=
BENCH_ARGS ?=
BENCH_JSON := .benchmarks/bench.json

RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two runs of pip must not share an environment
.PHONY: help venv demo demo-sharded test lint format bench bench-report kernels clean

help:  ## list the targets
	@echo "usage: make TARGET [VARIABLE=VALUE ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "variables:"
	@echo "  PYTHON       interpreter that makes the environment, 3.10 or newer ($(PYTHON))"
	@echo "  VENV         where the environment is ($(VENV))"
	@echo "  PIP_ARGS     more arguments for pip install. By default torch comes with CUDA, several"
	@echo "               gigabytes; without a GPU, point pip to the index of CPU-only torch wheels:"
	@echo "               make demo PIP_ARGS='--extra-index-url URL'"
	@echo "  DEMO_ARGS    more arguments for the example, as in DEMO_ARGS='--epochs 5'"
	@echo "  PYTEST_ARGS  more arguments for pytest, as in PYTEST_ARGS='-x -k arcface'"
	@echo "  BENCH_ARGS   the same for the benchmarks"

venv: $(INSTALLED)dev  ## make the virtual environment with everything for development

demo: $(INSTALLED)examples  ## train with ArcFace, CosFace, Fixed AdaCos and cross-entropy on digits
	$(RUN) examples/train_digits.py $(DEMO_ARGS)

demo-sharded: $(INSTALLED)examples  ## train with the classes split over two processes
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && OMP_NUM_THREADS=1 \
		$(RUN) -m torch.distributed.run --standalone --nproc-per-node 2 \
		examples/train_sharded.py --checkpoints "$$folder" $(DEMO_ARGS)

test: $(INSTALLED)dev  ## run every test, on as many processes as there are cores
	$(RUN) -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: $(INSTALLED)dev  ## check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(INSTALLED)dev  ## fix style and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(INSTALLED)bench  ## run the benchmarks of the named shapes, for about ten minutes
	@mkdir -p $(dir $(BENCH_JSON))
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-json=$(BENCH_JSON) $(BENCH_ARGS)

bench-report: $(INSTALLED)bench  ## write docs/benchmarks.md and its charts from the results
	$(RUN) -m benchmarks.report $(if $(wildcard $(BENCH_JSON)),--bench $(BENCH_JSON))

kernels: $(INSTALLED)dev  ## compile every kernel for each architecture: spills, main loops
	env -u TRITON_INTERPRET $(RUN) -m benchmarks.kernels

clean:  ## remove the environment, builds and caches
	@if [ -e "$(VENV)/.made-by-make" ]; then rm -rf "$(VENV)"; \
	else rm -f "$(VENV)/.ready" "$(VENV)/.pending" "$(INSTALLED)"*; fi
	rm -rf build dist .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name .git -prune -o -path './$(VENV)' -prune -o -name __pycache__ -exec rm -rf {} +

# `.ready` is put aside while pip runs: an environment in which pip was interrupted is not ready
# and is made anew. Moving it keeps its time, so that one set of extras doesn't outdate another.
$(INSTALLED)%: $(VENV)/.ready pyproject.toml constraints.txt
	@mv "$(VENV)/.ready" "$(VENV)/.pending"
	$(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@mv "$(VENV)/.pending" "$(VENV)/.ready"
	@touch $@

# Only an environment made here is ever removed; one that was there before is used as it is.
$(VENV)/.ready:
	@if [ -e "$(VENV)/.made-by-make" ]; then rm -rf "$(VENV)"; fi
	@if [ -e "$(VENV)" ]; then \
		"$(RUN)" -m pip --version || { \
			echo "error: $(VENV) exists and is not a working virtual environment with pip:" \
				"remove it, or choose another place with VENV=DIRECTORY" >&2; exit 1; }; \
	else \
		command -v $(PYTHON) >/dev/null || { \
			echo "error: $(PYTHON) not found: install Python 3.10 or newer," \
				"or name one with PYTHON=COMMAND" >&2; exit 1; }; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
			echo "error: Python 3.10 or newer is needed and $(PYTHON) is" \
				"$$($(PYTHON) --version 2>&1): name a newer one with PYTHON=COMMAND" >&2; exit 1; }; \
		mkdir -p "$(VENV)" && touch "$(VENV)/.made-by-make" && \
		echo '*' >"$(VENV)/.gitignore" && \
		$(PYTHON) -m venv "$(VENV)" || { \
			echo "error: $(PYTHON) could not make a virtual environment: it needs its venv and" \
				"ensurepip modules (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi
	@touch $@
