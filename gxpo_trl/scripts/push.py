"""Sends a run to the Hub: its adapter or weights, tokenizer, model card, recipe, log and state.

    gxpo push out/tiny-gxpo --repo_id me/tiny-gxpo
    gxpo push out/run --repo_id me/run --merge --evaluation out/eval/run    # whole weights, and what they score
    gxpo push out/run/checkpoint-200                                        # a checkpoint
    gxpo push out/run/extrapolated/next/alpha-1.5                           # a model of `gxpo extrapolate`

Of a run that was interrupted, `gxpo push out/run` sends the newest checkpoint. Nothing in the run's folder is changed.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..callbacks.hub import PUSH_ERRORS
from ..reporting.card import write_card
from ..reporting.runs import holds_run
from ..run_folder import (
    ADAPTER_WEIGHTS,
    CARD_NAME,
    CURVES_NAME,
    EXTRAPOLATED_FOLDER,
    LOG_NAME,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    RECIPE_NAME,
    RUN_NAME,
    TRAJECTORY_FOLDER,
    checkpoint_step,
)
from ..trainer.checkpoints import checkpoints_of, holds_model
from ..trajectory.merging import merge_adapter


WEIGHTS = (ADAPTER_WEIGHTS, MODEL_WEIGHTS, MODEL_INDEX, "pytorch_model.bin")
OF_THE_RUN = (CARD_NAME, CURVES_NAME, RECIPE_NAME, RUN_NAME, LOG_NAME)
NOT_OF_A_MODEL = ("optimizer*", "scheduler*", "rng_state*", "*.partial", "checkpoint-*", "_*", "global_step*")
NOT_OF_A_MODEL += ("training_args.bin", TRAJECTORY_FOLDER, EXTRAPOLATED_FOLDER, "runs", "pytorch_model_fsdp*")
NOT_OF_A_MODEL += ("latest", "zero_to_fp32.py")
"""Files and folders next to the model that are not pushed: for resuming, and other models."""


def model_folder(run: Path) -> Path:
    """The folder with the model: the run's own, or its newest checkpoint's if the run was interrupted after it.

    An incomplete model, from a run that was interrupted while saving, does not count.

    Raises:
        ValueError: If there is none.
    """
    if not run.is_dir():
        raise ValueError(f"There is no folder {run}.")
    newest = next((path for path in reversed(checkpoints_of(run)) if holds_model(path)), None)
    places = [place for place in (run, newest) if place is not None and holds_model(place)]
    saved = {place: path.stat().st_mtime for place in places for name in WEIGHTS if (path := place / name).is_file()}
    if not saved:
        raise ValueError(
            f"{run} holds no model and no checkpoint. Name the output folder of a run that has saved one."
        )
    return max(saved, key=saved.get)


def gather(run: Path, folder: Path, merge: bool, evaluation: Path | None) -> None:
    """Collects everything to send in a folder of its own.

    Raises:
        ValueError: If there is no model, or `merge` finds no adapter.
    """
    model = model_folder(run)
    step = checkpoint_step(model)
    home = run if step is None else model.parent
    if merge and not (model / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"`--merge` merges an adapter, and {model} holds whole weights. Leave it out.")
    is_run = holds_run(home) or holds_run(model)
    if evaluation is not None and not is_run:
        raise ValueError(f"{run} is not a run, so its card can't have an `--evaluation`. Leave it out.")
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_OF_A_MODEL))
    for name in OF_THE_RUN:
        if (home / name).is_file():
            shutil.copy(home / name, folder)
    if is_run:
        write_card(home, evaluation=evaluation, step=step, into=folder)
    if merge:
        merge_adapter(folder)


def send(folder: Path, repo_id: str, private: bool) -> str:
    """Sends a folder in one commit, and returns its address."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="gxpo push")
    return str(repo)


def push(run: Path, repo_id: str | None, merge: bool, private: bool, evaluation: Path | None) -> str:
    """Sends a run, and returns its address.

    Raises:
        ValueError: If there is nothing to send, or the Hub refuses it.
    """
    run = run.resolve()
    with tempfile.TemporaryDirectory() as folder:
        gather(run, Path(folder), merge, evaluation)
        try:
            return send(Path(folder), repo_id or run.name, private)
        except PUSH_ERRORS as error:
            raise ValueError(f"the Hub did not take it: {error}\nNothing is lost: the run is in {run}.") from error


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="a run's folder, a checkpoint, or an extrapolated model")
    parser.add_argument(
        "--repo_id", "--repo-id", help="on the Hub, as owner/name; else the folder's name, under yours"
    )
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base model first")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--evaluation", type=Path, help="the model's folder in the output of `gxpo eval`")
    options = parser.parse_args(arguments)
    try:
        address = push(options.run, options.repo_id, options.merge, options.private, options.evaluation)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Pushed to {address}")


if __name__ == "__main__":
    main()
