# Everything needs only python3 (3.11 or later) with venv and pip; the rest is installed into .venv on first use.
#
#   make run     start the engine on the embedded model, answer a prompt, stop
#   make test    the whole test suite
#   make check   linter and strict type checker
#   make docs    the documentation as a site, into site/
#   make bench   throughput and latency on this machine, beside transformers

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: run test check docs bench clean

run: $(VENV)/.installed
	$(BIN)/python examples/offline.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

docs: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/offline.py --workload uniform16 --against transformers $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamp files: installed again only when the project's requirements change.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV) (torch is large; this happens once)" >&2
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), with what tests and checks need" >&2
	$(PIP_INSTALL) -e '.[test,check,yaml]'
	touch $@ $(VENV)/.installed
