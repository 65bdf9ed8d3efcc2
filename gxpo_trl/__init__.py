"""Lookahead policy updates for TRL: reinforcement learning with verifiable rewards, further per batch of rollouts."""

from .trainer.gxpo import GXPOConfig, GXPOTrainer
from .trainer.lookahead_config import LookaheadConfig
from .trainer.lookahead_trainer import LookaheadTrainer
from .version import __version__


__all__ = ["GXPOConfig", "GXPOTrainer", "LookaheadConfig", "LookaheadTrainer", "__version__"]
