"""Groups runs into arms: runs with the same settings, whatever their seeds."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run_folder import printable
from .runs import METHODS, Point, Run, load_run


NO_PART_OF_AN_ARM = (
    *("seed", "data_seed", "output_dir", "run_name", "max_steps", "disable_tqdm", "report_to"),
    *("log", "save_", "eval_", "do_eval", "hub_", "push_to_hub", "wandb_", "trackio_", "num_completions_to_print"),
    *("resume_from_checkpoint", "per_device_eval_batch_size", "num_generations_eval", "dataloader_"),
    *("trajectory_steps", "lookahead_diagnostics_steps"),
)
"""Beginnings of the names of settings that do not change what is learnt, and of the length of a run."""
LONGEST = 60
"""Characters of a setting in a label."""
SHORT = {"learning_rate": "lr", "lookahead_steps": "K", "reposition_alpha": "α", "gate_threshold": "τ"}
"""Short names of settings in labels; others keep their names."""
RULE = ("update_rule", "lookahead_", "reposition_", "gate_", "scale_", "retention", "active_", "probe_", "alpha_decay")
RULE += ("step_control", "extrapolation")
"""Beginnings of the names of settings that belong to a method."""


def arm_settings(run: Run) -> dict[str, Any]:
    """The settings that runs of one arm share."""
    left_out = NO_PART_OF_AN_ARM
    if run.settings.get("prompts_per_step"):  # then the accumulation depends on the number of devices
        left_out = (*left_out, "gradient_accumulation_steps", "steps_per_generation")
    return {name: value for name, value in run.settings.items() if not name.startswith(left_out)}


def arm_labels(runs: Sequence[Run]) -> list[str]:
    """The method of each run, and the settings that distinguish its arm from the others of that method."""
    differs = {method: _differences([run for run in runs if run.method == method]) for method in METHODS.values()}
    common = [name for name in _differences(runs) if not name.startswith(RULE)]
    labels = []
    for run in runs:
        names = [name for name in arm_settings(run) if name in differs[run.method] or name in common]
        shown = [f"{SHORT.get(name, name)} {_short(run.settings[name])}" for name in names]
        labels.append(", ".join([run.method if run.settings else "GRPO (TRL)", *shown]))
    return labels


def _differences(runs: Sequence[Run]) -> set[str]:
    """The settings in which the arms of these runs differ."""
    arms = [arm_settings(run) for run in runs if run.settings]
    return {name for arm in arms for name in arm if any(arm[name] != other.get(name) for other in arms)}


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed.

    Attributes:
        label (`str`): Its name in tables and figures.
        runs (`tuple[Run, ...]`): Its runs.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return self.runs[0].method

    def curves(self, benchmark: str) -> list[tuple[Point, ...]]:
        """The evaluations of each run that was evaluated."""
        return [run.points[benchmark] for run in self.runs if benchmark in run.points]

    def values(self, metric: str) -> list[float]:
        """All logged values of a metric, of all of its runs."""
        return [value for run in self.runs for value in run.series(metric)[1]]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Groups runs by their label into arms, in order."""
    labels = dict.fromkeys(run.label for run in runs)
    return [Arm(label, tuple(run for run in runs if run.label == label)) for label in labels]


def load_runs(names: Sequence[str], unreadable: list[str] | None = None) -> list[Run]:
    """Reads runs by folder, pattern, or `LABEL=folder`. Runs without a label get the label of their arm.

    Args:
        names (`Sequence[str]`): What to read.
        unreadable (`list[str]`, *optional*): Gets a sentence for each folder that can't be read and is left out.

    Raises:
        ValueError: If a name matches no folder, or, without `unreadable`, if a folder holds no readable run.
    """
    named: list[Run] = []
    for name in names:
        label, folders = _folders_of(name)
        for folder in folders:
            try:
                named.append(load_run(folder, printable(label) or None))
            except ValueError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
    labels = arm_labels(named)
    return [run if run.label else replace(run, label=label) for run, label in zip(named, labels, strict=True)]


def _folders_of(name: str) -> tuple[str, list[str]]:
    """The label and the folders of a name. Both may contain `=`: the shortest pattern that matches is used."""
    parts = name.split("=")
    for i in reversed(range(len(parts))):
        folders = sorted(path for path in glob.glob("=".join(parts[i:])) if Path(path).is_dir())
        if folders:
            return "=".join(parts[:i]), folders
    raise ValueError(f"There is no folder {parts[-1]}. Name the output folders of runs.")


def benchmarks_of(runs: Sequence[Run]) -> list[str]:
    """All benchmarks on which a run was evaluated."""
    return list(dict.fromkeys(benchmark for run in runs for benchmark in run.points))
