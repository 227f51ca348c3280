# Set-up happens here and nowhere else. PYTHON=python3.12 make run picks another interpreter.
PYTHON ?= python3
VENV := .venv
# By itself, without a hash: its wheel of one version differs from index to index, CPU here and CUDA there.
TORCH := torch==2.13.0
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# A process a core, with one thread each: more would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal
UNIT := tests/unit tests/pipeline tests/property

.PHONY: help setup run test test-full test-workflow faults faults-all fuzz test-slurm lint bench clean

help:
	@echo "make run    set up .venv and embed the demo proteins and contigs (results/)"
	@echo "make test   set up .venv and run the tests of the package"
	@echo "make test-full  the tests that make test leaves out: long studies, large matrices, runs at random"
	@echo "make test-workflow  whole runs by Snakemake on this machine (about 5 minutes)"
	@echo "make faults     kill, stop, starve and damage real runs (about 10 minutes)"
	@echo "make faults-all  the same, with a fault at every system call instead of a sample (about an hour more)"
	@echo "make fuzz       thousands of odd and damaged files (about 8 minutes)"
	@echo "make test-slurm the workflow on a SLURM of its own (needs root, slurm-wlm and munge)"
	@echo "make lint   ruff, snakefmt, snakemake --lint, import-linter"
	@echo "make bench  time seqmill, fair-esm and transformers on this CPU (about 15 minutes)"
	@echo "make setup  set up .venv only"
	@echo "make clean  remove .venv; results stay"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "seqmill needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: $(READY)
	snakemake --cores all --config shards=2

test: $(READY)
	$(PYTEST)

test-full: $(READY)
	$(PYTEST) -m full $(UNIT) tests/workflow

test-workflow: $(READY)
	$(PYTEST) tests/workflow

faults: $(READY)
	$(PYTEST) tests/faults

faults-all: $(READY)
	python -m pytest tests/faults --all-faults

fuzz: $(READY)
	$(PYTEST) tests/fuzz

test-slurm: $(READY)
	python -m pytest tests/slurm

lint: $(READY)
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint
	cd scripts && lint-imports --no-cache --config ../pyproject.toml

bench: $(READY)
	python benchmarks/cpu.py --output benchmarks/results/cpu

clean:
	rm -rf $(VENV)
