"""Scores of a benchmark from the verdicts on its samples, each with an interval over problems.

Every metric is a mean over problems of a number between 0 and 1, which is computed from one problem's samples. A
sample that could not be decided is left out, so a problem has only its decided samples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest

from ..tasks.answers import Verdict


CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A metric over problems.

    Attributes:
        value (`float`): The mean.
        low, high (`float`): The 95 % interval over problems: by bootstrap, and by Wilson if all problems have 0 or all
            have 1, because all resamples would be the same.
        problems (`int`): How many had enough samples.
    """

    value: float
    low: float
    high: float
    problems: int


def average(verdicts: Sequence[Verdict]) -> float | None:
    """avg@n, the papers' pass@1: the fraction of one problem's decided samples that are right; `None` if none is."""
    scores = decided(verdicts)
    return sum(scores) / len(scores) if scores else None


def pass_at_k(verdicts: Sequence[Verdict], k: int) -> float | None:
    """The unbiased estimate that one of k samples is right: 1 - C(n - c, k) / C(n, k), of n samples with c right.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), equation 1.

    Returns:
        `float`, *optional*: `None` if fewer than k samples could be decided.
    """
    scores = decided(verdicts)
    wrong = scores.count(0.0)
    return 1.0 - math.comb(wrong, k) / math.comb(len(scores), k) if len(scores) >= k else None


def majority_at_k(verdicts: Sequence[Verdict], k: int) -> float | None:
    """maj@k: whether the most frequent answer of k samples is right; the mean over disjoint sets of k samples.

    A tie scores the mean of the tied answers. Samples without an answer have no vote.

    Returns:
        `float`, *optional*: `None` if fewer than k samples could be decided.
    """
    voters = [verdict for verdict in verdicts if verdict.score is not None]
    ballots = [voters[i : i + k] for i in range(0, len(voters) - k + 1, k)]
    return sum(map(_elect, ballots)) / len(ballots) if ballots else None


def _elect(ballot: Sequence[Verdict]) -> float:
    votes = Counter(verdict.answer for verdict in ballot if verdict.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    scores = {verdict.answer: verdict.score for verdict in reversed(ballot)}  # of an answer's first sample
    elected = [scores[answer] for answer, count in votes.items() if count == most]
    return sum(elected) / len(elected)


def decided(verdicts: Sequence[Verdict]) -> list[float]:
    return [verdict.score for verdict in verdicts if verdict.score is not None]


def estimate(values: Sequence[float | None], seed: int = 0) -> Estimate | None:
    """The mean over problems, with its percentile bootstrap interval; `None` if no problem has a value.

    If every value is 0, or every value is 1, the interval is Wilson's, of 0 of n or n of n.

    Args:
        values (`Sequence[float | None]`): One number for each problem; `None` if its samples gave none.
        seed (`int`): The same seed gives the same interval.
    """
    present = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if not len(present):
        return None
    if (present == 0).all() or (present == 1).all():
        interval = binomtest(int(present.sum()), len(present)).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(present.mean().item(), interval.low, interval.high, len(present))
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(RESAMPLES // 1000):  # all at once, thousands of problems would take gigabytes
        drawn = torch.randint(len(present), (1000, len(present)), generator=generator)
        means.append(present[drawn].mean(1))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(present.mean().item(), low, high, len(present))


def summarize(verdicts: Sequence[Sequence[Verdict]], ks: Sequence[int], majority: bool = True) -> dict[str, Estimate]:
    """All metrics of a benchmark.

    Args:
        verdicts (`Sequence[Sequence[Verdict]]`): Verdicts on the samples of each problem, equally many each.
        ks (`Sequence[int]`): For pass@k and maj@k; none above the number of samples.
        majority (`bool`): Whether there are answers to vote with.

    Returns:
        `dict[str, Estimate]`: By name, such as `"avg@16"`, `"pass@8"`, `"maj@8"`; without those for which no problem
        had enough decided samples.
    """
    samples = max(map(len, verdicts), default=0)
    values = {f"avg@{samples}": [average(of_problem) for of_problem in verdicts]}
    for k in ks:
        values[f"pass@{k}"] = [pass_at_k(of_problem, k) for of_problem in verdicts]
        if majority:
            values[f"maj@{k}"] = [majority_at_k(of_problem, k) for of_problem in verdicts]
    estimates = {name: estimate(of_problems) for name, of_problems in values.items()}
    return {name: found for name, found in estimates.items() if found is not None}
