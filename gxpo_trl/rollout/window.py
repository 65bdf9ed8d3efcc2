"""The micro-batches of one optimizer step, kept so that the same loss can be computed again at other parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .generators import Generators


@dataclass
class MicroBatch:
    """One slice of the rollouts, as pass 1 saw it.

    Attributes:
        inputs (`dict[str, Any]`): The inputs of the loss; never changed.
        accumulation_steps (`int`): The divisor of its loss.
        random_state (`list`): The generators' state just before the forward pass.
        drew (`bool`): Whether forward or backward pass drew random numbers.
        per_token_logps (`torch.Tensor`, *optional*): The policy's detached log-probabilities in pass 1, (B, T).
        entropy_masks (`list[torch.Tensor]`): TRL's masks of the tokens of high entropy in pass 1, each (B, T), in the
            order in which the loss has asked for them; none where all tokens count.
    """

    inputs: dict[str, Any]
    accumulation_steps: int
    random_state: list[Any]
    drew: bool = False
    per_token_logps: torch.Tensor | None = None
    entropy_masks: list[torch.Tensor] = field(default_factory=list)


class Replayed(NamedTuple):
    """One micro-batch of a replay: the inputs of the loss, its divisor, whether it is the last of the pass, and the
    masks of high entropy."""

    inputs: dict[str, Any]
    accumulation_steps: int
    is_last: bool
    entropy_masks: Sequence[torch.Tensor] = ()


@dataclass
class RolloutWindow:
    """The micro-batches of one optimizer step.

    Args:
        generators (`Generators`): Those that the model may draw from.
        freeze_old_logps (`bool`): Whether replays measure the importance ratio against pass 1's log-probabilities
            if the rollouts have none. TRL leaves them out when a batch is used once, and then uses the *current* ones:
            at θ1 and θ̃ every ratio would be 1, nothing would be clipped, and the objective would change.
    """

    generators: Generators
    freeze_old_logps: bool
    micro_batches: list[MicroBatch] = field(default_factory=list)
    packed: list[dict[str, Any]] | None = None  # the batches of replays, if they differ from pass 1's

    def open_micro_batch(self, inputs: dict[str, Any], accumulation_steps: int) -> None:
        """Records one micro-batch; call it just before its forward pass in pass 1."""
        self.micro_batches.append(MicroBatch({**inputs}, accumulation_steps, self.generators.state()))

    def keep_logps(self, per_token_logps: torch.Tensor) -> None:
        """Keeps the log-probabilities (B, T) that pass 1 computed first for the last recorded micro-batch."""
        if self.micro_batches and self.micro_batches[-1].per_token_logps is None:
            self.micro_batches[-1].per_token_logps = per_token_logps.detach()

    def keep_entropy_mask(self, mask: torch.Tensor) -> None:
        """Keeps a mask of the tokens of high entropy, (B, T), of the last recorded micro-batch."""
        self.micro_batches[-1].entropy_masks.append(mask)

    def close_micro_batch(self) -> None:
        """Call it just after the backward pass."""
        self.micro_batches[-1].drew = self.generators.have_drawn(since=self.micro_batches[-1].random_state)

    def rollouts(self) -> list[dict[str, Any]]:
        """The micro-batches for replays."""
        return [self._frozen(micro_batch) for micro_batch in self.micro_batches]

    def may_be_packed(self) -> bool:
        """Whether rows may change micro-batches between pass 1 and a replay: random numbers are drawn for a
        micro-batch as it is, and its loss is divided by its own accumulation steps."""
        divisors = {micro_batch.accumulation_steps for micro_batch in self.micro_batches}
        return len(divisors) == 1 and not any(micro_batch.drew for micro_batch in self.micro_batches)

    def replay(self) -> Iterator[Replayed]:
        """One pass, with the generators set as they were for each micro-batch.

        A pass leaves the generators where pass 1 did, so that later rollouts are those of a run without replays.
        """
        if self.packed is not None:
            yield from self._replay_packed()
            return
        for micro_batch in self.micro_batches:
            yield self._replayed(micro_batch, micro_batch is self.micro_batches[-1])

    def _replay_packed(self) -> Iterator[Replayed]:
        after_pass_1 = self.generators.state()
        for i, inputs in enumerate(self.packed):
            yield Replayed(inputs, self.micro_batches[0].accumulation_steps, i == len(self.packed) - 1)
        self.generators.restore(after_pass_1)

    @property
    def replayed_micro_batches(self) -> int:
        """How many micro-batches a replay has."""
        return len(self.micro_batches if self.packed is None else self.packed)

    def replay_one(self, index: int) -> Iterator[Replayed]:
        """One micro-batch of a replay as a pass of its own. It leaves the generators where it found them."""
        before = self.generators.state()
        if self.packed is None:
            yield self._replayed(self.micro_batches[index], is_last=True)
        else:
            yield Replayed(self.packed[index], self.micro_batches[0].accumulation_steps, True)
        self.generators.restore(before)

    def _replayed(self, micro_batch: MicroBatch, is_last: bool) -> Replayed:
        self.generators.restore(micro_batch.random_state)
        return Replayed(self._frozen(micro_batch), micro_batch.accumulation_steps, is_last, micro_batch.entropy_masks)

    def _frozen(self, micro_batch: MicroBatch) -> dict[str, Any]:
        inputs = {**micro_batch.inputs}
        if self.freeze_old_logps and inputs.get("old_per_token_logps") is None:
            inputs["old_per_token_logps"] = micro_batch.per_token_logps
        return inputs
