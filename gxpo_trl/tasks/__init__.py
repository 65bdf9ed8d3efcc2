"""Rewards, datasets, and the embedded arithmetic task with its tiny model."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .arithmetic import arithmetic_reward, load_arithmetic
    from .datasets import load_problems, resolve_dataset
    from .names import resolve_model, resolve_reward
    from .tiny_model import TINY_MODEL_PATH


__all__ = [
    "TINY_MODEL_PATH",
    "arithmetic_reward",
    "load_arithmetic",
    "load_problems",
    "resolve_dataset",
    "resolve_model",
    "resolve_reward",
]

HOMES = {
    "TINY_MODEL_PATH": ".tiny_model",
    "arithmetic_reward": ".arithmetic",
    "load_arithmetic": ".arithmetic",
    "load_problems": ".datasets",
    "resolve_dataset": ".datasets",
    "resolve_model": ".names",
    "resolve_reward": ".names",
}
"""Where these names live. They are imported when they are asked for: a list of recipes needs no torch."""


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name], __name__), name)
