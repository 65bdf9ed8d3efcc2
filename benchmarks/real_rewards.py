"""The reward of the boards of `real_gpu.py`: what reasoning-gym's own scorer gives."""

import functools
import re

import reasoning_gym


TASK = "game_of_life"


@functools.cache
def _scorer():
    return reasoning_gym.get_score_answer_fn(TASK)


def board_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """The part of the cells that are right in the first line, 0.0 where that is no board."""
    lines = [text.strip().split("\n")[0] for text in completions]
    return [
        float(_scorer()(line, {"answer": wanted})) if re.fullmatch(r"\[[\[\]\d, ]*", line) else 0.0
        for line, wanted in zip(lines, answer, strict=True)
    ]
