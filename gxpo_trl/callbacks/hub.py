"""Pushes to the Hub: the run's card and state. A push that fails does not end the training."""

import contextlib
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
from accelerate.logging import get_logger
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..reporting.card import write_card
from .records import describe_run, find_record
from .wrapping import wrap_method


logger = get_logger(__name__)

PUSH_ERRORS = (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError)
"""Errors of a Hub that can't be reached or that refuses. An upload of weights raises a `RuntimeError`."""


@contextlib.contextmanager
def explain_hub_errors(args: TrainingArguments) -> Iterator[None]:
    """Context for creating a trainer, which creates the repository that `push_to_hub` needs. Other errors pass.

    Raises:
        ValueError: If the Hub can't be reached or refuses, before anything is trained.
    """
    try:
        yield
    except PUSH_ERRORS as error:
        if not any(frame.f_code.co_name == "init_hf_repo" for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise ValueError(
            f"`push_to_hub: true`, and the Hub takes no repository {args.hub_model_id or ''}: {error} Log in "
            "(`hf auth login`), or train without it and `gxpo push` the run afterwards."
        ) from error


class HubCallback(TrainerCallback):
    """Completes the model card, and continues training if a push fails. transformers has no event for either.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        wrap_method(trainer, "create_model_card", self._complete_card)
        wrap_method(trainer, "_push_from_checkpoint", self._push)
        wrap_method(trainer, "_finish_current_push", self._finish_push)

    def _complete_card(self, create_model_card, *args, **kwargs):
        create_model_card(*args, **kwargs)
        if self.trainer.is_world_process_zero():
            record = find_record(self.trainer)
            about = describe_run(self.trainer) if record is None else record.describe_run()
            write_card(Path(self.trainer.args.output_dir), about=about)

    def _push(self, push_from_checkpoint, *args, **kwargs) -> None:
        self._report_failed_pushes()
        try:
            push_from_checkpoint(*args, **kwargs)
        except PUSH_ERRORS as error:
            self._say_that_a_push_failed(error)

    def _finish_push(self, finish_current_push) -> None:
        finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """A push in the background does not raise its error."""
        push = getattr(self.trainer, "push_in_progress", None)
        jobs: list[Future[Any]] = [] if push is None else push.jobs
        for job in jobs:
            if job.done() and not job.cancelled() and job.exception() is not None:
                self._say_that_a_push_failed(job.exception())
        if push is not None:
            push.jobs = [job for job in jobs if not job.done()]

    def _say_that_a_push_failed(self, error: BaseException) -> None:
        folder = self.trainer.args.output_dir
        logger.warning(
            f"The push at step {self.trainer.state.global_step} or before it failed: {error} Training continues, and "
            f"the model is in {folder}: `gxpo push {folder}` sends it later."
        )
