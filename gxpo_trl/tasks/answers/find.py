r"""The final answer of a text: its last box, or the formula after the word "answer". In linear time."""

import re


_BOX = re.compile(r"\\f?boxed(?![a-zA-Z])\s*(?:\{|(\\[a-zA-Z]+(?:\{[^{}]*\})*|-?[\w.,/]*\w))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(
    r"(?:[\s$,;&]|\\[()\[\],;]|\\q?quad|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\}|[a-zA-Z](?:_\{?\w+\}?)?\s*=){0,80}"
)
_STATED = re.compile(
    r"(?is)answer(?:(?!answer|not\b|never|wrong|cannot|n't)[^$]){0,99}?(?:\$\$?([^$]{1,999})\$|\\[(\[](.{1,999}?)\\[)\]])"
)


def final_answer(completion: str) -> str | None:
    r"""The LaTeX of a text's final answer, or `None`. Thoughts don't count.

    Boxes with nothing but a separator between them are one list. An empty box, as in "put it within \boxed{}", is a
    mention of one. A box that is cut off is not an answer.
    """
    text = after_thinking(completion)
    if "boxed" not in text:
        stated = _STATED.findall(text[-20_000:])
        return "".join(stated[-1]).strip() or None if stated else None
    contents, following = [], None
    for start, content, end in reversed(_boxes(text)):
        if following is not None and not _BETWEEN.fullmatch(text, end + 1, following):
            break
        contents.append(text[content:end].strip())
        following = start
    return ",".join(dict.fromkeys(reversed(contents))) or None


def after_thinking(text: str) -> str:
    """The text after its thoughts; empty if they don't end."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Start, content's start and content's end of the boxes that hold something and aren't in others."""
    found, end = [], -1
    for box in (box for box in _BOX.finditer(text) if box.start() >= end):
        depth, (content, end) = 1, box.span(1)
        for brace in () if box[1] else _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            content, end = box.end(), brace.start()
            if not depth:
                break
        if depth and not box[1]:
            return []
        if text[content:end].strip():
            found.append((box.start(), content, end))
    return found
