"""Lookahead policy updates for TRL: reinforcement learning with verifiable rewards, further per batch of rollouts."""

import importlib
from typing import TYPE_CHECKING

from .version import __version__


if TYPE_CHECKING:
    from .sampling.grouped import sample_grouped
    from .trainer.config import LookaheadConfig
    from .trainer.grouped import GroupedSamplingArguments, sample_in_groups
    from .trainer.gxpo import GXPOConfig, GXPOTrainer
    from .trainer.sfpo import SFPOConfig, SFPOTrainer
    from .trainer.trainer import LookaheadTrainer


__all__ = [
    "GXPOConfig",
    "GXPOTrainer",
    "GroupedSamplingArguments",
    "LookaheadConfig",
    "LookaheadTrainer",
    "SFPOConfig",
    "SFPOTrainer",
    "__version__",
    "sample_grouped",
    "sample_in_groups",
]

HOMES = {
    "GXPOConfig": ".trainer.gxpo",
    "GXPOTrainer": ".trainer.gxpo",
    "GroupedSamplingArguments": ".trainer.grouped",
    "LookaheadConfig": ".trainer.config",
    "LookaheadTrainer": ".trainer.trainer",
    "SFPOConfig": ".trainer.sfpo",
    "SFPOTrainer": ".trainer.sfpo",
    "sample_grouped": ".sampling.grouped",
    "sample_in_groups": ".trainer.grouped",
}
"""The modules of the public names. A name is imported on first use, so that a report does not load TRL."""


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name], __name__), name)
