# make demo | test | lint | bench: each needs only Python 3.11 or newer, make and bash, and is quick the second time.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt
# widgets are tested on a virtual display; PyQt6 is the binding that was tested
DISPLAYED := QT_API=pyqt6 QT_QPA_PLATFORM=xcb xvfb-run -a -s "-screen 0 1920x1200x24"
PYTEST_ARGS ?=

.PHONY: help demo test lint bench system clean

help:
	@echo "make demo    install into $(VENV) and reconstruct the sample data: picture and report in demo-output/"
	@echo "make test    install what the tests need and run them (PYTEST_ARGS=... is passed on)"
	@echo "make lint    ruff, mypy, import contracts and the napari manifest"
	@echo "make bench   time the kernels on this machine"
	@echo "make clean   remove $(VENV) and demo-output/"

$(VENV)/.made:
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11, 3.12 or 3.13 is needed and was not found; set PYTHON=..." >&2; exit 1; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) can not make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet "pip>=25.1"
	@touch $@

$(VENV)/.base: $(VENV)/.made $(INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install --quiet --constraint constraints.txt --group test
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) install --quiet --constraint constraints.txt --group lint
	@touch $@

demo: $(VENV)/.base
	$(BIN)/innergs demo --output demo-output

system:
	@bash .ci/system-packages

test: $(VENV)/.test system
	$(DISPLAYED) $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/npe2 validate src/napari_innergs/napari.yaml

bench: $(VENV)/.base
	$(BIN)/innergs bench

clean:
	rm -rf $(VENV) demo-output
