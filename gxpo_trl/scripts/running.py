"""Trains what a recipe describes, and leaves it in its folder and on the Hub."""

import os
from pathlib import Path

from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

from ..callbacks.hub import PUSH_ERRORS
from ..run_folder import RECIPE_NAME
from ..tasks.datasets import hub_dataset
from ..trainer.trainer import LookaheadTrainer
from .arguments import Recipe


def train(trainer: LookaheadTrainer, recipe: Recipe) -> str | None:
    """Trains, saves model, state and model card, and pushes when asked. Returns what became of a push that failed."""
    args, dataset = recipe.training, hub_dataset(recipe.script.dataset_name)
    checkpoint = args.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir, _internal_call=True)  # pushed below, all of it at once
    trainer.save_state()
    trainer.create_model_card(os.path.basename(os.path.abspath(args.output_dir)), dataset)
    if args.push_to_hub:
        try:
            trainer.push_to_hub(dataset_name=dataset)
        except PUSH_ERRORS as error:
            return (
                f"error: the run is over and is in {args.output_dir}, but the Hub did not take it: {error}\n"
                f"`gxpo push {args.output_dir} --repo_id {trainer.hub_model_id}` tries again."
            )
    return None


def leave_recipe(recipe: Recipe, folder: str | Path) -> None:
    """Keeps the recipe with the run."""
    path = Path(folder) / RECIPE_NAME
    if PartialState().is_main_process and not (path.is_file() and path.read_text(encoding="utf-8") == recipe.text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.text, encoding="utf-8")
