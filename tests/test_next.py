"""The loop: a run records its trajectory, is extrapolated, and goes on."""

import json
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from helpers import tiny_model, train
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_scripts import recipe
from trl import RLOOConfig, RLOOTrainer

from gxpo_trl import SFPOConfig, SFPOTrainer
from gxpo_trl.callbacks.records import find_record
from gxpo_trl.evaluation.sampling import load_tokenizer
from gxpo_trl.reporting.statistics import icer
from gxpo_trl.run_folder import ADAPTER_WEIGHTS
from gxpo_trl.scripts import next_loop
from gxpo_trl.scripts.building import attach_callbacks, build_trainer
from gxpo_trl.scripts.next_loop import check_loop
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.train import main
from gxpo_trl.trajectory.checkpoints import load_trajectory
from gxpo_trl.trajectory.forecast import extrapolate


LORA = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")


def recorded(tmp_path: Path, **settings):
    return train(tmp_path, **{"peft_config": LORA, "trajectory_steps": 1, "max_steps": 2, **settings})


# ---- Recording


def test_a_recorded_adapter_is_that_of_the_checkpoint(tmp_path):
    recorded(tmp_path, trajectory_steps=2, save_strategy="steps", save_steps=2, max_steps=5)
    folders = sorted(path.name for path in (tmp_path / "trajectory").iterdir())
    assert folders == ["step-000000", "step-000002", "step-000004"]
    for step in (2, 4):
        folder = tmp_path / "trajectory" / f"step-{step:06d}"
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", ADAPTER_WEIGHTS]
        saved, other = (load_file(f / ADAPTER_WEIGHTS) for f in (folder, tmp_path / f"checkpoint-{step}"))
        assert saved.keys() == other.keys() and all(torch.equal(saved[name], other[name]) for name in saved)
        config, other = (
            json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / f"checkpoint-{step}")
        )
        assert {**config, "target_modules": set(config["target_modules"])} == {
            **other,
            "target_modules": set(other["target_modules"]),
        }


def test_what_is_trained_beside_the_adapter_is_recorded(tmp_path):
    beside = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"], bias="lora_only")
    recorded(tmp_path, peft_config=beside, save_strategy="steps", save_steps=2)
    saved, other = (load_file(tmp_path / f / ADAPTER_WEIGHTS) for f in ("trajectory/step-000002", "checkpoint-2"))
    assert saved.keys() == other.keys() and all(torch.equal(saved[name], other[name]) for name in saved)
    assert any("norm" in name for name in saved)


def test_the_base_models_embeddings_are_not_recorded(tmp_path):
    """PEFT saves them beside an adapter of theirs, which makes every point of a trajectory as large as they are."""
    recorded(tmp_path, peft_config=LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]), max_steps=1)
    names = load_file(tmp_path / "trajectory" / "step-000001" / ADAPTER_WEIGHTS)
    assert any("lora_embedding_A" in name for name in names) and not any("base_layer" in name for name in names)


def test_recording_changes_nothing_else(tmp_path):
    plain = train(tmp_path / "plain", peft_config=LORA)
    recording = train(tmp_path / "recording", peft_config=LORA, trajectory_steps=1)
    for (name, p), q in zip(plain.model.named_parameters(), recording.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_resumed_run_goes_on_recording_and_a_new_one_keeps_the_old(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    recorded(tmp_path, **saving)
    folder = tmp_path / "trajectory"
    first = {path.name: (path / ADAPTER_WEIGHTS).read_bytes() for path in folder.iterdir()}
    assert len(first) == 5
    recorded(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **saving)
    assert {path.name: (path / ADAPTER_WEIGHTS).read_bytes() for path in folder.iterdir()} == first
    recorded(tmp_path, max_steps=1, seed=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000001"]
    kept = tmp_path / "trajectory-2"
    assert {path.name: (path / ADAPTER_WEIGHTS).read_bytes() for path in kept.iterdir()} == first


def test_what_was_recorded_after_the_step_of_a_resumption_is_set_aside(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    recorded(tmp_path, max_steps=5, **saving)
    abandoned = {path.name: (path / ADAPTER_WEIGHTS).read_bytes() for path in (tmp_path / "trajectory").iterdir()}
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2"), "learning_rate": 1e-5}
    recorded(tmp_path, max_steps=3, **saving, **again)
    assert load_trajectory(tmp_path).steps == (1, 2, 3)
    aside = {path.name: (path / ADAPTER_WEIGHTS).read_bytes() for path in (tmp_path / "trajectory-1").iterdir()}
    assert aside == {name: abandoned[name] for name in ("step-000003", "step-000004", "step-000005")}
    assert "after step 2, from which the run is resumed, are in trajectory-1" in caplog.text


@pytest.mark.parametrize(
    "trainer_class, config_class, settings",
    [
        pytest.param(SFPOTrainer, SFPOConfig, {}, marks=pytest.mark.slow),
        (RLOOTrainer, RLOOConfig, {"scripted": False}),
    ],
)
def test_the_trajectory_of_any_trainer_will_do(tmp_path, trainer_class, config_class, settings):
    recorded(
        tmp_path, trainer_class=trainer_class, config_class=config_class, max_steps=4, learning_rate=1e-3, **settings
    )
    found = extrapolate(load_trajectory(tmp_path), "next", 1)
    assert found.report["steps"] == [1, 2, 3, 4] and found.report["matrices"] == 14


# ---- Going on


def test_a_run_starts_from_an_adapter(tmp_path):
    recorded(tmp_path / "first")
    adapter = tmp_path / "first" / "trajectory" / "step-000002"
    arguments = [*recipe("grpo"), "--resume_adapter", str(adapter), "--output_dir", str(tmp_path / "second")]
    parsed = parse_recipe([*arguments, "--beta", "0.1", "--use_peft", "true", "--lora_r", "7"])
    trainer = build_trainer(parsed)
    attach_callbacks(trainer, parsed)
    described = find_record(trainer).describe_run()["settings"]
    assert described["resume_adapter"] == str(adapter) and described["dataset_name"] == "gxpo_trl/arithmetic"
    expected = PeftModel.from_pretrained(tiny_model(), adapter).state_dict()
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {p.shape[0] for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_A" in name} == {3}


def test_an_adapter_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="`resume_adapter: .*` holds no adapter_config.json"):
        main([*recipe("grpo"), "--resume_adapter", str(tmp_path)])


def test_points_of_a_trajectory_can_be_evaluated(tmp_path):
    recorded(tmp_path)
    assert load_tokenizer(str(tmp_path / "trajectory" / "step-000002")).chat_template is not None


SHORT = ["--max_steps", "7", "--extrapolate_after", "4", "--trajectory_steps", "1", "--extrapolate_steps_ahead", "1"]
SHORT += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--eval_strategy", "no"]
SHORT += ["--eval_on_start", "false", "--learning_rate", "1e-3", "--disable_tqdm", "true"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gxpo", "grpo"])
def test_the_whole_loop(tmp_path, capsys, rule):
    arguments = [*recipe("next"), *SHORT, "--update_rule", rule, "--output_dir", str(tmp_path)]
    main(arguments)
    before, after = (load_trajectory(tmp_path / name) for name in ("before", "after"))
    assert before.steps == (1, 2, 3, 4) and after.steps == (1, 2, 3)
    adapter = load_file(tmp_path / "extrapolated" / "alpha-1" / ADAPTER_WEIGHTS)
    started = load_file(after.start / ADAPTER_WEIGHTS)
    assert all(torch.equal(adapter[name], started[name]) for name in adapter)
    assert {shape[1] for shape in after.shapes.values()} == {9}
    states = [json.loads((tmp_path / part / "trainer_state.json").read_text()) for part in ("before", "after")]
    assert [state["global_step"] for state in states] == [4, 3]
    abouts = [json.loads((tmp_path / part / "run.json").read_text()) for part in ("before", "after")]
    assert [about["settings"]["seed"] for about in abouts] == [0, 1]  # other prompts
    assert str(tmp_path / "after") in capsys.readouterr().out

    with pytest.raises(SystemExit, match="holds an earlier run"):
        main(arguments)
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    main([*arguments, "--resume_from_checkpoint", "last"])  # what is finished is not done again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times
    assert capsys.readouterr().out.count("has ended after") == 2
    with pytest.raises(SystemExit, match="Set `last`"):
        main([*arguments, "--resume_from_checkpoint", str(tmp_path / "before" / "checkpoint-4")])

    (tmp_path / "after" / "trainer_state.json").unlink()  # broken off, before it had saved a checkpoint
    (tmp_path / "after" / ADAPTER_WEIGHTS).unlink()
    main([*arguments, "--resume_from_checkpoint", "last"])
    written = {path for path, time in times.items() if path.is_file() and path.stat().st_mtime_ns != time}
    assert written and all((tmp_path / "after") in path.parents for path in written - {tmp_path / "recipe.yaml"})


def test_the_first_trainer_is_gone_when_the_second_is_made(tmp_path, monkeypatch):
    """On a GPU both would not find room, least of all two engines of vLLM."""
    made = []

    def build(part):
        assert not any(reference() for reference in made)
        trainer = build_trainer(part)
        made.extend(weakref.ref(thing) for thing in (trainer, trainer.model, trainer.accelerator))
        return trainer

    monkeypatch.setattr(next_loop, "build_trainer", build)
    main([*recipe("next"), *SHORT, "--update_rule", "gxpo", "--output_dir", str(tmp_path)])
    assert len(made) == 6


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_is_shut_down_with_the_first_trainer(monkeypatch, mode):
    """Without the end of `torch.distributed`, which the engine's own shut-down would bring about."""
    trainer = MagicMock(use_vllm=True, vllm_mode=mode)
    trainer.accelerator.is_main_process = True
    monkeypatch.setattr(next_loop, "_build", lambda part: trainer)
    monkeypatch.setattr(next_loop, "train", lambda *arguments: None)
    next_loop._train_and_shut_down(None)
    vllm = trainer.vllm_generation
    shut_down = {
        "colocate": vllm.llm.llm_engine.model_executor.shutdown,
        "server": vllm.vllm_client.close_communicator,
    }
    assert {name: bool(call.called) for name, call in shut_down.items()} == {name: name == mode for name in shut_down}
    assert not vllm.llm.llm_engine.engine_core.shutdown.called


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"extrapolate_after": "7"}, "must be between 0 and `max_steps`"),
        ({"extrapolate_after": "5", "trajectory_steps": "2"}, "must be a multiple of `trajectory_steps`"),
        ({"extrapolate_steps_ahead": "3"}, "takes 5"),
        ({"extrapolate_steps_ahead": "3", "trajectory_steps": "2"}, "multiple of 2"),
        ({"extrapolate_method": "magic"}, "`method` must be one of"),
        ({"extrapolate_alpha": "-1"}, "`alpha` must be"),
    ],
    ids=str,
)
def test_a_loop_that_cannot_be_closed_is_refused_before_it_starts(tmp_path, overrides, message):
    changes = [string for name, value in overrides.items() for string in (f"--{name}", value)]
    with pytest.raises(SystemExit, match=message):
        main([*recipe("next"), *SHORT, *changes, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_loop_needs_a_trajectory(tmp_path):
    with pytest.raises(SystemExit, match="Set `trajectory_steps`"):
        main([*recipe("grpo"), "--extrapolate_after", "4", "--output_dir", str(tmp_path / "out")])


# ---- What it costs


def test_icer_is_that_of_the_papers_tables():
    """Table 3, Qwen2.5-7B-Instruct: 19.1 points before, 23.1 after 250 steps, 24.0 after 400."""
    assert icer(250, 0.191, 0.231) == pytest.approx(62.5, abs=0.05)
    assert icer(400, 0.191, 0.240) == pytest.approx(81.6, abs=0.05)
    assert icer(250, 0.2, 0.2) == icer(250, 0.2, 0.1) == float("inf")


def test_a_loop_that_never_began_holds_nobody_up(tmp_path):
    recipe = parse_recipe(["--config", "gxpo:tiny/next.yaml", "--output_dir", str(tmp_path)])
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "recipe.yaml").write_text("")
    check_loop(recipe)
    (tmp_path / "before" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an earlier run"):
        check_loop(recipe)
