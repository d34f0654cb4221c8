# make quickstart: train on the project's own drawings, draw some, and print how many are right
# make demo:       a web page that draws, on this machine; PIPELINE names a folder or a shipped pipeline, HOST and PORT the
#                  address
# make test:       linter, formatter check, tests
# All make .venv first, once, and again only if pyproject.toml changed. PYTHON names another interpreter to make it with.

PYTHON ?= python3
INSTALLED = .venv/installed
# Without a name the page shows the shipped pipeline of emoji or, without that, the quick start's.
PIPELINE ?=
HOST ?= 127.0.0.1
PORT ?= 7860

.PHONY: quickstart demo test .venv

quickstart: $(INSTALLED)
	.venv/bin/python quickstart.py

demo: $(INSTALLED)
	.venv/bin/tarflow demo $(if $(PIPELINE),--pipeline '$(PIPELINE)') --host '$(HOST)' --port '$(PORT)'

test: $(INSTALLED)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[dev,evaluation,demo]'
	touch $@
