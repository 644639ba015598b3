# make demo: everything from a fresh machine to a leaderboard. make test: everything to a passed test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: install demo test lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: install
	$(BIN)/effbench run --method token_prune --task scenes --out $(DEMO)
	@echo
	@cat $(DEMO)/README.md

test: install
	@$(BIN)/python -m pytest -q --durations=15

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache
	find effbench methods tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +
