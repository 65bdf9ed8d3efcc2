"""A task of the user's own, one file of data and one of rewards, in training, benchmarks and `gxpo eval`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import ON_CPU, make_trainer, tiny_model
from transformers import AutoTokenizer

from gxpo_trl.evaluation.benchmark import judge_samples, read_samples, tokenize_prompts
from gxpo_trl.evaluation.results import benchmark_results, why_doubtful
from gxpo_trl.evaluation.sampling import Sample
from gxpo_trl.evaluation.scoring import evaluate, verify_again, verify_gold
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.scripts import cli
from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.tasks.examples import load_examples, resolve_dataset, without_chat_template
from gxpo_trl.tasks.task import load_task, reward_sum


TINY = "gxpo_trl/tiny"
ROWS = [
    {"prompt": f"Q: Tom has {n} pens. Tom buys {m} more. How many pens does Tom have? A:", "numbers": [n, m]}
    | {"about": {"name": "Tom", "level": n}, "weight": 0.5 * m}
    for n, m in ((2, 3), (4, 5), (6, 1), (7, 8), (1, 1), (9, 2), (3, 3), (5, 6))
]
"""With columns of every kind, and none that is called as ours are."""
REWARDS = '''
SEEN = []


def right_sum(completions, numbers, about, weight, prompts, **kwargs):
    """1.0 where the sum stands in the completion, else 0.25."""
    for i, (name, level) in enumerate((a["name"], a["level"]) for a in about):
        assert name == "Tom" and level == numbers[i][0] and weight[i] == 0.5 * numbers[i][1]
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    SEEN.extend(completions)
    return [1.0 if str(sum(n)) in t else 0.25 for t, n in zip(texts, numbers)]


async def short(completions, completion_ids, trainer_state, **kwargs):
    return [None if len(ids) > 100 else float(len(ids) < 100) for ids in completion_ids]
'''


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_messages(rows: list[dict]) -> list[dict]:
    return [row | {"prompt": [{"role": "user", "content": row["prompt"][3:-3]}]} for row in rows]


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """A working directory with a user's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sum_rewards.py").write_text(REWARDS)
    write(tmp_path / "text.jsonl", ROWS)
    write(tmp_path / "messages.jsonl", as_messages(ROWS))
    return tmp_path


def scorer(**kwargs):
    import sum_rewards

    return reward_sum([sum_rewards.right_sum, sum_rewards.short], [0.75, 0.25])


# ---- Data


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder", "saved", "saved splits"])
def test_all_columns_are_kept_whatever_the_data_lies_in(own_task, form):
    rows = Dataset.from_list(ROWS)
    name = str(own_task / "data.parquet" if form == "parquet" else own_task / "data")
    if form == "jsonl":
        name = "text.jsonl"
    elif form == "parquet":
        rows.to_parquet(name)
    elif form == "folder":
        write(own_task / "data" / "train.jsonl", ROWS)
        write(own_task / "data" / "test.jsonl", ROWS[:2])
    elif form == "saved":
        rows.save_to_disk(name)
    else:
        DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(name)
    loaded = resolve_dataset(name)["train"]
    assert loaded.to_list() == ROWS
    task = load_task(name, rewards=scorer())
    assert len(task.problems) == (2 if form in ("folder", "saved splits") else 8)  # `test`, where there is one
    assert task.problems.column_names == loaded.column_names


def test_columns_beside_problem_and_answer_are_kept_with_their_types(own_task):
    path = write(own_task / "p.jsonl", [{"problem": "P", "answer": 2.0, "level": 3, "tags": ["a"], "id": "x7"}])
    (row,) = resolve_dataset(path, prompt="Q: {problem}")["train"]
    assert row["prompt"] == [{"role": "user", "content": "Q: P"}] and row["solution"] == "2"
    assert (row["answer"], row["level"], row["tags"], row["id"]) == (2.0, 3, ["a"], "x7")


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([{"prompt": "P"}, {"prompt": None}], {}, "no prompt in row 1: expected a text, or messages"),
        ([{"prompt": [{"role": "user", "text": "P"}]}], {}, "no prompt in row 0"),
        ([{"prompt": "P", "completions": "c"}], {}, "column `completions`, which TRL gives"),
        ([{"prompt": "P"}], {"prompt": "Q: {problem}"}, "prompts of its own, and would not use `prompt`"),
        ([{"prompt": "P"}], {"answer_column": "gold"}, "no column `gold`; set `answer_column` to one of prompt"),
        ([{"question": "P"}], {}, "no column `problem`; set `problem_column` to one of question"),
    ],
    ids=str,
)
def test_bad_rows_are_named(own_task, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(own_task / "bad.jsonl", rows), **options)


def test_a_task_that_nothing_scores_is_an_error(own_task):
    with pytest.raises(ValueError, match="Nothing scores text.jsonl: .* Set `answer_column`"):
        load_task("text.jsonl")
    with pytest.raises(ValueError, match="`kind` and `reward_funcs` are two ways"):
        load_task("text.jsonl", kind="maths", rewards=scorer())


def test_a_template_makes_prompts_of_problems_where_data_has_both(own_task):
    path = write(own_task / "both.jsonl", [{"prompt": "P?", "problem": "P", "answer": "1"}])
    assert load_examples(path)[0]["prompt"] == "P?"
    assert load_examples(path, prompt="Q: {problem}")[0]["prompt"][0]["content"] == "Q: P"


# ---- Models without a chat template


def test_without_a_chat_template_a_message_is_its_text():
    rows = Dataset.from_list(as_messages(ROWS))
    texts = without_chat_template(rows, "m")
    assert texts["prompt"][0] == ROWS[0]["prompt"][3:-3] and texts["numbers"][:] == rows["numbers"][:]
    assert without_chat_template(texts, "m") is texts
    several = Dataset.from_list([{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "P"}]}])
    with pytest.raises(ValueError, match="tokenizer of m has no chat template, .* messages system, user"):
        without_chat_template(several, "m")


def test_prompts_are_tokenized_as_trl_does(own_task, tmp_path):
    for name in ("text.jsonl", "messages.jsonl"):
        trainer = make_trainer(tmp_path / "out", scripted=False)
        prompts = load_examples(name)["prompt"][:]
        assert tokenize_prompts(prompts, trainer.processing_class) == trainer._tokenize_prompts(prompts)[0]


def template_free_model(folder: Path) -> str:
    tiny_model().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- Rewards


def sample(text: str, length: int = 3) -> Sample:
    return Sample(text, [4] * length, truncated=False)


def test_rewards_are_called_and_summed_as_trl_does(own_task):
    task = load_task("messages.jsonl", rewards=scorer())
    records = judge_samples(task, [0, 1], [[sample("5"), sample("6")], [sample("so 9", 100), sample("9", 101)]])
    assert [record.reward for record in records] == [1.0, 0.75 * 0.25 + 0.25, 0.75, 0.75]
    assert [record.score for record in records] == [1.0, 0.0, 0.0, 0.0]
    assert [(record.id, record.sample) for record in records] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    import sum_rewards

    assert sum_rewards.SEEN[0] == [{"role": "assistant", "content": "5"}]
    judge_samples(load_task("text.jsonl", rewards=scorer()), [0], [[sample("5")]])
    assert sum_rewards.SEEN[-1] == "5"


@pytest.mark.parametrize("weights", [(0.1,) * 10, (1 / 3,) * 3, (0.7, 0.2, 0.1)])
def test_weights_that_sum_to_the_threshold_reach_it(own_task, weights):
    rewards = reward_sum([lambda completions, **kwargs: [1] * len(completions)] * len(weights), weights)
    (record,) = judge_samples(load_task("text.jsonl", rewards=rewards), [0], [[sample("")]])
    assert record.score == 1.0


def test_a_threshold_says_what_is_right_and_none_stays_undecided(own_task):
    values = iter([0.5, 0.49, None, float("nan"), -1, True])

    def mixed(completions, log_extra, **kwargs):
        log_extra("answer", ["a"] * len(completions))
        return [next(values) for _ in completions]

    task = load_task("text.jsonl", rewards=reward_sum([mixed], None), threshold=0.5)
    records = judge_samples(task, [0], [[sample("x")] * 6])
    assert [record.score for record in records] == [1.0, 0.0, None, None, 0.0, 1.0]
    results = benchmark_results(records, ks=[1])
    assert results["mean_reward"] == pytest.approx((0.5 + 0.49 - 1 + 1) / 4) and "maj@1" in results["metrics"]


def test_rewards_of_another_number_and_weights_of_another_are_named(own_task):
    task = load_task("text.jsonl", rewards=reward_sum([lambda completions, **kwargs: [1.0]], None))
    with pytest.raises(ValueError, match="returned 1 rewards for 2 completions"):
        judge_samples(task, [0], [[sample("a"), sample("b")]])
    with pytest.raises(ValueError, match="`reward_weights` has 1 numbers for 2 `reward_funcs`"):
        reward_sum([max, min], [1.0])


@pytest.mark.parametrize("found", [["1.0"], "1", None, 1.0, [[1.0]], {"reward": 1.0}, ["one"]], ids=str)
def test_rewards_that_are_no_numbers_are_named(own_task, found):
    def odd(completions, **kwargs):
        return found * len(completions) if isinstance(found, list) else found

    task = load_task("text.jsonl", rewards=reward_sum([odd], None))
    for judge in (lambda: judge_samples(task, [0], [[sample("a")]]), task.check_rewards):
        with pytest.raises(ValueError, match="^The reward function `odd` returned .*: return a list with a number"):
            judge()


@pytest.mark.parametrize(
    "found",
    [np.ones(1), torch.ones(1), (1,), [np.float32(1)], [True], iter([1.0])],
    ids=lambda found: type(found).__name__,
)
def test_numbers_of_any_kind_are_rewards(own_task, found):
    task = load_task("text.jsonl", rewards=reward_sum([lambda completions, **kwargs: found], None))
    assert judge_samples(task, [0], [[sample("a")]])[0].reward == 1.0


@pytest.mark.parametrize("missing", ["numbers", "weight"])
def test_a_benchmark_without_a_column_of_a_reward_is_refused_before_anything_is_sampled(own_task, missing):
    write(own_task / "less.jsonl", [{k: v for k, v in row.items() if k != missing} for row in ROWS])
    said = f"`right_sum` fails on less.jsonl: TypeError: .*'{missing}'. The columns are prompt"
    with pytest.raises(ValueError, match=said):
        build_trainer(parse_recipe([*train_options(own_task, "text.jsonl"), "--eval_benchmarks", "less.jsonl"]))
    with pytest.raises(ValueError, match=said):
        evaluate(settings(own_task, benchmarks=["text.jsonl", "less.jsonl"]))
    assert not (own_task / "eval").exists()


@pytest.mark.parametrize(
    "body, said",
    [
        ("[target[0]] * len(completions)", "fails on text.jsonl: TypeError: .*'target'.* The columns are prompt"),
        ("kwargs['target']", "fails on text.jsonl: KeyError: 'target'. The columns are prompt"),
        ("[1.0]", "returned 1 rewards for 2 completions"),
        ("['1'] * len(completions)", "returned '1': return a list with a number, or None, for each completion"),
        ("None", "returned None: return a list with a number"),
    ],
)
def test_a_reward_that_fails_on_the_training_data_is_refused_before_the_first_step(own_task, body, said):
    columns = "target, " if "target[0]" in body else ""
    (own_task / "sum_rewards.py").write_text(
        f"{REWARDS}\n\ndef right_sum(completions, {columns}**kwargs):\n    return {body}\n"
    )
    with pytest.raises(SystemExit, match=f"^error: [^`]*The reward function `right_sum` {said}"):
        cli.main(["train", *train_options(own_task, "text.jsonl"), "--eval_benchmarks", "arithmetic"])
    assert not (own_task / "out").exists()


@pytest.mark.parametrize("taken", ["prompts", "completions", "completion_ids"])
@pytest.mark.parametrize("form", ["prompts", "problems", "saved"])
def test_a_column_that_trl_gives_rewards_itself_is_refused_at_the_start(own_task, taken, form):
    rows = ROWS if form == "prompts" else [{"problem": row["prompt"], "answer": "5"} | row for row in ROWS]
    rows = [{k: v for k, v in row.items() if form == "prompts" or k != "prompt"} | {taken: ["c"]} for row in rows]
    name = write(own_task / "taken.jsonl", rows)
    if form == "saved":
        name = str(own_task / "taken")
        Dataset.from_list(rows).save_to_disk(name)
    with pytest.raises(ValueError, match=f"taken.* has a column `{taken}`, which TRL gives rewards itself. Rename"):
        build_trainer(parse_recipe([*train_options(own_task, name), "--eval_benchmarks", "arithmetic"]))


def test_named_sets_keep_their_scorer_unless_told_otherwise(own_task):
    assert load_task("arithmetic", rewards=scorer()).kind == "arithmetic"
    assert load_task("arithmetic", rewards=scorer(), overrides_scorers=True).kind == "reward"
    assert load_task("gxpo_trl/arithmetic").problems.to_list() == load_task("arithmetic").problems.to_list()


# ---- In a run


def train_options(folder: Path, data: str) -> list[str]:
    settings = ON_CPU | {"dataset_name": data, "model_name_or_path": TINY, "output_dir": str(folder / "out")}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 28}
    settings |= {"eval_steps": 1, "eval_samples": 2, "per_device_eval_batch_size": 16, "gate_warmup_steps": 0}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    rewards = ["sum_rewards.py:right_sum", "sum_rewards.py:short"]
    return [*words, "--reward_funcs", *rewards, "--reward_weights", "0.75", "0.25"]


@pytest.mark.parametrize("has_template", [True, False])
def test_a_run_trains_and_is_scored_on_it(own_task, has_template):
    options = train_options(own_task, "messages.jsonl")
    if not has_template:
        options += ["--model_name_or_path", template_free_model(own_task / "model")]
    trainer = build_trainer(parse_recipe([*options, "--eval_benchmarks", "text.jsonl", "messages.jsonl"]))
    assert {"numbers", "about", "weight"} <= set(trainer.train_dataset.column_names)
    assert isinstance(trainer.train_dataset[0]["prompt"], list) == has_template
    trainer.train()
    scores = next(entry for entry in trainer.state.log_history if "eval/text/avg@2" in entry)
    for name in ("text", "messages"):
        assert 0 <= scores[f"eval/{name}/avg@2"] <= 1 and 0.4375 <= scores[f"eval/{name}/mean_reward"] <= 1
        assert f"eval/{name}/maj@2" not in scores  # no answer is read


# ---- `gxpo eval`


def settings(folder: Path, **others) -> EvaluationArguments:
    few = {"models": [TINY], "samples": 2, "max_new_tokens": 28, "dtype": "float32", "problems_per_batch": 3}
    few |= {"reward_funcs": ["sum_rewards.right_sum", "sum_rewards.short"], "reward_weights": [0.75, 0.25]}
    return EvaluationArguments(**{**few, "output_dir": str(folder / "eval"), **others})


def test_it_is_evaluated_with_its_reward_and_judged_again(own_task):
    results = evaluate(settings(own_task, benchmarks=["text.jsonl"]))[TINY]["text.jsonl"]
    path = own_task / "eval" / "gxpo_trl--tiny" / "text.jsonl"
    records = read_samples(path)
    assert len(records) == 16 and [record.id for record in records[::2]] == [str(i) for i in range(8)]
    for record in records:
        is_right = str(sum(ROWS[int(record.id)]["numbers"])) in record.completion
        assert record.score == float(is_right) and record.reward == (1.0 if is_right else 0.4375)
    assert 0 < results["metrics"]["avg@2"]["value"] < 1
    task = load_task("text.jsonl", rewards=reward_sum([scorer().functions[0]], [1.0]), threshold=0.25)
    with pytest.raises(ValueError, match="scored by reward functions .* `benchmarks`"):
        verify_again(path, [1])
    again, changed = verify_again(path, [1], [task])
    assert again["metrics"]["avg@2"]["value"] == 1.0 and changed == sum(not record.score for record in records)


def test_a_model_without_a_chat_template_is_evaluated(own_task):
    model = template_free_model(own_task / "model")
    results = evaluate(settings(own_task, models=[model], benchmarks=["messages.jsonl"]))
    assert results[model]["messages.jsonl"]["samples"] == 16
    plain = settings(own_task, models=[model], benchmarks=["arithmetic"], reward_funcs=None, reward_weights=None)
    plain.limit = 4
    plain.output_dir = str(own_task / "other")
    assert evaluate(plain)[model]["arithmetic"]["samples"] == 8
    plain.system_prompt, plain.output_dir = "Be brief.", str(own_task / "third")
    with pytest.raises(ValueError, match="has no chat template, .* system, user"):
        evaluate(plain)


def test_right_answers_of_own_prompts_are_judged_by_kind_or_by_reward(own_task):
    rows = [{"prompt": "1 + 1?", "answer": 2}, {"prompt": "Name?", "answer": None}]
    task = load_task(write(own_task / "gold.jsonl", rows))
    assert task.golds(list(task.problems)) == ["2", ""] and verify_gold(task) == []
    with pytest.raises(ValueError, match="no right answers to judge"):
        verify_gold(load_task("text.jsonl", rewards=scorer()))


def test_doubtful_scores_are_said():
    task = load_task("arithmetic", limit=2)
    silent = judge_samples(task, [0, 1], [[sample("I don't know")] * 2] * 2)
    assert "no answer could be read in any of the 4 completions, of which 0%" in why_doubtful(silent)
    spoken = judge_samples(task, [0, 1], [[sample("hm"), sample("\\boxed{1000}")], [sample("")] * 2])
    assert why_doubtful(spoken) is None
