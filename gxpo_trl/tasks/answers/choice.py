"""Multiple choice: how questions are asked, and which letter a completion chooses."""

import re

from .find import after_thinking, final_answer


LETTERS = "ABCDEFGHIJ"

_DECORATION = r"(?:[*_$(\[{\s\"']|\\[(\[]|\\(?:text|math)[a-z]{0,6}\s?\{|\b(?i:option|choice|answer)\b[\s:]){0,8}"
_LETTER = re.compile(rf"{_DECORATION}([A-Ja-j])(?![^\W\u4e00-\u9fff]|['’]\w|[\^_]|\.[a-z]\.)([^\n]{{0,40}})")
_CUE = re.compile(
    r"\b(?:answers?|choices?|options?|it|i (?:choose|pick|select)|would (?:choose|pick|select)|go with)\b|答案"
    r"|\b(?:choose|pick|select)\b",
    re.IGNORECASE,
)
_LINK = re.compile(
    r"(?:[\s*_#:=：—–是为-]{1,5}|'s\b|\b(?:is|was|be|are|must|would|should|will|seems|to|think|believe|it|therefore|final|clearly"
    r"|correct|right|probably|definitely|option|choice|answer|i(?=\s(?:think|believe|would|should|will|must)\b))\b){0,12}",
    re.IGNORECASE,
)
_SAYS = re.compile(r"[:：=—–是为]|'s\b|\b(?:is|was|be|are|must|would|should|will|seems)\b|答案", re.IGNORECASE)
_CHOOSES = re.compile(r"(?:i|would) (?:choose|pick|select)|go with|答案", re.IGNORECASE)
_RIGHT = re.compile(r"\b(?:correct|right|best|final|my)\s$", re.IGNORECASE)
_REJECTED = re.compile(r"[\s)*}\]$\"']{0,9}(?:is|are|was|would be|can)\s?(?:not\b|n't\b|in\w|wrong\b|false\b|too\b)")
_PREDICATE = re.compile(
    rf"(?<![\w'’])(?!I (?:must|would)\b)([{LETTERS}])\)?\**\s(?:is|must be|would be|seems to be)\s"
    r"(?:the\s|clearly\s){0,2}(?:correct|right|best|answer)\b(?!\s(?:if|only|had)\b)"
)
_CONCLUSION = re.compile(rf"\b(?i:so|thus|hence|therefore)\b[,:]?\s{_DECORATION}([{LETTERS}])[\W_]{{0,9}}$")
_DOUBT = re.compile(r"\b(?:if|not|never|suppose|assume|assuming|unless|whether)\b|n't\b", re.IGNORECASE)
_CONDITION = re.compile(r"\b(?:if|were|had|unless)\b", re.IGNORECASE)
_MARKED = re.compile(rf"(?:^|[\s,(/*])[{LETTERS}](?=\s?[):.,*]|\s(?:or|and)\b|\s*$)")
_REASON = re.compile(
    r"[\s)*}\]$\"']{0,9}(?:[.,;:!)*}\]$—–。，]|- |over\b|because\b|since\b|as\b|for\b|not\b|$)|\\\)|\s[—–-]\s"
)
_LIST = re.compile(
    rf"[\s)*]{{0,4}}(?:,|/|or\b|and\b)[\s(*]{{0,4}}(?:or\s)?[(*]{{0,3}}(?:[{LETTERS}]|[IVX]{{2,4}})"
    r"(?=[),.*/]|\s(?:or|and)\b|\s*$)"  # I, II and IV are numerals
)
_ALONE = re.compile(r"[\W_]{0,9}(?:(?i:option|choice)\s)?([A-Ja-j])[\W_]{0,9}")
_WITH_OPTION = re.compile(r"\W{0,4}([A-Ja-j])\)?[.:)]\s?\S.{0,200}")
_BOLD_AT_THE_END = re.compile(rf"\*\*\s?\(?([{LETTERS}])\)?\s?\.?\s?\*\*\s?\.?$")


def choose(completion: str, gold: str) -> tuple[float | None, str | None]:
    """Whether a completion chooses the right letter.

    Args:
        completion (`str`): Only the text after its thoughts is read. A last boxed letter comes first, then the last
            one that is called the answer, then the last one that is only named as a choice or would be the answer
            under a condition, then one that is by itself or in bold at the end, or by itself in the first line. Of a
            text with `<answer>` tags only what the last ones hold is read. Several letters are not a choice, and
            neither is one that is denied, asked for or supposed.
        gold (`str`): The right letter.

    Returns:
        `tuple[float | None, str | None]`: 1.0 or 0.0, `None` without a right letter; and the letter
            that was chosen, if one was.
    """
    text = after_thinking(completion).strip()
    letter = _boxed(text) if "\\boxed" in text else None
    if letter is None:
        _, tag, tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
        text = tagged.strip() if tag else text
        letter = _stated(text) or _standing_alone(text)
    letter = letter and letter.upper()
    right = gold.strip(" ().").upper()
    return (float(letter == right) if right else None), letter or None


def _boxed(text: str) -> str | None:
    """The letter in the last box, `""` for several, `None` for something else."""
    content = re.sub(r"\\f?boxed", "", final_answer(text) or "")
    found = _LETTER.match(content)
    if not found:
        return "" if re.fullmatch(rf"[{LETTERS}]{{2,}}", content) else None
    if _MARKED.search(found[2]) or (found[1].islower() and len(content.strip("(){}$ ")) > 1):
        return ""
    return found[1] if re.match(r"[\s)}\]$*.:,]*(?:$|(?<=[.:)}\s,])\S)", found[2]) else None


def _stated(text: str) -> str | None:
    """The last letter that is said to be the answer, or else the last that is only named: "option C"."""
    said, named, listed = [], [], []
    for cue in _CUE.finditer(text):
        found = _LETTER.match(text, _LINK.match(text, cue.end()).end())
        if not found or not _is_stated(found[1], found[2]) or _DOUBT.search(_sentence(text, cue.start())):
            continue
        place = found.start(1), found[1]
        is_said = _CHOOSES.fullmatch(cue[0]) or _SAYS.search(text[cue.end() : found.start(1)])
        if _is_supposed(text, cue.start(), found.start(1)):
            named.append(place)
        elif is_said or _RIGHT.search(text[max(0, cue.start() - 9) : cue.start()]):
            said.append(place)
        elif re.match(r"[)*\s]{0,4}:", found[2]):  # one of several that are gone through, or the only one
            listed.append(place)
        elif _REASON.match(found[2]):
            named.append(place)
    for found in _PREDICATE.finditer(text):
        if not _DOUBT.search(_sentence(text, found.start())):
            (named if _is_supposed(text, *found.span()) else said).append((found.start(1), found[1]))
    if not said and (concluded := _CONCLUSION.search(text[-60:])):
        return concluded[1]
    if not (said or named) and len({letter for _, letter in listed}) == 1:
        named = listed
    return max(said or named)[1] if said or named else None


def _is_stated(letter: str, after: str) -> bool:
    if _LIST.match(after) or _REJECTED.match(after) or re.match(r"[\s)*.]{0,4}\?", after):
        return False
    if letter.isupper() and letter not in "AI":
        return not re.match(r"\s?[=+^<>]", after)
    return bool(_REASON.match(after)) and not (letter.islower() and re.match(r"\s\w", after))


def _is_supposed(text: str, start: int, end: int) -> bool:
    """Whether it says what would be, and the sentence says when."""
    sentence = (
        re.split(r"[.!?\n]", text[max(0, start - 200) : start])[-1] + re.split(r"[.!?\n]", text[end : end + 200])[0]
    )
    return "would" in text[start:end] and bool(_CONDITION.search(sentence))


def _sentence(text: str, end: int) -> str:
    """What stands before a place in its sentence."""
    return re.split(r"[.!?\n,;:]", text[max(0, end - 80) : end])[-1]


def _standing_alone(text: str) -> str | None:
    lines = text.splitlines() or [""]
    found = _ALONE.fullmatch(lines[-1].strip()) or (len(lines) == 1 and _WITH_OPTION.fullmatch(text))
    found = found or (_BOLD_AT_THE_END.search(lines[-1].strip()[-20:]) if not _DOUBT.search(lines[-1][-80:]) else None)
    if not found and (first := _ALONE.fullmatch(lines[0].strip())) and not any(map(_ALONE.fullmatch, lines[1:])):
        found = first
    return found[1] if found else None


def format_choices(question: str, options: list[str]) -> str:
    """The question, its options with letters, and how to answer.

    Raises:
        ValueError: If there are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"A question has {len(options)} options, and there are letters for {len(LETTERS)}.")
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), "", *lines, "", "Put the letter of the right option within \\boxed{}."])
