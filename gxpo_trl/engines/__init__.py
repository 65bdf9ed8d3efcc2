"""Where parameters, gradients and optimizer state live: one small file an engine, each a `TrainingState`."""

import dataclasses
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from .base import EngineState
from .bf16_optimizer import BF16OptimizerState
from .fsdp2 import FSDP2State
from .passes import DeepSpeedPasses, Passes
from .replicated import ReplicatedState
from .support import check_engine, nothing_to_step, unknown_deepspeed_optimizer
from .whole import whole_parameters
from .zero3 import Zero3State
from .zero12 import Zero12State


__all__ = ["ZERO_STATES", "Engine", "make_engine", "reduce_in_fp32", "whole_parameters"]

ZERO_STATES = {
    "DeepSpeedZeroOptimizer": Zero12State,
    "BF16_Optimizer": BF16OptimizerState,
    "DeepSpeedZeroOptimizer_Stage3": Zero3State,
}
"""By the class of DeepSpeed's optimizer, which is an optional dependency and therefore only named."""


@dataclass
class Engine:
    """How one run stores its parameters, and how it makes passes.

    Attributes:
        state (`EngineState`): Parameters, gradients and optimizer state.
        passes (`Passes`): Forward and backward.
    """

    state: EngineState
    passes: Passes

    def serves(self, model: torch.nn.Module, optimizer) -> bool:
        """Whether it is the engine of this model and optimizer; a second `train()` may wrap others."""
        return self.state.model is model and self.state.optimizer is optimizer


def make_engine(accelerator: Accelerator, model: torch.nn.Module, optimizer, max_grad_norm: float) -> Engine:
    """The engine that knows how this run stores its parameters; `model` is the wrapped one.

    Raises:
        ValueError: As `check_engine`, and if the optimizer would step nothing.
    """
    check_engine(accelerator, model)
    passes_class = Passes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        name = type(model.optimizer).__name__
        if name not in ZERO_STATES:
            raise unknown_deepspeed_optimizer(name)
        state_class, passes_class = ZERO_STATES[name], DeepSpeedPasses
    else:
        state_class = FSDP2State if accelerator.distributed_type == DistributedType.FSDP else ReplicatedState
    state = state_class(accelerator, model, optimizer, max_grad_norm)
    if not state.coordinates():
        raise nothing_to_step()
    return Engine(state, passes_class(accelerator, model, state))


def reduce_in_fp32(accelerator: Accelerator) -> None:
    """Has FSDP2 accumulate and reduce gradients in fp32 where `bf16: true` makes accelerate choose bf16.

    A retention ratio of two bf16 gradients has two or three digits. No accelerate or TRL setting reaches this one. To
    be called before the model is wrapped.
    """
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision != "no":
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
