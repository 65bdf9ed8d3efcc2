"""Trackers: a resumed run keeps its name in wandb, trackio and TensorBoard."""

import json
import os
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..run_folder import TRACKERS_NAME, TRAINER_STATE_NAME, write_whole


WANDB_VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME")


class TrackerCallback(TrainerCallback):
    """Saves the trackers' names of a run, and passes them on when it is resumed. A name that the user has set is kept.

    It must run before the trackers' own callbacks. `TrackerCallback.attach(trainer)` puts it before them;
    `trainer.add_callback` would put it after them.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._own_wandb_variables: list[str] = []
        self._is_written = False

    @classmethod
    def attach(cls, trainer: Trainer) -> "TrackerCallback":
        """Adds the callback to a trainer, before all others."""
        callback = cls(trainer)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_written = False
        if state.global_step > 0:
            self.resume_trackers(_run_folder(args))

    def on_step_begin(self, args, state, control, **kwargs):
        if self._is_written:
            return
        self._is_written = True  # by now they have begun
        self.forget_wandb_variables()
        if state.is_world_process_zero and (names := self.tracker_names()):  # trackers run only there
            write_whole(Path(args.output_dir) / TRACKERS_NAME, json.dumps(names, indent=2) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        self.forget_wandb_variables()

    def tracker_names(self) -> dict[str, str]:
        """The name of the run in each tracker, by tracker."""
        report_to, names = self.trainer.args.report_to, {}
        wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
        if "wandb" in report_to and wandb is not None and wandb.run is not None:
            names["wandb"] = wandb.run.id
        if "trackio" in report_to and trackio is not None:
            names["trackio"] = trackio.context_vars.current_run.get().name
        if (board := self._tensorboard()) is not None and board.logging_dir is not None:
            names["tensorboard"] = str(board.logging_dir)
        return names

    def resume_trackers(self, folder: Path) -> None:
        """Passes the names of the run in this folder to the trackers, before they begin."""
        path = folder / TRACKERS_NAME
        names = json.loads(path.read_text()) if path.is_file() else {}
        if "wandb" in names and not any(name in os.environ for name in WANDB_VARIABLES):
            os.environ.update(zip(WANDB_VARIABLES, (names["wandb"], "allow"), strict=True))
            self._own_wandb_variables = list(WANDB_VARIABLES)
        if "trackio" in names and self.trainer.args.run_name is None:
            self.trainer.args.run_name = names["trackio"]
        if "tensorboard" in names and (board := self._tensorboard()) is not None and board.logging_dir is None:
            board.logging_dir = names["tensorboard"]

    def forget_wandb_variables(self) -> None:
        """The names are for the resumed run, not for the next one in this process."""
        for name in self._own_wandb_variables:
            os.environ.pop(name, None)
        self._own_wandb_variables = []

    def _tensorboard(self) -> TensorBoardCallback | None:
        callbacks = self.trainer.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, TensorBoardCallback)), None)


def _run_folder(args: TrainingArguments) -> Path:
    """The folder of the checkpoint that the settings name, which may be another run's; otherwise the output folder."""
    name = args.resume_from_checkpoint
    is_checkpoint = name is not None and (Path(name) / TRAINER_STATE_NAME).is_file()
    return Path(name).parent if is_checkpoint else Path(args.output_dir)
