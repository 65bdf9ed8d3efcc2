"""One process, or DistributedDataParallel: every rank holds whole parameters and, after a pass, equal gradients."""

from collections.abc import Iterator

import torch

from .base import EngineState


class ReplicatedState(EngineState):
    """Gradients in `.grad`, and the optimizer's state in `optimizer.state[p]`."""

    def optimized(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def coordinates(self) -> int:
        return sum(p.numel() for p in self.optimized())

    def publish(self) -> None:
        """The parameters themselves were written."""

    def gradients(self) -> Iterator[torch.Tensor | None]:
        return (p.grad for p in self.optimized())

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        for p, gradient in zip(self.optimized(), gradients, strict=True):
            p.grad = gradient

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def clip_gradients(self) -> tuple[float, float]:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        return norm.item(), factor.item()

    def step(self) -> None:
        self.optimizer.step()

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        return totals[None]
