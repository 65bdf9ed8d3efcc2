"""What the callbacks' settings have to be."""

import math


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raises a `ValueError` that names the setting if it is below its minimum or not finite."""
    if not minimum <= value < math.inf:
        raise ValueError(f"`{name}` must be a finite number of at least {minimum}, got {value}.")
