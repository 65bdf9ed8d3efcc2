"""Rewards in training and scores in evaluation are the same functions, found by name."""

import math
from pathlib import Path

import pytest
import yaml
from helpers import logged, make_trainer

from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks import resolve_reward
from gxpo_trl.tasks.maths import Verdict
from gxpo_trl.tasks.rewards import boxed_format_reward, choice_reward, judge, maths_reward
from gxpo_trl.tasks.verifier import shared_pool


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_reward_is_the_score_of_its_kind():
    texts = [r"So \boxed{\frac{1}{2}}", r"So \boxed{3}", "I can't say."]
    golds = ["0.5", "4", "4"]
    scores = [verdict.score for verdict in judge("maths", texts, golds)]
    assert scores == maths_reward(said(*texts), golds) == maths_reward(texts, golds) == [1.0, 0.0, 0.0]
    texts, golds = [r"\boxed{B}", "The answer is (C).", "It is a train."], ["B", "B", "A"]
    assert choice_reward(said(*texts), golds) == [v.score for v in judge("choice", texts, golds)] == [1.0, 0.0, 0.0]
    assert judge("arithmetic", [r" 1+1=2 \boxed{2}", r"\boxed{1+1}"], [r"\boxed{2}"] * 2) == [
        Verdict(1.0, r"\boxed{2}"),
        Verdict(0.0, None),
    ]


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean `maths`"):
        judge("math", ["1"], ["1"])


def test_the_boxed_format_is_one_box_in_the_last_line():
    texts = ["so\n\\boxed{1}", "\\boxed{1}\nor so", "\\boxed{1} or \\boxed{2}", "1", "The answer: \\boxed{1}.\n"]
    assert boxed_format_reward(said(*texts)) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_an_answer_that_cannot_be_decided_in_time_scores_none_and_is_logged(monkeypatch):
    pool, metrics = shared_pool(), {}
    monkeypatch.setattr(pool, "time_limit", 1.0)
    texts = [r"\boxed{2}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"]
    scores = maths_reward(texts, ["2", "7", "4"], log_metric=metrics.__setitem__)
    assert scores == [1.0, None, 0.0]
    assert metrics["verify_failures"] == 1.0 and metrics["verify_time"] > 1.0


@pytest.mark.parametrize(
    "name", ["maths_reward", "choice_reward", "boxed_format_reward", "code_reward", "accuracy_reward"]
)
def test_rewards_are_found_by_name(name, monkeypatch):
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    assert resolve_reward(name).__name__ == name


def test_a_reward_that_runs_code_is_refused_at_the_start(monkeypatch):
    monkeypatch.delenv("GXPO_ALLOW_CODE_EXECUTION", raising=False)
    with pytest.raises(ValueError, match="GXPO_ALLOW_CODE_EXECUTION=1"):
        resolve_reward("code_reward")


def test_a_recipe_weighs_rewards_and_reads_problems_from_a_file(tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"question": "What is {i} + {i}?", "result": {2 * i}}}\n' for i in range(8)))
    tiny = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "tiny" / "gxpo.yaml").read_text())
    tiny |= {"dataset_name": str(problems), "problem_column": "question", "answer_column": "result"}
    tiny |= {"prompt": "Q: {problem} A:", "eval_strategy": "no", "eval_on_start": False, "max_steps": 1}
    tiny |= {"reward_funcs": ["maths_reward", "boxed_format_reward"], "reward_weights": [1.0, 0.5]}
    tiny |= {"output_dir": str(tmp_path / "out"), "num_generations": 4, "per_device_train_batch_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny))
    trainer = build_trainer(parse_recipe(["--config", str(tmp_path / "recipe.yaml")]))
    assert trainer.train_dataset[1]["prompt"] == [{"role": "user", "content": "Q: What is 1 + 1? A:"}]
    assert trainer.train_dataset[1]["solution"] == "2"
    trainer.train()
    (correct,), (boxed,) = (
        logged(trainer, "rewards/maths_reward/mean"),
        logged(trainer, "rewards/boxed_format_reward/mean"),
    )
    assert boxed > 0 and logged(trainer, "reward") == [pytest.approx(correct + 0.5 * boxed)]
    assert logged(trainer, "verify_failures") == [0.0]


def test_the_trainer_leaves_undecided_answers_out(tmp_path):
    """A worker is killed under a batch: its answer is no 0 in the mean reward."""

    def reward(completions, **kwargs):
        return [None if i == 0 else 1.0 for i in range(len(completions))]

    trainer = make_trainer(tmp_path, reward=reward, max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/reward/mean") == [1.0]
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


def test_an_overlong_completion_costs_what_its_length_says():
    """DAPO's soft punishment: nothing up to 3 tokens, all from 5 on, linearly between."""
    reward = resolve_reward("get_soft_overlong_punishment(5, 2)")
    assert reward(completion_ids=[[0] * n for n in (3, 4, 5, 6)]) == [0.0, -0.5, -1.0, -1]
    for nonsense in ("get_soft_overlong_punishment(5, 5)", "get_soft_overlong_punishment(5, 0)"):
        with pytest.raises(ValueError, match="takes the longest completion"):
            resolve_reward(nonsense)
