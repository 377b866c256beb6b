# Each does all its own set-up in .venv:  make demo   make test   make test-all
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits_scl
# Two ranks need two GPUs; with one, they run on the CPU.
ON_CPU := $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)),DS_ACCELERATOR=cpu)
LANES ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses $(LANES) --dist loadfile --no-loadscope-reorder
STYLE := $(BIN)/ruff check . && $(BIN)/ruff format --check .
# Types are checked while tests run, and what is wrong with them is said at the end.
TYPES := .venv/.types
CHECK_TYPES := $(BIN)/pyright > $(TYPES) & types=$$!
SAY_TYPES := tests=$$?; wait $$types; types=$$?; cat $(TYPES); exit $$((tests | types))

.PHONY: demo test test-all figures clean-demo

demo: .venv/.installed
	$(BIN)/scl pack digits --out runs/data/digits
	$(ON_CPU) $(BIN)/scl train --recipe recipes/digits_scl.yaml

# Every behaviour. The tests of one file share what is made for them, so a file stays in one lane.
test: .venv/.installed-dev
	$(STYLE)
	@$(CHECK_TYPES); $(PYTEST); $(SAY_TYPES)

# And what takes minutes: benchmarks, most injected faults, heavy exports, all scenarios of Slurm.
test-all: .venv/.installed-dev
	$(STYLE)
	@$(CHECK_TYPES); $(PYTEST) -m ""; $(SAY_TYPES)

figures: .venv/.installed
	$(BIN)/python docs/figures/proxies.py --out docs/figures/proxies.png
	$(BIN)/python docs/figures/augmentation.py --out docs/figures/augmentation.png
	$(BIN)/python -m docs.figures.house --out docs/figures/house.png

# Removes the demo's run, so that the next `make demo` trains again.
clean-demo:
	rm -rf $(RUN)

.venv/.installed: pyproject.toml setup.py data/images/_crop.c
	@$(PYTHON) -c 'import sys; sys.exit("SCL needs Python 3.11 to 3.13; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12 …" if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	@echo "setting up .venv, 5.5 GB, once: a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml .venv/.installed
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@
