# Daily commands. Each creates or updates .venv first; nothing but Python >= 3.10 and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/sh
MAKEFLAGS += --no-print-directory

# One thread per process: small matrices on shared cores are slower with two.
export OMP_NUM_THREADS ?= 1

# Time that `make bench` gives to the scaling run.
BUDGET ?= 5m

.PHONY: help demo test nightly lint bench gpu-check clean

help:
	@echo "make demo     train, convert, distill and report on a small teacher; about ten minutes"
	@echo "make test     the test suite"
	@echo "make nightly  the slow tests"
	@echo "make lint     ruff and mypy"
	@echo "make bench    time every op and model on this machine, after checking it; BUDGET=5m"
	@echo "make gpu-check  kernels of this machine's GPU: right, and how fast; under ten minutes"
	@echo "make clean    remove .venv and everything built"

demo: $(STAMP)
	@$(BIN)/python -m attnopt demo --output demo-report

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

nightly: $(STAMP)
	@$(BIN)/python -m pytest -q -m slow
	@$(BIN)/python -m attnopt bench traffic
	@$(BIN)/python -m attnopt bench safety
	@$(BIN)/python -m attnopt bench kernels

# mypy wants the package as it is installed: a folder of links with `kernels` inside.
lint: $(STAMP)
	@$(BIN)/ruff check --output-format concise .
	@rm -rf $(VENV)/types && mkdir -p $(VENV)/types/attnopt
	@ln -s "$(CURDIR)"/attnopt/* "$(CURDIR)/kernels" "$(CURDIR)/bench" $(VENV)/types/attnopt/
	@cd $(VENV)/types && ../bin/python -m mypy --config-file ../../pyproject.toml

bench: $(STAMP)
	@$(BIN)/python -m pytest -q bench -p no:xdist --benchmark-columns=min,median,iqr,rounds --benchmark-sort=min
	@$(BIN)/python -m attnopt bench --budget $(BUDGET) --output bench-report

# With the Python, torch and triton that the machine has: nothing is installed.
gpu-check:
	@PYTHONPATH=. $(PYTHON) -m attnopt bench gpu-check --output gpu-check.json

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks

# pip runs in the background with its output in a file, so that this stays quiet but visibly alive.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: attnopt needs Python >= 3.10, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot create virtual environments." \
	    "On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@printf 'Installing into $(VENV) (a minute or two, torch is most of it) '; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  >$(VENV)/install.log 2>&1 & pip=$$!; \
	trap 'kill $$pip 2>/dev/null; exit 130' INT TERM; \
	while kill -0 $$pip 2>/dev/null; do printf .; sleep 2; done; \
	if wait $$pip; then echo ' done'; else \
	  printf '\nerror: the installation failed; the end of $(VENV)/install.log:\n' >&2; \
	  tail -n 15 $(VENV)/install.log >&2; exit 1; fi
	@touch $@
