"""Records a run's trajectory: its adapter every few steps, on any engine and with any trainer."""

import copy
import itertools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.logging import get_logger
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from ..checks import check_at_least
from ..engines import whole_parameters
from ..run_folder import ADAPTER_WEIGHTS, TRAJECTORY_FOLDER, partial_path, saved_steps, step_folder
from ..trajectory.checkpoints import check_adapter_settings
from .adapters import adapter_layers, trained_adapters


logger = get_logger(__name__)


@dataclass
class TrajectoryArguments:
    r"""
    Settings of [`TrajectoryCallback`]: when adapters are saved.

    Parameters:
        trajectory_steps (`int`, *optional*):
            Saves only the LoRA adapter, every this many steps, under `<output_dir>/trajectory/step-000010/`, for `gxpo
            extrapolate`. Unset for never.
    """

    trajectory_steps: int | None = field(
        default=None,
        metadata={
            "help": "Saves only the LoRA adapter, every this many steps, under "
            "`<output_dir>/trajectory/step-000010/`, for `gxpo extrapolate`. Unset for never."
        },
    )

    def __post_init__(self):
        if self.trajectory_steps is not None:
            check_at_least("trajectory_steps", self.trajectory_steps, 1)


class TrajectoryCallback(TrainerCallback):
    """Saves the adapter before the first step and after every `every_steps` steps, in addition to checkpoints.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer of a LoRA adapter.
        every_steps (`int`): Optimizer steps between two adapters.

    Raises:
        ValueError: If the model is not a `PeftModel` with one trained adapter, or `gxpo extrapolate` can't read its
            trajectory.
    """

    def __init__(self, trainer: Trainer, every_steps: int):
        check_at_least("trajectory_steps", every_steps, 1)
        if not isinstance(trainer.model, PeftModel):
            if any(adapter_layers(trainer.model)):
                raise ValueError(
                    "`trajectory_steps` records the adapter of a `PeftModel`, and the model has an adapter's layers "
                    "in it and none around it. Pass `peft_config` to the trainer, or a model of `get_peft_model`."
                )
            raise ValueError(
                "`trajectory_steps` records an adapter, and there is none. Train with LoRA: `use_peft: true` in a "
                "recipe, `peft_config` in a script."
            )
        if len(adapters := trained_adapters(trainer.model)) > 1:
            raise ValueError(
                f"`trajectory_steps` records one adapter, and {', '.join(adapters)} are trained together. Activate "
                "one of them (`model.set_adapter`)."
            )
        check_adapter_settings(trainer.model.active_peft_config.to_dict(), "the model's adapter")
        self.trainer, self.every_steps = trainer, every_steps

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / TRAJECTORY_FOLDER
        if state.global_step > 0:  # resumed
            if args.should_save:
                _set_aside(folder, state.global_step)
            return
        if args.should_save and folder.is_dir():
            _move_away(folder)
        self.save_adapter(step_folder(Path(args.output_dir), 0))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            self.save_adapter(step_folder(Path(args.output_dir), state.global_step))

    def save_adapter(self, folder: Path) -> None:
        """Saves the adapter in the precision that the optimizer steps. The folder appears when it is complete."""
        trainer, should_save = self.trainer, self.trainer.args.should_save
        tensors = {}
        for name, tensor in whole_parameters(trainer.accelerator, trainer.model_wrapped):  # on every rank
            if should_save:
                tensors[name] = tensor.cpu()
        if not should_save:
            return
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        adapter = get_peft_model_state_dict(model, tensors, model.active_adapter, save_embedding_layers=False)
        partial = partial_path(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, partial / ADAPTER_WEIGHTS)
        config = copy.copy(model.active_peft_config)
        config.inference_mode = True  # this and the next as PEFT saves them
        if config.task_type is None:
            base = model.get_base_model()
            config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def _free_name(folder: Path) -> Path:
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def _move_away(folder: Path) -> None:
    """Renames the trajectory that an earlier run recorded in the same output folder."""
    place = _free_name(folder)
    folder.rename(place)
    logger.warning(f"{folder} held the trajectory of another run, which is in {place.name} now.")


def _set_aside(folder: Path, step: int) -> None:
    """Moves the adapters away that the run recorded after the step from which it is resumed: it now goes elsewhere."""
    later = [path for saved, path in saved_steps(folder).items() if saved > step]
    if not later:
        return
    place = _free_name(folder)
    place.mkdir()
    for path in later:
        path.rename(place / path.name)
    logger.warning(f"The adapters after step {step}, from which the run is resumed, are in {place.name} now.")
