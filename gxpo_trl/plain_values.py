"""Logged values as JSON types."""

from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """The JSON type for a value: a number, a collection of them, or else its text.

    Numbers that are not finite stay as they are: Python's `json` writes and reads them.
    """
    if value is None or isinstance(value, (str, int, float)):  # NumPy's float64 is a float
        return value
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    try:
        return _number(value)
    except Exception:  # whatever it says to that: several entries, no number, a tensor without data
        return str(value)


def _number(value: Any) -> float:
    """The one number of a tensor or an array, or what `float` makes of anything else."""
    if isinstance(value, (np.datetime64, np.timedelta64)):
        raise TypeError("A time is not a number.")
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.item()
    return value if isinstance(value, int) else float(value)


def make_history_plain(history: list[dict[str, Any]], start: int) -> None:
    """Replaces the entries of a log from `start` on by JSON types, so that a checkpoint can hold them."""
    history[start:] = map(plain, history[start:])
