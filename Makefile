SHELL = /bin/bash
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
LINT_PATHS = sb3_mbpo/ tests/ benchmarks/ docs/conf.py docs/notebook_parser.py setup.py

ENV ?= InvertedPendulum-v5
SEED ?= 0
# Empty: what benchmarks/train.py takes by default
STEPS ?=
# Empty: OMP_NUM_THREADS, else 1
THREADS ?=
# Several threads must not compute while they wait: other work on the same cores would slow them down many times.
train: export OMP_WAIT_POLICY ?= PASSIVE

# One thread for each of two workers: more threads fight for the cores and slow small networks down.
PYTEST = OMP_NUM_THREADS=1 MPLBACKEND=Agg $(RUN) -m pytest -n 2

# The stamp's name changes with what is installed and with the folder, so a moved checkout installs again.
STAMP := $(VENV)/.installed-$(shell { pwd; cat requirements-dev.lock setup.py; } | cksum | cut -d' ' -f1)
# `make train` needs less: no locked versions, no tools for tests.
TRAIN_STAMP := $(VENV)/.train-$(shell { pwd; cat setup.py; } | cksum | cut -d' ' -f1)
# PyTorch's builds without CUDA, 2.6 GB less. `make train` takes them on Linux without an NVIDIA GPU. Empty: pip's own choice.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = $(RUN) -m pip install -q --no-input --disable-pip-version-check
# Two calls at once on a fresh machine: the second waits for the first.
WAIT := $(if $(shell command -v flock),flock $(VENV)/.lock)

.DEFAULT_GOAL := help

help:
	@echo "make train [ENV=$(ENV)] [SEED=$(SEED)] [STEPS=...] [THREADS=...]   train MBPO on one task"
	@echo "make test | test-expensive | test-all   quick tests, slow tests, both"
	@echo "make format | lint | type | doc | notebooks | audit | commit-checks"

$(STAMP):
	@mkdir -p $(VENV)
	@$(WAIT) $(MAKE) --no-print-directory install

# Always called through the stamp, which makes it run once.
install:
	@test -e $(STAMP) || { set -e; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The locked versions need Python >= 3.11: PYTHON=... make")'; \
		echo "Setting up $(VENV) (some minutes, once)"; \
		$(PYTHON) -m venv $(VENV); \
		$(PIP) -r requirements-dev.lock; \
		$(PIP) --no-deps --no-build-isolation -e .; \
		rm -f $(VENV)/.installed-*; \
		touch $(STAMP); }

$(TRAIN_STAMP):
	@mkdir -p $(VENV)
	@$(WAIT) $(MAKE) --no-print-directory install-train

# Always called through its stamp.
install-train:
	@test -e $(TRAIN_STAMP) || { set -e; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sb3_mbpo needs Python >= 3.10: PYTHON=... make")'; \
		echo "Setting up $(VENV) for training (some minutes, once)"; \
		$(PYTHON) -m venv $(VENV); \
		if [ -n "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
			$(PIP) --retries 1 --timeout 20 --index-url $(TORCH_INDEX) torch \
				|| $(PIP) "$$(grep -o '^torch==[0-9.]*' requirements-dev.lock)" || true; \
		fi; \
		$(PIP) -e ".[train]"; \
		rm -f $(VENV)/.train-*; \
		touch $(TRAIN_STAMP); }

# What the tests need has all that training needs.
train: $(or $(wildcard $(STAMP)),$(TRAIN_STAMP))
	$(RUN) benchmarks/train.py --env $(ENV) --seed $(SEED) $(if $(THREADS),--threads $(THREADS)) $(if $(STEPS),--steps $(STEPS))

test pytest: $(STAMP)
	$(PYTEST)

test-expensive: $(STAMP)
	$(PYTEST) -m expensive --timeout 1500

test-all: $(STAMP)
	$(PYTEST) -m "" --timeout 1500

type: $(STAMP)
	$(RUN) -m mypy $(LINT_PATHS)

lint: $(STAMP)
	$(RUN) -m ruff check $(LINT_PATHS)

format: $(STAMP)
	$(RUN) -m ruff check --select I --fix $(LINT_PATHS)
	$(RUN) -m black $(LINT_PATHS)

check-codestyle: $(STAMP)
	$(RUN) -m ruff check --select I $(LINT_PATHS)
	$(RUN) -m black --check $(LINT_PATHS)

commit-checks: format type lint

doc: $(STAMP)
	$(RUN) -m sphinx -q -W -b html docs docs/_build/html

# Runs the programs of docs/notebooks and stores them with their pictures. The tools are not locked: no test needs them.
notebooks: $(STAMP)
	$(PIP) jupytext nbclient ipykernel
	mkdir -p build/notebooks
	cp docs/notebooks/*.py build/notebooks/
	$(RUN) -m jupytext --quiet --to ipynb build/notebooks/*.py
	OMP_NUM_THREADS=1 $(VENV)/bin/jupyter-execute --inplace --timeout 3600 build/notebooks/*.ipynb
	cp build/notebooks/*.ipynb docs/notebooks/

# The fast update against SB3's, far below what is claimed: it fails where the speed is lost, not where a machine is busy.
speed: $(STAMP)
	$(RUN) benchmarks/speed.py updates --rounds 7 --at-least 1.4

# Known vulnerabilities of what is pinned. It only reports: a new finding in another package is no fault of this commit.
audit: $(STAMP)
	$(RUN) .ci/audit requirements-dev.lock

clean:
	rm -rf docs/_build build dist *.egg-info

.PHONY: help install install-train train test pytest test-expensive test-all type lint format check-codestyle commit-checks doc notebooks speed audit clean
