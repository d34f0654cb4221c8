# make quickstart: train on the project's own drawings, draw some, and print how many are right
# make test:       linter, formatter check, tests
# Both make .venv first, once, and again only if pyproject.toml changed. PYTHON names another interpreter to make it with.

PYTHON ?= python3
INSTALLED = .venv/installed

.PHONY: quickstart test .venv

quickstart: $(INSTALLED)
	.venv/bin/python quickstart.py

test: $(INSTALLED)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[dev,evaluation,demo]'
	touch $@
