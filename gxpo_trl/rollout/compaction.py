"""The same gradient from fewer tokens: rows sorted by length, trimmed, and left out where they contribute nothing.

TRL pads every completion of a generation batch to the longest one and shuffles, so that nearly every micro-batch is as
wide as the longest completion of all. Nothing is computed twice or approximated here: rows change places among the
micro-batches of one optimizer step, columns that every row of a micro-batch has masked are dropped, and in the passes
after the first a row whose advantage is 0 is left out where the loss sees that row through its advantage alone.

A micro-batch is TRL's: a dict of tensors whose first dimension are the rows. What comes out are such dicts, with one
more entry, `LOSS_WEIGHT`, where a loss that averages over the rows of its micro-batch has to be corrected for how many
there are.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


Batch = dict[str, Any]

LOSS_WEIGHT = "loss_weight"
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
)
ROWS = ("advantages", "old_logps", "importance_sampling_ratio")  # (B,) or (B, 1)
CONSTANTS = ("num_items_in_batch", LOSS_WEIGHT)
MOST_ROWS = 512  # for which the best partition is looked for: the search takes rows² × micro-batches steps
KNOWN = {*PROMPT_COLUMNS, *COMPLETION_COLUMNS, *ROWS, *CONSTANTS}


@dataclass(frozen=True)
class Compaction:
    """What may be done to the micro-batches of one optimizer step without changing its gradient.

    Attributes:
        regroup (`bool`): Rows may change micro-batches: the loss is a sum over rows, or a mean over equally many.
        averages_rows (`bool`): The loss of a micro-batch is a mean over its rows, not a sum with a normalizer of its
            own.
        trims_prompts (`bool`): Leading columns may be dropped: the model's positions are relative.
        prunes (`bool`): Rows with advantage 0 contribute nothing to the gradient.
        max_tokens (`int`, *optional*): Micro-batches hold at most so many tokens, padding included; unset for as many
            as TRL's hold.
    """

    regroup: bool = True
    averages_rows: bool = True
    trims_prompts: bool = False
    prunes: bool = False
    max_tokens: int | None = None


MaxOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""The elementwise maximum of a tensor over all ranks. Ranks have to agree on the rows of each micro-batch."""


def compact(
    micro_batches: list[Batch], how: Compaction, max_over_ranks: MaxOverRanks = torch.Tensor.clone
) -> list[Batch]:
    """The micro-batches of one optimizer step with their rows sorted by completion length, longest first, and trimmed.

    Args:
        micro_batches (`list[Batch]`): Of one optimizer step, with equally many rows each.
        how (`Compaction`): What may be done.
        max_over_ranks (`MaxOverRanks`): Asked once.

    Returns:
        `list[Batch]`: As many micro-batches with the same rows, cut where the fewest tokens are computed; none has
            more of them than TRL's, or than `max_tokens` where so many micro-batches can keep it. Unchanged where a
            batch holds something that is not known here, such as images.

    Raises:
        ValueError: If there is such a thing and `max_tokens` is set, which then can't be kept.
    """
    if not _are_known(micro_batches):
        if how.max_tokens is not None:
            raise ValueError(
                "`max_tokens_per_micro_batch` can't be kept: rollouts with "
                f"{', '.join(unknown_entries(micro_batches))} can't be dealt out anew. Leave it out."
            )
        return micro_batches
    if not how.regroup:
        return [take(batch, torch.arange(count_rows(batch)), how) for batch in micro_batches]
    rows = merge(micro_batches)
    order = completion_lengths(rows).argsort(descending=True, stable=True)
    widths = max_over_ranks(_widths(rows)[order]).tolist()
    nominal_rows = count_rows(rows) // len(micro_batches)
    sizes = partition(widths, len(micro_batches), how.max_tokens or nominal_rows * widths[0])
    return _split(rows, order, sizes, nominal_rows, how)


def prune(
    micro_batches: list[Batch], how: Compaction, max_over_ranks: MaxOverRanks = torch.Tensor.clone
) -> list[Batch]:
    """The rows that have an advantage, in as few micro-batches as hold them.

    Args:
        micro_batches (`list[Batch]`): Of one optimizer step, as `compact` left them.
        how (`Compaction`): What may be done.
        max_over_ranks (`MaxOverRanks`): Asked once, and once more if anything is left out or packed.

    Returns:
        `list[Batch]`: Equally many micro-batches, with equally many rows each, on every rank; a rank with fewer rows
        that count fills up with rows that don't. Empty if no rank has a row that counts, and unchanged where nothing
        can be left out.
    """
    if not how.regroup or not (how.prunes or how.max_tokens) or not _are_known(micro_batches):
        return micro_batches
    rows = merge(micro_batches)
    everything = count_rows(rows)
    lengths = completion_lengths(rows)
    counts = _has_advantage(rows) if how.prunes else torch.ones_like(lengths, dtype=torch.bool)
    kept = int(max_over_ranks(counts.sum().view(1)).item())
    if kept == 0:
        return []
    if kept == everything and how.max_tokens is None:
        return micro_batches
    cheapest_first = torch.where(counts, -1, lengths).argsort(stable=True)[:kept]  # those that count, then short ones
    order = cheapest_first[lengths[cheapest_first].argsort(descending=True, stable=True)]
    widths = max_over_ranks(_widths(rows)[order]).tolist()
    nominal_rows = everything // len(micro_batches)
    max_tokens = how.max_tokens or nominal_rows * widths[0]
    count = len(pack(widths, max_tokens)) if how.max_tokens else math.ceil(kept / nominal_rows)
    return _split(rows, order, partition(widths, count, max_tokens), nominal_rows, how)


def partition(widths: list[int], count: int, max_tokens: int) -> list[int]:
    """How many rows go into each of `count` micro-batches, in order, so that the fewest tokens are computed.

    A micro-batch costs its rows × the widest of them, which is its first: `widths` never increases. Each keeps within
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
    """As few micro-batches as keep `max_tokens`; a row that is wider by itself gets one of its own."""
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
    """What a micro-batch costs: rows × columns, padding included."""
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
    """Some rows of a batch, without the columns that all of them have masked; one column is kept in any case."""
    taken = {key: value[rows.to(value.device)] for key, value in _tensors(batch)}
    end = max(1, int(completion_lengths(taken).max()))
    start = 0
    if how.trims_prompts:
        start = min(int(taken["prompt_mask"].argmax(1).min()), taken["prompt_mask"].size(1) - 1)
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


def _widths(rows: Batch) -> torch.Tensor:
    return rows["prompt_ids"].size(1) + completion_lengths(rows)


def _has_advantage(rows: Batch) -> torch.Tensor:
    return rows["advantages"].reshape(count_rows(rows), -1).ne(0).any(1)


def unknown_entries(batches: list[Batch]) -> list[str]:
    """The names of entries, such as images, of which it is not known here how they belong to rows."""
    return sorted({key for batch in batches for key, value in batch.items() if value is not None} - KNOWN)


def _are_known(batches: list[Batch]) -> bool:
    """Whether every entry is known here, and the normalizer is that of one generation batch."""
    return not unknown_entries(batches) and len({id(batch.get("num_items_in_batch")) for batch in batches}) == 1


def _tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    return ((key, value) for key, value in batch.items() if value is not None and key not in CONSTANTS)


def _is_per_token(key: str, value: torch.Tensor) -> bool:
    """Whether the columns are those of the completion, rather than one for the whole row."""
    return key in COMPLETION_COLUMNS and value.dim() == 2 and value.size(1) > 1
