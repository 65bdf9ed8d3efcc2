"""The forward passes in which TRL scores completions, old and reference log-probabilities, on fewer tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from trl import GRPOTrainer

from ..rollout.compaction import ENTROPIES, Batch, count_rows, partition, row_widths, take
from .layout import BatchLayout


Scored = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities, (B, T), entropies, (B, T), and the router's loss, as TRL returns them."""


class Scoring:
    """Scores completions sorted by length and trimmed, and adds their entropies to the rollouts.

    TRL scores in its own layout, in which nearly every micro-batch is as wide as the longest completion: with vLLM, or
    with a reference model, that takes longer than a compacted update. The entropies are a by-product of sampling in
    groups, and of TRL's old log-probabilities.

    Args:
        trainer (`GRPOTrainer`): The trainer of the completions; it is only read.
        layout (`BatchLayout`): Says whether rows may be sorted and trimmed, and left out.
    """

    def __init__(self, trainer: GRPOTrainer, layout: BatchLayout):
        self.trainer, self.layout = trainer, layout
        self._records = False
        self._entropies: torch.Tensor | None = None  # (B, T), of the completions that are being generated
        self._tokens: torch.Tensor | None = None  # (B, T), which they are of

    @property
    def wants_entropies(self) -> bool:
        """Whether completions are being generated whose entropies will be of use, and are not known."""
        return self._records and self._entropies is None

    def keep_entropies(self, entropies: torch.Tensor, ids: torch.Tensor) -> None:
        """Takes the entropies of the tokens of all completions, (B, T), in nats, and these tokens, with padding after
        the end.
        """
        self._entropies, self._tokens = entropies.float(), ids

    def generate_and_score(self, by_trl: Callable[[Any], Batch], inputs: Any) -> Batch:
        """TRL's rollouts, with `ENTROPIES` where all ranks know them and they may save a forward pass."""
        compaction = self.layout.compaction
        self._records = records = compaction is not None and compaction.prunes and self.trainer.model.training
        try:
            rollouts = by_trl(inputs)
            entropies = self._entropies if records and self._are_of(rollouts) else None
        finally:
            self._records, self._entropies, self._tokens = False, None, None
        if records and self.layout.agree(entropies is not None):
            missing = rollouts["completion_ids"].size(1) - entropies.size(1)
            rollouts[ENTROPIES] = torch.nn.functional.pad(entropies, (0, missing))
        return rollouts

    def _are_of(self, rollouts: Batch) -> bool:
        """Whether the entropies are those of the completions. A `rollout_func` or a reward may have scored others, and
        a subclass may have changed what was sampled.
        """
        ids = rollouts["completion_ids"]
        if self._entropies is None or "tool_mask" in rollouts:
            return False
        missing = ids.size(1) - self._tokens.size(1)  # where TRL pads beyond the longest
        pad = self.trainer._tokenizer.pad_token_id
        return missing >= 0 and torch.equal(torch.nn.functional.pad(self._tokens, (0, missing), value=pad), ids)

    def score(
        self,
        by_trl: Callable[..., Scored],
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **inputs: Any,
    ) -> Scored:
        """TRL's `_get_per_token_logps_and_entropies`, in as many micro-batches on every rank.

        TRL gives a `batch_size` where it scores; its loss, and rows with images, are left as they are.
        """
        how = self.layout.compaction
        is_loss = batch_size is None or torch.is_grad_enabled()
        has_images = any(value is not None for value in inputs.values())
        if how is None or is_loss or has_images or not self.layout.is_narrow(input_ids.size(1)):
            return by_trl(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **inputs)
        prompt, records = input_ids.size(1) - logits_to_keep, self.wants_entropies and model is self.trainer.model
        rows = {
            **{"prompt_ids": input_ids[:, :prompt], "prompt_mask": attention_mask[:, :prompt]},
            **{"completion_ids": input_ids[:, prompt:], "completion_mask": attention_mask[:, prompt:]},
        }
        widths = row_widths(rows, how)
        order = widths.argsort(descending=True, stable=True)
        count = math.ceil(count_rows(rows) / batch_size)
        sizes = partition(widths[order].tolist(), count, batch_size * int(widths.max()))
        wants_entropy, parts = compute_entropy or records, order.split(sizes)
        scored = []
        for part in parts:
            batch = take(rows, part, how)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            width = batch["completion_ids"].size(1)
            scored.append(by_trl(model, ids, mask, width, len(part), compute_entropy=wants_entropy)[:2])
        logps, entropies = (_in_place(found, parts, logits_to_keep) for found in zip(*scored, strict=True))
        if records:
            self.keep_entropies(entropies, rows["completion_ids"])
        return logps, entropies if compute_entropy else None, None


def _in_place(
    found: tuple[torch.Tensor | None, ...], parts: tuple[torch.Tensor, ...], width: int
) -> torch.Tensor | None:
    """What was found for the rows of each part, put where they were, (B, T), and 0 where there is no token."""
    if found[0] is None:
        return None
    whole = found[0].new_zeros(sum(map(len, parts)), width)
    for values, part in zip(found, parts, strict=True):
        whole[part, : values.size(1)] = values
    return whole
