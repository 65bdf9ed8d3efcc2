"""Where an active step started, and the way back to it."""

from dataclasses import dataclass

import torch

from .engines import Engine, OptimizerSnapshot


@dataclass(frozen=True)
class Storage:
    """Where and how the copies of an active step are kept.

    Attributes:
        on_host (`bool`): In pinned host memory instead of beside the parameters.
        grad_dtype (`torch.dtype`, *optional*): What g0 is kept in; `None` keeps its own.
    """

    on_host: bool = False
    grad_dtype: torch.dtype | None = None

    def keep(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of a tensor."""
        device = torch.device("cpu") if self.on_host else tensor.device
        pinned = self.on_host and tensor.device.type == "cuda"
        kept = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device, pin_memory=pinned)
        return kept.copy_(tensor, non_blocking=True)  # ordered with the steps that follow, on the device's own stream


@dataclass
class Origin:
    """θ0, and what else has to be restored when a step falls back.

    Attributes:
        theta_0 (`list[torch.Tensor]`): One copy a local shard.
        grad_0 (`list[torch.Tensor | None]`, *optional*): g0 as pass 1 left it, before clipping. `None` if it is not
            kept.
        optimizer (`OptimizerSnapshot`, *optional*): The optimizer's state, if it is to be restored.
    """

    theta_0: list[torch.Tensor]
    grad_0: list[torch.Tensor | None] | None
    optimizer: OptimizerSnapshot | None

    @classmethod
    def of(cls, engine: Engine, storage: Storage, keeps_grad: bool, rollback: bool) -> "Origin":
        grad_0 = None
        if keeps_grad:
            grad_0 = [None if g is None else storage.keep(g, storage.grad_dtype) for g in engine.gradients()]
        return cls(
            theta_0=[storage.keep(shard) for shard in engine.parameters()],
            grad_0=grad_0,
            optimizer=engine.snapshot_optimizer() if rollback else None,
        )

    def return_to(self, engine: Engine, alone: bool = False) -> None:
        """Restores θ0, the optimizer's state if it was kept, and g0 if it was kept, else leaves no gradient.

        `alone` says that the other ranks may be anywhere, so that nothing may wait for them.
        """
        shards = engine.parameters()
        for shard, theta_0 in zip(shards, self.theta_0, strict=True):
            shard.copy_(theta_0)
        if engine.publishes_alone or not alone:
            engine.publish()
        if self.optimizer is not None:
            engine.restore_optimizer(self.optimizer)
        engine.clear_gradients()
        if self.grad_0 is not None:
            engine.set_gradients(
                [None if g is None else g.to(p.device, p.dtype) for g, p in zip(self.grad_0, shards, strict=True)]
            )
