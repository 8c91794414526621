# Everything runs from a bare Python, the newest here from 3.11 on; uv is used where it is installed, and only makes the
# set-up faster. `make PYTHON=python3.11 test` takes another one, with the pins and the environment that belong to it.
ifndef PYTHON
PYTHON := $(shell .ci/python newest)
endif
PINS := $(shell .ci/python pins "$(PYTHON)")
ifeq ($(PINS),)
$(error no Python from 3.11 on that runs and can make environments ($(or $(PYTHON),looked for python3.14 to python3.11 and python3)); name one: make PYTHON=...)
endif
CONSTRAINTS := constraints/$(PINS).txt
VENV ?= .venv$(if $(filter old,$(PINS)),-old)
BIN := $(VENV)/bin
PART ?= 1/3
VERSION := $(shell "$(PYTHON)" -c 'import platform; print(platform.python_version())')
READY := $(VENV)/.ready-$(VERSION)

PYTEST := HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal -o cache_dir=.pytest_cache/$(PINS)

.PHONY: demo setup test test-rest test-part test-all test-smoke test-peers test-engines test-deep check lint docs site bench clean

setup: $(READY)  ## make the environment, which every other target does too

demo: $(READY)  ## set up and run two small claims of the literature, with their verdicts and report.html
	$(BIN)/xlab demo

test: $(READY)  ## set up and run what is quick and decisive: every choice, every property, in minutes
	$(PYTEST) -m "not full and not slow"

test-rest: $(READY)  ## what `make test` leaves out: whole kits, other implementations' numbers, choices at default compiler flags
	$(PYTEST) -m "full and not slow"

test-part: $(READY)  ## `make test`, and a third of test-rest: PART=1/3, 2/3 or 3/3; .ci/run takes them in turn
	PART=$(PART) $(PYTEST) -m "not slow"

test-all: $(READY)  ## both in one go; what is there in brief and whole, whole alone
	$(PYTEST) -m "not brief and not slow"

test-smoke: $(READY)  ## a part of `make test`, which .ci/run runs with the old pins: mechanisms in brief, models, the whole way
	$(PYTEST) -m "not full and not slow" tests/test_smoke.py tests/check/test_check.py tests/model

test-peers: $(READY)  ## golden tests against the other implementations themselves, run live (installs torch)
	$(BIN)/python -m pip install -q -e '.[peers]' -c $(CONSTRAINTS)
	GOLDEN=live $(PYTEST) -m golden

test-engines: $(READY)  ## cells on a real Ray cluster and in submitit's jobs, with kills (installs ray and submitit)
	$(BIN)/python -m pip install -q -e '.[ray,slurm]' -c $(CONSTRAINTS)
	$(PYTEST) -n 0 tests/engines

test-deep: $(READY)  ## campaigns of an hour: whole kits of all mechanisms, all choices at XLA's default flags, drawn shapes
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test  ## ruff, pyright and the tests

docs: $(READY)  ## write docs/catalogue.md from docstrings and signatures
	$(BIN)/python docs/generate.py

site: $(READY)  ## build the manual as a site that needs no network: site/index.html (installs the extra `docs`)
	$(BIN)/python -m pip install -q -e '.[docs]' -c $(CONSTRAINTS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

bench: $(READY)  ## side by side with the peers (installs torch)
	$(BIN)/python -m pip install -q -e '.[peers]' -c $(CONSTRAINTS)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/shelf.py
	$(BIN)/python benchmarks/early_exit.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/step_profile.py
	$(BIN)/python benchmarks/long_sequences.py

$(READY): pyproject.toml $(CONSTRAINTS)
	@if ls $(VENV)/.ready* >/dev/null 2>&1 && [ ! -e $@ ]; then rm -rf $(VENV); fi  # made here, with another Python
	@if command -v uv >/dev/null; then \
		uv venv -q --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install -q --python $(BIN)/python -e '.[dev]' -c $(CONSTRAINTS) pip; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c $(CONSTRAINTS); \
	fi
	@touch $@

clean:
	rm -rf .venv .venv-old site .pytest_cache .ruff_cache build dist *.egg-info
