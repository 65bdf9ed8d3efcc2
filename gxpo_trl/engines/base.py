"""The part of a training state that all engines share: sums, and snapshots of the optimizer."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Set
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.tensor import DTensor

from ..update.slices import at_least_fp32
from ..update.snapshot import keep
from ..update.state import OptimizerSnapshot


# Torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


class EngineState(ABC):
    """A `TrainingState` of one engine. `TrainingState` documents the methods.

    Args:
        accelerator (`accelerate.Accelerator`): Of the trainer.
        model (`torch.nn.Module`): The model as the training loop sees it, wrapped.
        optimizer (`accelerate.optimizer.AcceleratedOptimizer`): Of the trainer.
        max_grad_norm (`float`): The trainer's clipping threshold; 0 or less does not clip.
    """

    publishes_alone = True

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer, max_grad_norm: float):
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm if max_grad_norm > 0 else float("inf")

    def begin_step(self) -> None:  # noqa: B027  most engines have nothing to do
        """Called before the first pass of a step."""

    @abstractmethod
    def optimized(self) -> list[torch.Tensor]:
        """The tensors that the optimizer steps, by which its state is kept."""

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.optimized()]

    @abstractmethod
    def coordinates(self) -> int: ...

    @abstractmethod
    def publish(self) -> None: ...

    @abstractmethod
    def gradients(self) -> Iterator[torch.Tensor | None]: ...

    @abstractmethod
    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None: ...

    @abstractmethod
    def clear_gradients(self) -> None: ...

    @abstractmethod
    def clip_gradients(self) -> tuple[float, float]: ...

    def gradient_norm(self) -> float:
        return self.gather_over_shards(self.squared_norm()[None]).sum().sqrt().item()

    def squared_norm(self) -> torch.Tensor:
        present = (g for g in self.gradients() if g is not None and g.numel())
        norms = [torch.linalg.vector_norm(g, dtype=at_least_fp32(g.dtype)) for g in present]
        squares = [norm.to(self.device, self.totals_dtype).square() for norm in norms]
        return sum(squares, torch.zeros((), dtype=self.totals_dtype, device=self.device))

    @abstractmethod
    def step(self) -> None: ...

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def totals_dtype(self) -> torch.dtype:
        """float64, in which billions can be counted, where the device has it."""
        return torch.float64 if self.device.type in ("cpu", "cuda", "xpu") else torch.float32

    @abstractmethod
    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor: ...

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer below accelerate's wrapper."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer

    def snapshot_optimizer(self, on_host: bool = False) -> OptimizerSnapshot:
        state = self.base_optimizer.state
        return (
            [_copy_of(state[p], on_host) if state.get(p) else None for p in self.optimized()],
            [_copy_of({k: v for k, v in g.items() if k != "params"}) for g in self.base_optimizer.param_groups],
        )

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        states, groups = snapshot
        for p, saved in zip(self.optimized(), states, strict=True):
            if saved is None:
                self.base_optimizer.state.pop(p, None)
            else:
                _write(self.base_optimizer.state[p], saved)
        for group, saved in zip(self.base_optimizer.param_groups, groups, strict=True):
            _write(group, saved, besides={"params"})


def _copy_of(state: dict[str, Any], on_host: bool = False) -> dict[str, Any]:
    return {k: _copy_of_tensor(v, on_host) if torch.is_tensor(v) else copy.deepcopy(v) for k, v in state.items()}


def _copy_of_tensor(tensor: torch.Tensor, on_host: bool) -> torch.Tensor:
    return keep(_local(tensor), on_host) if on_host else tensor.clone()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _write(state: dict[str, Any], saved: dict[str, Any], besides: Set[str] = frozenset()) -> None:
    """In place, because an engine or a captured graph may keep views of the tensors. What was not there then goes."""
    for name in state.keys() - saved.keys() - besides:
        del state[name]
    for name, value in saved.items():
        if torch.is_tensor(value) and torch.is_tensor(state.get(name)):
            _local(state[name]).copy_(_local(value))
        else:
            state[name] = copy.deepcopy(value)


def gather(totals: torch.Tensor, group: torch.distributed.ProcessGroup | None = None) -> torch.Tensor:
    """The totals, shape (n,), of every rank of a group, or of the run: (ranks, n), in one collective."""
    group = group or torch.distributed.group.WORLD
    gathered = totals.new_empty(group.size() * len(totals))
    _all_gather(gathered, totals, group=group)
    return gathered.view(group.size(), -1)
