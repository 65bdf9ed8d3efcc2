"""The micro-batches of one optimizer step, kept so that the same loss can be computed again at other parameters."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class RandomState:
    """The state of torch's generators: the CPU's and those of the devices that the model lives on."""

    cpu: torch.Tensor
    devices: dict[torch.device, torch.Tensor]

    @classmethod
    def of(cls, devices: set[torch.device]) -> "RandomState":
        """The present state, for the CPU and the given accelerator devices."""
        return cls(
            cpu=torch.get_rng_state(),
            devices={d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type != "cpu"},
        )

    def restore(self) -> None:
        """Makes this the present state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@dataclass
class MicroBatch:
    """One slice of the rollouts, as pass 1 saw it.

    Attributes:
        inputs (`dict[str, Any]`): What the loss reads; never written.
        random_state (`RandomState`): The generators just before the forward pass, so that dropout draws the same
            masks.
        per_token_logps (`torch.Tensor`, *optional*): The policy's detached log-probabilities in pass 1, (B, T).
    """

    inputs: dict[str, Any]
    random_state: RandomState
    per_token_logps: torch.Tensor | None = None


@dataclass
class RolloutWindow:
    """The micro-batches of one optimizer step.

    Args:
        devices (`set[torch.device]`): Where the model lives.
        freeze_old_logps (`bool`): Whether replays measure the importance ratio against pass 1's log-probabilities
            where the rollouts carry none of their own. TRL leaves them out when a batch is used once, and then takes
            the *current* ones: at θ1 and θ̃ every ratio would be 1, nothing would be clipped, and the objective
            another.
    """

    devices: set[torch.device]
    freeze_old_logps: bool
    micro_batches: list[MicroBatch] = field(default_factory=list)
    packed: list[dict[str, Any]] | None = None  # what replays compute on, where that is not what pass 1 did

    def open_micro_batch(self, inputs: dict[str, Any]) -> None:
        """Takes in one micro-batch; call just before its forward pass in pass 1."""
        self.micro_batches.append(MicroBatch(inputs, RandomState.of(self.devices)))

    def keep_logps(self, per_token_logps: torch.Tensor) -> None:
        """Keeps the log-probabilities (B, T) that pass 1 computed for the micro-batch taken in last."""
        self.micro_batches[-1].per_token_logps = per_token_logps.detach()

    def rollouts(self) -> list[dict[str, Any]]:
        """The micro-batches as replays are to see them."""
        return [self._frozen(micro_batch) for micro_batch in self.micro_batches]

    def replay(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """One pass: yields `(inputs, is_last)`, with the generators set as they were for that micro-batch.

        A pass leaves the generators where pass 1 did, so that later rollouts are those of a run without replays.
        """
        if self.packed is not None:
            yield from self._replay_packed()
            return
        for i, micro_batch in enumerate(self.micro_batches):
            inputs = self._frozen(micro_batch)
            micro_batch.random_state.restore()
            yield inputs, i == len(self.micro_batches) - 1

    def _replay_packed(self) -> Iterator[tuple[dict[str, Any], bool]]:
        after_pass_1 = RandomState.of(self.devices)
        for i, inputs in enumerate(self.packed):
            yield inputs, i == len(self.packed) - 1
        after_pass_1.restore()

    def _frozen(self, micro_batch: MicroBatch) -> dict[str, Any]:
        if self.freeze_old_logps and micro_batch.inputs.get("old_per_token_logps") is None:
            return {**micro_batch.inputs, "old_per_token_logps": micro_batch.per_token_logps}
        return micro_batch.inputs
