"""What goes to the Hub, in real requests to a server of this machine's own, and what happens when it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_trainer, train
from hub_server import hub_server
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from gxpo_trl import LookaheadConfig, LookaheadTrainer
from gxpo_trl.reporting.card import MARKER, write_card
from gxpo_trl.scripts import next_loop
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.push import gather, model_folder


SCRIPT = Path(__file__).parent / "pushing_script.py"
RUN = ["train", "--config", "gxpo:tiny/gxpo.yaml", "--max_steps", "4", "--save_steps", "2", "--eval_strategy", "no"]
RUN += ["--eval_on_start", "false", "--disable_tqdm", "true", "--push_to_hub", "true"]
RUN += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


def run(hub, *commands: list[str], **environment: str) -> tuple[list[str], str]:
    """How each command ended, and all that was said."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(commands)],
        env={**os.environ, **hub.environment(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = process.stdout + process.stderr
    ends = re.search(r"^ENDS (.*)$", process.stdout, re.MULTILINE)
    assert ends, said[-3000:]
    return json.loads(ends[1]), said


def into(folder: Path, repo: str, *options: str) -> list[str]:
    return [*RUN, "--output_dir", str(folder / repo), "--hub_model_id", f"me/{repo}", *options]


@pytest.mark.slow
def test_every_strategy_leaves_the_whole_run_on_the_hub(hub, tmp_path):
    """The last of several commits holds the adapter that the run ended with, in all of them."""
    strategies = {
        "end": ["--save_strategy", "no"],
        "every_save": ["--save_strategy", "steps"],
        "checkpoint": ["--save_strategy", "steps"],
        "all_checkpoints": ["--save_strategy", "steps"],
    }
    commands = [into(tmp_path, name, "--hub_strategy", name, *LORA, *saves) for name, saves in strategies.items()]
    ends, said = run(hub, *commands)
    assert ends == ["done"] * 4, said[-3000:]
    for name in strategies:
        files = hub.files[f"me/{name}"]
        expected = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "curves.png"}
        assert expected | {"recipe.yaml", "run.json", "log.jsonl", "trainer_state.json"} <= files.keys()
        for path in expected:
            assert files[path] == (tmp_path / name / path).read_bytes()
        assert json.loads(files["trainer_state.json"])["global_step"] == 4
    in_progress = {
        name: sum(f"me/{name}" == repo and "progress" in text for repo, text, _ in hub.commits) for name in strategies
    }
    assert in_progress["end"] == 0 and all(in_progress[name] for name in strategies if name != "end")
    on_the_way = [paths for repo, text, paths in hub.commits if repo == "me/every_save" and "progress" in text]
    assert all({"log.jsonl", "README.md", "recipe.yaml"} <= set(paths) for paths in on_the_way)
    assert any(path.startswith("last-checkpoint/") for path in hub.files["me/checkpoint"])
    assert any(path.startswith("checkpoint-2/") for path in hub.files["me/all_checkpoints"])
    for name in strategies:
        assert yaml.safe_load(hub.files[f"me/{name}"]["README.md"].decode().split("---")[1])["model_name"] == name


@pytest.mark.slow
def test_a_push_that_fails_costs_nothing_but_the_push(hub, tmp_path):
    """The server refuses what comes during training in one run, and the last push in the other."""
    hub.refuses = {0, 1, 3}
    options = ["--save_strategy", "steps", "--save_steps", "2", "--hub_always_push", "true", *LORA]
    during = into(tmp_path, "during", *options)
    atlast = into(tmp_path, "atlast", "--save_strategy", "no", *LORA)
    ends, said = run(hub, during, atlast, ["push", str(tmp_path / "atlast"), "--repo_id", "me/atlast"])
    assert ends[0] == "done" and said.count("Training continues") == 2  # each failure is said, and said once
    assert [text for repo, text, _ in hub.commits if repo == "me/during"] == ["End of training"]
    assert ends[1].startswith("error: the run has ended and is in") and "gxpo push" in ends[1]
    assert ends[2] == "done"
    for name in ("during", "atlast"):
        weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        assert hub.files[f"me/{name}"]["adapter_model.safetensors"] == weights


def test_a_hub_that_refuses_is_found_out_before_training(hub, tmp_path):
    (end,), _ = run(hub, into(tmp_path, "mine"), HF_TOKEN="hf_wrong")
    assert end.startswith("error: the command line: `push_to_hub: true`, and the Hub takes no repository me/mine")
    assert "gxpo push" in end and not (tmp_path / "mine" / "run.json").exists()


@pytest.mark.slow
def test_a_run_is_pushed_afterwards_whole_or_merged_and_loads_from_there(hub, tmp_path):
    trained = [*into(tmp_path, "run", *LORA, "--learning_rate", "1e-2"), "--push_to_hub", "false"]
    trained += ["--save_strategy", "steps"]
    folder = str(tmp_path / "run")
    merged = ["push", folder, "--repo_id", "me/merged", "--merge", "--private"]
    broken_off = ["push", str(tmp_path / "run" / "checkpoint-2"), "--repo_id", "me/half"]
    wrong = ["push", str(tmp_path / "nothing")]
    ends, said = run(hub, trained, ["push", folder, "--repo_id", "me/adapter"], merged, broken_off, wrong)
    assert ends == ["done"] * 4 + [f"error: There is no folder {tmp_path / 'nothing'}."], said[-3000:]
    assert hub.private["me/merged"] and not hub.private["me/adapter"]
    assert not {path for path in hub.files["me/half"] if path.startswith(("optimizer", "rng_state", "training_args"))}
    half, whole = (hub.files[f"me/{name}"]["adapter_model.safetensors"] for name in ("half", "adapter"))
    assert half == (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").read_bytes() != whole
    assert "adapter_model.safetensors" not in hub.files["me/merged"]
    for name in ("adapter", "merged"):
        for path, content in hub.files[f"me/{name}"].items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("Q: Mia has 6 pens.", return_tensors="pt")["input_ids"]
    one = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)(tokens).logits
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_both_parts_of_a_loop_go_to_one_repository(tmp_path):
    """Named after the loop, not after `before` and `after`, unless it has a name."""
    for named, expected in (([], "mine"), (["--hub_model_id", "me/named"], "me/named")):
        recipe = parse_recipe(["--config", "gxpo:tiny/next.yaml", *named])
        for folder, start in (("before", None), ("after", tmp_path)):
            part = next_loop.part_of(recipe, tmp_path / "mine" / folder, 4, start)
            assert part.training.hub_model_id == expected


def test_a_push_that_fails_between_the_parts_of_a_loop_does_not_end_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(next_loop, "_train_and_shut_down", lambda part: "error: the Hub was away")
    monkeypatch.setattr(next_loop, "extrapolate", lambda settings: None)
    monkeypatch.setattr(next_loop, "_build", lambda part: "second")
    monkeypatch.setattr(next_loop, "train", lambda trainer, part: None)
    recipe = parse_recipe(["--config", "gxpo:tiny/next.yaml", "--output_dir", str(tmp_path)])
    assert next_loop.train_around_extrapolation(recipe) == ("second", None)
    assert "the Hub was away" in capsys.readouterr().out


# ---- The card


def test_the_card_holds_what_was_measured_and_how_to_do_it_again(tmp_path):
    scored = {"scripted": False, "eval_benchmarks": ["arithmetic"], "eval_samples": 2, "eval_steps": 2}
    trainer = train(tmp_path, max_steps=2, per_device_eval_batch_size=64, **scored)
    trainer.save_state()
    (tmp_path / "eval").mkdir()
    interval = {"low": 0.1, "high": 0.6, "problems": 8}
    metrics = {"avg@4": {"value": 0.25, **interval}, "pass@4": {"value": 0.5, **interval}}
    results = {"MATH-500": {"problems": 8, "metrics": metrics, "verify_failures": 0}}
    (tmp_path / "eval" / "results.json").write_text(json.dumps({"model": str(tmp_path), "benchmarks": results}))
    trainer.create_model_card("mine")
    write_card(tmp_path, evaluation=tmp_path / "eval")
    write_card(tmp_path, evaluation=tmp_path / "eval")  # again, and nothing is there twice
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count(MARKER) == card.text.count("## Settings") == 1
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    scores = [
        entry["eval/arithmetic/avg@2"] for entry in trainer.state.log_history if "eval/arithmetic/avg@2" in entry
    ]
    assert found[("gxpo_trl/arithmetic", "avg@2")] == pytest.approx(scores[-1], abs=1e-4)
    assert found[("HuggingFaceH4/MATH-500", "avg@4")] == 0.25 and found[("HuggingFaceH4/MATH-500", "pass@4")] == 0.5
    assert re.search(r"\| MATH-500 +\| avg@4 +\| 0.250 \|", card.text)
    for citation in ("swapnil2026gxpo", "shao2024deepseekmath", "vonwerra2020trl"):
        assert citation in card.text
    assert "huggingface.co/None" not in card.text and 'model="None"' not in card.text
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert re.search(r"!\[arithmetic, accuracy against rollouts.*\]\(curves.png\)", card.text)


def test_the_card_cites_what_was_used(tmp_path):
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    for recorded in ({}, {"trajectory_steps": 2}):
        make_trainer(tmp_path, peft_config=lora, records=True, **recorded).create_model_card("mine")
        assert ("chen2026next" in (tmp_path / "README.md").read_text()) == bool(recorded)


def test_a_results_file_that_is_not_there_is_named(tmp_path):
    make_trainer(tmp_path, records=True).create_model_card("mine")
    with pytest.raises(ValueError, match="holds no results.json"):
        write_card(tmp_path, evaluation=tmp_path)


@pytest.mark.slow
def test_a_checkpoint_knows_nothing_of_what_came_later(tmp_path):
    """Its card has its own score, and the run's folder stays as it was."""
    scored = {"scripted": False, "eval_benchmarks": ["arithmetic"], "eval_samples": 2, "eval_steps": 1}
    trainer = train(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=3, **scored)
    scores = [
        entry["eval/arithmetic/avg@2"] for entry in trainer.state.log_history if "eval/arithmetic/avg@2" in entry
    ]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    gather(tmp_path / "run" / "checkpoint-2", tmp_path / "sent", merge=False, evaluation=None)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    card = ModelCard.load(tmp_path / "sent" / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(scores[1], abs=1e-4)
    assert "2 optimizer steps" in card.text and "the run had not ended yet" in card.text


def test_a_run_that_broke_off_sends_its_newest_checkpoint(tmp_path):
    """Where a push on the way has left older weights in the run's own folder."""
    for i, place in enumerate((".", "checkpoint-2", "checkpoint-4")):
        (tmp_path / place).mkdir(exist_ok=True)
        path = tmp_path / place / "adapter_model.safetensors"
        save_file({"weight": torch.full((8,), float(i))}, path)
        os.utime(path, (i, i))
    assert model_folder(tmp_path) == tmp_path / "checkpoint-4"
    os.utime(tmp_path / "adapter_model.safetensors", (9, 9))  # the run has ended
    assert model_folder(tmp_path) == tmp_path
    for place, expected in ((".", "checkpoint-4"), ("checkpoint-4", "checkpoint-2")):  # broken off while it was saved
        path = tmp_path / place / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert model_folder(tmp_path) == tmp_path / expected


def test_the_card_of_rloo_speaks_of_rloo(tmp_path):
    make_trainer(tmp_path, RLOOTrainer, RLOOConfig, scripted=False, records=True).create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    assert MARKER in card and "ahmadian2024back" in card and "shao2024deepseekmath" not in card


def test_a_loss_is_cited_once(tmp_path):
    """TRL's card of a trainer that steps as GRPO does cites it."""
    trainer = make_trainer(tmp_path, LookaheadTrainer, LookaheadConfig, update_rule="grpo", records=True)
    trainer.create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    assert MARKER in card and card.count("{shao2024deepseekmath,") == 1 and "Further citations" not in card


def test_a_log_that_is_broken_is_not_taken_for_none(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(ValueError, match="trainer_state.json is not complete JSON"):
        write_card(tmp_path)
