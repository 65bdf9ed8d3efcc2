"""TRL's loss computed again on the micro-batches of a step, without a trace in what TRL logs or keeps."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from trl import GRPOTrainer

from ..engines import Engine
from ..rollout.window import Replayed


MOVED_BY_LOSS = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
"""TRL's adaptive entropy bonus: `compute_loss` moves it, and replays must not."""


class Replays:
    """Passes after the first.

    Args:
        trainer (`GRPOTrainer`): Whose loss is computed.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self._moved_at_start: dict[str, Any] = {}

    def begin(self) -> None:
        """Pass 1 is about to begin: what its loss will move is what replays begin with too."""
        self._moved_at_start = self._moved_by_loss()

    def run(self, engine: Engine, model, replayed: Iterable[Replayed]) -> None:
        """One pass over micro-batches at the present parameters, as TRL's own `training_step` would make it."""
        trainer, passes = self.trainer, engine.passes
        trainer._metrics["train"].clear()
        self._set_moved_by_loss(self._moved_at_start)
        for inputs, steps, is_last, entropy_masks in replayed:
            trainer.current_gradient_accumulation_steps = steps
            kept = {"get_high_entropy_mask": _one_by_one(entropy_masks)} if entropy_masks else {}
            with passes.micro_batch(is_last):
                with trainer.compute_loss_context_manager(), methods_set(trainer, kept):
                    loss = trainer.compute_loss(model, inputs, num_items_in_batch=None)  # TRL counts none
                passes.backward(loss if trainer.loss_is_scaled_for_ga else loss / steps)

    @contextlib.contextmanager
    def private_metrics(self) -> Iterator[dict[str, list[float]]]:
        """Around replays: TRL's metrics, and what its loss moves, stay those of pass 1. Yields what a pass wrote."""
        trainer = self.trainer
        metrics, moved = trainer._metrics, self._moved_by_loss()
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield trainer._metrics["train"]
        finally:
            trainer._metrics = metrics
            self._set_moved_by_loss(moved)

    def _moved_by_loss(self) -> dict[str, Any]:
        return {name: getattr(self.trainer, name) for name in MOVED_BY_LOSS}

    def _set_moved_by_loss(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.trainer, name, value)


@contextlib.contextmanager
def methods_set(trainer: GRPOTrainer, methods: dict[str, Callable]) -> Iterator[None]:
    """Context in which a trainer has these methods, inside of what subclasses and users put around TRL's."""
    own = {name: vars(trainer)[name] for name in methods if name in vars(trainer)}
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(trainer)[name]
        vars(trainer).update(own)


def _one_by_one(masks: Iterable[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A method that returns one after the other, whatever it is given."""
    left = iter(masks)

    def kept(*args, **kwargs) -> torch.Tensor:
        mask = next(left, None)
        if mask is None:
            raise RuntimeError(
                "The loss asked for `get_high_entropy_mask` more often in a later pass than in pass 1: let it ask "
                "equally often in each pass, or set `top_entropy_quantile: 1.0`."
            )
        return mask

    return kept
