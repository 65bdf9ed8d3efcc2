# /// script
# requires-python = ">=3.11"
# dependencies = ["gxpo_trl"]
#
# [tool.uv.sources]
# gxpo_trl = { git = "https://github.com/gxpo-trl/gxpo_trl", tag = "v0.1.0" }
# ///
"""Trains a language model from a recipe.

    accelerate launch -m gxpo_trl.scripts.train --config recipes/tiny/gxpo.yaml
    gxpo train --config recipes/tiny/gxpo.yaml --learning_rate 3e-5 --output_dir out/slow
    uv run train.py --config gxpo:tiny/gxpo.yaml    # this file alone: uv installs what its header says

Model, dataset, PEFT and rewards are built from a recipe as TRL's own GRPO script builds them; `gxpo_trl/arithmetic`
and `gxpo_trl/tiny` name the embedded dataset and model. `--resume_from_checkpoint last` goes on from the newest
checkpoint in the output folder, and starts from the beginning where there is none. `--resume_adapter DIR` starts from
an adapter. A recipe with `extrapolate_after` (recipes/tiny/next.yaml) trains, extrapolates and goes on. `--dry-run`
says what a recipe would take and carries it out in small (`dry_run.py`).
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftModel
from transformers import BitsAndBytesConfig, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import get_dataset, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from gxpo_trl.run_folder import ADAPTER_CONFIG, LOOP_FOLDERS, RECIPE_NAME, TRAINER_STATE_NAME, alpha_folder, is_adapter
from gxpo_trl.scripts.dry_run import conclude, is_dry_run, rehearse
from gxpo_trl.scripts.extrapolate import run as extrapolate
from gxpo_trl.scripts.recipe import Recipe, as_recipe, parse_recipe
from gxpo_trl.tasks import resolve_dataset, resolve_model, resolve_reward
from gxpo_trl.tasks.datasets import hub_dataset
from gxpo_trl.tasks.names import EMBEDDED_MODEL
from gxpo_trl.trainer.grouped import sample_in_groups
from gxpo_trl.trainer.gxpo import GXPOTrainer
from gxpo_trl.trainer.publishing import PUSH_ERRORS
from gxpo_trl.trainer.sfpo import SFPOTrainer
from gxpo_trl.trainer.trainer import LookaheadTrainer
from gxpo_trl.trajectory.extrapolation import checkpoints_ahead
from gxpo_trl.trajectory.settings import ExtrapolationArguments


TRAINERS = {"gxpo": GXPOTrainer, "sfpo": SFPOTrainer, "grpo": LookaheadTrainer}


def build_trainer(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> LookaheadTrainer:
    """The trainer that a recipe describes.

    Raises:
        ValueError: If the recipe names no dataset, no model or no reward, or one that does not exist; if it asks for
            grouped sampling where that can't be had.
    """
    script_args, training_args, model_args, loop_args = recipe.script, recipe.training, recipe.model, recipe.loop
    _check_names(recipe)
    rewards, dataset = _load_rewards(recipe), _load_data(recipe)
    for name in ("prompt", "system_prompt"):  # benchmarks ask as the training data does, unless told otherwise
        if getattr(training_args, f"eval_{name}") is None:
            setattr(training_args, f"eval_{name}", getattr(recipe.problems, name))
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
        **(training_args.model_init_kwargs or {}),
    }
    model, peft_config = resolve_model(model_args.model_name_or_path), get_peft_config(model_args)
    quantization_config = get_quantization_config(model_args)
    if loop_args.resume_adapter:
        model = load_adapter(model, loop_args.resume_adapter, training_args.model_init_kwargs, quantization_config)
        training_args.model_init_kwargs = peft_config = quantization_config = None
    trainer = TRAINERS[training_args.update_rule](
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        callbacks=callbacks,
        quantization_config=quantization_config,
        peft_config=peft_config,
    )
    sample_in_groups(trainer, recipe.sampling.generation_backend, recipe.sampling.generation_token_budget)
    if recipe.rehearsal.dry_run:  # its end says all of it
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    return trainer


def _load_data(recipe: Recipe) -> DatasetDict | IterableDatasetDict:
    """The splits that the recipe names; with `dry_run` those of the embedded task alone."""
    script_args, training_args, mixture = recipe.script, recipe.training, recipe.mixture
    if mixture.datasets and not recipe.rehearsal.dry_run:
        given = [name for name, value in dataclasses.asdict(recipe.problems).items() if value is not None]
        if given:
            raise ValueError(f"`datasets` mixes datasets with prompts of their own. Leave out `{'`, `'.join(given)}`.")
        dataset = get_dataset(mixture)
    else:
        dataset = resolve_dataset(
            script_args.dataset_name,
            script_args.dataset_config,
            script_args.dataset_streaming,
            script_args.dataset_train_split,
            **dataclasses.asdict(recipe.problems),
        )
    if training_args.eval_strategy != "no" and script_args.dataset_test_split not in dataset:
        raise ValueError(
            f"`eval_strategy: {training_args.eval_strategy.value}` evaluates on the split "
            f"`{script_args.dataset_test_split}`, and the data has {', '.join(dataset)}. Name another "
            '`dataset_test_split`, or set `eval_strategy: "no"` and `eval_benchmarks`.'
        )
    return dataset


def _load_rewards(recipe: Recipe) -> list[Callable | str]:
    """Functions, and the name of a reward model."""
    rewards = [resolve_reward(name) for name in recipe.script.reward_funcs or []]
    model = recipe.script.reward_model_name_or_path
    return [*rewards, model] if model else rewards


def _check_names(recipe: Recipe) -> None:
    """Refuses a recipe that leaves out what can't be left out, before anything is loaded.

    Raises:
        ValueError: Names the setting.
    """
    script_args = recipe.script
    if not script_args.dataset_name and not recipe.mixture.datasets:
        raise ValueError("The recipe names no data. Set `dataset_name` or `datasets`.")
    if not recipe.model.model_name_or_path:
        raise ValueError("The recipe names no model. Set `model_name_or_path`.")
    if not script_args.reward_funcs and not script_args.reward_model_name_or_path:
        raise ValueError("The recipe names no reward. Set `reward_funcs` or `reward_model_name_or_path`.")


def load_adapter(
    model: str, adapter: str, model_options: dict[str, Any], quantization_config: BitsAndBytesConfig | None
) -> PeftModel:
    """A model with an adapter on it that can be trained further.

    Raises:
        ValueError: If the folder holds no adapter.
    """
    if not is_adapter(Path(adapter)):
        raise ValueError(f"`resume_adapter: {adapter}` holds no {ADAPTER_CONFIG}. Name the folder of an adapter.")
    if quantization_config is not None:
        model_options = {**model_options, "quantization_config": quantization_config}
    base = create_model_from_path(model, **model_options)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def train(trainer: LookaheadTrainer, recipe: Recipe) -> str | None:
    """Trains, saves model, state and model card, and pushes when asked. Returns what became of a push that failed."""
    script_args, training_args = recipe.script, recipe.training
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == "last":
        exists = os.path.isdir(training_args.output_dir)
        checkpoint = get_last_checkpoint(training_args.output_dir) if exists else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir, _internal_call=True)  # pushed below, all of it at once
    trainer.save_state()
    dataset = hub_dataset(script_args.dataset_name)
    trainer.create_model_card(os.path.basename(os.path.abspath(training_args.output_dir)), dataset)
    if training_args.push_to_hub:
        try:
            trainer.push_to_hub(dataset_name=dataset)
        except PUSH_ERRORS as error:
            return (
                f"error: the run is over and is in {training_args.output_dir}, but the Hub did not take it: {error}\n"
                f"`gxpo push {training_args.output_dir} --repo_id {trainer.hub_model_id}` tries again."
            )
    return None


def leave_recipe(text: str, folder: str | Path) -> None:
    """Keeps the recipe with the run."""
    path = Path(folder) / RECIPE_NAME
    if PartialState().is_main_process and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# ---- NExt in one recipe


def check_loop(recipe: Recipe) -> None:
    """Refuses a recipe with `extrapolate_after` that could not be carried out, before anything is trained.

    Raises:
        ValueError: Names the setting and what to do.
    """
    args, loop = recipe.training, recipe.loop
    after, spacing = loop.extrapolate_after, args.trajectory_steps
    if spacing is None:
        raise ValueError("`extrapolate_after` needs a trajectory. Set `trajectory_steps`.")
    if not 0 < after < args.max_steps:
        raise ValueError(
            f"`extrapolate_after` must be between 0 and `max_steps`, since the run goes on after it; got {after} and "
            f"{args.max_steps}."
        )
    if after % spacing:
        raise ValueError(f"`extrapolate_after` must be a multiple of `trajectory_steps` ({spacing}), got {after}.")
    ExtrapolationArguments(run=args.output_dir, method=loop.extrapolate_method, alpha=loop.extrapolate_alpha)
    k = checkpoints_ahead(loop.extrapolate_steps_ahead, spacing)
    if after // spacing < k + 2:
        raise ValueError(
            f"`extrapolate_after: {after}` leaves {after // spacing} checkpoints, and looking {k * spacing} steps "
            f"ahead takes {k + 2}. Lower `trajectory_steps` or `extrapolate_steps_ahead`, or extrapolate later."
        )
    if args.resume_from_checkpoint is None:
        for name in LOOP_FOLDERS:
            folder = Path(args.output_dir) / name
            if folder.is_dir() and any(path.name != RECIPE_NAME for path in folder.iterdir()):
                raise ValueError(
                    f"{args.output_dir} holds an earlier run. Go on with it (`--resume_from_checkpoint last`), or "
                    "choose another `output_dir`."
                )


def train_around_extrapolation(arguments: list[str], recipe: Recipe, text: str) -> tuple[LookaheadTrainer, str | None]:
    """Trains for `extrapolate_after` steps, extrapolates, and trains from there for the rest of `max_steps`.

    The second run has an optimizer and a schedule of its own, and the next seed, so that its prompts come in another
    order. What an interrupted run has finished is not done again.

    Args:
        arguments (`list[str]`): The command line.
        recipe (`Recipe`): What it says.
        text (`str`): The same in one file.

    Returns:
        `tuple[LookaheadTrainer, str | None]`: Of the second run, and what became of a push that failed. Of one after
            the first run there is a line.
    """
    args, loop = recipe.training, recipe.loop
    before, between, after = (Path(args.output_dir) / name for name in LOOP_FOLDERS)
    steps = loop.extrapolate_after
    if not (before / TRAINER_STATE_NAME).is_file():  # written when all of it is done
        _, failed_push = _train_part(arguments, before, steps, text)
        if failed_push is not None:
            print(failed_push)
    leave_recipe(text, args.output_dir)
    settings = ExtrapolationArguments(
        run=str(before),
        method=loop.extrapolate_method,
        steps_ahead=loop.extrapolate_steps_ahead,
        alpha=str(loop.extrapolate_alpha),
        output_dir=str(between),
    )
    adapter = alpha_folder(between, loop.extrapolate_alpha)
    if PartialState().is_main_process and not adapter.exists():
        extrapolate(settings)
    PartialState().wait_for_everyone()
    rest = ["--resume_adapter", str(adapter), "--seed", str(args.seed + 1)]
    return _train_part([*arguments, *rest], after, args.max_steps - steps, text)


def _train_part(arguments: list[str], folder: Path, steps: int, text: str) -> tuple[LookaheadTrainer, str | None]:
    try:
        part = parse_recipe([*arguments, "--output_dir", str(folder), "--max_steps", str(steps)])
        part.training.hub_model_id = part.training.hub_model_id or folder.resolve().parent.name
        trainer = build_trainer(part)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    leave_recipe(text, folder)
    return trainer, train(trainer, part)


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        rehearses = is_dry_run(arguments)
        if rehearses:
            arguments = rehearse(arguments, prog)
        recipe = parse_recipe(arguments, prog)
        text = as_recipe(arguments, recipe)
        if recipe.model.model_name_or_path == EMBEDDED_MODEL:
            torch.set_num_threads(1)  # it is too small to share
        is_loop = recipe.loop.extrapolate_after is not None
        trainer = check_loop(recipe) if is_loop else build_trainer(recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if is_loop:
        PartialState().wait_for_everyone()  # all have found the folder as it was
        trainer, failed_push = train_around_extrapolation(arguments, recipe, text)
    else:
        leave_recipe(text, recipe.training.output_dir)
        failed_push = train(trainer, recipe)
    if rehearses:
        trainer.accelerator.print(conclude(recipe, trainer))
    elif failed_push is None:
        trainer.accelerator.print(f"Done. The model is in {trainer.args.output_dir}.")
    trainer.end()
    if failed_push is not None:
        sys.exit(failed_push)


if __name__ == "__main__":
    main()
