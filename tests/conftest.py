"""Tests run offline and on one thread, whatever the machine has."""

import functools
import gc
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))
# Accelerate asks for the metadata of thirty packages for each trainer, and Python parses their files again each time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def set_modules_aside() -> None:
    """Garbage collections leave alone what was imported so far.

    Each `train()` begins with a collection (Accelerate's `free_memory`), which takes a third of a second where torch,
    TRL, DeepSpeed and all tests are loaded: as long as a run of a few steps.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    set_modules_aside()


@pytest.fixture
def float64(monkeypatch):
    """Float64 models are computed in float64 throughout, see `helpers.compute_in_float64`."""
    from helpers import compute_in_float64

    compute_in_float64(monkeypatch.setattr)
