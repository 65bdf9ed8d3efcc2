"""Writes a description of the run and its log, with what it has spent: `run.json` and `log.jsonl`, for reports."""

import contextlib
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl.trainer.utils import get_config_model_id

from ..plain_values import make_history_plain
from ..run_folder import ELAPSED_TIME, LOG_NAME, RUN_NAME, write_whole
from ..version import __version__
from .adapters import saves_adapter, trained_adapters
from .wrapping import wrap_method


logger = get_logger(__name__)

SPENT_NAME = "gxpo_trl.run_record"
"""The key in a checkpoint's trainer_state.json for what was spent."""
DERIVED = ("do_eval", "activation_checkpointing", "generation_batch_size", "pad_to_multiple_of", "hub_token")
"""Settings that are computed from others, or that are private."""
PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets")
TIMED = {"_generate": "generation_time", "_calculate_rewards": "reward_time"}
"""The log's names for the time that a method of TRL's trainers takes."""


class RunRecordCallback(TrainerCallback):
    """Describes a run when it begins, writes each entry of its log at once, and counts what the run spends.

    The count continues in a resumed run. It is kept next to the state of transformers' stateful callbacks and not as
    one of them: those are created again without their trainer (`restore_callback_states_from_checkpoint`), and a run
    can't be resumed from a checkpoint without them.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer.
        settings (`dict[str, Any]`, *optional*): Settings of the run that are not in `trainer.args`, by name.

    Attributes:
        rollouts (`int`): Completions sampled for training, over all ranks.
        seconds (`float`): Of training, evaluations left out.
    """

    def __init__(self, trainer: Trainer, settings: dict[str, Any] | None = None):
        self.trainer, self.settings = trainer, settings or {}
        self.rollouts = 0
        self._seconds = 0.0  # until the clock was started
        self._clock_started: float | None = None
        self._written = 0  # entries of the log
        self._samples = wrap_method(trainer, "_generate_and_score_completions", self._count_rollouts)
        timed = [name for name in TIMED if wrap_method(trainer, name, functools.partial(self._time, TIMED[name]))]
        self._times = {TIMED[name]: 0.0 for name in timed}  # of this rank, in the current optimizer step
        wrap_method(trainer, "evaluate", self._evaluate)

    # ---- What was spent

    @property
    def seconds(self) -> float:
        return self._seconds + (0.0 if self._clock_started is None else time.perf_counter() - self._clock_started)

    def spent(self) -> dict[str, float]:
        """What the run has spent so far; without `rollouts` if the trainer samples none."""
        spent = {"backward_passes": getattr(self.trainer, "backward_passes", self.trainer.state.global_step)}
        if self._samples:
            spent["rollouts"] = self.rollouts
        return spent | {"seconds": self.seconds}

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Stops the clock around work that is not training."""
        was_running = self._clock_started is not None
        self._stop_clock()
        try:
            yield
        finally:
            if was_running:
                self._start_clock()

    def _start_clock(self) -> None:
        self._clock_started = time.perf_counter()

    def _stop_clock(self) -> None:
        self._seconds, self._clock_started = self.seconds, None

    def _evaluate(self, evaluate, *args, **kwargs):
        with self.off_the_clock():
            return evaluate(*args, **kwargs)

    def _count_rollouts(self, generate_and_score, inputs, *args, **kwargs):
        if self.trainer.model.training:
            self.rollouts += len(inputs) * self.trainer.accelerator.num_processes
        return generate_and_score(inputs, *args, **kwargs)

    def _time(self, name: str, method, *args, **kwargs):
        started = time.perf_counter()
        output = method(*args, **kwargs)
        if self.trainer.model.training:
            self._times[name] += time.perf_counter() - started
        return output

    # ---- Events

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self._resume(state.stateful_callbacks.get(SPENT_NAME))
        else:  # `train` may be called again
            self.rollouts, self._seconds = 0, 0.0
        self._start_clock()
        make_history_plain(state.log_history, 0)
        self._written = len(state.log_history)
        if not state.is_world_process_zero:
            return
        if not saves_adapter(self.trainer.model):
            logger.warning(
                "PEFT's layers are in the model, and no `PeftModel` is around it: checkpoints can be resumed, and "
                "`from_pretrained` doesn't read them. Pass `peft_config` to the trainer if that is not meant."
            )
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RUN_NAME, json.dumps(self.describe_run(), indent=2, default=str) + "\n")
        (folder / LOG_NAME).write_text("".join(map(_line, state.log_history)))  # of a resumed run

    def _resume(self, spent: dict[str, float] | None) -> None:
        if spent is None:
            logger.warning("The checkpoint has no record of what the run has spent: the count starts with this step.")
        else:
            self.rollouts, self._seconds = spent["rollouts"], spent["seconds"]

    def on_step_end(self, args, state, control, **kwargs):
        metrics = getattr(self.trainer, "_metrics", None)
        if metrics is not None:  # transformers' own trainers have none
            for name, seconds in self._times.items():
                metrics["train"][f"lookahead/{name}"].append(seconds)
            # A total: TRL logs the mean of the list over the logging interval, so only the last value is kept.
            metrics["train"][ELAPSED_TIME] = [self.seconds]
        self._times = dict.fromkeys(self._times, 0.0)
        state.stateful_callbacks[SPENT_NAME] = {"rollouts": self.rollouts, "seconds": self.seconds}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Entries that other callbacks log during this event are in the history too, after it."""
        make_history_plain(state.log_history, self._written)
        entries = state.log_history[self._written :]
        self._written += len(entries)
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / LOG_NAME, "a") as file:
                file.write("".join(map(_line, entries)))

    def on_train_end(self, args, state, control, **kwargs):
        self._stop_clock()

    def describe_run(self) -> dict[str, Any]:
        """For `run.json`."""
        return describe_run(self.trainer, self.settings)


def find_record(trainer: Trainer) -> RunRecordCallback | None:
    """The callback that records the run of a trainer, if there is one."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, RunRecordCallback)), None)


def describe_run(trainer: Trainer, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The description of a run for `run.json`; `settings` are those that are not in `trainer.args`."""
    args, model, settings = trainer.args, trainer.model, settings or {}
    completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return {
        "package": __version__,
        "trainer": type(trainer).__name__,
        "model": get_config_model_id(model.config),
        "adapter": _adapter_settings(model),
        "rewards": list(getattr(trainer, "reward_func_names", [])),
        "training_examples": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "processes": args.world_size,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "completions_per_step": completions if hasattr(trainer, "_generate_and_score_completions") else None,
        "settings": args.to_dict() | settings,
        "changed": _changed(args) | {name: value for name, value in settings.items() if value not in (None, [], ())},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _adapter_settings(model: torch.nn.Module) -> dict[str, Any] | None:
    """PEFT's settings of the trained adapter. If there are several, the settings of the others are in it by name."""
    adapters = {name: _plain_settings(config) for name, config in trained_adapters(model).items()}
    if not adapters:
        return None
    (_, first), *others = adapters.items()
    return first | {"also_trained": dict(others)} if others else first


def _plain_settings(config: PeftConfig) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _changed(args: TrainingArguments) -> dict[str, Any]:
    """The settings that differ from their defaults and are not computed from others."""
    settings, changed = args.to_dict(), {}
    for f in dataclasses.fields(args):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        is_plain = isinstance(getattr(args, f.name), (str, int, float, bool, type(None), list, tuple, Enum))
        if f.init and is_plain and f.name not in DERIVED and getattr(args, f.name) not in (default, [], ()):
            changed[f.name] = settings[f.name]
    return changed


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
