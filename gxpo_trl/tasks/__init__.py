"""Rewards, datasets, and the embedded arithmetic task with its tiny model."""

from .arithmetic import arithmetic_reward, load_arithmetic
from .datasets import load_problems
from .examples import resolve_dataset
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
