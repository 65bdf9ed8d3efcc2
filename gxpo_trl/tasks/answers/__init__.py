"""One definition of a right mathematical answer, for rewards, evaluation and votes.

`find` takes the final answer from a text, `normalize` gives it one spelling, `values` reads and evaluates it, and
`compare` decides. Long answers are compared only as texts, so that no answer takes long.
"""

from dataclasses import dataclass

from .compare import judge, vote
from .find import final_answer


@dataclass(frozen=True)
class Verdict:
    """The verdict on one answer."""

    score: float | None  # 1.0 if right, 0.0 if wrong or undecided; `None` if the gold can't be read
    answer: str | None  # in a normal form, equal for equivalent answers: used for majority votes
    failed: bool = False  # whether it could not be decided, because the check failed


def verify_maths(completion: str, gold: str) -> Verdict:
    r"""Whether a text's final answer is the gold one: a bare one, or a solution's in `\boxed{…}` or after `####`."""
    answer = final_answer(completion)
    if answer is None:
        return Verdict(0.0, None)
    try:
        gold = final_answer(gold) or "" if "\\boxed" in gold else gold.rpartition("####")[2]
        return Verdict(judge(gold, answer), vote(answer))
    except RecursionError:  # brackets that are nested by the hundred
        return Verdict(0.0, None, failed=True)
