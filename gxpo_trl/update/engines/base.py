"""What an active step asks of a training engine: the same few calls, wherever parameters and gradients are stored."""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer


# Torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor

OptimizerSnapshot = tuple[list[dict[str, Any] | None], list[dict[str, Any]]]


class Engine(ABC):
    """One rank's view of the training state, as lists of local shards in one order.

    Args:
        accelerator (`accelerate.Accelerator`): Of the trainer.
        model (`torch.nn.Module`): The model as the training loop sees it, wrapped.
        optimizer (`accelerate.optimizer.AcceleratedOptimizer`): Of the trainer.
        max_grad_norm (`float`): The trainer's clipping threshold; 0 or less does not clip.
    """

    publishes_alone = True
    """Whether `publish` needs no other rank, so that one that fails can restore its parameters by itself."""

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer, max_grad_norm: float):
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm if max_grad_norm > 0 else float("inf")

    # ---- Parameters

    @abstractmethod
    def stepped(self) -> list[torch.Tensor]:
        """What the optimizer steps, which is also what its state is kept by."""

    def parameters(self) -> list[torch.Tensor]:
        """The live local shards of the trainable parameters. Write them in place, then call `publish`."""
        return [p.detach() for p in self.stepped()]

    @abstractmethod
    def coordinates(self) -> int:
        """How many trainable coordinates the model has, over all ranks and without padding."""

    @abstractmethod
    def step_settings(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each local shard, from its param group."""

    @abstractmethod
    def publish(self) -> None:
        """Makes written parameters what the next forward pass reads."""

    # ---- Gradients

    @abstractmethod
    def gradients(self) -> Iterator[torch.Tensor | None]:
        """The local gradients in turn; `None` where no token of the pass reached the parameter.

        Raw after a pass, clipped after `clip_gradients`, and still there after `step`.
        """

    @abstractmethod
    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Makes these the gradients, as if a pass had left them."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Drops the gradients. An optimizer step without gradients changes nothing."""

    @abstractmethod
    def clip_gradients(self) -> tuple[float, float]:
        """Clips as the trainer does.

        Returns:
            `(norm, factor)`: the norm before clipping, over all ranks, and what the gradients were multiplied with.
        """

    def gradient_norm(self) -> float:
        """The norm of the whole gradient over all ranks."""
        return self.gather_over_shards(self.squared_norm()).sum().sqrt().item()

    def squared_norm(self) -> torch.Tensor:
        """The squared norm of the local gradients, shape (1,), in `totals_dtype`."""
        norms = [torch.linalg.vector_norm(g) for g in self.gradients() if g is not None and g.numel()]
        squares = [norm.to(self.device, self.totals_dtype).square() for norm in norms]
        return sum(squares, torch.zeros(1, dtype=self.totals_dtype, device=self.device))

    # ---- Steps and passes

    @abstractmethod
    def step(self) -> None:
        """One optimizer step of the local shards with the present gradients, without `publish`.

        The learning-rate schedule and the trainer's counters don't move.
        """

    @abstractmethod
    def finish(self) -> None:
        """Called when the corrective gradient is there: takes the step that the training loop won't take."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch's loss, already divided for accumulation, to the pass."""
        self.accelerator.backward(loss)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are reduced over ranks with the last of a pass."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def without_step(self) -> AbstractContextManager:
        """Around a backward pass that the accelerator would follow up with an optimizer step."""
        return contextlib.nullcontext()

    # ---- Sums over ranks

    @property
    def device(self) -> torch.device:
        """Where totals are added up."""
        return self.accelerator.device

    @property
    def totals_dtype(self) -> torch.dtype:
        """float64, in which billions can be counted, where the device has it."""
        return torch.float64 if self.device.type in ("cpu", "cuda", "xpu") else torch.float32

    @abstractmethod
    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        """Local totals, shape (n,), of all ranks that hold different shards: (ranks, n)."""

    # ---- Optimizer state

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer below accelerate's wrapper."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer

    def snapshot_optimizer(self) -> OptimizerSnapshot:
        """A copy of the optimizer's state and of its param-group settings."""
        state = self.base_optimizer.state
        return (
            [_copy_of(state[p]) if state.get(p) else None for p in self.stepped()],
            [_copy_of({k: v for k, v in g.items() if k != "params"}) for g in self.base_optimizer.param_groups],
        )

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        """Takes the optimizer back to a snapshot, in place; state that did not exist then is dropped."""
        states, groups = snapshot
        for p, saved in zip(self.stepped(), states, strict=True):
            if saved is None:
                self.base_optimizer.state.pop(p, None)
            else:
                _write(self.base_optimizer.state[p], saved)
        for group, saved in zip(self.base_optimizer.param_groups, groups, strict=True):
            group.update(_copy_of(saved))


def _copy_of(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if torch.is_tensor(v) else copy.deepcopy(v) for k, v in state.items()}


def _write(state: dict[str, Any], saved: dict[str, Any]) -> None:
    """In place, because an engine may keep views of the tensors."""
    for name in state.keys() - saved.keys():
        del state[name]
    for name, value in saved.items():
        if torch.is_tensor(value) and torch.is_tensor(state.get(name)):
            state[name].copy_(value)
        else:
            state[name] = copy.deepcopy(value)


def gather(totals: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The totals, shape (n,), of every rank of a group: (ranks, n), in one collective."""
    gathered = totals.new_empty(group.size() * len(totals))
    _all_gather(gathered, totals, group=group)
    return gathered.view(group.size(), -1)
