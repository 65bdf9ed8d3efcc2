"""Compaction in TRL's trainer: where its rollouts are laid out anew, and what that does to its metrics."""

import dataclasses
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from trl import GRPOTrainer

from ..rollout.compaction import (
    Batch,
    Compaction,
    compact,
    count_rows,
    count_tokens,
    prune,
    scored_tokens,
    unknown_entries,
)
from ..rollout.window import RolloutWindow
from ..sampling.model_traits import draws_at_random, has_relative_positions


logger = get_logger(__name__)

TOKEN_MEANS = ("entropy", "kl")
"""TRL's metrics that average over the tokens of a micro-batch."""

RATIO_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
"""TRL's metrics that average over whatever has an importance ratio in a micro-batch."""


@dataclass(frozen=True)
class Shares:
    """What part of an optimizer step's tokens and rows each micro-batch holds, over all ranks.

    Attributes:
        first_tokens, first_rows (`list[float]`): Of the micro-batches of pass 1; they add up to 1.
        replayed_tokens, replayed_rows (`list[float]`): Of those of a replay, as parts of the same totals.
        token_fractions (`dict[str, float]`): What a pass computes on compared with TRL's own layout, padding included.
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


class BatchLayout:
    """Lays out each buffer of rollouts anew before TRL's first pass over it, and once more before replays.

    Args:
        trainer (`GRPOTrainer`): Whose buffer it is. Read, but for `_buffered_inputs`.

    Raises:
        ValueError: If `max_tokens_per_micro_batch` is set and can't be kept.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.compaction = _allowed_compaction(trainer)
        self.compacted: list[Batch] | None = None  # TRL's buffer, once its micro-batches are compact
        self.stock_tokens = 0  # what one micro-batch of that buffer had before
        self.first_pass: list[tuple[Batch, int]] = []  # the micro-batches of the step under way, with those tokens
        self.warned = False

    def arrange(self, inputs: Batch) -> Batch:
        """The micro-batch that TRL is about to compute on, from a buffer that is compact from the first one on."""
        trainer = self.trainer
        if self.compaction is None or not trainer.model.training:
            return inputs
        if trainer._buffered_inputs is not self.compacted:
            self.stock_tokens = count_tokens(trainer._buffered_inputs[0])
            self.compacted = trainer._buffered_inputs = self._compact(trainer._buffered_inputs)
        inputs = trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]
        self.first_pass.append((inputs, self.stock_tokens))
        return inputs

    def _compact(self, buffer: list[Batch]) -> list[Batch]:
        if (unknown := unknown_entries(buffer)) and not self.warned:
            self.warned = True
            logger.warning(
                f"Batches are not compacted, which costs time: the rollouts hold {', '.join(unknown)}, and how that "
                "belongs to rows is not known. Set `compact_batches: false` if that is meant."
            )
        size = min(self.trainer.args.gradient_accumulation_steps, len(buffer))
        steps = [buffer[i : i + size] for i in range(0, len(buffer), size)]
        return [batch for step in steps for batch in compact(step, self.compaction, self._max_over_ranks)]

    def pack(self, window: RolloutWindow) -> list[Batch]:
        """The micro-batches that replays compute on; empty if none of their completions has an advantage."""
        rollouts = window.rollouts()
        if self.compaction is None:
            return rollouts
        replayed = prune(rollouts, self.compaction, self._max_over_ranks)
        if replayed is not rollouts:
            window.packed = replayed
        return replayed

    def _max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self.trainer.accelerator.num_processes == 1:
            return values
        return self.trainer.accelerator.gather(values[None]).amax(0)

    def weighs_tokens(self, metric: str) -> bool:
        """Whether a metric of TRL's averages over tokens, not over completions."""
        return metric in TOKEN_MEANS or self.trainer.importance_sampling_level == "token"

    def weigh_first_pass(self, replayed: list[Batch]) -> Shares | None:
        """Ends an optimizer step: makes TRL's token means those of the step, since micro-batches of sorted rows hold
        very different numbers of tokens."""
        first, self.first_pass = self.first_pass, []
        if self.compaction is None or not first:
            return None
        batches, stock_tokens = zip(*first, strict=True)
        shares = Shares.of(list(batches), replayed, sum(stock_tokens), self.trainer.accelerator)
        log = self.trainer._metrics["train"]
        for name in (*TOKEN_MEANS, *RATIO_MEANS):
            if name in log:
                weights = shares.first_tokens if self.weighs_tokens(name) else shares.first_rows
                values = log[name][-len(first) :]
                log[name][-len(first) :] = [v * w * len(first) for v, w in zip(values, weights, strict=True)]
        return shares


def _allowed_compaction(trainer: GRPOTrainer) -> Compaction | None:
    """What the settings ask for, and loss, model and accumulation allow; `None` for nothing."""
    args = trainer.args
    allowed = _loss_allows(trainer) if args.compact_batches else None
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
        trims_prompts=has_relative_positions(trainer.model),
        prunes=allowed.prunes and not draws_at_random(trainer.model),
        max_tokens=args.max_tokens_per_micro_batch,
    )


def _loss_allows(trainer: GRPOTrainer) -> Compaction | None:
    """What may be done to the micro-batches as far as the loss goes; `None` for nothing."""
    corrects_by_sequence = (
        trainer.loss_type == "vespo" and trainer.use_vllm and trainer.vllm_importance_sampling_correction
    )
    if (
        type(trainer)._compute_loss is not GRPOTrainer._compute_loss
        or trainer.aux_loss_enabled
        or corrects_by_sequence
    ):
        return None  # not TRL's loss; or one that sees padding: the router's load, VESPO's unmasked sum
    additive = trainer.loss_type != "bnpo" and not trainer._entropy_bonus_enabled and trainer.top_entropy_quantile >= 1
    return Compaction(
        regroup=additive,
        averages_rows=trainer.loss_type not in ("cispo", "dapo", "vespo"),
        prunes=additive and trainer.beta == 0.0,
    )
