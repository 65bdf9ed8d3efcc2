"""Where a run begins: at step 0, at a checkpoint, or not at all, because it has ended."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from ..callbacks.records import find_record
from ..run_folder import (
    ADAPTER_WEIGHTS,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    RUN_NAME,
    TRAINER_STATE_NAME,
    checkpoint_step,
)
from ..trainer.checkpoints import check_whole, checkpoints_of, holds_model, holds_optimizer, newest_whole, skip
from ..trainer.config import LookaheadConfig
from ..trainer.trainer import LookaheadTrainer
from .lock import on_main_process


logger = get_logger(__name__)

OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
OF_ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "modules_to_save")
OF_ADAPTER += ("use_rslora", "use_dora")
FIXED = {
    **dict.fromkeys(OF_OPTIMIZER, "it is restored with the optimizer's state"),
    **dict.fromkeys(("seed", "data_seed"), "it gives the order of the prompts"),
    "gate_signal": "the gate compares it with its earlier values",
    **dict.fromkeys(("use_peft", *(f"adapter.{name}" for name in OF_ADAPTER)), "the weights have that form"),
}
"""Settings that a run can't change when it is resumed, and why."""
OF_ANY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
"""Learning-rate schedules that don't depend on the length of the run."""
FREE = ("output_dir", "run_name", "resume_from_checkpoint", "report_to", "project", "trackio", "hub_", "push_to_hub")
FREE += ("log", "save_", "eval_", "do_", "disable_tqdm", "dataloader_", "ddp_", "use_cpu", "max_steps")
FREE += ("num_train_epochs", "adapter.base_model", "adapter.revision", "adapter.inference_mode", "adapter.peft_v")
"""Beginnings of the names of settings that may change without a message: they decide what is kept, not what is
learned, or are compared elsewhere.
"""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint (`str`, *optional*): The checkpoint that it resumes from; `None` for step 0.
        skipped (`dict[Path, str]`): Newer checkpoints, each with what is wrong with it.
        over (`str`, *optional*): A sentence that nothing is left to do.
    """

    checkpoint: str | None = None
    skipped: dict[Path, str] = field(default_factory=dict)
    over: str | None = None


def find_start(args: LookaheadConfig) -> Start:
    """Where a run with these arguments begins. The main process looks; nothing is changed.

    Raises:
        ValueError: If `resume_from_checkpoint` names nothing that can be resumed, or if it is unset and the output
            folder holds another run.
    """
    return on_main_process(lambda: _find_start(args))


def _find_start(args: LookaheadConfig) -> Start:
    name, run = args.resume_from_checkpoint, Path(args.output_dir)
    if name is None:
        _refuse_used_folder(run)
        return Start()
    if name == "last":
        if over := _is_over(args, run):
            return Start(over=over)
        checkpoint, skipped = newest_whole(run)
        if checkpoint is None and (run / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"{run} holds a finished run and no checkpoint to resume from: it had no `save_strategy: steps`. "
                "Choose another `output_dir`, and start there from its model, or from the beginning."
            )
        return Start(None if checkpoint is None else str(checkpoint), skipped)
    if str(name).lower() in ("true", "false"):
        raise ValueError(
            f"`resume_from_checkpoint: {name}` names no checkpoint. Set `last` for the newest one of `output_dir`, "
            "name a folder, or leave it out to start from the beginning."
        )
    checkpoint = Path(name)
    check_whole(checkpoint)
    if checkpoint.resolve().parent != run.resolve():
        _refuse_used_folder(run)
    elif (over := _is_over(args, run)) and _step(checkpoint) >= _step(run):
        return Start(over=over)
    return Start(str(checkpoint))


def settle(trainer: LookaheadTrainer, start: Start) -> None:
    """Checks that a trainer can resume from there with its settings, warns of changes, and renames what is in the way.

    Raises:
        ValueError: If a setting differs from the checkpoint's that a run can't change.
    """
    if start.checkpoint is None:
        return

    def compare() -> list[str]:
        changes = list(_changes(trainer, Path(start.checkpoint)))
        return [*skip(start.skipped, renames=True), *_newer(Path(start.checkpoint)), *changes]

    for message in on_main_process(compare):
        logger.warning(message)


# ---- What is in the folder


def _refuse_used_folder(run: Path) -> None:
    """A new run does not overwrite another one."""
    checkpoints = checkpoints_of(run)
    if not checkpoints and not _has_model(run):
        return
    what = f"{checkpoints[-1].name} of an earlier run" if checkpoints else "the model of an earlier run"
    raise ValueError(
        f"{run} holds {what}. Resume it (`--resume_from_checkpoint last`), choose another `output_dir`, or delete "
        "the folder."
    )


def _has_model(run: Path) -> bool:
    return any((run / name).is_file() for name in (MODEL_WEIGHTS, MODEL_INDEX, ADAPTER_WEIGHTS, TRAINER_STATE_NAME))


def _is_over(args: LookaheadConfig, run: Path) -> str | None:
    """A sentence if a run has ended and is saved; `None` if it has not, or if it should become longer."""
    state = _read_json(run / TRAINER_STATE_NAME)  # the last file that is saved
    step, end = state.get("global_step", 0), state.get("max_steps", 0)
    if not 0 < end <= step or not holds_model(run):
        return None
    if args.max_steps > 0:
        is_long_enough = args.max_steps <= step
    else:
        before = _read_json(run / RUN_NAME).get("settings", {})
        is_long_enough = before.get("max_steps") == -1 and before.get("num_train_epochs", 0) >= args.num_train_epochs
    if not is_long_enough:
        return None
    longer = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    ended = f"The run in {run} has ended after {step} steps, and nothing was done."
    if newest_whole(run)[0] is not None:
        return f"{ended} A larger `{longer}` continues it."
    return f"{ended} It can't be continued: it saved no checkpoint (`save_strategy: steps`)."


def _step(folder: Path) -> int:
    return _read_json(folder / TRAINER_STATE_NAME).get("global_step", 0)


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file; empty if there is none, or only part of one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- What has changed since


def _changes(trainer: LookaheadTrainer, checkpoint: Path) -> Iterator[str]:
    """Warns about settings that differ from the checkpoint's.

    Raises:
        ValueError: If a setting has changed that can't change.
    """
    args, record = trainer.args, find_record(trainer)
    before = _flat(_read_json(checkpoint.parent / RUN_NAME))
    now = _flat(json.loads(json.dumps(record.describe_run(), default=str)))
    changed = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    was_adapter, is_adapter = ("adapter.r" in about for about in (before, now))
    if before and was_adapter != is_adapter:
        changed["use_peft"] = (was_adapter, is_adapter)
    rates = _learning_rates(checkpoint)
    if rates and args.learning_rate not in rates:
        changed["learning_rate"] = (rates[0], args.learning_rate)
    fixed = FIXED.keys() - (set() if holds_optimizer(checkpoint) else OF_OPTIMIZER)
    for name in FIXED:
        if name in fixed & changed.keys():
            old, new = changed[name]
            raise ValueError(
                f"`{name.removeprefix('adapter.')}: {new}`, and {checkpoint} was trained with {old}, which can't "
                f"change on the way: {FIXED[name]}. Set {old}, or choose another `output_dir` and start there from "
                "the weights of the checkpoint."
            )
    if shown := [f"`{name}` {old} -> {new}" for name, (old, new) in changed.items() if not name.startswith(FREE)]:
        yield f"From {checkpoint} on, these settings of the run change: {', '.join(shown)}."
    if {"max_steps", "num_train_epochs"} & changed.keys() and args.lr_scheduler_type not in OF_ANY_LENGTH:
        yield (
            f"The run has another length than when {checkpoint} was saved. From here on the learning rate follows "
            f"`lr_scheduler_type: {args.lr_scheduler_type.value}` in a run of the new length."
        )


def _newer(checkpoint: Path) -> Iterator[str]:
    """Warns of a newer checkpoint than the requested one."""
    newest = checkpoints_of(checkpoint.parent)[-1:]
    if newest and checkpoint_step(newest[0]) > _step(checkpoint):
        yield f"{newest[0]} is newer than {checkpoint}: `last` uses it until the run has reached that step again."


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    """Settings and other properties of a run, by name; the adapter's as `adapter.r`."""
    adapter, settings = about.get("adapter") or {}, about.get("settings") or {}
    others = {name: about[name] for name in ("model", "rewards", "training_examples", "processes") if name in about}
    return {**others, **{f"adapter.{name}": value for name, value in adapter.items()}, **settings}


def _learning_rates(checkpoint: Path) -> list[float]:
    """The learning rates that a checkpoint's schedule starts from; empty if it has none."""
    path = checkpoint / "scheduler.pt"
    return torch.load(path, weights_only=True).get("base_lrs", []) if path.is_file() else []
