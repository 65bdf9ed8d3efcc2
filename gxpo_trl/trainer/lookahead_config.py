"""Every knob of every update rule, once."""

import math
import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..update.extrapolation import Extrapolation
from ..update.step import LookaheadRule


UPDATE_RULES = ("gxpo", "grpo")
OWN_STEP_OPTIMIZERS = {
    "lomo": "it steps during the backward pass and leaves no gradient to extrapolate",
    "layerwise": "it steps layer by layer during the backward pass and leaves no gradient to extrapolate",
    "schedule_free": "its state holds a second copy of the parameters that a reposition would leave behind",
}


@dataclass
class LookaheadConfig(GRPOConfig):
    r"""
    Configuration class for the [`LookaheadTrainer`].

    [`LookaheadConfig`] inherits every parameter from [`~trl.GRPOConfig`] and adds those of the lookahead policy
    updates.

    Parameters:
        update_rule (`str`, *optional*, defaults to `"gxpo"`):
            How a batch of rollouts becomes an update: `"gxpo"` (three passes: two probes, extrapolation, correction)
            or `"grpo"` (plain single pass through the same trainer).
        lookahead_steps (`int`, *optional*, defaults to `5`):
            K, the number of virtual steps that the two probes are extrapolated to; at least 2.
        reposition_alpha (`float`, *optional*, defaults to `0.5`):
            α, the fraction of the way to the extrapolated point that is taken; at least 0, in the paper at most 1.
        active_threshold (`float`, *optional*, defaults to `1e-8`):
            δ: coordinates whose first gradient is not above it in absolute value keep the observed two-step
            displacement.
        retention_min (`float`, *optional*, defaults to `-2.0`):
            Lower bound of the retention ratio r = g1 / g0; `-inf` for none.
        retention_max (`float`, *optional*, defaults to `3.0`):
            Upper bound of the retention ratio; `inf` for none.
        scale_min (`float`, *optional*, defaults to `1.0`):
            Lower bound of the factor from two steps to K; `-inf` for none.
        scale_max (`float`, *optional*):
            Upper bound of that factor; `None` for K / 2 + 1, `inf` for none.
        probe_optimizer_state (`str`, *optional*, defaults to `"carry"`):
            `"carry"` lets the probes advance the optimizer's moments, as in the paper; `"rollback"` restores them
            before the correction, at the cost of a copy of the optimizer's state.
        ratio_anchor (`str`, *optional*, defaults to `"rollout"`):
            What the importance ratio is measured against in passes 2 and 3: `"rollout"`, the policy that generated the
            batch, or `"current"`, what TRL takes where it keeps no old log-probabilities, the policy of the pass
            itself.
        gate_signal (`str`, *optional*, defaults to `"grad_norm"`):
            What ends the active phase: `"grad_norm"`, a rise of the corrective gradient's norm, or `"never"`.
        gate_threshold (`float`, *optional*, defaults to `0.5`):
            τ: the z-score of the signal from which on it counts as a rise.
        gate_window (`int`, *optional*, defaults to `30`):
            w: how many past values the z-score is computed from; at least 2.
        gate_warmup_steps (`int`, *optional*, defaults to `50`):
            Active steps before the gate may fire.
        gate_patience (`int`, *optional*, defaults to `1`):
            Consecutive steps over the threshold that end the active phase.
        allow_low_precision_parameters (`bool`, *optional*, defaults to `False`):
            Whether to accept trainable parameters stored in bf16 or fp16, where small steps, and with them the
            retention ratio, vanish in rounding.
    """

    update_rule: str = field(
        default="gxpo",
        metadata={
            "help": "How a batch of rollouts becomes an update: 'gxpo' (three passes: two probes, extrapolation, "
            "correction) or 'grpo' (plain single pass through the same trainer)."
        },
    )
    lookahead_steps: int = field(
        default=5,
        metadata={"help": "K, the number of virtual steps that the two probes are extrapolated to; at least 2."},
    )
    reposition_alpha: float = field(
        default=0.5,
        metadata={
            "help": "α, the fraction of the way to the extrapolated point that is taken; at least 0, in the paper at "
            "most 1."
        },
    )
    active_threshold: float = field(
        default=1e-8,
        metadata={
            "help": "δ: coordinates whose first gradient is not above it in absolute value keep the observed two-step "
            "displacement."
        },
    )
    retention_min: float = field(
        default=-2.0, metadata={"help": "Lower bound of the retention ratio r = g1 / g0; '-inf' for none."}
    )
    retention_max: float = field(default=3.0, metadata={"help": "Upper bound of the retention ratio; 'inf' for none."})
    scale_min: float = field(
        default=1.0, metadata={"help": "Lower bound of the factor from two steps to K; '-inf' for none."}
    )
    scale_max: float | None = field(
        default=None, metadata={"help": "Upper bound of that factor; unset for K / 2 + 1, 'inf' for none."}
    )
    probe_optimizer_state: str = field(
        default="carry",
        metadata={
            "help": "'carry' lets the probes advance the optimizer's moments, as in the paper; 'rollback' restores "
            "them before the correction, at the cost of a copy of the optimizer's state."
        },
    )
    ratio_anchor: str = field(
        default="rollout",
        metadata={
            "help": "What the importance ratio is measured against in passes 2 and 3: 'rollout', the policy that "
            "generated the batch, or 'current', what TRL takes where it keeps no old log-probabilities, the policy of "
            "the pass itself."
        },
    )
    gate_signal: str = field(
        default="grad_norm",
        metadata={
            "help": "What ends the active phase: 'grad_norm', a rise of the corrective gradient's norm, or 'never'."
        },
    )
    gate_threshold: float = field(
        default=0.5, metadata={"help": "τ: the z-score of the signal from which on it counts as a rise."}
    )
    gate_window: int = field(
        default=30, metadata={"help": "w: how many past values the z-score is computed from; at least 2."}
    )
    gate_warmup_steps: int = field(default=50, metadata={"help": "Active steps before the gate may fire."})
    gate_patience: int = field(
        default=1, metadata={"help": "Consecutive steps over the threshold that end the active phase."}
    )
    allow_low_precision_parameters: bool = field(
        default=False,
        metadata={
            "help": "Whether to accept trainable parameters stored in bf16 or fp16, where small steps, and with them "
            "the retention ratio, vanish in rounding."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("update_rule", UPDATE_RULES)
        self._check_choice("probe_optimizer_state", ("carry", "rollback"))
        self._check_choice("ratio_anchor", ("rollout", "current"))
        self._check_choice("gate_signal", ("grad_norm", "never"))
        self._check_at_least("lookahead_steps", 2)
        self._check_at_least("reposition_alpha", 0.0)
        self._check_at_least("active_threshold", 0.0)
        self._check_at_least("gate_window", 2)
        self._check_at_least("gate_warmup_steps", 0)
        self._check_at_least("gate_patience", 1)
        if not self.gate_threshold > 0:
            raise ValueError(
                f"`gate_threshold` must be above 0, got {self.gate_threshold}. To keep the active phase for the whole "
                "run, set `gate_signal: never`."
            )
        self._check_bounds("retention_min", self.retention_min, "retention_max", self.retention_max)
        self._check_bounds("scale_min", self.scale_min, "scale_max", self.lookahead_rule().extrapolation.scale_max)
        if self.reposition_alpha > 1:
            warnings.warn(
                f"`reposition_alpha` is {self.reposition_alpha}: it moves beyond the extrapolated point, where the "
                "paper stays at or before it (α ≤ 1).",
                stacklevel=2,
            )
        if self.update_rule != "grpo":
            self._check_precision_and_optimizer()

    def lookahead_rule(self) -> LookaheadRule:
        """The update rule as the update step reads it."""
        return LookaheadRule(
            probes=2,
            extrapolation=Extrapolation(
                lookahead_steps=self.lookahead_steps,
                reposition_alpha=self.reposition_alpha,
                active_threshold=self.active_threshold,
                retention_min=self.retention_min,
                retention_max=self.retention_max,
                scale_min=self.scale_min,
                scale_max=self.lookahead_steps / 2 + 1 if self.scale_max is None else self.scale_max,
            ),
            rollback=self.probe_optimizer_state == "rollback",
        )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")

    def _check_at_least(self, name: str, minimum: float) -> None:
        value = getattr(self, name)
        if not minimum <= value < math.inf:
            raise ValueError(f"`{name}` must be a finite number of at least {minimum}, got {value}.")

    def _check_bounds(self, lower_name: str, lower: float, upper_name: str, upper: float) -> None:
        if not lower < upper:
            raise ValueError(
                f"`{lower_name}` must be below `{upper_name}`, got {lower} and {upper}. Use -.inf and .inf for "
                "no bound."
            )

    def _check_precision_and_optimizer(self) -> None:
        if self.fp16:
            raise ValueError(
                "Lookahead updates don't support `fp16: true`: its loss scaler skips steps on its own. Use "
                "`bf16: true` (or neither, for fp32)."
            )
        for name, reason in OWN_STEP_OPTIMIZERS.items():
            if name in str(self.optim.value):
                raise ValueError(
                    f"Lookahead updates don't support `optim: {self.optim.value}`: {reason}. Use `optim: adamw_torch`."
                )
