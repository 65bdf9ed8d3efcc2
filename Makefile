# Two commands for newcomers: `make demo` and `make test`. Both set everything up by themselves, once.

PYTHON ?= python3
VENV   ?= .venv
# torch goes in first and pinned: whatever else is installed afterwards then leaves it alone. On a machine with a GPU take the
# build of your CUDA version, for example `make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"`.
TORCH  ?= torch==2.13.0
# The versions of everything else. `make setup LOCK=` installs the newest that pyproject.toml allows instead.
LOCK   ?= .ci/locked.txt

# The ends of what pyproject.toml allows: `make test-lowest`, `make test-latest`.
LOWEST_TORCH ?= torch==2.11.0
LATEST_TORCH ?= torch==2.14.*

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(if $(LOCK),--constraint $(LOCK))
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: setup demo test test-lowest test-latest lint format slow test-notebooks notebooks docs lock clean

setup: $(READY)

$(READY): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(BIN)/python -m pip freeze | grep "^torch==" > $(VENV)/torch.txt
	$(PIP) $(LOCKED) hatchling editables
	$(PIP) $(LOCKED) --constraint $(VENV)/torch.txt --no-build-isolation --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/gxpo demo --output_dir out/demo

test: $(READY)
	$(PYTEST) -m "not slow and not notebooks" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-lowest:
	$(MAKE) test VENV=.venv-lowest LOCK=.ci/lowest.txt TORCH="$(LOWEST_TORCH)"

test-latest:
	$(MAKE) test VENV=.venv-latest LOCK= TORCH="$(LATEST_TORCH)"

slow: $(READY)
	$(PYTEST) -m "slow and not notebooks" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-notebooks: $(READY)
	$(PYTEST) -m notebooks

notebooks: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/run.py

docs: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/sphinx-build -W --keep-going -b html docs out/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Renews both files from pyproject.toml, for every supported Python. Torch is in neither, since it goes in first, nor is what a
# build of torch brings or bounds.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	echo "$(firstword $(TORCH))" | $(RESOLVE) --resolution highest --output-file .venv-lock/locked.txt --constraints -
	echo "$(LOWEST_TORCH)" | $(RESOLVE) --resolution lowest-direct --output-file .venv-lock/lowest.txt --constraints -
	for file in locked.txt lowest.txt; do grep -vE "^(torch|triton|setuptools|cuda-.*|nvidia-.*)==" .venv-lock/$$file > .ci/$$file; done

RESOLVE = .venv-lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --quiet --no-annotate \
	--custom-compile-command "make lock"

clean:
	rm -rf $(VENV) .venv-lowest .venv-latest .venv-lock out build dist *.egg-info .pytest_cache .ruff_cache
