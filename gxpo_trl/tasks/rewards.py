"""What is correct, by kind of problem: rewards in training and scores in evaluation are these functions.

A problem set says of which kind its answers are (`tasks/datasets.py`):

- `maths`: the last boxed answer equals the gold one, by math-verify, in worker processes with a time limit;
- `choice`: the letter that is chosen is the gold one;
- `arithmetic`: the embedded task's, a plain boxed number.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ..spelling import nearest
from .arithmetic import arithmetic_reward, last_boxed_number
from .choice import choose
from .maths import Verdict
from .verifier import shared_pool


KINDS = ("maths", "choice", "arithmetic")

Completion = str | list[dict[str, Any]]
"""A text, or the messages of a conversational completion."""


def judge(kind: str, completions: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
    """Scores completions against the right answers.

    Args:
        kind (`str`): `"maths"`, `"choice"` or `"arithmetic"`.
        completions, golds (`Sequence[str]`): Texts, and as many answers as the problem set has them.

    Returns:
        `list[Verdict]`: 1.0, 0.0, or `None` where it could not be decided; and the answers that were given.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind == "maths":
        return shared_pool().verify(list(completions), list(golds))
    if kind == "choice":
        return [Verdict(*choose(completion, gold)) for completion, gold in zip(completions, golds, strict=True)]
    if kind == "arithmetic":
        scores = arithmetic_reward([[{"content": completion}] for completion in completions], list(golds))
        return [Verdict(score, last_boxed_number(text)) for score, text in zip(scores, completions, strict=True)]
    raise ValueError(f"There is no kind of answer `{kind}`{nearest(kind, KINDS)} Kinds are {', '.join(KINDS)}.")


def text_of(completion: Completion) -> str:
    """The text of a completion: of its last message, if it is conversational."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def maths_reward(
    completions: list[Completion],
    solution: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """1.0 for the right final answer, 0.0 for a wrong one or none, `None` where it could not be decided in time.

    Logs `verify_failures`, the answers of the batch that could not be decided, and `verify_time` in seconds.

    Args:
        completions (`list[Completion]`): In TRL's form.
        solution (`list[str]`): Right answers, one a completion.
        log_metric, log_extra: Provided by TRL's trainers.
    """
    started = time.perf_counter()
    verdicts = judge("maths", [text_of(completion) for completion in completions], solution)
    if log_metric is not None:
        log_metric("verify_failures", float(sum(verdict.score is None for verdict in verdicts)))
        log_metric("verify_time", time.perf_counter() - started)
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("answer", [verdict.answer or "" for verdict in verdicts])
    return [verdict.score for verdict in verdicts]


def choice_reward(completions: list[Completion], solution: list[str], **kwargs) -> list[float | None]:
    """1.0 where the letter that a completion chooses is the right one, else 0.0."""
    return [verdict.score for verdict in judge("choice", [text_of(c) for c in completions], solution)]


def boxed_format_reward(completions: list[Completion], **kwargs) -> list[float]:
    """1.0 for a completion with exactly one `\\boxed{…}`, and that in its last line; else 0.0."""
    texts = [text_of(completion).rstrip() for completion in completions]
    return [float(t.count("\\boxed{") == 1 and "\\boxed{" in t.rsplit("\n", 1)[-1]) for t in texts]
