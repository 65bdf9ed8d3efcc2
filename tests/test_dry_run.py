"""A dry run opens what the recipe names: data, model and rewards, and shows what they are."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import tiny_model
from test_own_task import REWARDS, ROWS, as_messages, write
from transformers import AutoTokenizer

from gxpo_trl.scripts import train
from gxpo_trl.tasks import TINY_MODEL_PATH


SETTINGS = {"model_name_or_path": "gxpo_trl/tiny", "dataset_name": "messages.jsonl", "max_steps": 20}
SETTINGS |= {"reward_funcs": ["dry_rewards.right_sum", "dry_rewards.short"], "reward_weights": [0.75, 0.25]}
SETTINGS |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 28, "use_cpu": True}
SETTINGS |= {"bf16": False, "report_to": "none", "output_dir": "run", "disable_tqdm": True}


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Rehearses a recipe in a user's folder, and looks whether all is as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    in_words = "\n\ndef in_words(completions, **kwargs):\n    return ['1.0'] * len(completions)\n"
    (tmp_path / "dry_rewards.py").write_text(REWARDS + in_words)
    rows = [row | {"answer": sum(row["numbers"])} for row in ROWS]
    write(tmp_path / "messages.jsonl", as_messages(rows))
    write(tmp_path / "texts.jsonl", rows)

    def run(**changes) -> str:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
        before = sorted(tmp_path.rglob("*"))
        try:
            train.main(["--config", "r.yaml", "--dry-run"])
        finally:
            assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().out

    return run


def test_it_shows_prompts_rewards_and_benchmarks(dry_run):
    printed = dry_run(eval_benchmarks=["texts.jsonl", "arithmetic"], eval_steps=5)
    assert "8 examples with the columns prompt, numbers, about, weight, answer, solution" in printed
    asked = [row["prompt"] for row in ROWS]
    for text in asked[:2]:
        assert f"  | {text}\n" in printed  # the chat template's Q and A
    assert f"| {asked[2]}" not in printed
    lines = {line.split("for ")[1].split(",")[0]: line for line in printed.splitlines() if "  for " in line}
    assert "1 = 0.75 × 1 + 0.25 × 1" in lines["the right answer"] and "'5'" in lines["the right answer"]
    assert "0.4375 = 0.75 × 0.25 + 0.25 × 1" in lines["another's answer"] and "'9'" in lines["another's answer"]
    assert "0.4375" in lines["nothing"] and "no more than a wrong one" not in printed
    assert "texts.jsonl: 8 problems, scored by right_sum + short" in printed
    assert "arithmetic: 200 problems, scored by right answers" in printed
    assert "Rehearsed" in printed and "3 steps" in printed


@pytest.mark.parametrize("data", ["texts.jsonl", "folder", "gxpo_trl/arithmetic"])
def test_data_of_any_form_is_rehearsed(dry_run, tmp_path, data):
    changes = {"dataset_name": data}
    if data == "folder":
        write(tmp_path / "folder" / "train.jsonl", ROWS)
        write(tmp_path / "folder" / "test.jsonl", ROWS)
        changes["eval_strategy"] = "steps"
    if data.startswith("gxpo"):
        changes |= {"reward_funcs": ["arithmetic_reward"], "reward_weights": None}
    printed = dry_run(**changes)
    assert "Rehearsed" in printed
    assert ("No column has right answers" in printed) == (data == "folder")


def test_special_tokens_are_seen_and_a_template_is_not_missed(dry_run, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokenizer.chat_template = "<pad>Q: {{ messages[0]['content'] }}{% if extra %} A:{% endif %}<eos>"
    tokenizer.save_pretrained(tmp_path / "model")
    printed = dry_run(model_name_or_path="model", chat_template_kwargs={"extra": True})
    assert f"  | <pad>{ROWS[0]['prompt']}<eos>\n" in printed
    tokenizer.chat_template = None
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "model")
    assert f"  | <unk>{ROWS[0]['prompt'][6:-3]}\n" in dry_run(model_name_or_path="model")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset_name": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"reward_funcs": ["dry_rewards.right_sums"], "reward_weights": None}, "right_sums"),
        ({"dataset_name": "problems.jsonl"}, "`right_sum` fails on the data: TypeError: .*numbers.*The columns are"),
        ({"dataset_name": "one.jsonl"}, r"The data have 1 prompt\(s\), and a generation batch takes 2"),
        ({"dataset_name": "one.jsonl", "gradient_accumulation_steps": 9}, "a generation batch takes 18"),
        ({"model_name_or_path": "empty"}, "empty` is a folder without weights"),
        ({"eval_benchmarks": ["nowhere.jsonl"], "eval_steps": 5}, "no file nowhere.jsonl"),
        ({"eval_benchmarks": ["problems.jsonl"], "eval_steps": 5}, "`right_sum` fails on problems.jsonl: TypeError: "),
        ({"reward_funcs": ["dry_rewards.in_words"], "reward_weights": None}, "`in_words` returned '1.0': return a"),
        ({"reward_weights": [1.0]}, "`reward_weights` has 1 numbers for 2"),
        ({"extrapolate_after": 10}, "`extrapolate_after` needs a trajectory"),
        ({"extrapolate_after": 100, "trajectory_steps": 1}, "`extrapolate_after` must be between 0 and `max_steps`"),
    ],
    ids=str,
)
def test_what_is_wrong_with_the_users_own_is_one_sentence(dry_run, tmp_path, changes, message):
    write(tmp_path / "problems.jsonl", 4 * [{"problem": "P", "answer": "1"}])
    write(tmp_path / "one.jsonl", as_messages(ROWS[:1]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit, match=message):
        dry_run(**changes)


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_the_run_may_log_seldom(dry_run, strategy):
    assert "3 steps" in dry_run(logging_strategy=strategy)


def test_a_reward_that_cannot_tell_right_from_wrong_is_said(dry_run):
    printed = dry_run(reward_funcs=["dry_rewards.short"], reward_weights=None)
    assert "A right answer gets no more than a wrong one" in printed


def test_data_on_a_hub_that_cannot_be_reached_is_said(dry_run):
    printed = dry_run(dataset_name="owner/dataset", reward_funcs=["maths_reward"], reward_weights=None)
    assert "not opened: the Hub can't be reached, and owner/dataset is there" in printed
    assert "Rehearsed" in printed
    assert Path("messages.jsonl").is_file()
