"""Reads a run from its folder: settings, log and cost. It may be a run of this package or of plain TRL."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable
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
    TrainerState,
    is_number,
    is_step,
    is_there,
    parse_json,
    read_json,
    read_text,
    saved_steps,
)


COUNTS = ("gradient_accumulation_steps", "steps_per_generation", "num_iterations")
"""Settings from which rollouts are counted."""
METHODS = {"grpo": "GRPO", "check": "GRPO, checked", "sfpo": "SFPO", "gxpo": "GXPO"}
HELD_OUT = "held-out reward"
"""The name of what `eval_strategy` measures, as opposed to the benchmarks of `eval_benchmarks`."""


@dataclass(frozen=True)
class Point:
    """One evaluation during training, and what had been spent until then.

    Attributes:
        step (`int`): Optimizer steps taken.
        value (`float`): Mean accuracy or held-out reward.
        rollouts (`int`, *optional*): Completions sampled for training; `None` if the run does not record it.
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
        label (`str`): The name of its arm in tables and figures.
        log (`list[dict]`): The entries of its log, by step.
        finished (`bool`): Whether it has ended.
        about (`RunDescription`): The content of `run.json`; empty for a run of plain TRL.
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
        """GRPO, SFPO or GXPO, which determines its colour. Plain TRL counts as GRPO."""
        return METHODS.get(self.settings.get("update_rule"), "GRPO")

    @cached_property
    def points(self) -> dict[str, tuple[Point, ...]]:
        """The evaluations, by benchmark."""
        found: dict[str, dict[int, Point]] = {}
        spending = self._spending
        benchmarks = {name: match[1] for name in self._columns if (match := ACCURACY.fullmatch(name))}
        if "eval_reward" in self._columns:
            benchmarks["eval_reward"] = HELD_OUT
        for entry in self.log:
            for name, benchmark in benchmarks.items():
                if is_number(entry.get(name)):
                    found.setdefault(benchmark, {})[entry["step"]] = spending.point(entry, entry[name])
        return {benchmark: tuple(of_it[step] for step in sorted(of_it)) for benchmark, of_it in found.items()}

    @cached_property
    def _spending(self) -> "_Spending":
        return _Spending(self.log, self._rollouts_at)

    def _rollouts_at(self, step: int) -> int | None:
        """Completions sampled until then. A generation batch may serve several steps and iterations."""
        completions = self.about.get("completions_per_step")
        if completions is None:
            return None
        accumulation = self.settings.get("gradient_accumulation_steps") or 1
        per_generation = self.settings.get("steps_per_generation") or accumulation
        uses = per_generation * (self.settings.get("num_iterations") or 1)
        return math.ceil(step * accumulation / uses) * per_generation * completions // accumulation

    @property
    def metrics(self) -> list[str]:
        """The names of the logged metrics, in order."""
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
        return _last_step(self.log)

    @property
    def shutoff_step(self) -> int | None:
        """The step after which the active phase ended; `None` if it did not."""
        step = self.last(SHUTOFF_STEP)
        return None if step is None else int(step)

    @property
    def seconds(self) -> float | None:
        """Seconds of training, without evaluations; `None` if they are not known."""
        if (known := self._spending.seconds) and (elapsed := known[max(known)]) > 0:
            return elapsed
        runtime = self.last("train_runtime")  # of the last session, if the run was resumed
        seconds = 0.0 if runtime is None else runtime - sum(self.series("eval_runtime")[1])
        return seconds if seconds > 0 else None


def _amount(entry: dict[str, Any], name: str) -> float | None:
    """The amount that an entry records; `None` if there is none or it is not a valid one."""
    value = entry.get(name)
    return value if is_number(value) and value >= 0 else None


class _Spending:
    """What had been spent at each step, between logged steps by linear interpolation.

    Args:
        log (`Iterable[dict]`): The entries of a log, by step.
        rollouts_at (`Callable`): Completions until a step, where the log has none.

    Attributes:
        passes, seconds (`dict[int, float]`): Totals by the step of an entry.
    """

    def __init__(self, log: Iterable[dict[str, Any]], rollouts_at: Callable[[int], int | None]):
        self.rollouts_at = rollouts_at
        self.passes: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        seconds, last_step = 0.0, 0
        for entry in log:
            step, step_time = entry["step"], _amount(entry, "step_time")
            is_mean = "lookahead/update_time" not in entry  # of all steps since TRL's last log
            if (passes := _amount(entry, BACKWARD_PASSES)) is not None:
                self.passes[step] = passes
            if (elapsed := _amount(entry, ELAPSED_TIME)) is not None:
                self.seconds[step] = elapsed
            elif step_time is not None and is_mean:
                seconds += step_time * (step - last_step)
                self.seconds[step] = seconds
            if step_time is not None:
                last_step = step

    def point(self, entry: dict[str, Any], value: float) -> Point:
        step, rollouts = entry["step"], _amount(entry, EVAL_ROLLOUTS)
        if rollouts is None:
            rollouts = self.rollouts_at(step)
        passes = _amount(entry, EVAL_BACKWARD_PASSES)
        if passes is None:  # plain TRL makes one pass a step, and so does a step that is not logged yet
            passes = _interpolate(self.passes, step, 1)
        seconds = _amount(entry, EVAL_SECONDS)
        if seconds is None:
            seconds = _interpolate(self.seconds, step, 0) if self.seconds or not step else None
        hours = None if seconds is None else seconds / 3600
        return Point(step, value, None if rollouts is None else int(rollouts), round(passes), hours)


def _interpolate(totals: dict[int, float], step: int, further: float) -> float:
    """A total at a step. It begins with 0, and grows by `further` a step after the last one known."""
    known = sorted(({0: 0.0} | totals).items())
    for (s0, t0), (s1, t1) in itertools.pairwise(known):
        if s0 <= step < s1:
            return t0 + (step - s0) / (s1 - s0) * (t1 - t0)
    last, total = known[-1]
    return total + further * (step - last)


def holds_run(folder: str | Path) -> bool:
    """Whether something has been logged there, so that `load_run` can read it."""
    folder = Path(folder)
    states = [place / TRAINER_STATE_NAME for place in (folder, *saved_steps(folder).values())]
    return any(map(is_there, (folder / LOG_NAME, *states)))


def load_run(folder: str | Path, label: str | None = None) -> Run:
    """Reads a run's folder: its `log.jsonl`, or the `trainer_state.json` of a finished run or of its last checkpoint.

    Args:
        folder (`str` or `Path`): The run's output folder.
        label (`str`, *optional*): The name of its arm in tables and figures.

    Raises:
        ValueError: If the folder holds no run, or one of its files can't be read or is invalid. The message names the
            file.
    """
    folder = Path(folder)
    try:
        about = read_json(folder / RUN_NAME, RunDescription) if is_there(folder / RUN_NAME) else {}
        log, finished = _read_log(folder)
    except OSError as error:
        raise ValueError(f"{error.filename or folder} can't be read: {error.strerror}.") from error
    _check_counts(about, folder / RUN_NAME)
    return Run(folder, label or "", sorted(log, key=lambda entry: entry["step"]), finished, about)


def _check_counts(about: RunDescription, path: Path) -> None:
    counts = {name: about.get("settings", {}).get(name) for name in COUNTS}
    for name, count in (counts | {"completions_per_step": about.get("completions_per_step")}).items():
        if count is not None and count < 1:
            raise ValueError(f"{path}: `{name}` is {count}: at least 1 is expected.")


def _read_log(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    state, live = folder / TRAINER_STATE_NAME, folder / LOG_NAME
    if is_there(live) and not (is_there(state) and _written(state) >= _written(live)):
        entries = _read_lines(live)
        return entries, any("train_runtime" in entry for entry in entries[-1:])
    saved = [path / TRAINER_STATE_NAME for path in saved_steps(folder).values()]
    last = next((path for path in reversed(saved) if is_there(path)), None)
    if is_there(state):
        entries = _read_state(state)
        if last is not None and _written(last) > _written(state):  # a run that ended was continued
            continued = _read_state(last)
            if _last_step(continued) > _last_step(entries):
                return continued, False
        return entries, True
    if last is not None:
        return _read_state(last), False
    raise ValueError(
        f"{folder} holds no run: neither a {LOG_NAME} nor a {TRAINER_STATE_NAME}. Name a run's output folder."
    )


def _written(path: Path) -> float:
    return os.lstat(path).st_mtime


def _last_step(entries: list[dict[str, Any]]) -> int:
    return max((entry["step"] for entry in entries), default=0)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path).split("\n")
    entries = [(f"{path}, line {i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
    parsed = [(where, parse_json(line, where)) for where, line in entries if line is not lines[-1]]
    with contextlib.suppress(ValueError):  # the last line may be incomplete
        parsed += [(where, parse_json(line, where)) for where, line in entries if line is lines[-1]]
    return _with_steps(parsed)


def _read_state(path: Path) -> list[dict[str, Any]]:
    entries = read_json(path, TrainerState)["log_history"]
    return _with_steps((f"{path}, entry {i} of its log", entry) for i, entry in enumerate(entries, 1))


def _with_steps(entries: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The entries that have a step."""
    found = []
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is not an object.")
        if "step" in entry:
            if not is_step(entry["step"]):
                raise ValueError(f"{where}: `step` is {entry['step']!r:.40}: a whole number from 0 on is expected.")
            found.append(entry)
    return found
