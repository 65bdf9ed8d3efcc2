"""SFPO: Slow-Fast Policy Optimization (arXiv 2510.04072)."""

from dataclasses import dataclass, field

from .config import LookaheadConfig
from .trainer import LookaheadTrainer


@dataclass
class SFPOConfig(LookaheadConfig):
    """
    Configuration class for the [`SFPOTrainer`]: [`LookaheadConfig`] with the defaults of the SFPO paper.

    Parameters:
        update_rule (`str`, *optional*, defaults to `"sfpo"`):
            K fast steps, reposition, one slow step.
        lookahead_steps (`int`, *optional*, defaults to `3`):
            K, the fast steps; at least 1.
        reposition_alpha (`float`, *optional*, defaults to `0.8`):
            α, the fraction of the way to the last fast step that is kept.
        gate_signal (`str`, *optional*, defaults to `"entropy"`):
            A rise or fall of the policy's token entropy ends the active phase.
        gate_threshold (`float`, *optional*, defaults to `1.0`):
            τ: the absolute z-score from which on it counts.
    """

    update_rule: str = field(default="sfpo", metadata={"help": "K fast steps, reposition, one slow step."})
    lookahead_steps: int = field(default=3, metadata={"help": "K, the fast steps; at least 1."})
    reposition_alpha: float = field(
        default=0.8, metadata={"help": "α, the fraction of the way to the last fast step that is kept."}
    )
    gate_signal: str = field(
        default="entropy",
        metadata={"help": "A rise or fall of the policy's token entropy ends the active phase."},
    )
    gate_threshold: float = field(default=1.0, metadata={"help": "τ: the absolute z-score from which on it counts."})


class SFPOTrainer(LookaheadTrainer):
    """
    Trainer for Slow-Fast Policy Optimization (SFPO).

    SFPO (https://huggingface.co/papers/2510.04072) takes K fast steps on one batch of rollouts, goes back part of the
    way, and takes one slow step from there. The only change w.r.t. [`~trl.GRPOTrainer`] is how a batch of rollouts
    becomes an update; it works with every `loss_type` (SFPO on DAPO is `loss_type: dapo`).
    """

    _config_class = SFPOConfig
    _update_rule = "sfpo"
