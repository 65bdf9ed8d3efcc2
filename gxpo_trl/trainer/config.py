"""The settings of the update rules."""

import math
import warnings
from dataclasses import dataclass, field
from typing import get_type_hints

import torch
from accelerate.utils import get_int_from_env
from trl import GRPOConfig

from ..checks import check_at_least
from ..engines.support import check_arguments
from ..update.gate import Gate, Trigger
from ..update.rule import LookaheadRule
from ..update.step_control import LEAST_OF_CHECK, TAKE_BACK_BELOW, StepControl, default_target
from ..values import read_value
from .rules import RULES, make_rule


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
        f"they are not a multiple of `per_device_train_batch_size: {per_device_batch_size}` × {processes} processes. "
        f"{remedy}."
    )


@dataclass
class LookaheadConfig(GRPOConfig):
    r"""
    Configuration class for the [`LookaheadTrainer`].

    [`LookaheadConfig`] inherits every parameter from [`~trl.GRPOConfig`] and adds those of the lookahead policy
    updates.

    Parameters:
        update_rule (`str`, *optional*, defaults to `"gxpo"`):
            How a batch of rollouts becomes an update: `"gxpo"` (three passes: two probes, extrapolation, correction),
            `"sfpo"` (K + 1 passes: K probes, correction), `"grpo"` (plain single pass through the same trainer) or
            `"check"` (that, with step control: after the first step on a batch one micro-batch says whether it was
            too long, for two micro-batches more than a pass).
        lookahead_steps (`int`, *optional*, defaults to `5`):
            K: for `"gxpo"` the virtual steps that the two probes are extrapolated to, or 1 for one probe and a
            correction from where it led (two passes, nothing extrapolated or repositioned); for `"sfpo"` the probes
            themselves.
        reposition_alpha (`float`, *optional*, defaults to `0.5`):
            α, the fraction of the way to the lookahead point that is taken; at least 0, in the papers at most 1.
        extrapolation (`str`, *optional*, defaults to `"displacement"`):
            How `"gxpo"` predicts K steps from the two probes: `"displacement"`, their displacement scaled coordinate
            by coordinate (the paper); or `"optimizer"`, K - 2 phantom steps, which are steps of the optimizer on the
            second gradient times ρ, ρ², …, with one ratio ρ for the model and without a pass over the batch.
        active_threshold (`float`, *optional*, defaults to `1e-8`):
            δ: coordinates where |g0| is not above it keep the observed two-step displacement.
        retention_min (`float`, *optional*, defaults to `-2.0`):
            Lower bound of the retention ratio; `-inf` for none.
        retention_max (`float`, *optional*, defaults to `3.0`):
            Upper bound of the retention ratio; `inf` for none.
        scale_max (`float`, *optional*):
            Upper bound of the factor from two steps to K; unset for K / 2 + 1, `inf` for none.
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
        max_active_steps (`int`, *optional*):
            A budget: active steps after which the phase ends permanently, whatever the gate says. Unset for none.
        alpha_decay_steps (`int`, *optional*, defaults to `0`):
            Active steps over which α goes linearly to 0 once the gate has fired; 0 ends the active phase at once.
        step_control (`str`, *optional*, defaults to `"none"`):
            What multiplies the scheduled learning rate: `"none"`, nothing; `"cosine"`, a number that grows where the
            first and the corrective gradient of a batch agree and shrinks where they don't, so that the learning rate
            need not be tuned. A step that went too far is taken back. `update_rule: check` always has it.
        step_control_target (`float`, *optional*):
            The cosine of the two gradients that is aimed at; unset for one by the number of passes and of completions
            in an optimizer step: 0.6 for two passes and 128 completions, 0.4 for three, 0.8 and 0.2 for two passes
            and 32 and 512; with `update_rule: check` as for two passes, and at least 0.6.
        step_control_gain (`float`, *optional*, defaults to `0.5`):
            κ: how fast the multiplier changes, as exp(κ (cosine - target)) a step; 0 keeps it at 1.
        snapshot_device (`str`, *optional*, defaults to `"model"`):
            Where the copies of an active step are kept: `"model"`, next to the parameters, or `"cpu"`, in pinned host
            memory.
        lookahead_diagnostics_steps (`int`, *optional*, defaults to `0`):
            Compares every so many active steps with K real optimizer steps and measures the noise of the gradient, at
            the cost of K further passes each time; 0 for never.
        prompts_per_step (`int`, *optional*):
            Prompts of one optimizer step over all devices; sets `gradient_accumulation_steps` accordingly, so that a
            recipe is the same experiment on any number of GPUs: prompts × `num_generations` =
            `per_device_train_batch_size` × processes × accumulation steps. Unset for what these come to.
        compact_batches (`bool`, *optional*, defaults to `True`):
            Whether the rows of an optimizer step are sorted by completion length and their micro-batches trimmed, and
            backward passes leave out completions whose advantage is 0, where that leaves the gradient what it
            is. Turn it off to have `update_rule: grpo` equal TRL bit for bit.
        max_tokens_per_micro_batch (`int`, *optional*):
            Pack micro-batches by tokens, padding included, instead of by rows. The first pass keeps its number of
            micro-batches, and exceeds this where it has to; later passes take as few as hold. Needs `compact_batches`.
        allow_low_precision_parameters (`bool`, *optional*, defaults to `False`):
            Whether to accept trainable parameters stored in bf16 or fp16, where small steps, and with them what later
            passes measure, vanish in rounding.
    """

    update_rule: str = field(
        default="gxpo",
        metadata={
            "help": "How a batch of rollouts becomes an update: 'gxpo' (three passes: two probes, extrapolation, "
            "correction), 'sfpo' (K + 1 passes: K probes, correction), 'grpo' (plain single pass through the same "
            "trainer) or 'check' (that, with step control: after the first step on a batch one micro-batch says "
            "whether it was too long, for two micro-batches more than a pass)."
        },
    )
    lookahead_steps: int = field(
        default=5,
        metadata={
            "help": "K: for 'gxpo' the virtual steps that the two probes are extrapolated to, or 1 for one probe and "
            "a correction from where it led (two passes, nothing extrapolated or repositioned); for 'sfpo' the "
            "probes themselves."
        },
    )
    reposition_alpha: float = field(
        default=0.5,
        metadata={
            "help": "α, the fraction of the way to the lookahead point that is taken; at least 0, in the papers at "
            "most 1."
        },
    )
    extrapolation: str = field(
        default="displacement",
        metadata={
            "help": "How 'gxpo' predicts K steps from the two probes: 'displacement', their displacement scaled "
            "coordinate by coordinate (the paper); or 'optimizer', K - 2 phantom steps, which are steps of the "
            "optimizer on the second gradient times ρ, ρ², …, with one ratio ρ for the model and without a pass over "
            "the batch."
        },
    )
    active_threshold: float = field(
        default=1e-8,
        metadata={"help": "δ: coordinates where |g0| is not above it keep the observed two-step displacement."},
    )
    retention_min: float = field(
        default=-2.0,
        metadata={"help": "Lower bound of the retention ratio; '-inf' for none."},
    )
    retention_max: float = field(
        default=3.0,
        metadata={"help": "Upper bound of the retention ratio; 'inf' for none."},
    )
    scale_max: float | None = field(
        default=None,
        metadata={"help": "Upper bound of the factor from two steps to K; unset for K / 2 + 1, 'inf' for none."},
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
    max_active_steps: int | None = field(
        default=None,
        metadata={
            "help": "A budget: active steps after which the phase ends permanently, whatever the gate says. Unset "
            "for none."
        },
    )
    alpha_decay_steps: int = field(
        default=0,
        metadata={
            "help": "Active steps over which α goes linearly to 0 once the gate has fired; 0 ends the active phase "
            "at once."
        },
    )
    step_control: str = field(
        default="none",
        metadata={
            "help": "What multiplies the scheduled learning rate: 'none', nothing; 'cosine', a number that grows "
            "where the first and the corrective gradient of a batch agree and shrinks where they don't, so that the "
            "learning rate need not be tuned. A step that went too far is taken back. 'check' always has it."
        },
    )
    step_control_target: float | None = field(
        default=None,
        metadata={
            "help": "The cosine of the two gradients that is aimed at; unset for one by the number of passes and of "
            "completions in an optimizer step: 0.6 for two passes and 128 completions, 0.4 for three, 0.8 and 0.2 "
            "for two passes and 32 and 512; with 'check' as for two passes, and at least 0.6."
        },
    )
    step_control_gain: float = field(
        default=0.5,
        metadata={"help": "κ: how fast the multiplier changes, as exp(κ (cosine - target)) a step; 0 keeps it at 1."},
    )
    snapshot_device: str = field(
        default="model",
        metadata={
            "help": "Where the copies of an active step are kept: 'model', next to the parameters, or 'cpu', in "
            "pinned host memory."
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
            "trimmed, and backward passes leave out completions whose advantage is 0, where that leaves the "
            "gradient what it is. Turn it off to have 'grpo' equal TRL bit for bit."
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
    allow_low_precision_parameters: bool = field(
        default=False,
        metadata={
            "help": "Whether to accept trainable parameters stored in bf16 or fp16, where small steps, and with them "
            "what later passes measure, vanish in rounding."
        },
    )

    def __post_init__(self):
        self._check_types()
        if self.prompts_per_step is not None:
            self._set_accumulation()  # which DeepSpeed's own configuration is made from
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16" not in str(error) or torch.accelerator.is_available():
                raise
            raise ValueError(
                "This machine has no GPU, and `bf16` is on unless it is set. Set `use_cpu: true`, and `bf16: false` "
                "for fp32."
            ) from error
        if self.prompts_per_step is not None and self.world_size != _launched_processes():
            raise ValueError(
                f"`prompts_per_step` took this for a run of {_launched_processes()} processes, and it has "
                f"{self.world_size}. Start it with `accelerate launch` or `torchrun`, or set "
                "`gradient_accumulation_steps` instead."
            )
        self._check_choice("update_rule", tuple(RULES))
        self._check_choice("extrapolation", ("displacement", "optimizer"))
        self._check_choice("ratio_anchor", ("rollout", "current"))
        self._check_choice("gate_signal", ("grad_norm", "entropy", "cosine", "never"))
        self._check_choice("step_control", ("none", "cosine"))
        self._check_choice("snapshot_device", ("model", "cpu"))
        self._check_numbers()
        self._warn_of_defaults()
        if self.update_rule == "gxpo" and self.extrapolation == "optimizer":
            self._check_phantom_steps()
        self._check_step_control()
        if self.max_tokens_per_micro_batch is not None and not self.compact_batches:
            raise ValueError(
                "`max_tokens_per_micro_batch` repacks rows, and `compact_batches: false` forbids that. Set "
                "`compact_batches: true`, or leave the bound out."
            )
        if self.reposition_alpha > 1:
            warnings.warn(
                f"`reposition_alpha` is {self.reposition_alpha}: it moves beyond the lookahead point, where the "
                "papers stay at or before it (α ≤ 1).",
                stacklevel=2,
            )
        if self.update_rule != "grpo":
            check_arguments(self)

    def _check_step_control(self) -> None:
        if self.update_rule == "check":
            self.step_control = "cosine"
            if self.gradient_accumulation_steps < 2:
                raise ValueError(
                    "`update_rule: check` replays one micro-batch of several, and `gradient_accumulation_steps` is "
                    f"{self.gradient_accumulation_steps}. Set a smaller `per_device_train_batch_size`, or "
                    "`update_rule: gxpo` with `lookahead_steps: 1` and `step_control: cosine`, which makes two passes."
                )
        if self.step_control != "none" and self.update_rule == "grpo":
            raise ValueError(
                "`step_control: cosine` compares two gradients of a batch, and `update_rule: grpo` has one. Set "
                "`update_rule: check`, or `update_rule: gxpo` with `lookahead_steps: 1`, which makes two passes, or "
                "`step_control: none`."
            )
        repositions = self.update_rule == "sfpo" or self.update_rule == "gxpo" and self.lookahead_steps > 1
        if self.step_control != "none" and repositions and self.reposition_alpha == 0:
            raise ValueError(
                "`step_control: cosine` compares the gradients at both ends of the move by `reposition_alpha`, and "
                "with 0 there is none. Set `reposition_alpha` above 0, or `step_control: none`."
            )

    def _warn_of_defaults(self) -> None:
        """Of this class, whose defaults are GXPO's, for another rule."""
        names = ("lookahead_steps", "reposition_alpha", "gate_signal", "gate_threshold")
        has_gxpos = all(getattr(self, n) == getattr(type(self), n) == getattr(LookaheadConfig, n) for n in names)
        if self.update_rule == "sfpo" and has_gxpos:
            warnings.warn(
                "`update_rule: sfpo` has GXPO's defaults for " + ", ".join(f"`{name}`" for name in names) + ". "
                "`SFPOConfig` has those of the SFPO paper, and LookaheadTrainer takes it too.",
                stacklevel=4,
            )

    def _check_types(self) -> None:
        kinds = get_type_hints(LookaheadConfig)
        for name in LookaheadConfig.__annotations__:
            try:
                setattr(self, name, read_value(getattr(self, name), kinds[name]))
            except ValueError as error:
                raise ValueError(f"`{name}`: {error}") from error

    def _check_numbers(self) -> None:
        check_at_least("lookahead_steps", self.lookahead_steps, RULES[self.update_rule].fewest_steps)
        for name in ("reposition_alpha", "active_threshold"):
            check_at_least(name, getattr(self, name), 0.0)
        for name in ("gate_warmup_steps", "alpha_decay_steps", "lookahead_diagnostics_steps"):
            check_at_least(name, getattr(self, name), 0)
        if self.max_grad_norm is None:
            raise ValueError("`max_grad_norm` must be a number. For no clipping, set it to 0.")
        check_at_least("gate_patience", self.gate_patience, 1)
        check_at_least("gate_window", self.gate_window, 2)
        for name in ("max_tokens_per_micro_batch", "max_active_steps"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if not self.gate_threshold > 0:
            raise ValueError(
                f"`gate_threshold` must be above 0, got {self.gate_threshold}. To keep the active phase for the whole "
                "run, set `gate_signal: never`."
            )
        if not self.retention_min <= self.retention_max:
            raise ValueError(
                f"`retention_min` must not be above `retention_max`, got {self.retention_min} and "
                f"{self.retention_max}. Use -.inf and .inf for no bound."
            )
        check_at_least("step_control_gain", self.step_control_gain, 0.0)
        if self.step_control_target is not None and not TAKE_BACK_BELOW < self.step_control_target < 1:
            raise ValueError(
                f"`step_control_target` must be a cosine above {TAKE_BACK_BELOW}, from where on steps are taken back, "
                f"and below 1, got {self.step_control_target}."
            )
        if self.scale_max is not None and not self.scale_max >= 1:
            raise ValueError(f"`scale_max` must be at least 1, the scale of two steps, got {self.scale_max}.")

    def _check_phantom_steps(self) -> None:
        if self.lookahead_steps < 3:
            raise ValueError(
                "`extrapolation: optimizer` takes K - 2 phantom steps, and `lookahead_steps` is "
                f"{self.lookahead_steps}. Set it to 3 or more, or set `extrapolation: displacement`."
            )
        of_scale = ("active_threshold", "retention_min", "retention_max", "scale_max")
        changed = [name for name in of_scale if getattr(self, name) != getattr(LookaheadConfig, name)]
        if changed:
            raise ValueError(
                f"`{'`, `'.join(changed)}` bound the scale of the displacement, and `extrapolation: optimizer` scales "
                "none. Leave them out, or set `extrapolation: displacement`."
            )

    def _set_accumulation(self) -> None:
        for name in ("prompts_per_step", "num_generations", "per_device_train_batch_size"):
            check_at_least(name, getattr(self, name), 1)
        steps = accumulation_steps(
            self.prompts_per_step, self.num_generations, self.per_device_train_batch_size, _launched_processes()
        )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"`gradient_accumulation_steps: {self.gradient_accumulation_steps}` contradicts `prompts_per_step: "
                f"{self.prompts_per_step}`, which takes {steps}. Leave one of them out."
            )
        self.gradient_accumulation_steps = steps

    def check_prompts(self, count: int) -> None:
        """Refuses fewer prompts than a generation batch takes: TRL would train no step on them, without a word.

        Raises:
            ValueError: Names the settings.
        """
        needed = self.generation_batch_size // self.num_generations
        if count < needed:
            raise ValueError(
                f"The data have {count} prompt(s), and a generation batch takes {needed} (`generation_batch_size` "
                f"{self.generation_batch_size} / `num_generations` {self.num_generations}), so that no step could be "
                "trained. Add data, or set a smaller `gradient_accumulation_steps` or `per_device_train_batch_size`."
            )

    @property
    def steps_of_batch(self) -> int:
        """Optimizer steps that a batch of rollouts lasts for."""
        micro_batches = self.steps_per_generation * self.num_iterations
        return math.ceil(micro_batches / self.gradient_accumulation_steps)

    def lookahead_rule(self) -> LookaheadRule | None:
        """The update rule as the update step reads it; `None` for TRL's own single pass."""
        return make_rule(self)

    def control(self) -> StepControl | None:
        """The step control, as a run begins with it; `None` for none."""
        if self.step_control == "none":
            return None
        target, rule = self.step_control_target, self.lookahead_rule()
        if target is not None:
            return StepControl.from_start(target, self.step_control_gain)
        completions = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if rule is None:
            halfway = default_target(2, completions)
            return StepControl.from_start(max(halfway, LEAST_OF_CHECK), self.step_control_gain, search_target=halfway)
        target = default_target(rule.passes + 0.6 * rule.phantom_steps, completions)
        return StepControl.from_start(target, self.step_control_gain)

    def gate(self) -> Gate:
        """The gate, open."""
        trigger = Trigger(
            threshold=math.inf if self.gate_signal == "never" else self.gate_threshold,
            window=self.gate_window,
            warmup_steps=self.gate_warmup_steps,
            patience=self.gate_patience,
            two_sided=self.gate_signal == "entropy",
        )
        most = math.inf if self.max_active_steps is None else self.max_active_steps
        return Gate(trigger, decay_steps=self.alpha_decay_steps, max_active_steps=most)

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
