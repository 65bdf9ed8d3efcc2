"""The embedded task: what its problems, its tokenizer, its reward and its warm start promise."""

import random
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from gxpo_trl.tasks import (
    TINY_MODEL_PATH,
    arithmetic_reward,
    load_arithmetic,
    resolve_dataset,
    resolve_model,
    resolve_reward,
)
from gxpo_trl.tasks.arithmetic import LARGEST_VALUE, last_boxed_number, sample_problem, sample_problems
from gxpo_trl.tasks.tiny_model import (
    build_model,
    build_tokenizer,
    collate,
    mixed_demonstration,
    prompt_text,
    warm_start,
    worked_answer,
)


def reward(completion: str, gold: int) -> float:
    return arithmetic_reward([[{"role": "assistant", "content": completion}]], [f"\\boxed{{{gold}}}"])[0]


def test_every_step_of_a_problem_follows_and_stays_in_range():
    rng = random.Random(0)
    for _ in range(2000):
        problem = sample_problem(rng)
        value = int(re.match(r"\d+", problem.expression).group())
        for step in problem.steps:
            left, operator, right, result = re.fullmatch(r"(\d+)([+\-*])(\d+)=(\d+)", step).groups()
            assert int(left) == value
            value = {"+": value + int(right), "-": value - int(right), "*": value * int(right)}[operator]
            assert value == int(result)
            assert 0 <= value <= LARGEST_VALUE
        assert value == problem.answer
        assert 2 <= len(problem.steps) <= 4


def test_no_test_expression_is_in_the_training_split():
    dataset = load_arithmetic(train_size=3000, test_size=300)
    train, test = (set(dataset[split]["expression"]) for split in ("train", "test"))
    assert not train & test
    assert len(test) > 200


def test_one_expression_in_ten_is_held_out():
    rng = random.Random(1)
    share = sum(sample_problem(rng).held_out for _ in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.03)


def test_same_seed_same_problems():
    assert sample_problems(20, "train", 3) == sample_problems(20, "train", 3)
    assert sample_problems(20, "train", 3) != sample_problems(20, "train", 4)


@pytest.mark.parametrize(
    "completion, expected",
    [
        (" 3+4=7 \\boxed{7}", 1.0),
        (" \\boxed{7}", 1.0),
        (" \\boxed{ 7 }", 1.0),
        (" \\boxed{8}", 0.0),
        (" 3+4=7", 0.0),
        ("", 0.0),
        (" \\boxed{1+6}", 0.0),
        (" \\boxed{14=7}", 0.0),
        (" \\boxed{7", 0.0),
        (" \\boxed{}", 0.0),
        (" \\boxed{7} \\boxed{8}", 0.0),
        (" \\boxed{8} \\boxed{7}", 1.0),
        (" \\boxed{70}", 0.0),
    ],
)
def test_the_reward_wants_the_plain_number_last(completion, expected):
    assert reward(completion, 7) == expected
    assert arithmetic_reward([completion], ["\\boxed{7}"]) == [expected]  # as text, of a model without a template


def test_last_boxed_number_of_a_text_without_one():
    assert last_boxed_number("7") is None


def test_completions_survive_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    for problem in sample_problems(200, "test", 5):
        for text in (prompt_text(problem), worked_answer(problem.steps, problem.answer)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_the_chat_template_renders_the_prompt():
    processor = AutoProcessor.from_pretrained(TINY_MODEL_PATH)
    problem = sample_problems(1, "train", 0)[0]
    messages = [{"role": "user", "content": problem.question}]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt_text(problem)


def test_the_shipped_tokenizer_is_what_the_script_builds():
    shipped, built = AutoTokenizer.from_pretrained(TINY_MODEL_PATH), build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template


def test_warm_start_learns_the_format_of_answers():
    """60 steps of the thousand: the loss on held-out worked answers falls to under half of the untrained model's."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    problems = sample_problems(64, "test", 9)
    prompts = tokenizer([prompt_text(problem) for problem in problems])["input_ids"]
    answers = tokenizer([worked_answer(problem.steps, problem.answer) for problem in problems])["input_ids"]
    batch = collate(prompts, answers, tokenizer.pad_token_id)
    with torch.no_grad():
        before = model(**batch).loss.item()
    warm_start(model, tokenizer, steps=60)
    with torch.no_grad():
        assert model(**batch).loss.item() < before / 2


@pytest.mark.slow
@pytest.mark.parametrize("rebuilt", [False, True], ids=["shipped", "rebuilt"])
def test_the_warm_start_leaves_a_gap_for_reinforcement_learning(tmp_path, rebuilt):
    """Sampled once it solves some problems, within 16 samples nearly all; and the script makes such a model again."""
    path = TINY_MODEL_PATH
    if rebuilt:
        path = tmp_path / "tiny"
        subprocess.run([sys.executable, "-m", "gxpo_trl.tasks.tiny_model", "--output", str(path)], check=True)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    problems = sample_problems(200, "test", 0)
    prompts = tokenizer([prompt_text(p) for p in problems for _ in range(16)], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    output = model.generate(**prompts, max_new_tokens=28, do_sample=True, top_k=0)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    golds = [problem.answer for problem in problems for _ in range(16)]
    scores = torch.tensor([reward(text, gold) for text, gold in zip(texts, golds, strict=True)]).view(200, 16)
    assert 0.15 < scores.mean() < 0.40
    assert scores.amax(1).mean() > 0.95


def test_the_mixed_demonstrator_is_bare_worked_and_sometimes_wrong():
    rng = random.Random(0)
    problems = sample_problems(1000, "train", 2)
    texts = [mixed_demonstration(problem, rng) for problem in problems]
    bare = sum("=" not in text for text in texts) / 1000
    wrong = sum(reward(text, problem.answer) == 0 for text, problem in zip(texts, problems, strict=True)) / 1000
    assert bare == pytest.approx(0.65, abs=0.05)
    assert 0.05 < wrong < 0.35 * 0.35 + 0.02
    assert all("\\boxed{" in text for text in texts)


def test_names_of_a_recipe():
    assert resolve_dataset("gxpo_trl/arithmetic").keys() == {"train", "test"}
    assert resolve_model("gxpo_trl/tiny") == str(TINY_MODEL_PATH)
    assert resolve_model("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    assert resolve_reward("arithmetic_reward") is arithmetic_reward
    assert resolve_reward("gxpo_trl.tasks.arithmetic.arithmetic_reward") is arithmetic_reward
    assert resolve_reward("accuracy_reward").__module__.startswith("trl.")


@pytest.mark.parametrize(
    "name, message",
    [
        ("acuracy_reward", "did you mean `accuracy_reward`"),
        ("gxpo_trl.tasks.arithmetic.no_such", "no_such"),
        ("no_such_package.reward", "no_such_package"),
    ],
)
def test_a_reward_that_does_not_exist_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward(name)
