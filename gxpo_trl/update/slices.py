"""Shards cut into slices, so that temporaries stay small compared with the model."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch


SLICE_SIZE = 2**20  # coordinates that are worked on at a time


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """What tensors of this precision are computed with: the sums of products in bf16 have two or three digits."""
    return torch.promote_types(dtype, torch.float32)


class Part(NamedTuple):
    """Where a slice is: rows `start` to `stop` of a shard; of a scalar, all of it."""

    shard: int
    start: int
    stop: int

    def of(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """The same slice of other shards of the same shapes."""
        shard = shards[self.shard]
        return shard if shard.dim() == 0 else shard[self.start : self.stop]


def aligned_slices(
    shards: list[torch.Tensor], *others: Iterable[torch.Tensor | None]
) -> Iterator[tuple[Part, list[torch.Tensor]]]:
    """Views of equally shaped shards, cut at the same rows into at most about `SLICE_SIZE` elements each.

    A shard that is `None`, as a gradient that no token reached, counts as zeros. None comes of an empty shard: a rank
    may hold nothing of a small parameter.
    """
    for i, (shard, *companions) in enumerate(zip(shards, *others, strict=True)):
        if not shard.numel():
            continue
        zeros = shard.new_zeros(()).expand(shard.shape)
        tensors = [shard, *(zeros if companion is None else companion for companion in companions)]
        rows = shard.shape[0] if shard.dim() else 1
        step = rows if shard.numel() <= SLICE_SIZE else max(1, SLICE_SIZE * rows // shard.numel())
        for start in range(0, rows, step):
            part = Part(i, start, min(start + step, rows))
            yield part, [tensor if tensor.dim() == 0 else tensor[part.start : part.stop] for tensor in tensors]
