"""Where a training engine keeps parameters, gradients and optimizer state.

Everything above this file works on lists of local shards. There is one class per storage; `make_engine` picks it.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


OptimizerSnapshot = tuple[list[dict[str, Any] | None], list[dict[str, Any]]]

REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_HPU,
)
"""One process, or DistributedDataParallel: every rank holds whole parameters and, after a pass, equal gradients."""

COUPLED_DECAY = (
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
)
"""Optimizers that add weight decay to the gradient; Adam and its kin say so in their param groups."""


class TorchEngine:
    """Plain torch and DDP: whole parameters, gradients in `.grad`, state in `optimizer.state[p]`.

    Args:
        accelerator (`accelerate.Accelerator`): Of the trainer.
        model (`torch.nn.Module`): The model as the training loop sees it (wrapped, under DDP).
        optimizer (`accelerate.optimizer.AcceleratedOptimizer`): Of the trainer.
        max_grad_norm (`float`): The trainer's clipping threshold; 0 or less does not clip.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, optimizer, max_grad_norm: float):
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm if max_grad_norm > 0 else float("inf")

    @property
    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def parameters(self) -> list[torch.Tensor]:
        """The live local shards of the trainable parameters. Write them in place, then call `publish`."""
        return [p.detach() for p in self._trainable]

    @property
    def device(self) -> torch.device:
        """Where totals are added up."""
        return self.accelerator.device

    def coordinates(self) -> int:
        """How many trainable coordinates the model has, over all ranks."""
        return sum(p.numel() for p in self._trainable)

    def step_settings(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each local shard, from its param group."""
        return [
            (float(group["lr"]), float(group.get("weight_decay", 0.0)))
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]

    def publish(self) -> None:
        """Makes written parameters what the next forward pass reads. They are, here."""

    def gradients(self) -> list[torch.Tensor | None]:
        """The live local gradients, one a parameter; `None` where no token of the pass reached it."""
        return [p.grad for p in self._trainable]

    def set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Puts gradients where the trainer's own step will find them."""
        for p, gradient in zip(self._trainable, gradients, strict=True):
            p.grad = gradient

    def clear_gradients(self) -> None:
        """Drops the gradients. An optimizer step without gradients changes nothing."""
        self.model.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """The norm of the whole gradient over all ranks."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()

    def clip_gradients(self) -> tuple[float, float]:
        """Clips as the trainer does.

        Returns:
            `(norm, factor)`: the norm before clipping, over all ranks, and what the gradients were multiplied with.
        """
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        return norm.item(), factor.item()

    def step(self) -> None:
        """One optimizer step with the present gradients, which stay. The learning-rate schedule doesn't move."""
        self.optimizer.step()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch's loss, already divided for accumulation, to the pass."""
        self.accelerator.backward(loss)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are reduced over ranks with the last of a pass."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def gather_over_shards(self, totals: torch.Tensor) -> torch.Tensor:
        """Local totals, shape (n,), of all ranks that hold different shards: (ranks, n). Each holds all, here."""
        return totals[None]

    def snapshot_optimizer(self) -> OptimizerSnapshot:
        """A copy of the optimizer's state and of its param-group settings."""
        state = self.optimizer.state
        return (
            [_copy_state(state[p]) if p in state else None for p in self._trainable],
            [_copy_state({k: v for k, v in g.items() if k != "params"}) for g in self.optimizer.param_groups],
        )

    def restore_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        """Takes the optimizer back to a snapshot; state that did not exist then is dropped."""
        states, groups = snapshot
        for p, saved in zip(self._trainable, states, strict=True):
            if saved is None:
                self.optimizer.state.pop(p, None)
            else:
                self.optimizer.state[p] = saved
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(saved)


def _copy_state(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if torch.is_tensor(v) else copy.deepcopy(v) for k, v in state.items()}


def check_engine(accelerator: Accelerator) -> None:
    """Refuses an engine whose storage is not known here.

    Raises:
        ValueError: Names the engine and what to use instead.
    """
    if accelerator.scaler is not None:
        raise ValueError(
            "Lookahead updates don't support fp16: its loss scaler skips steps on its own. Set `fp16: false` and "
            "`bf16: true` (or neither, for fp32)."
        )
    if accelerator.distributed_type not in REPLICATED:
        raise ValueError(
            f"Lookahead updates don't support the engine {accelerator.distributed_type.value} yet. Launch with a "
            "single process or with DDP (`accelerate launch --multi_gpu`), or set `update_rule: grpo`."
        )
    if accelerator.parallelism_config is not None and accelerator.parallelism_config.tp_enabled:
        raise ValueError(
            "Lookahead updates don't support tensor parallelism. Set `tp_size` to 1 and use DDP, or set "
            "`update_rule: grpo`."
        )


def check_decoupled_decay(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose weight decay goes through its moments, where the direction it moved in can't be told
    from the parameters before and after.

    Raises:
        ValueError: Names the optimizer and what to do.
    """
    for group in optimizer.param_groups:
        decoupled = group.get("decoupled_weight_decay", not isinstance(optimizer, COUPLED_DECAY))
        if group.get("weight_decay", 0.0) > 0 and not decoupled:
            raise ValueError(
                "`retention: update` reads the direction of a step from the parameters, and "
                f"{type(optimizer).__name__} adds its weight decay to the gradient, so that the two can't be told "
                "apart. Set `weight_decay: 0.0`, or use AdamW, or `retention: gradient`."
            )


def make_engine(accelerator: Accelerator, model: torch.nn.Module, optimizer, max_grad_norm: float) -> TorchEngine:
    """The engine that knows how this run stores its parameters.

    Raises:
        ValueError: As `check_engine`.
    """
    check_engine(accelerator)
    return TorchEngine(accelerator, model, optimizer, max_grad_norm)
