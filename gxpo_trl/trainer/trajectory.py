"""Records a run's trajectory: its adapter, every `trajectory_steps` steps, on any engine."""

import copy
import itertools
import os
import shutil
from pathlib import Path

from accelerate.logging import get_logger
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import TrainerCallback

from ..run_folder import ADAPTER_WEIGHTS, TRAJECTORY_FOLDER, partial_path, step_folder
from ..trajectory.checkpoints import check_adapter_settings
from ..update.engines import whole_parameters


logger = get_logger(__name__)


class TrajectoryCallback(TrainerCallback):
    """Saves the adapter before the first step and after every `trajectory_steps` steps."""

    def __init__(self, trainer: "TrajectoryMixin"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            return  # resumed
        folder = Path(args.output_dir) / TRAJECTORY_FOLDER
        if args.should_save and folder.is_dir():
            _move_away(folder)
        self.trainer.save_adapter(step_folder(Path(args.output_dir), 0))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.trajectory_steps == 0:
            self.trainer.save_adapter(step_folder(Path(args.output_dir), state.global_step))


def _move_away(folder: Path) -> None:
    """Keeps what an earlier run with the same output folder recorded, under another name."""
    number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}-{i}").exists())
    folder.rename(folder.with_name(f"{folder.name}-{number}"))
    logger.warning(f"{folder} held the trajectory of another run, which is in {folder.name}-{number} now.")


class TrajectoryMixin:
    """Saves adapters alone, beside the ordinary checkpoints."""

    def _set_up_trajectory(self) -> None:
        if self.args.trajectory_steps is None:
            return
        if not isinstance(self.model, PeftModel):
            raise ValueError("`trajectory_steps` records an adapter, and there is none. Train with LoRA.")
        check_adapter_settings(self.model.active_peft_config.to_dict(), "the model's adapter")
        self.add_callback(TrajectoryCallback(self))

    def save_adapter(self, folder: Path) -> None:
        """The adapter in the precision that is stepped. The folder appears when it is complete."""
        tensors = {}
        for name, tensor in whole_parameters(self.accelerator, self.model_wrapped):  # on every rank
            if self.args.should_save:
                tensors[name] = tensor.cpu()
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        adapter = get_peft_model_state_dict(model, tensors, model.active_adapter, save_embedding_layers=False)
        partial = partial_path(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, partial / ADAPTER_WEIGHTS)
        config = copy.copy(model.active_peft_config)
        config.inference_mode = True  # as PEFT saves it
        config.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
