"""Every knob of every update rule, once."""

import math
import warnings
from dataclasses import dataclass, field

import torch
from accelerate.utils import get_int_from_env
from trl import GRPOConfig

from ..update.extrapolation import Extrapolation
from ..update.gate import Fallback, Gate, Trigger, mean_and_deviation, median_and_deviation
from ..update.snapshot import Storage
from ..update.step import LookaheadRule


UPDATE_RULES = ("gxpo", "sfpo", "grpo")
OWN_STEP_OPTIMIZERS = {
    "lomo": "it steps during the backward pass and leaves no gradient to extrapolate",
    "layerwise": "it steps layer by layer during the backward pass and leaves no gradient to extrapolate",
    "schedule_free": "its state holds a second copy of the parameters that a reposition would leave behind",
}
COUPLED_DECAY_OPTIMIZERS = ("sgd", "rmsprop", "adagrad")


def _launched_processes() -> int:
    """What `world_size` will be, before it can be asked: launchers set one of these variables."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)


def accumulation_steps(prompts: int, num_generations: int, per_device_batch_size: int, processes: int) -> int:
    """The micro-batches of each device that hold the completions of `prompts` prompts together.

    Raises:
        ValueError: If they don't come out even; it names batch sizes that do.
    """
    completions = prompts * num_generations
    steps, rest = divmod(completions, per_device_batch_size * processes)
    if rest == 0:
        return steps
    remedy = f"{completions} completions can't be dealt to {processes} processes: choose another `prompts_per_step`"
    if completions % processes == 0:
        largest = max(size for size in range(1, per_device_batch_size) if completions // processes % size == 0)
        remedy = f"Set `per_device_train_batch_size` to {largest}"
    raise ValueError(
        f"`prompts_per_step: {prompts}` makes {completions} completions, with `num_generations: {num_generations}`; "
        f"they are no multiple of `per_device_train_batch_size: {per_device_batch_size}` × {processes} processes. "
        f"{remedy}."
    )


@dataclass
class LookaheadArguments:
    r"""
    The parameters of the lookahead policy updates, to be mixed into the configuration of a TRL trainer.

    Parameters:
        update_rule (`str`, *optional*, defaults to `"gxpo"`):
            How a batch of rollouts becomes an update: `"gxpo"` (three passes: two probes, extrapolation, correction),
            `"sfpo"` (K + 1 passes: K probes, correction) or `"grpo"` (plain single pass through the same trainer).
        lookahead_steps (`int`, *optional*, defaults to `5`):
            K: for `"gxpo"` the virtual steps that the two probes are extrapolated to, at least 2; for `"sfpo"` the
            probes themselves, at least 1.
        reposition_alpha (`float`, *optional*, defaults to `0.5`):
            α, the fraction of the way to the lookahead point that is taken; at least 0, in the papers at most 1.
        retention (`str`, *optional*, defaults to `"gradient"`):
            What the retention ratio r is formed of: `"gradient"`, g1 / g0, as in the paper, or `"update"`, d1 / d0,
            the directions that the optimizer really moved in.
        active_threshold (`float`, *optional*, defaults to `1e-8`):
            δ: coordinates where the denominator of r is not above it in absolute value keep the observed two-step
            displacement.
        active_threshold_relative (`float`, *optional*, defaults to `0.0`):
            The same bound as a fraction of the root mean square of all denominators; the larger of the two counts. 0
            turns it off.
        retention_min (`float`, *optional*, defaults to `-2.0`):
            Lower bound of the retention ratio; `-inf` for none.
        retention_max (`float`, *optional*, defaults to `3.0`):
            Upper bound of the retention ratio; `inf` for none.
        scale_min (`float`, *optional*, defaults to `1.0`):
            Lower bound of the factor from two steps to K; `-inf` for none.
        scale_max (`float`, *optional*):
            Upper bound of that factor; unset for K / 2 + 1, `inf` for none.
        probe_optimizer_state (`str`, *optional*, defaults to `"carry"`):
            `"carry"` lets the probes advance the optimizer's moments, as in the paper; `"rollback"` restores them
            before the correction, at the cost of a copy of the optimizer's state.
        ratio_anchor (`str`, *optional*, defaults to `"rollout"`):
            What the importance ratio is measured against after the first pass: `"rollout"`, the policy that generated
            the batch, or `"current"`, what TRL takes where it keeps no old log-probabilities, the policy of the pass
            itself.
        gate_signal (`str`, *optional*, defaults to `"grad_norm"`):
            What ends the active phase: `"grad_norm"`, a rise of the corrective gradient's norm; `"entropy"`, a rise or
            fall of the policy's token entropy; `"cosine"`, a rise of 1 - cos(g0, g_slow); or `"never"`.
        gate_threshold (`float`, *optional*, defaults to `0.5`):
            τ: the z-score of the signal from which on it counts as an exceedance.
        gate_window (`int`, *optional*, defaults to `30`):
            w: how many past values the z-score is computed from; at least 2.
        gate_warmup_steps (`int`, *optional*, defaults to `50`):
            Active steps before the gate may fire.
        gate_patience (`int`, *optional*, defaults to `1`):
            Consecutive exceedances that end the active phase.
        gate_robust (`bool`, *optional*, defaults to `False`):
            Whether the z-score is taken against median and median absolute deviation instead of mean and standard
            deviation.
        gate_fallback (`str`, *optional*, defaults to `"permanent"`):
            What follows the active phase: `"permanent"`, single-pass steps for the rest of the run, or `"temporary"`,
            until the gate arms again after `gate_cooldown_steps`.
        gate_cooldown_steps (`int`, *optional*, defaults to `50`):
            Single-pass steps before a gate with `gate_fallback: temporary` arms again.
        max_active_steps (`int`, *optional*):
            A budget: active steps after which the phase ends for good, whatever the gate says. Unset for none.
        alpha_decay_steps (`int`, *optional*, defaults to `0`):
            Active steps over which α goes linearly to 0 once the gate has fired; 0 ends the active phase at once.
        snapshot_device (`str`, *optional*, defaults to `"model"`):
            Where the copies of an active step are kept: `"model"`, beside the parameters, or `"cpu"`, in pinned host
            memory.
        snapshot_dtype (`str`, *optional*):
            What the copy of the first gradient is kept in: `"bfloat16"` or `"float32"`; unset for the gradient's own.
        lookahead_diagnostics_steps (`int`, *optional*, defaults to `0`):
            Compares every so many active steps with K real optimizer steps and measures the noise of the gradient, at
            the cost of K further passes each time; 0 for never.
        prompts_per_step (`int`, *optional*):
            Prompts of one optimizer step over all devices; sets `gradient_accumulation_steps` accordingly, so that a
            recipe is the same experiment on any number of GPUs: prompts × `num_generations` =
            `per_device_train_batch_size` × processes × accumulation steps. Unset for what these come to.
        compact_batches (`bool`, *optional*, defaults to `True`):
            Whether the rows of an optimizer step are sorted by completion length and their micro-batches trimmed,
            where that leaves the gradient what it is. Turn it off to have `update_rule: grpo` equal TRL bit for bit.
        prune_zero_advantage (`bool`, *optional*, defaults to `True`):
            Whether the passes after the first leave out completions whose advantage is 0, where the loss sees a
            completion through its advantage alone (no KL, no entropy bonus, no dropout). Needs `compact_batches`.
        max_tokens_per_micro_batch (`int`, *optional*):
            Pack micro-batches by tokens, padding included, instead of by rows. The first pass keeps its number of
            micro-batches, and exceeds this where it has to; later passes take as few as hold. Needs `compact_batches`.
        eval_benchmarks (`list[str]`, *optional*):
            Problem sets, by name or file, that are scored every `eval_steps` steps as `eval/<benchmark>/avg@n`,
            sampled as in training and independent of `eval_strategy`.
        eval_samples (`int`, *optional*, defaults to `4`):
            n, the completions of each problem of `eval_benchmarks`.
        eval_prompt (`str`, *optional*):
            Template of the user's message, with `{problem}` in it, for `eval_benchmarks`. Unset for the problem alone.
        eval_system_prompt (`str`, *optional*):
            System message for `eval_benchmarks`. Unset for none.
        trajectory_steps (`int`, *optional*):
            Saves the LoRA adapter alone, every so many steps, under `<output_dir>/trajectory/step-000010/`, for `gxpo
            extrapolate`. Unset for never.
        allow_low_precision_parameters (`bool`, *optional*, defaults to `False`):
            Whether to accept trainable parameters stored in bf16 or fp16, where small steps, and with them the
            retention ratio, vanish in rounding.
    """

    update_rule: str = field(
        default="gxpo",
        metadata={
            "help": "How a batch of rollouts becomes an update: 'gxpo' (three passes: two probes, extrapolation, "
            "correction), 'sfpo' (K + 1 passes: K probes, correction) or 'grpo' (plain single pass through "
            "the same trainer)."
        },
    )
    lookahead_steps: int = field(
        default=5,
        metadata={
            "help": "K: for 'gxpo' the virtual steps that the two probes are extrapolated to, at least 2; for 'sfpo' "
            "the probes themselves, at least 1."
        },
    )
    reposition_alpha: float = field(
        default=0.5,
        metadata={
            "help": "α, the fraction of the way to the lookahead point that is taken; at least 0, in the papers at "
            "most 1."
        },
    )
    retention: str = field(
        default="gradient",
        metadata={
            "help": "What the retention ratio r is formed of: 'gradient', g1 / g0, as in the paper, or 'update', d1 "
            "/ d0, the directions that the optimizer really moved in."
        },
    )
    active_threshold: float = field(
        default=1e-8,
        metadata={
            "help": "δ: coordinates where the denominator of r is not above it in absolute value keep the observed "
            "two-step displacement."
        },
    )
    active_threshold_relative: float = field(
        default=0.0,
        metadata={
            "help": "The same bound as a fraction of the root mean square of all denominators; the larger of the two "
            "counts. 0 turns it off."
        },
    )
    retention_min: float = field(
        default=-2.0,
        metadata={"help": "Lower bound of the retention ratio; '-inf' for none."},
    )
    retention_max: float = field(
        default=3.0,
        metadata={"help": "Upper bound of the retention ratio; 'inf' for none."},
    )
    scale_min: float = field(
        default=1.0,
        metadata={"help": "Lower bound of the factor from two steps to K; '-inf' for none."},
    )
    scale_max: float | None = field(
        default=None,
        metadata={"help": "Upper bound of that factor; unset for K / 2 + 1, 'inf' for none."},
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
            "help": "What the importance ratio is measured against after the first pass: 'rollout', the policy that "
            "generated the batch, or 'current', what TRL takes where it keeps no old log-probabilities, the "
            "policy of the pass itself."
        },
    )
    gate_signal: str = field(
        default="grad_norm",
        metadata={
            "help": "What ends the active phase: 'grad_norm', a rise of the corrective gradient's norm; 'entropy', a "
            "rise or fall of the policy's token entropy; 'cosine', a rise of 1 - cos(g0, g_slow); or "
            "'never'."
        },
    )
    gate_threshold: float = field(
        default=0.5,
        metadata={"help": "τ: the z-score of the signal from which on it counts as an exceedance."},
    )
    gate_window: int = field(
        default=30,
        metadata={"help": "w: how many past values the z-score is computed from; at least 2."},
    )
    gate_warmup_steps: int = field(
        default=50,
        metadata={"help": "Active steps before the gate may fire."},
    )
    gate_patience: int = field(
        default=1,
        metadata={"help": "Consecutive exceedances that end the active phase."},
    )
    gate_robust: bool = field(
        default=False,
        metadata={
            "help": "Whether the z-score is taken against median and median absolute deviation instead of mean and "
            "standard deviation."
        },
    )
    gate_fallback: str = field(
        default="permanent",
        metadata={
            "help": "What follows the active phase: 'permanent', single-pass steps for the rest of the run, or "
            "'temporary', until the gate arms again after `gate_cooldown_steps`."
        },
    )
    gate_cooldown_steps: int = field(
        default=50,
        metadata={"help": "Single-pass steps before a gate with `gate_fallback: temporary` arms again."},
    )
    max_active_steps: int | None = field(
        default=None,
        metadata={
            "help": "A budget: active steps after which the phase ends for good, whatever the gate says. Unset for "
            "none."
        },
    )
    alpha_decay_steps: int = field(
        default=0,
        metadata={
            "help": "Active steps over which α goes linearly to 0 once the gate has fired; 0 ends the active phase "
            "at once."
        },
    )
    snapshot_device: str = field(
        default="model",
        metadata={
            "help": "Where the copies of an active step are kept: 'model', beside the parameters, or 'cpu', in "
            "pinned host memory."
        },
    )
    snapshot_dtype: str | None = field(
        default=None,
        metadata={
            "help": "What the copy of the first gradient is kept in: 'bfloat16' or 'float32'; unset for the "
            "gradient's own."
        },
    )
    lookahead_diagnostics_steps: int = field(
        default=0,
        metadata={
            "help": "Compares every so many active steps with K real optimizer steps and measures the noise of the "
            "gradient, at the cost of K further passes each time; 0 for never."
        },
    )
    prompts_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of one optimizer step over all devices; sets `gradient_accumulation_steps` accordingly, "
            "so that a recipe is the same experiment on any number of GPUs."
        },
    )
    compact_batches: bool = field(
        default=True,
        metadata={
            "help": "Whether the rows of an optimizer step are sorted by completion length and their micro-batches "
            "trimmed, where that leaves the gradient what it is. Turn it off to have 'grpo' equal TRL bit for bit."
        },
    )
    prune_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Whether the passes after the first leave out completions whose advantage is 0, where the loss "
            "sees a completion through its advantage alone (no KL, no entropy bonus, no dropout). Needs "
            "`compact_batches`."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Pack micro-batches by tokens, padding included, instead of by rows. The first pass keeps its "
            "number of micro-batches, and exceeds this where it has to; later passes take as few as hold. Needs "
            "`compact_batches`."
        },
    )
    eval_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Problem sets, by name or file, that are scored every `eval_steps` steps as "
            "`eval/<benchmark>/avg@n`, sampled as in training and independent of `eval_strategy`."
        },
    )
    eval_samples: int = field(
        default=4,
        metadata={"help": "n, the completions of each problem of `eval_benchmarks`."},
    )
    eval_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Template of the user's message, with {problem} in it, for `eval_benchmarks`. Unset for the "
            "problem alone."
        },
    )
    eval_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message for `eval_benchmarks`. Unset for none."},
    )
    trajectory_steps: int | None = field(
        default=None,
        metadata={
            "help": "Saves the LoRA adapter alone, every so many steps, under `<output_dir>/trajectory/step-000010/`, "
            "for `gxpo extrapolate`. Unset for never."
        },
    )
    allow_low_precision_parameters: bool = field(
        default=False,
        metadata={
            "help": "Whether to accept trainable parameters stored in bf16 or fp16, where small steps, and with them "
            "the retention ratio, vanish in rounding."
        },
    )

    def __post_init__(self):
        if self.prompts_per_step is not None:
            self._set_accumulation()  # which DeepSpeed's own configuration is made from
        super().__post_init__()
        if self.prompts_per_step is not None and self.world_size != _launched_processes():
            raise ValueError(
                f"`prompts_per_step` took this for a run of {_launched_processes()} processes, and it has "
                f"{self.world_size}. Start it with `accelerate launch` or `torchrun`, or set "
                "`gradient_accumulation_steps` instead."
            )
        self._check_choices()
        self._check_numbers()
        self._check_combinations()
        if self.reposition_alpha > 1:
            warnings.warn(
                f"`reposition_alpha` is {self.reposition_alpha}: it moves beyond the lookahead point, where the "
                "papers stay at or before it (α ≤ 1).",
                stacklevel=2,
            )
        if self.update_rule != "grpo":
            self._check_precision_and_optimizer()

    def _check_choices(self) -> None:
        self._check_choice("update_rule", UPDATE_RULES)
        self._check_choice("retention", ("gradient", "update"))
        self._check_choice("probe_optimizer_state", ("carry", "rollback"))
        self._check_choice("ratio_anchor", ("rollout", "current"))
        self._check_choice("gate_signal", ("grad_norm", "entropy", "cosine", "never"))
        self._check_choice("gate_fallback", ("permanent", "temporary"))
        self._check_choice("snapshot_device", ("model", "cpu"))
        self._check_choice("snapshot_dtype", (None, "float32", "bfloat16"))

    def _check_numbers(self) -> None:
        self._check_at_least("lookahead_steps", 1 if self.update_rule == "sfpo" else 2)
        for name in ("reposition_alpha", "active_threshold", "active_threshold_relative"):
            self._check_at_least(name, 0.0)
        for name in ("gate_warmup_steps", "alpha_decay_steps", "lookahead_diagnostics_steps"):
            self._check_at_least(name, 0)
        for name in ("gate_patience", "gate_cooldown_steps", "eval_samples"):
            self._check_at_least(name, 1)
        self._check_at_least("gate_window", 2)
        for name in ("max_tokens_per_micro_batch", "max_active_steps", "trajectory_steps"):
            if getattr(self, name) is not None:
                self._check_at_least(name, 1)
        if not self.gate_threshold > 0:
            raise ValueError(
                f"`gate_threshold` must be above 0, got {self.gate_threshold}. To keep the active phase for the whole "
                "run, set `gate_signal: never`."
            )
        self._check_bounds("retention_min", self.retention_min, "retention_max", self.retention_max)
        self._check_bounds("scale_min", self.scale_min, "scale_max", self._resolved_scale_max)

    def _check_combinations(self) -> None:
        if self.max_tokens_per_micro_batch is not None and not self.compact_batches:
            raise ValueError(
                "`max_tokens_per_micro_batch` packs rows anew, and `compact_batches: false` forbids that. Set "
                "`compact_batches: true`, or leave the bound out."
            )
        if self.eval_benchmarks and not self.eval_steps:
            raise ValueError("`eval_benchmarks` needs to know when: set `eval_steps`.")

    def _set_accumulation(self) -> None:
        self._check_at_least("prompts_per_step", 1)
        steps = accumulation_steps(
            self.prompts_per_step, self.num_generations, self.per_device_train_batch_size, _launched_processes()
        )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"`gradient_accumulation_steps: {self.gradient_accumulation_steps}` contradicts `prompts_per_step: "
                f"{self.prompts_per_step}`, which takes {steps}. Leave one of them out."
            )
        self.gradient_accumulation_steps = steps

    def lookahead_rule(self) -> LookaheadRule:
        """The update rule as the update step reads it."""
        extrapolation = Extrapolation(
            lookahead_steps=self.lookahead_steps,
            retention=self.retention,
            active_threshold=self.active_threshold,
            active_threshold_relative=self.active_threshold_relative,
            retention_min=self.retention_min,
            retention_max=self.retention_max,
            scale_min=self.scale_min,
            scale_max=self._resolved_scale_max,
        )
        return LookaheadRule(
            probes=self.lookahead_steps if self.update_rule == "sfpo" else 2,
            alpha=self.reposition_alpha,
            extrapolation=None if self.update_rule == "sfpo" else extrapolation,
            rollback=self.probe_optimizer_state == "rollback",
            storage=Storage(
                on_host=self.snapshot_device == "cpu",
                grad_dtype=getattr(torch, self.snapshot_dtype) if self.snapshot_dtype else None,
            ),
        )

    def gate(self) -> Gate:
        """The gate, armed."""
        trigger = Trigger(
            threshold=math.inf if self.gate_signal == "never" else self.gate_threshold,
            window=self.gate_window,
            warmup_steps=self.gate_warmup_steps,
            patience=self.gate_patience,
            two_sided=self.gate_signal == "entropy",
            baseline=median_and_deviation if self.gate_robust else mean_and_deviation,
        )
        fallback = Fallback(
            decay_steps=self.alpha_decay_steps,
            cooldown_steps=self.gate_cooldown_steps if self.gate_fallback == "temporary" else math.inf,
            max_active_steps=math.inf if self.max_active_steps is None else self.max_active_steps,
        )
        return Gate(trigger, fallback)

    @property
    def _resolved_scale_max(self) -> float:
        # Below K = 2 nothing is extrapolated, and the bound must still lie above `scale_min`.
        return max(self.lookahead_steps, 2) / 2 + 1 if self.scale_max is None else self.scale_max

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")

    def _check_at_least(self, name: str, minimum: float) -> None:
        value = getattr(self, name)
        if not minimum <= value < math.inf:
            raise ValueError(f"`{name}` must be a finite number of at least {minimum}, got {value}.")

    def _check_bounds(self, lower_name: str, lower: float, upper_name: str, upper: float) -> None:
        if not lower <= upper:
            raise ValueError(
                f"`{lower_name}` must not be above `{upper_name}`, got {lower} and {upper}. Use -.inf and .inf for "
                "no bound."
            )

    def _check_precision_and_optimizer(self) -> None:
        if self.fp16:
            raise ValueError(
                "Lookahead updates don't support `fp16: true`: its loss scaler skips steps on its own. Use "
                "`bf16: true` (or neither, for fp32)."
            )
        optimizer = str(self.optim.value)
        for name, reason in OWN_STEP_OPTIMIZERS.items():
            if name in optimizer:
                raise ValueError(
                    f"Lookahead updates don't support `optim: {optimizer}`: {reason}. Use `optim: adamw_torch`."
                )
        if self.retention == "gradient" or self.update_rule != "gxpo":
            return
        if self.weight_decay > 0 and optimizer.startswith(COUPLED_DECAY_OPTIMIZERS):
            raise ValueError(
                f"`retention: update` reads the direction of a step from the parameters, and `optim: {optimizer}` "
                "adds its weight decay to the gradient, so that the two can't be told apart. Set `weight_decay: 0.0`, "
                "or `optim: adamw_torch`, or `retention: gradient`."
            )
        if self.gate_signal == "cosine":
            raise ValueError(
                "`gate_signal: cosine` needs the first gradient, which `retention: update` does not keep: it holds θ1 "
                "in its place, so that an active step stays at two copies of the model. Use another `gate_signal`, "
                "or `retention: gradient`."
            )


@dataclass
class LookaheadConfig(LookaheadArguments, GRPOConfig):
    r"""
    Configuration class for the [`LookaheadTrainer`].

    [`LookaheadConfig`] inherits every parameter from [`~trl.GRPOConfig`] and adds those of the lookahead policy
    updates, [`LookaheadArguments`].
    """
