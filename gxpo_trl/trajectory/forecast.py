"""Predicts how a trajectory continues, with each method, and how good earlier predictions would have been."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .checkpoints import Trajectory
from .deltas import Deltas, in_chunks, low_rank_deltas
from .linear import least_squares, linearity, rank_1_line, rank_1_path, secant
from .lowrank import Factors, Triplets
from .predictor import PredictorSettings, TrajectoryPredictor


Prediction = Callable[[int, slice], Factors]
"""The predicted movement of some matrices: of `deltas[i].names[part]`, as `(i, part)`."""

R2_EDGES = (-0.5, 0.0, 0.5)
"""Between the ranges of R² that the paper's figure 3 counts matrices in."""


@dataclass(frozen=True)
class Forecast:
    """A prediction, with its report.

    Attributes:
        deltas (`list[Deltas]`): What it was predicted from.
        predict (`Prediction`): The movement of each matrix over `steps_ahead` steps.
        report (`dict`): Held-out errors, energy ratios, linearity, epochs and seconds.
    """

    deltas: list[Deltas]
    predict: Prediction
    report: dict[str, Any] = field(default_factory=dict)


def checkpoints_ahead(steps_ahead: int | None, spacing: int) -> int:
    """The number of checkpoints in a number of steps. Without a number of steps it is the paper's five.

    Raises:
        ValueError: If it is not a multiple.
    """
    k, rest = divmod(5 * spacing if steps_ahead is None else steps_ahead, spacing)
    if rest or k < 1:
        raise ValueError(
            f"`steps_ahead` must be a multiple of {spacing}, the checkpoints' spacing, such as "
            f"{max(k, 1) * spacing}; got {steps_ahead}."
        )
    return k


def extrapolate(
    trajectory: Trajectory, method: str, steps_ahead: int | None = None, settings: PredictorSettings | None = None
) -> Forecast:
    """Predicts how far each matrix moves in the steps after the last checkpoint.

    Args:
        trajectory (`Trajectory`): See there.
        method (`str`): `next`, `relex`, `alpharl`, `rl-extra` or `linear`.
        steps_ahead (`int`, *optional*): A multiple of the spacing; `None` for five checkpoints.
        settings (`PredictorSettings`, *optional*): Of `next`; `None` for the defaults.

    Raises:
        ValueError: If `steps_ahead` is no such multiple, there are too few checkpoints, or nothing has moved.
    """
    settings = settings or PredictorSettings()
    k = checkpoints_ahead(steps_ahead, trajectory.spacing)
    started = time.perf_counter()
    deltas = low_rank_deltas(trajectory, k, settings.device)
    seconds = {"triplets": time.perf_counter() - started}
    report = {"method": method, **_describe(trajectory, deltas, k)}
    started = time.perf_counter()
    last = len(deltas[0].local) - 1
    held_out = last - k
    candidates = {
        "repeat_local": _continued(trajectory, deltas, held_out, lambda points: k * secant(points, 1)),
        "linear": _continued(trajectory, deltas, held_out, lambda points: least_squares(points, k)),
        "rl-extra": _continued(trajectory, deltas, held_out, lambda points: secant(points, k)),
        "alpharl": _rank_1_line(deltas, held_out, k),
        "relex": _rank_1_path(trajectory, deltas, held_out, k),
        "best_rank_1": _of_triplets([d.target[held_out] for d in deltas]),
    }
    if method == "next":
        predictor = TrajectoryPredictor(deltas, settings)
        seen = held_out - k + 1  # transitions that were over by then
        report["held_out_was_seen_in_part"] = seen < 1
        epochs = predictor.fit(range(seen if seen > 0 else held_out), held_out)
        candidates["next"] = _of_triplets(predictor.predict(held_out))
        report["predictor"] = {**vars(settings), "epochs_taken": epochs}
    report["held_out"] = {
        "from_step": trajectory.steps[held_out - last - 1],
        "to_step": trajectory.steps[-1],
        "errors": {"zero": {"error": 1.0, "cosine": None}} | _compare(trajectory, deltas, held_out, k, candidates),
    }
    if method == "next":
        predictor.fit(range(held_out + 1), epochs=epochs)
        predict = _of_triplets(predictor.predict(last))
    elif method == "alpharl":
        predict = _rank_1_line(deltas, last, k)
    elif method == "relex":
        predict = _rank_1_path(trajectory, deltas, last, k)
    else:
        line = secant if method == "rl-extra" else least_squares
        predict = _continued(trajectory, deltas, last, lambda points: line(points, k))
    seconds["prediction"] = time.perf_counter() - started
    report["seconds"] = seconds
    return Forecast(deltas, predict, report)


def _describe(trajectory: Trajectory, deltas: list[Deltas], k: int) -> dict[str, Any]:
    return {
        "steps": list(trajectory.steps),
        "steps_ahead": k * trajectory.spacing,
        "checkpoints_ahead": k,
        "matrices": sum(len(d.names) for d in deltas),
        "left_alone": trajectory.left_alone,
        "energy_ratio": _energy(trajectory, deltas),
        "linearity": _linearity(trajectory, deltas, k),
    }


def _of_triplets(triplets: list[Triplets]) -> Prediction:
    return lambda i, part: triplets[i][part].as_factors()


def _rank_1_line(deltas: list[Deltas], index: int, k: int) -> Prediction:
    lines = [rank_1_line(d.from_start[: index + 1], k) for d in deltas]
    return lambda i, part: Factors(lines[i].left[part], lines[i].right[part])


def _continued(
    trajectory: Trajectory, deltas: list[Deltas], index: int, weights: Callable[[int], torch.Tensor]
) -> Prediction:
    """A weighted sum of the checkpoints up to that of `deltas[...].local[index]`, the first of all included."""
    points = _points(trajectory, deltas, index)
    return lambda i, part: trajectory.combination(deltas[i].names[part], weights(points).tolist())


def _rank_1_path(trajectory: Trajectory, deltas: list[Deltas], index: int, k: int) -> Prediction:
    points = _points(trajectory, deltas, index)

    def predict(i: int, part: slice) -> Factors:
        names = deltas[i].names[part]
        return trajectory.combination_from_start(names, rank_1_path(trajectory.products(names, points), k))

    return predict


def _points(trajectory: Trajectory, deltas: list[Deltas], index: int) -> int:
    """How many checkpoints there are up to that of `deltas[...].local[index]`."""
    return len(trajectory) - (len(deltas[0].local) - 1 - index)


def _compare(
    trajectory: Trajectory, deltas: list[Deltas], index: int, k: int, predictions: dict[str, Prediction]
) -> dict[str, dict[str, float | None]]:
    """Compares predictions with what happened, over all matrices.

    Returns:
        `dict`: For each prediction its `error`, the Frobenius norm of what was missed over that of what happened, and
            the `cosine` of the angle between the two.
    """
    checkpoint = len(trajectory) - len(deltas[0].local) + index
    happened, sums = 0.0, {name: [0.0, 0.0] for name in predictions}
    for i, d in enumerate(deltas):
        for part in in_chunks(trajectory, d.names):
            truth = trajectory.difference(d.names[part], checkpoint + k, checkpoint)
            happened += truth.inner(truth).sum().item()
            for name, predict in predictions.items():
                found = predict(i, part)
                sums[name][0] += found.inner(found).sum().item()
                sums[name][1] += found.inner(truth).sum().item()
    return {name: _error(happened, *found) for name, found in sums.items()}


def _error(happened: float, predicted: float, product: float) -> dict[str, float | None]:
    """From squared norms and the inner product. If nothing moved, there is no error."""
    missed = max(happened - 2 * product + predicted, 0.0)
    return {
        "error": math.sqrt(missed / happened) if happened > 0 else None,
        "cosine": product / math.sqrt(happened * predicted) if happened * predicted > 0 else None,
    }


def _energy(trajectory: Trajectory, deltas: list[Deltas]) -> dict[str, list[float]]:
    """σ1/Σσ of the global deltas at each step, over matrices: mean and quartiles (the paper's figure 2)."""
    energy = torch.cat([d.from_start.energy for d in deltas], dim=1)  # (T, matrices)
    return {
        "steps": list(trajectory.steps[-len(energy) :]),
        "mean": energy.mean(1).tolist(),
        "low": energy.quantile(0.25, dim=1).tolist(),
        "high": energy.quantile(0.75, dim=1).tolist(),
    }


def _linearity(trajectory: Trajectory, deltas: list[Deltas], k: int) -> dict[str, dict[str, list]]:
    """R² of straight lines through the rank-1 global deltas up to each step, over matrices: on these deltas, mean and
    quartiles; and on the next k, the shares of matrices by R² (the paper's figure 3)."""
    count = len(deltas[0].from_start)
    so_far = {"steps": [], "mean": [], "low": [], "high": []}
    ahead = {"steps": [], "edges": list(R2_EDGES), "shares": []}
    edges = torch.tensor(R2_EDGES, dtype=torch.float64)
    for seen in range(3, count + 1):
        step = trajectory.steps[seen - count - 1]
        r2 = torch.cat([linearity(d.from_start, seen, range(seen)) for d in deltas])
        values = (step, r2.mean().item(), *r2.quantile(torch.tensor([0.25, 0.75], dtype=r2.dtype)).tolist())
        for name, value in zip(so_far, values, strict=True):
            so_far[name].append(value)
        if seen + max(k, 2) <= count:
            r2 = torch.cat([linearity(d.from_start, seen, range(seen, seen + max(k, 2))) for d in deltas])
            counts = torch.bincount(torch.bucketize(r2, edges), minlength=len(edges) + 1)
            ahead["steps"].append(step)
            ahead["shares"].append((counts / len(r2)).tolist())
    return {"so_far": so_far, "ahead": ahead}
