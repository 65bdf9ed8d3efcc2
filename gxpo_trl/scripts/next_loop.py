"""NExt in one recipe: a run that is extrapolated on its way, and goes on from there.

It is two runs, `before` and `after` in its folder, with `extrapolated` between them. Their recipes are those of the
loop, but for folder, length and where they start from.
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import release_memory

from ..run_folder import LOOP_FOLDERS, RECIPE_NAME, TRAINER_STATE_NAME, alpha_folder
from ..trainer.trainer import LookaheadTrainer
from ..trajectory.forecast import checkpoints_ahead
from ..trajectory.settings import ExtrapolationArguments
from .arguments import Recipe, replace_training
from .building import build_trainer
from .extrapolate import run as extrapolate
from .running import leave_recipe, train


def check_loop(recipe: Recipe) -> None:
    """Refuses a recipe with `extrapolate_after` that could not be carried out, before anything is trained.

    Raises:
        ValueError: Names the setting and what to do.
    """
    args, loop = recipe.training, recipe.loop
    after, spacing = loop.extrapolate_after, recipe.trajectory.trajectory_steps
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


def train_around_extrapolation(recipe: Recipe) -> tuple[LookaheadTrainer, str | None]:
    """Trains for `extrapolate_after` steps, extrapolates, and trains from there for the rest of `max_steps`.

    The second run has an optimizer and a schedule of its own, and the next seed, so that its prompts come in another
    order. What an interrupted run has finished is not done again.

    Returns:
        `tuple[LookaheadTrainer, str | None]`: Of the second run, and what became of a push that failed. Of one after
            the first run there is a line.
    """
    args, loop = recipe.training, recipe.loop
    before, between, after = (Path(args.output_dir) / name for name in LOOP_FOLDERS)
    if not (before / TRAINER_STATE_NAME).is_file():  # written when all of it is done
        failed_push = _train_and_shut_down(part_of(recipe, before, loop.extrapolate_after))
        gc.unfreeze()  # vLLM's engine freezes all there is, the trainer included
        release_memory()
        if failed_push is not None:
            print(failed_push)
    leave_recipe(recipe, args.output_dir)
    adapter = alpha_folder(between, loop.extrapolate_alpha)
    if PartialState().is_main_process and not adapter.exists():
        extrapolate(
            ExtrapolationArguments(
                run=str(before),
                method=loop.extrapolate_method,
                steps_ahead=loop.extrapolate_steps_ahead,
                alpha=str(loop.extrapolate_alpha),
                output_dir=str(between),
            )
        )
    PartialState().wait_for_everyone()
    rest = part_of(recipe, after, args.max_steps - loop.extrapolate_after, start=adapter)
    trainer = _build(rest)
    return trainer, train(trainer, rest)


def part_of(recipe: Recipe, folder: Path, steps: int, start: Path | None = None) -> Recipe:
    """The recipe of one of the two runs; `start` is the adapter that the second starts from.

    Both go to one repository of the Hub, which is named after the loop if it has no name.
    """
    args, loop = recipe.training, recipe.loop
    seed = args.seed
    if start is not None:
        seed, loop = seed + 1, replace(loop, resume_adapter=str(start))
    repository = args.hub_model_id or folder.resolve().parent.name
    changes = {"output_dir": str(folder), "max_steps": steps, "seed": seed, "hub_model_id": repository}
    return replace(recipe, training=replace_training(args, **changes), loop=loop)


def _build(part: Recipe) -> LookaheadTrainer:
    try:
        trainer = build_trainer(part)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    leave_recipe(part, part.training.output_dir)
    return trainer


def _train_and_shut_down(part: Recipe) -> str | None:
    """Trains the first run, and leaves its devices to the second. Returns what became of a push that failed."""
    trainer = _build(part)
    failed_push = train(trainer, part)
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    elif trainer.use_vllm and trainer.accelerator.is_main_process:
        trainer.vllm_generation.vllm_client.close_communicator()
    trainer.accelerator.free_memory()
    return failed_push
