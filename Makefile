# Everything runs in .venv, which `make` creates and fills. Needs Python 3.11 or newer with pip, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The newest versions that were tested. `make test-latest` installs without them.
CONSTRAIN ?= --constraint constraints.txt
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py
# The tests and the quickstart read nothing from a hub: say so, so that nothing waits for one.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-latest test-oldest mutants check bench docs wheel architectures constraints clean

help:
	@echo "make quickstart   install, then fine-tune a real text and a real image model, offline (about 2 minutes)"
	@echo "make test         install, then run the test suite"
	@echo "make test-slow    the slow tests too"
	@echo "make test-latest  the tests with the newest versions of all dependencies"
	@echo "make test-oldest  the tests with the oldest versions that pyproject.toml allows"
	@echo "make mutants      faults of one line, each of which a test must see"
	@echo "make check        ruff, import-linter and mypy"
	@echo "make bench        the benchmarks (hours)"
	@echo "make docs         the documentation as a site"
	@echo "make wheel        build/dist, and every verb from an empty environment with the wheel"
	@echo "make constraints  writes constraints.txt from what is installed"
	@echo "make architectures  writes docs/architectures.md"

# One stamp per extra: a change of pyproject.toml or constraints.txt installs again. torch and torchvision are asked for
# in one command, so that pip picks a matching pair.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAIN) torch torchvision --editable ".[$*]"
	@touch $@

quickstart: $(VENV)/.installed-quickstart
	$(OFFLINE) $(LAUNCH) --config recipes/text_classification/quickstart.yaml
	$(OFFLINE) $(LAUNCH) --config recipes/image_classification/quickstart.yaml

# Two processes with a thread each; a file's tests stay together, so that what they share is made once, and the files
# begin in the order of tests/conftest.py, the longest first.
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m "not gpu"

mutants: $(VENV)/.installed-test
	$(OFFLINE) $(BIN)/python -m tests.mutants

# The newest versions of everything, and the oldest that pyproject.toml allows, each in an environment of its own.
test-latest:
	rm -f .venv-latest/.installed-test
	$(MAKE) test VENV=.venv-latest CONSTRAIN="--upgrade --upgrade-strategy eager"

test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check packaging
	mkdir -p build
	.venv-oldest/bin/python -m tests.pins floors > build/floors.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAIN="--constraint build/floors.txt"

# Run it after the tests have passed with newer versions.
constraints: $(VENV)/.installed-dev
	$(BIN)/python -m tests.pins constraints > constraints.txt

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	@set -e; for script in benchmarks/*.py; do $(OFFLINE) $(BIN)/python $$script; done

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# The sdist, the wheel from it, an environment with nothing but the wheel and what it asks for, and every verb there.
wheel: $(VENV)/.installed-test
	rm -rf build/dist build/empty build/smoke
	$(BIN)/python -m build --outdir build/dist .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAIN) torch torchvision \
		"$$(echo build/dist/*.whl)[vision,onnx,serve,demo]"
	build/empty/bin/python -m pip check
	$(OFFLINE) build/empty/bin/python -I tests/smoke.py build/smoke --all

architectures: $(VENV)/.installed-test
	$(OFFLINE) $(BIN)/python -m tests.architectures

clean:
	rm -rf .venv .venv-latest .venv-oldest out build
