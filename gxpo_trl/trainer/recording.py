"""What a run is, what it has spent, and its log as it goes: `run.json` and `log.jsonl` in its folder, for reports."""

import contextlib
import dataclasses
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
from transformers import TrainerCallback, TrainingArguments
from trl.trainer.utils import get_config_model_id

from ..run_folder import LOG_NAME, RUN_NAME, RunDescription, write_whole
from ..version import __version__


DERIVED = ("do_eval", "activation_checkpointing", "generation_batch_size", "pad_to_multiple_of", "hub_token")
"""Settings that are made from others, or nobody's business."""
PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets")


class RunRecorder(TrainerCallback):
    """Writes what a run is when it begins, and each entry of its log when it is made."""

    def __init__(self, trainer: "RecordingMixin"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_clock()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RUN_NAME, json.dumps(self.trainer.describe_run(), indent=2, default=str) + "\n")
        past = [json.dumps(entry) + "\n" for entry in state.log_history]  # of a resumed run
        (folder / LOG_NAME).write_text("".join(past))

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.stop_clock()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and state.log_history:
            with open(Path(args.output_dir) / LOG_NAME, "a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def _changed(args: TrainingArguments) -> dict[str, Any]:
    """The settings that are not their defaults, which nothing else follows from."""
    settings, changed = args.to_dict(), {}
    for f in dataclasses.fields(args):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        is_plain = isinstance(getattr(args, f.name), (str, int, float, bool, type(None), list, tuple, Enum))
        if f.init and is_plain and f.name not in DERIVED and getattr(args, f.name) not in (default, [], ()):
            changed[f.name] = settings[f.name]
    return changed


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Sets as lists, which JSON has."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


class RecordingMixin:
    """Counts what a run spends: completions, and seconds of training, evaluations left out."""

    def _set_up_recording(self) -> None:
        self._rollouts = 0  # completions sampled for training, over all ranks
        self._seconds = 0.0  # until the clock was started
        self._clock_started: float | None = None
        self._generation_time = self._reward_time = 0.0  # of the optimizer step under way
        self.add_callback(RunRecorder(self))

    def start_clock(self) -> None:
        self._clock_started = time.perf_counter()

    def stop_clock(self) -> None:
        self._seconds, self._clock_started = self._seconds_spent(), None

    def _seconds_spent(self) -> float:
        return self._seconds + (0.0 if self._clock_started is None else time.perf_counter() - self._clock_started)

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Around what is no training."""
        was_running = self._clock_started is not None
        self.stop_clock()
        try:
            yield
        finally:
            if was_running:
                self.start_clock()

    def evaluate(self, *args, **kwargs):
        with self.off_the_clock():
            return super().evaluate(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self._rollouts += len(inputs) * self.accelerator.num_processes
        return super()._generate_and_score_completions(inputs)

    def _generate(self, *args, **kwargs):
        started = time.perf_counter()
        generated = super()._generate(*args, **kwargs)
        if self.model.training:
            self._generation_time += time.perf_counter() - started
        return generated

    def _calculate_rewards(self, *args, **kwargs):
        started = time.perf_counter()
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.model.training:
            self._reward_time += time.perf_counter() - started
        return rewards

    def _take_times(self) -> dict[str, float]:
        """Seconds of this rank in the optimizer step that ends, and of the run so far."""
        times = {
            "generation_time": self._generation_time,
            "reward_time": self._reward_time,
            "update_time": self._update_time,
        }
        self._generation_time = self._reward_time = self._update_time = 0.0
        return times

    def describe_run(self) -> RunDescription:
        """For `run.json`."""
        args, model = self.args, self.model
        adapter = getattr(model, "peft_config", None)
        return {
            "package": __version__,
            "trainer": type(self).__name__,
            "model": get_config_model_id(model.config),
            "adapter": None if adapter is None else _plain(adapter[model.active_adapter].to_dict()),
            "rewards": list(self.reward_func_names),
            "training_examples": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "processes": args.world_size,
            "completions_per_step": (
                args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
            ),
            "settings": args.to_dict(),
            "changed": _changed(args),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "versions": {package: version(package) for package in PACKAGES},
        }
