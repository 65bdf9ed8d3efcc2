"""Correctness by kind of problem. Rewards in training and scores in evaluation use the same functions.

Each problem set has a kind of answers (`tasks/datasets.py`):

- `maths`: the last boxed answer equals the gold one, in form and value;
- `choice`: the letter that is chosen is the gold one;
- `arithmetic`: the embedded task's, a plain boxed number.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date, datetime
from datetime import time as time_of_day
from typing import Any

from ..spelling import nearest
from .answers import Verdict, verify_maths
from .answers.choice import choose
from .arithmetic import arithmetic_reward, last_boxed_number


KINDS = ("maths", "choice", "arithmetic")

Completion = str | list[dict[str, Any]]
"""A text, or the messages of a conversational completion."""


def judge(kind: str, completions: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
    """Scores completions against the right answers.

    Args:
        kind (`str`): `"maths"`, `"choice"` or `"arithmetic"`.
        completions, golds (`Sequence[str]`): Texts, and one right answer for each.

    Returns:
        `list[Verdict]`: 1.0, 0.0, or `None` if the gold can't be read; and the answers that were read.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind == "maths":
        return [verify_maths(completion, gold) for completion, gold in zip(completions, golds, strict=True)]
    if kind == "choice":
        return [Verdict(*choose(completion, gold)) for completion, gold in zip(completions, golds, strict=True)]
    if kind == "arithmetic":
        scores = arithmetic_reward([[{"content": completion}] for completion in completions], list(golds))
        return [Verdict(score, last_boxed_number(text)) for score, text in zip(scores, completions, strict=True)]
    raise ValueError(f"There is no kind of answer `{kind}`{nearest(kind, KINDS)} Kinds are {', '.join(KINDS)}.")


def text_of(completion: Completion) -> str:
    """The text of a completion; if it is conversational, of its last message. It is empty if it only calls tools."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    return content or ""


def texts_of(completions: Sequence[Completion]) -> list[str]:
    """The text of each completion.

    Raises:
        ValueError: If one is neither a text nor messages. The message names its row.
    """
    texts = []
    for row, completion in enumerate(completions):
        try:
            texts.append(text_of(completion))
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"Completion {row} of the batch is {completion!r:.100}: a text or messages with `content` is expected."
            ) from error
    return texts


def golds_of(solution: Sequence[Any]) -> list[str]:
    """Right answers as texts, also for numbers and lists (within lists: tuples); `""` for `None`."""
    return [_gold_text(gold, row) for row, gold in enumerate(solution)]


def listed(answers: Sequence[Any], text: Callable[[Any], str]) -> str:
    """Several answers as one text: `1, 2` for `[1, 2]`, and `(1, 2), (3, 4)` for `[[1, 2], [3, 4]]`."""
    return ", ".join(
        f"({listed(answer, text)})" if isinstance(answer, (list, tuple)) else text(answer) for answer in answers
    )


def date_text(moment: date) -> str:
    """A date, or a time, without its hours if it is a date's: the loader of JSON makes times of dates."""
    is_date = isinstance(moment, datetime) and moment.time() == time_of_day()
    return str(moment.date() if is_date else moment)


def _plain(gold: Any) -> Any:
    return gold.tolist() if hasattr(gold, "tolist") else gold  # of numpy, or a tensor


def _gold_text(gold: Any, row: int) -> str:
    gold = _plain(gold)
    if isinstance(gold, (list, tuple)):
        return listed(list(map(_plain, gold)), lambda element: _gold_text(element, row))
    if gold is None or isinstance(gold, float) and math.isnan(gold):
        return ""
    if isinstance(gold, date):
        return date_text(gold)
    if isinstance(gold, (str, int, float)):
        return str(gold)
    raise ValueError(f"The solution of row {row} is {gold!r:.100}: a text, a number or a list of them is expected.")


def maths_reward(
    completions: list[Completion],
    solution: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """1.0 for the right final answer, 0.0 for a wrong one or none; `None`, with a warning, if the gold can't be read.

    If the check fails on an answer, it is wrong: 0.0. Logs `verify_failures`, the number of such answers in the batch,
    and `verify_time` in seconds.

    Args:
        completions (`list[Completion]`): In TRL's form.
        solution (`list[str]`): Right answers, one for each completion. Numbers and lists are accepted too.
        log_metric, log_extra: Provided by TRL's trainers.
    """
    started = time.perf_counter()
    golds = golds_of(solution)
    verdicts = judge("maths", texts_of(completions), golds)
    for row, verdict in enumerate(verdicts):
        if verdict.score is None:
            warnings.warn(
                f"The solution of row {row} can't be read as an answer: {solution[row]!r:.100}. Its completions get "
                "no reward. Give a number, LaTeX, or words.",
                stacklevel=2,
            )
    if log_metric is not None:
        log_metric("verify_failures", float(sum(verdict.failed for verdict in verdicts)))
        log_metric("verify_time", time.perf_counter() - started)
    if log_extra is not None:
        log_extra("solution", golds)
        log_extra("answer", [verdict.answer or "" for verdict in verdicts])
    return [verdict.score for verdict in verdicts]


def choice_reward(completions: list[Completion], solution: list[str], **kwargs) -> list[float | None]:
    """1.0 if a completion chooses the right letter, else 0.0; `None` if there is no right letter."""
    return [verdict.score for verdict in judge("choice", texts_of(completions), golds_of(solution))]


def boxed_format_reward(completions: list[Completion], **kwargs) -> list[float]:
    """1.0 for a completion with exactly one `\\boxed{…}`, which is in its last line; else 0.0."""
    texts = [text.rstrip() for text in texts_of(completions)]
    return [float(t.count("\\boxed{") == 1 and "\\boxed{" in t.rsplit("\n", 1)[-1]) for t in texts]
