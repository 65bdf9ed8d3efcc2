"""Benchmarks scored on the way of a lookahead run, and of one that a recipe describes."""

import pytest
from helpers import assert_equal_parameters, logged, make_trainer, our_metrics, train
from test_scripts import recipe

from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks.task import load_task


SCORED = {"scripted": False, "eval_benchmarks": ["arithmetic"], "eval_samples": 2, "eval_steps": 2, "max_steps": 4}
SCORED |= {"per_device_eval_batch_size": 64}


def scores(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval/arithmetic/avg@2" in entry]


def test_the_passes_of_the_lookahead_are_counted_beside_the_scores(tmp_path):
    trainer = train(tmp_path, eval_on_start=True, **SCORED)
    assert [entry["step"] for entry in scores(trainer)] == [0, 2, 4]
    assert [entry["eval/rollouts"] for entry in scores(trainer)] == [0, 32, 64]
    passes = [0, *logged(trainer, "lookahead/backward_passes")]
    assert [entry["eval/backward_passes"] for entry in scores(trainer)] == [0, passes[2], passes[4]]
    assert all(entry["eval/arithmetic/verify_failures"] == 0 for entry in scores(trainer))


def test_the_lookahead_goes_on_as_if_nothing_had_been_scored(tmp_path):
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_benchmarks": ["arithmetics"]}, "arithmetic"),
        ({"eval_steps": 0}, "set `eval_steps`"),
        ({"eval_prompt": "Solve."}, "problem"),
    ],
    ids=str,
)
def test_bad_settings_are_named_at_construction(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **{**SCORED, **change})


def test_benchmarks_that_would_be_logged_under_one_name_are_refused(tmp_path):
    paths = []
    for part in ("p1", "p2"):
        path = tmp_path / part / "data" / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
        paths.append(str(path))
    said = "would share a file or a name, data--test: .*p1.*p2.*Leave one out of `eval_benchmarks`"
    with pytest.raises(ValueError, match=said):
        parse_recipe([*recipe("gxpo"), "--eval_steps", "1", "--eval_benchmarks", *paths])
    with pytest.raises(ValueError, match="would share a file or a name, data--test"):
        make_trainer(tmp_path / "out", **{**SCORED, "eval_benchmarks": [load_task(paths[0]), paths[1]]})
    with pytest.raises(ValueError, match="would share a file or a name, arithmetic: arithmetic, arithmetic"):
        parse_recipe([*recipe("gxpo"), "--eval_steps", "1", "--eval_benchmarks", "arithmetic", "arithmetic"])
    assert parse_recipe([*recipe("gxpo"), "--eval_steps", "1", "--eval_benchmarks", paths[0], "arithmetic"])


def test_the_start_is_scored_without_an_evaluation_dataset_and_once(tmp_path):
    """`eval_on_start` of a recipe without `eval_strategy` means its benchmarks."""
    options = ["--eval_strategy", "no", "--eval_on_start", "true", "--max_steps", "2", "--eval_steps", "1"]
    options += ["--eval_benchmarks", "arithmetic", "--eval_samples", "2", "--save_strategy", "steps"]
    options += ["--save_steps", "1", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        trainer = build_trainer(parse_recipe([*recipe("gxpo"), *options, "--output_dir", str(tmp_path)]))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert [entry["step"] for entry in scores(trainer)] == [0, 1, 2]
