"""Tasks of reasoning-gym: drawn the same in every process, disjoint splits, mixtures, and their own scorers."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gxpo_trl.evaluation.scoring import evaluate, load_tasks, verify_gold
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks import generated, resolve_dataset, resolve_reward
from gxpo_trl.tasks.generated import generate, read_answer, reasoning_gym_reward
from gxpo_trl.tasks.generating import is_held_out


SUMS = "reasoning_gym/chain_sum"
SMALL = {"chain_sum": {"max_terms": 2, "max_digits": 1}}
"""Of which there are two hundred different ones, so that splits by seeds only would share most of them."""


@pytest.mark.parametrize(
    "seeds", [(0, 0), pytest.param((0, 1), marks=pytest.mark.slow), pytest.param((3, 2), marks=pytest.mark.slow)]
)
def test_no_question_is_in_both_splits_whatever_seeds_and_sizes_are(seeds):
    train = generate(SUMS, "train", SMALL | {"seed": seeds[0], "size": 1000})["problem"][:]
    test = generate(SUMS, "test", SMALL | {"seed": seeds[1], "test_size": 20})["problem"][:]
    assert len(train) == 1000 and len(set(test)) == len(test) == 20
    assert not set(train) & set(test)
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


def test_a_small_task_has_as_many_test_examples_as_there_are(caplog):
    from accelerate import PartialState

    PartialState(cpu=True)  # which warnings ask for the rank
    found = generate(SUMS, "test", SMALL)
    assert 20 < len(found) < 100
    assert f"has {len(found)} different test examples" in caplog.text


def test_a_seed_draws_the_same_and_a_larger_size_more_of_it():
    few, many = (generate(SUMS, "train", {"seed": 5, "size": size}) for size in (30, 700))
    assert few["problem"][:] == many["problem"][:30]
    other = generate(SUMS, "train", {"seed": 6, "size": 700})["problem"][:]
    assert len(set(other) & set(many["problem"][:])) < 10  # and no shifted copy


@pytest.mark.slow
def test_every_process_draws_the_same():
    """Though what `isomorphic_strings` draws depends on Python's hash seed."""
    code = "from gxpo_trl.tasks.generated import generate; import json, sys\n"
    code += "json.dump(generate('reasoning_gym/isomorphic_strings', 'train', {'size': 20})['item'][:], sys.stdout)"
    drawn = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
        drawn.add(done.stdout)
        assert len(json.loads(done.stdout)) == 20, done.stderr[-2000:]
    assert len(drawn) == 1


def test_several_tasks_are_mixed_by_weight():
    settings = {"size": 900, "chain_sum": {"weight": 2, "max_terms": 3}, "leg_counting": {"weight": 0.5}}
    name = f"{SUMS} + reasoning_gym/leg_counting+reasoning_gym/word_sorting"
    mixed = generate(name, "train", settings)
    counts = Counter(mixed["task"][:])
    for task, weight in (("chain_sum", 2), ("leg_counting", 0.5), ("word_sorting", 1)):
        assert counts[task] / 900 == pytest.approx(weight / 3.5, abs=0.06)
    scores = reasoning_gym_reward([f"<answer>{gold}</answer>" for gold in mixed["answer"]], mixed["item"][:])
    assert scores == [1.0] * 900


# ---- Scoring


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("so <answer> 12 </answer>, no: <answer>13\n</answer>.", "13"),
        ("First \\boxed{7}. No, I was wrong there: \\boxed{13}.", "13"),
        ("<think>12?</think>\n13", "13"),
        (" 13\n", "13"),
        ("", ""),
    ],
)
def test_where_the_answer_is_read(completion, answer):
    assert read_answer(completion) == answer


def test_the_scorer_is_the_tasks_own():
    """A part of 1 where it gives parts, tuples of its items intact, and 0 where it fails."""
    grids = generate("reasoning_gym/rearc", "test", {"test_size": 2})
    assert reasoning_gym_reward(grids["answer"][:], grids["item"][:]) == [1.0, 1.0]
    words = generate("reasoning_gym/letter_counting", "train", {"size": 1})
    right = words["answer"][0]
    assert reasoning_gym_reward([f"it is {right}", "none"], words["item"][:] * 2) == [len(right) / (6 + len(right)), 0]
    primes = generate("reasoning_gym/prime_factorization", "train", {"size": 1})
    assert reasoning_gym_reward(["about two", primes["answer"][0]], primes["item"][:] * 2) == [0.0, 1.0]


def test_it_logs_what_it_read_and_takes_messages():
    row, logged = generate(SUMS, "train", {"size": 1})[0], {}
    said = [[{"role": "assistant", "content": f"<answer>{row['answer']}</answer>"}]]
    assert reasoning_gym_reward(said, [row["item"]], log_extra=logged.__setitem__, task=["chain_sum"]) == [1.0]
    assert logged == {"answer": [row["answer"]]} and resolve_reward("reasoning_gym_reward") is reasoning_gym_reward


# ---- Bad input


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("reasoning_gym/chain_sums", {}, "no task `chain_sums`; did you mean `chain_sum`"),
        (SUMS, {"chain_sum": {"max_term": 3}}, "has no setting `max_term`; did you mean `max_terms`"),
        (SUMS, {"chain_sum": {"seed": 3}}, "has no setting `seed`.*are those of all tasks"),
        (SUMS, {"chain_sum": {"max_terms": 1}}, "does not take its settings: max_terms must be >= min_terms"),
        (SUMS, {"chain_sum": {"max_terms": "3"}}, "does not take its settings: '>=' not supported"),
        (SUMS, {"chain_sums": {"max_terms": 3}}, "no task `chain_sums`; did you mean `chain_sum`"),
        (SUMS, {"sizes": 3}, "`reasoning_gym` has `sizes: 3`; did you mean `size`"),
        (SUMS, {"chain_sum": 3}, "`reasoning_gym` has `chain_sum: 3`"),
        (SUMS, {"size": 0}, "`size` must be a whole number of at least 1, got 0"),
        (SUMS, {"seed": 1.5}, "`seed` must be a whole number of at least 0, got 1.5"),
        (SUMS, {"chain_sum": {"weight": 0}}, "the `weight` of `chain_sum` must be a number above 0, got 0"),
        (f"{SUMS}+MATH-500", {}, "mixes tasks of reasoning-gym with `MATH-500`"),
    ],
    ids=str,
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(name, "train", settings)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(generated.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'gxpo_trl\[reasoning-gym\]'"):
        generate(SUMS, "train")


def test_settings_come_as_json_on_a_command_line():
    assert EvaluationArguments(reasoning_gym='{"seed": 3}').reasoning_gym == {"seed": 3}
    for said in ('{"seed": ', "[1]"):
        with pytest.raises(ValueError, match="`reasoning_gym` must be a mapping"):
            EvaluationArguments(reasoning_gym=said)


# ---- In a run and in `gxpo eval`

RECIPE = """
model_name_or_path: gxpo_trl/tiny
dataset_name: reasoning_gym/chain_sum
reasoning_gym: {size: 32, test_size: 6, seed: 1, chain_sum: {max_terms: 2, max_digits: 1}}
prompt: "Tom has {problem}"
eval_benchmarks: [reasoning_gym/chain_sum, reasoning_gym/leg_counting]
eval_steps: 1
eval_samples: 2
eval_strategy: steps
max_steps: 1
max_completion_length: 12
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
num_generations: 4
use_cpu: true
bf16: false
report_to: none
"""


def test_a_recipe_names_a_task_and_its_settings_and_nothing_else(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE + f"output_dir: {tmp_path}/out\n")
    trainer = build_trainer(parse_recipe(["--config", str(tmp_path / "r.yaml")]))
    assert trainer.reward_funcs == [reasoning_gym_reward] and len(trainer.train_dataset) == 32
    assert not set(trainer.train_dataset["problem"]) & set(trainer.eval_dataset["problem"])
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval/reasoning_gym--chain_sum/avg@2", "eval/reasoning_gym--leg_counting/maj@2", "eval_reward"} <= names


def test_what_a_run_holds_out_is_what_eval_asks(tmp_path):
    settings = {"seed": 1, "test_size": 6, **SMALL}
    held_out = resolve_dataset(SUMS, reasoning_gym=settings)["test"]
    options = {"models": ["gxpo_trl/tiny"], "benchmarks": [SUMS], "samples": 2, "max_new_tokens": 12, "limit": 4}
    arguments = EvaluationArguments(**options, reasoning_gym=settings, output_dir=str(tmp_path), dtype="float32")
    (task,) = load_tasks(arguments)
    assert task.problems.to_list() == held_out.select(range(4)).to_list()
    assert verify_gold(task) == []
    results = evaluate(arguments)["gxpo_trl/tiny"][SUMS]
    assert results["samples"] == 8 and (Path(tmp_path) / "gxpo_trl--tiny" / "reasoning_gym--chain_sum.jsonl").is_file()
