# Each target sets up its own .venv from nothing. PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test promises lint audit clean
demo: $(VENV)/.installed
	$(BIN)/tunewright demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --promises

promises: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "promise and not gpu" --promises --kills 100

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt --report $(VENV)/torch.json torch
	$(BIN)/python -m pip install -q -c constraints.txt --report $(VENV)/rest.json -e ".[demo,dev]"
	$(BIN)/python .ci/archives.py $(VENV)/torch.json $(VENV)/rest.json
	$(BIN)/python -m pip check
	touch $@

# known flaws of what we install, by the advisories of the day: needs a network
audit: $(VENV)/.installed
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit --local --skip-editable

clean:
	rm -rf $(VENV) build dist
