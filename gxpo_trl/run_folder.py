"""The files in a run's output folder and what they contain: names that writers and readers share.

    RUN/
        run.json                      describes the run: a `RunDescription`; plain TRL writes none
        log.jsonl                     each entry of the log, written at once
        trainer_state.json            Trainer's, with the whole log, once the run has ended
        trackers.json                 the run's names in the trackers
        recipe.yaml                   its settings, for `gxpo train`
        README.md, curves.png         the model card and its figure
        completions/                  TRL's, with `log_completions: true`
        checkpoint-200/               Trainer's, with its trainer_state.json and our lookahead_state.json
        partial-checkpoint-300/       one that was not whole when the run was resumed
        _lock                         while `gxpo train` is running there
        trajectory/step-000010/       only the adapter, with `trajectory_steps: 10`
        extrapolated/next/alpha-1/    a predicted model, with its extrapolation.json and trajectory.png

A run that is extrapolated during training is two of these, RUN/before and RUN/after, with RUN/extrapolated between
them. `gxpo eval` writes table.md, and a folder for each model:

    MODEL/
        settings.json                 the settings that decide which samples are drawn, and checksums of the model
        results.json                  scores: an `EvaluationResults`
        BENCHMARK.jsonl               one judged sample on each line, collected from BENCHMARK.parts/
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any, NotRequired, Required, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


RUN_NAME, LOG_NAME, TRACKERS_NAME, RECIPE_NAME = "run.json", "log.jsonl", "trackers.json", "recipe.yaml"
CARD_NAME, CURVES_NAME = "README.md", "curves.png"
LOOKAHEAD_STATE_NAME = "lookahead_state.json"
LOCK_NAME = "_lock"
"""The underscore keeps it from being pushed to the Hub."""
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


def check_output_dir(output_dir: str | Path, setting: str = "output_dir") -> None:
    """Refuses a path where no folder can be created.

    Raises:
        ValueError: Says why.
    """
    folder = Path(output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "can't be written to" if there.is_dir() else "is not a folder"
        raise ValueError(f"`{setting}: {output_dir}` can't be created: {there} {problem}.")


def step_folder(run: Path, step: int) -> Path:
    """The folder of a step's adapter in a trajectory."""
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
    """The folder of the model of one α in an extrapolation."""
    return folder / f"alpha-{f'{alpha:g}' if float(f'{alpha:g}') == alpha else repr(alpha)}"


def completion_files(run: Path) -> list[Path]:
    """The files of kept completions, one for each step, in order."""
    return sorted((run / "completions").glob("completions_*.parquet"))


def samples_file(folder: Path, slug: str) -> Path:
    """The samples of a benchmark in the folder of an evaluated model."""
    return folder / f"{slug}.jsonl"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_model(model: str, setting: str) -> None:
    """Refuses a path where no model is. A name of the Hub has one slash at most.

    Raises:
        ValueError: If there is no such folder, or no model or adapter in it.
    """
    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise ValueError(f"`{setting}`: there is no folder {model}.")
    if folder.is_dir() and not is_adapter(folder) and not (folder / MODEL_CONFIG).is_file():
        raise ValueError(
            f"`{setting}`: {model} is not a checkpoint: it holds neither a {MODEL_CONFIG} nor an {ADAPTER_CONFIG}."
        )


def partial_path(path: Path) -> Path:
    """Where a file is written until it is complete and is moved to its place."""
    return path.with_name(f"{path.name}.partial")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears only when it is complete."""
    partial_path(path).write_text(text, encoding="utf-8")
    os.replace(partial_path(path), path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Context that yields a folder to write to, which is moved to `path` when the block has ended without an error.

    Nothing is overwritten: the folder has a name that was free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = (f"{path.name}.partial" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
    partial = next(free for name in names if (free := _new_folder(path.with_name(name))) is not None)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _new_folder(path: Path) -> Path | None:
    try:
        path.mkdir()
    except FileExistsError:
        return None
    return path


# ---- Entries of the log

BACKWARD_PASSES, ELAPSED_TIME = "lookahead/backward_passes", "lookahead/elapsed_time"
SHUTOFF_STEP = "lookahead/shutoff_step"
"""Totals: what was spent until then, and the step after which the active phase ended."""
EVAL_ROLLOUTS, EVAL_BACKWARD_PASSES, EVAL_SECONDS = "eval/rollouts", "eval/backward_passes", "eval/seconds"
"""The same totals, logged with the scores of benchmarks."""
ACCURACY = re.compile(r"eval/([^/]+)/(avg@\d+)")
"""The names of scores that are accuracies: benchmark and metric."""


def score_name(slug: str, metric: str) -> str:
    """The log's name of a benchmark's metric that is scored during training."""
    return f"eval/{slug}/{metric}"


# ---- What files say


class UsedSettings(TypedDict, total=False):
    """The settings in `run.json` that reports use. The file may have others."""

    update_rule: str | None
    seed: int | None
    learning_rate: float | None
    lookahead_steps: int | None
    reposition_alpha: float | None
    gate_threshold: float | None
    gradient_accumulation_steps: int | None
    steps_per_generation: int | None
    num_iterations: int | None


class RunDescription(TypedDict, total=False):
    """`run.json`."""

    package: str
    trainer: str
    model: str | None
    adapter: dict[str, Any] | None
    rewards: list[str]
    training_examples: int | None
    parameters: int
    trainable_parameters: int
    processes: int
    mixed_precision: str
    completions_per_step: int | None
    settings: UsedSettings
    changed: dict[str, Any]
    started: str
    python: str
    machine: str
    versions: dict[str, str]


class AdapterSettings(TypedDict, total=False):
    """What is read of `adapter_config.json`."""

    base_model_name_or_path: str | None


class Score(TypedDict):
    """A metric with its 95 % interval over problems, and how many problems had enough samples."""

    value: float
    low: float
    high: float
    problems: NotRequired[int]


class BenchmarkResults(TypedDict, total=False):
    """The results of one benchmark in `results.json`."""

    problems: Required[int]
    samples: int
    metrics: Required[dict[str, Score]]
    mean_length: float
    truncated: float
    mean_reward: float | None
    verify_failures: Required[int]
    seconds: float


class EvaluationResults(TypedDict):
    """`results.json`."""

    model: str
    benchmarks: dict[str, BenchmarkResults]


class Band(TypedDict):
    """Over the matrices of a model, for each step: the mean, and the middle half."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Shares(TypedDict):
    """The shares of matrices between two edges, for each step. There is one share more than edges."""

    steps: list[int]
    edges: list[float]
    shares: list[list[float]]


class Linearity(TypedDict):
    so_far: Band
    ahead: Shares


class PredictionError(TypedDict):
    error: float | None  # of something that did not move there is none
    cosine: float | None


class HeldOut(TypedDict):
    """How each method would have predicted the last checkpoints."""

    from_step: int
    to_step: int
    errors: dict[str, PredictionError]


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
    energy_ratio: Band
    linearity: Linearity
    held_out: HeldOut
    seconds: dict[str, float]
    predictor: NotRequired[dict[str, Any]]
    held_out_was_seen_in_part: NotRequired[bool]


class TrainerState(TypedDict):
    """The entries of `trainer_state.json` that are read."""

    log_history: list[dict[str, Any]]


# ---- Reading files that others may have written or damaged

MOST_BYTES = 2**28
"""Size limit of a file that is read whole."""
MOST = 1e100
"""Limit of a number: beyond it, sums and squares are infinite."""
MOST_STEPS = 2**53
"""Limit of a whole number: beyond it, not every one has a float."""
_KINDS = {str: "a text", bool: "true or false"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def is_number(value: Any) -> bool:
    """Whether it is a finite number within the limit. True and false are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MOST < value < MOST


def is_step(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_STEPS


def printable(text: str) -> str:
    """The text without characters that neither a page nor a figure can hold."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def is_there(path: Path) -> bool:
    """Whether the name exists, as a file or anything else: what can't be read is an error, not missing."""
    return os.path.lexists(path)


def open_file(path: Path) -> IO[bytes]:
    """Opens a regular file. It does not wait for anything else, such as a pipe.

    Raises:
        ValueError: If it is not a regular file, can't be opened, or is larger than `MOST_BYTES`.
    """
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:  # such as a folder, a loop of links, or a file without permission
        raise ValueError(f"{path} can't be read: {error.strerror}.") from error
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_size <= MOST_BYTES:
        return file
    file.close()
    if stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} can't be read: it has {about.st_size:,} bytes, more than {MOST_BYTES:,}.")
    raise ValueError(f"{path} can't be read: it is not a regular file.")


def read_text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        ValueError: If it can't be read, or is not text.
    """
    with open_file(path) as file:
        try:
            return file.read(MOST_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.") from error
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror}.") from error


def read_json(path: Path, kind: Any) -> Any:
    """The content of a JSON file.

    Args:
        path (`Path`): The file.
        kind: What it should contain: one of the `TypedDict`s here. Further names are accepted.

    Raises:
        ValueError: If the file can't be read or contains something else. The message says what.
    """
    found = parse_json(read_text(path), str(path))
    check_kind(found, kind, str(path))
    return found


def adapter_base(folder: Path) -> str | None:
    """The base model that an adapter names.

    Raises:
        ValueError: If its settings can't be read. Other libraries' errors don't say which file it is.
    """
    return read_json(folder / ADAPTER_CONFIG, AdapterSettings).get("base_model_name_or_path")


def read_extrapolation(path: Path) -> ExtrapolationReport:
    """An `extrapolation.json` that can be drawn.

    Raises:
        ValueError: If the file can't be read, contains something else, or its lists differ in length.
    """
    found: ExtrapolationReport = read_json(path, ExtrapolationReport)
    ahead = found["linearity"]["ahead"]
    bands = found["energy_ratio"], found["linearity"]["so_far"]
    fit = [len({len(values) for values in band.values() if isinstance(values, list)}) == 1 for band in bands]
    fit += [len(ahead["shares"]) == len(ahead["steps"]), len(found["steps"]) > 1, len(ahead["edges"]) == 3]
    fit += [len(shares) == len(ahead["edges"]) + 1 for shares in ahead["shares"]]
    if not all(fit):
        raise ValueError(f"{path} has lists of lengths that don't fit together.")
    return found


def parse_json(text: str, where: str) -> Any:
    """Parses JSON whose texts can be displayed.

    Raises:
        ValueError: If it is not JSON.
    """
    try:
        found = json.loads(text, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not complete JSON: {error}.") from error
    return _printable(found) if "\\" in text else found


def _whole_number(digits: str) -> int | float:
    """A float where NumPy has no whole number of that size: a figure would treat it as an object."""
    number = float(digits)
    return int(digits) if abs(number) < MOST_STEPS else number


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(member) for member in value]
    return {printable(k): _printable(v) for k, v in value.items()} if isinstance(value, dict) else value


def check_kind(value: Any, kind: Any, where: str) -> None:
    """Checks the type of a value from JSON. A number may be one that is not finite.

    Raises:
        ValueError: If it has another type.
    """
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return
    if origin in (Required, NotRequired):
        check_kind(value, parts[0], where)
    elif origin is UnionType:
        if value is not None:  # in these files the other is always None
            check_kind(value, next(part for part in parts if part is not NoneType), where)
    elif is_typeddict(kind):
        _expect(isinstance(value, dict), value, "an object", where)
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if name in value:
                check_kind(value[name], hint, f"{where}: `{name}`")
            elif name in kind.__required_keys__:
                raise ValueError(f"{where} has no `{name}`.")
    elif origin is dict:
        _expect(isinstance(value, dict), value, "an object", where)
        for name, member in value.items():
            check_kind(member, parts[1], f"{where}: `{name}`")
    elif origin is list:
        _expect(isinstance(value, list), value, "a list", where)
        for i, member in enumerate(value):
            check_kind(member, parts[0], f"{where}, entry {i + 1}")
    elif origin is int:
        is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST_STEPS
        _expect(is_whole, value, "a whole number", where)
    elif origin is float:
        is_nothing = isinstance(value, float) and not math.isfinite(value)
        _expect(is_nothing or is_number(value), value, "a number", where)
    else:
        _expect(isinstance(value, origin), value, _KINDS[origin], where)


def _expect(holds: bool, value: Any, what: str, where: str) -> None:
    if not holds:
        shown = json.dumps(value, ensure_ascii=False)
        raise ValueError(f"{where} is {shown if len(shown) <= 40 else shown[:37] + '…'}: {what} is expected.")
