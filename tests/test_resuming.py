"""`gxpo train` started again: where it goes on, when it does nothing, what it refuses; and kills of real runs."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gxpo_trl.reporting.runs import load_run
from gxpo_trl.scripts import lock
from gxpo_trl.scripts.lock import hold_folder
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.resuming import find_start
from gxpo_trl.scripts.train import main


ROOT = Path(__file__).parents[1]
SHORT = ["--config", "gxpo:tiny/gxpo.yaml", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
SHORT += ["--num_generations", "4", "--max_completion_length", "12", "--learning_rate", "1e-3", "--eval_on_start"]
SHORT += ["false", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2", "--disable_tqdm", "true"]
LAST = ["--resume_from_checkpoint", "last"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def arguments(folder: Path, *options: str, steps: int = 4) -> list[str]:
    return [*SHORT, "--max_steps", str(steps), "--output_dir", str(folder), *options]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file, to the bit, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def log_of(folder: Path) -> list[dict]:
    """Without times, and without Trainer's mean over the steps since it was started."""
    words = ("time", "per_second", "memory", "train_loss")
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if not any(word in k for word in words)} for entry in entries]


def assert_same_end(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert log_of(one) == log_of(other)
    for name in ("optimizer.pt", "scheduler.pt"):
        left, right = (torch.load(run / "checkpoint-4" / name, weights_only=True) for run in (one, other))
        assert str(left) == str(right)
    states = [json.loads((run / "checkpoint-4" / "lookahead_state.json").read_text()) for run in (one, other)]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    main(arguments(folder))
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def interrupted(run) -> Path:
    """Killed while the checkpoint of step 4 was written."""
    checkpoint = run / "checkpoint-4"
    for path in (run / "model.safetensors", *(folder / "trainer_state.json" for folder in (run, checkpoint))):
        path.unlink()
    (checkpoint / "scheduler.pt").unlink()
    path = run / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:5000])
    return run


# ---- Going on


def test_a_run_goes_on_from_the_newest_whole_checkpoint_as_if_nothing_had_been(finished, interrupted, caplog):
    with open(interrupted / "log.jsonl", "a") as file:
        file.write('{"loss": 0.1, "st')  # half a line
    assert load_run(interrupted).steps == 4
    main(arguments(interrupted, *LAST))
    assert "checkpoint-4 is not whole" in caplog.text and "partial-checkpoint-4" in caplog.text
    assert_same_end(interrupted, finished)
    assert not (interrupted / "_lock").exists()


def test_what_was_not_saved_at_the_end_is_saved_without_a_step(finished, run, capsys):
    for name in ("trainer_state.json", "README.md"):
        (run / name).unlink()
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    main(arguments(run, *LAST))
    assert "Done." in capsys.readouterr().out
    assert_same_end(run, finished)
    assert (run / "README.md").is_file() and json.loads((run / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("damage", ["model.safetensors", "trainer_state.json"])
def test_a_run_is_over_when_all_of_it_is_there(run, damage):
    args = parse_recipe(arguments(run, *LAST)).training
    assert find_start(args).over is not None
    (run / damage).write_bytes((run / damage).read_bytes()[:-10])
    start = find_start(args)
    assert start.over is None and start.checkpoint == str(run / "checkpoint-4")


@pytest.mark.parametrize("options", [LAST, ["--resume_from_checkpoint", "checkpoint-4"]], ids=["last", "named"])
def test_a_finished_run_is_left_as_it_is(run, capsys, options):
    options = [str(run / word) if word.startswith("checkpoint-") else word for word in options]
    before = contents(run)
    for steps in (4, 3):
        main(arguments(run, *options, steps=steps))
        assert "has ended after 4 steps, and nothing was done" in capsys.readouterr().out
    assert contents(run) == before


def test_a_longer_run_goes_on(run):
    main(arguments(run, *LAST, steps=5))
    assert [entry["step"] for entry in log_of(run) if "loss" in entry] == [1, 2, 3, 4, 5]


def test_a_run_of_epochs_is_over_with_them(tmp_path, capsys):
    epochs = ["--max_steps", "-1", "--num_train_epochs", "0.002"]
    main(arguments(tmp_path, *epochs))
    before = contents(tmp_path)
    main(arguments(tmp_path, *epochs, *LAST))
    assert "has ended" in capsys.readouterr().out and contents(tmp_path) == before
    longer = arguments(tmp_path, "--max_steps", "-1", "--num_train_epochs", "0.004", *LAST)
    assert find_start(parse_recipe(longer).training).over is None


def test_from_the_beginning_where_there_is_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        start = find_start(parse_recipe(arguments(folder, *LAST)).training)
        assert start.checkpoint is None and start.over is None


# ---- What is refused


def refused(run: Path, *options: str, steps: int = 6) -> str:
    """The sentence; nothing in the folder is touched."""
    before = contents(run) if run.is_dir() else None
    with pytest.raises(SystemExit) as ended:
        main(arguments(run, *options, steps=steps))
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    assert (contents(run) if run.is_dir() else None) == before
    return ended.value.code


def test_no_run_begins_over_another(run, capsys):
    assert "holds checkpoint-4 of an earlier run. Resume it" in refused(run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-2")
    assert "holds the model of an earlier run" in refused(run)
    assert "holds a finished run and no checkpoint" in refused(run, *LAST)
    main(arguments(run, *LAST))
    assert "It can't be continued: it saved no checkpoint (`save_strategy: steps`)." in capsys.readouterr().out
    (run / "trainer_state.json").unlink()  # killed while the model was saved, and nothing else had been
    assert find_start(parse_recipe(arguments(run, *LAST)).training).checkpoint is None


def test_a_run_that_has_saved_nothing_is_in_nobodys_way(tmp_path):
    for name in ("run.json", "log.jsonl", "recipe.yaml", "trackers.json"):
        (tmp_path / name).write_text("{}")
    assert find_start(parse_recipe(arguments(tmp_path)).training).checkpoint is None


def test_where_no_checkpoint_is_whole_nothing_begins(interrupted):
    (interrupted / "checkpoint-2" / "rng_state.pth").unlink()
    said = refused(interrupted, *LAST)
    assert "No checkpoint in" in said and "checkpoint-2: the state of the random numbers is missing" in said
    assert "Delete them" in said


@pytest.mark.parametrize(
    "name, message",
    [
        ("true", "names no checkpoint. Set `last`"),
        ("false", "leave it out"),
        ("False", "leave it out"),
        ("{run}/checkpoint-6", "is not a folder"),
        ("{run}/model.safetensors", "is not a folder"),
        ("{run}", "such as .*checkpoint-4"),
        ("{run}/../empty", "not a whole checkpoint: trainer_state.json is missing"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_a_sentence(run, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_start(parse_recipe(arguments(run, "--resume_from_checkpoint", name.format(run=run))).training)


def test_a_name_that_is_no_checkpoint_ends_the_command(tmp_path):
    assert "is not a folder" in refused(tmp_path / "new", "--resume_from_checkpoint", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--learning_rate", "1e-4"], "`learning_rate: 0.0001`, and .* trained with 0.001"),
        (["--weight_decay", "0.1"], "`weight_decay: 0.1`"),
        (["--adam_beta2", "0.9"], "`adam_beta2: 0.9`"),
        (["--optim", "sgd"], "`optim: sgd`"),
        (["--seed", "1"], "`seed: 1`"),
        (["--gate_signal", "entropy"], "`gate_signal: entropy`"),
        (["--use_peft", "true", "--lora_target_modules", "all-linear"], "`use_peft: True`"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_setting_that_would_be_recorded_and_not_used_is_refused(run, options, message):
    assert re.search(message, refused(run, *LAST, *options))


def test_the_learning_rate_is_compared_without_a_record_too(run):
    (run / "run.json").unlink()
    assert "`learning_rate: 0.0001`" in refused(run, *LAST, "--learning_rate", "1e-4")


def test_settings_that_are_used_from_here_on_are_named(run, caplog):
    options = ["--lookahead_steps", "3", "--max_grad_norm", "0.5", "--lr_scheduler_type", "linear"]
    main(arguments(run, *LAST, *options, steps=5))
    assert "`lookahead_steps` 5 -> 3" in caplog.text and "`max_grad_norm` 1.0 -> 0.5" in caplog.text
    assert "has another length" in caplog.text
    assert "output_dir" not in caplog.text
    assert json.loads((run / "run.json").read_text())["settings"]["lookahead_steps"] == 3


def test_an_older_checkpoint_that_is_named_is_gone_on_from(finished, run, caplog):
    for name in ("model.safetensors", "trainer_state.json"):
        (run / name).unlink()
    main(arguments(run, "--resume_from_checkpoint", str(run / "checkpoint-2")))
    assert "checkpoint-4 is newer than" in caplog.text
    assert_same_end(run, finished)


# ---- One run at a time


def begin_run(folder: Path, seconds: int = 60) -> subprocess.Popen:
    """A process that holds a folder."""
    code = f"import sys, time; from gxpo_trl.scripts.lock import hold_folder\nwith hold_folder({str(folder)!r}):\n"
    code += f"    print('held', flush=True)\n    time.sleep({seconds})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_two_runs_do_not_share_a_folder_and_a_lock_dies_with_its_process(tmp_path):
    other = begin_run(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"in use by another run .process {other.pid} on .*another `output_dir`"):
            with hold_folder(tmp_path):
                pass
        assert "in use by another run" in refused(tmp_path)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / "_lock").is_file()  # left by the kill
    with hold_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / "_lock").read_text()
    assert not list(tmp_path.iterdir())


def test_who_comes_second_to_a_new_folder_removes_nothing(tmp_path, monkeypatch):
    def taken(path):
        (path.parent / "theirs").touch()  # both have found no folder, and the other one was first
        raise ValueError(f"{path.parent} is in use by another run.")

    monkeypatch.setattr(lock, "_lock", taken)
    with pytest.raises(SystemExit, match="in use by another run"):
        main(arguments(tmp_path / "new"))
    assert (tmp_path / "new" / "theirs").is_file()


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with pytest.raises(KeyError), hold_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with hold_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


@pytest.mark.parametrize("without", ["fcntl", "support"])
def test_where_nothing_can_be_locked_that_is_a_warning(tmp_path, monkeypatch, caplog, without):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    if without == "fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), hold_folder(tmp_path):
        pass
    assert "can't be locked" in caplog.text


# ---- Full disks and kills


@pytest.mark.parametrize("limit", [300_000, 500_000], ids=["safetensors", "torch.save"])
def test_a_file_that_cannot_be_written_ends_a_run_with_a_sentence(tmp_path, limit):
    """A limit on the size of files: the system refuses in the middle of one, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            SystemExit, match=f"error: a file in {tmp_path} can't be written .*free there. Free some space"
        ):
            main(arguments(tmp_path, *LAST, steps=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "No checkpoint in" in refused(tmp_path, *LAST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(kind):
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), "--random", "3", "--aimed", "4"]
    command += ["--seed", str(time.time_ns()), *(["--lora"] if kind == "lora" else [])]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_go_on_from_the_same_checkpoint_and_end_together(tmp_path):
    def launch(folder: Path, *options: str) -> str:
        command = [*LAUNCH, "-m", "gxpo_trl.scripts.train", *arguments(folder, "--ddp_backend", "gloo", *options)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout + process.stderr

    whole, run = tmp_path / "whole", tmp_path / "run"
    launch(whole, "--use_cpu", "true")
    shutil.copytree(whole, run)
    for name in ("model.safetensors", "trainer_state.json", "checkpoint-4/rng_state_1.pth"):
        (run / name).unlink()
    said = launch(run, *LAST)
    assert said.count("checkpoint-4 is not whole: rng_state_1.pth is missing") == 1
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one) and log_of(run) == log_of(whole)
    before = contents(run)
    assert launch(run, *LAST).count("has ended after 4 steps") == 1 and contents(run) == before
