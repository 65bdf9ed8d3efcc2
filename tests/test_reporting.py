"""Tables and figures from logs written by hand."""

import json

import pytest
from matplotlib.image import imread

from gxpo_trl.reporting.comparison import comparison_table, draw_comparison
from gxpo_trl.reporting.runs import Point, Run, load_run


LOG = [
    {"step": 0, "eval_reward": 0.2, "eval_runtime": 1.0},
    {"step": 1, "loss": 0.0, "lookahead/backward_passes": 3.0},
    {"step": 2, "loss": 0.0, "lookahead/backward_passes": 6.0, "lookahead/shutoff_step": 2},
    {"step": 3, "loss": 0.0, "lookahead/backward_passes": 7.0, "lookahead/shutoff_step": 2},
    {"step": 4, "loss": 0.0, "lookahead/backward_passes": 8.0, "lookahead/shutoff_step": 2},
    {"step": 4, "eval_reward": 0.6, "eval_runtime": 2.0},
    {"step": 4, "train_runtime": 13.0},
]


def write_run(folder, log):
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_a_run_is_read_from_its_folder(tmp_path):
    run = load_run(write_run(tmp_path, LOG), "GXPO", rollouts_per_step=16)
    assert run.points == (Point(0, 0, 0, 0.2), Point(4, 64, 8, 0.6))
    assert run.seconds == pytest.approx(10.0)
    assert run.shutoff == Point(2, 32, 6, pytest.approx(0.4))


def test_a_run_that_never_shut_off_has_no_shut_off(tmp_path):
    log = [{k: v for k, v in entry.items() if k != "lookahead/shutoff_step"} for entry in LOG]
    assert load_run(write_run(tmp_path, log), "GXPO", 16).shutoff is None


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no trainer_state.json"):
        load_run(tmp_path, "GXPO", 16)


def test_a_run_without_evaluations_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="eval_strategy"):
        load_run(write_run(tmp_path, LOG[1:5]), "GXPO", 16)


def test_the_table_says_what_was_spent(tmp_path):
    table = comparison_table([load_run(write_run(tmp_path, LOG), "GXPO", 16)])
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert cells == ["GXPO", "0.200", "0.600", "64", "8", "10"]


def test_the_figure_changes_with_the_curve(tmp_path):
    flat = Run("GRPO", (Point(0, 0, 0, 0.5), Point(1, 10, 1, 0.5)), 1.0)
    rising = Run("GRPO", (Point(0, 0, 0, 0.1), Point(1, 10, 1, 0.9)), 1.0)
    for name, run in (("flat", flat), ("rising", rising)):
        draw_comparison([run], tmp_path / "figures" / f"{name}.png")
    images = [imread(tmp_path / "figures" / f"{name}.png") for name in ("flat", "rising")]
    assert images[0].shape == images[1].shape
    assert (images[0] != images[1]).mean() > 0.001
