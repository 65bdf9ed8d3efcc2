"""Which part of a completion is its code: fenced blocks of Markdown, as models write them."""

import re
import textwrap
from collections.abc import Set


_FENCE = re.compile(r"([ \t]*+(?:(?:[-*+>]|\d{1,9}[.)])[ \t]*+)*+)(`{3,}|~{3,})([^`]*+)")
"""What is before it (of a list or a quotation), the marks, and the info string."""
_PYTHON = re.compile(r"[{. \t]*(?:python|py)(?:3(?:\.\d+)?)?(?![\w-])", re.IGNORECASE)
_TRIPLE = re.compile(r'"""|\'\'\'')
_QUOTED = re.compile(r"[ \t]*(?:>[ \t]?)+")
_THOUGHT = re.compile(r"(?<![\"'])<(/?)think>(?![\"'])")  # between quotes it is a string of the code
_DEFINED = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)
_ASSIGNED = re.compile(r"^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE)
_IMPORTED = re.compile(r"^(?:from[ \t]+\S+[ \t]+)?import[ \t]+(.+)", re.MULTILINE)
_WORD = re.compile(r"\w+")


def extract_code(completion: str, names: Set[str] = frozenset()) -> str | None:
    """The code of a completion, or `None` if there is none.

    It is the last Python block that defines one of the names; without names, or if no block does, the last that
    defines anything; else the last. Earlier blocks that define what it uses come before it. A block without a language
    may be Python, and a last one without an end counts. A completion without any fence is code if it defines
    something. Text written while thinking is not used.

    Args:
        completion (`str`): Its text.
        names (`Set[str]`): What the tests call.
    """
    text = _after_thinking(completion.replace("\r\n", "\n").replace("\r", "\n"))
    fenced = _fenced_blocks(text)
    if not fenced:
        return text if _DEFINED.search(text) else None
    tagged = [source for info, source in fenced if _PYTHON.match(info)]
    blocks = [source for info, source in fenced if _PYTHON.match(info) or not info.strip()]
    wanted = [i for i, block in enumerate(blocks) if names & _bound(block)]
    defining = [i for i, block in enumerate(blocks) if _DEFINED.search(block)]
    if not (wanted or defining):
        return (tagged or blocks or [None])[-1]
    return _with_what_it_uses(blocks[: (wanted or defining)[-1] + 1], names)


def _bound(block: str) -> set[str]:
    return {*_DEFINED.findall(block), *_ASSIGNED.findall(block)}


def _with_what_it_uses(blocks: list[str], names: Set[str]) -> str:
    """The last block, after those that define or import what it, or the tests, use and it doesn't define."""
    parts, bound, used = [blocks[-1]], _bound(blocks[-1]), {*_WORD.findall(blocks[-1]), *names}
    for block in reversed(blocks[:-1]):
        own = _bound(block)
        imported = {word for line in _IMPORTED.findall(block) for word in _WORD.findall(line)}
        if (own | imported) & used - bound and not own & bound:
            parts.insert(0, block)
            bound |= own
            used |= set(_WORD.findall(block))
    return "".join(parts)


def _after_thinking(text: str) -> str:
    """The text after the last closed thought, up to an unclosed one."""
    start, end = 0, len(text)
    for mark in _THOUGHT.finditer(text):
        if mark[1]:
            start, end = mark.end(), len(text)
        else:
            end = min(end, mark.start())
    return text[start:end]


def _fenced_blocks(text: str, heeds_strings: bool = True) -> list[tuple[str, str]]:
    """The info string and the content of each block that is not empty.

    A fence in a triple-quoted string does not end a block. Anywhere else a fence with a language begins a block:
    models forget to close one, or put Python into a block of Markdown.
    """
    blocks: list[tuple[str, str]] = []
    marks, info, prefix, lines, quote = "", "", "", [], None

    def close() -> None:
        source = textwrap.dedent("".join(line + "\n" for line in lines))
        if marks and source.strip():
            blocks.append((info, source))

    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip()) if quote is None else None
        if fence and not marks:
            prefix, marks, info, lines = fence[1], fence[2], fence[3], []
        elif fence and fence[2][0] == marks[0] and fence[3].strip():
            close()
            prefix, marks, info, lines = fence[1], fence[2], fence[3], []
        elif fence and fence[2].startswith(marks):
            close()
            marks = ""
        elif marks:
            line = (
                _QUOTED.sub("", line, count=1) if ">" in prefix else line[: len(prefix)].lstrip() + line[len(prefix) :]
            )
            lines.append(line)
            for found in _TRIPLE.findall(line) if heeds_strings else ():
                quote = None if found == quote else quote or found
    if marks and quote is not None:  # not a string of the code but other text with three quotes
        return _fenced_blocks(text, heeds_strings=False)
    close()
    return blocks
