"""Passes over the rollouts: what an engine does around forward and backward, apart from where it stores things."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from .base import EngineState
from .deepspeed import DeepSpeedState


class Passes:
    """Passes of a training loop that steps by itself.

    Args:
        accelerator (`accelerate.Accelerator`): Of the trainer.
        model (`torch.nn.Module`): The model as the training loop sees it, wrapped.
        state (`EngineState`): Where the gradients go.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, state: EngineState):
        self.accelerator, self.model, self.state = accelerator, model, state

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

    def finish(self) -> bool:
        """Called when the corrective gradient is there: takes the step that the training loop won't take.

        Returns:
            `bool`: Whether the step has been taken.
        """
        return False


class BackwardOnly:
    """Stands in for accelerate's `DeepSpeedEngineWrapper`, whose backward pass ends in a step."""

    def __init__(self, model):
        self.model = model

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs) -> None:
        self.model.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.model.backward(loss, **kwargs)


class DeepSpeedPasses(Passes):
    """Passes under DeepSpeed, whose backward pass accelerate follows up with a step."""

    state: DeepSpeedState

    def backward(self, loss: torch.Tensor) -> None:
        with self.without_step():
            self.accelerator.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.accelerator.gradient_state._set_sync_gradients(last)
        yield

    @contextlib.contextmanager
    def without_step(self) -> Iterator[None]:
        self.state.leave_gradients_to_deepspeed()
        wrapper = self.accelerator.deepspeed_engine_wrapped
        self.accelerator.deepspeed_engine_wrapped = BackwardOnly(self.model)
        try:
            yield
        finally:
            self.accelerator.deepspeed_engine_wrapped = wrapper

    def finish(self) -> bool:
        """DeepSpeed's own step, with its counters and its schedule. After a fall-back the gradient is not DeepSpeed's
        any more: the step is taken here, and counted as one."""
        if not self.state.holds_gradients:
            self.model.step()
            return True
        self.model._global_grad_norm, _ = self.state.clip_gradients()
        self.state.step()
        self.state.publish()
        self.model.micro_steps += 1
        self.model.global_steps += 1
        self.model.global_samples += self.model.train_batch_size()
        if self.model.lr_scheduler is not None:
            self.model.lr_scheduler.step()
        self.state.clear_gradients()
        return True
