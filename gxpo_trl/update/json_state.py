"""What a state that is saved as JSON consists of, and whether one that comes back fits."""

import math
from collections.abc import Callable, Sequence
from typing import Any


Part = tuple[str, str, Callable[[Any], bool]]
"""A name, what its value must be, and whether one is."""


def check_parts(state: Any, parts: Sequence[Part], what: str) -> None:
    """Refuses a state in which a part is missing or does not fit. `what` is whose state it is.

    Raises:
        ValueError: Names the part, and what it must be.
    """
    if not isinstance(state, dict):
        raise ValueError(f"The state of the {what} must be a dictionary, got {state!r}.")
    for name, must_be, fits in parts:
        if name not in state:
            raise ValueError(f"The state of the {what} has no `{name}`.")
        if not fits(state[name]):
            raise ValueError(f"`{name}` of the state of the {what} must be {must_be}, got {state[name]!r}.")


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 0, as JSON has it."""
    return type(value) is int and value >= 0


def is_amount(value: Any) -> bool:
    """Whether it is a number of at least 0, as JSON has it."""
    return type(value) in (int, float) and 0 <= value < math.inf


def is_truth(value: Any) -> bool:
    return type(value) is bool
