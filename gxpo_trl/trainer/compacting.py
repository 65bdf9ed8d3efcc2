"""Compaction in a TRL trainer: where its rollouts are laid out anew, and what that does to its metrics."""

import dataclasses
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..rollout.compaction import (
    Batch,
    Compaction,
    compact,
    count_rows,
    count_tokens,
    prune,
    scored_tokens,
)
from ..rollout.window import RolloutWindow
from ..sampling.model_traits import draws_at_random, has_relative_positions


RATIO_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
"""TRL's metrics that average over whatever has an importance ratio in a micro-batch."""


@dataclass(frozen=True)
class Shares:
    """What part of an optimizer step's tokens and rows each micro-batch holds, over all ranks.

    Attributes:
        first_tokens, first_rows (`list[float]`): Of the micro-batches of pass 1; they add up to 1.
        replayed_tokens, replayed_rows (`list[float]`): Of those of a replay, as parts of the same totals.
        token_fractions (`dict[str, float]`): What a pass computes on beside TRL's own layout, padding included.
    """

    first_tokens: list[float]
    first_rows: list[float]
    replayed_tokens: list[float]
    replayed_rows: list[float]
    token_fractions: dict[str, float]

    @classmethod
    def of(cls, first: list[Batch], replayed: list[Batch], stock_tokens: int, accelerator: Accelerator) -> "Shares":
        scored = [scored_tokens(batch) for batch in (*first, *replayed)]
        computed = [sum(map(count_tokens, first)), sum(map(count_tokens, replayed)), stock_tokens]
        counts = torch.stack([*scored, *torch.tensor(computed, device=scored[0].device)]).to(torch.float32)
        *scored, first_computed, replay_computed, stock = accelerator.reduce(counts).tolist()
        rows = [count_rows(batch) for batch in (*first, *replayed)]
        n = len(first)
        all_tokens, all_rows = max(sum(scored[:n]), 1.0), sum(rows[:n])
        fractions = {"token_fraction": first_computed / stock}
        if replayed:
            fractions["replay_token_fraction"] = replay_computed / stock
        return cls(
            first_tokens=[count / all_tokens for count in scored[:n]],
            first_rows=[count / all_rows for count in rows[:n]],
            replayed_tokens=[count / all_tokens for count in scored[n:]],
            replayed_rows=[count / all_rows for count in rows[n:]],
            token_fractions=fractions,
        )


class CompactingMixin:
    """Lays out each buffer of rollouts anew before TRL's first pass over it, and once more before replays."""

    _token_means: tuple[str, ...] = ("entropy", "kl")  # metrics that average over the tokens of a micro-batch
    _ratio_per_token = True  # whether each token has an importance ratio, rather than each completion

    def _set_up_compaction(self) -> None:
        self._compaction = self._allowed_compaction()
        self._compacted: list[Batch] | None = None  # TRL's buffer, once its micro-batches are compact
        self._stock_tokens = 0  # what one micro-batch of that buffer had before
        self._first_pass: list[tuple[Batch, int]] = []  # the micro-batches of the step under way, with those tokens

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self._compaction is None or not self.model.training:
            return inputs
        if self._buffered_inputs is not self._compacted:
            started = time.perf_counter()
            self._stock_tokens = count_tokens(self._buffered_inputs[0])
            self._compacted = self._buffered_inputs = self._compact_buffer(self._buffered_inputs)
            self._update_time += time.perf_counter() - started
        inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._first_pass.append((inputs, self._stock_tokens))
        return inputs

    def _loss_allows(self) -> Compaction | None:
        """What may be done to the micro-batches as far as the loss goes; `None` for nothing."""
        return None

    def _allowed_compaction(self) -> Compaction | None:
        """What the settings ask for, and loss, model and accumulation allow."""
        args = self.args
        allowed = self._loss_allows() if args.compact_batches else None
        if allowed is None and args.max_tokens_per_micro_batch is None:
            return None
        # The rows of one optimizer step stay together: a buffer of rollouts holds whole steps, or is part of one.
        longer, shorter = sorted((args.steps_per_generation, args.gradient_accumulation_steps), reverse=True)
        regroup = allowed is not None and allowed.regroup and longer % shorter == 0
        if args.max_tokens_per_micro_batch is not None and not regroup:
            raise ValueError(
                "`max_tokens_per_micro_batch` needs a loss of TRL's that is additive over completions, and a "
                "`steps_per_generation` that divides, or is divided by, `gradient_accumulation_steps`. Leave it out, "
                "or change `loss_type: bnpo`, the entropy bonus, `top_entropy_quantile` or the router's loss."
            )
        return dataclasses.replace(
            allowed,
            regroup=regroup,
            trims_prompts=has_relative_positions(self.model),
            prunes=allowed.prunes and args.prune_zero_advantage and not draws_at_random(self.model),
            max_tokens=args.max_tokens_per_micro_batch,
        )

    def _compact_buffer(self, buffer: list[Batch]) -> list[Batch]:
        size = min(self.args.gradient_accumulation_steps, len(buffer))
        steps = [buffer[i : i + size] for i in range(0, len(buffer), size)]
        return [batch for step in steps for batch in compact(step, self._compaction, self._widest)]

    def _pack(self, window: RolloutWindow) -> list[Batch]:
        """The micro-batches that replays compute on; empty if none of their completions has an advantage."""
        rollouts = window.rollouts()
        if self._compaction is None:
            return rollouts
        replayed = prune(rollouts, self._compaction, self._widest)
        if replayed is not rollouts:
            window.packed = replayed
        return replayed

    def _widest(self, values: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.gather(values[None]).amax(0)

    def _weighs_tokens(self, metric: str) -> bool:
        return metric in self._token_means or self._ratio_per_token

    def _weigh_first_pass(self, first: list[tuple[Batch, int]], replayed: list[Batch]) -> Shares | None:
        """Makes TRL's token means those of the step: micro-batches of sorted rows hold very different numbers."""
        if self._compaction is None or not first:
            return None
        batches, stock_tokens = zip(*first, strict=True)
        shares = Shares.of(list(batches), replayed, sum(stock_tokens), self.accelerator)
        log = self._metrics["train"]
        for name in (*self._token_means, *RATIO_MEANS):
            if name in log:
                weights = shares.first_tokens if self._weighs_tokens(name) else shares.first_rows
                values = log[name][-len(first) :]
                log[name][-len(first) :] = [v * w * len(first) for v, w in zip(values, weights, strict=True)]
        return shares
