"""NExt in one recipe: a run that is extrapolated during training and continues from there.

It consists of two runs, `before` and `after` in its folder, with `extrapolated` between them. Their recipes are the
loop's, except for the folder, the length and the starting point.
"""

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import release_memory

from ..evaluation.sampling import shut_down_engine
from ..run_folder import LOOP_FOLDERS, RECIPE_NAME, alpha_folder
from ..trainer.trainer import LookaheadTrainer
from ..trajectory.forecast import checkpoints_ahead
from ..trajectory.settings import ExtrapolationArguments
from .arguments import Recipe, replace_training
from .building import build_trainer
from .extrapolate import run as extrapolate
from .running import leave_recipe, prepare, train


def check_loop(recipe: Recipe) -> None:
    """Refuses a recipe with an `extrapolate_after` that can't work, or whose folder is used, before anything is
    trained.

    Raises:
        ValueError: Names the setting and what to do.
    """
    args = recipe.training
    check_settings(recipe)
    if args.resume_from_checkpoint is None:
        for name in LOOP_FOLDERS:
            folder = Path(args.output_dir) / name
            if folder.is_dir() and any(path.name != RECIPE_NAME for path in folder.iterdir()):
                raise ValueError(
                    f"{args.output_dir} holds an earlier run. Resume it (`--resume_from_checkpoint last`), or "
                    "choose another `output_dir`."
                )


def check_settings(recipe: Recipe) -> None:
    """Refuses a recipe with an `extrapolate_after` that can't work.

    Raises:
        ValueError: Names the setting and what to do.
    """
    args, loop = recipe.training, recipe.loop
    after, spacing = loop.extrapolate_after, recipe.trajectory.trajectory_steps
    if spacing is None:
        raise ValueError("`extrapolate_after` needs a trajectory. Set `trajectory_steps`.")
    if not 0 < after < args.max_steps:
        raise ValueError(
            f"`extrapolate_after` must be between 0 and `max_steps`, because the run continues; got {after} and "
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
    if args.resume_from_checkpoint not in (None, "last"):
        raise ValueError(
            f"`resume_from_checkpoint: {args.resume_from_checkpoint}`, and a loop resumes the one of its runs that "
            "was interrupted. Set `last`."
        )


def train_around_extrapolation(recipe: Recipe) -> tuple[LookaheadTrainer | None, str | None]:
    """Trains for `extrapolate_after` steps, extrapolates, and trains from there for the rest of `max_steps`.

    The second run has its own optimizer and schedule, and the next seed, so that its prompts come in another order.
    Finished parts of an interrupted loop are not repeated.

    Returns:
        `tuple[LookaheadTrainer | None, str | None]`: The trainer of the second run, `None` if it had ended already;
        and the error of a push that failed. A failed push after the first run is printed.
    """
    args, loop = recipe.training, recipe.loop
    before, between, after = (Path(args.output_dir) / name for name in LOOP_FOLDERS)
    failed_push = _train_and_shut_down(part_of(recipe, before, loop.extrapolate_after))
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
    return trainer, None if trainer is None else train(trainer, rest)


def part_of(recipe: Recipe, folder: Path, steps: int, start: Path | None = None) -> Recipe:
    """The recipe of one of the two runs; `start` is the adapter that the second starts from.

    Both go to one repository of the Hub, which gets the loop's name if none is set.
    """
    args, loop = recipe.training, recipe.loop
    seed = args.seed
    if start is not None:
        seed, loop = seed + 1, replace(loop, resume_adapter=str(start))
    repository = args.hub_model_id or folder.resolve().parent.name
    changes = {"output_dir": str(folder), "max_steps": steps, "seed": seed, "hub_model_id": repository}
    return replace(recipe, training=replace_training(args, **changes), loop=loop)


def _build(part: Recipe) -> LookaheadTrainer | None:
    try:
        return prepare(part, build_trainer)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _train_and_shut_down(part: Recipe) -> str | None:
    """Trains the first run, and frees its devices for the second. Returns the error of a push that failed."""
    trainer = _build(part)
    if trainer is None:
        return None
    failed_push = train(trainer, part)
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        shut_down_engine(trainer.vllm_generation.llm)
    elif trainer.use_vllm and trainer.accelerator.is_main_process:
        trainer.vllm_generation.vllm_client.close_communicator()
    trainer.accelerator.free_memory()
    return failed_push
