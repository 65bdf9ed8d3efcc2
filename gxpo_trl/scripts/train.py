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
an adapter. A recipe with `extrapolate_after` (recipes/tiny/next.yaml) trains, extrapolates and goes on
(`next_loop.py`). `--dry-run` says what a recipe would take and carries it out in small (`dry_run.py`).
"""

import sys

import torch
from accelerate import PartialState

from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.dry_run import conclude, rehearse
from gxpo_trl.scripts.next_loop import check_loop, train_around_extrapolation
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.running import leave_recipe, train
from gxpo_trl.tasks.names import EMBEDDED_MODEL


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    try:
        recipe = parse_recipe(sys.argv[1:] if arguments is None else arguments, prog)
        if recipe.rehearsal.dry_run:
            recipe = rehearse(recipe)
        if recipe.model.model_name_or_path == EMBEDDED_MODEL:
            torch.set_num_threads(1)  # it is too small to share
        is_loop = recipe.loop.extrapolate_after is not None
        if is_loop:
            check_loop(recipe)
        else:
            trainer = build_trainer(recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if is_loop:
        PartialState().wait_for_everyone()  # all have found the folder as it was
        trainer, failed_push = train_around_extrapolation(recipe)
    else:
        leave_recipe(recipe, recipe.training.output_dir)
        failed_push = train(trainer, recipe)
    if recipe.rehearsal.dry_run:
        trainer.accelerator.print(conclude(recipe, trainer))
    elif failed_push is None:
        trainer.accelerator.print(f"Done. The model is in {trainer.args.output_dir}.")
    trainer.accelerator.end_training()
    if failed_push is not None:
        sys.exit(failed_push)


if __name__ == "__main__":
    main()
