"""What arrives in wandb, trackio and TensorBoard, and that a run which is resumed stays one run there."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gxpo_trl.scripts.recipes import recipe_path


pytestmark = pytest.mark.slow
OPTIONS = ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--eval_on_start", "false"]
OPTIONS += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--log_completions", "true"]
OPTIONS += ["--disable_tqdm", "true", "--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The folder of a run of two steps, and in another process of two more, with all three trackers."""
    folder = tmp_path_factory.mktemp("tracked")
    recipe = recipe_path("gxpo:tiny/gxpo.yaml").read_text()
    (folder / "r.yaml").write_text(recipe.replace("report_to: none", "report_to: [wandb, trackio, tensorboard]"))
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-m", "gxpo_trl.scripts.cli", "train", "--config", str(folder / "r.yaml"), *OPTIONS]
    for steps in ("2", "4"):
        run = subprocess.run(
            [*command, "--output_dir", str(folder / "run"), "--max_steps", steps],
            env={**os.environ, **places, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr[-3000:]
    return folder


def test_wandb_gets_metrics_settings_and_completions_of_one_run(resumed):
    name = json.loads((resumed / "run" / "trackers.json").read_text())["wandb"]
    parts = sorted((resumed / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(f"-{name}") for part in parts)
    for part in parts:
        (log,) = part.glob("*.wandb")
        content = log.read_bytes()
        for expected in (b"train/lookahead/backward_passes", b"train/lookahead/cos_0_slow", b"lookahead_steps"):
            assert expected in content
        tables = [json.loads(path.read_text()) for path in part.glob("files/media/table/completions*.json")]
        assert tables and {"prompt", "completion", "arithmetic_reward"} <= set(tables[0]["columns"])


def test_trackio_gets_metrics_and_settings_of_one_run(resumed):
    (database,) = (resumed / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, metrics from metrics").fetchall()
        configs = connection.execute("select run_name, config from configs").fetchall()
    logged = [json.loads(metrics) for _, metrics in rows]
    assert {name for name, _ in rows} == {json.loads((resumed / "run" / "trackers.json").read_text())["trackio"]}
    passes = [
        entry["train/lookahead/backward_passes"] for entry in logged if "train/lookahead/backward_passes" in entry
    ]
    assert passes == [3, 6, 9, 12]
    assert json.loads(configs[-1][1])["lookahead_steps"] == 5
    assert any("completions" in entry for entry in logged)


def test_tensorboard_gets_metrics_of_one_run(resumed):
    (folder,) = (resumed / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    passes = events.Scalars("train/lookahead/backward_passes")
    assert [(event.step, event.value) for event in passes] == [(1, 3), (2, 6), (3, 9), (4, 12)]
