"""What lies in a run's output folder, and what its files say: names that those who write and those who read share.

    RUN/
        run.json                      what the run is: a `RunDescription`; plain TRL writes none
        log.jsonl                     each entry of the log, when it is made
        trainer_state.json            Trainer's, with the whole log, when the run has ended
        trackers.json                 what the trackers call the run
        recipe.yaml                   what it was told, for `gxpo train`
        README.md, curves.png         the model card and its figure
        completions/                  TRL's, with `log_completions: true`
        checkpoint-200/               Trainer's, with its trainer_state.json and our lookahead_state.json
        trajectory/step-000010/       an adapter alone, with `trajectory_steps: 10`
        extrapolated/next/alpha-1/    a predicted model, with its extrapolation.json and trajectory.png

A run that is extrapolated on its way is two of these, RUN/before and RUN/after, with RUN/extrapolated between them.
`gxpo eval` writes table.md, and a folder for each model:

    MODEL/
        settings.json                 what decides which samples are drawn
        results.json                  scores: an `EvaluationResults`
        BENCHMARK.jsonl               a judged sample a line, collected from BENCHMARK.parts/
"""

import os
import re
from pathlib import Path
from typing import Any, NotRequired, TypedDict


RUN_NAME, LOG_NAME, TRACKERS_NAME, RECIPE_NAME = "run.json", "log.jsonl", "trackers.json", "recipe.yaml"
CARD_NAME, CURVES_NAME = "README.md", "curves.png"
LOOKAHEAD_STATE_NAME = "lookahead_state.json"
TRAJECTORY_FOLDER, EXTRAPOLATED_FOLDER = "trajectory", "extrapolated"
LOOP_FOLDERS = ("before", EXTRAPOLATED_FOLDER, "after")
EXTRAPOLATION_NAME, TRAJECTORY_FIGURE_NAME = "extrapolation.json", "trajectory.png"
SETTINGS_NAME, RESULTS_NAME, TABLE_NAME = "settings.json", "results.json", "table.md"

TRAINER_STATE_NAME = "trainer_state.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL_WEIGHTS, MODEL_INDEX, MODEL_CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Other libraries' names from `TRAINER_STATE_NAME` on. Theirs are not imported: that would take seconds."""


# ---- Paths

STEP = re.compile(r"(checkpoint|step)-(\d+)")


def step_folder(run: Path, step: int) -> Path:
    """Where the trajectory of a run has the adapter of a step."""
    return run / TRAJECTORY_FOLDER / f"step-{step:06d}"


def saved_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder, or the adapters in its trajectory's, by step."""
    found = {path: STEP.fullmatch(path.name) for path in folder.iterdir()} if folder.is_dir() else {}
    return dict(sorted((int(match[2]), path) for path, match in found.items() if match))


def checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint of Trainer; `None` of any other folder."""
    match = STEP.fullmatch(folder.name)
    return int(match[2]) if match and match[1] == "checkpoint" else None


def alpha_folder(folder: Path, alpha: float) -> Path:
    """Where an extrapolation has the model of one α."""
    return folder / f"alpha-{alpha:g}"


def completion_files(run: Path) -> list[Path]:
    """The completions that were kept, a file a step, the first step first."""
    return sorted((run / "completions").glob("completions_*.parquet"))


def samples_file(folder: Path, slug: str) -> Path:
    """The samples of a benchmark in the folder of an evaluated model."""
    return folder / f"{slug}.jsonl"


def is_adapter(folder: Path) -> bool:
    """Whether an adapter lies there, and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def partial_path(path: Path) -> Path:
    """Where something is written until it is whole and takes its place."""
    return path.with_name(f"{path.name}.partial")


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: the file appears when it is complete."""
    partial_path(path).write_text(text, encoding="utf-8")
    os.replace(partial_path(path), path)


# ---- Entries of the log

BACKWARD_PASSES, ELAPSED_TIME = "lookahead/backward_passes", "lookahead/elapsed_time"
SHUTOFF_STEP = "lookahead/shutoff_step"
"""Totals: what was spent until then, and the step after which the active phase was over."""
EVAL_ROLLOUTS, EVAL_BACKWARD_PASSES, EVAL_SECONDS = "eval/rollouts", "eval/backward_passes", "eval/seconds"
"""The same, beside the scores of benchmarks."""
ACCURACY = re.compile(r"eval/([^/]+)/(avg@\d+)")
"""The names of scores that are accuracies: benchmark and metric."""


def score_name(slug: str, metric: str) -> str:
    """What the log calls a metric of a benchmark that was scored on the way."""
    return f"eval/{slug}/{metric}"


# ---- What files say


class RunDescription(TypedDict, total=False):
    """`run.json`."""

    package: str
    trainer: str
    model: str
    adapter: dict[str, Any] | None
    rewards: list[str]
    training_examples: int | None
    parameters: int
    trainable_parameters: int
    processes: int
    completions_per_step: int
    settings: dict[str, Any]
    changed: dict[str, Any]
    started: str
    python: str
    machine: str
    versions: dict[str, str]


class Score(TypedDict):
    """A metric with its 95 % interval over problems, and how many problems had samples enough."""

    value: float
    low: float
    high: float
    problems: int


class BenchmarkResults(TypedDict):
    """What `results.json` says of one benchmark."""

    problems: int
    samples: int
    metrics: dict[str, Score]
    mean_length: float
    truncated: float
    verify_failures: int
    seconds: float


class EvaluationResults(TypedDict):
    """`results.json`."""

    model: str
    benchmarks: dict[str, BenchmarkResults]


class ExtrapolationReport(TypedDict):
    """`extrapolation.json`."""

    alpha: float
    run: str
    method: str
    steps: list[int]
    steps_ahead: int
    checkpoints_ahead: int
    matrices: int
    left_alone: list[str]
    energy_ratio: dict[str, list[float]]
    linearity: dict[str, dict[str, list]]
    held_out: dict[str, Any]
    seconds: dict[str, float]
    predictor: NotRequired[dict[str, Any]]
    held_out_was_seen_in_part: NotRequired[bool]
