"""The comparison of the update rules, in small: it replaces functions of the package, and would not see them go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_rules.py"


@pytest.mark.slow
def test_the_comparison_runs_and_goes_on_where_it_broke_off(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--parts", "tuned", "next", "precision", "--out", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results = tmp_path / "quick" / "results"
    tuned = json.loads((results / "tuned.json").read_text())
    rows = {row["arm"]: row for row in tuned["rows"]}
    assert all(row["seeds"] == 2 and row["auc"][0] > 0.3 for row in rows.values())
    assert all(len(rates) == 2 for rates in tuned["tried"].values())
    assert rows["GXPO K 5 α 1"]["runs"] != rows["GXPO K 5 α 1, ratio per matrix"]["runs"]
    assert rows["GRPO, 3 iterations"]["runs"][0]["curve"][-1][0] == rows["GRPO"]["runs"][0]["curve"][-1][0]  # rollouts
    assert (results / "tuned.html").is_file() and (results / "ahead.png").is_file()
    measured = json.loads((results / "precision.json").read_text())["rows"]
    assert all(0 < row["diagnostics"]["noise_retention_std"] < 1 for row in measured)
    loops = {row["arm"]: row["runs"] for row in json.loads((results / "next.json").read_text())["rows"]}
    assert loops["GRPO, begun anew"]["before"] == loops["GRPO, NExt, α 1"]["before"]
    assert loops["GRPO, begun anew"]["right_after"] != loops["GRPO, NExt, α 1"]["right_after"]
    states = {path: path.stat().st_mtime for path in tmp_path.rglob("trainer_state.json")}
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("trainer_state.json")} == states
    assert [line for line in first.splitlines() if "|" in line] == [line for line in again.splitlines() if "|" in line]
