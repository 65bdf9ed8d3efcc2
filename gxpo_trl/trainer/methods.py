"""Which methods of a trainer are TRL's, or this package's around them."""

from typing import Any

from trl import GRPOTrainer, RLOOTrainer


PACKAGE = __package__.partition(".")[0]
LIBRARIES = {PACKAGE, "trl", "transformers", "torch", "contextlib"}
"""Of the code of a trainer's own methods and of their decorators."""


def is_replaced(trainer: GRPOTrainer | RLOOTrainer, name: str) -> bool:
    """Whether a method of TRL's is another one: of a subclass or a mixin, set on this trainer, or patched into TRL's
    class.
    """
    by_trl = GRPOTrainer if isinstance(trainer, GRPOTrainer) else RLOOTrainer
    if name in vars(trainer):
        method = vars(trainer)[name]
        return not (_is_ours(method) or getattr(method, "__func__", None) is vars(by_trl).get(name))
    owner = next(part for part in type(trainer).__mro__ if name in vars(part) and not _is_ours(part))
    return owner not in by_trl.__mro__ or not set(_libraries_of(vars(owner)[name])) <= LIBRARIES


def _is_ours(part: Any) -> bool:
    return set(_libraries_of(part)) == {PACKAGE}


def _libraries_of(part: Any) -> list[str]:
    """Where the code of a class or a method, and of all that a method wraps, is from. A function's `__module__` may be
    that of what it wraps.
    """
    found = []
    while part is not None:
        part = getattr(part, "__func__", part)
        known = part.__globals__["__name__"] if hasattr(part, "__globals__") else getattr(part, "__module__", None)
        found.append((known or "").partition(".")[0])
        part = getattr(part, "__wrapped__", None)
    return found
