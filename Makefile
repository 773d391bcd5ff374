# make demo    see false refusals of a real chat model go down: sets up, fetches the model, fits, measures
# make test    linters, types, tests
#
# Everything is installed into .venv here, nothing elsewhere. Options for the demo: make demo ARGS="--run-dir runs/other"

# torch goes first and by version: where pip's index offers a CPU build of it, that one is taken. It is installed only
# where .venv has none, and pyproject.toml asks for a range, so a CUDA build that you put there yourself stays.
TORCH ?= torch==2.13.0

PYTHONS ?= python3 python3.13 python3.12 python3.11 python3.14 python
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:  # what is installed for the demo and for the tests goes into one .venv

# A stamp holds the folder that elsteer was installed from: in one that was copied or moved, it would still run the other's code.
_ := $(shell for stamp in .venv/.installed .venv/.installed-dev; do \
  if [ -s $$stamp ] && [ "$$(cat $$stamp)" != "$(CURDIR)" ]; then rm -f $$stamp; fi; done)
ifneq ($(filter-out help clean,$(MAKECMDGOALS)),)
  ifneq ($(shell if [ -e .venv/bin/pip ] && ! $(PY) -c "" >/dev/null 2>&1; then echo gone; fi),)
    $(error The Python that .venv was made with is gone: run make clean, and then this again)
  endif
endif
.PHONY: help demo test lint format bench clean

help:
	@echo "make demo    fit a landscape for a small chat model and measure it, in 4 to 15 minutes on two cores"
	@echo "make test    ruff, mypy and all tests, those on the real model included"
	@echo "make lint    ruff and mypy alone; make format puts the code into shape"
	@echo "make bench   speed and memory"
	@echo "make clean   delete .venv and caches; run folders stay"

demo: .venv/.installed
	@$(PY) -m elsteer demo $(ARGS)

# Tests on tiny models spend their time in Python: one thread each, as many at a time as there are cores. Those on the real
# model take all cores.
test: lint
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not real" --numprocesses auto --maxprocesses 8 --dist loadfile --durations 15
	@$(PY) -m pytest -m real --durations 10

lint: .venv/.installed-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: .venv/.installed-dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: .venv/.installed
	@found=no; for file in benchmarks/bench_*.py; do \
	  [ -e "$$file" ] || continue; found=yes; echo "$$file"; $(PY) "$$file" || exit 1; \
	done; [ $$found = yes ] || echo "There are no benchmarks yet."

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# The last step of `python -m venv` is to install pip, so its file stands for a whole environment.
.venv/bin/pip:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "elsteer needs Python 3.11 or newer and none is on the PATH: install one, or run make PYTHONS=/path/to/python3." >&2; \
	  exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$found" --version)"; \
	"$$found" -m venv .venv || { \
	  echo "$$found cannot make a virtual environment: install its venv module (Debian and Ubuntu: python3-venv)." >&2; \
	  rm -rf .venv; exit 1; \
	}

# The stamps are newer than pyproject.toml as long as nothing has to be installed again.
.venv/.installed: pyproject.toml | .venv/bin/pip
	@$(install-torch)
	@echo "Installing elsteer"
	@$(PIP) install --editable .
	@echo "$(CURDIR)" > $@

.venv/.installed-dev: pyproject.toml | .venv/bin/pip
	@$(install-torch)
	@echo "Installing elsteer and what its tests need"
	@$(PIP) install --editable '.[dev]'
	@echo "$(CURDIR)" | tee .venv/.installed > $@

define install-torch
if ! $(PY) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then \
  echo "Installing $(TORCH) (once, some minutes)"; $(PIP) install '$(TORCH)'; \
fi
endef
