"""Checks of settings."""

import math
import numbers
from typing import Any

from .values import show


def check_at_least(name: str, value: Any, minimum: float) -> None:
    """Raises a `ValueError` that names the setting if it is below its minimum or not a finite number.

    With an `int` as the minimum, the setting must be a whole number.
    """
    kind, said = (numbers.Integral, "whole") if isinstance(minimum, int) else (numbers.Real, "finite")
    if not isinstance(value, kind) or isinstance(value, bool) or not minimum <= value < math.inf:
        raise ValueError(f"`{name}` must be a {said} number of at least {minimum}, got {show(value)}.")
