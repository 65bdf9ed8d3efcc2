"""FSDP2: parameters, gradients and optimizer state are `DTensor`s, sharded along their first dimension."""

from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .base import gather
from .replicated import ReplicatedState


class FSDP2State(ReplicatedState):
    """Local shards, uneven and sometimes empty, without padding. Hybrid sharding adds up over its shards only."""

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach().to_local() for p in self.optimized()]

    def publish(self) -> None:
        """Drops gathered parameters, so that the next forward pass gathers the written ones."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gradients(self) -> Iterator[torch.Tensor | None]:
        return (None if p.grad is None else p.grad.to_local() for p in self.optimized())

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        for p, gradient in zip(self.optimized(), gradients, strict=True):
            p.grad = None if gradient is None else _as_sharded(gradient, p)

    def clip_gradients(self) -> tuple[float, float]:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        return norm.item(), factor.item()

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        sharded = self.optimized()[0]
        group = sharded.device_mesh.get_group(sharded.placements.index(Shard(0)))
        return gather(totals, group)


def _as_sharded(local: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
