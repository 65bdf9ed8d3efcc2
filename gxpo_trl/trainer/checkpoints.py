"""Which checkpoints a run can resume from: those that are whole.

A run that is killed while it saves, or whose disk is full, leaves a folder that is named like any other. A checkpoint
is whole if every file has its full length and none is missing that a resumed run needs. Tensors are not read, so that
a large model takes no longer.
"""

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from transformers.trainer import TRAINING_ARGS_NAME

from ..run_folder import (
    ADAPTER_WEIGHTS,
    LOOKAHEAD_STATE_NAME,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    RUN_NAME,
    TRAINER_STATE_NAME,
    checkpoint_step,
    saved_steps,
)
from ..update.gate import Gate, Trigger
from ..update.json_state import is_count
from ..update.step_control import StepControl
from .update import STEP_CONTROL, check_state


MANIFEST = "checkpoint"
"""The key in lookahead_state.json, which is written first, for what the checkpoint will hold: `describe`."""
ENTROPY_NAME = "entropy_ctrl_state.json"
WEIGHTS = {MODEL_WEIGHTS, MODEL_INDEX, ADAPTER_WEIGHTS, "pytorch_model.bin", "pytorch_model.bin.index.json"}
WEIGHTS |= {"adapter_model.bin"}
ENGINE_WEIGHTS = ("pytorch_model_fsdp", "global_step")
"""Beginnings of the names of files and folders in which FSDP and DeepSpeed save a model."""
PARTS = {
    "optimizer": ("optimizer", "global_step"),
    "scheduler": ("scheduler", "global_step"),
    "random numbers": ("rng_state",),
}
"""What a resumed run needs in addition to the model, with the beginnings of the files' names."""
RANK = re.compile(r"rng_state_(\d+)\.pth")
DEEPSPEED_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def describe(args: Any) -> dict[str, Any]:
    """What a checkpoint of a run with these arguments will hold."""
    return {
        "processes": args.world_size,
        "save_only_model": args.save_only_model,
        "adaptive_entropy": args.use_adaptive_entropy,
    }


def find_fault(checkpoint: Path) -> str | None:
    """Why a run can't resume from a checkpoint, such as "optimizer.pt is damaged or cut off"; `None` if it can."""
    return next(_faults(checkpoint), None)


def newest_whole(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a run that is whole.

    Returns:
        `tuple[Path | None, dict[Path, str]]`: The checkpoint, `None` if the run has saved none, and those that are
            newer, each with what is wrong with it.

    Raises:
        ValueError: If there are checkpoints, and none of them is whole.
    """
    skipped: dict[Path, str] = {}
    for checkpoint in sorted(checkpoints_of(run), key=checkpoint_step, reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint, skipped
        skipped[checkpoint] = fault
    if skipped:
        faults = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in skipped.items())
        raise ValueError(
            f"No checkpoint in {run} is whole ({faults}). Delete {'it' if len(skipped) == 1 else 'them'} to start "
            "from the beginning, or choose another `output_dir`."
        )
    return None, skipped


def checkpoints_of(run: Path) -> list[Path]:
    """The folders of a run that are named like checkpoints, the oldest first."""
    return [path for path in saved_steps(run).values() if checkpoint_step(path) is not None and path.is_dir()]


def check_whole(checkpoint: Path) -> None:
    """Refuses a folder that a run can't resume from.

    Raises:
        ValueError: With the reason, and what to do.
    """
    if not checkpoint.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}` is not a folder. Name a checkpoint's folder, or `last`."
        )
    if inside := checkpoints_of(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}` is the folder of a run. Name one of its checkpoints, such as "
            f"{inside[-1]}."
        )
    if (fault := find_fault(checkpoint)) is not None:
        raise ValueError(
            f"`resume_from_checkpoint: {checkpoint}` is not a whole checkpoint: {fault}. Name another one."
        )


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that is not whole, so that it is not counted or kept by `save_total_limit`. Returns its new
    path; what an earlier attempt left there is deleted.
    """
    place = partial_checkpoint(checkpoint)
    shutil.rmtree(place, ignore_errors=True)
    return checkpoint.rename(place)


def partial_checkpoint(checkpoint: Path) -> Path:
    """The new path of a checkpoint that is not whole."""
    return checkpoint.with_name(f"partial-{checkpoint.name}")


def skip(skipped: dict[Path, str], renames: bool) -> list[str]:
    """Renames checkpoints that are not whole, on the process that `renames`, with a warning for each."""
    messages = []
    for checkpoint, fault in skipped.items():
        place = set_aside(checkpoint) if renames else partial_checkpoint(checkpoint)
        messages.append(
            f"{checkpoint} is not whole: {fault}. The run resumes from an older one. {place} can be deleted."
        )
    return messages


def what_starts_afresh(checkpoint: Path) -> list[str]:
    """Warns of what a checkpoint lacks for resuming."""
    messages = []
    if not (checkpoint / LOOKAHEAD_STATE_NAME).is_file():
        messages.append(
            f"{checkpoint} holds no {LOOKAHEAD_STATE_NAME}: it was not saved by a LookaheadTrainer. The gate and the "
            "count of backward passes start from the beginning."
        )
    if not holds_optimizer(checkpoint):
        messages.append(
            f"{checkpoint} was saved with `save_only_model`: optimizer, learning-rate schedule and random numbers "
            "start again, and the run continues differently than without the interruption."
        )
    return messages


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has more than a model."""
    return any(path.name.startswith(PARTS["optimizer"]) for path in checkpoint.iterdir())


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a whole model or adapter."""
    files = {path.name: path for path in folder.iterdir() if path.name in WEIGHTS or path.suffix == ".safetensors"}
    return all(map(is_readable, files.values())) and not any(_missing_weights(files))


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The state of the update in a checkpoint; `None` if it has none.

    Raises:
        ValueError: If a run can't resume with it; the message names the file.
    """
    path = checkpoint / LOOKAHEAD_STATE_NAME
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        check_state(state)
        Gate(Trigger(math.inf)).load_state_dict(state["gate"])
        if STEP_CONTROL in state:
            StepControl(target=0.0).load_state_dict(state[STEP_CONTROL])
    except ValueError as error:
        raise ValueError(f"{path} can't be resumed from: {error}") from error
    return state


def is_readable(path: Path) -> bool:
    """Whether a file has the length that it states, or is of a kind that states none."""
    check = next((check for pattern, check in CHECKS.items() if re.fullmatch(pattern, path.name)), None)
    try:
        if check is not None:
            check(path)
    except Exception:  # readers raise all kinds of errors on damaged files
        return False
    return True


def _faults(checkpoint: Path) -> Iterator[str]:
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    if TRAINER_STATE_NAME not in files:
        yield f"{TRAINER_STATE_NAME} is missing, which is written last"
    for name, path in files.items():
        if not is_readable(path):
            yield f"{name} is damaged or cut off"
    state = json.loads(files[TRAINER_STATE_NAME].read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not is_count(state.get("global_step")):
        yield f"{TRAINER_STATE_NAME} has no `global_step`"
    try:
        update = read_state(checkpoint)
    except ValueError as error:
        yield f"{LOOKAHEAD_STATE_NAME}: {str(error.__cause__).rstrip('.')}"
    yield from _missing_weights(files)
    if update is None and _is_of_lookahead(checkpoint):
        yield f"{LOOKAHEAD_STATE_NAME} is missing; without it the gate would start from the beginning"
    manifest = (update or {}).get(MANIFEST, {})
    if not isinstance(manifest, dict) or not is_count(manifest.get("processes", 1)):
        yield f"`{MANIFEST}` in {LOOKAHEAD_STATE_NAME} does not say what the checkpoint holds"
    yield from _missing_parts(set(files), manifest)
    yield from _missing_of_deepspeed(files, manifest.get("processes"))


def _missing_weights(files: dict[str, Path]) -> Iterator[str]:
    inside = {name.partition("/")[2] for name in files}  # each of several adapters has a folder
    if not (files.keys() | inside) & WEIGHTS and not any(name.startswith(ENGINE_WEIGHTS) for name in files):
        yield "the weights are missing"
    for name in files.keys() & {MODEL_INDEX, "pytorch_model.bin.index.json"}:
        shards = _read_index(files[name])
        yield from (f"{shard} is missing" for shard in sorted(shards - files.keys()))
    for folder in {name.rpartition("/")[0] for name in files if name.endswith(".distcp")}:
        if f"{folder}/.metadata" not in files:
            yield f"{folder}/.metadata is missing"


def _missing_parts(files: set[str], manifest: dict[str, Any]) -> Iterator[str]:
    """Optimizer, schedule and random numbers: all of them or, with `save_only_model`, none."""
    missing = [part for part, begins in PARTS.items() if not any(name.startswith(begins) for name in files)]
    only_model = manifest.get("save_only_model", len(missing) == len(PARTS))
    if missing and not only_model:
        yield f"the state of the {missing[0]} is missing"
    ranks = {int(match[1]) for name in files if (match := RANK.fullmatch(name))}
    processes = manifest.get("processes", len(ranks))
    if processes > 1 and not only_model and (absent := _first_absent(ranks, processes)) is not None:
        yield f"rng_state_{absent}.pth is missing"
    if manifest.get("adaptive_entropy") and ENTROPY_NAME not in files:
        yield f"{ENTROPY_NAME} is missing"


def _missing_of_deepspeed(files: dict[str, Path], processes: int | None) -> Iterator[str]:
    """Each process saves its share of the optimizer."""
    if not any(name.startswith("global_step") for name in files):
        return
    tag = files["latest"].read_text().strip() if "latest" in files else ""
    inside = {name.rpartition("/")[2] for name in files if name.startswith(f"{tag}/")} if tag else set()
    if not any("model_states" in name for name in inside):
        yield "`latest` names no folder with the states of DeepSpeed"
    ranks = {int(match[1]) for name in inside if "optim_states" in name and (match := DEEPSPEED_RANK.search(name))}
    absent = _first_absent(ranks, processes or max(ranks) + 1) if ranks else None
    if absent is not None:
        yield f"the state of DeepSpeed's optimizer on process {absent} is missing"


def _first_absent(ranks: set[int], processes: int) -> int | None:
    return next((rank for rank in range(processes) if rank not in ranks), None)


def _is_of_lookahead(checkpoint: Path) -> bool:
    """Whether a LookaheadTrainer saved it: the file with the arguments has the names of the settings."""
    arguments, run = checkpoint / TRAINING_ARGS_NAME, checkpoint.parent / RUN_NAME
    place = arguments if arguments.is_file() else run
    return place.is_file() and b"lookahead_steps" in place.read_bytes()


# ---- Files


def _check_safetensors(path: Path) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError("no header")
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != path.stat().st_size:
        raise ValueError("not as long as its header says")


def _check_torch(path: Path) -> None:
    """`torch.save` writes a zip archive, whose directory is at its end; before version 1.6 a pickle."""
    with open(path, "rb") as file:
        if file.read(1) == b"\x80" and path.stat().st_size > 1:
            return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            archive.open(entry).close()  # reads its header, and not what it holds


def _check_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _check_index(path: Path) -> None:
    _read_index(path)


def _read_index(path: Path) -> set[str]:
    """The shards of a model."""
    return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())


def _check_shards(path: Path) -> None:
    """torch's distributed checkpoints: the metadata say where in which file each tensor is."""
    places = FileSystemReader(path.parent).read_metadata().storage_data.values()
    for place in places:
        if (path.parent / place.relative_path).stat().st_size < place.offset + place.length:
            raise ValueError("a shard is cut off")


CHECKS: dict[str, Callable[[Path], None]] = {
    r".*\.safetensors": _check_safetensors,
    r".*\.(pt|pth|bin)": _check_torch,
    r".*\.index\.json": _check_index,
    r".*\.json": _check_json,
    r"\.metadata": _check_shards,
}
"""The check of a file's stated length, by its name."""
