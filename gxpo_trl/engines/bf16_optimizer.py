"""ZeRO-1 in bf16 with fp32 gradient accumulation: flat fp32 partitions, and whole fp32 gradients on every rank."""

from collections.abc import Iterator

import torch

from .deepspeed import WholeParametersState


class BF16OptimizerState(WholeParametersState):
    """DeepSpeed's `BF16_Optimizer`."""

    def optimized(self) -> list[torch.Tensor]:
        return self.zero.fp32_groups_flat_partition

    def coordinates(self) -> int:
        return sum(p.numel() for group in self.zero.bf16_groups for p in group)

    def regions(self, i: int) -> Iterator[tuple[int, int]]:
        yield 0, self.optimized()[i].numel() - self.zero.group_paddings[i]

    def reduced_gradient(self, i: int) -> torch.Tensor:
        return self.zero.fp32_groups_gradient_flat_partition[i]

    def squared_norm(self) -> torch.Tensor:
        """Not finite, either, where the gradient is not that lies on this rank for the partitions of others: the norm
        that DeepSpeed will clip by is of all of it."""
        if self.holds_gradients:
            return super().squared_norm()
        norms = [torch.linalg.vector_norm(flat) for flat in self.zero.fp32_groups_gradients_flat]
        return super().squared_norm() + 0.0 * torch.stack(norms).sum()

    def release_gradients(self) -> None:
        self.zero.zero_grad()

    def step_partition(self, i: int) -> None:
        groups = self.base_optimizer.param_groups
        self.base_optimizer.param_groups = [groups[i]]
        self.base_optimizer.step()
        self.base_optimizer.param_groups = groups
        self.zero._lazy_init_hp_params_optimizer_state()
