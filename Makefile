# Everything runs from a bare python3; uv is used where it is installed, and only makes the set-up faster.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS := constraints.txt

PYTEST := HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2

.PHONY: demo test test-rest test-all test-peers test-deep check lint docs site bench clean

demo: $(READY)  ## set up and run the main job: a real comparison with its report
	$(BIN)/xlab demo --no-baselines --report report.html

test: $(READY)  ## set up and run what is quick and decisive: every choice, every property, in minutes
	$(PYTEST) -m "not full and not slow"

test-rest: $(READY)  ## what `make test` leaves out: whole kits, other implementations' numbers, choices at default compiler flags
	$(PYTEST) -m "full and not slow"

test-all: $(READY)  ## both in one go; what is there in brief and whole, whole alone
	$(PYTEST) -m "not brief and not slow"

test-peers: $(READY)  ## golden tests against the other implementations themselves, run live (installs torch)
	$(BIN)/python -m pip install -q -e '.[peers]' -c $(CONSTRAINTS)
	GOLDEN=live $(PYTEST) -m golden

test-deep: $(READY)  ## campaigns of an hour: whole kits of all mechanisms, all choices at XLA's default flags, drawn shapes
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

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

$(READY): pyproject.toml $(CONSTRAINTS)
	@if command -v uv >/dev/null; then \
		uv venv -q --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install -q --python $(BIN)/python -e '.[dev]' -c $(CONSTRAINTS) pip; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c $(CONSTRAINTS); \
	fi
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache build dist *.egg-info
