"""FSDP2: parameters, gradients and optimizer state are `DTensor`s, sharded along their first dimension."""

from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .base import gather
from .replicated import ReplicatedState


class FSDP2State(ReplicatedState):
    """Local shards, uneven and sometimes empty, without padding. Hybrid sharding adds up over the shards of one group:
    the others hold copies of them."""

    def begin_step(self) -> None:
        """After an interrupted pass there may be gathered parameters in the model; none can be added to it."""

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach().to_local() for p in self.optimized()]

    def publish(self) -> None:
        """Drops gathered parameters, so that the next forward pass gathers the written ones."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gradients(self) -> Iterator[torch.Tensor | None]:
        return (None if p.grad is None else p.grad.to_local() for p in self.with_gradients())

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        for p, gradient in zip(self.with_gradients(), gradients, strict=True):
            p.grad = None if gradient is None else _as_sharded(gradient.to(p.device, p.dtype, copy=True), p)

    def agree(self, norm: torch.Tensor) -> torch.Tensor:
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # over the shards
        return norm if self.optimized()[0].device_mesh.ndim == 1 else super().agree(norm)

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        sharded = self.optimized()[0]
        mesh, shards = sharded.device_mesh, sharded.placements.index(Shard(0))
        by_place = gather(totals)[mesh.mesh].movedim(shards, 0)  # (shards, n), or (shards, groups, n)
        return by_place.reshape(mesh.size(shards), -1, len(totals)).amax(1)


def _as_sharded(local: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
