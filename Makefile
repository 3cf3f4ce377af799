# Every target does its own set-up in .venv; none needs anything but Python 3.11 or newer.
# ARGS is passed on: make demo ARGS='--set server.server_port=8080', make test ARGS='tests/config -q'.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test check coverage bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup     the environment alone, in $(VENV)'
	@echo 'make demo      fetch a small model and serve it on 127.0.0.1:23333'
	@echo 'make test      fetch the same model if it can be had, run all tests (JOBS=2 at a time)'
	@echo 'make check     linters, types, house tests'
	@echo 'make coverage  line coverage of the pure wing, at least 95 %'
	@echo 'make bench     the benchmarks that need no model'
	@echo 'make clean     remove caches; make clean ALL=1 also $(VENV) and .models'

setup: $(VENV)/.ready

$(RUN):
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo 'numbatch needs Python 3.11 or newer; "$(PYTHON)" was not found. Install it, or name another one: make setup PYTHON=/path/to/python3.12'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "numbatch needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make setup PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'numbatch needs the venv module of $(PYTHON); on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run free: nothing is asked of pip until pyproject.toml changes.
$(VENV)/.ready: pyproject.toml | $(RUN)
	@echo 'installing into $(VENV) (the first time this takes minutes: PyTorch is large) ...'
	@[ -t 1 ] || quiet=-qq; $(RUN) -m pip install $$quiet --editable .
	@touch $@

$(VENV)/.ready-test: pyproject.toml $(VENV)/.ready | $(RUN)
	@[ -t 1 ] || quiet=-qq; $(RUN) -m pip install $$quiet --editable '.[test]'
	@touch $@

demo: $(VENV)/.ready
	@$(RUN) -m cli.fetch smollm2 --to .models
	@$(RUN) -m cli.demo --config config/demo.toml $(ARGS)

test: $(VENV)/.ready-test
	@$(RUN) -m cli.fetch smollm2 --to .models || echo 'tests of the real model will be skipped'
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(VENV)/.ready-test
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/house tests/config

coverage: $(VENV)/.ready-test
	$(RUN) -m pytest -q tests/engine/pure tests/engine/core --cov=engine.cache --cov=engine.admission --cov=engine.qos --cov=engine.errors --cov=engine.scheduler --cov=engine.sequence --cov=engine.step --cov-report=term-missing --cov-fail-under=95

bench: $(VENV)/.ready-test
	$(RUN) -m bench.scheduler --json
	$(RUN) -m bench.delivery --json

clean:
	rm -rf build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage .cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	$(if $(ALL),rm -rf $(VENV) .models)
