PYTHON ?= python3
BIN := .venv/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)

.PHONY: demo reproduce-quick test test-slow test-kernels check browser clean docs dist

.installed: pyproject.toml experiments/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' -e experiments
	touch .installed

# What the demo needs and no more; where the whole set-up is there, that
.demo: pyproject.toml experiments/pyproject.toml constraints.txt
	@echo "setting up .venv: torch, newton-summary, and what its demo reads and draws with"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[plots]' -e experiments
	touch .demo

# Handwritten digits: how layers interact, rates for Adam, then a training side by side; pictures land in runs/
demo: $(if $(wildcard .installed),.installed,.demo)
	$(BIN)/newton-summary demo

# The paper's experiments on two cores: about an hour; goes on where it was stopped. Needs the data files (docs/commands.md).
reproduce-quick: .installed
	OMP_NUM_THREADS=1 $(BIN)/newton-summary figures --budget quick --images docs/images/reproduction --page docs/reproduction.md

# The quick suite
test: .installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# What takes longer
test-slow: .installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# The tests of numbers under other kernels than this processor's own choice; the table is results/kernels.md
test-kernels: .installed
	nice $(BIN)/python benchmarks/kernels.py

# Style and types
check: .installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/, with examples run; a warning is an error
docs: .installed
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Wheels and sdists, into dist/, and what an index would say of them
dist: .installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --outdir dist experiments
	$(BIN)/twine check --strict dist/*

# What the tests of the report need beyond Python: where it cannot be had, they are skipped
browser:
	@command -v chromedriver >/dev/null || ($(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core) >/dev/null 2>&1 || true
	@command -v chromedriver || echo "no chromedriver: the report is not tested in a browser"

clean:
	rm -rf .venv .installed .demo dist build site
