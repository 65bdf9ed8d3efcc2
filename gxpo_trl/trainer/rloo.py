"""The lookahead policy updates over TRL's RLOO."""

from dataclasses import dataclass

from trl import RLOOConfig, RLOOTrainer

from ..rollout.compaction import Compaction
from .gxpo import GXPOTrainer
from .lookahead_config import LookaheadArguments
from .lookahead_trainer import LookaheadMixin


@dataclass
class GXPORLOOConfig(LookaheadArguments, RLOOConfig):
    r"""
    Configuration class for the [`GXPORLOOTrainer`].

    [`GXPORLOOConfig`] inherits every parameter from [`~trl.RLOOConfig`] and adds those of the lookahead policy
    updates, [`LookaheadArguments`]. `update_rule: "grpo"` stands for RLOO's own single pass.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.ratio_anchor == "current":
            raise ValueError(
                "`ratio_anchor: current` has no meaning for RLOO: TRL computes its old log-probabilities with the "
                "rollouts and uses them in every pass. Leave `ratio_anchor: rollout`."
            )


class GXPORLOOTrainer(LookaheadMixin, RLOOTrainer):
    """
    Trainer for RLOO with lookahead policy updates: [`~trl.RLOOTrainer`] that moves the policy further on each batch of
    rollouts.

    TRL's RLOO computes the old log-probabilities with the rollouts; all passes use them.
    """

    _config_class = GXPORLOOConfig
    _freezes_old_logps = False
    _token_means = ("entropy",)
    _ratio_per_token = False
    _tag_names = ["trl", "rloo", "gxpo"]
    _name = "RLOO with GXPO"
    _paper = GXPOTrainer._paper

    def _why_no_benchmarks(self) -> str | None:
        if self.use_vllm and self.args.eval_samples != self.num_generations_eval:
            return "with vLLM, TRL's RLOO draws `num_generations_eval` samples, and `eval_samples` is another number"
        return None

    def _loss_allows(self) -> Compaction | None:
        if type(self)._compute_loss is not RLOOTrainer._compute_loss or self.aux_loss_enabled:
            return None
        return Compaction(prunes=True)  # the KL term is part of the reward
