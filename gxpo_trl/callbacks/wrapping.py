"""What callbacks do where transformers and TRL have no event: they stand around a trainer's method."""

import functools
from collections.abc import Callable
from typing import Any

from transformers import Trainer


def wrap_method(trainer: Trainer, name: str, around: Callable[..., Any]) -> bool:
    """Puts `around(method, *args, **kwargs)` in the place of a method, on this trainer alone.

    Returns:
        `bool`: Whether the trainer has that method; one that it doesn't have is not made up.
    """
    method = getattr(trainer, name, None)
    if method is None:
        return False

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        return around(method, *args, **kwargs)

    setattr(trainer, name, wrapped)
    return True
