# /// script
# requires-python = ">=3.11"
# dependencies = ["gxpo_trl"]
#
# [tool.uv.sources]
# gxpo_trl = { git = "https://github.com/gxpo-trl/gxpo_trl", tag = "v0.2.0" }
# ///
"""Trains a language model from a recipe.

    accelerate launch -m gxpo_trl.scripts.train --config recipes/tiny/gxpo.yaml
    gxpo train --config recipes/tiny/gxpo.yaml --learning_rate 3e-5 --output_dir out/slow
    uv run train.py --config gxpo:tiny/gxpo.yaml    # only this file: uv installs what its header lists

Model, dataset, PEFT and rewards are built from a recipe as in TRL's own GRPO script; `gxpo_trl/arithmetic`
and `gxpo_trl/tiny` name the embedded dataset and model. `--resume_from_checkpoint last` resumes from the newest whole
checkpoint in the output folder, starts from the beginning if there is none, and does nothing if the run has ended.
Without it, a folder that holds a run is refused. `--resume_adapter DIR` starts from an adapter. A recipe with
`extrapolate_after` (recipes/tiny/next.yaml) trains, extrapolates and continues (`next_loop.py`). `--dry-run` prints
what a recipe needs and rehearses it (`dry_run.py`).
"""

import contextlib
import sys

import torch

from gxpo_trl.run_folder import check_output_dir
from gxpo_trl.scripts.arguments import Recipe
from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.dry_run import conclude, rehearse
from gxpo_trl.scripts.failing import clear_away, one_sentence
from gxpo_trl.scripts.lock import hold_folder, on_main_process
from gxpo_trl.scripts.next_loop import check_loop, train_around_extrapolation
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.running import prepare, train
from gxpo_trl.tasks.names import EMBEDDED_MODEL


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    try:
        recipe = parse_recipe(sys.argv[1:] if arguments is None else arguments, prog)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_sentence(error)}")
    if not recipe.rehearsal.dry_run:
        run(recipe)
        return
    try:
        run(rehearse(recipe))
    except Exception as error:  # a rehearsal is meant to find it
        sys.exit(f"error: {recipe.origin.explain(error)}")


def run(recipe: Recipe) -> None:
    """Trains what a recipe describes, and prints the result. Its folder is locked during that time.

    A new folder is removed if nothing can be built, and at the end of a rehearsal.
    """
    if recipe.model.model_name_or_path == EMBEDDED_MODEL:
        torch.set_num_threads(1)  # more threads do not help such a small model
    is_loop, folder = recipe.loop.extrapolate_after is not None, recipe.training.output_dir
    with contextlib.ExitStack() as held:
        try:
            check_output_dir(folder)
            made = held.enter_context(hold_folder(folder))
            with contextlib.ExitStack() as building:
                keep = building.enter_context(clear_away(made))
                if is_loop:
                    on_main_process(lambda: check_loop(recipe))
                else:
                    trainer = prepare(recipe, build_trainer)
                if recipe.rehearsal.dry_run:
                    held.enter_context(building.pop_all())
                else:
                    keep()
        except Exception as error:  # TRL's constructors may raise any error
            sys.exit(f"error: {recipe.origin.explain(error)}")
        if is_loop:
            trainer, failed_push = train_around_extrapolation(recipe)
        else:
            failed_push = None if trainer is None else train(trainer, recipe)
        if trainer is None:
            return  # the run has ended
        if recipe.rehearsal.dry_run:
            trainer.accelerator.print(conclude(recipe, trainer))
        elif failed_push is None:
            trainer.accelerator.print(f"Done. The model is in {trainer.args.output_dir}.")
        trainer.accelerator.end_training()
    if failed_push is not None:
        sys.exit(failed_push)


if __name__ == "__main__":
    main()
