"""What a run's own measurements say about its settings: one warning each, with the remedy."""

import statistics
from collections import deque
from collections.abc import Iterator

from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..update.gate import Gate
from ..update.measurements import StepReport
from .config import LookaheadConfig


logger = get_logger(__name__)

SHORT_REACH_STEPS = 20
FLAT_GROUPS_STEPS = 20


class FlatGroupsCallback(TrainerCallback):
    """Warns once where most groups have one reward for all of their completions, from what TRL logs."""

    def __init__(self):
        self.shares: list[tuple[int, float]] = []  # of each log entry: its steps, and the share of such groups
        self.logged_at = 0
        self.said = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.shares, self.logged_at = [], state.global_step  # a resumed run has logged nothing yet

    def on_log(self, args, state, control, logs=None, **kwargs):
        share = (logs or {}).get("frac_reward_zero_std")
        if share is None or self.said:
            return
        self.shares.append((state.global_step - self.logged_at, share))
        self.logged_at = state.global_step
        if (steps := sum(steps for steps, _ in self.shares)) < FLAT_GROUPS_STEPS:
            return
        mean = sum(steps * share for steps, share in self.shares) / steps
        self.shares = []
        if mean > 0.5:
            self.said = True
            logger.warning(
                f"In the last {steps} steps, {mean:.0%} of the groups had the same reward for all of their "
                "completions (`frac_reward_zero_std`): they were sampled and teach nothing. Raise `temperature` or "
                "`num_generations`, or take problems that the model solves now and then."
            )


class Advisor:
    """Listens to every active step, and speaks up once on each subject."""

    def __init__(self, args: LookaheadConfig):
        self.args = args
        self.multipliers: deque[float] = deque(maxlen=SHORT_REACH_STEPS)
        self.said: set[str] = set()

    def advise(self, report: StepReport, gate: Gate) -> Iterator[str]:
        """Takes one active step, after the gate has seen it.

        Yields:
            `str`: Warnings that have not been given before.
        """
        for subject, advice in self._all(report, gate):
            if subject not in self.said:
                self.said.add(subject)
                yield advice

    def _all(self, report: StepReport, gate: Gate) -> Iterator[tuple[str, str]]:
        if self.args.update_rule == "gxpo" and report.effective_multiplier is not None:
            self.multipliers.append(report.effective_multiplier)
            if len(self.multipliers) == SHORT_REACH_STEPS and statistics.fmean(self.multipliers) < 1.0:
                yield (
                    "reach",
                    f"Over the last {SHORT_REACH_STEPS} steps the reposition moved "
                    f"{statistics.fmean(self.multipliers):.2f} times as far as the two probes: it gives back what "
                    "they cost. Raise `reposition_alpha` or `lookahead_steps`.",
                )
        noise = report.diagnostics.get("noise_retention_std")
        if noise and report.retention_std is not None and noise >= report.retention_std:
            yield (
                "noise",
                f"The same gradient computed twice has a retention ratio of standard deviation {noise:.3g}, and that "
                f"of the two probes {report.retention_std:.3g}: what is extrapolated is noise. Raise the learning "
                "rate, or compute in fp32.",
            )
        tripped = gate.decaying > 0 or not gate.active
        first_armed = max(gate.trigger.warmup_steps, 2) + gate.trigger.patience
        if tripped and gate.observed == first_armed and gate.active_steps < gate.max_active_steps:
            yield (
                "gate",
                f"The gate fired in the first step in which it could, step {gate.active_steps}: the signal was no "
                "steadier than its own noise. Raise `gate_threshold` or `gate_patience`.",
            )
