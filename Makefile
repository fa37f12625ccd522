PYTHON ?= .venv/bin/python

.PHONY: check lint types docs test mutants

check: lint types docs test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m sphinx -q -W --keep-going -c docs . build/site

test:
	$(PYTHON) -m pytest

# Mutation testing: half an hour on two cores; what survives is listed at the end. CI=1 fixes Hypothesis' examples.
mutants:
	CI=1 OMP_NUM_THREADS=1 $(PYTHON) -m mutmut run
	$(PYTHON) -m mutmut results
