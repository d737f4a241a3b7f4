# make demo: install what is needed into .venv and run the whole path on built-in data and the built-in model.
# make test: install the development tools too, then ruff, mypy and pytest.
# PYTHON is the interpreter that .venv is made from (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OPTIONS ?=
PYTEST_OPTIONS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PYTHONUTF8 := 1
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/clinical-nlp demo $(DEMO_OPTIONS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_OPTIONS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The stamps are younger than pyproject.toml when nothing has to be installed.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/pip || $(MAKE) --no-print-directory venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@test -x $(BIN)/pip || $(MAKE) --no-print-directory venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

.PHONY: venv
venv:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a few minutes the first time."

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
