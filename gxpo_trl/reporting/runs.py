"""What a finished run left in its folder, read back for tables and figures."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One evaluation on the way.

    Attributes:
        step (`int`): Optimizer steps taken so far.
        rollouts (`int`): Completions sampled for training so far.
        backward_passes (`int`): Passes over a batch of rollouts so far.
        pass_at_1 (`float`): Mean held-out reward, in [0, 1].
    """

    step: int
    rollouts: int
    backward_passes: int
    pass_at_1: float


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label (`str`): How tables and figures call it.
        points (`tuple[Point, ...]`): Its evaluations, by step.
        seconds (`float`): Wall-clock seconds of training, evaluation left out.
        shutoff (`Point`, *optional*): Where the active phase ended, with pass@1 interpolated between the evaluations
            around it.
    """

    label: str
    points: tuple[Point, ...]
    seconds: float
    shutoff: Point | None = None


def load_run(folder: Path, label: str, rollouts_per_step: int) -> Run:
    """Reads `trainer_state.json` of a run that evaluated itself (`eval_strategy: steps`).

    Args:
        folder (`Path`): The run's output folder.
        label (`str`): How tables and figures call the run.
        rollouts_per_step (`int`): Completions sampled for one optimizer step.

    Raises:
        ValueError: If the folder holds no such file, or the run holds no evaluation.
    """
    path = Path(folder) / "trainer_state.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no trainer_state.json: is it the output folder of a finished run?")
    log = json.loads(path.read_text())["log_history"]
    passes, points, shutoff_step = {0: 0}, [], None
    for entry in log:
        step = entry["step"]
        if "lookahead/backward_passes" in entry:
            passes[step] = int(entry["lookahead/backward_passes"])
            shutoff_step = entry.get("lookahead/shutoff_step", shutoff_step)
        if "eval_reward" in entry:
            points.append(Point(step, step * rollouts_per_step, passes[step], entry["eval_reward"]))
    if not points:
        raise ValueError(f"The run in {folder} never evaluated itself: set `eval_strategy: steps` in its recipe.")
    seconds = sum(entry.get("train_runtime", 0.0) - entry.get("eval_runtime", 0.0) for entry in log)
    shutoff = None
    if shutoff_step is not None:
        step = int(shutoff_step)
        shutoff = Point(step, step * rollouts_per_step, passes[step], _interpolate(points, step))
    return Run(label, tuple(points), seconds, shutoff)


def _interpolate(points: list[Point], step: int) -> float:
    """pass@1 at a step, on the straight line between the evaluations before and after it."""
    before = max((p for p in points if p.step <= step), key=lambda p: p.step, default=points[0])
    after = min((p for p in points if p.step >= step), key=lambda p: p.step, default=points[-1])
    if after.step == before.step:
        return before.pass_at_1
    share = (step - before.step) / (after.step - before.step)
    return before.pass_at_1 + share * (after.pass_at_1 - before.pass_at_1)
