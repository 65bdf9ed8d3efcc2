"""What counts as one arm: runs that were told to learn the same thing, whatever their seeds."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .runs import METHODS, Point, Run, load_run


NO_PART_OF_AN_ARM = (
    *("seed", "data_seed", "output_dir", "run_name", "max_steps", "disable_tqdm", "report_to"),
    *("log", "save_", "eval_", "do_eval", "hub_", "push_to_hub", "wandb_", "trackio_", "num_completions_to_print"),
    *("resume_from_checkpoint", "per_device_eval_batch_size", "num_generations_eval", "dataloader_"),
    *("trajectory_steps", "lookahead_diagnostics_steps"),
)
"""How the names of settings begin that change nothing about what is learnt, and of the length of a run."""
SHORT = {"learning_rate": "lr", "lookahead_steps": "K", "reposition_alpha": "α", "gate_threshold": "τ"}
"""How labels call settings; others go by their names."""
RULE = ("update_rule", "lookahead_", "reposition_", "gate_", "scale_", "retention", "active_", "probe_", "alpha_decay")
"""How the names of settings begin that only one method has, or that methods have of their own."""


def arm_settings(run: Run) -> dict[str, Any]:
    """The settings that runs of one arm share."""
    left_out = NO_PART_OF_AN_ARM
    if run.settings.get("prompts_per_step"):  # then the accumulation follows from the number of devices
        left_out = (*left_out, "gradient_accumulation_steps", "steps_per_generation")
    return {name: value for name, value in run.settings.items() if not name.startswith(left_out)}


def arm_labels(runs: Sequence[Run]) -> list[str]:
    """The method of each run, and the settings that tell its arm from the others of that method."""
    differs = {method: _differences([run for run in runs if run.method == method]) for method in METHODS.values()}
    common = [name for name in _differences(runs) if not name.startswith(RULE)]
    labels = []
    for run in runs:
        names = [name for name in arm_settings(run) if name in differs[run.method] or name in common]
        shown = [f"{SHORT.get(name, name)} {_short(run.settings[name])}" for name in names]
        labels.append(", ".join([run.method if run.settings else "GRPO (TRL)", *shown]))
    return labels


def _differences(runs: Sequence[Run]) -> set[str]:
    """The settings of arms that not all of these runs share."""
    arms = [arm_settings(run) for run in runs if run.settings]
    return {name for arm in arms for name in arm if any(arm[name] != other.get(name) for other in arms)}


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        label (`str`): What tables and figures call it.
        runs (`tuple[Run, ...]`): Its runs.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        return self.runs[0].method

    def curves(self, benchmark: str) -> list[tuple[Point, ...]]:
        """The evaluations of each run that has some."""
        return [run.points[benchmark] for run in self.runs if benchmark in run.points]

    def values(self, metric: str) -> list[float]:
        """All that was logged of a metric, by all of its runs."""
        return [value for run in self.runs for value in run.series(metric)[1]]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Runs of one label are an arm, in the order in which they come."""
    labels = dict.fromkeys(run.label for run in runs)
    return [Arm(label, tuple(run for run in runs if run.label == label)) for label in labels]


def load_runs(names: Sequence[str]) -> list[Run]:
    """Reads runs by folder, pattern, or `LABEL=folder`. Those without a label get that of their arm.

    Raises:
        ValueError: If a name matches no folder, or a folder holds no run.
    """
    named: list[Run] = []
    for name in names:
        label, _, pattern = name.rpartition("=")
        folders = sorted(path for path in glob.glob(pattern) if Path(path).is_dir())
        if not folders:
            raise ValueError(f"There is no folder {pattern}. Name the output folders of runs.")
        named += [load_run(folder, label or None) for folder in folders]
    labels = arm_labels(named)
    return [run if run.label else replace(run, label=label) for run, label in zip(named, labels, strict=True)]


def benchmarks_of(runs: Sequence[Run]) -> list[str]:
    """All benchmarks that some run was evaluated on."""
    return list(dict.fromkeys(benchmark for run in runs for benchmark in run.points))
