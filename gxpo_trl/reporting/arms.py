"""Groups runs into arms: runs with the same settings, whatever their seeds."""

import glob
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..run_folder import printable
from .runs import Point, Run, load_run


NO_PART_OF_AN_ARM = (
    *("seed", "data_seed", "output_dir", "run_name", "max_steps", "disable_tqdm", "report_to"),
    *("log", "save_", "eval_", "do_eval", "hub_", "push_to_hub", "wandb_", "trackio_", "num_completions_to_print"),
    *("resume_from_checkpoint", "per_device_eval_batch_size", "num_generations_eval", "dataloader_"),
    *("trajectory_steps", "lookahead_diagnostics_steps"),
)
"""Beginnings of the names of settings that do not change what is learnt, and of the length of a run."""
FACTS = ("model", "rewards", "training_examples")
"""What decides what is learnt, in addition to the settings and the adapter."""
OURS = ("LookaheadTrainer", "GXPOTrainer", "SFPOTrainer")
"""Trainers that differ in nothing but their settings."""
NO_PART_OF_AN_ADAPTER = (
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    "task_type",
)
"""Settings of an adapter that are said elsewhere, or change nothing."""
LONGEST = 60
"""Characters of a setting in a label."""
SHORT = {"learning_rate": "lr", "lookahead_steps": "K", "reposition_alpha": "α", "gate_threshold": "τ"}
"""Short names of settings in labels; others keep their names."""
RULE = ("update_rule", "lookahead_", "reposition_", "gate_", "scale_", "retention", "active_", "probe_", "alpha_decay")
RULE += ("step_control", "extrapolation")
"""Beginnings of the names of settings that belong to a method."""


def arm_settings(run: Run) -> dict[str, Any]:
    """What runs of one arm share, by name: their settings, and what else decides what is learnt."""
    left_out = NO_PART_OF_AN_ARM
    if run.settings.get("prompts_per_step"):  # then the accumulation depends on the number of devices
        left_out = (*left_out, "gradient_accumulation_steps", "steps_per_generation")
    settings = {name: value for name, value in run.settings.items() if not name.startswith(left_out)}
    if "resume_adapter" in settings:  # one of each seed
        settings["resume_adapter"] = settings["resume_adapter"] is not None
    facts = {name: run.about[name] for name in FACTS if name in run.about}
    if "update_rule" in settings and "trainer" in run.about:  # elsewhere it is the method's name
        facts["trainer"] = OURS[0] if run.about["trainer"] in OURS else run.about["trainer"]
    if "adapter" in run.about:
        adapter = run.about["adapter"] or {}
        facts["adapter"] = adapter.get("peft_type") if adapter else "none"
        facts |= {f"adapter {name}": adapter[name] for name in adapter if name not in NO_PART_OF_AN_ADAPTER}
    return settings | facts


def arm_labels(runs: Sequence[Run]) -> list[str]:
    """The method of each run, and what distinguishes its arm from the others of that method. Runs have the same label
    if nothing does.
    """
    kinds = [_kind(run) for run in runs]
    differs = {
        kind: differences([run for run, other in zip(runs, kinds, strict=True) if other == kind]) for kind in kinds
    }
    common = {name for name in differences(runs) if not name.startswith(RULE)}
    unknown = [run.folder for run in runs if not run.about]
    found: dict[tuple, str] = {}
    labels = []
    for run, kind in zip(runs, kinds, strict=True):
        shared = arm_settings(run)
        arm = (kind, *((name, _exact(shared[name])) for name in sorted(differs[kind] & shared.keys())))
        shown = [
            f"{SHORT.get(name, name)} {_short(shared[name])}" for name in shared if name in differs[kind] | common
        ]
        if not run.about and len(unknown) > 1:  # whether they belong together is not known
            arm, shown = (kind, run.folder), [str(run.folder)]
        if arm not in found:
            label = ", ".join([kind, *shown])
            numbered = (label if i == 1 else f"{label} ({i})" for i in itertools.count(1))
            found[arm] = next(label for label in numbered if label not in found.values())
        labels.append(found[arm])
    return labels


def _kind(run: Run) -> str:
    """The method, or the trainer of a run of TRL's own trainers."""
    if "update_rule" in run.settings:
        return run.method
    return f"{run.about.get('trainer', 'GRPOTrainer').removesuffix('Trainer')} (TRL)"


def differences(runs: Sequence[Run]) -> set[str]:
    """The names in which the arms of these runs differ. One that only some of them have, as those of a newer version,
    does not tell them apart.
    """
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in arm_settings(run).items():
            values.setdefault(name, set()).add(_exact(value))
    return {name for name, found in values.items() if len(found) > 1}


def _exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = " + ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


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


def shown_setting(arm: Arm, name: str) -> str | None:
    """The value of a setting, or of what else tells arms apart, as in a label; `None` if there is none."""
    shared = arm_settings(arm.runs[0])
    return _short(shared[name]) if name in shared else None


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Groups runs by their label into arms, in order."""
    labels = dict.fromkeys(run.label for run in runs)
    return [Arm(label, tuple(run for run in runs if run.label == label)) for label in labels]


def load_runs(names: Sequence[str], unreadable: list[str] | None = None) -> list[Run]:
    """Reads runs by folder, pattern, or `LABEL=folder`. Runs without a label get the label of their arm.

    Args:
        names (`Sequence[str]`): What to read. A folder that is named twice is read once.
        unreadable (`list[str]`, *optional*): Gets a sentence for each folder that can't be read and is left out.

    Raises:
        ValueError: If a name matches no folder, or, without `unreadable`, if a folder holds no readable run.
    """
    named: list[Run] = []
    seen: set[Path] = set()
    for name in names:
        label, folders = _folders_of(name)
        for folder in folders:
            if Path(folder).resolve() in seen:
                continue
            seen.add(Path(folder).resolve())
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
        pattern = "=".join(parts[i:])
        folders = [pattern] if Path(pattern).is_dir() else sorted(filter(os.path.isdir, glob.glob(pattern)))
        if folders:
            return "=".join(parts[:i]), folders
    raise ValueError(f"There is no folder {parts[-1]}. Name the output folders of runs.")


def benchmarks_of(runs: Sequence[Run]) -> list[str]:
    """All benchmarks on which a run was evaluated."""
    return list(dict.fromkeys(benchmark for run in runs for benchmark in run.points))
