"""A run read back from its folder: what it was, how it went, what it cost. Of this package, or of plain TRL."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..run_folder import (
    ACCURACY,
    BACKWARD_PASSES,
    ELAPSED_TIME,
    EVAL_BACKWARD_PASSES,
    EVAL_ROLLOUTS,
    EVAL_SECONDS,
    LOG_NAME,
    RUN_NAME,
    SHUTOFF_STEP,
    TRAINER_STATE_NAME,
    RunDescription,
    saved_steps,
)


METHODS = {"grpo": "GRPO", "sfpo": "SFPO", "gxpo": "GXPO"}
HELD_OUT = "held-out reward"
"""What `eval_strategy` measures, beside benchmarks of `eval_benchmarks`."""


@dataclass(frozen=True)
class Point:
    """One evaluation on the way, and what had been spent until then.

    Attributes:
        step (`int`): Optimizer steps taken.
        value (`float`): Mean accuracy or held-out reward.
        rollouts (`int`, *optional*): Completions sampled for training; `None` where the run does not say.
        backward_passes (`int`): Passes over a batch of rollouts.
        hours (`float`, *optional*): Of training, evaluations left out.
    """

    step: int
    value: float
    rollouts: int | None
    backward_passes: int
    hours: float | None

    def spent(self, budget: str) -> float | None:
        """What had been spent of `step`, `rollouts`, `backward_passes` or `hours`."""
        return getattr(self, budget)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder (`Path`): Its output folder.
        label (`str`): How tables and figures call its arm.
        log (`list[dict]`): The entries of its log, by step.
        finished (`bool`): Whether it came to its end.
        about (`RunDescription`): What `run.json` says; empty for a run of plain TRL.
    """

    folder: Path
    label: str
    log: list[dict[str, Any]]
    finished: bool = True
    about: RunDescription = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return self.about.get("settings", {})

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    @property
    def method(self) -> str:
        """GRPO, SFPO or GXPO, which decides its colour; plain TRL is GRPO here."""
        return METHODS.get(self.settings.get("update_rule"), "GRPO")

    @cached_property
    def points(self) -> dict[str, tuple[Point, ...]]:
        """The evaluations, by benchmark."""
        found: dict[str, dict[int, Point]] = {}
        spending = _Spending(self._rollouts_at)
        benchmarks = {name: match[1] for name in self._columns if (match := ACCURACY.fullmatch(name))}
        if "eval_reward" in self._columns:
            benchmarks["eval_reward"] = HELD_OUT
        for entry in self.log:
            spending.see(entry)
            for name, benchmark in benchmarks.items():
                if is_number(entry.get(name)):
                    found.setdefault(benchmark, {})[entry["step"]] = spending.point(entry, entry[name])
        return {benchmark: tuple(of_it[step] for step in sorted(of_it)) for benchmark, of_it in found.items()}

    def _rollouts_at(self, step: int) -> int | None:
        """Completions sampled until then: those of a generation batch serve several steps, several times over."""
        completions = self.about.get("completions_per_step")
        if completions is None:
            return None
        accumulation = self.settings.get("gradient_accumulation_steps") or 1
        per_generation = self.settings.get("steps_per_generation") or accumulation
        uses = per_generation * self.settings.get("num_iterations", 1)
        return math.ceil(step * accumulation / uses) * per_generation * completions // accumulation

    @property
    def metrics(self) -> list[str]:
        """The names of what the log holds, in its order."""
        return list(self._columns)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """A metric of the log against the step."""
        return self._columns.get(name, ([], []))

    @cached_property
    def _columns(self) -> dict[str, tuple[list[int], list[float]]]:
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for entry in self.log:
            step = entry["step"]
            for name, value in entry.items():
                if is_number(value):
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
        return columns

    def last(self, name: str) -> float | None:
        """The last value of a metric, or `None`."""
        values = self.series(name)[1]
        return values[-1] if values else None

    @property
    def steps(self) -> int:
        return max((entry["step"] for entry in self.log), default=0)

    @property
    def shutoff_step(self) -> int | None:
        """The step after which the active phase was over; `None` if it never was."""
        step = self.last(SHUTOFF_STEP)
        return None if step is None else int(step)

    @property
    def seconds(self) -> float | None:
        """Of training, evaluations left out."""
        elapsed = self.last(ELAPSED_TIME)
        if elapsed is not None:
            return elapsed
        runtime = self.last("train_runtime")
        return None if runtime is None else runtime - sum(self.series("eval_runtime")[1])


def is_number(value: Any) -> bool:
    """Whether it is a finite one."""
    return isinstance(value, (int, float)) and math.isfinite(value)


class _Spending:
    """Adds up what was spent while the log is read."""

    def __init__(self, rollouts_at: Callable[[int], int | None]):
        self.rollouts_at = rollouts_at
        self.passes: int | None = None
        self.passes_step = 0
        self.seconds: float | None = None
        self.last_step = 0

    def see(self, entry: dict[str, Any]) -> None:
        step = entry["step"]
        if BACKWARD_PASSES in entry:
            self.passes, self.passes_step = int(entry[BACKWARD_PASSES]), step
        if ELAPSED_TIME in entry:
            self.seconds = entry[ELAPSED_TIME]
        elif "step_time" in entry and "lookahead/update_time" not in entry:  # plain TRL: the mean since its last log
            self.seconds = (self.seconds or 0.0) + entry["step_time"] * (step - self.last_step)
        if "step_time" in entry:
            self.last_step = step

    def point(self, entry: dict[str, Any], value: float) -> Point:
        step, rollouts = entry["step"], entry.get(EVAL_ROLLOUTS)
        if rollouts is None:
            rollouts = self.rollouts_at(step)
        passes = entry.get(EVAL_BACKWARD_PASSES)
        if passes is None:  # plain TRL makes one pass a step, and so does a step that is not logged yet
            passes = step if self.passes is None else self.passes + step - self.passes_step
        seconds = entry.get(EVAL_SECONDS, self.seconds if step else 0.0)
        hours = None if seconds is None else seconds / 3600
        return Point(step, value, None if rollouts is None else int(rollouts), int(passes), hours)


def holds_run(folder: str | Path) -> bool:
    """Whether something has been logged there, so that `load_run` can read it."""
    folder = Path(folder)
    states = [place / TRAINER_STATE_NAME for place in (folder, *saved_steps(folder).values())]
    return any(path.is_file() for path in (folder / LOG_NAME, *states))


def load_run(folder: str | Path, label: str | None = None) -> Run:
    """Reads a run's folder: its `log.jsonl`, or the `trainer_state.json` of a finished run or of its last checkpoint.

    Args:
        folder (`str` or `Path`): The run's output folder.
        label (`str`, *optional*): How tables and figures call its arm.

    Raises:
        ValueError: If the folder holds no run.
    """
    folder = Path(folder)
    about = _read_json(folder / RUN_NAME) if (folder / RUN_NAME).is_file() else {}
    log, finished = _read_log(folder)
    return Run(folder, label or "", sorted(log, key=lambda entry: entry["step"]), finished, about)


def _read_log(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    state, live = folder / TRAINER_STATE_NAME, folder / LOG_NAME
    if live.is_file() and not (state.is_file() and state.stat().st_mtime >= live.stat().st_mtime):
        lines = [line for line in live.read_text().splitlines() if line.endswith("}")]  # the last may be half written
        entries = [entry for entry in map(json.loads, lines) if "step" in entry]
        return entries, any("train_runtime" in entry for entry in entries[-1:])
    if state.is_file():
        return _read_json(state)["log_history"], True
    for checkpoint in reversed(saved_steps(folder).values()):
        if (checkpoint / TRAINER_STATE_NAME).is_file():
            return _read_json(checkpoint / TRAINER_STATE_NAME)["log_history"], False
    raise ValueError(
        f"{folder} holds no run: neither a {LOG_NAME} nor a {TRAINER_STATE_NAME}. Name a run's output folder."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no whole JSON file: {error}.") from error
