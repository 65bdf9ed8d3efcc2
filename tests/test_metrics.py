"""Scores of a benchmark, against brute force, and their intervals, against simulation."""

import itertools
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gxpo_trl.evaluation.metrics import average, estimate, majority_at_k, pass_at_k, summarize
from gxpo_trl.tasks.answers import Verdict


RIGHT, WRONG, UNDECIDED = Verdict(1.0, "7"), Verdict(0.0, "8"), Verdict(None, None)


def verdicts(*answers: str | None, gold: str = "7") -> list[Verdict]:
    return [Verdict(float(answer == gold), answer) for answer in answers]


def test_the_average_is_over_decided_samples():
    assert average([RIGHT, WRONG, UNDECIDED, RIGHT]) == pytest.approx(2 / 3)
    assert average([UNDECIDED]) is None


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(right, k):
    sampled = [RIGHT if r else WRONG for r in right]
    if k > len(right):
        assert pass_at_k(sampled, k) is None
        return
    subsets = [any(subset) for subset in itertools.combinations(right, k)]
    assert pass_at_k(sampled, k) == pytest.approx(statistics.fmean(subsets))


def test_undecided_samples_are_none_of_the_k():
    assert pass_at_k([WRONG, UNDECIDED, UNDECIDED], 2) is None
    assert pass_at_k([RIGHT, WRONG, UNDECIDED], 2) == 1.0


@pytest.mark.parametrize(
    "answers, k, expected",
    [
        (["7", "7", "8"], 3, 1.0),
        (["7", "8", "8"], 3, 0.0),
        (["7", "8", "9"], 3, 1 / 3),  # a tie of three
        (["7", None, None], 3, 1.0),  # silence has no vote
        ([None, None], 2, 0.0),
        (["7", "8", "8", "8"], 1, 0.25),  # of one sample it is the average
        (["7", "7", "8", "8"], 2, 0.5),  # two runs of two
        (["7", "7", "8"], 2, 1.0),  # the third is half a run
        (["7"], 2, None),
    ],
)
def test_the_majority(answers, k, expected):
    assert majority_at_k(verdicts(*answers), k) == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=9))
def test_the_majority_does_not_depend_on_the_order_of_its_samples(answers):
    expected = majority_at_k(verdicts(*answers), len(answers))
    assert majority_at_k(verdicts(*sorted(answers, key=str)), len(answers)) == expected
    votes = Counter(answer for answer in answers if answer)
    if votes and votes["7"] > max((n for answer, n in votes.items() if answer != "7"), default=0):
        assert expected == 1.0


@pytest.mark.parametrize("problems", [30, 100])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(problems):
    """400 benchmarks of problems of random difficulty, with 4 samples each."""
    rng, covered = random.Random(problems), 0
    for trial in range(400):
        difficulty = [rng.random() for _ in range(problems)]  # 0.5 in the population
        values = [sum(rng.random() < p for _ in range(4)) / 4 for p in difficulty]
        found = estimate(values, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert 0.91 < covered / 400 < 0.98


def test_the_interval_is_the_same_for_the_same_seed_and_narrows_with_problems():
    values = [0.0, 1.0, 0.5, 1.0, 0.25] * 4
    assert estimate(values) == estimate(values)
    many = estimate(values * 25)
    assert many.high - many.low < 0.3 * (estimate(values).high - estimate(values).low)


@pytest.mark.parametrize("n, most", [(1, 0.7935), (10, 0.2775), (50, 0.0713)])
def test_none_and_all_have_wilsons_interval(n, most):
    """z² / (n + z²) with z = 1.96, and its mirror image; a bootstrap would say that there is no doubt."""
    none, all_of_them = estimate([0.0] * n), estimate([None, *[1.0] * n])
    assert (none.low, none.high, none.value) == (0.0, pytest.approx(most, abs=1e-4), 0.0)
    assert (all_of_them.low, all_of_them.high) == (pytest.approx(1 - most, abs=1e-4), 1.0)
    assert all_of_them.problems == n


def test_problems_without_a_value_are_left_out_and_counted():
    found = estimate([1.0, None, 0.0])
    assert (found.value, found.problems) == (0.5, 2)
    assert estimate([None]) is None


def test_a_summary_has_every_metric_that_some_problem_has_samples_for():
    found = summarize([[RIGHT, WRONG], [RIGHT, RIGHT], [UNDECIDED, WRONG]], ks=[1, 2])
    assert {name: metric.value for name, metric in found.items()} == {
        "avg@2": 0.5,
        "pass@1": 0.5,
        "maj@1": 0.5,
        "pass@2": 1.0,
        "maj@2": 0.75,
    }
    assert [metric.problems for metric in found.values()] == [3, 3, 3, 2, 2]
    assert "pass@1" not in summarize([[UNDECIDED]], ks=[1])
