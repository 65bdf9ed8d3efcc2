r"""The value of an answer at an arbitrary point: answers are equal if their values are equal at several points.

Nothing is summed or simplified: a text takes bounded time. What is not known, as `\sum`, is a symbol like any other.
"""

import re
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

from mpmath import MPContext


mp = MPContext()
mp.dps = 700  # which tell 2^{2005} + 1 from 2^{2005}
_CIRCULAR = "sin cos tan cot sec csc sinh cosh tanh".split()
FUNCTIONS = {name: getattr(mp, name) for name in (*_CIRCULAR, "exp", "ln", "sqrt")}
FUNCTIONS |= {"arc" + name: getattr(mp, "a" + name) for name in _CIRCULAR} | {"log": mp.ln, "lg": mp.log10, "abs": abs}
_CONSTANTS = {"e": +mp.e, "pi": +mp.pi, "i": mp.j, "infty": mp.inf, "degree": +mp.degree, "unitrad": mp.one}
_CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}", "lvert": "rvert", "lfloor": "rfloor", "lceil": "rceil"}
_TIMES, _DIVIDED, _SEPARATORS = ("*", "cdot", "times", "ast"), ("/", "div", ":"), (",", ";", "vee", "cup")
_STRIDES = {"n": 1, "m": 7, "k": 11}  # of integers from point to point: six of them have all remainders of 2 to 6
_UNION = "<>"  # the brackets of what has intervals among its parts
_ORDERED = {  # operators whose sides can't be exchanged, that bind less than sums or more
    **dict.fromkeys("to mapsto implies subset subseteq supset supseteq models vdash prec succ nmid".split(), 0.5),
    **dict.fromkeys("setminus circ".split(), 1.5),
}
_EQUAL, _FLIPPED = ("=", "in", "equiv"), {"<": ">", ">": "<", "le": "ge", "ge": "le"}
_ENDS = (*"_)]", "", *_CLOSING.values(), *_SEPARATORS, *_EQUAL, *_FLIPPED)
_LEVELS = (
    _ORDERED | dict.fromkeys(_ENDS, 0) | {"+": 1, "-": 1, "^": 3, "!": 3, r"\%": 3}
)  # 2 of products, signed or not
_KNOWN = "|".join(filter(str.isalpha, ("frac", *FUNCTIONS, *_CLOSING, *_TIMES, *_DIVIDED, *_ENDS, *_ORDERED)))
_GROUP = r"\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?\w)"
_NAME = (  # `x`, `\theta_{w}`, `\dot{x}_0`, `y'`, and the value I(0), which is not a product
    rf"(?:\\(?:text|unit|mod|vec|hat|bar|d?dot|tilde|overline|mathbb|mathcal){_GROUP}|\\[a-zA-Z]+|[a-zA-Z])'*"
    rf"(?:\s*_{_GROUP})?'*(?:(?<![ei])\(\d+\))?"
)
_TOKEN = re.compile(rf"\s*(?:\\({_KNOWN})(?![a-zA-Z])|({_NAME})|(\\.|\d+(?:\.\d+)?|\.\d+|\S))")
_BETWEEN_WORDS = re.compile(  # hyphens, commas, full stops and apostrophes that are no signs
    r"(?<=[^\W\d]{2})-(?=[^\W\d])|(?<=[^\W\d])-(?=[^\W\d]{2})|[,;:](?= [^\W\d]{2})|(?<=[^\W\d]{2})[,;:](?= )"
    r"|(?<=[^\W\d]{2}),(?=[^\W\d]{2})|(?<=[^\W\d])\.(?!\d)|(?<=[^\W\d]{2})['!?]|'(?=[^\W\d])"
)


class Element(NamedTuple):
    """A value: a number, or a tuple's brackets and elements; its name, x of `x = 5`; the difference of the sides."""

    value: mp.mpf | tuple[str, list["Element"]]
    name: str = ""
    difference: mp.mpf = mp.nan
    relation: str = ""  # of an inequality, whose difference is below zero: `<` or `le`


def _parts(element: Element) -> list[tuple]:
    """Intervals and points, as ends: numbers with 1 or -1 where they are open, which is how these are in order."""
    brackets, elements = element.value if isinstance(element.value, tuple) else ("{}", [element])
    if brackets == _UNION:
        return [part for one in elements for part in _parts(one)]
    values = [mp.nan if isinstance(one.value, tuple) else one.value for one in elements]
    if any(mp.im(value) or mp.isnan(value) for value in values):
        raise ValueError("No real numbers.")
    if brackets == "{}":
        return [((value, 0), (value, 0)) for value in map(mp.re, values)]
    low, high = map(mp.re, values)
    if low >= high:
        raise ValueError("No interval.")
    return [((low, int(brackets[0] == "(")), (high, -int(brackets[1] == ")")))]


def _set(parts: list[tuple], name: str = "") -> Element:
    """Parts that touch are one: `[0, 2)` for `[0, 1]` and `(1, 2)`."""
    united: list[tuple] = []
    for low, high in sorted(parts):
        (value, openness), is_first = united[-1][1] if united else low, not united
        if is_first or low[0] > value or low[0] == value and low[1] - openness == 2:  # two open ends don't touch
            united.append((low, high))
        else:
            united[-1] = (united[-1][0], max(united[-1][1], high))
    elements = [
        Element(low[0] if low == high else ("[("[low[1]] + "])"[-high[1]], [Element(low[0]), Element(high[0])]), name)
        for low, high in united
    ]
    if not any(isinstance(element.value, tuple) for element in elements):
        return Element(("{}", elements))
    return elements[0] if len(elements) == 1 else Element((_UNION, elements))


def _without(element: Element, points: Element) -> Element:
    """The rest of an interval or a set without some points."""
    parts = _parts(element)
    for point, end in _parts(points):
        if point != end:
            raise ValueError("No finite set.")
        parts = [
            piece
            for low, high in parts
            for piece in ([(low, (point[0], -1)), ((point[0], 1), high)] if low <= point <= high else [(low, high)])
            if piece[0][0] < piece[1][0] or piece[0] == piece[1]
        ]
    return _set(parts)


def equal(one: mp.mpf, other: mp.mpf, tolerance: mp.mpf = mp.zero) -> bool:
    """Whether two numbers are the same, to 650 digits or with a relative tolerance."""
    return one == other or abs(one - other) < max(tolerance, mp.eps * 10**50) * max(abs(one), abs(other), 1e-50)


def _folded(text: str) -> str:
    """Words without what doesn't count: case, articles, spaces, plural. Signs, relations and decimal points do."""
    text = re.sub(r"[\\{}\"“”`]", "", text.lower()).strip(" .,;")
    text = re.sub(r"\b(?:an?|the) (?=[^\W\d])", "", re.sub(r"^\((\w+)\)$", r"\1", text))
    if " " in text:  # a word by itself may be a name: James
        text = re.sub(r"(?<=[^\W\d]{2}[^\W\ds])s\b", "", text)
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", _BETWEEN_WORDS.sub("", text))


def _bounded(number: mp.mpf, largest: int = 10**100) -> mp.mpf:
    if not (abs(number) <= largest or mp.isinf(number)):
        raise ValueError("This would take long.")
    return number


@lru_cache(maxsize=4096)
class Answer:
    """The `elements` of an answer, of which lists, sets and unions have several; none if it has no value.

    Args:
        text (`str`): Normalized LaTeX.
        point (`int`): Which numbers stand for variables. n, m and k are small integers, and others large ones at the
            first two points; then positive ones, and, where it is odd, negative ones, and values have to be real.
        units (`bool`): Whether units have values as variables have, or are dropped.
    """

    def __init__(self, text: str, point: int, units: bool) -> None:
        self.names, self.has_units, self.elements = 0, False, []
        self._point, self._units, self._in_call = point, units, False
        self.digits = min((len(d.replace(".", "").lstrip("0")) for d in re.findall(r"\d*\.\d+", text)), default=mp.dps)
        try:
            for signs in ("+-", "-+") if "\\pm" in text else ("",):
                signed = re.sub(r"\\(pm|mp)(?![a-z])", lambda m, signs=signs: signs[m[1] == "mp"], text)
                found, self._tokens = [], ["", *("".join(groups) for groups in reversed(_TOKEN.findall(signed)))]
                for element in self._list("")[1]:
                    is_set = isinstance(element.value, tuple) and element.value[0] in ("{}", _UNION)
                    found += element.value[1] if is_set else [element]
                self.elements += [element for element in found if element not in self.elements]
            is_complex = any(mp.im(element.value) for element in self.elements if not isinstance(element.value, tuple))
            if self.names and point % 2 and is_complex or re.search(r"(?<![_^\d.])[\d.]+\s+[\d.]", text):
                self.elements = []  # a root of a negative number, or two numbers
        except (ArithmeticError, LookupError, TypeError, ValueError):
            self.elements = []

    def _next(self, *tokens: str) -> str:
        """Takes the next token, or only one of these."""
        return self._tokens.pop() if not tokens or self._tokens[-1] in tokens else ""

    def _list(self, *closing: str) -> tuple[str, list[Element]]:
        """A closing bracket and the elements up to it. Those of a union of intervals are a set."""
        found, is_joined = [], False
        while self._tokens[-1] not in closing:
            if separator := self._next(*_SEPARATORS):
                is_joined = separator == "cup"
                continue
            element = self._chain()
            if is_joined and found:
                with suppress(ValueError, TypeError):
                    element = _set(_parts(found[-1]) + _parts(element), found[-1].name)
                    found.pop()
            found.append(element)
            is_joined = False
        return self._next(), found

    def _chain(self) -> Element:
        """A value; or an equation's last side, with the first as its name; or an inequality's interval."""
        sides, names, signs = [], [], [self._next(*_EQUAL) or "="]
        while signs[-1]:
            known, tokens = self.names, self._tokens.copy()
            sides.append(self._expression())
            text = "".join(reversed(tokens[len(self._tokens) :]))
            names.append(re.sub(r"[\s{}]", "", text) if self.names > known else "")  # of a constant none
            signs.append(self._next(*_EQUAL, *_FLIPPED))
        signs, last = signs[1:-1], sides[-1]
        if set(signs) <= set(_EQUAL):
            constants = [side for side, name in zip(sides, names, strict=True) if not name]
            if any(not equal(constants[0], other) for other in constants[1:]):
                raise ValueError("A false equation.")
            difference = mp.nan if isinstance(last, tuple) or len(sides) > 2 else sides[0] - last or mp.nan
            return Element(last, names[0], difference) if signs else Element(last)
        if signs[0] in (">", "ge"):
            sides, names, signs = sides[::-1], names[::-1], [_FLIPPED.get(sign, sign) for sign in signs[::-1]]
        variables = [place for place, name in enumerate(names) if re.fullmatch(_NAME, name)]
        if not set(signs) <= {"<", "le"} or any(isinstance(side, tuple) for side in sides):
            return Element(mp.nan)
        difference, relation = (sides[0] - sides[1] or mp.nan, signs[0]) if len(sides) == 2 else (mp.nan, "")
        if len(variables) != 1:
            return Element(mp.nan, "", difference, relation)
        low, _, high = [-mp.inf, *sides, mp.inf][variables[0] : variables[0] + 3]
        before, after = ["<", *signs, "<"][variables[0] : variables[0] + 2]
        brackets = "[("[before == "<"] + "])"[after == "<"]
        return Element((brackets, [Element(low), Element(high)]), "", difference, relation)

    def _expression(self, level: float = 0, ends: tuple[str, ...] = ()) -> mp.mpf | tuple:
        """Reads on while what follows binds closer than a level."""
        left = self._operand()
        while _LEVELS.get(self._tokens[-1], 2) > level and self._tokens[-1] not in ends:
            if isinstance(left, tuple) and self._next("setminus"):
                left = _without(Element(left), Element(self._expression(_LEVELS["setminus"]))).value
                continue
            left = mp.nan if isinstance(left, tuple) else left
            if self._tokens[-1] in ("+", "-"):
                left += self._expression(1)
            elif self._next("^"):
                left = mp.power(left, _bounded(self._expression(2, ("!", r"\%"))))  # 2^3^2 is 2^9
            elif self._next("!"):
                left = mp.factorial(_bounded(left if mp.isint(left) else mp.nan, 10**4))
            elif self._next(r"\%"):
                left /= 100
            elif self._next(*_DIVIDED):
                left /= self._expression(2)
            elif self._tokens[-1] in _ORDERED:
                operator = self._next()
                left = self._variable("\\" + operator) * left + self._expression(_LEVELS[operator])
            else:
                self._next(*_TIMES)
                factor = self._expression(2)
                left = mp.nan if isinstance(factor, tuple) else left * factor  # f(x, y)
        return left

    def _operand(self) -> mp.mpf | tuple:
        token = self._next()
        if token in ("+", "-"):
            return -self._expression(2) if token == "-" else self._expression(2)
        if token[:1] in ".0123456789":
            return mp.mpf(token)
        if token == "frac":
            return self._operand() / self._operand()
        if token == "sqrt" and self._tokens[-1] == "[":
            degree, base = self._operand(), self._operand()
            is_odd = not self.names and mp.isint(degree) and degree % 2 and not mp.im(base) and base < 0
            return -mp.power(-base, _bounded(1 / degree)) if is_odd else mp.power(base, _bounded(1 / degree))
        if token in FUNCTIONS:
            return self._call(token)
        if token not in _CLOSING:
            return self._variable("\\" + token if token in _ORDERED else token)
        closing, elements = self._list(*(")]" if token in "([" else (_CLOSING[token],)))
        if token == r"\{" or len(elements) != 1:
            return (token + closing).replace("\\", ""), elements
        value = elements[0].value
        return {"lvert": abs, "lfloor": mp.floor, "lceil": mp.ceil}[token](value) if token[0] == "l" else value

    def _call(self, name: str) -> mp.mpf:
        r"""A function of what is in brackets, or of the factors up to the next function: `\sin 2x \cos x`."""
        outer, self._in_call = self._in_call, True  # where a degree is a number
        base = mp.ln(self._operand()) if self._next("_") else mp.one
        exponent = self._operand() if self._next("^") else mp.one
        if exponent == -1:
            name, exponent = "arc" + name, mp.one
        is_group = self._tokens[-1] in ("(", "{", "[")
        argument = self._operand() if is_group else self._expression(1, ("(", "[", *_TIMES, *_DIVIDED, *FUNCTIONS))
        self._in_call = outer
        return mp.power(FUNCTIONS[name](_bounded(argument, 10**600)) / base, _bounded(exponent))

    def _variable(self, token: str) -> mp.mpf:
        name = re.sub(r"[\s{}\\]", "", token)
        if token.startswith("\\text"):
            name = _folded(token[5:])
        is_unit = name.startswith("unit") or name == "degree" and not self._in_call
        self.has_units |= is_unit
        self.names += not is_unit and name not in _CONSTANTS
        if name in _CONSTANTS or is_unit and not self._units:
            return mp.one if is_unit and not self._units else _CONSTANTS[name]
        if not re.fullmatch(_NAME, token):
            raise ValueError("No name.")
        number = crc32(f"{name} {self._point}".encode())
        if name in _STRIDES:
            return mp.mpf(2 + crc32(name.encode()) % 11 + _STRIDES[name] * self._point)
        if self._point < 2 and not is_unit:
            return mp.mpf(31 + number % 29)
        return mp.mpf(number % 10**6 + 10**6) / 1234567 * (-1) ** self._point
