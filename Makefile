# One command to set up and run, one to test, one to lint. Needs Python 3.11 or newer, make and pip.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup induction dynamics dynamics-full test test-heavy ndif latest lint format bench bridge soak gallery architectures model model-code wheel wheel-test clean

help:
	@echo "make induction  the whole induction-head analysis of the shipped model, into results/"
	@echo "make dynamics   how induction forms in training, with controls and seeds (make dynamics-full trains again)"
	@echo "make test       set up and run the tests, a process a core (WORKERS=1: one after another)"
	@echo "make test-heavy the tests marked heavy: soak, many kills, browsers at many widths, hundreds of cases"
	@echo "make ndif       start the real NDIF server here, run the remote tests against it, end it (Linux, needs redis-server)"
	@echo "make latest     run the tests with the newest of everything that pyproject.toml allows, in an environment of its own"
	@echo "make lint       ruff and mypy"
	@echo "make bridge     compare with TransformerLens, model family by model family, and write the table of README"
	@echo "make soak       random calls, kills, faults and hostile files for two hours, or MINUTES=10 SEED=3 (Linux, macOS)"
	@echo "make bench      time headwise side by side with plain forward passes and other tools"
	@echo "make gallery    draw every picture of docs/gallery.md again (needs Chromium, Chrome, Edge or Brave)"
	@echo "make architectures  write the table of docs/architectures.md: what opens, and what can be read and written there"
	@echo "make model      train the shipped model again (some minutes)"
	@echo "make model-code train code-4l again (an hour or two; started again, it goes on)"
	@echo "make wheel-test build the wheel and run the tests of servers and workers with it, away from the clone"

# The stamp is newer than what it was made from, so setting up happens once and again when a requirement changes.
# Of the 20,000 files of all libraries, Python compiles those that are imported, when they are imported first.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(VENV)/.ready

induction: setup
	$(RUN) -m headwise induction --model words-2l --out results/induction-words-2l.nc

# Where the package holds the result of this study, that is taken; else the models are trained, which takes long.
dynamics: setup
	$(RUN) -m headwise dynamics --study formation --out results/dynamics-formation.nc

dynamics-full: setup
	$(RUN) -m headwise dynamics --study formation --out results/dynamics-formation.nc --fresh

# As many processes as cores. One that is done takes tests from the end of another's list, so that most modules stay whole.
WORKERS ?= logical

test: setup
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m "not heavy"

test-heavy: setup
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m heavy

# Only torch is as pinned: the newest would bring its build for CUDA, which takes gigabytes.
latest:
	$(PYTHON) -m venv --clear .latest
	.latest/bin/python -m pip install --quiet --upgrade "$$(grep ^torch== constraints.txt)" --editable ".[dev]"
	.latest/bin/python -m pip list
	.latest/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m "not heavy"

# The server has an environment of its own, as it has other versions than the client.
.ndif/.ready: tests/ndif/requirements.txt
	$(PYTHON) -m venv .ndif
	.ndif/bin/python -m pip install --quiet --requirement $<
	.ndif/bin/python -m pip install --quiet --no-deps --ignore-requires-python ndif==0.1.2
	@touch $@

# A test ends after ten minutes, and where all threads are is shown before; all of them end after an hour.
ndif: setup .ndif/.ready
	$(RUN) tests/ndif/up.py .ndif $(abspath $(RUN)) -m pytest -m ndif -o faulthandler_timeout=540 tests/outside/test_ndif.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@mkdir -p build/types && ln -sfn ../.. build/types/headwise
	MYPYPATH=build/types $(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What cannot be installed is left out of the comparison, and tried again the next time.
$(VENV)/.bench-ready: $(VENV)/.ready
	@$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[bench]" && touch $@ \
		|| echo "not every tool to compare with could be installed: those that are missing are left out"

bench: $(VENV)/.bench-ready
	$(RUN) -m benchmarks.run

$(VENV)/.bridge-ready: $(VENV)/.ready
	$(RUN) -m pip install --quiet --constraint constraints.txt transformer-lens
	@touch $@

# Where TransformerLens is not installed, the tests are skipped; here that is an error. The table of README is written.
bridge: $(VENV)/.bridge-ready
	$(RUN) -c "import transformer_lens.model_bridge"
	HEADWISE_PARITY=README.md $(RUN) -m pytest tests/outside/test_bridge.py

MINUTES ?= 120
SEED ?= 0

soak: setup
	$(RUN) tests/soak/run.py --minutes $(MINUTES) --seed $(SEED)

gallery: setup
	$(RUN) docs/make_gallery.py

architectures: setup
	HEADWISE_ARCHITECTURES=1 $(RUN) -m pytest tests/interventions/models/test_architectures.py -k in_the_docs

model: setup
	$(RUN) -m headwise.studies.training.words_2l

model-code: setup
	$(RUN) -m headwise.studies.training.code_4l

# What an earlier build left in build/lib would go into the wheel.
wheel: setup
	rm -rf build/lib dist
	$(RUN) -m build --wheel

wheel-test: wheel
	$(RUN) tests/support/wheel.py dist/headwise-*.whl

clean:
	rm -rf $(VENV) .ndif .latest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
