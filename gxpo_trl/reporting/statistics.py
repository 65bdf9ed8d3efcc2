"""Statistics over seeds: means with intervals, paired differences, and the cost of matching a baseline."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from .arms import Arm
from .runs import Point, Run


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value (`float`): The mean.
        low, high (`float`, *optional*): Its 95 % interval, by Student's t; `None` for a single seed.
        n (`int`): How many seeds.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and not self.low <= 0 <= self.high


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean and its interval; `None` without values."""
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Mean(mean, None, None, 1)
    half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values) / n**0.5
    return Mean(mean, mean - half, mean + half, n)


def final(points: Sequence[Point]) -> float:
    return points[-1].value


def peak(points: Sequence[Point]) -> Point:
    """The best evaluation, and of equal ones the first."""
    return max(points, key=lambda point: (point.value, -point.step))


def area(points: Sequence[Point]) -> float:
    """The area under the curve over steps, with the length of the run as 1: the mean of the linear interpolation."""
    pairs = list(zip(points, points[1:], strict=False))
    if not pairs:
        return final(points)
    whole = sum((b.step - a.step) * (a.value + b.value) / 2 for a, b in pairs)
    return whole / (points[-1].step - points[0].step)


def by_seed(arm: Arm, benchmark: str) -> dict[tuple[int, int], tuple[Point, ...]]:
    """The evaluations of each run by its seed and its number among those of that seed. Runs of an unknown seed are not
    in it: they have no counterpart.
    """
    counts, found = Counter(), {}
    for run in arm.runs:
        if benchmark in run.points and run.seed is not None:
            found[run.seed, counts[run.seed]] = run.points[benchmark]
            counts[run.seed] += 1
    return found


def paired_difference(
    arm: Arm, baseline: Arm, benchmark: str, measure: Callable[[Sequence[Point]], float] = final
) -> Mean | None:
    """The difference of final values, or of another measure of curves, seed by seed; `None` without a common seed."""
    ours, theirs = by_seed(arm, benchmark), by_seed(baseline, benchmark)
    return mean_of([measure(ours[seed]) - measure(theirs[seed]) for seed in ours if seed in theirs])


@dataclass(frozen=True)
class Matching:
    """What an arm spent until it first reached the baseline's peak, seed by seed.

    Attributes:
        spent (`dict[str, float]`): The median over the seeds that matched, by budget.
        speedup (`dict[str, float]`): What the baseline had spent at its peak divided by that, likewise.
        matched, n (`int`): How many seeds reached it, and of how many.
    """

    spent: dict[str, float]
    speedup: dict[str, float]
    matched: int
    n: int


BUDGETS = ("step", "rollouts", "backward_passes", "hours")


def match_peak(arm: Arm, baseline: Arm, benchmark: str) -> Matching:
    """Uses only the evaluations, without interpolation."""
    ours, theirs = by_seed(arm, benchmark), by_seed(baseline, benchmark)
    pairs = [(ours[seed], peak(theirs[seed])) for seed in ours if seed in theirs]
    firsts = [(next((p for p in points if p.value >= best.value), None), best) for points, best in pairs]
    reached = [(point, best) for point, best in firsts if point is not None]
    spent, speedup = {}, {}
    for budget in BUDGETS:
        both = [(point.spent(budget), best.spent(budget)) for point, best in reached]
        if both and all(value is not None for pair in both for value in pair):
            spent[budget] = statistics.median(mine for mine, _ in both)
            ratios = [other / mine for mine, other in both if mine > 0]
            if ratios:
                speedup[budget] = statistics.median(ratios)
    return Matching(spent, speedup, len(reached), len(pairs))


def value_at(points: Sequence[Point], budget: str, amount: float) -> float | None:
    """The linear interpolation at that amount; `None` outside the measured range."""
    known = [(point.spent(budget), point.value) for point in points if point.spent(budget) is not None]
    for (x0, y0), (x1, y1) in zip(known, known[1:], strict=False):
        if x0 <= amount <= x1:
            return y1 if x1 == x0 else y0 + (amount - x0) / (x1 - x0) * (y1 - y0)
    return next((y for x, y in known if x == amount), None)  # of a single evaluation


def matched_amounts(arms: Sequence[Arm], benchmark: str, budget: str, count: int = 3) -> list[float]:
    """Equal fractions of what the cheapest run has spent; all runs have reached them."""
    ends = [points[-1].spent(budget) for arm in arms for points in arm.curves(benchmark)]
    if not ends or any(end is None for end in ends):
        return []
    return [*(min(ends) * i / count for i in range(1, count)), min(ends)]  # the last one without rounding


def icer(steps: int, before: float, after: float) -> float:
    """Training steps for each point of accuracy gained (NExt, section 5.1). Lower is better.

    Args:
        steps (`int`): Optimizer steps trained.
        before, after (`float`): Accuracy, in [0, 1].

    Returns:
        `float`: Infinite if nothing is gained.
    """
    return steps / (100 * (after - before)) if after > before else math.inf


def shutoff_point(run: Run, benchmark: str, budget: str) -> tuple[float, float] | None:
    """The point of a run's curve at which its lookahead shut off."""
    points, step = run.points.get(benchmark, ()), run.shutoff_step
    if step is None or not points:
        return None
    value = value_at(points, "step", step)
    known = [(point.step, point.spent(budget)) for point in points if point.spent(budget) is not None]
    for (s0, x0), (s1, x1) in zip(known, known[1:], strict=False):
        if s0 <= step <= s1 and value is not None:
            return x0 + (step - s0) / (s1 - s0) * (x1 - x0), value
    return None
