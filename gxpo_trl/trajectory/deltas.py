"""The rank-1 deltas of each matrix (global, local and target) that NExt learns from."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from .checkpoints import AdapterTrajectory, Trajectory
from .lowrank import Triplets, align_signs, leading_triplets, turn_towards


CHUNK = 2**20
"""How many numbers of B and A of a difference are processed at a time, in addition to the checkpoints': 4 MiB."""


@dataclass(frozen=True)
class Deltas:
    """The leading triplets of N matrices of one shape, over the T checkpoints that have a predecessor.

    Attributes:
        names (`list[str]`): The names of the modules.
        from_start (`Triplets`): G_i = W_i - W_0, (T, N, ...), with signs that do not jump. NExt's global delta.
        local (`Triplets`): L_i = W_i - W_{i-1}, (T, N, ...).
        target (`Triplets`): T_i = W_{i+k} - W_i, (T - k, N, ...).
    """

    names: list[str]
    from_start: Triplets
    local: Triplets
    target: Triplets


def low_rank_deltas(trajectory: Trajectory, k: int, device: str = "cpu") -> list[Deltas]:
    """The deltas of a trajectory, k checkpoints ahead; one entry for each shape of matrices.

    Args:
        trajectory (`Trajectory`): See there.
        k (`int`): How many checkpoints ahead the targets are.
        device (`str`): Where they are computed; they are returned on the CPU.

    Raises:
        ValueError: If there are too few checkpoints to learn from one transition and hold another out, or nothing has
            moved.
    """
    first = 0 if trajectory.starts_at_zero else 1  # the first checkpoint may have no predecessor at that distance
    if len(trajectory) < k + 2 + first:
        raise ValueError(
            f"{trajectory.run} holds {len(trajectory)} checkpoints, {trajectory.spacing} steps apart, and looking "
            f"{k * trajectory.spacing} steps ahead takes {k + 2 + first}. Look less far ahead (`steps_ahead`), train "
            "longer, or save more often (`trajectory_steps`)."
        )
    checkpoints = range(first, len(trajectory))
    deltas = [_deltas_of(trajectory, names, k, checkpoints, device) for _, names in trajectory.groups()]
    if not any(d.target.sigma.any() for d in deltas):
        raise ValueError(f"No matrix of {trajectory.run} moves from checkpoint to checkpoint: there is nowhere to go.")
    return deltas


def in_chunks(trajectory: Trajectory, names: list[str]) -> list[slice]:
    """Cuts modules of one shape into parts whose differences fit in `CHUNK`."""
    size = max(CHUNK // trajectory.size(names[0]), 1)
    return [slice(i, i + size) for i in range(0, len(names), size)]


def _deltas_of(trajectory: Trajectory, names: list[str], k: int, checkpoints: range, device: str) -> Deltas:
    pairs = [(i, None) for i in checkpoints]
    pairs += [(i, i - 1 if i else None) for i in checkpoints]
    pairs += [(i + k, i) for i in checkpoints if i + k in checkpoints]

    def triplets_of(part: slice) -> Triplets:
        found = [leading_triplets(f.to(device)) for f in trajectory.differences(names[part], pairs)]
        return _join(found, lambda column: torch.stack(column).cpu())

    parts = in_chunks(trajectory, names)
    if isinstance(trajectory, AdapterTrajectory):
        with _side_by_side() as pool:
            found = list(pool.map(triplets_of, parts))
    else:
        found = list(map(triplets_of, parts))
    triplets, count = _join(found, partial(torch.cat, dim=1)), len(checkpoints)
    from_start = align_signs(triplets[:count])
    local, target = (
        turn_towards(align_signs(t), from_start) for t in (triplets[count : 2 * count], triplets[2 * count :])
    )
    return Deltas(names, from_start, local, target)


@contextlib.contextmanager
def _side_by_side() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each with its own matrix: a small matrix is too little work for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _join(parts: list[Triplets], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Triplets:
    """σ, u, v and energies of all parts, each joined into one tensor."""
    names = (f.name for f in dataclasses.fields(Triplets))
    return Triplets(*(join([getattr(part, name) for part in parts]) for name in names))
