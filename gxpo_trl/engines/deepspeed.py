"""What the ZeRO stages share: flat fp32 partitions.

A probe steps the base optimizer on the local partitions itself. DeepSpeed's own step would reduce the norm again, and
gather parameters that the reposition overwrites at once. Only the last step of an update is DeepSpeed's.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator

import torch
from accelerate.logging import get_logger

from ..update.state import OptimizerSnapshot
from .base import EngineState, gather


logger = get_logger(__name__)


class DeepSpeedState(EngineState):
    """Gradients lie where DeepSpeed has reduced them until they are clipped, and are this object's from then on."""

    def __init__(self, accelerator, model, optimizer, max_grad_norm: float):
        super().__init__(accelerator, model, optimizer, model.gradient_clipping())  # what DeepSpeed clips by
        self.zero = model.optimizer
        self._groups = self.base_optimizer.param_groups
        self._regions = [_merge(self.regions(i)) for i in range(len(self.optimized()))]
        self._own_gradients: list[torch.Tensor | None] | None = None  # the gradients, once DeepSpeed has given them up
        accumulation = model.get_data_types()[1]
        if accumulation != torch.float32:
            logger.warning(
                f"DeepSpeed accumulates gradients in {accumulation}: retention ratios have two or three digits then. "
                'Set `"data_types": {"grad_accum_dtype": "fp32"}` in its configuration.'
            )

    # ---- What each stage answers

    @abstractmethod
    def regions(self, i: int) -> Iterator[tuple[int, int]]:
        """Offset and length of the parameters in partition i, in order. What lies between them is padding, and may
        hold anything."""

    @abstractmethod
    def reduced_gradient(self, i: int) -> torch.Tensor:
        """What a pass has left in DeepSpeed for partition i, flat."""

    @abstractmethod
    def release_gradients(self) -> None:
        """Makes DeepSpeed forget its gradients, so that the next pass starts from zero."""

    @abstractmethod
    def step_partition(self, i: int) -> None:
        """Steps the base optimizer on partition i, whose `.grad` is set."""

    # ---- Parameters

    @property
    def publishes_alone(self) -> bool:
        return torch.distributed.get_world_size(self.zero.dp_process_group) == 1

    def parameters(self) -> list[torch.Tensor]:
        return [view for i, p in enumerate(self.optimized()) for view in self._views(p.detach(), i)]

    def _views(self, flat: torch.Tensor | None, i: int) -> list[torch.Tensor | None]:
        return [None if flat is None else flat.narrow(0, *region) for region in self._regions[i]]

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        self.base_optimizer.param_groups = self._groups  # a step of DeepSpeed's that failed has left one of them
        super().restore_optimizer(snapshot)

    # ---- Gradients

    def gradients(self) -> Iterator[torch.Tensor | None]:
        for i in range(len(self._regions)):
            flat = self._own_gradients[i] if self.holds_gradients else self.reduced_gradient(i)
            yield from self._views(flat, i)

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        self._own_gradients = [torch.zeros_like(p) for p in self.optimized()]
        for view, gradient in zip(self.gradients(), gradients, strict=True):
            view.copy_(gradient)

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients are this object's, not DeepSpeed's any more."""
        return self._own_gradients is not None

    def leave_gradients_to_deepspeed(self) -> None:
        """A pass is about to begin, and DeepSpeed reduces its gradients."""
        self._own_gradients = None

    def clear_gradients(self) -> None:
        self._own_gradients = [None] * len(self.optimized())
        self.release_gradients()

    def own_gradient(self, i: int) -> torch.Tensor:
        """`reduced_gradient`, in the partition's precision and free to be written."""
        return self.reduced_gradient(i).to(self.optimized()[i].dtype)

    def clip_gradients(self) -> tuple[float, float]:
        norm = self.gradient_norm()
        if self._own_gradients is None:
            self._own_gradients = [self.own_gradient(i) for i in range(len(self.optimized()))]
        factor = min(1.0, self.max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0  # as DeepSpeed has it
        for gradient in self._own_gradients:
            if gradient is not None and factor < 1.0:
                gradient.mul_(factor)
        return norm, factor

    # ---- Steps

    def step(self) -> None:
        for i, (partition, gradient) in enumerate(zip(self.optimized(), self._own_gradients, strict=True)):
            if gradient is None:
                continue
            buffer = partition.grad  # DeepSpeed's own, pinned, where the optimizer is offloaded; else there is none
            if buffer is None:
                partition.grad = gradient
            elif buffer is not gradient:
                buffer.copy_(gradient)
            try:
                self.step_partition(i)
            finally:
                partition.grad = buffer
                self.base_optimizer.param_groups = self._groups

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        return gather(totals, self.zero.dp_process_group)


class WholeParametersState(DeepSpeedState):
    """Where every rank has whole parameters, copied from the fp32 partitions: ZeRO-1, ZeRO-2 and `BF16_Optimizer`."""

    def publish(self) -> None:
        self.zero.update_lp_params()

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        super().restore_optimizer(snapshot)
        if None in snapshot[0]:  # DeepSpeed held views of a state that is gone; its next step makes them again
            self.zero._hp_optimizer_states_linked = False


def _merge(regions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Regions without the empty ones; those that touch become one."""
    merged = []
    for offset, length in regions:
        if length and merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((offset, length))
    return merged
