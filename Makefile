# make quickstart: train four small models side by side and open the way to a report. make test: every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2
# With it each process that a test or a study starts would compile the package anew. `make clean` removes what is kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart install test lint types clean distclean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Trivium needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp says that an install is done; it is older than the files that would change what is installed.
$(VENV)/core.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[gym]' \
		|| echo 'reasoning-gym could not be installed (one of its packages needs a C compiler): its tests are skipped'
	@touch $@ $(VENV)/core.stamp

install: $(VENV)/core.stamp

quickstart: $(VENV)/core.stamp
	$(BIN)/trivium compare recipes/quickstart.yaml

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/pyright

# The types are checked beside the tests and told last: pyright alone would leave a core idle.
# Each test file is run by one process, so that what its tests share is made once.
test: lint
	@$(BIN)/pyright > $(VENV)/types.log 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -q; tests=$$?; \
	wait $$types; types=$$?; \
	cat $(VENV)/types.log; exit $$((tests || types))

# Runs and reports stay; distclean takes the environment too.
clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
