"""Learning rates that are multiplied while an optimizer steps, and at no other time."""

from collections.abc import Callable
from typing import Any

import torch

from .support import check_rates


class ScaledRates:
    """Multiplies the rates of an optimizer's param groups in each of its steps, whoever takes it: a probe, the
    training loop, or DeepSpeed.

    Schedules, logs and checkpoints see the rates as they are between steps, which are their own.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer below all wrappers.
        multiplier (`Callable[[], float]`): Asked in each step.

    Raises:
        ValueError: As `check_rates`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multiplier: Callable[[], float]):
        check_rates(optimizer)
        self.optimizer, self.multiplier = optimizer, multiplier
        self.depth = 0  # a step may call that of the class above it, whose hooks are the same
        self.kept: list[tuple[dict[str, Any], float | torch.Tensor]] = []
        before = optimizer.register_step_pre_hook(lambda stepped, *_: self._multiply(stepped))
        after = optimizer.register_step_post_hook(lambda *_: self._step_ends())
        self.hooks = (before, after)

    @property
    def largest(self) -> float:
        """Of the groups. With 0 a step now would have no length, as the first one of a warm-up."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _multiply(self, optimizer: torch.optim.Optimizer) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        multiplier, tensors = self.multiplier(), set()
        for group in optimizer.param_groups:
            rate = group["lr"]
            if torch.is_tensor(rate):  # captured in a graph, which reads it where it is; groups may share one
                if id(rate) not in tensors:
                    tensors.add(id(rate))
                    self.kept.append((group, rate.clone()))
                    rate.mul_(multiplier)
            else:
                self.kept.append((group, rate))
                group["lr"] = rate * multiplier

    def _step_ends(self) -> None:
        self.depth -= 1
        if self.depth <= 0:
            self.put_back()

    def put_back(self) -> None:
        """The rates are what they are between steps: a step that failed has not put them back."""
        self.depth = 0
        for group, rate in self.kept:
            if torch.is_tensor(rate):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self.kept = []

    def release(self) -> None:
        """Stops changing the optimizer."""
        self.put_back()
        for hook in self.hooks:
            hook.remove()
