"""GXPO: Gradient Extrapolation-Based Policy Optimization (arXiv 2605.06755)."""

from dataclasses import dataclass

from .config import LookaheadConfig
from .trainer import LookaheadTrainer


@dataclass
class GXPOConfig(LookaheadConfig):
    """
    Configuration class for the [`GXPOTrainer`]: [`LookaheadConfig`], whose defaults are those of the GXPO paper.
    """


class GXPOTrainer(LookaheadTrainer):
    """
    Trainer for Gradient Extrapolation-Based Policy Optimization (GXPO).

    GXPO (https://huggingface.co/papers/2605.06755) takes two probe steps on one batch of rollouts, extrapolates the
    change of the gradient coordinate by coordinate to a virtual K-step point, moves part of the way there, and
    corrects with the true gradient at that point. The only change w.r.t. [`~trl.GRPOTrainer`] is how a batch of
    rollouts becomes an update; arguments, generation, rewards, losses and logging are inherited unchanged.

    Example:

    ```python
    from gxpo_trl import GXPOConfig, GXPOTrainer
    from gxpo_trl.tasks import TINY_MODEL_PATH, arithmetic_reward, load_arithmetic

    trainer = GXPOTrainer(
        model=str(TINY_MODEL_PATH),
        reward_funcs=arithmetic_reward,
        args=GXPOConfig("out", lookahead_steps=5, reposition_alpha=0.5),
        train_dataset=load_arithmetic()["train"],
    )
    trainer.train()
    ```
    """

    _config_class = GXPOConfig
    _update_rule = "gxpo"
