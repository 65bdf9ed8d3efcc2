r"""Whether an answer is the gold one: by form, then by value."""

import re

from .normalize import normalize
from .values import Answer, Element, equal, mp


LONGEST = 2000  # characters of an answer that is more than compared as a text
_OPTION = re.compile(r"\\text\{\s*\(([A-J])\)\s*\}?\s*([^\s{}][^{}]*)\}?")


def judge(gold: str, answer: str) -> float | None:
    """1.0 for the gold answer, in LaTeX or plain text, 0.0 for another; `None` if the gold can't be read."""
    if gold.strip() and max(len(gold), len(answer)) > LONGEST:
        return float(gold.strip() == answer.strip())
    gold, answer = normalize(gold), normalize(answer)
    if not key(gold) or len(re.findall(r"[(\[{]", gold)) != len(re.findall(r"[)\]}]", gold)):
        return 1.0 if key(gold) == key(answer) != "" else None
    golds = {gold, _joined(gold)} if re.match(r"\D*\d{3}", gold) else {_joined(gold)}  # 2,125 is not a list
    answer, golds = _with_units(answer, gold), {_with_units(text, answer) for text in golds}
    golds, answer = golds | {_24_hours(text, answer) for text in golds}, _with_constant(answer, gold)
    answers = {answer, _joined(answer), _24_hours(answer, gold)}
    if re.search(r"\d\.\d", gold):  # where 0,5 is no list
        answers.add(re.sub(r"^([^\d,()\[\]]*\d+),(?=\d+(?![\d,])[^,]*$)", r"\1.", answer))
    return float(any(_match(g, a) for g in golds for a in answers))


def key(text: str) -> str:
    """A key that is equal for answers with the same spelling."""
    text = re.sub(r"\\text\s*\{\(?([^{}()]*)\)?\}", r"\1", text)
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", re.sub(r"([_^])\{(\w)\}", r"\1\2", text))


def _joined(text: str) -> str:
    """`100200` for `100,200`, which is a list as well."""
    return re.sub(r"^[^\d,()\[\]]*\d{1,3}(?:,\d{3})+(?![\d,])[^,]*$", lambda m: m[0].replace(",", ""), text)


def _with_units(text: str, other: str) -> str:
    """A letter after a number is a unit, not a variable, if it is one in the other text: 25 s and 25 seconds."""
    names = "".join(re.findall(r"\\unit\{([a-zA-Z])\}", other))
    return re.sub(rf"(?<=[\d}}]) ?([{names}])$", r"\\unit{\1}", text) if names else text


def _with_constant(text: str, other: str) -> str:
    """A constant of integration may be `c` or `C`, where it is no variable."""
    constants = [re.fullmatch(r"(.*)\+ ?([cC])", one) for one in (text, other)]
    is_free = all(one and "c" not in re.sub(r"\\[a-z]+", "", one[1]).lower() for one in constants)
    return text[:-1] + constants[1][2] if is_free else text


def _24_hours(text: str, other: str) -> str:
    """`20:34` for 8:34 p.m., where the other text has 24 hours."""
    time = re.fullmatch(r"(1[0-2]|[1-9])(:[0-5]\d) ?\\unit\{([ap])m\}\s*", text)
    time = time if re.fullmatch(r"\d\d?:[0-5]\d", other) else None
    return f"{int(time[1]) % 12 + 12 * (time[3] == 'p')}{time[2]}" if time else text


def _match(gold: str, answer: str) -> bool:
    """All alternatives must be right. A percentage may be its number, and a number from 1 on may be of percents."""
    if key(gold) == key(answer) or _same_at_points(gold, answer):
        return True
    if (option := _OPTION.fullmatch(answer)) and not _OPTION.fullmatch(gold):
        return key(gold) == option[1] or _match(gold, normalize(option[2]))
    if r"\vee" in answer:
        return all(_match(gold, alternative) for alternative in answer.split(r"\vee"))
    is_percent = (r"\%" in gold) != (r"\%" in answer) and (r"\%" in gold or _may_be_of_percents(gold))
    return is_percent and _same_at_points(gold.replace(r"\%", ""), answer.replace(r"\%", ""))


def _may_be_of_percents(gold: str) -> bool:
    """Whether it is a number, and no share: 12.5 and not 0.125."""
    read = Answer(gold, 0, True)
    values = [element.value for element in read.elements]
    return (
        len(values) == 1 and not (read.names or read.has_units or isinstance(values[0], tuple)) and abs(values[0]) >= 1
    )


def _same_at_points(gold: str, answer: str) -> bool:
    """Whether two answers are the same at all points where they can be read, of which there is one."""
    found, tolerance = [], mp.zero
    for point in range(6):
        units = Answer(gold, point, True).has_units and Answer(answer, point, True).has_units  # else they are left out
        one, other = Answer(gold, point, units), Answer(answer, point, units)
        golds, answers = one.elements, other.elements
        if golds and answers:
            if len(golds) != len(answers) and r"\{" not in gold + answer:  # (1, 2) for x = 1, y = 2
                golds, answers = ([Element(("()", some))] if len(some) > 1 else some for some in (golds, answers))
            found.append((Element(("{}", golds)), Element(("{}", answers))))
            if one.names == other.names == 0:
                digits, least = min((one.digits, 4), (other.digits, 5))
                tolerance = mp.mpf(10) ** -digits * 5 if one.digits != other.digits and digits >= least else mp.zero
                break
            if not _same(*found[-1]) and mp.isnan(golds[0].difference + answers[0].difference):  # no equations
                return False
    return bool(found) and (all(_same(*pair, tolerance) for pair in found) or _same_equation(found))


def _same(gold: Element, answer: Element, tolerance: mp.mpf = mp.zero) -> bool:
    """Whether values are the same, and names where both have one. A name without a value is not an expression."""
    names = {re.sub(r"^[a-z]\([a-z]\)$", "y", element.name) for element in (gold, answer) if element.name}
    is_expression = not answer.name and re.match(r"\d|.*[-+*/^=<>|]", gold.name)
    is_expression = is_expression or not gold.name and answer.name[:1] == "-"
    if len(names) > 1 or is_expression or isinstance(gold.value, tuple) != isinstance(answer.value, tuple):
        return False
    if not isinstance(gold.value, tuple):
        return equal(gold.value, answer.value, tolerance)
    (brackets, parts), (other_brackets, other_parts) = gold.value, answer.value
    if len(parts) != len(other_parts):
        return False
    table = [[_same(one, other, tolerance) for other in other_parts] for one in parts]
    if brackets == other_brackets == "{}":  # in any order, each as often
        free = set(range(len(parts)))
        for row in table:
            found = next((place for place in free if row[place]), None)
            if found is None:
                return False
            free.remove(found)
        return True
    is_interval = len(parts) == 2 and not isinstance(parts[0].value, tuple)
    is_alike = brackets == other_brackets or not is_interval and {brackets, other_brackets} == {"()", "[]"}
    return is_alike and all(row[place] for place, row in enumerate(table))


def _same_equation(found: list[tuple[Element, Element]]) -> bool:
    """Whether the differences of the two sides are in a constant ratio, as of `y = 2x` and `2y - 4x = 0`.

    That of inequalities must be positive: `x < 1` is `-x > -1`.
    """
    if len(found) < 2 or any(len(elements.value[1]) != 1 for pair in found for elements in pair):
        return False
    pairs = [(golds.value[1][0], answers.value[1][0]) for golds, answers in found]
    ratios = [one.difference / other.difference for one, other in pairs]
    if any(one.relation != other.relation or one.relation and not mp.re(ratios[0]) > 0 for one, other in pairs):
        return False
    return all(equal(ratios[0], ratio) for ratio in ratios)


def vote(text: str) -> str:
    """A normal form, equal for answers that are written alike or have the same values."""
    if len(text) > LONGEST:
        return text
    text = re.sub(r"\b[a-zA-Z]\s*=", "", _joined(normalize(text)))
    answer = Answer(text, 0, False)
    if answer.names or not answer.elements:
        return key(text).replace(r"\cdot", "").strip("()").lower()
    return ", ".join(sorted(map(_shown, answer.elements)))


def _shown(element: Element) -> str:
    if isinstance(element.value, tuple):
        return ", ".join(map(_shown, element.value[1])).join(element.value[0])
    return mp.nstr(element.value, 15).removesuffix(".0")
