"""A task: examples, and how completions are scored. Benchmarks of a run and of `gxpo eval` are tasks.

In training TRL calls the rewards on the same examples, so a file and a reward function mean the same everywhere.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from .answers import Verdict
from .code import check_code_data, code_reward
from .datasets import has_name, problem_set, text_of_cell
from .examples import load_examples, without_chat_template
from .generated import is_generated, reasoning_gym_reward
from .rewards import judge


Row = dict[str, Any]

OWN_REWARD = "reward"
"""The kind of a task that reward functions score. Other kinds are those of `tasks/rewards.py`."""
TOLERANCE = 1e-6  # a sum of weighted rewards is rounded


@dataclass(frozen=True)
class Judgement:
    """The verdict on one completion.

    Attributes:
        reward (`float`, *optional*): The number itself; `None` if no function gave one.
        score (`float`, *optional*): 1.0 if it reaches the threshold, else 0.0; `None` likewise.
        answer (`str`, *optional*): The answer that was read, if known.
        failed (`bool`): Whether the check failed.
    """

    reward: float | None
    score: float | None
    answer: str | None
    failed: bool = False


@dataclass(frozen=True)
class RewardSum:
    """Reward functions with weights, called as TRL's trainers call them.

    Attributes:
        functions (`tuple[Callable, ...]`): In TRL's form, plain or `async`.
        weights (`tuple[float, ...]`): One for each function.
    """

    functions: tuple[Callable, ...]
    weights: tuple[float, ...]

    def __call__(
        self,
        rows: Sequence[Row],
        completions: Sequence[str],
        completion_ids: Sequence[list[int]] | None = None,
        trainer_state: TrainerState | None = None,
    ) -> list[Verdict]:
        """The weighted sums, `None` if no function has a number, and the answers that a function logs as `answer`.

        Args:
            rows (`Sequence[Row]`): The example of each completion.
            completions (`Sequence[str]`): Texts.
            completion_ids (`Sequence[list[int]]`, *optional*): Their tokens.
            trainer_state (`TrainerState`, *optional*): Of the run; as at its start if unset.

        Raises:
            ValueError: If a function returns anything but one number, or `None`, for each completion.
        """
        extra: dict[str, list] = {}
        given = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
        given |= {
            "prompts": [row["prompt"] for row in rows],
            "completions": [_in_form_of(row["prompt"], text) for row, text in zip(rows, completions, strict=True)],
            "trainer_state": trainer_state or TrainerState(),
            "log_extra": extra.__setitem__,
            "log_metric": lambda name, value: None,
        }
        if completion_ids is not None:
            given["completion_ids"] = list(completion_ids)
        found = [_call(function, given, len(rows)) for function in self.functions]
        answers = extra.get("answer", [None] * len(rows))
        return [
            Verdict(self._sum(of_row), answer or None)
            for of_row, answer in zip(zip(*found, strict=True), answers, strict=True)
        ]

    def _sum(self, rewards: tuple[float | None, ...]) -> float | None:
        present = [w * r for w, r in zip(self.weights, rewards, strict=True) if r is not None and not math.isnan(r)]
        return math.fsum(present) if present else None


def reward_sum(functions: Sequence[Callable], weights: Sequence[float] | None) -> RewardSum:
    """Reward functions with their weights, 1 each if unset.

    Raises:
        ValueError: If there are more or fewer weights than functions.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise ValueError(f"`reward_weights` has {len(weights)} numbers for {len(functions)} `reward_funcs`.")
    return RewardSum(tuple(functions), tuple(float(weight) for weight in weights))


def _in_form_of(prompt: Any, text: str) -> str | list[dict[str, str]]:
    """A completion in TRL's form: a message after messages, a text after a text."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def name_of(function: Callable) -> str:
    """The name of a reward function."""
    return getattr(function, "__name__", type(function).__name__)


def _call(function: Callable, given: dict[str, Any], count: int) -> list[float | None]:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        with ThreadPoolExecutor(1) as thread:  # this thread may already run a loop, as in a notebook
            rewards = thread.submit(asyncio.run, function(**given)).result()
    else:
        rewards = function(**given)
    if not isinstance(rewards, Iterable) or isinstance(rewards, (str, Mapping)):
        raise _of_another_kind(function, rewards)
    rewards = list(rewards)
    if len(rewards) != count:
        raise ValueError(
            f"The reward function `{name_of(function)}` returned {len(rewards)} rewards for {count} completions."
        )
    return [None if reward is None else _number(function, reward) for reward in rewards]


def _number(function: Callable, reward: Any) -> float:
    """A reward as TRL reads it: texts are none, whatever they hold."""
    if isinstance(reward, (str, bytes)):
        raise _of_another_kind(function, reward)
    try:
        return float(reward)
    except (TypeError, ValueError, RuntimeError) as error:  # the last is of a tensor of several numbers
        raise _of_another_kind(function, reward) from error


def _of_another_kind(function: Callable, found: Any) -> ValueError:
    return ValueError(
        f"The reward function `{name_of(function)}` returned {found!r:.60}: return a list with a number, or None, for "
        "each completion."
    )


def try_rewards(rewards: RewardSum, row: Row, name: str, completion: str) -> list[float | None]:
    """What each function gives for a completion of one example: its errors come before anything is sampled.

    Each is given a group of two that are alike, since it may compare them, and must not give one number for all.

    Args:
        rewards (`RewardSum`): The functions.
        row (`Row`): The example.
        name (`str`): Of the data, for the message.
        completion (`str`): Its text.

    Raises:
        ValueError: If a function fails. The message names it.
    """
    return [_try(function, row, name, completion) for function in rewards.functions]


def _try(function: Callable, row: Row, name: str, completion: str) -> float | None:
    ids = [0] * max(len(completion.split()), 1)
    try:
        return RewardSum((function,), (1.0,))([row] * 2, [completion] * 2, [ids] * 2)[0].score
    except Exception as error:  # it is the user's code
        if str(error).startswith("The reward function"):  # of what it returned
            raise
        raise ValueError(
            f"The reward function `{name_of(function)}` fails on {name}: {type(error).__name__}: {error}. The "
            f"columns are {', '.join(row)}."
        ) from error


def in_a_box(gold: str) -> str:
    """A completion that ends in a right answer."""
    return gold if "\\boxed{" in gold else f"The answer is \\boxed{{{gold}}}."


def spoken(gold: str) -> tuple[str, ...]:
    """Completions that give a right answer, in the forms that rewards look for."""
    return gold, in_a_box(gold), f"<answer>{gold}</answer>"


@dataclass(frozen=True)
class Task:
    """Examples, and how completions of them are scored.

    Attributes:
        name (`str`): As the user wrote it.
        kind (`str`): Of its answers, see `tasks/rewards.py`, or `"reward"` where reward functions score.
        problems (`Dataset`): With the column `prompt`, and all that the data has.
        rewards (`RewardSum`, *optional*): The functions, where these score.
        gold (`str`, *optional*): The column with the right answers.
        threshold (`float`): The reward from which a completion counts as right.
    """

    name: str
    kind: str
    problems: Dataset
    rewards: RewardSum | None = None
    gold: str | None = "solution"
    threshold: float = 1.0

    def golds(self, rows: Sequence[Row]) -> list[str]:
        """The right answers of rows as texts; empty if there is none."""
        return ["" if self.gold is None else text_of_cell(row[self.gold]) for row in rows]

    def judge(
        self,
        rows: Sequence[Row],
        completions: Sequence[str],
        completion_ids: Sequence[list[int]] | None = None,
        trainer_state: TrainerState | None = None,
    ) -> list[Judgement]:
        """Scores completions; the arguments are those of `RewardSum`."""
        if not rows:
            return []
        if self.rewards is None:
            verdicts = judge(self.kind, completions, self.golds(rows))
        else:
            verdicts = self.rewards(rows, completions, completion_ids, trainer_state)
        return [
            Judgement(verdict.score, self._is_right(verdict.score), verdict.answer, verdict.failed)
            for verdict in verdicts
        ]

    def check_rewards(self) -> None:
        """Calls the reward functions on the first example.

        Raises:
            ValueError: If one fails, as where a column is missing, or could not run the tests of any example.
        """
        if self.rewards is not None:
            if code_reward in self.rewards.functions:
                check_code_data(self.problems, self.name)
            row = self.problems[0]
            gold = self.golds([row])[0]
            try_rewards(self.rewards, row, self.name, in_a_box(gold) if gold else "I don't know.")

    def _is_right(self, reward: float | None) -> float | None:
        return None if reward is None else float(reward >= self.threshold - TOLERANCE)

    def asked_of(self, tokenizer: PreTrainedTokenizerBase, model: str) -> "Task":
        """The task in a form for a model: as text if its tokenizer has no chat template."""
        if tokenizer.chat_template is not None:
            return self
        return replace(self, problems=without_chat_template(self.problems, model))


def load_task(
    name: str,
    prompt: str | None = None,
    system_prompt: str | None = None,
    kind: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    rewards: RewardSum | None = None,
    threshold: float = 1.0,
    reasoning_gym: dict[str, Any] | None = None,
    overrides_scorers: bool = False,
) -> Task:
    """The task that a name stands for, for evaluation: of data with several splits, `test`.

    Named problem sets and reasoning-gym have their own scorers. Other data is scored by `rewards`, or without them by
    its right answers.

    Args:
        name, prompt, system_prompt, problem_column, answer_column, limit, reasoning_gym: As for `load_examples`.
            Data with its own prompts is used without the template.
        kind (`str`, *optional*): Of the right answers; `"maths"` if unset.
        rewards (`RewardSum`, *optional*): What scores.
        threshold (`float`): The reward from which a completion counts as right.
        overrides_scorers (`bool`): Whether `rewards` also score data with its own scorer.

    Raises:
        ValueError: If the data is not available, or nothing can score it.
    """
    if rewards is not None and kind is not None:
        raise ValueError("`kind` and `reward_funcs` are two ways to score. Leave one of them out.")
    columns = {"problem_column": problem_column, "answer_column": answer_column}
    own_kind = None if is_generated(name) else problem_set(name, **columns, kind=kind).kind
    problems = load_examples(
        name,
        prompt=prompt,
        system_prompt=system_prompt,
        limit=limit,
        reasoning_gym=reasoning_gym,
        prefer=("test", "train"),
        needs_template=False,
        **columns,
    )
    gold = answer_column or ("solution" if "solution" in problems.column_names else None)
    if (has_name(name) or is_generated(name)) and not overrides_scorers:
        rewards = None
    if rewards is None and is_generated(name):
        rewards = RewardSum((reasoning_gym_reward,), (1.0,))
    if rewards is not None:
        return Task(name, OWN_REWARD, problems, rewards, gold, threshold)
    if gold is None:
        raise ValueError(
            f"Nothing scores {name}: it has no right answers. Set `answer_column` to the column that has them, or "
            "`reward_funcs` to functions that score it."
        )
    return Task(name, own_kind, problems, None, gold, threshold)
