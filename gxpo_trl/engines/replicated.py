"""One process, or DistributedDataParallel: every rank holds whole parameters and, after a pass, equal gradients."""

import functools
from collections.abc import Iterator

import torch

from .base import EngineState, gather


class ReplicatedState(EngineState):
    """Gradients in `.grad`, and the optimizer's state in `optimizer.state[p]`.

    The trainer clips by the norm over the model's parameters, whether the optimizer holds them or not.
    """

    def optimized(self) -> list[torch.nn.Parameter]:
        trainable = set(self.trainable())
        return [p for group in self.optimizer.param_groups for p in group["params"] if p in trainable]

    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters of the model that get a gradient."""
        return [p for p in self._of_model if p.requires_grad]

    @functools.cached_property
    def _of_model(self) -> list[torch.nn.Parameter]:
        """Listed between steps: an interrupted pass of FSDP2 leaves gathered parameters in their place."""
        return list(self.model.parameters())

    def begin_step(self) -> None:
        """Lists the parameters again: a callback may have added an adapter."""
        self.__dict__.pop("_of_model", None)

    def with_gradients(self) -> list[torch.nn.Parameter]:
        """The parameters that `gradients()` are of."""
        return list(dict.fromkeys([*self.optimized(), *self.trainable()]))

    def coordinates(self) -> int:
        return sum(p.numel() for p in self.optimized())

    def publish(self) -> None:
        """The parameters themselves were written."""

    def gradients(self) -> Iterator[torch.Tensor | None]:
        return (p.grad for p in self.with_gradients())

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        for p, gradient in zip(self.with_gradients(), gradients, strict=True):
            p.grad = None if gradient is None else gradient.to(p.device, p.dtype, copy=True)

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.base_optimizer.zero_grad(set_to_none=True)  # it may hold parameters outside the model

    def clip_gradients(self) -> tuple[float, float]:
        norm = self.agree(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        return norm.item(), factor.item()

    def agree(self, norm: torch.Tensor) -> torch.Tensor:
        """A norm, shape (), that this rank has found: the same on every rank."""
        return self.gather_over_shards(norm.to(self.device)[None]).amax()

    def step(self) -> None:
        self.optimizer.step()

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        """All ranks hold copies. One may see what the others don't, and all have to decide alike."""
        return totals[None] if self.accelerator.num_processes == 1 else gather(totals).amax(0, keepdim=True)
