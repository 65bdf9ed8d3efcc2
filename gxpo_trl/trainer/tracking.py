"""Trackers: a run that is resumed goes on under the name it had, in wandb, trackio and TensorBoard."""

import json
import os
import sys
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..run_folder import TRACKERS_NAME


WANDB_VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME")


class TrackerRecorder(TrainerCallback):
    """Writes down what the trackers call a run, once they have begun."""

    def __init__(self, trainer: "TrackingMixin"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.forget_wandb_variables()
        if state.is_world_process_zero and (names := self.trainer.tracker_names()):  # trackers run on that one alone
            (Path(args.output_dir) / TRACKERS_NAME).write_text(json.dumps(names, indent=2) + "\n")


class TrackingMixin:
    """Resumes the run of each tracker in `report_to` with the checkpoint. What the user has named stays so."""

    def _set_up_tracking(self) -> None:
        self._own_wandb_variables: list[str] = []
        self.add_callback(TrackerRecorder(self))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint:
            named = isinstance(resume_from_checkpoint, (str, os.PathLike))
            self._resume_trackers(Path(resume_from_checkpoint).parent if named else Path(self.args.output_dir))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.forget_wandb_variables()

    def tracker_names(self) -> dict[str, str]:
        """What each tracker in use calls the run, by tracker."""
        names = {}
        wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
        if "wandb" in self.args.report_to and wandb is not None and wandb.run is not None:
            names["wandb"] = wandb.run.id
        if "trackio" in self.args.report_to and trackio is not None:
            names["trackio"] = trackio.context_vars.current_run.get().name
        if (board := self._tensorboard()) is not None and board.logging_dir is not None:
            names["tensorboard"] = str(board.logging_dir)
        return names

    def _resume_trackers(self, folder: Path) -> None:
        path = folder / TRACKERS_NAME
        names = json.loads(path.read_text()) if path.is_file() else {}
        if "wandb" in names and not any(name in os.environ for name in WANDB_VARIABLES):
            os.environ.update(zip(WANDB_VARIABLES, (names["wandb"], "allow"), strict=True))
            self._own_wandb_variables = list(WANDB_VARIABLES)
        if "trackio" in names and self.args.run_name is None:
            self.args.run_name = names["trackio"]
        if "tensorboard" in names and (board := self._tensorboard()) is not None and board.logging_dir is None:
            board.logging_dir = names["tensorboard"]

    def forget_wandb_variables(self) -> None:
        """They are for the run that is resumed, not for the next one of this process."""
        for name in self._own_wandb_variables:
            os.environ.pop(name, None)
        self._own_wandb_variables = []

    def _tensorboard(self) -> TensorBoardCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, TensorBoardCallback)), None)
