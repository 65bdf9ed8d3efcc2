"""The comparison of the update rules, in small: it replaces functions of the package, and would not see them go."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_rules.py"
COMMITTED = SCRIPT.parent / "results" / "compare_rules"


@pytest.mark.slow
def test_pages_and_figure_are_drawn_from_the_committed_results(tmp_path):
    results = tmp_path / "quick" / "results"
    shutil.copytree(COMMITTED, results, ignore=lambda _, names: {name for name in names if not name.endswith(".json")})
    command = [sys.executable, str(SCRIPT), "--quick", "--draw", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    pages = {path.stem: path.read_text() for path in results.glob("*.html")}
    assert pages.keys() == {"tuned", "onepass", "equal", "lora", "decay", "harder", "cheaper"}
    assert (results / "ahead.png").is_file()
    for name, page in pages.items():
        rows = {row["arm"]: row for row in json.loads((results / f"{name}.json").read_text())["rows"]}
        other = {"onepass": "GRPO, 4 disjoint minibatches", "cheaper": "two passes"}.get(name, "GXPO K 5 α 1")
        for arm in ("GRPO", other):  # recomputed from the curves, seed by seed and over optimizer steps
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*rows[arm][value]) for value in ("final", "peak", "auc")]
            assert "".join(f"<td>{cell}</td>" for cell in [arm, "8", *cells]) in page
        low, high = rows[other]["auc_ahead"][1:]
        assert f"[{low:+.3f}, {high:+.3f}]" in page
    assert "18, 20, 13, 22, 24, 20, 21, 15" in pages["tuned"]  # where the gates shut off
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix not in (".json", ".html")) == [
        *("ahead.png", "quick", "results")
    ]


@pytest.mark.slow
def test_without_results_nothing_is_drawn(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--draw", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "holds no results" in run.stderr and not list(tmp_path.iterdir())


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
    assert loops["GRPO, restarted"]["before"] == loops["GRPO, NExt, α 1"]["before"]
    assert loops["GRPO, restarted"]["right_after"] != loops["GRPO, NExt, α 1"]["right_after"]
    states = {path: path.stat().st_mtime for path in tmp_path.rglob("trainer_state.json")}
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("trainer_state.json")} == states
    assert [line for line in first.splitlines() if "|" in line] == [line for line in again.splitlines() if "|" in line]
