"""The comparison over learning rates, in small: it replaces parts of other libraries, and would not see them go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "rates.py"
sys.path.insert(0, str(SCRIPT.parent))

import rates  # noqa: E402


RUNS = {
    1e-4: {0: {"auc": 0.9, "final": 0.1}, 1: {"auc": 0.5, "final": 0.2}, 2: {"auc": 0.5, "final": 0.3}},
    1e-3: {0: {"auc": 0.6, "final": 0.4}, 1: {"auc": 0.6, "final": 0.5}},
}


def test_a_tuned_arm_has_the_rate_that_is_best_on_the_other_seeds():
    assert rates.tuned(RUNS, "final") == {0: 0.4, 1: 0.2, 2: 0.3}
    assert rates.tuned({rate: {0: runs[0]} for rate, runs in RUNS.items()}, "auc") == {0: 0.9}


def test_a_controlled_arm_is_the_mean_over_its_rates():
    assert rates.over_rates(RUNS, "auc") == {0: 0.75, 1: 0.55}


def test_the_area_in_an_arms_time_is_that_of_the_first_part_of_its_run():
    curve = [[0, 0.0, 0], [100, 1.0, 2], [200, 1.0, 4]]
    assert rates.area_until(curve, 1.0) == pytest.approx(0.75)
    assert rates.area_until(curve, 0.5) == pytest.approx(0.5)
    assert rates.area_until(curve, 0.75) == pytest.approx(2 / 3)
    assert rates.area_until(curve, 0.25) == pytest.approx(0.25)


def test_no_run_of_a_regime_is_made_twice():
    for regime in rates.REGIMES:
        runs = [(arm.label, rate) for arm, rate in regime.runs()]
        assert len(runs) == len(set(runs)) and {label for label, _ in runs} <= set(rates.LABELS)
        assert regime.changes.keys() <= {label for label, _ in runs}


def test_the_pages_have_the_tables_of_the_results_there():
    there = {path.stem: json.loads(path.read_text()) for path in (rates.RESULTS / "rates").glob("*.json")}
    for path, page in rates.pages(there).items():
        assert path.read_text() == page, f"{path.name}: run `python benchmarks/rates.py --write`"


@pytest.mark.slow
def test_runs_are_made_once_and_drawn(tmp_path):
    arms = ["GRPO", "two passes, controlled", "check", "adaptive KL", "hypergradient"]
    command = [sys.executable, str(SCRIPT), "--quick", "--arms", *arms, "--out", str(tmp_path / "runs")]
    command += ["--results", str(tmp_path / "results")]
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads((tmp_path / "results" / "full.json").read_text())
    runs = {(run["arm"], run["learning_rate"]): run for run in result["runs"]}
    assert len(runs) == len(result["runs"]) == 2 * len(arms)
    for rate in (1e-5, 4e-4):
        finals = [runs[arm, rate]["curve"] for arm in arms]
        assert all(a != b for i, a in enumerate(finals) for b in finals[:i])  # each does something of its own
        assert len({curve[-1][0] for curve in finals}) == 1  # the same rollouts
    assert runs["two passes, controlled", 1e-5]["multiplier"][0] > 1  # found by the search: 1e-5 is too small
    assert (tmp_path / "results" / "rates.png").is_file() and "| GRPO | " in first
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "seed" in first and "seed 0" not in again
    subprocess.run([*command, "--costs"], check=True, capture_output=True, text=True)
    costs = json.loads((tmp_path / "results" / "full.json").read_text())["cost"]
    assert (
        costs.keys() == {"GRPO", "two passes, controlled", "check"}
        and costs["GRPO"] == 1 < costs["two passes, controlled"]
    )
