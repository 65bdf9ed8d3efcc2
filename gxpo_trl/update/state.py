"""What an update rule asks of whatever holds the parameters: a few calls on lists of local shards."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch


OptimizerSnapshot = tuple[list[dict[str, Any] | None], list[dict[str, Any]]]


class TrainingState(Protocol):
    """One rank's parameters, gradients and optimizer, as lists of local shards in one order.

    Attributes:
        device (`torch.device`): Where totals are added up.
        totals_dtype (`torch.dtype`): What they are added up in.
        publishes_alone (`bool`): Whether `publish` needs no other rank, so that one that fails can restore its
            parameters by itself.
    """

    device: torch.device
    totals_dtype: torch.dtype
    publishes_alone: bool

    def parameters(self) -> list[torch.Tensor]:
        """The live local shards of the trainable parameters. Write them in place, then call `publish`."""

    def coordinates(self) -> int:
        """How many trainable coordinates the model has, over all ranks and without padding."""

    def publish(self) -> None:
        """Makes written parameters what the next forward pass reads."""

    def gradients(self) -> Iterator[torch.Tensor | None]:
        """The local gradients in turn; `None` where no token of the pass reached the parameter.

        Raw after a pass, clipped after `clip_gradients`, and still there after `step`.
        """

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Makes these the gradients, as if a pass had left them."""

    def clear_gradients(self) -> None:
        """Drops the gradients. An optimizer step without gradients changes nothing."""

    def clip_gradients(self) -> tuple[float, float]:
        """Clips as the trainer does.

        Returns:
            `(norm, factor)`: the norm before clipping, over all ranks, and what the gradients were multiplied with.
        """

    def gradient_norm(self) -> float:
        """The norm of the whole gradient over all ranks."""

    def step(self) -> None:
        """One optimizer step of the local shards with the present gradients, without `publish`.

        The learning-rate schedule and the trainer's counters don't move.
        """

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        """Local totals, shape (n,), of all ranks that hold different shards: (ranks, n), in one collective."""

    def snapshot_optimizer(self) -> OptimizerSnapshot:
        """A copy of the optimizer's state and of its param-group settings."""

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        """Takes the optimizer back to a snapshot, in place; state that did not exist then is dropped."""
