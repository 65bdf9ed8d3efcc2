"""Tests run offline and on one thread, whatever the machine has."""

import os
import sys
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def float64(monkeypatch):
    """Float64 models are computed in float64 throughout, see `helpers.compute_in_float64`."""
    from helpers import compute_in_float64

    compute_in_float64(monkeypatch.setattr)
