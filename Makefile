# make quickstart  sets up .venv and runs the whole ladder on the embedded world
# make test        sets up .venv and runs the tests; the slow ones, and those that kill real processes: make test-slow
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# 3.11 ends at jax 0.10; from 3.12 on the newest jax installs, so those share one pin file.
CONSTRAINTS := constraints/python$(if $(filter 3.11,$(VERSION)),3.11,3.12).txt
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup setup-plan quickstart test test-slow test-plan soak lint three-seeds lab clean

setup: $(STAMP)

$(STAMP): setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rlhf_jax needs Python 3.11 or newer; $(PYTHON) is $(VERSION). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test,notebooks]'
	@touch $(STAMP)

# The TPU's compiler, 200 MB, in a venv of its own upon the first: where that wheel is, JAX looks for a TPU each time it starts.
setup-plan: $(VENV)-plan/.installed

$(VENV)-plan/.installed: $(STAMP)
	$(PYTHON) -m venv $(VENV)-plan
	$(BIN)/python -c 'import pathlib, sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(VENV)-plan/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	$(VENV)-plan/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) libtpu
	@touch $@

quickstart: setup
	$(BIN)/python -m experiments.quickstart --workdir=runs/quickstart

# The promise of the quickstart, kept by three seeds; about a quarter of an hour. Results: docs/log.md.
three-seeds: setup
	for seed in 0 1 2; do $(BIN)/python -m experiments.quickstart --workdir=runs/seed$$seed --config.seed=$$seed --config.data.world.seed=$$seed || exit 1; done
	$(BIN)/python -m experiments.check_seeds runs/seed0 runs/seed1 runs/seed2

# The over-optimisation lab on each of them. Results: docs/overoptimization.md.
lab: setup
	for seed in 0 1 2; do $(BIN)/python -m experiments.overoptimization --quickstart=runs/seed$$seed --workdir=runs/lab$$seed --config.seed=$$seed --config.data.world.seed=$$seed || exit 1; done
	$(BIN)/python -m experiments.overoptimization_seeds runs/lab0 runs/lab1 runs/lab2

# Two workers, a file to each in turn: a test is mostly compilation, which keeps one core busy.
test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# What takes long: the ladder whole, meshes, notebooks, stages killed with -9, one job of two processes; part of it: SLOW=tests/system.
SLOW ?= tests
test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(SLOW)

# Every stage compiled for a TPU slice that is not there.
test-plan: setup-plan
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(VENV)-plan/bin/python -m pytest tests/parallel/test_planner.py

# Each of seven stages killed with -9 at twenty random moments: its parameters end in the bits of an undisturbed run. Half an
# hour in all beside much other work on two cores; SFT alone 35 s on quiet ones. Last result: docs/log.md.
soak: setup
	$(BIN)/python -m tests.system.soak --stage=all --kills=20

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache *.egg-info
