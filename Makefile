# Everything runs in .venv, which `make` creates and fills. Needs Python 3.11 or newer with pip, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py
# The tests and the quickstart read nothing from a hub: say so, so that nothing waits for one.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check bench docs architectures clean

help:
	@echo "make quickstart   install, then fine-tune a real text and a real image model, offline (about 2 minutes)"
	@echo "make test         install, then run the test suite"
	@echo "make test-slow    the slow tests too"
	@echo "make check        ruff, import-linter and mypy"
	@echo "make bench        the benchmarks (hours)"
	@echo "make docs         the documentation as a site"
	@echo "make architectures   writes docs/architectures.md"

# One stamp per extra: a change of pyproject.toml installs anew. torch and torchvision are asked for in one command, so
# that pip picks a matching pair.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision --editable ".[$*]"
	@touch $@

quickstart: $(VENV)/.installed-quickstart
	$(OFFLINE) $(LAUNCH) --config recipes/text_classification/quickstart.yaml
	$(OFFLINE) $(LAUNCH) --config recipes/image_classification/quickstart.yaml

test: $(VENV)/.installed-test
	$(OFFLINE) $(BIN)/python -m pytest

test-slow: $(VENV)/.installed-test
	$(OFFLINE) $(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	@set -e; for script in benchmarks/*.py; do $(OFFLINE) $(BIN)/python $$script; done

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict --site-dir build/site
architectures: $(VENV)/.installed-test
	$(OFFLINE) $(BIN)/python -m tests.architectures

clean:
	rm -rf $(VENV) out build
