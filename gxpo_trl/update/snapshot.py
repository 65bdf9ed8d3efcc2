"""Where an active step started, and the way back to it."""

from dataclasses import dataclass

import torch

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
        optimizer (`OptimizerSnapshot`, *optional*): The optimizer's state, if it is to be restored.
    """

    theta_0: list[torch.Tensor]
    grad_0: list[torch.Tensor | None]
    optimizer: OptimizerSnapshot | None

    @classmethod
    def of(cls, state: TrainingState, on_host: bool = False, with_optimizer: bool = False) -> "Origin":
        return cls(
            theta_0=[keep(shard, on_host) for shard in state.parameters()],
            grad_0=[None if g is None else keep(g, on_host) for g in state.gradients()],
            optimizer=state.snapshot_optimizer() if with_optimizer else None,
        )

    def return_to(self, state: TrainingState, alone: bool = False) -> None:
        """Restores θ0 and g0, and the optimizer's state if it was kept.

        `alone` says that the other ranks may be anywhere, so that nothing may wait for them.
        """
        shards = state.parameters()
        for shard, theta_0 in zip(shards, self.theta_0, strict=True):
            shard.copy_(theta_0)
        if state.publishes_alone or not alone:
            state.publish()
        if self.optimizer is not None:
            state.restore_optimizer(self.optimizer)
        state.clear_gradients()
        grads = zip(self.grad_0, shards, strict=True)
        state.set_gradients([None if g is None else g.to(shard.device, shard.dtype) for g, shard in grads])
