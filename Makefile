# make quickstart: train on the project's own drawings, draw some, and print how many are right; MINUTES is how long it trains
# make demo:       a web page that draws, on this machine; PIPELINE names a folder or a shipped pipeline, HOST and PORT the
#                  address
# make check:      what a change must pass first, in about a minute: linter, formatter check, types, some fast tests
# make format:     mend what the linter can mend, and format
# make test:       linter, formatter check, types, all tests
# All make .venv first, once, and again only if pyproject.toml changed. PYTHON names another interpreter to make it with.

PYTHON ?= python3
INSTALLED = .venv/installed
# Without a name the page shows the shipped pipeline of emoji or, without that, the quick start's.
PIPELINE ?=
MINUTES ?=
HOST ?= 127.0.0.1
PORT ?= 7860

# Tests of what most changes touch: rooms and names, files, settings, and the mathematics of a block.
FAST_TESTS = tests/repository/test_imports.py tests/repository/test_configs.py tests/repository/test_tools.py \
	tests/common/test_checks.py tests/common/test_files.py tests/flows/test_affine.py tests/flows/test_order.py \
	tests/flows/test_positions.py tests/flows/test_likelihood.py

.PHONY: quickstart demo check format test .venv

quickstart: $(INSTALLED)
	.venv/bin/python quickstart.py $(if $(MINUTES),--train.max_minutes '$(MINUTES)')

demo: $(INSTALLED)
	.venv/bin/tarflow demo $(if $(PIPELINE),--pipeline '$(PIPELINE)') --host '$(HOST)' --port '$(PORT)'

check: $(INSTALLED)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -q $(FAST_TESTS)

format: $(INSTALLED)
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

test: $(INSTALLED)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[dev,evaluation,demo]'
	touch $@
