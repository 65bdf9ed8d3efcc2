"""Wraps a method of a trainer, for callbacks where transformers and TRL have no event."""

import functools
from collections.abc import Callable
from typing import Any

from transformers import Trainer


def wrap_method(trainer: Trainer, name: str, around: Callable[..., Any]) -> bool:
    """Replaces a method by `around(method, *args, **kwargs)`, only on this trainer.

    Returns:
        `bool`: Whether the trainer has that method. A missing one is not added.
    """
    method = getattr(trainer, name, None)
    if method is None:
        return False

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        return around(method, *args, **kwargs)

    setattr(trainer, name, wrapped)
    return True
