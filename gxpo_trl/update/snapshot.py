"""Where an active step started, and the way back to it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .slices import Part, aligned_slices, at_least_fp32
from .state import OptimizerSnapshot, TrainingState


def keep(tensor: torch.Tensor, on_host: bool) -> torch.Tensor:
    """A copy of a tensor, next to it or in pinned host memory."""
    device = torch.device("cpu") if on_host else tensor.device
    pinned = on_host and tensor.device.type == "cuda"
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned)
    return kept.copy_(tensor, non_blocking=True)  # ordered with the steps that follow, on the device's own stream


@dataclass
class Origin:
    """θ0, and what else has to be restored when a step falls back.

    Attributes:
        theta_0 (`list[torch.Tensor]`): One copy a local shard.
        grad_0 (`list[torch.Tensor | None]`): g0 as pass 1 left it, before clipping.
        optimizer (`OptimizerSnapshot`, *optional*): The optimizer's state, if it will be restored.
    """

    theta_0: list[torch.Tensor]
    grad_0: list[torch.Tensor | None]
    optimizer: OptimizerSnapshot | None

    @classmethod
    def of(cls, state: TrainingState, on_host: bool = False, with_optimizer: bool = False) -> "Origin":
        return cls(
            theta_0=[keep(shard, on_host) for shard in state.parameters()],
            grad_0=[None if g is None else keep(g, on_host) for g in state.gradients()],
            optimizer=state.snapshot_optimizer(on_host) if with_optimizer else None,
        )

    def moves(self, state: TrainingState) -> Iterator[tuple[Part, torch.Tensor, torch.Tensor]]:
        """Slices of the parameters as they are now, which may be written, and of θ0 in fp32 at least."""
        for part, (theta, theta_0) in aligned_slices(state.parameters(), self.theta_0):
            dtype = at_least_fp32(theta.dtype)
            yield part, theta, theta_0.to(theta.device, dtype, non_blocking=True)

    def consumed(self, state: TrainingState, clip_0: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The slices that `moves` has, of g0 and of the gradient that is there now, as the optimizer consumed them.

        Args:
            state (`TrainingState`): With a gradient that is clipped.
            clip_0 (`float`): What g0 was multiplied with when it was clipped.
        """
        count = len(self.theta_0)  # of the gradients, those that move a parameter
        grads = self.grad_0[:count], itertools.islice(state.gradients(), count)
        for _, (theta, grad_0, grad_1) in aligned_slices(state.parameters(), *grads):
            dtype = at_least_fp32(theta.dtype)
            grad_0, grad_1 = (grad.to(theta.device, dtype, non_blocking=True) for grad in (grad_0, grad_1))
            yield grad_0 * clip_0, grad_1

    def restore(self, state: TrainingState, alone: bool = False) -> None:
        """Restores θ0, and the optimizer's state if it was kept.

        `alone` says that the other ranks may be anywhere, so that nothing may wait for them.
        """
        for shard, theta_0 in zip(state.parameters() if self.theta_0 else [], self.theta_0, strict=True):
            shard.copy_(theta_0)
        if state.publishes_alone or not alone:
            state.publish()
        if self.optimizer is not None:
            state.restore_optimizer(self.optimizer)

    def return_to(self, state: TrainingState, alone: bool = False) -> None:
        """Restores g0 too, as if pass 1 were just over. `alone` as above."""
        self.restore(state, alone)
        state.clear_gradients()
        state.set_gradients(self.grad_0)

    def exchange(self, state: TrainingState) -> None:
        """Replaces the present parameters by θ0, and keeps them; a second call reverses the first.

        One that fails, or is interrupted, leaves both as they were.
        """
        exchanged, before = [], None
        try:
            for _, (here, there) in aligned_slices(state.parameters(), self.theta_0):
                before = here, here.clone(), there, there.clone()
                _write(here, before[3], there, before[1])
                exchanged.append((here, there))
                before = None
            state.publish()
        except BaseException:
            if before is not None:
                if exchanged and exchanged[-1][0] is before[0]:
                    exchanged.pop()
                _write(*before)
            for here, there in exchanged:
                _write(here, there.clone(), there, here.clone())
            if state.publishes_alone:
                state.publish()
            raise


def _write(one: torch.Tensor, values: torch.Tensor, other: torch.Tensor, other_values: torch.Tensor) -> None:
    one.copy_(values)
    other.copy_(other_values)
