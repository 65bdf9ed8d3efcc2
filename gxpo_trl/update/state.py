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
        """The live local shards of the parameters that are stepped: of those of the model that require a gradient, the
        ones that the optimizer holds. Write them in place, then call `publish`."""

    def coordinates(self) -> int:
        """How many coordinates are stepped, over all ranks and without padding."""

    def publish(self) -> None:
        """Makes written parameters what the next forward pass reads."""

    def gradients(self) -> Iterator[torch.Tensor | None]:
        """The local gradients in turn; `None` where no token of the pass reached the parameter.

        Those of `parameters()` come first, in their order. Gradients of trainable parameters that the optimizer does
        not hold come after them: they are clipped with the others, and move nothing. Raw after a pass, clipped after
        `clip_gradients`, and still there after `step`, unless the optimizer writes into them.
        """

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Makes copies of these, which may be on another device, the gradients, as if a pass had left them."""

    def clear_gradients(self) -> None:
        """Drops the gradients. An optimizer step without gradients changes nothing."""

    def clip_gradients(self) -> tuple[float, float]:
        """Clips as the trainer does.

        Returns:
            `(norm, factor)`: the norm before clipping, over all ranks and equal on each, and what the gradients were
            multiplied with.
        """

    def squared_norm(self) -> torch.Tensor:
        """The squared norm of the local gradients, shape (), in `totals_dtype`."""

    def step(self) -> None:
        """One optimizer step of the local shards with the present gradients, without `publish`.

        The learning-rate schedule and the trainer's counters don't move.
        """

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        """Local totals, shape (n,), of all ranks that hold different shards: (shards, n), in one collective.

        Equal on every rank. Where ranks hold copies, which should have the same totals, the largest of them count, and
        what is not finite on one is not finite on any.
        """

    def snapshot_optimizer(self, on_host: bool = False) -> OptimizerSnapshot:
        """A copy of the optimizer's state, next to it or in pinned host memory, and of its param-group settings."""

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        """Takes the optimizer back to a snapshot, in place; state that did not exist then is dropped."""
