"""Benchmarks scored during training: what is logged, and that training does not notice."""

import time

import pytest
from helpers import assert_equal_parameters, logged, make_trainer, our_metrics, train

from gxpo_trl import GXPOConfig, GXPORLOOConfig, GXPORLOOTrainer, GXPOTrainer
from gxpo_trl.tasks import load_arithmetic


SCORED = {"scripted": False, "eval_benchmarks": ["arithmetic"], "eval_samples": 2, "eval_steps": 2, "max_steps": 4}
SCORED |= {"per_device_eval_batch_size": 64}


@pytest.mark.parametrize(
    "trainer_class, config_class", [(GXPOTrainer, GXPOConfig), (GXPORLOOTrainer, GXPORLOOConfig)], ids=["grpo", "rloo"]
)
def test_benchmarks_are_logged_beside_what_was_spent(tmp_path, trainer_class, config_class):
    trainer = train(tmp_path, trainer_class, config_class, eval_on_start=True, **SCORED)
    entries = [entry for entry in trainer.state.log_history if "eval/arithmetic/avg@2" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert [entry["eval/rollouts"] for entry in entries] == [0, 32, 64]
    passes = dict(zip([1, 2, 3, 4], logged(trainer, "lookahead/backward_passes"), strict=True))
    assert [entry["eval/backward_passes"] for entry in entries] == [0, passes[2], passes[4]]
    seconds = [entry["eval/seconds"] for entry in entries]
    assert 0 <= seconds[0] < seconds[1] < seconds[2]
    for entry in entries:
        assert 0 < entry["eval/arithmetic/avg@2"] <= entry["eval/arithmetic/pass@2"] < 1
        assert 3 < entry["eval/arithmetic/mean_length"] < 28
        assert entry["eval/arithmetic/verify_failures"] == 0


def test_training_goes_on_as_if_nothing_had_been_scored(tmp_path):
    scored = train(tmp_path, **SCORED)
    plain = train(tmp_path, scripted=False, max_steps=4)
    assert_equal_parameters(scored, plain)
    with_scores = [entry for entry in scored.state.log_history if "loss" in entry]
    assert our_metrics(with_scores) == our_metrics([entry for entry in plain.state.log_history if "loss" in entry])
    assert [entry["reward"] for entry in with_scores] == logged(plain, "reward")


def test_old_log_probabilities_of_sampling_are_not_those_of_a_benchmark(tmp_path):
    """The benchmark's completions are sampled between two steps on one batch."""
    options = {"generation_backend": "grouped", "num_iterations": 2}
    scored = train(tmp_path, **{**SCORED, "eval_steps": 1}, **options)
    assert_equal_parameters(scored, train(tmp_path, scripted=False, max_steps=4, **options))


class SlowBenchmark(GXPOTrainer):
    def _score(self, benchmark):
        time.sleep(1.0)
        return super()._score(benchmark)


def test_the_seconds_spent_are_those_of_training(tmp_path):
    trainer = train(tmp_path, SlowBenchmark, eval_on_start=True, **SCORED)
    spent = logged(trainer, "eval/seconds")[-1]
    assert spent < logged(trainer, "train_runtime")[0] - 2.0


def test_what_was_spent_goes_on_after_a_resumption(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, **SCORED, **saving)
    resumed = train(tmp_path, **SCORED, **saving, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    entries = [entry for entry in resumed.state.log_history if "eval/rollouts" in entry]
    assert [entry["eval/rollouts"] for entry in entries] == [32, 64]
    assert entries[0]["eval/seconds"] < entries[1]["eval/seconds"]


def test_problems_that_are_trained_on_are_reported(tmp_path, capsys):
    make_trainer(tmp_path, **SCORED)
    assert "are in the training data" not in capsys.readouterr().out
    path = tmp_path / "leak.jsonl"
    load_arithmetic(train_size=64, test_size=1)["train"].select(range(3)).map(
        lambda row: {"problem": row["prompt"][0]["content"], "answer": row["solution"]}
    ).to_json(path)
    make_trainer(tmp_path, **{**SCORED, "eval_benchmarks": [str(path)]})
    assert f"3 of 3 problems of {path} are in the training data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_benchmarks": ["arithmetics"]}, "arithmetic"),
        ({"eval_steps": None}, "set `eval_steps`"),
        ({"eval_steps": 0}, "set `eval_steps`"),
        ({"scripted": True}, "`rollout_func` generates"),
        ({"eval_samples": 0}, "`eval_samples`"),
        ({"eval_prompt": "Solve."}, "problem"),
    ],
    ids=str,
)
def test_bad_settings_are_named_at_construction(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{**SCORED, **change})


def test_benchmarks_are_scored_at_the_start_without_an_evaluation_dataset(tmp_path):
    trainer = make_trainer(tmp_path, eval_on_start=True, **SCORED)
    trainer.eval_dataset = None
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval/arithmetic/avg@2" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert trainer.evaluate()["eval/arithmetic/avg@2"] > 0


def test_a_resumed_run_does_not_score_its_start_again(tmp_path):
    settings = {**SCORED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_on_start": True}
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, **settings)
        trainer.eval_dataset = None
        trainer.train(resume_from_checkpoint=checkpoint)
        entries = [entry for entry in trainer.state.log_history if "eval/arithmetic/avg@2" in entry]
        assert [entry["step"] for entry in entries] == [0, 2, 4]
