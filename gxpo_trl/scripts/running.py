"""Trains what a recipe describes, and saves it in its folder and on the Hub."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError

from ..callbacks.hub import PUSH_ERRORS
from ..run_folder import RECIPE_NAME, write_whole
from ..tasks.datasets import hub_dataset
from ..trainer.trainer import LookaheadTrainer
from .arguments import Recipe
from .resuming import find_start, settle


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Error numbers of a full disk."""
WRITER_OF_TORCH = "inline_container.cc"
"""A part of `torch.save`'s message about a file that it could not write."""


def prepare(recipe: Recipe, build: Callable[[Recipe], LookaheadTrainer]) -> LookaheadTrainer | None:
    """The trainer of a new or resumed run; `None`, with a message, if the run has ended.

    Its argument `resume_from_checkpoint` is then a folder or `None`.

    Raises:
        ValueError: If it can't begin or resume.
    """
    start = find_start(recipe.training)
    if start.over is not None:
        if PartialState().is_main_process:
            print(start.over)
        return None
    recipe.training.resume_from_checkpoint = start.checkpoint
    trainer = build(recipe)
    settle(trainer, start)
    leave_recipe(recipe, recipe.training.output_dir)
    return trainer


def train(trainer: LookaheadTrainer, recipe: Recipe) -> str | None:
    """Trains, saves model, model card and state, and pushes if set. Returns the error of a push that failed.

    The state is saved last: if it says that the run has ended, everything is saved.
    """
    args, dataset = recipe.training, hub_dataset(recipe.script.dataset_name)
    with explain_failed_writes(args.output_dir):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir, _internal_call=True)  # pushed below, all at once
        trainer.create_model_card(os.path.basename(os.path.abspath(args.output_dir)), dataset)
        trainer.save_state()
    if args.push_to_hub:
        try:
            trainer.push_to_hub(dataset_name=dataset)
        except PUSH_ERRORS as error:
            return (
                f"error: the run has ended and is in {args.output_dir}, but the Hub refused it: {error}\n"
                f"`gxpo push {args.output_dir} --repo_id {trainer.hub_model_id}` tries again."
            )
    return None


@contextlib.contextmanager
def explain_failed_writes(folder: str) -> Iterator[None]:
    """Context for writing into a run's folder. Other errors pass.

    Raises:
        SystemExit: With one sentence, if a file can't be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_of_disk = isinstance(error, SafetensorError) or getattr(error, "errno", None) in FULL
        if not is_of_disk and WRITER_OF_TORCH not in str(error):
            raise
        said = " ".join(str(error).split())
        free = shutil.disk_usage(folder).free / 2**20
        sys.exit(
            f"error: a file in {folder} can't be written ({said}); {free:,.0f} MB are free there. Free some space, "
            "and resume from the newest whole checkpoint with `--resume_from_checkpoint last`."
        )


def leave_recipe(recipe: Recipe, folder: str | Path) -> None:
    """Saves the recipe with the run."""
    path = Path(folder) / RECIPE_NAME
    if PartialState().is_main_process and not (path.is_file() and path.read_text(encoding="utf-8") == recipe.text):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, recipe.text)
