"""Compaction in TRL's trainer: where rollouts get their new layout, and the effect on its metrics."""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from trl import GRPOTrainer

from ..rollout.compaction import (
    ENTROPIES,
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
from ..sampling.model_traits import has_relative_positions, why_not_fixed, width_bound
from .methods import is_replaced


logger = get_logger(__name__)

TOKEN_MEANS = ("entropy", "kl")
"""TRL's metrics that average over the tokens of a micro-batch."""

RATIO_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
"""TRL's metrics that average over all importance ratios of a micro-batch."""

ROW_MEANS = ("vespo/phi_seq_mean",)
"""TRL's metrics that average over the completions of a micro-batch."""

EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}
"""TRL's metrics that are the minimum or maximum of a micro-batch."""

WEIGHED = (*TOKEN_MEANS, *RATIO_MEANS, *ROW_MEANS, *EXTREMES)
ROW_MEANS_AT_SAMPLING = {"vespo/phi_seq_mean": 1.0}
"""What they are of a completion without advantage, under the policy that sampled it. No ratio is clipped there."""

LOSS = (
    *("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies"),
    *("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"),
)
"""TRL's methods that take part in its loss."""


@dataclass(frozen=True)
class Arranged:
    """The replacement of one micro-batch of TRL's.

    Attributes:
        batch (`Batch`): The rows that pass 1 computes with a gradient.
        forward_only (`Batch`, *optional*): Rows that contribute only to TRL's metrics.
        stock_tokens (`int`): The tokens of TRL's micro-batch, with padding.
    """

    batch: Batch
    forward_only: Batch | None
    stock_tokens: int

    @property
    def parts(self) -> list[Batch]:
        """In the order in which they are computed."""
        return [part for part in (self.forward_only, self.batch) if part is not None]


@dataclass(frozen=True)
class Shares:
    """The share of an optimizer step's tokens and rows in each micro-batch, over all ranks.

    Attributes:
        first_tokens, first_rows (`list[list[float]]`): Of the parts of each micro-batch of pass 1. They add up to 1
            with those that are left out.
        replayed_tokens, replayed_rows (`list[float]`): Of those of a replay, as parts of the same totals.
        left_out_rows (`float`): Of the completions that are not computed at all.
        left_out_entropy (`float`): Their part of the mean entropy of a token, in nats.
        token_fractions (`dict[str, float]`): The tokens of a pass compared with TRL's own layout, with padding.
    """

    first_tokens: list[list[float]]
    first_rows: list[list[float]]
    replayed_tokens: list[float]
    replayed_rows: list[float]
    left_out_rows: float
    left_out_entropy: float
    token_fractions: dict[str, float]

    @classmethod
    def of(
        cls, first: list[Arranged], replayed: list[Batch], left_out: list[Batch], accelerator: Accelerator
    ) -> "Shares":
        parts = [part for arranged in first for part in arranged.parts]
        scored = [scored_tokens(batch) for batch in (*parts, *replayed)]
        computed = [
            sum(count_tokens(arranged.batch) for arranged in first),
            sum(count_tokens(arranged.forward_only) for arranged in first if arranged.forward_only is not None),
            sum(map(count_tokens, replayed)),
            sum(arranged.stock_tokens for arranged in first),
            sum(scored_tokens(batch) for batch in left_out),
            sum((batch[ENTROPIES] * batch["completion_mask"]).sum() for batch in left_out),
        ]
        counts = torch.stack([*scored, *torch.tensor(computed, device=scored[0].device)]).to(torch.float32)
        *scored, first_computed, forward_only, replay_computed, stock, tokens, entropy = accelerator.reduce(
            counts
        ).tolist()
        rows = [float(count_rows(batch)) for batch in (*parts, *replayed)]
        n, sizes = len(parts), [len(arranged.parts) for arranged in first]
        rows_left_out = sum(map(count_rows, left_out))
        all_tokens, all_rows = max(sum(scored[:n]) + tokens, 1.0), sum(rows[:n]) + rows_left_out
        fractions = {"token_fraction": first_computed / stock, "forward_only_token_fraction": forward_only / stock}
        if replayed:
            fractions["replay_token_fraction"] = replay_computed / stock
        return cls(
            first_tokens=_grouped([count / all_tokens for count in scored[:n]], sizes),
            first_rows=_grouped([count / all_rows for count in rows[:n]], sizes),
            replayed_tokens=[count / all_tokens for count in scored[n:]],
            replayed_rows=[count / all_rows for count in rows[n:]],
            left_out_rows=rows_left_out / all_rows,
            left_out_entropy=entropy / all_tokens,
            token_fractions=fractions,
        )


def _grouped(values: list[float], sizes: list[int]) -> list[list[float]]:
    """The values, cut into pieces of these sizes."""
    values = iter(values)
    return [list(itertools.islice(values, size)) for size in sizes]


class BatchLayout:
    """Changes the layout of rollouts: of each optimizer step's part of TRL's buffer before pass 1, and again before
    replays.

    Args:
        trainer (`GRPOTrainer`): The trainer of the rollouts; it is only read.

    Raises:
        ValueError: If `max_tokens_per_micro_batch` is set and can't be kept.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.compaction = _allowed_compaction(trainer)
        self.width_bound = width_bound(trainer.model)
        self.upcoming: deque[Arranged] = deque()  # micro-batches that pass 1 has not come to
        self.first_pass: list[Arranged] = []  # those of the current step so far
        self.left_out: list[Batch] = []  # the rows of the current step that no pass computes
        self.measured: dict[str, list[float]] = {}  # what TRL's loss has logged of each part of the current step
        self.forward_only: Batch | None = None  # what pass 1 computes before the present one, for TRL's metrics
        self.nominal_rows = 0  # of TRL's own
        self.position = 0  # of the next micro-batch among those that the training loop has fetched together
        self.warned = False

    def check_loss(self) -> None:
        """A replacement of TRL's loss on the trainer itself is used from here on, before a step.

        Raises:
            ValueError: If `max_tokens_per_micro_batch` can't be kept then.
        """
        if self.compaction is not None and own_parts_of_loss(self.trainer):
            self.compaction = _allowed_compaction(self.trainer)

    def forget_step(self) -> None:
        """Drops the data of an unfinished step. TRL's buffer still has its own micro-batches."""
        self.upcoming.clear()
        self.forward_only = None
        self.first_pass, self.left_out = [], []
        self.measured = {}

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Context for TRL's loss on one part. Its means are put aside until the step ends. Rewards and subclasses may
        log under the same names: their entries stay.
        """
        if self.compaction is None:
            yield
            return
        log = self.trainer._metrics["train"]
        before = {name: len(log[name]) if name in log else 0 for name in WEIGHED}
        yield
        for name, count in before.items():
            if name in log and len(log[name]) == count + 1:
                self.measured.setdefault(name, []).append(log[name].pop())

    def arrange(self, inputs: Batch) -> Batch:
        """The micro-batch that replaces the one that TRL has taken from its buffer."""
        self.forward_only = None
        if self.compaction is None or not self.trainer.model.training:
            return inputs
        if not self.upcoming:
            self.upcoming.extend(self._compact_next())
        self.position += 1
        self.first_pass.append(self.upcoming.popleft())
        self.forward_only = self.first_pass[-1].forward_only
        return self.first_pass[-1].batch

    def _compact_next(self) -> list[Arranged]:
        """The micro-batches in TRL's buffer from the present one on that belong to the current step."""
        trainer = self.trainer
        start = trainer._step % trainer.args.steps_per_generation
        count = max(1, trainer.current_gradient_accumulation_steps - self.position)
        batches = trainer._buffered_inputs[start : start + count]
        stock_tokens, self.nominal_rows = count_tokens(batches[0]), count_rows(batches[0])
        if unknown := unknown_entries(batches):
            self._warn_once(f"the rollouts hold {', '.join(unknown)}, and how that belongs to rows is not known")
        if self.compaction.max_tokens is None and not self._rows_may_move_on_all_ranks(batches):
            return [Arranged(batch, None, stock_tokens) for batch in batches]
        since_generation = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations)
        compacted = compact(batches, self.compaction, self._max_over_ranks, entropies_hold=since_generation == 0)
        if compacted.left_out is not None:
            self.left_out.append(compacted.left_out)
        pairs = itertools.zip_longest(compacted.batches, compacted.forward_only)
        return [Arranged(batch, forward_only, stock_tokens) for batch, forward_only in pairs]

    def pack(self, window: RolloutWindow) -> list[Batch]:
        """The micro-batches that replays compute on; empty if none of their completions has an advantage."""
        rollouts = window.rollouts()
        if self.compaction is None or not self.compaction.changes_replays:
            return rollouts
        if not self.agree(window.may_be_packed() and self._rows_may_move(rollouts)):
            return rollouts
        replayed = prune(rollouts, self.nominal_rows, self.compaction, self._max_over_ranks)
        if replayed is not rollouts:
            window.packed = replayed
        return replayed

    def is_narrow(self, width: int) -> bool:
        """Whether the log-probabilities of a row are the same in all batches up to this width."""
        return self.width_bound is None or width < self.width_bound

    def _rows_may_move(self, batches: list[Batch]) -> bool:
        """Whether on this rank rows are the same in other micro-batches."""
        widths = (batch["prompt_ids"].size(1) + batch["completion_ids"].size(1) for batch in batches)
        return self.is_narrow(max(widths)) and not unknown_entries(batches)

    def _rows_may_move_on_all_ranks(self, batches: list[Batch]) -> bool:
        """Another rank may have all images, or all long completions."""
        may_move = self._rows_may_move(batches)
        if self.trainer._is_vlm or self.width_bound is not None:
            may_move = self.agree(may_move)
        if not may_move and self.width_bound is not None:
            where = (
                f"prompt and completion take {self.width_bound} columns or more, where " if self.width_bound else ""
            )
            self._warn_once(f"{where}the model's rotary embeddings {why_not_fixed(self.trainer.model)}")
        return may_move

    def _warn_once(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            logger.warning(
                f"Batches are not compacted, which costs time: {reason}. Set `compact_batches: false` if that is "
                "intended."
            )

    def agree(self, here: bool) -> bool:
        """Whether it is true on every rank."""
        if self.trainer.accelerator.num_processes == 1:
            return here
        return not self._max_over_ranks(torch.tensor([not here], device=self.trainer.accelerator.device).int()).any()

    def _max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self.trainer.accelerator.num_processes == 1:
            return values
        return self.trainer.accelerator.gather(values[None]).amax(0)

    def weighs_tokens(self, metric: str) -> bool:
        """Whether a metric of TRL's averages over tokens, not over completions."""
        return metric in TOKEN_MEANS or metric in RATIO_MEANS and self.trainer.importance_sampling_level == "token"

    def weigh_first_pass(self, replayed: list[Batch]) -> Shares | None:
        """Ends an optimizer step: makes TRL's means those of the step, since micro-batches of sorted rows hold very
        different numbers of tokens, and one entry of what the parts of a micro-batch have measured."""
        first, self.first_pass = self.first_pass, []
        left_out, self.left_out = self.left_out, []
        measured_of, self.measured = self.measured, {}
        if self.compaction is None or not first:
            return None
        shares = Shares.of(first, replayed, left_out, self.trainer.accelerator)
        of_left_out = {"entropy": shares.left_out_entropy}
        of_left_out |= {name: value * shares.left_out_rows for name, value in ROW_MEANS_AT_SAMPLING.items()}
        sizes = [len(arranged.parts) for arranged in first]
        log = self.trainer._metrics["train"]
        for name, values in measured_of.items():
            if len(values) != sum(sizes):  # not of every part
                log[name] += values
                continue
            measured = _grouped(values, sizes)
            if name in EXTREMES:
                unclipped = [0.0] if left_out else []
                log[name] += [EXTREMES[name](values + unclipped) for values in measured]
            else:
                weights = shares.first_tokens if self.weighs_tokens(name) else shares.first_rows
                log[name] += [
                    len(first) * sum(v * w for v, w in zip(*each, strict=True)) + of_left_out.get(name, 0.0)
                    for each in zip(measured, weights, strict=True)
                ]
        return shares


def own_parts_of_loss(trainer: GRPOTrainer) -> list[str]:
    """The methods of `LOSS` that a subclass, a mixin or the user has replaced."""
    return [name for name in LOSS if is_replaced(trainer, name)]


def _allowed_compaction(trainer: GRPOTrainer) -> Compaction | None:
    """The compaction that the settings ask for and that loss, model and accumulation allow; `None` if none."""
    args = trainer.args
    allowed = _loss_allows(trainer) if args.compact_batches else None
    own = own_parts_of_loss(trainer)
    if args.compact_batches and own:
        logger.warning(
            f"Batches are not compacted, which costs time: the trainer has a `{'`, `'.join(own)}` of its own, and "
            "what that makes of rows is not known. Set `compact_batches: false` if that is meant."
        )
    if allowed is None and args.max_tokens_per_micro_batch is None:
        return None
    longer, shorter = sorted((args.steps_per_generation, args.gradient_accumulation_steps), reverse=True)
    is_additive = allowed is not None and allowed.regroup
    if args.max_tokens_per_micro_batch is not None and width_bound(trainer.model) is not None:
        raise ValueError(
            "`max_tokens_per_micro_batch` needs rotary embeddings of fixed frequencies: those of the model "
            f"{why_not_fixed(trainer.model)}. Leave it out."
        )
    if args.max_tokens_per_micro_batch is not None and own:
        raise ValueError(
            f"`max_tokens_per_micro_batch` needs a loss of TRL's, and the trainer has a `{'`, `'.join(own)}` of its "
            "own. Leave it out."
        )
    if args.max_tokens_per_micro_batch is not None and not (is_additive and longer % shorter == 0):
        raise ValueError(
            "`max_tokens_per_micro_batch` needs a loss of TRL's that is additive over completions, and a "
            "`steps_per_generation` that divides, or is divided by, `gradient_accumulation_steps`. Leave it out, "
            "or change `loss_type: bnpo`, the entropy bonus, `top_entropy_quantile` or the router's loss."
        )
    return dataclasses.replace(
        allowed,
        trims_prompts=has_relative_positions(trainer.model),
        max_tokens=args.max_tokens_per_micro_batch,
        multiple=args.pad_to_multiple_of or 1,
    )


def _loss_allows(trainer: GRPOTrainer) -> Compaction | None:
    """The compaction that the loss allows; `None` if none."""
    corrects_by_sequence = (
        trainer.loss_type == "vespo" and trainer.use_vllm and trainer.vllm_importance_sampling_correction
    )
    if own_parts_of_loss(trainer) or trainer.aux_loss_enabled or corrects_by_sequence:
        return None  # not TRL's loss; or one that sees padding: the router's load, VESPO's unmasked sum
    additive = trainer.loss_type != "bnpo" and not trainer._entropy_bonus_enabled and trainer.top_entropy_quantile >= 1
    return Compaction(
        regroup=additive,
        averages_rows=trainer.loss_type not in ("cispo", "dapo", "vespo"),
        prunes=additive and trainer.beta == 0.0,
    )
