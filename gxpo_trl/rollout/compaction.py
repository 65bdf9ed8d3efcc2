"""The same gradient from fewer tokens: rows sorted by length, trimmed, and left out where they contribute nothing.

TRL pads every completion of a generation batch to the longest one and shuffles, so that nearly every micro-batch is as
wide as the longest completion of all. Nothing is computed twice or approximated here: rows change places among the
micro-batches of one optimizer step, columns that every row of a micro-batch has masked are dropped, and a row whose
advantage is 0 has no backward pass if the loss depends on the row only through its advantage. TRL logs its entropy: no
pass computes the row where that is known from sampling or scoring and the policy has not moved since. Elsewhere the
first pass makes a forward pass over it.

A micro-batch is TRL's: a dict of tensors whose first dimension are the rows. The result are such dicts. They have one
more entry, `LOSS_WEIGHT`, if a loss that averages over rows must be corrected for their number.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


Batch = dict[str, Any]

LOSS_WEIGHT = "loss_weight"
ENTROPIES = "entropies"
"""Of the policy that generated, of each token of a completion, in nats, (B, T)."""
PROMPT_COLUMNS = ("prompt_ids", "prompt_mask")  # (B, P), padded on the left
COMPLETION_COLUMNS = (  # (B, T), padded on the right
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "advantages",
    ENTROPIES,
)
ROWS = ("advantages", "old_logps", "importance_sampling_ratio")  # (B,) or (B, 1)
CONSTANTS = ("num_items_in_batch", LOSS_WEIGHT)
MOST_ROWS = 512  # up to which the best partition is searched: this takes rows² × micro-batches steps
KNOWN = {*PROMPT_COLUMNS, *COMPLETION_COLUMNS, *ROWS, *CONSTANTS}


@dataclass(frozen=True)
class Compaction:
    """The changes to the micro-batches of one optimizer step that keep its gradient.

    Attributes:
        regroup (`bool`): Rows may change micro-batches: the loss is a sum over rows, or a mean over equally many.
        averages_rows (`bool`): The loss of a micro-batch is a mean over its rows, not a sum with its own normalizer.
        trims_prompts (`bool`): Leading columns may be dropped: the model's positions are relative.
        prunes (`bool`): Rows with advantage 0 contribute nothing to the gradient.
        max_tokens (`int`, *optional*): The most tokens of a micro-batch, with padding; unset for as many as TRL's
            have.
        multiple (`int`): Prompts and completions have a multiple of this many columns: TRL's `pad_to_multiple_of`.
    """

    regroup: bool = True
    averages_rows: bool = True
    trims_prompts: bool = False
    prunes: bool = False
    max_tokens: int | None = None
    multiple: int = 1

    @property
    def changes_replays(self) -> bool:
        """Whether passes after the first may have other micro-batches."""
        return self.regroup and (self.prunes or self.max_tokens is not None)


@dataclass(frozen=True)
class Compacted:
    """The micro-batches of one optimizer step.

    Attributes:
        batches (`list[Batch]`): The rows that are computed with a gradient.
        forward_only (`list[Batch]`): The other rows, in no more micro-batches than `batches`.
        left_out (`Batch`, *optional*): The other rows, where they are not computed at all.
    """

    batches: list[Batch]
    forward_only: list[Batch] = field(default_factory=list)
    left_out: Batch | None = None


MaxOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""The elementwise maximum of a tensor over all ranks. Ranks must agree on the rows of each micro-batch."""


def compact(
    micro_batches: list[Batch],
    how: Compaction,
    max_over_ranks: MaxOverRanks = torch.Tensor.clone,
    entropies_hold: bool = False,
) -> Compacted:
    """The micro-batches of one optimizer step with their rows sorted by completion length, longest first, and trimmed.

    Args:
        micro_batches (`list[Batch]`): Of one optimizer step, with equally many rows each.
        how (`Compaction`): The allowed changes.
        max_over_ranks (`MaxOverRanks`): Called once, again if rows may be left out, and again if some are.
        entropies_hold (`bool`): Whether the policy is the one that `ENTROPIES` are of, so that rows that contribute
            nothing need no forward pass where the rollouts have them. Equal on every rank.

    Returns:
        `Compacted`: As many micro-batches with the same rows, cut where the fewest tokens are computed. None has more
        tokens than TRL's, or than `max_tokens` if this number of micro-batches can keep it. Rows that contribute
        nothing to the gradient are separate, except those without which a micro-batch would be empty. Both have
        equally many rows on every rank. A batch with unknown entries, such as images, is unchanged.

    Raises:
        ValueError: If there is an unknown entry and `max_tokens` is set, which then can't be kept.
    """
    if not _are_known(micro_batches):
        if how.max_tokens is not None:
            raise ValueError(
                "`max_tokens_per_micro_batch` can't be kept: rollouts with "
                f"{', '.join(unknown_entries(micro_batches))} can't be redistributed. Leave it out."
            )
        return Compacted(micro_batches)
    if not how.regroup:
        return Compacted([take(batch, torch.arange(count_rows(batch)), how) for batch in micro_batches])
    rows, count = merge(micro_batches), len(micro_batches)
    nominal_rows = count_rows(rows) // count
    contributes, most = _contributing(rows, how, max_over_ranks)
    kept, others = _choose(rows, contributes, max(most, count))
    widths = max_over_ranks(row_widths(rows, how)[kept]).tolist()
    max_tokens = how.max_tokens or nominal_rows * widths[0]
    batches = _split(rows, kept, partition(widths, count, max_tokens), nominal_rows, how)
    if not len(others):
        return Compacted(batches)
    if entropies_hold and ENTROPIES in rows:
        return Compacted(batches, left_out=take(rows, others, how))
    widths = max_over_ranks(row_widths(rows, how)[others]).tolist()
    sizes = partition(widths, min(count, len(pack(widths, max(max_tokens, widths[0])))), max_tokens)
    return Compacted(batches, _split(rows, others, sizes, nominal_rows, how))


def prune(
    micro_batches: list[Batch],
    nominal_rows: int,
    how: Compaction,
    max_over_ranks: MaxOverRanks = torch.Tensor.clone,
) -> list[Batch]:
    """The rows that have an advantage, in as few micro-batches as possible.

    Args:
        micro_batches (`list[Batch]`): Those of one optimizer step that `compact` left with their gradient.
        nominal_rows (`int`): The rows of each of TRL's micro-batches.
        how (`Compaction`): The allowed changes.
        max_over_ranks (`MaxOverRanks`): Called once, and again if anything is left out or packed.

    Returns:
        `list[Batch]`: Equally many micro-batches, with equally many rows each, on every rank; a rank with fewer rows
        that count adds rows that don't. Empty if no rank has a row that counts; unchanged if nothing can be left out
        or joined.
    """
    if not how.changes_replays or not _are_known(micro_batches):
        return micro_batches
    rows = merge(micro_batches)
    contributes, most = _contributing(rows, how, max_over_ranks)
    if most == 0:
        return []
    fewest = math.ceil(most / nominal_rows)
    if most == count_rows(rows) and fewest == len(micro_batches) and how.max_tokens is None:
        return micro_batches
    kept, _ = _choose(rows, contributes, most)
    widths = max_over_ranks(row_widths(rows, how)[kept]).tolist()
    max_tokens = how.max_tokens or nominal_rows * widths[0]
    count = len(pack(widths, max_tokens)) if how.max_tokens else fewest
    return _split(rows, kept, partition(widths, count, max_tokens), nominal_rows, how)


def _contributing(rows: Batch, how: Compaction, max_over_ranks: MaxOverRanks) -> tuple[torch.Tensor, int]:
    """Which rows contribute to the gradient, (B,), and their number on the rank that has the most."""
    if not how.prunes:
        return torch.ones(count_rows(rows), dtype=torch.bool), count_rows(rows)
    contributes = rows["advantages"].reshape(count_rows(rows), -1).ne(0).any(1)
    return contributes, int(max_over_ranks(contributes.sum().view(1)).item())


def _choose(rows: Batch, contributes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of `count` rows, those that contribute and then the shortest, and of the others; longest first."""
    lengths = completion_lengths(rows)
    cheapest_first = torch.where(contributes.to(lengths.device), -1, lengths).argsort(stable=True)
    kept, others = cheapest_first[:count].sort().values, cheapest_first[count:].sort().values
    return tuple(part[lengths[part].argsort(descending=True, stable=True)] for part in (kept, others))


def partition(widths: list[int], count: int, max_tokens: int) -> list[int]:
    """How many rows go into each of `count` micro-batches, in order, so that the fewest tokens are computed.

    A micro-batch costs its rows × the widest of them, which is its first: `widths` never increases. Each has at most
    `max_tokens`, or the least bound above it that `count` micro-batches can keep.
    """
    rows = len(widths)
    bound = _least_bound(widths, count, max_tokens)
    if rows > MOST_ROWS:
        return _split_to(count, pack(widths, bound))
    ends, starts = torch.arange(rows + 1), torch.arange(rows)[:, None]
    sizes = ends - starts  # of a micro-batch from row j on to row i
    cost = (sizes * torch.tensor(widths)[:, None]).to(torch.float64)
    cost[(sizes < 1) | ((cost > bound) & (sizes > 1))] = math.inf
    best, choices = cost[0], []  # of one micro-batch up to row i
    for _ in range(count - 1):
        best, choice = (best[:-1, None] + cost).min(0)
        choices.append(choice)
    edges = [rows]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1]]))
    edges = [0, *reversed(edges)]
    return [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]


def pack(widths: list[int], max_tokens: int) -> list[int]:
    """As few micro-batches as `max_tokens` allows. A wider row gets its own."""
    sizes, widest = [], 0
    for width in widths:
        if sizes and (sizes[-1] + 1) * widest <= max_tokens:
            sizes[-1] += 1
        else:
            sizes.append(1)
            widest = width
    return sizes


def _split_to(count: int, sizes: list[int]) -> list[int]:
    """Halves the micro-batch of most rows until there are `count`."""
    while len(sizes) < count:
        largest = sizes.index(max(sizes))
        sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
    return sizes


def _least_bound(widths: list[int], count: int, max_tokens: int) -> int:
    """The least bound, from `max_tokens` on, that `count` micro-batches can keep, the widest row among them."""
    low, high = max(max_tokens, widths[0]), max(max_tokens, len(widths) * widths[0])
    while low < high:
        middle = (low + high) // 2
        if len(pack(widths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return low


def count_rows(batch: Batch) -> int:
    return batch["completion_ids"].size(0)


def completion_lengths(batch: Batch) -> torch.Tensor:
    """The column after the last one that is not masked, of each row, (B,)."""
    mask = batch["completion_mask"]
    columns = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return (mask.bool() * columns).amax(1)


def scored_tokens(batch: Batch) -> torch.Tensor:
    """How many tokens the loss sees, a scalar."""
    mask = batch["completion_mask"]
    return (mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]).sum()


def count_tokens(batch: Batch) -> int:
    """The cost of a micro-batch: rows × columns, with padding."""
    return batch["prompt_ids"].numel() + batch["completion_ids"].numel()


def merge(batches: list[Batch]) -> Batch:
    """One batch of all rows, padded to the widest prompt and completion."""
    prompt = max(batch["prompt_ids"].size(1) for batch in batches)
    completion = max(batch["completion_ids"].size(1) for batch in batches)
    per_token = {key for batch in batches for key, value in _tensors(batch) if _is_per_token(key, value)}

    def pad(key: str, value: torch.Tensor) -> torch.Tensor:
        if key in PROMPT_COLUMNS:
            return torch.nn.functional.pad(value, (prompt - value.size(1), 0))
        return torch.nn.functional.pad(value, (0, completion - value.size(1))) if key in per_token else value

    padded = [{key: pad(key, value) for key, value in _tensors(batch)} for batch in batches]
    merged = {key: torch.cat([batch[key] for batch in padded]) for key in padded[0]}
    return merged | {key: value for key, value in batches[0].items() if key == "num_items_in_batch"}


def take(batch: Batch, rows: torch.Tensor, how: Compaction) -> Batch:
    """Some rows of a batch, without the columns that all of them have masked.

    Two columns are kept in any case, where there are two: TRL takes one for a figure of the whole completion.
    """
    taken = {key: value[rows.to(value.device)] for key, value in _tensors(batch)}
    end = _round_up(max(2, int(completion_lengths(taken).max())), how.multiple)
    start, columns = 0, taken["prompt_mask"].size(1)
    if how.trims_prompts:
        needed = max(columns - int(taken["prompt_mask"].argmax(1).min()), 1)
        start = max(columns - _round_up(needed, how.multiple), 0)
    for key, value in taken.items():
        if key in PROMPT_COLUMNS:
            taken[key] = value[:, start:].contiguous()
        elif _is_per_token(key, value):
            taken[key] = value[:, :end].contiguous()
    return taken | {key: value for key, value in batch.items() if key in CONSTANTS}


def _split(rows: Batch, order: torch.Tensor, sizes: list[int], nominal_rows: int, how: Compaction) -> list[Batch]:
    batches = [take(rows, part, how) for part in order.split(sizes)]
    for batch, size in zip(batches, sizes, strict=True):
        if how.averages_rows and size != nominal_rows:
            batch[LOSS_WEIGHT] = size / nominal_rows
    return batches


def row_widths(rows: Batch, how: Compaction) -> torch.Tensor:
    """The columns that each row needs, (B,): all of the prompt's, and the completion's up to its end."""
    return rows["prompt_ids"].size(1) + _round_up(completion_lengths(rows), how.multiple)


def _round_up(columns: Any, multiple: int) -> Any:
    return (columns + multiple - 1) // multiple * multiple


def unknown_entries(batches: list[Batch]) -> list[str]:
    """The names of unknown entries, such as images, which can't be assigned to rows."""
    return sorted({key for batch in batches for key, value in batch.items() if value is not None} - KNOWN)


def _are_known(batches: list[Batch]) -> bool:
    """Whether every entry is known, and all have the normalizer of one generation batch."""
    return not unknown_entries(batches) and len({id(batch.get("num_items_in_batch")) for batch in batches}) == 1


def _tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    return ((key, value) for key, value in batch.items() if value is not None and key not in CONSTANTS)


def _is_per_token(key: str, value: torch.Tensor) -> bool:
    """Whether there is a column for each token of the completion, not one for the whole row."""
    return key in COMPLETION_COLUMNS and value.dim() == 2 and value.size(1) > 1
