"""The embedded task: short arithmetic word problems with a verifiable answer, generated on demand.

    Q: Mia has 6 pens. Mia gets 4 more. Then the number doubles. How many pens does Mia have? A:
    6+4=10 10*2=20 \\boxed{20}

Every problem chains 2 to 4 operations (+, -, doubling) and every running value stays in 0..20, so that numbers are
single tokens of the embedded tokenizer. Problems are held out by a hash of their *expression* (`6+4*2`), one in ten:
no test expression ever occurs in the training split, whatever the names and items around it.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from datasets import Dataset, DatasetDict
from trl.rewards import accuracy_reward


LARGEST_VALUE = 20
OPERATIONS = (2, 3, 4)
NAMES = ("Tom", "Ann", "Sam", "Mia", "Leo", "Eva", "Max", "Zoe")
ITEMS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs")
ADDITIONS = (
    "{name} buys {n} more.",
    "{name} finds {n} more.",
    "{other} gives {name} {n} more.",
    "{name} gets {n} more.",
)
SUBTRACTIONS = ("{name} loses {n}.", "{name} gives {n} to {other}.", "{name} sells {n}.", "{name} throws away {n}.")
DOUBLING = "Then the number doubles."

_BOXED_NUMBER = re.compile(r"\\boxed\{\s*\d+\s*\}")


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question (`str`): The problem in words.
        steps (`tuple[str, ...]`): The worked solution, one equation an operation, such as `("6+4=10", "10*2=20")`.
        answer (`int`): The value of the last step, in 0..20.
        expression (`str`): The bare chain, such as `"6+4*2"` (read from left to right); decides the split.
    """

    question: str
    steps: tuple[str, ...]
    answer: int
    expression: str

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the test split: a hash of the expression, one in ten."""
        return hashlib.md5(self.expression.encode()).digest()[0] % 10 == 0


def apply_operation(value: int, operator: str, operand: int) -> int:
    """The value after one operation (`"+"`, `"-"` or `"*"`)."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def sample_problem(rng: random.Random, operations: Sequence[int] = OPERATIONS) -> Problem:
    """Draws one problem of either split, with one of these numbers of operations."""
    value = rng.randint(2, 15)
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    sentences, steps, expression = [f"{name} has {value} {item}."], [], str(value)
    for _ in range(rng.choice(operations)):
        operator, operand = _sample_operation(rng, value)
        result = apply_operation(value, operator, operand)
        template = {"+": rng.choice(ADDITIONS), "-": rng.choice(SUBTRACTIONS), "*": DOUBLING}[operator]
        sentences.append(template.format(name=name, other=other, n=operand))
        steps.append(f"{value}{operator}{operand}={result}")
        expression += f"{operator}{operand}"
        value = result
    sentences.append(f"How many {item} does {name} have?")
    return Problem(" ".join(sentences), tuple(steps), value, expression)


def _sample_operation(rng: random.Random, value: int) -> tuple[str, int]:
    operators = []
    if value <= LARGEST_VALUE - 1:
        operators += ["+", "+"]
    if value >= 1:
        operators += ["-", "-"]
    if 1 <= value <= LARGEST_VALUE // 2:
        operators += ["*"]
    operator = rng.choice(operators)
    if operator == "*":
        return operator, 2
    return operator, rng.randint(1, min(9, LARGEST_VALUE - value if operator == "+" else value))


def sample_problems(count: int, split: str, seed: int, operations: Sequence[int] = OPERATIONS) -> list[Problem]:
    """Draws `count` problems with distinct questions from one split.

    Args:
        count (`int`): How many.
        split (`str`): `"train"` or `"test"`.
        seed (`int`): The same seed gives the same problems.
        operations (`Sequence[int]`): How many operations a problem may have. The embedded model knows 2 to 4.
    """
    rng = random.Random(f"{split}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = sample_problem(rng, operations)
        if problem.held_out == (split == "test"):
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def load_arithmetic(
    train_size: int = 4000, test_size: int = 200, seed: int = 0, operations: Sequence[int] = OPERATIONS
) -> DatasetDict:
    """The task as a dataset in TRL's conversational prompt format; the arguments are those of `sample_problems`.

    Returns:
        `datasets.DatasetDict` with splits `train` and `test` and the columns `prompt` (a list of one user message),
        `solution` (the gold answer as `\\boxed{…}`, the column that TRL's `accuracy_reward` reads) and `expression`.
    """
    sizes = {"train": train_size, "test": test_size}
    return DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {
                        "prompt": [{"role": "user", "content": problem.question}],
                        "solution": f"\\boxed{{{problem.answer}}}",
                        "expression": problem.expression,
                    }
                    for problem in sample_problems(size, split, seed, operations)
                ]
            )
            for split, size in sizes.items()
        }
    )


def arithmetic_reward(completions: list[str | list[dict[str, str]]], solution: list[str], **kwargs) -> list[float]:
    """1.0 if the last `\\boxed{…}` holds a plain number that TRL's `accuracy_reward` accepts, else 0.0.

    By itself, math-verify gives `\\boxed{1+6}` full credit for 7; here an unevaluated sum is not an answer.
    Training rewards and held-out evaluation both call this function.

    Args:
        completions (`list[str | list[dict[str, str]]]`): Texts, or an assistant message each.
        solution (`list[str]`): Gold answers, one for each completion.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        _verify_boxed_number(boxed, gold) if (boxed := last_boxed_number(text)) else 0.0
        for text, gold in zip(texts, solution, strict=True)
    ]


def last_boxed_number(text: str) -> str | None:
    """The last `\\boxed{…}` of a text if it holds a plain number, else `None`."""
    match = _BOXED_NUMBER.match(text, max(text.rfind("\\boxed{"), 0))
    return match.group() if match else None


@lru_cache(maxsize=100_000)
def _verify_boxed_number(boxed: str, gold: str) -> float:
    # The cache matters: one verification takes milliseconds and a group of completions shares a handful of answers.
    return accuracy_reward([[{"role": "assistant", "content": boxed}]], [gold])[0] or 0.0
