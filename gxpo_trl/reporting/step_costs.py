"""When several passes over a batch pay in time: what runs logged of sampling and updates, and what must be saved.

s is the share of a plain step outside its update, and c the time of an active update divided by that of a plain one. A
run that reaches the same accuracy with f times fewer rollouts takes (s + c (1 - s)) / f of the time.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..run_folder import BACKWARD_PASSES, ELAPSED_TIME, is_number
from .arms import Arm
from .runs import Run


UPDATE_TIME, ACTIVE = "lookahead/update_time", "lookahead/active"
DECIDE_TIME = ("prompts_per_step", "per_device_train_batch_size", "num_generations", "num_iterations")
DECIDE_TIME += (
    "max_completion_length",
    "use_vllm",
    "gradient_checkpointing",
    "bf16",
    "compact_batches",
    "grouped_sampling",
)
"""Settings that must agree if the times of two runs are compared."""


@dataclass(frozen=True)
class StepTime:
    """The mean step of one entry of the log, or of the entries that share a batch of rollouts.

    Attributes:
        step, count (`int`): The last step, and how many they are.
        active (`float`): The share of steps that made several passes.
        passes (`float`, *optional*): Backward passes of a step.
        update (`float`): Seconds of a step for its passes.
        total (`float`, *optional*): Seconds of a step, evaluations left out.
    """

    step: int
    count: int
    active: float
    passes: float | None
    update: float
    total: float | None


@dataclass(frozen=True)
class Cost:
    """What the steps of an arm cost.

    Attributes:
        s (`float`, *optional*): Share of a plain step outside its update, in [0, 1]; `None` if no step was timed.
        c (`float`): Time of an active update divided by the time of a plain one.
        source (`str`): Where c is from.
        active (`float`): Share of the steps that were active.
    """

    s: float | None
    c: float
    source: str
    active: float

    @property
    def c_of_run(self) -> float:
        """c as the mean over all steps of the run, of which a part was active."""
        return 1 + self.active * (self.c - 1)


def factor_needed(s: float, c: float) -> float:
    """The factor of rollouts above which the time falls: s + c (1 - s)."""
    return s + c * (1 - s)


def share_needed(c: float, f: float) -> float | None:
    """The share s above which a factor f of rollouts saved pays: (c - f) / (c - 1), or 0 if any share will do.

    Args:
        c (`float`): Time of an update divided by the time of a plain one.
        f (`float`): Rollouts of the plain run divided by those of this one, for the same accuracy.

    Returns:
        `float | None`: In [0, 1); `None` if no rollouts are saved.
    """
    if f <= 1:
        return None
    return 0.0 if f > c else (c - f) / (c - 1)


def step_times(run: Run) -> list[StepTime]:
    """The steps of a run that logged the time of their update; those of one batch of rollouts are one."""
    checks = run.settings.get("update_rule") == "check"  # every step replays, and none is called active
    found, before = [], {"step": 0, BACKWARD_PASSES: 0.0, ELAPSED_TIME: 0.0}
    for entry in run.log:
        count = entry["step"] - before["step"]
        if count < 1 or not is_number(entry.get(UPDATE_TIME)):
            continue
        passes, total = (
            (entry[name] - before[name]) / count if is_number(entry.get(name)) and name in before else None
            for name in (BACKWARD_PASSES, ELAPSED_TIME)
        )
        total = total if total is not None and total > 0 else None
        active = 1.0 if checks else entry.get(ACTIVE, 0.0)
        found.append(StepTime(entry["step"], count, active, passes, entry[UPDATE_TIME], total))
        before = {name: entry[name] for name in before if is_number(entry.get(name))}
    return _by_batch(found, _steps_of_batch(run))


def _steps_of_batch(run: Run) -> int:
    """Optimizer steps that share a batch of rollouts: only the first of them samples."""
    accumulation = run.settings.get("gradient_accumulation_steps") or 1
    uses = (run.settings.get("steps_per_generation") or accumulation) * (run.settings.get("num_iterations") or 1)
    return max(-(-uses // accumulation), 1)


def _by_batch(steps: Sequence[StepTime], length: int) -> list[StepTime]:
    groups: dict[int, list[StepTime]] = {}
    for step in steps:
        groups.setdefault((step.step - 1) // length, []).append(step)
    return [_mean_step(group) for group in groups.values()]


def _mean_step(group: Sequence[StepTime]) -> StepTime:
    count = sum(step.count for step in group)

    def mean(name: str) -> float | None:
        values = [getattr(step, name) for step in group]
        return None if None in values else sum(v * s.count for v, s in zip(values, group, strict=True)) / count

    return StepTime(group[-1].step, count, *map(mean, ("active", "passes", "update", "total")))


def find_cost(arm: Arm, arms: Sequence[Arm], baseline: Arm | None = None) -> Cost | None:
    """s and c of an arm; `None` if it logged no active update.

    All times are medians over the steps of all seeds, so that a first step, a save or a slow moment does not count.
    Plain steps are those of a GRPO arm of the same size, or else the arm's own after its gate has closed. Without
    either, c is the number of passes.

    Args:
        arm (`Arm`): Of a rule that makes several passes.
        arms (`Sequence[Arm]`): Those of the report.
        baseline (`Arm`, *optional*): Of the GRPO arms of the same size the one to prefer.
    """
    steps = [step for run in arm.runs for step in step_times(run)]
    active = [step for step in steps if step.active == 1]
    if not active:
        return None
    share = sum(step.active * step.count for step in steps) / sum(step.count for step in steps)
    plain_arm = _plain_arm(arm, arms, baseline)
    if plain_arm is not None:
        plain, source = plain_steps(plain_arm), plain_arm.label
        last = max(step.step for step in active)
        during = [step for step in plain if step.step <= last] or plain
    else:
        plain = during = _after_shutoff(arm)
        source = "its own steps after shut-off"
    update = _median(active, "update")
    if plain and (plain_update := _median(during, "update")):
        return Cost(share_outside(plain), update / plain_update, source, share)
    c = _median(active, "passes")
    if c is None:
        return None
    total = _median(active, "total")
    s = None if total is None or total <= update else (total - update) / (total - update + update / c)
    return Cost(s, c, "passes (an estimate)", share)


def share_outside(plain: Sequence[StepTime]) -> float | None:
    """s of plain steps, in [0, 1]: the part of their time that the update does not take."""
    total, update = _median(plain, "total"), _median(plain, "update")
    return None if not total or update is None else max(1 - update / total, 0.0)


def plain_steps(arm: Arm) -> list[StepTime]:
    """The steps of an arm of GRPO, with the time of their update."""
    return [step for run in arm.runs for step in step_times(run) if step.active == 0]


def is_plain(arm: Arm) -> bool:
    """Whether an arm makes one pass over each batch, through our trainer, which logs the time of it."""
    return all(
        run.settings.get("update_rule") == "grpo" and run.settings.get("num_iterations", 1) == 1 for run in arm.runs
    )


def _after_shutoff(arm: Arm) -> list[StepTime]:
    return [
        step
        for run in arm.runs
        for step in step_times(run)
        if step.active == 0 and run.shutoff_step is not None and step.step > run.shutoff_step
    ]


def _plain_arm(arm: Arm, arms: Sequence[Arm], baseline: Arm | None) -> Arm | None:
    fitting = [other for other in arms if is_plain(other) and _size(other) == _size(arm) and plain_steps(other)]
    return baseline if baseline in fitting else next(iter(fitting), None)


def _size(arm: Arm) -> list:
    """What the time of a step follows from."""
    run = arm.runs[0]
    about = [run.about.get(name) for name in ("model", "trainable_parameters", "processes", "machine")]
    return [*about, run.about.get("completions_per_step"), *(run.settings.get(name) for name in DECIDE_TIME)]


def _median(steps: Sequence[StepTime], name: str) -> float | None:
    values = [value for step in steps if (value := getattr(step, name)) is not None]
    return statistics.median(values) if values else None
