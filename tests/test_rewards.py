"""Rewards in training and scores in evaluation are the same functions, found by name."""

import importlib.util
import json
import math
import pickle
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import logged, make_trainer

from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.recipes import recipe_path
from gxpo_trl.tasks import resolve_reward
from gxpo_trl.tasks.answers import Verdict
from gxpo_trl.tasks.rewards import boxed_format_reward, choice_reward, judge, maths_reward


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


def test_an_answer_that_breaks_the_check_is_wrong_and_is_logged():
    metrics, deep = {}, "(" * 900 + "2" + ")" * 900
    said = [rf"\boxed{{{deep}}}", "no box"]
    assert maths_reward(said, ["2", "7"], log_metric=metrics.__setitem__) == [0.0, 0.0]
    assert metrics["verify_failures"] == 1.0 and 0.0 <= metrics["verify_time"] < 1.0


def test_golds_may_be_numbers_lists_and_none():
    golds = [7, 7.0, np.int64(7), np.float32(0.5), [1, 2], ["1", "2"], np.array([1, 2]), 8]
    texts = [r"\boxed{7}"] * 3 + [r"\boxed{1/2}"] + [r"\boxed{2, 1}"] * 3 + [r"\boxed{7}"]
    assert maths_reward(texts, golds) == [1.0] * 7 + [0.0]
    golds = [[[1, 2], [3, 4]], [np.array([3, 4]), (1, 2)], [[[1, 2], 3], 4], date(2024, 1, 5)]
    assert maths_reward([r"\boxed{(1,2),(3,4)}"] * 4, golds) == [1.0, 1.0, 0.0, 0.0]
    texts = [r"\boxed{1,2,3,4}", r"\boxed{(1,2),(4,3)}", r"\boxed{((1,2),3),4}", r"\boxed{2024-01-05}"]
    assert maths_reward(texts, golds) == [0.0, 0.0, 1.0, 1.0]
    with pytest.warns(UserWarning, match="row 1 .*None"):
        assert maths_reward([r"\boxed{7}"] * 2, ["7", None]) == [1.0, None]
    assert choice_reward(["(C)", "(C)"], ["C", None]) == [1.0, None]
    with pytest.raises(ValueError, match="row 1 is {'answer': 7}"):
        maths_reward(["7", "7"], ["7", {"answer": 7}])


def test_messages_may_have_parts_no_content_or_none():
    parts = [{"type": "text", "text": "So "}, {"type": "image"}, {"type": "text", "text": r"\boxed{7}"}]
    completions = [[{"content": parts}], [{"content": None}], [{"role": "assistant", "tool_calls": []}], []]
    assert maths_reward(completions, ["7"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert boxed_format_reward(completions) == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="Completion 1 of the batch is 7"):
        maths_reward([r"\boxed{7}", 7], ["7", "7"])


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


def test_the_trainer_leaves_rows_without_a_reward_out(tmp_path):
    """A gold that can't be read: its completions are no 0 in the mean reward."""

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


# ---- Rewards of one's own


MINE = """
from dataclasses import dataclass
import helper_of_mine


@dataclass
class Note:
    text: str


def mine(completions, solution, **kwargs):
    return [helper_of_mine.SCORE for _ in completions]


def strict(completions):
    return [0.0 for _ in completions]


def one(completion, /, **kwargs):
    return 0.0


number = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text(MINE)
    (tmp_path / "mine" / "helper_of_mine.py").write_text("SCORE = 0.5\n")
    yield tmp_path
    sys.modules.pop("helper_of_mine", None)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_function_of_a_file_is_a_reward(folder, absolute):
    path = folder / "mine" / "rewards.py" if absolute else "mine/rewards.py"
    reward = resolve_reward(f"{path}:mine")
    assert reward.__name__ == "mine" and reward(completions=["a", "b"], solution=["a", "b"]) == [0.5, 0.5]
    assert pickle.loads(pickle.dumps(reward)) is reward is resolve_reward(f"{path}:mine")
    assert pickle.loads(pickle.dumps(sys.modules[reward.__module__].Note("x"))).text == "x"


def test_a_recipe_finds_the_rewards_beside_it_from_anywhere(folder, monkeypatch):
    text = recipe_path("gxpo:tiny/grpo.yaml").read_text().replace("[arithmetic_reward]", "rewards.py:mine")
    (folder / "mine" / "r.yaml").write_text(text)
    (folder / "rewards.py").write_text("def mine(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    recipe = parse_recipe(["--config", "mine/r.yaml", "--output_dir", "run"])
    trainer = build_trainer(recipe)
    assert trainer.reward_func_names == ["mine"] and trainer.reward_funcs[0](completions=["a"], solution=["a"]) == [
        0.5
    ]
    assert yaml.safe_load(recipe.text)["reward_funcs"] == ["mine/rewards.py:mine"]  # and so does the recipe that stays
    here = parse_recipe(["--config", "mine/r.yaml", "--reward_funcs", "rewards.py:mine"])
    assert resolve_reward(*here.script.reward_funcs)(completions=["a"]) == [1.0]  # the command line's is that of here


@pytest.mark.parametrize(
    "name, said",
    [
        ("mine/nowhere.py:mine", "there is no file .*nowhere.py"),
        ("mine:mine", "There is no reward function `mine:mine`"),
        ("mine/rewards.py:mina", "has no `mina`; did you mean `mine`"),
        ("mine/rewards.py:", "has no ``"),
        ("mine/rewards.py:number", "is not a function"),
        ("mine/rewards.py:Note", "is not a function"),
        ("mine/rewards.py:strict", r"can't be called by TRL: .*'prompts'.*\*\*kwargs"),
        ("mine/rewards.py:one", "can't be called by TRL"),
        ("mine/raises.py:f", "ZeroDivisionError: .*raises.py, line 2"),
        ("mine/exits.py:f", "SystemExit: 3 in .*exits.py, line 1"),
        ("mine/syntax.py:f", r"SyntaxError: .*syntax.py, line 1"),
        ("mine/misses.py:f", "ModuleNotFoundError: No module named 'no_such_module' in .*misses.py, line 1"),
        ("os.system", "can't be called by TRL"),
        ("os.path", "is not a function"),
        ("os.nothing_there", "has no `nothing_there`"),
        ("no_such_module.f", "ModuleNotFoundError"),
        ("raises_too.f", "ZeroDivisionError: .*raises_too.py, line 1"),
        ("..f", "can't be imported"),
        (".", "can't be imported"),
        ("", "There is no reward function ``"),
    ],
)
def test_what_is_no_reward_is_one_sentence(folder, name, said):
    (folder / "mine" / "raises.py").write_text("x = 1\n1 / 0\n")
    (folder / "mine" / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "mine" / "syntax.py").write_text("def f(:\n")
    (folder / "mine" / "misses.py").write_text("import no_such_module\n")
    (folder / "raises_too.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=said) as caught:
        resolve_reward(name)
    assert "\n" not in str(caught.value)


def test_the_working_directory_shadows_nothing_that_is_installed(folder):
    """Neither a module of Python's that is not imported yet, nor one of ours, nor what a reward's file lies beside."""
    for place in (folder, folder / "mine"):
        (place / "antigravity.py").write_text("raise RuntimeError('shadowed')\n")
        (place / "trl").mkdir()
        (place / "trl" / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    (folder / "local_rewards.py").write_text("def here(completions, **kwargs):\n    return []\n")
    before = list(sys.path)
    assert resolve_reward("local_rewards.here").__name__ == "here"
    resolve_reward("mine/rewards.py:mine")
    assert sys.path[: len(before)] == before
    assert str(folder) not in importlib.util.find_spec("antigravity").origin


@pytest.mark.slow
def test_rewards_of_a_file_train_in_a_launched_run(folder):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [*launch, "-m", "gxpo_trl.scripts.train", "--config", "gxpo:tiny/grpo.yaml", "--max_steps", "1"]
    command += ["--reward_funcs", "mine/rewards.py:mine", "--output_dir", "run", "--eval_strategy", "no"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["rewards/mine/mean"] == 0.5
