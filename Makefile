# Two commands for newcomers: `make demo` and `make test`. Both set everything up by themselves, once.

PYTHON ?= python3
VENV   ?= .venv
# torch goes in first and pinned: whatever else is installed afterwards then leaves it alone. On a machine with a GPU take the
# build of your CUDA version, for example `make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"`.
TORCH  ?= torch==2.13.0

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test lint format slow test-notebooks notebooks docs clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/gxpo demo --output_dir out/demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not notebooks" --numprocesses 2 --dist loadfile

slow: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not notebooks"

test-notebooks: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m notebooks

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

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache
