"""What the ZeRO stages share: flat fp32 partitions, and a backward pass that accelerate follows up with a step.

A probe steps the base optimizer on the local partitions itself. DeepSpeed's own step would reduce the norm again, and
gather parameters that the reposition overwrites at once. Only the last step of an update is DeepSpeed's.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.logging import get_logger

from .base import Engine, gather


logger = get_logger(__name__)


class BackwardOnly:
    """Stands in for accelerate's `DeepSpeedEngineWrapper`, whose backward pass ends in a step."""

    def __init__(self, model):
        self.model = model

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs) -> None:
        self.model.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.model.backward(loss, **kwargs)


class DeepSpeedEngine(Engine):
    """Gradients lie where DeepSpeed has reduced them until they are clipped, and are this object's from then on."""

    def __init__(self, accelerator, model, optimizer, max_grad_norm: float):
        super().__init__(accelerator, model, optimizer, model.gradient_clipping())  # what DeepSpeed clips by
        self.zero = model.optimizer
        self._regions = [_merge(self.regions(i)) for i in range(len(self.stepped()))]
        self._taken: list[torch.Tensor | None] | None = None  # the gradients, once DeepSpeed has given them up
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

    def param_group(self, i: int) -> dict[str, Any]:
        """The param group that partition i belongs to."""
        return self.base_optimizer.param_groups[i]

    def parameters(self) -> list[torch.Tensor]:
        return [view for i, p in enumerate(self.stepped()) for view in self._views(p.detach(), i)]

    def step_settings(self) -> list[tuple[float, float]]:
        groups = [self.param_group(i) for i, regions in enumerate(self._regions) for _ in regions]
        return [(float(group["lr"]), float(group.get("weight_decay", 0.0))) for group in groups]

    def _views(self, flat: torch.Tensor | None, i: int) -> list[torch.Tensor | None]:
        return [None if flat is None else flat.narrow(0, *region) for region in self._regions[i]]

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    # ---- Gradients

    def gradients(self) -> Iterator[torch.Tensor | None]:
        for i in range(len(self._regions)):
            yield from self._views(self.reduced_gradient(i) if self._taken is None else self._taken[i], i)

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        self._taken = [torch.zeros_like(p) for p in self.stepped()]
        for view, gradient in zip(self.gradients(), gradients, strict=True):
            view.copy_(gradient)

    def clear_gradients(self) -> None:
        self._taken = [None] * len(self.stepped())
        self.release_gradients()

    def take_gradient(self, i: int) -> torch.Tensor:
        """`reduced_gradient`, in the partition's precision and free to be written."""
        return self.reduced_gradient(i).to(self.stepped()[i].dtype)

    def clip_gradients(self) -> tuple[float, float]:
        norm = self.gradient_norm()
        if self._taken is None:
            self._taken = [self.take_gradient(i) for i in range(len(self.stepped()))]
        factor = min(1.0, self.max_grad_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0  # as DeepSpeed has it
        for gradient in self._taken:
            if gradient is not None and factor < 1.0:
                gradient.mul_(factor)
        return norm, factor

    # ---- Steps and passes

    def step(self) -> None:
        for i, (partition, gradient) in enumerate(zip(self.stepped(), self._taken, strict=True)):
            if gradient is None:
                continue
            buffer = partition.grad  # DeepSpeed's own, pinned, where the optimizer is offloaded; else there is none
            if buffer is None:
                partition.grad = gradient
            elif buffer is not gradient:
                buffer.copy_(gradient)
            self.step_partition(i)
            partition.grad = buffer

    def finish(self) -> None:
        """DeepSpeed's own step, with its counters and its schedule. After a fall-back the gradient is not DeepSpeed's
        any more: the step is taken here, and counted as one."""
        if self._taken is None:
            self.model.step()
            return
        self.model._global_grad_norm, _ = self.clip_gradients()
        self.step()
        self.publish()
        self.model.micro_steps += 1
        self.model.global_steps += 1
        self.model.global_samples += self.model.train_batch_size()
        if self.model.lr_scheduler is not None:
            self.model.lr_scheduler.step()
        self.clear_gradients()

    def backward(self, loss: torch.Tensor) -> None:
        with self.without_step():
            self.accelerator.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.accelerator.gradient_state._set_sync_gradients(last)
        yield

    @contextlib.contextmanager
    def without_step(self) -> Iterator[None]:
        self._taken = None
        wrapper = self.accelerator.deepspeed_engine_wrapped
        self.accelerator.deepspeed_engine_wrapped = BackwardOnly(self.model)
        try:
            yield
        finally:
            self.accelerator.deepspeed_engine_wrapped = wrapper

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        return gather(totals, self.zero.dp_process_group)


def _merge(regions: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Regions without the empty ones; those that touch become one."""
    merged = []
    for offset, length in regions:
        if length and merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((offset, length))
    return merged
