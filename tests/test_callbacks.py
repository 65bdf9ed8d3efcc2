"""Each callback on TRL's own trainers: what it writes, that training does not notice, and what it refuses."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import ON_CPU, assert_equal_parameters, logged, make_trainer, scripted_rollouts, tiny_model
from hub_server import TOKEN, hub_server
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, LoraConfig, inject_adapter_in_model
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import hub as transformers_hub
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from gxpo_trl.callbacks.benchmarks import BenchmarkArguments, BenchmarkCallback
from gxpo_trl.callbacks.hub import HubCallback, explain_hub_errors
from gxpo_trl.callbacks.records import RunRecordCallback, describe_run, find_record
from gxpo_trl.callbacks.trackers import WANDB_VARIABLES, TrackerCallback
from gxpo_trl.callbacks.trajectories import TrajectoryArguments, TrajectoryCallback
from gxpo_trl.callbacks.wrapping import wrap_method
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.tasks.arithmetic import sample_problems
from gxpo_trl.trajectory.checkpoints import load_trajectory


LORA = {"r": 3, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig), "sft": (SFTTrainer, SFTConfig)}
FAST = {"max_steps": 2, "learning_rate": 1e-3, "eval_steps": 1, "per_device_eval_batch_size": 16}


def worked_problems(count: int) -> Dataset:
    problems = sample_problems(count, "train", 0)
    answers = [f"{' '.join(problem.steps)} \\boxed{{{problem.answer}}}" for problem in problems]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": problem.question}] for problem in problems],
            "completion": [[{"role": "assistant", "content": answer}] for answer in answers],
        }
    )


def trl_trainer(folder, kind: str = "grpo", lora: dict | None = None, **settings):
    """TRL's own, on the embedded model."""
    trainer_class, config_class = KINDS[kind]
    config = None if lora is None else LoraConfig(**lora)
    if kind != "sft":
        settings = {"scripted": False, "peft_config": config, **FAST, **settings}
        trainer = make_trainer(folder, trainer_class, config_class, **settings)
        trainer.eval_dataset = None
        return trainer
    settings = {name: value for name, value in {**ON_CPU, **FAST, **settings}.items() if name != "loss_type"}
    return SFTTrainer(
        tiny_model(),
        args=SFTConfig(str(folder), per_device_train_batch_size=4, max_length=64, **settings),
        train_dataset=worked_problems(16),
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL_PATH),
        peft_config=config,
    )


def attach_all(trainer, benchmark) -> None:
    TrackerCallback.attach(trainer)
    trainer.add_callback(RunRecordCallback(trainer, {"trajectory_steps": 1, "eval_prompt": None}))
    trainer.add_callback(HubCallback(trainer))
    trainer.add_callback(BenchmarkCallback(trainer, [str(benchmark)], samples=2, at_start=True))
    trainer.add_callback(TrajectoryCallback(trainer, 1))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "few.jsonl"
    rows = [{"problem": p.question, "answer": str(p.answer)} for p in sample_problems(8, "test", 0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory, benchmark):
    """A run with all callbacks, and the same without any."""
    trained = []
    for is_observed in (True, False):
        trainer = trl_trainer(tmp_path_factory.mktemp(request.param), request.param, LORA)
        if is_observed:
            attach_all(trainer, benchmark)
        trainer.train()
        trained.append(trainer)
    return trained


def read_log(trainer) -> list[dict]:
    return [json.loads(line) for line in open(os.path.join(trainer.args.output_dir, "log.jsonl"))]


def scores(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if any(name.endswith("/avg@2") for name in entry)]


# ---- All of them, on each trainer


def test_training_does_not_notice(runs):
    observed, plain = runs
    assert_equal_parameters(observed, plain)
    for name in ("loss", "grad_norm", "entropy", "reward"):
        assert logged(observed, name) == logged(plain, name)


def test_the_log_is_on_disk_entry_by_entry(runs):
    observed, _ = runs
    assert read_log(observed) == observed.state.log_history
    times = (
        {"elapsed_time"} if isinstance(observed, SFTTrainer) else {"elapsed_time", "generation_time", "reward_time"}
    )
    steps = [entry for entry in observed.state.log_history if "loss" in entry]
    found = {name.removeprefix("lookahead/") for name in steps[-1] if name.startswith("lookahead/")}
    assert found == times
    elapsed = logged(observed, "lookahead/elapsed_time")
    assert 0 < elapsed[0] < elapsed[1]


def test_a_run_is_described(runs):
    observed, _ = runs
    about = json.loads(open(os.path.join(observed.args.output_dir, "run.json")).read())
    sampled = not isinstance(observed, SFTTrainer)
    assert about["trainer"] == type(observed).__name__ and about["adapter"]["r"] == 3
    assert about["completions_per_step"] == (16 if sampled else None)
    assert about["rewards"] == (["arithmetic_reward"] if sampled else [])
    assert about["settings"]["trajectory_steps"] == about["changed"]["trajectory_steps"] == 1
    assert about["settings"]["eval_prompt"] is None and "eval_prompt" not in about["changed"]
    assert about["settings"]["max_steps"] == about["changed"]["max_steps"] == 2


def test_benchmarks_are_logged_beside_what_was_spent(runs):
    observed, _ = runs
    entries = scores(observed)
    assert [entry["step"] for entry in entries] == [entry["eval/backward_passes"] for entry in entries] == [0, 1, 2]
    if isinstance(observed, SFTTrainer):
        assert not any("eval/rollouts" in entry for entry in entries)
    else:
        assert [entry["eval/rollouts"] for entry in entries] == [0, 16, 32]
    seconds = [entry["eval/seconds"] for entry in entries]
    assert 0 <= seconds[0] < seconds[1] < seconds[2]
    for entry in entries:
        found = {name.split("/")[-1]: value for name, value in entry.items()}
        assert 0 <= found["avg@2"] <= found["pass@2"] <= 1 and 3 < found["mean_length"] < 64


def test_trajectories_are_read_by_what_extrapolates_them(runs):
    observed, _ = runs
    trajectory = load_trajectory(observed.args.output_dir)
    assert trajectory.steps == (1, 2) and trajectory.start is not None
    names = [name for _, group in trajectory.groups() for name in group]
    assert len(names) == 4 and any(trajectory.difference([name], 1, 0).left.abs().max() > 0 for name in names)


def test_the_card_is_completed(runs):
    observed, _ = runs
    observed.create_model_card("mine")
    card = open(os.path.join(observed.args.output_dir, "README.md")).read()
    assert "2 optimizer steps" in card and "avg@2" in card and "`learning_rate`" in card


# ---- Records


def test_what_was_spent_goes_on_after_a_resumption(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = trl_trainer(tmp_path, **settings)
    first.add_callback(RunRecordCallback(first))
    first.train()
    for restores in (False, True):  # transformers makes some callbacks anew
        resumed = trl_trainer(tmp_path, **settings, max_steps=3, restore_callback_states_from_checkpoint=restores)
        resumed.add_callback(RunRecordCallback(resumed))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        record = find_record(resumed)
        assert record.rollouts == 48 and record.seconds > find_record(first).seconds / 2
        assert resumed.state.stateful_callbacks["gxpo_trl.run_record"]["rollouts"] == 48
        assert [entry["step"] for entry in read_log(resumed)] == [1, 2, 3, 3]


def test_what_was_spent_begins_anew_with_a_run(tmp_path):
    trainer = trl_trainer(tmp_path)
    trainer.add_callback(RunRecordCallback(trainer))
    trainer.train()
    before = find_record(trainer).spent()
    trainer.train()
    spent = find_record(trainer).spent()
    assert {**spent, "seconds": 0} == {**before, "seconds": 0} and spent["rollouts"] == 32
    assert spent["seconds"] < before["seconds"] * 1.9


def test_a_run_of_plain_trl_can_be_resumed_with_a_record(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trl_trainer(tmp_path, **settings, max_steps=1).train()
    resumed = trl_trainer(tmp_path, **settings)
    resumed.add_callback(RunRecordCallback(resumed))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert find_record(resumed).rollouts == 16  # of what it saw
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["gxpo_trl.run_record"]["rollouts"] == 16


def test_values_that_json_does_not_know_are_written_as_numbers_or_text(tmp_path):
    trainer = trl_trainer(tmp_path, "sft")
    record = RunRecordCallback(trainer)
    entry = {"step": 1, "one": torch.tensor(1.5), "two": torch.ones(2), "where": tmp_path, "deep": [torch.tensor(2)]}
    trainer.state.log_history = [entry]
    record.on_log(trainer.args, trainer.state, trainer.control)
    assert read_log(trainer) == [
        {"step": 1, "one": 1.5, "two": "tensor([1., 1.])", "where": str(tmp_path), "deep": [2]}
    ]


def test_an_adapter_without_a_model_of_peft_around_it_is_described(tmp_path):
    trainer = trl_trainer(tmp_path, "sft")
    assert describe_run(trainer)["adapter"] is None
    trainer.model = inject_adapter_in_model(LoraConfig(**LORA), trainer.model)
    assert describe_run(trainer)["adapter"]["r"] == 3


# ---- Benchmarks


def test_scoring_takes_no_time_of_training(tmp_path, benchmark):
    trainer = trl_trainer(tmp_path, "sft", max_steps=1)
    trainer.add_callback(RunRecordCallback(trainer))
    callback = BenchmarkCallback(trainer, [str(benchmark)], samples=1, at_start=True)
    wrap_method(callback, "_score", lambda score, benchmark: time.sleep(0.3) or score(benchmark))
    trainer.add_callback(callback)
    trainer.train()
    assert find_record(trainer).seconds < logged(trainer, "train_runtime")[0] - 0.6


def test_without_a_record_scores_stand_alone(tmp_path, benchmark):
    trainer = trl_trainer(tmp_path, "sft")
    logs = BenchmarkCallback(trainer, [str(benchmark)], samples=1).score()
    assert "eval/seconds" not in logs and any(name.endswith("avg@1") for name in logs)


def test_problems_that_are_trained_on_are_reported(tmp_path, capsys):
    path = tmp_path / "leak.jsonl"
    path.write_text(json.dumps({"problem": worked_problems(1)["prompt"][0][0]["content"], "answer": "1"}))
    BenchmarkCallback(trl_trainer(tmp_path, "sft"), [str(path)])
    assert f"1 of 1 problems of {path} are in the training data" in capsys.readouterr().out


def rollout_func(trainer) -> None:
    trainer.rollout_func = scripted_rollouts


def fewer_samples_of_vllm(trainer) -> None:
    trainer.use_vllm, trainer.num_generations_eval = True, 2


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("grpo", lambda trainer: setattr(trainer.args, "eval_steps", None), "set `eval_steps`"),
        ("grpo", rollout_func, "`rollout_func` generates"),
        ("grpo", lambda trainer: setattr(trainer, "tools", [print]), "tools are called"),
        ("rloo", fewer_samples_of_vllm, "`num_generations_eval` samples"),
        ("sft", lambda trainer: setattr(trainer, "is_fsdp_enabled", True), "`gxpo eval` scores"),
    ],
    ids=["eval_steps", "rollout_func", "tools", "vllm", "fsdp"],
)
def test_what_can_not_be_scored_is_refused_at_once(tmp_path, benchmark, kind, change, message):
    trainer = trl_trainer(tmp_path, kind)
    change(trainer)
    with pytest.raises(ValueError, match=message):
        BenchmarkCallback(trainer, [str(benchmark)])


# ---- Trajectories


def test_trajectories_are_those_of_adapters(tmp_path):
    with pytest.raises(ValueError, match="Train with LoRA"):
        TrajectoryCallback(trl_trainer(tmp_path, "sft"), 1)
    for change, message in (({"use_dora": True}, "`use_dora`"), ({"init_lora_weights": "pissa"}, "pissa")):
        with pytest.raises(ValueError, match=message):
            TrajectoryCallback(trl_trainer(tmp_path, "sft", {**LORA, **change}), 1)


def test_adapters_of_a_config_without_a_task_type_load_as_those_of_peft_do(tmp_path):
    trainer = trl_trainer(tmp_path, lora={**LORA, "task_type": None})
    TrajectoryCallback(trainer, 1).save_adapter(tmp_path / "ours")
    trainer.model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (AutoPeftModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert_equal_parameters(ours, theirs)


@pytest.mark.parametrize(
    "arguments", [(BenchmarkArguments, {"eval_samples": 0}), (TrajectoryArguments, {"trajectory_steps": 0})], ids=str
)
def test_settings_out_of_their_bounds_are_named(arguments):
    arguments_class, settings = arguments
    with pytest.raises(ValueError, match=next(iter(settings))):
        arguments_class(**settings)


# ---- Trackers


class Seeing(TrainerCallback):
    """In the place of wandb's: what it finds when it begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.found = [os.environ.get(name) for name in WANDB_VARIABLES]


def test_a_resumed_run_is_named_before_trackers_begin_and_not_for_the_next(tmp_path, monkeypatch):
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    settings = {"save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}
    seeing = Seeing()
    for steps, checkpoint in ((1, None), (2, str(tmp_path / "checkpoint-1"))):
        trainer = trl_trainer(tmp_path, "sft", **settings, max_steps=steps)
        trainer.add_callback(seeing)
        TrackerCallback.attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        names = json.loads((tmp_path / "trackers.json").read_text())
        (tmp_path / "trackers.json").write_text(json.dumps({**names, "wandb": "first"}))
    assert seeing.found == ["first", "allow"]
    assert not any(name in os.environ for name in WANDB_VARIABLES)
    (folder,) = (tmp_path / "runs").iterdir()
    assert names["tensorboard"] == str(folder)


def test_names_of_the_users_own_stay(tmp_path, monkeypatch):
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": "theirs", "trackio": "theirs"}))
    trainer = trl_trainer(tmp_path, "sft", run_name="mine")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    callback = TrackerCallback.attach(trainer)
    callback.resume_trackers(tmp_path)
    callback.forget_wandb_variables()
    assert (trainer.args.run_name, os.environ["WANDB_RUN_ID"]) == ("mine", "mine")


def test_processes_without_trackers_ask_them_nothing(tmp_path):
    callback = TrackerCallback(trl_trainer(tmp_path, "sft"))
    callback.tracker_names = lambda: pytest.fail("trackers run on the first process alone")
    callback.on_step_begin(callback.trainer.args, SimpleNamespace(is_world_process_zero=False), None)


# ---- Hub


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        yield server


PUSHES = {"push_to_hub": True, "hub_model_id": "me/mine", "save_strategy": "steps", "save_steps": 1}


def test_a_push_that_fails_costs_nothing_but_the_push(hub, tmp_path, caplog):
    hub.refuses = {0, 1}
    trainer = trl_trainer(tmp_path, lora=LORA, hub_token=TOKEN, hub_always_push=True, **PUSHES)
    trainer.add_callback(HubCallback(trainer))
    trainer.train()
    assert trainer.state.global_step == 2 and hub.attempts == 2
    assert sum("Training continues" in message for message in caplog.messages) == 2
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in hub.files["me/mine"]


def test_a_hub_that_refuses_is_named_when_the_trainer_is_made(hub, tmp_path):
    args = SimpleNamespace(hub_model_id="me/mine")
    with pytest.raises(ValueError, match="the Hub takes no repository me/mine"), explain_hub_errors(args):
        trl_trainer(tmp_path, "sft", hub_token="hf_wrong", **PUSHES)
    with pytest.raises(OSError, match="no such model"), explain_hub_errors(args):
        raise OSError("no such model")
