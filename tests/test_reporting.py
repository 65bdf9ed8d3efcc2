"""Tables and figures from logs written by hand, with known answers; and pages of real runs."""

import base64
import contextlib
import glob
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hostile_runs
import pytest
from helpers import make_trainer, train
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOTrainer, SFPOConfig, SFPOTrainer
from gxpo_trl.callbacks.records import find_record
from gxpo_trl.reporting.arm_tables import budget_table, demo_table, difference_table, matching_table, results_table
from gxpo_trl.reporting.arms import Arm, group_arms, load_runs
from gxpo_trl.reporting.card import write_card
from gxpo_trl.reporting.figures import (
    COLORS,
    Picture,
    draw_curves,
    draw_demo,
    metric_picture,
    new_figure,
    save_figure,
    styles_of,
)
from gxpo_trl.reporting.page import write_report
from gxpo_trl.reporting.runs import HELD_OUT, Point, Run, load_run
from gxpo_trl.reporting.sections import (
    comparison_section,
    cost_section,
    diagnostics_section,
    evaluation_section,
    next_section,
    pays_section,
    sweep_section,
)
from gxpo_trl.reporting.sections.comparison import find_baseline
from gxpo_trl.reporting.sections.section import Section
from gxpo_trl.reporting.statistics import area, match_peak, mean_of, paired_difference, peak, shutoff_point, value_at
from gxpo_trl.reporting.step_costs import factor_needed, share_needed
from gxpo_trl.reporting.tables import MISSING, Table, interval, number
from gxpo_trl.run_folder import ExtrapolationReport, RunDescription
from gxpo_trl.scripts import extrapolate, report


LOG = [
    {"step": 0, "eval_reward": 0.2, "eval_runtime": 1.0},
    {"step": 1, "reward": 0.1, "lookahead/backward_passes": 3.0, "lookahead/elapsed_time": 3.0},
    {"step": 2, "reward": 0.2, "lookahead/backward_passes": 6.0, "lookahead/elapsed_time": 6.0},
    {"step": 3, "reward": 0.3, "lookahead/backward_passes": 7.0, "lookahead/elapsed_time": 7.0},
    {"step": 4, "reward": 0.4, "lookahead/backward_passes": 8.0, "lookahead/elapsed_time": 8.0},
    {"step": 4, "eval_reward": 0.6, "eval_runtime": 2.0},
    {"step": 4, "train_runtime": 13.0},
]
for entry in LOG[2:5]:
    entry["lookahead/shutoff_step"] = 2

GXPO = {"update_rule": "gxpo", "lookahead_steps": 5, "reposition_alpha": 0.5, "learning_rate": 1e-4, "seed": 0}
GRPO = {"update_rule": "grpo", "lookahead_steps": 5, "reposition_alpha": 0.5, "learning_rate": 1e-4, "seed": 0}


def write_run(folder: Path, log=LOG, settings=GXPO, state: str = "trainer_state.json") -> Path:
    (folder / state).parent.mkdir(parents=True, exist_ok=True)
    (folder / state).write_text(json.dumps({"log_history": log}))
    if settings is not None:
        about = {"settings": settings, "completions_per_step": 16, "changed": {"seed": settings["seed"]}}
        (folder / "run.json").write_text(json.dumps(about))
    return folder


def curve(values, passes: int = 1, seconds: float = 60.0) -> list[dict]:
    """A log with an evaluation every 10 steps, from the start on."""
    log = [{"step": 0, "eval_reward": values[0]}]
    for i, value in enumerate(values[1:], start=1):
        spent = {"lookahead/backward_passes": 10 * i * passes, "lookahead/elapsed_time": seconds * i}
        log += [{"step": 10 * i, "reward": 0.5, **spent}, {"step": 10 * i, "eval_reward": value}]
    return log


def arms_of(tmp_path: Path, **curves) -> list:
    """Arms with runs of seeds 0, 1, …: `grpo=[values of a seed, …]`."""
    runs = []
    for method, seeds in curves.items():
        for seed, values in enumerate(seeds):
            settings = {"update_rule": method, "seed": seed}
            passes = 1 if method == "grpo" else 3
            runs.append(write_run(tmp_path / f"{method}-{seed}", curve(values, passes), settings))
    return group_arms(load_runs([str(run) for run in runs]))


# ---- Reading


def test_a_run_is_read_from_its_folder(tmp_path):
    run = load_run(write_run(tmp_path))
    assert run.points == {HELD_OUT: (Point(0, 0.2, 0, 0, 0.0), Point(4, 0.6, 64, 8, 8 / 3600))}
    assert (run.method, run.seed, run.steps, run.shutoff_step, run.seconds) == ("GXPO", 0, 4, 2, 8.0)
    assert run.series("reward") == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]) and run.finished
    assert shutoff_point(run, HELD_OUT, "backward_passes") == (pytest.approx(4.0), pytest.approx(0.4))


def test_benchmarks_say_what_had_been_spent(tmp_path):
    spent = {"eval/rollouts": 640, "eval/backward_passes": 21, "eval/seconds": 7200.0}
    log = [{"step": 10, "eval/MATH-500/avg@4": 0.5, "eval/MATH-500/pass@4": 0.9, **spent}]
    assert load_run(write_run(tmp_path, log)).points == {"MATH-500": (Point(10, 0.5, 640, 21, 2.0),)}


def test_plain_trl_makes_a_pass_a_step_and_does_not_say_how_many_rollouts(tmp_path):
    log = [{"step": 5, "reward": 0.1, "step_time": 2.0}, {"step": 10, "reward": 0.1, "step_time": 4.0}]
    log += [{"step": 10, "eval_reward": 0.5}, {"step": 10, "train_runtime": 31.0}]
    run = load_run(write_run(tmp_path, log, settings=None))
    assert run.points[HELD_OUT] == (Point(10, 0.5, None, 10, 30.0 / 3600),)
    assert load_runs([str(tmp_path)])[0].label == "GRPO (TRL)"


def test_steps_that_are_not_logged_yet_are_plain_ones(tmp_path):
    """The last log is of step 4, after 8 passes; the evaluation of step 6."""
    run = load_run(write_run(tmp_path, [*LOG[:5], {"step": 6, "eval_reward": 0.7}]))
    assert run.points[HELD_OUT][-1].backward_passes == 10


def test_a_run_under_way_is_read_from_its_log(tmp_path):
    """The last line may be half written. What an earlier run left is not what is read."""
    write_run(tmp_path)
    os.utime(tmp_path / "trainer_state.json", (1, 1))
    lines = [json.dumps(entry) for entry in curve([0.1, 0.2])]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 11, "rew']))
    run = load_run(tmp_path)
    assert not run.finished and run.steps == 10 and [p.value for p in run.points[HELD_OUT]] == [0.1, 0.2]


def test_a_crashed_run_of_trl_is_read_from_its_last_checkpoint(tmp_path):
    write_run(tmp_path, LOG[:2], None, "checkpoint-1/trainer_state.json")
    write_run(tmp_path, LOG[:5], None, "checkpoint-4/trainer_state.json")
    run = load_run(tmp_path)
    assert run.steps == 4 and not run.finished


def test_what_is_not_finite_is_missing(tmp_path):
    log = [{"step": 1, "eval_reward": math.nan, "kl": math.inf, "reward": 0.5}, {"step": 2, "eval_reward": 0.5}]
    run = load_run(write_run(tmp_path, log))
    assert [point.step for point in run.points[HELD_OUT]] == [2]
    assert run.series("kl") == ([], []) and run.last("kl") is None


@pytest.mark.parametrize("text, message", [(None, "holds no run"), ("{", "not complete JSON")])
def test_a_folder_without_a_run_is_named(tmp_path, text, message):
    if text:
        (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        load_runs([str(tmp_path / "elsewhere*")])


def test_runs_that_differ_in_their_seed_are_an_arm_which_says_what_tells_it_apart(tmp_path):
    variants = [GXPO, {**GXPO, "lookahead_steps": 10}, GRPO, {**GRPO, "learning_rate": 3e-4}]
    for i, (settings, seed) in enumerate(itertools.product(variants, (0, 1))):
        beside = {"seed": seed, "output_dir": str(i), "logging_steps": i, "eval_steps": i, "max_steps": i}
        write_run(tmp_path / f"run-{i}", settings={**settings, **beside})
    arms = group_arms(load_runs([str(tmp_path / "run-*")]))
    assert [(arm.label, len(arm.runs)) for arm in arms] == [
        ("GXPO, K 5, lr 0.0001", 2),
        ("GXPO, K 10, lr 0.0001", 2),
        ("GRPO, lr 0.0001", 2),
        ("GRPO, lr 0.0003", 2),
    ]
    named = group_arms(load_runs([f"mine={tmp_path}/run-[01]", f"theirs={tmp_path}/run-4"]))
    assert [(arm.label, len(arm.runs)) for arm in named] == [("mine", 2), ("theirs", 1)]


# ---- Statistics


def test_a_mean_has_the_interval_of_students_t():
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.n) == (2.0, 3) and mean.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert mean.low == pytest.approx(4.0 - mean.high) and not mean.excludes_zero
    assert mean_of([0.5, 0.6]).low < 0.5 and mean_of([0.5]).low is None and mean_of([]) is None
    assert mean_of([1.0, 1.1, 1.2]).excludes_zero and not mean_of([5.0]).excludes_zero


def test_differences_are_taken_seed_by_seed(tmp_path):
    """Seeds differ by more than arms do."""
    grpo, gxpo = arms_of(tmp_path, grpo=[[0, 0.5], [0, 0.7], [0, 0.9]], gxpo=[[0, 0.6], [0, 0.8], [0, 1.0]])
    found = paired_difference(gxpo, grpo, HELD_OUT)
    assert found.value == pytest.approx(0.1) and found.n == 3 and found.excludes_zero
    (row,) = difference_table([grpo, gxpo], grpo).rows
    assert row[1:4] == ["GXPO", "+0.100 [+0.100, +0.100]", "higher"] and row[4].startswith("+0.050") and row[6] == "3"


def test_runs_of_the_same_seed_are_paired_one_by_one(tmp_path):
    for name, end in {"grpo-a": 0.5, "grpo-b": 0.7, "gxpo-a": 0.6, "gxpo-b": 0.9}.items():
        write_run(tmp_path / name, curve([0, end]), {"update_rule": name[:4], "seed": 7})
    grpo, gxpo = group_arms(load_runs([str(tmp_path / "*")]))
    assert paired_difference(gxpo, grpo, HELD_OUT).n == 2
    assert paired_difference(gxpo, grpo, HELD_OUT).value == pytest.approx(0.15)


def test_what_is_within_the_noise_is_no_winner(tmp_path):
    grpo, gxpo = arms_of(tmp_path, grpo=[[0, 0.5], [0, 0.7]], gxpo=[[0, 0.8], [0, 0.6]])
    assert difference_table([grpo, gxpo], grpo).rows[0][3] == "within noise"
    grpo, gxpo = arms_of(tmp_path / "one", grpo=[[0, 0.5]], gxpo=[[0, 0.8]])
    assert difference_table([grpo, gxpo], grpo).rows[0][-2:] == ["one seed: not known", "1"]


def test_what_is_lower_beyond_the_noise_is_said_to_be(tmp_path):
    grpo, gxpo = arms_of(tmp_path, grpo=[[0, 0.5], [0, 0.7], [0, 0.9]], gxpo=[[0, 0.4], [0, 0.6], [0, 0.8]])
    assert difference_table([grpo, gxpo], grpo).rows[0][3] == "lower"


def test_an_arm_that_only_learns_earlier_is_ahead_in_its_area(tmp_path):
    grpo, gxpo = arms_of(tmp_path, grpo=[[0, 0.2, 0.6], [0, 0.3, 0.7]], gxpo=[[0, 0.5, 0.6], [0, 0.6, 0.7]])
    row = difference_table([grpo, gxpo], grpo).rows[0]
    assert row[2:4] == ["+0.000 [+0.000, +0.000]", "within noise"] and row[4:6] == [
        "+0.150 [+0.150, +0.150]",
        "higher",
    ]


def test_the_area_weighs_intervals_by_their_length():
    points = [Point(step, value, None, step, None) for step, value in ((0, 0.0), (10, 0.4), (40, 0.8))]
    assert area(points) == pytest.approx((10 * 0.2 + 30 * 0.6) / 40) and area(points[:1]) == 0.0


def test_rollouts_that_are_used_again_are_counted_once(tmp_path):
    """Two iterations over batches of two steps each: sampled before steps 1 and 5."""
    settings = GRPO | {"num_iterations": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    log = [{"step": step, "eval_reward": 0.5} for step in (0, 1, 4, 5, 8)]
    points = load_run(write_run(tmp_path, log, settings)).points[HELD_OUT]
    assert [point.rollouts for point in points] == [0, 32, 32, 64, 64]


def test_a_peak_is_the_first_of_equal_ones():
    points = [Point(step, value, None, step, None) for step, value in ((0, 0.1), (10, 0.8), (20, 0.8), (30, 0.7))]
    assert peak(points).step == 10


def test_matching_counts_evaluations_alone(tmp_path):
    """GRPO peaks at step 30 with 0.6; GXPO is there at step 10, in a tie; at 3 passes a step."""
    grpo, gxpo, sfpo = arms_of(
        tmp_path, grpo=[[0.1, 0.3, 0.5, 0.6]], gxpo=[[0.1, 0.6, 0.7, 0.7]], sfpo=[[0.1, 0.3, 0.5, 0.59]]
    )
    found = match_peak(gxpo, grpo, HELD_OUT)
    assert found.spent == {"step": 10, "rollouts": 160, "backward_passes": 30, "hours": pytest.approx(60 / 3600)}
    assert found.speedup == {"step": 3.0, "rollouts": 3.0, "backward_passes": 1.0, "hours": pytest.approx(3.0)}
    assert (match_peak(sfpo, grpo, HELD_OUT).matched, match_peak(sfpo, grpo, HELD_OUT).spent) == (0, {})
    rows = matching_table([grpo, gxpo, sfpo], grpo, HELD_OUT, "x").rows
    assert rows[0][:4] == ["GRPO", "1 of 1", "30", "1.00"] and rows[1][:4] == ["GXPO", "1 of 1", "10", "3.00"]
    assert rows[2] == ["SFPO", "0 of 1", *["–"] * 8]


def test_values_between_evaluations_are_on_a_line_and_none_beyond(tmp_path):
    run = load_run(write_run(tmp_path, curve([0.0, 0.4, 0.8], passes=3)))
    points = run.points[HELD_OUT]
    assert value_at(points, "backward_passes", 15) == pytest.approx(0.2)
    assert value_at(points, "step", 20) == pytest.approx(0.8)
    assert value_at(points, "step", 21) is None and value_at([], "step", 0) is None


def test_equal_spending_is_what_all_have_spent(tmp_path):
    grpo, gxpo = arms_of(tmp_path, grpo=[[0.0, 0.3, 0.6]], gxpo=[[0.0, 0.6, 0.9]])
    table = budget_table([grpo, gxpo], HELD_OUT, "backward_passes", "x")
    assert list(table.columns) == ["arm", "7 backward passes", "13 backward passes", "20 backward passes"]
    assert table.rows == [["GRPO", "0.200", "0.400", "0.600"], ["GXPO", "0.133", "0.267", "0.400"]]


def test_the_results_are_those_of_the_papers_first_table(tmp_path):
    (arm,) = arms_of(tmp_path, gxpo=[[0.1, 0.9, 0.8], [0.1, 0.7, 0.6]])
    ends = ["0.700 [-0.571, 1.971]", "0.800 [-0.471, 2.071]", "0.600 [-0.353, 1.553]"]
    assert results_table([arm]).rows == [["GXPO", "2", *ends]]


def test_the_baseline_is_grpo_or_the_one_that_is_named(tmp_path):
    arms = arms_of(tmp_path, gxpo=[[0, 1]], grpo=[[0, 1]])
    assert find_baseline(arms).label == "GRPO" and find_baseline(arms, "GXPO").label == "GXPO"
    assert find_baseline(arms[:1]) is None
    with pytest.raises(ValueError, match="'GXPO', 'GRPO'"):
        find_baseline(arms, "TRL")


def test_tables_as_text():
    table = Table("name", "Title", ["a", "b"], [["1", "x, y"]])
    assert table.markdown().splitlines() == ["| a | b    |", "|---|------|", "| 1 | x, y |"]
    assert table.csv() == 'a,b\n1,"x, y"\n'
    assert number(1234.5, 1) == "1,234.5" and number(None) == "–" and interval(None) == "–"


# ---- Figures


def lines_of(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): tuple(map(list, line.get_data())) for line in axes.get_lines()}


def test_a_curve_is_the_mean_of_seeds_with_a_band_and_rings(tmp_path):
    arms = arms_of(tmp_path, gxpo=[[0.0, 0.4], [0.2, 0.8]], grpo=[[0.1, 0.3]])
    arms[0].runs[0].log.append({"step": 10, "lookahead/shutoff_step": 5})
    _, axes = new_figure()
    assert draw_curves(arms, HELD_OUT, "rollouts", axes)
    found = lines_of(axes)
    assert found["GXPO (2 seeds)"] == ([0, 160], [pytest.approx(0.1), pytest.approx(0.6)])
    assert found["GRPO"] == ([0, 160], [0.1, 0.3])
    assert {line.get_color() for line in axes.get_lines() if "GXPO" in line.get_label()} == {COLORS["GXPO"]}
    (band,) = axes.collections
    corners = {tuple(map(float, corner)) for corner in band.get_paths()[0].vertices.round(6)}
    assert corners >= {(0.0, 0.0), (0.0, 0.2), (160.0, 0.4), (160.0, 0.8)}
    rings = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [tuple(map(float, (*ring.get_xdata(), *ring.get_ydata()))) for ring in rings] == [
        (80.0, pytest.approx(0.2))
    ]


def test_many_arms_of_a_method_have_lines_of_their_own(tmp_path):
    run = load_run(write_run(tmp_path))
    styles = styles_of([Arm(str(i), (run,)) for i in range(12)])
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 12


def test_a_mean_ends_where_the_first_seed_does(tmp_path):
    """Else it would jump to those that are left."""
    _, axes = new_figure()
    draw_curves(arms_of(tmp_path, gxpo=[[0.0, 0.4, 0.9], [0.2, 0.8]]), HELD_OUT, "step", axes)
    assert lines_of(axes)["GXPO (2 seeds)"][0] == [0, 10]


def test_seeds_that_were_evaluated_at_other_steps_are_one_line_in_order(tmp_path):
    for seed in (0, 1):
        log = [{**entry, "step": entry["step"] + 5 * seed} for entry in curve([0.0, 0.4, 0.9])]
        write_run(tmp_path / str(seed), log, {"update_rule": "gxpo", "seed": seed})
    _, axes = new_figure()
    draw_curves(group_arms(load_runs([str(tmp_path / "*")])), HELD_OUT, "step", axes)
    x = lines_of(axes)["GXPO (2 seeds)"][0]
    assert x == sorted(x) and len(x) == 6


def test_what_no_run_logged_is_no_figure(tmp_path):
    arms = arms_of(tmp_path, gxpo=[[0.0, 0.4]])
    assert metric_picture(arms, {"kl": ""}, "kl", "KL", "nats") is None
    assert metric_picture(arms, {"reward": ""}, "reward", "Reward", "reward") is not None


def test_runs_of_another_model_adapter_or_data_are_another_arm(tmp_path):
    about = {"trainer": "GXPOTrainer", "model": "a", "adapter": None, "rewards": ["x"], "training_examples": 10}
    others = {
        "trainer MyTrainer": {"trainer": "MyTrainer"},
        "model b": {"model": "b"},
        "adapter LORA": {"adapter": {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "here"}},
        "rewards x + y": {"rewards": ["x", "y"]},
        "training_examples 20": {"training_examples": 20},
        "prompt {problem}!": {},
        "resume_adapter True": {},
    }
    names = []
    for i, (change, facts) in enumerate({"": {}, "again": {}, **others}.items()):
        data = {"prompt": "{problem}!" if "prompt" in change else None}
        data["resume_adapter"] = f"out/{i}" if "resume" in change else None
        folder = write_run(tmp_path / str(i), curve([0.1, 0.2]), {**GXPO, **data, "seed": i})
        (folder / "run.json").write_text(json.dumps({"settings": {**GXPO, **data, "seed": i}, **about, **facts}))
        names.append(str(folder))
    arms = group_arms(load_runs(names))
    assert [len(arm.runs) for arm in arms] == [2, 1, 1, 1, 1, 1, 1, 1]
    for arm, change in zip(arms[1:], others, strict=True):
        assert change in arm.label, arm.label


def test_settings_that_differ_after_sixty_characters_are_two_arms(tmp_path):
    path = "/mnt/shared/users/someone/projects/reinforcement/datasets/math-v{}/templates/that/are/long.jinja"
    for i in (1, 2):
        write_run(tmp_path / str(i), curve([0.1, 0.2]), {**GXPO, "chat_template_path": path.format(i), "seed": i})
    for i, rate in enumerate((1e-4, 1.0000001e-4)):
        write_run(tmp_path / f"rate-{i}", curve([0.1, 0.2]), {**GXPO, "learning_rate": rate})
    labels = [arm.label for arm in group_arms(load_runs([f"{tmp_path}/*"]))]
    assert len(set(labels)) == 4 and "lr 0.00010000001" in " ".join(labels)


def test_a_setting_that_only_a_newer_version_has_tells_no_arms_apart(tmp_path):
    write_run(tmp_path / "old", curve([0.1, 0.2]), {**GXPO, "seed": 0})
    write_run(tmp_path / "new", curve([0.1, 0.2]), {**GXPO, "seed": 1, "step_control": "none"})
    assert [arm.label for arm in group_arms(load_runs([f"{tmp_path}/*"]))] == ["GXPO"]


def test_trainers_of_trl_are_named_by_their_class(tmp_path):
    for name in ("RLOO", "SFT", "GRPO"):
        folder = write_run(tmp_path / name, curve([0.1, 0.2]), {"learning_rate": 1e-4, "seed": 0})
        about = {"trainer": f"{name}Trainer", "settings": {"learning_rate": 1e-4, "seed": 0}}
        (folder / "run.json").write_text(json.dumps(about))
    write_run(tmp_path / "ours", curve([0.1, 0.2]), GRPO)
    labels = [run.label for run in load_runs([f"{tmp_path}/*"])]
    assert labels == ["GRPO (TRL)", "RLOO (TRL)", "SFT (TRL)", "GRPO"]


def test_a_folder_that_is_named_twice_is_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(write_run(tmp_path / "a").parent)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert len(load_runs(["a", "a/", str(tmp_path / "*"), "GXPO=link"])) == 1


def test_a_folder_whose_name_is_a_pattern_is_itself(tmp_path):
    write_run(tmp_path / "run[1]", settings={**GXPO, "seed": 3})
    write_run(tmp_path / "run1", settings={**GXPO, "seed": 4})
    assert [run.seed for run in load_runs([str(tmp_path / "run[1]")])] == [3]


def test_runs_without_settings_are_pooled_only_by_a_label(tmp_path):
    for i in range(3):
        write_run(tmp_path / f"trl-{i}", curve([0.1, 0.2 + i / 10]), None)
    assert [len(arm.runs) for arm in group_arms(load_runs([f"{tmp_path}/*"]))] == [1, 1, 1]
    (pooled,) = group_arms(load_runs([f"TRL={tmp_path}/*"]))
    assert len(pooled.runs) == 3
    others = group_arms(load_runs([f"B={tmp_path}/trl-[12]", f"A={tmp_path}/trl-0"]))
    assert paired_difference(*others, HELD_OUT) is None  # which seeds belong together is not known


def test_amounts_are_matched_up_to_what_the_cheapest_run_spent(tmp_path):
    for end in (104, 157, 162, 7):  # x · 3 / 3 is larger than x for some of them
        points = [tuple(Point(10, v, 1, 1, s / 3600) for v, s in ((0.1, 0), (0.3, end)))]
        points += [tuple(Point(10, v, 1, 1, s / 3600) for v, s in ((0.1, 0), (0.5, 2 * end)))]
        arm = SimpleNamespace(label="A", curves=lambda _, points=points: points)
        table = budget_table([arm], "b", "hours", "b")
        assert table.rows[0][-1].startswith("0.300 [")


def test_matched_amounts_without_all_seeds_are_left_open(tmp_path):
    curves = [[Point(10, 0.6, 1, 30, 1.0)], [Point(0, 0.0, 1, 0, 0.0), Point(20, 0.4, 1, 60, 2.0)]]
    table = budget_table([SimpleNamespace(label="A", curves=lambda _: curves)], "b", "backward_passes", "b")
    assert table.rows[0][1:3] == [MISSING, MISSING] and table.rows[0][3].startswith("0.400 [")
    assert value_at(curves[0], "backward_passes", 30) == 0.6 and value_at(curves[0], "backward_passes", 31) is None


def test_evaluations_between_two_logs_have_spent_a_part(tmp_path):
    log = [{"step": s, "lookahead/backward_passes": 3 * s, "lookahead/elapsed_time": 10.0 * s} for s in (10, 20)]
    log += [{"step": s, "eval_reward": 0.5} for s in (0, 5, 15, 20)]
    points = load_run(write_run(tmp_path, log)).points[HELD_OUT]
    assert [p.backward_passes for p in points] == [0, 15, 45, 60]
    assert [p.hours for p in points] == pytest.approx([0, 50 / 3600, 150 / 3600, 200 / 3600])


def test_seconds_of_a_resumed_run_of_trl(tmp_path):
    """`train_runtime` is that of the last session, and evaluations are in the log of all."""
    log = [{"step": s, "step_time": 2.0, "reward": 0.1} for s in range(10, 110, 10)]
    log += [{"step": s, "eval_reward": 0.1, "eval_runtime": 30.0} for s in range(10, 110, 10)]
    ended = {"step": 100, "train_runtime": 55.0}
    assert load_run(write_run(tmp_path / "grpo", [*log, ended], None)).seconds == 200
    sft = [{name: v for name, v in entry.items() if name != "step_time"} for entry in log]
    assert load_run(write_run(tmp_path / "sft", [*sft, ended], None)).seconds is None
    assert load_run(write_run(tmp_path / "one", [*sft[-1:], ended], None)).seconds == 25


def test_a_run_that_ended_and_was_continued_is_shown_to_its_last_step(tmp_path):
    write_run(tmp_path, curve([0.1, 0.2]), None)
    os.utime(tmp_path / "trainer_state.json", (1000, 1000))
    write_run(tmp_path, curve([0.1, 0.2, 0.3]), None, "checkpoint-20/trainer_state.json")
    run = load_run(tmp_path)
    assert run.steps == 20 and not run.finished
    os.utime(tmp_path / "checkpoint-20" / "trainer_state.json", (900, 900))  # of a run before this one
    assert load_run(tmp_path).steps == 10


@pytest.mark.parametrize("last", ['{"step": 2, "reward": {"a": 1}', '{"step": 2', '{"step": 2, "eval": {}'])
def test_a_last_line_that_is_cut_is_left_out(tmp_path, last):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n' + last)
    assert load_run(tmp_path).steps == 1
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.5}')
    assert load_run(tmp_path).steps == 2


def test_steps_per_point_are_those_between_the_evaluations(tmp_path, runs):
    run = load_run(runs / "next")
    log = [{"step": 80, "eval_reward": 0.3}, {"step": 90, "reward": 0.1}, {"step": 100, "eval_reward": 0.4}]
    cost = next_section([replace(run, log=log)]).tables[-1]
    assert cost.rows[0][2:] == ["0.300", "0.400", "20", "2.00"]


def test_predictions_of_other_settings_are_shown_apart(tmp_path, runs):
    first = sorted((runs / "next").glob("extrapolated/next/*/extrapolation.json"))[0]
    report = json.loads(first.read_text())
    run = write_run(tmp_path / "loop" / "before", curve([0.1, 0.2]))
    after = write_run(tmp_path / "loop" / "after", curve([0.1, 0.2]))
    for name, epochs, error in (("a", 100, 0.5), ("b", 3, 1.2)):
        report |= {"run": "/elsewhere/loop/before", "alpha": 1.0}
        report["predictor"]["epochs"] = epochs
        report["held_out"]["errors"]["next"]["error"] = error
        path = tmp_path / "loop" / "extrapolated" / name / "alpha-1" / "extrapolation.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(report))
    *tables, _ = next_section(load_runs([str(run), str(after)])).tables
    assert [(table.rows[-1][1], table.note.split("α = ")[1]) for table in tables] == [
        ("0.500", "1, epochs 100."),
        ("1.200", "1, epochs 3."),
    ]


def test_an_evaluation_of_a_run_that_was_moved_is_not_dropped_silently(tmp_path):
    run = write_run(tmp_path / "run")
    metrics = {"avg@4": {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 8}}
    results = {"model": "/cluster/run", "benchmarks": {"M": {"problems": 8, "metrics": metrics, "verify_failures": 1}}}
    path = run / "eval" / "0" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    section = evaluation_section(load_runs([str(run)]), tmp_path / "eval")
    assert not section.tables and section.notes == [
        f"{path} is of /cluster/run, which is not in this run's folder: it is left out."
    ]


def test_a_sweep_has_a_map_for_each_value_of_the_other_settings(tmp_path):
    for i, (k, rate, n) in enumerate(itertools.product((3, 5), (1e-4, 1e-5), (4, 8))):
        settings = {**GXPO, "lookahead_steps": k, "learning_rate": rate, "num_generations": n}
        write_run(tmp_path / str(i), curve([0.0, 0.2 if n == 4 else 0.8]), settings)
    section = sweep_section(load_runs([f"{tmp_path}/*"]))
    maps = [picture for picture in section.pictures if "n seeds" in picture.caption]
    assert [picture.caption.split(" at ")[1] for picture in maps] == [
        "num_generations 4; means over n seeds.",
        "num_generations 8; means over n seeds.",
    ]
    for picture, value in zip(maps, ("0.200", "0.800"), strict=True):
        assert {text.get_text() for text in picture.figure.axes[0].texts} >= {f"{value}\nn = 1"}
    (table,) = section.tables
    assert len({tuple(row[:3]) for row in table.rows}) == 8 and table.columns[:3] == ["K", "lr", "num_generations"]


def test_file_names_fit_however_many_bytes_a_letter_has(tmp_path):
    picture = metric_picture(arms_of(tmp_path, gxpo=[[0.0, 0.4]]), {"reward": ""}, "数" * 100, "Reward", "reward")
    write_report([], [Section("A", [], [], [picture])], tmp_path / "page")
    assert len(list((tmp_path / "page").glob("数*.png"))) == 1


def test_a_sweep_is_a_map_over_the_settings_that_vary(tmp_path):
    for i, (k, alpha) in enumerate(itertools.product((10, 3), (1.0, 0.1))):
        settings = {**GXPO, "lookahead_steps": k, "reposition_alpha": alpha}
        write_run(tmp_path / str(i), curve([0.1, 0.1 * k * alpha]), settings)
    section = sweep_section(load_runs([f"{tmp_path}/*"]))
    (table,) = section.tables
    assert [row[:2] for row in table.rows] == [["3", "0.1"], ["3", "1"], ["10", "0.1"], ["10", "1"]]
    heat = next(picture for picture in section.pictures if "lookahead_steps" in picture.name)
    assert {text.get_text() for text in heat.figure.axes[0].texts} >= {"0.300\nn = 1", "1.000\nn = 1"}
    assert sweep_section(load_runs([f"{tmp_path}/0"])).is_empty  # K = 10 alone


def test_the_demo_has_a_table_and_two_panels(tmp_path):
    run = Run(write_run(tmp_path), "GXPO", LOG, True, {"settings": GXPO, "completions_per_step": 16})
    assert demo_table([run]).rows == [["GXPO", "0.200", "0.600", "64", "8", "8"]]
    draw_demo([run], tmp_path / "figures" / "demo.png")
    assert (tmp_path / "figures" / "demo.png").stat().st_size > 10_000


def test_the_cost_is_split_into_what_was_logged(tmp_path):
    times = {"generation_time": 1.0, "reward_time": 0.25, "update_time": 0.5}
    entry = {f"lookahead/{name}": value for name, value in times.items()}
    log = [{"step": 1, **entry, "lookahead/elapsed_time": 2.0, "num_tokens": 2e6, "lookahead/token_fraction": 0.5}]
    (table,) = cost_section([load_run(write_run(tmp_path, log))]).tables
    assert table.rows[0][1:] == ["2.000", "1.000", "0.250", "0.500", "0.250", "2.00", "0.50", "–", "–", "–"]


# ---- When several passes pay


def timed(updates, outside: float = 3.0, passes: int = 1, active: bool = False, saved: float = 0.4) -> list[dict]:
    """The log of a run with known seconds: each step has its update, and 3 seconds outside of it.

    The first step takes ten times as long, and the fourth has a save of a minute.
    """
    log, elapsed, spent = [], 0.0, 0
    for step, update in enumerate(updates, start=1):
        is_active = active and update > 1.0
        spent += passes if is_active else 1
        scale = 10 if step == 1 else 1
        elapsed += scale * (update + outside) + (60 if step == 4 else 0)
        entry = {"step": step, "lookahead/update_time": scale * update, "lookahead/active": float(is_active)}
        entry |= {"lookahead/elapsed_time": elapsed, "lookahead/backward_passes": spent}
        log.append(entry)
    return [{"step": 0, "eval_reward": 0.2}, *log, {"step": len(updates), "eval_reward": saved}]


def pays_row(tmp_path, *names: str) -> list[str]:
    (table,) = pays_section(load_runs([str(tmp_path / name) for name in names])).tables
    return table.rows[0]


def test_what_an_update_costs_is_measured_against_grpo(tmp_path):
    """A plain step has 3 s and an update of 1 s: s = 0.75. Active updates take 2.4 s, in 6 of 8 steps."""
    write_run(tmp_path / "grpo", timed([1.0] * 8), GRPO)
    write_run(tmp_path / "gxpo", timed([2.4] * 6 + [0.5] * 2, passes=3, active=True), GXPO)
    row = pays_row(tmp_path, "grpo", "gxpo")
    assert row[1:5] == ["0.75", "2.40", "GRPO", "75%"]
    assert row[5:7] == [f"{0.75 + 2.4 * 0.25:.2f}", f"{0.75 + (1 + 0.75 * 1.4) * 0.25:.2f}"]
    assert row[7:] == [f"1.00 on {HELD_OUT} (1 of 1 seeds)", "no share"]


def test_the_share_that_a_measured_factor_needs(tmp_path):
    """Half of the rollouts, c = 2.4: it pays where s > (2.4 - 2) / 1.4."""
    write_run(tmp_path / "grpo", timed([1.0] * 8), GRPO)
    write_run(tmp_path / "gxpo", timed([2.4] * 4, passes=3, active=True), GXPO)
    row = pays_row(tmp_path, "grpo", "gxpo")
    assert row[7:] == [f"2.00 on {HELD_OUT} (1 of 1 seeds)", f"{0.4 / 1.4:.2f}"]
    write_run(tmp_path / "cheap", timed([1.0] * 3 + [1.01], passes=3, active=True), GXPO)
    assert pays_row(tmp_path, "grpo", "cheap")[8] == "0.00", "c of about 1: any share"


def test_without_grpo_of_its_size_a_run_is_measured_against_its_own_plain_steps(tmp_path):
    log = timed([2.4] * 6 + [0.5] * 3, passes=3, active=True)
    for entry in log[7:]:
        entry["lookahead/shutoff_step"] = 6
    write_run(tmp_path / "gxpo", log, GXPO)
    write_run(tmp_path / "grpo", timed([1.0] * 8), {**GRPO, "per_device_train_batch_size": 1})
    for names in (["gxpo"], ["grpo", "gxpo"]):
        row = pays_row(tmp_path, *names)
        assert row[1:4] == [f"{3 / 3.5:.2f}", "4.80", "its own steps after shut-off"]


def test_without_plain_steps_an_update_is_estimated_by_its_passes(tmp_path):
    """Three passes in 2.4 s: one would take 0.8 s of a step of 3.8 s."""
    write_run(tmp_path / "gxpo", timed([2.4] * 6, passes=3, active=True), GXPO)
    assert pays_row(tmp_path, "gxpo")[1:5] == [f"{3 / 3.8:.2f}", "3.00", "passes (an estimate)", "100%"]
    write_run(tmp_path / "check", timed([1.2] * 8), {**GXPO, "update_rule": "check"})
    assert pays_row(tmp_path, "check")[1:5] == [f"{3 / 4.2:.2f}", "1.00", "passes (an estimate)", "100%"]
    checked_at_times = timed([1.8, 1.0, 1.0, 1.0] * 2)
    for entry in checked_at_times[1:]:
        entry["lookahead/backward_passes"] = entry["step"] + (entry["step"] + 3) // 4
    write_run(tmp_path / "check4", checked_at_times, {**GXPO, "update_rule": "check", "num_iterations": 4})
    assert pays_row(tmp_path, "check4")[2] == "1.25"


def test_a_run_of_grpo_says_what_two_and_three_passes_would_need(tmp_path):
    write_run(tmp_path / "grpo", timed([1.0] * 8), GRPO)
    (table,) = pays_section(load_runs([str(tmp_path / "grpo")])).tables
    assert [row[5] for row in table.rows] == [f"{0.75 + 2 * 0.25:.2f}", f"{0.75 + 3 * 0.25:.2f}"]


def test_steps_that_share_their_rollouts_are_one(tmp_path):
    """Two steps a generation: 5 s of sampling before every other step."""
    settings = {**GRPO, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    log = timed([1.0] * 12, outside=0.0)
    for i, entry in enumerate(log[1:-1]):
        entry["lookahead/elapsed_time"] += 5.0 * (i // 2 + 1)
    write_run(tmp_path / "grpo", log, settings)
    (table,) = pays_section(load_runs([str(tmp_path / "grpo")])).tables
    assert table.rows[0][1] == f"{1 - 2 / 7:.2f}"


def test_times_that_were_not_logged_are_missed(tmp_path):
    """Without a `RunRecordCallback` there is c, and no s; plain TRL logs neither."""
    for name, log, settings in (
        ("grpo", timed([1.0] * 8), GRPO),
        ("gxpo", timed([2.4] * 8, passes=3, active=True), GXPO),
    ):
        bare = [{k: v for k, v in entry.items() if k != "lookahead/elapsed_time"} for entry in log]
        write_run(tmp_path / name, bare, settings)
    section = pays_section(load_runs([str(tmp_path / "grpo"), str(tmp_path / "gxpo")]))
    assert section.tables[0].rows[0][1:3] == ["–", "2.40"] and "RunRecordCallback" in section.notes[0]
    write_run(tmp_path / "silent", [{"step": 1, "reward": 0.1}], GXPO)
    section = pays_section(load_runs([str(tmp_path / "silent")]))
    assert not section.tables and "s and c are not known" in section.notes[0]
    write_run(tmp_path / "trl", [{"step": 5, "step_time": 2.0}], settings=None)
    assert pays_section(load_runs([str(tmp_path / "trl")])).is_empty


@pytest.mark.parametrize("c, f, share", [(2.1, 1.4, 0.7 / 1.1), (2.1, 2.2, 0.0), (2.1, 1.0, None), (0.8, 1.1, 0.0)])
def test_the_share_above_which_it_pays(c, f, share):
    assert share_needed(c, f) == (None if share is None else pytest.approx(share))
    if share:
        assert factor_needed(share, c) == pytest.approx(f), "there the time is GRPO's"


# ---- Recording


def test_the_clock_counts_training_alone(tmp_path, monkeypatch):
    """Not evaluations, nor what goes on between two runs of a trainer."""

    class SlowlyEvaluated(GXPOTrainer):
        def prediction_step(self, *args, **kwargs):
            time.sleep(0.5)
            return super().prediction_step(*args, **kwargs)

    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 16}
    trainer = make_trainer(tmp_path, SlowlyEvaluated, records=True, **settings, num_generations_eval=4)
    started = time.perf_counter()
    trainer.train()
    passed, counted = time.perf_counter() - started, find_record(trainer).seconds
    evaluations = sum(entry.get("eval_runtime", 0.0) for entry in trainer.state.log_history)
    assert evaluations > 1.0 and 0 < counted < passed - evaluations
    assert find_record(trainer).seconds == counted
    logged_times = [entry for entry in trainer.state.log_history if "lookahead/elapsed_time" in entry]
    for entry in logged_times:
        assert 0 <= entry["lookahead/reward_time"] < entry["lookahead/generation_time"] < counted
        assert 0 < entry["lookahead/elapsed_time"] <= counted


def test_what_a_run_is_and_its_log_are_written_as_it_goes(tmp_path):
    seen = []

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(load_run(tmp_path).steps)

    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-4, "seed": 7, "records": True}
    trainer = train(tmp_path, callbacks=[Looking()], max_steps=4, **settings)
    assert seen == [0, 1, 2, 3]  # a step is logged after it has ended
    run = load_run(tmp_path)
    assert run.finished and run.log == trainer.state.log_history
    assert (run.seed, run.method, run.about["trainer"], run.about["completions_per_step"]) == (
        7,
        "GXPO",
        "LookaheadTrainer",
        16,
    )
    assert run.about.keys() == RunDescription.__annotations__.keys()
    assert run.about["changed"]["learning_rate"] == 3e-4 and "beta" not in run.about["changed"]
    resumed = train(tmp_path, max_steps=4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **settings)
    assert load_run(tmp_path).log == resumed.state.log_history


# ---- Pages


def test_one_learning_rate_for_all_is_remarked_on(tmp_path):
    for name, settings in (("a", GXPO), ("b", GRPO), ("c", {**GRPO, "learning_rate": 3e-4})):
        write_run(tmp_path / name, settings=settings)
    notes = [
        comparison_section(load_runs([f"{tmp_path}/{pattern}"]), None).notes for pattern in ("[ab]", "[abc]", "[bc]")
    ]
    assert ["one learning rate" in " ".join(of_it) for of_it in notes] == [True, False, False]


def test_the_medians_are_of_the_active_phase(tmp_path):
    active = [{"step": i, "lookahead/scale_mean": float(i), "lookahead/clip_ratio_slow": 0.01 * i} for i in (1, 2, 6)]
    section = diagnostics_section([load_run(write_run(tmp_path, [*active, {"step": 7, "reward": 1.0}]), "GXPO")])
    tables = {table.name: table for table in section.tables}
    assert tables["active-phase"].rows == [["GXPO", "–", "–", "–", "–", "2.0000", "–", "–"]]
    assert tables["clipping"].rows == [["GXPO", "–", "–", "0.03000", "0.06000", *["–"] * 4]]
    assert "displacement" not in tables


def test_phantom_steps_have_columns_of_their_own(tmp_path):
    log = [{"step": 1, "lookahead/retention": 0.25, "lookahead/true_error": 0.1, "lookahead/true_error_scaled": 0.3}]
    section = diagnostics_section([load_run(write_run(tmp_path, log), "GXPO")])
    tables = {table.name: table for table in section.tables}
    row = dict(zip(tables["active-phase"].columns, tables["active-phase"].rows[0], strict=True))
    assert row["retention of the model"] == "0.2500"
    row = dict(zip(tables["displacement"].columns, tables["displacement"].rows[0], strict=True))
    assert (row["relative"], row["relative, the paper's scale for phantom steps"]) == ("0.1000", "0.3000")


def test_the_multiplier_is_drawn_for_the_arms_that_have_one(tmp_path):
    steps = [
        {"step": i, "lookahead/step_multiplier": 2.0 ** (i - 4), "lookahead/cos_0_slow": 1 - 0.1 * i} for i in range(9)
    ]
    for seed in (0, 1):
        write_run(tmp_path / f"controlled-{seed}", steps[seed:], {**GXPO, "step_control": "cosine", "seed": seed})
    write_run(tmp_path / "plain", [{"step": 1, "lookahead/cos_0_slow": 0.5}], {**GXPO, "step_control": "none"})
    controlled, plain = (load_runs([f"{tmp_path}/{name}"]) for name in ("*", "plain"))
    assert "step-control" not in {picture.name for picture in diagnostics_section(plain).pictures}
    (picture,) = (p for p in diagnostics_section(controlled).pictures if p.name == "step-control")
    above, below = picture.figure.axes
    assert [len(axes.lines) for axes in (above, below)] == [1, 1]  # one arm of two seeds
    assert above.lines[0].get_ydata().tolist() == [2.0 ** (i - 4) for i in range(9)] and above.get_yscale() == "log"
    assert b"<svg" in picture.svg


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A small run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"scripted": False, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "log_completions": True}
    common |= {"learning_rate": 1e-3, "per_device_eval_batch_size": 16, "num_generations_eval": 4, "records": True}
    for seed in (0, 1):
        trainer = train(folder / f"gxpo-{seed}", GXPOTrainer, seed=seed, **common)
        trainer.save_state()
    train(folder / "sfpo", SFPOTrainer, SFPOConfig, **common).save_state()
    train(folder / "trl", GRPOTrainer, GRPOConfig, **{**common, "records": False}).save_state()
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    train(folder / "next", peft_config=adapter, trajectory_steps=1, **{**common, "max_steps": 6}).save_state()
    extrapolate.main([str(folder / "next"), "--steps-ahead", "1", "--epochs", "50", "--alpha", "0.5,1"])
    return folder


def test_a_report_of_every_kind_of_run(tmp_path, runs, capsys):
    names = [str(runs / name) for name in ("gxpo-*", "sfpo", "next")]
    report.main([*names, f"GRPO={runs / 'trl'}", "--out", str(tmp_path), "--baseline", "GRPO"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for words in ("Comparison", "Diagnostics", "NExt", "Cost", "To match GRPO", "holds no run.json", "A single seed"):
        assert words in page, words
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "<script" not in page
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) > 10 and all(b"<svg" in base64.b64decode(image) for image in images)
    for suffixes in ({".png", ".svg"}, {".csv", ".md"}):
        stems = [{path.stem for path in tmp_path.glob(f"*{suffix}")} for suffix in suffixes]
        assert stems[0] == stems[1] and len(stems[0]) > 4


def test_evaluations_of_a_runs_models_are_found(tmp_path):
    run = write_run(tmp_path / "run")
    metrics = {"avg@4": {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 8}}
    results = {"MATH-500": {"problems": 8, "metrics": metrics, "verify_failures": 1}}
    for i, model in enumerate((run, run / "checkpoint-4", tmp_path / "other")):
        path = tmp_path / "eval" / str(i) / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"model": str(model), "benchmarks": results}))
    (table,) = evaluation_section(load_runs([str(run)]), tmp_path / "eval").tables
    score = "avg@4 0.500 [0.400, 0.600]"
    assert table.rows == [
        ["GXPO", "0", "the end", "MATH-500", "8", score, "1"],
        ["GXPO", "0", "checkpoint-4", "MATH-500", "8", score, "1"],
    ]


def test_an_extrapolation_says_what_reports_read(runs):
    (first, *_) = (runs / "next").glob("extrapolated/next/*/extrapolation.json")
    assert json.loads(first.read_text()).keys() == ExtrapolationReport.__annotations__.keys()


def test_an_extrapolation_is_reported_once_for_all_alphas(runs):
    section = next_section(load_runs([str(runs / "next"), str(runs / "sfpo")]))
    predictions, cost = section.tables
    assert [row[0] for row in predictions.rows][-1] == "next" and predictions.note.endswith("α = 0.5, 1.")
    assert len(cost.rows) == 2 and len(section.pictures) == 1


def test_the_page_of_one_run_has_its_settings_and_completions(tmp_path, runs):
    report.main([str(runs / "gxpo-0"), "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    for words in ("learning_rate", "0.001", "GXPOTrainer", "torch 2.", "Early: step", "Late: step", "advantage"):
        assert words in page, words
    report.main([str(runs / "trl"), "--out", str(tmp_path / "trl")])
    assert "holds no run.json" in (tmp_path / "trl" / "report.html").read_text()


def test_a_run_that_broke_off_says_so(tmp_path):
    write_run(tmp_path, LOG[:4], GXPO, "checkpoint-3/trainer_state.json")
    (note,) = comparison_section([load_run(tmp_path, "GXPO")], None).notes[:1]
    assert note == f"{tmp_path} has not ended: it is shown up to step 3."


def test_a_run_that_was_never_evaluated_says_so(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "reward": 0.5}])
    report.main([str(run), "--out", str(tmp_path / "out")])
    assert "was never evaluated" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_written_in_completions_is_no_markup(tmp_path, runs):
    for path in runs.glob("gxpo-1/**/*"):
        target = tmp_path / path.relative_to(runs)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copy(path, target)
    about = json.loads((tmp_path / "gxpo-1" / "run.json").read_text()) | {"model": "<script>alert(1)</script>"}
    (tmp_path / "gxpo-1" / "run.json").write_text(json.dumps(about))
    report.main([str(tmp_path / "gxpo-1"), "--out", str(tmp_path)])
    assert "<script>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [(["nowhere"], "There is no folder nowhere"), (["RUN", "--baseline", "x"], "No arm is called 'x'")],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, arguments, message):
    run = str(write_run(tmp_path / "run"))
    with pytest.raises(SystemExit, match=message):
        report.main([run if word == "RUN" else word for word in arguments] + ["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_opens_the_page_without_errors(tmp_path, runs, width):
    """Its policy forbids all requests, and each that were tried would be an error."""
    report.main([str(runs / "gxpo-*"), str(runs / "sfpo"), "--out", str(tmp_path)])
    assert "default-src 'none'; img-src data:;" in (tmp_path / "report.html").read_text()
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'new'}"]
    what = [f"--window-size={width},2000", f"--screenshot={tmp_path / 'shot.png'}", "--enable-logging=stderr"]
    for page, errors in ((tmp_path / "report.html", False), (tmp_path / "other.html", True)):
        process = subprocess.run([CHROMIUM, *quiet, *what, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert (tmp_path / "shot.png").stat().st_size > 20_000, process.stderr[-2000:]
        assert ("CONSOLE" in process.stderr) == errors
        with_request = page.read_text().replace("<h1>", '<img src="https://example.org/x.png"><h1>', 1)
        (tmp_path / "other.html").write_text(with_request)


def test_one_recipe_on_other_numbers_of_gpus_is_one_arm(tmp_path):
    for i, (prompts, steps) in enumerate(((16, 2), (16, 4), (None, 2), (None, 4))):
        settings = {**GXPO, "prompts_per_step": prompts, "gradient_accumulation_steps": steps}
        write_run(tmp_path / str(i), curve([0.1, 0.2]), settings)
    labels = [run.label for run in load_runs([f"{tmp_path}/{i}" for i in range(4)])]
    assert labels[0] == labels[1] and len(set(labels)) == 3


# ---- Folders that are broken, and names that mean something elsewhere


def report_or_sentence(names: list[str], out: Path) -> str | None:
    """The sentence that a report is refused with, or `None` if there is one."""
    try:
        report.main([*names, "--out", str(out)])
    except SystemExit as error:
        assert not (out / "report.html").exists()
        return str(error.code)
    assert (out / "report.html").is_file()
    return None


def check_hostile_folder(what: str, folder: Path, good: Path) -> None:
    """A report of it, a comparison, and a card: each is there, or refused in a sentence that names the folder."""
    name = glob.escape(str(folder))
    for names in ([name], [name, str(good)]):
        if sentence := report_or_sentence(names, folder.parent / f"out-{len(names)}"):
            assert str(folder) in sentence and "\n" not in sentence.replace(str(folder), ""), (what, sentence)
    with contextlib.suppress(ValueError):
        write_card(folder)


@pytest.fixture
def quick_figures(monkeypatch):
    """Laid out, and not drawn: that is what takes the time."""

    def lay_out(picture: Picture, *args) -> str:
        picture.figure.set_layout_engine("none")
        picture.figure.draw_without_rendering()
        return ""

    for name in ("save", "data_uri"):
        monkeypatch.setattr(Picture, name, lay_out)


def test_hostile_folders_are_reported_or_refused(tmp_path, quick_figures):
    good = hostile_runs.write_run(tmp_path / "good")
    for what, folder in itertools.islice(hostile_runs.hostile_folders(tmp_path, seed=1), 7, None, 211):
        check_hostile_folder(what, folder, good)


@pytest.mark.slow
def test_more_hostile_folders_are_reported_or_refused(tmp_path, quick_figures):
    """All of them would take a quarter of an hour."""
    good = hostile_runs.write_run(tmp_path / "good")
    for what, folder in itertools.islice(hostile_runs.hostile_folders(tmp_path), 0, None, 32):
        check_hostile_folder(what, folder, good)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"run.json": '{"settings": []}'}, "run.json: `settings` is []: an object is expected."),
        (
            {"run.json": '{"settings": {"seed": "3"}}'},
            'run.json: `settings`: `seed` is "3": a whole number is expected.',
        ),
        ({"run.json": '{"settings": {"seed": true}}'}, "`seed` is true: a whole number is expected."),
        ({"run.json": '{"settings": {"learning_rate": "a"}}'}, '`learning_rate` is "a": a number is expected.'),
        ({"run.json": '{"settings": {"num_iterations": 0}}'}, "`num_iterations` is 0: at least 1 is expected."),
        ({"run.json": '{"versions": {"torch": 2}}'}, "run.json: `versions`: `torch` is 2: a text is expected."),
        ({"run.json": "[" * 100_000}, "run.json is not complete JSON"),
        ({"log.jsonl": '{"step": -1}\n'}, "log.jsonl, line 1: `step` is -1: a whole number from 0 on is expected."),
        ({"log.jsonl": '{"step": 1}\n{"step": 1.5}\n'}, "log.jsonl, line 2: `step` is 1.5"),
        ({"log.jsonl": '{"step": 1}\n{"st\n{"step": 2}\n'}, "log.jsonl, line 2 is not complete JSON"),
        ({"log.jsonl": "[]\n[]\n"}, "log.jsonl, line 1 is not an object."),
        ({"trainer_state.json": "{}", "log.jsonl": None}, "trainer_state.json has no `log_history`."),
        ({"trainer_state.json": '{"log_history": [3]}', "log.jsonl": None}, "`log_history`, entry 1 is 3: an object"),
    ],
)
def test_what_is_wrong_in_a_folder_is_said(tmp_path, change, message):
    folder = hostile_runs.write_run(tmp_path / "run")
    for name, text in change.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_run(folder)
    assert str(folder) in str(caught.value)


def test_a_broken_result_costs_its_place_on_the_page(tmp_path):
    folder = hostile_runs.write_run(tmp_path / "run")
    broken = [folder / name for name in hostile_runs.FILES if name.startswith(("eval", "extrapolated", "completions"))]
    for path in broken:
        path.unlink()
        os.mkfifo(path)
    assert report_or_sentence([str(folder)], tmp_path / "out") is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(broken) == 3 and all(f"{path} can&#39;t be read: it is not a regular file." in page for path in broken)


STRANGE = r"a $x^2$ $\frac{ | `b` <i>c</i> _d_ \n \\ % {e}"


def test_labels_are_shown_as_they_are(tmp_path):
    """In figures `$` would begin mathematics, in Markdown `|` end a cell, on the page `<` begin an element."""
    log = curve([0.1, 0.2]) + [{"step": 10, f"eval/{STRANGE.replace('/', '')}/avg@4": 0.5}]
    run = write_run(tmp_path / "run", log, {**GXPO, "reposition_alpha": 0.1})
    other = write_run(tmp_path / "a=b", log, GRPO)
    report.main([f"{STRANGE}={run}", str(other), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert STRANGE not in page and "a $x^2$ $\\frac{ | `b` &lt;i&gt;c&lt;/i&gt; _d_" in page
    for path in (tmp_path / "out").glob("*.md"):
        table = [line for line in path.read_text().splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, path
        assert "<i>" not in re.sub(r"\\<", "", "\n".join(table))
    write_card(run)
    assert "\\<i>" in (run / "README.md").read_text()
    figure, axes = new_figure()
    axes.plot([0, 1], label=STRANGE)
    save_figure(figure, tmp_path / "x.svg")
    assert axes.get_legend_handles_labels()[1] == [STRANGE]


def test_names_of_figures_are_names_of_files(tmp_path):
    names = ["../../x", "a b", "a-b", "", "\0", "x" * 400, "π"]
    tables = [Table(name, name, ("a",), [["b"]]) for name in names]
    run = load_run(write_run(tmp_path / "run"), "GXPO")
    write_report([run], [Section("Tables", tables=tables)], tmp_path / "out" / "here")
    found = {path.stem for path in (tmp_path / "out" / "here").glob("*.md")}
    assert len(found) == len(names) and {"a-b", "a-b-2", "x", "π"} <= found
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["here"]
