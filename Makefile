# `make demo` and `make test` need Python 3.11 or newer, git and make; nothing else.

PYTHON ?= $(shell for v in 3.13 3.12 3.11; do \
  if "python$$v" -c "" 2>/dev/null; then echo "python$$v"; exit; fi; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint types docs bench clean

demo: $(VENV)/.installed
	$(BIN)/ctfm demo

test: lint types docs $(VENV)/.installed
	$(BIN)/pytest

test-all: lint types docs $(VENV)/.installed
	$(BIN)/pytest -m "slow or not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

bench: $(VENV)/.installed
	for script in bench/*.py; do $(BIN)/python "$$script" || exit 1; done

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "ctfm needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.13"; exit 1; }
	@echo "installing into $(VENV): a few minutes, about 7 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) site build *.egg-info .mypy_cache .pytest_cache .ruff_cache
