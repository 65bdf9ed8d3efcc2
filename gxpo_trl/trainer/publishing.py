"""What goes to the Hub: the card of the run, its state, and that a push which fails costs nothing but the push."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
from accelerate.logging import get_logger
from huggingface_hub.errors import HfHubHTTPError

from ..reporting.card import write_card


logger = get_logger(__name__)

PUSH_ERRORS = (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError)
"""Of a Hub that can't be reached, or that refuses; an upload of weights says it with a `RuntimeError`."""


class PublishingMixin:
    """Completes the model card, and goes on training where a push fails."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository.

        Raises:
            ValueError: If the Hub can't be reached, or refuses; said before anything is trained.
        """
        try:
            super().init_hf_repo(token, private)
        except PUSH_ERRORS as error:
            raise ValueError(
                f"`push_to_hub: true`, and the Hub takes no repository {self.args.hub_model_id or ''}: {error} Log in "
                "(`hf auth login`), or train without it and `gxpo push` the run afterwards."
            ) from error

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir), about=self.describe_run())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._report_failed_pushes()
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        except PUSH_ERRORS as error:
            self._say_that_a_push_failed(error)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """A push in the background keeps its error to itself."""
        push = getattr(self, "push_in_progress", None)
        jobs: list[Future[Any]] = [] if push is None else push.jobs
        for job in jobs:
            if job.done() and not job.cancelled() and job.exception() is not None:
                self._say_that_a_push_failed(job.exception())
        if push is not None:
            push.jobs = [job for job in jobs if not job.done()]

    def _say_that_a_push_failed(self, error: BaseException) -> None:
        logger.warning(
            f"The push at step {self.state.global_step} or before it failed: {error} Training goes on, and the model "
            f"is in {self.args.output_dir}: `gxpo push {self.args.output_dir}` sends it later."
        )
