r"""LaTeX with one spelling for each of the things that it spells in several ways, and for units."""

import re
import unicodedata

from .values import FUNCTIONS


_SAME = {
    name: same + " " * same[-1:].isalpha()
    for same, names in {
        "": r"\therefore \because \checkmark \blacksquare "
        r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \limits \underline \mathop \ensuremath **",
        " ": r"~ \, \; \: \! \quad \qquad \enspace \thinspace \medspace \thickspace \negthinspace \displaystyle \rm "
        r"\textstyle \scriptstyle \tiny \small \normalsize \large \Large \LARGE \huge \Huge \bf \it \( \) \[ \]",
        r"\text": r"\textrm \textbf \textit \textsf \textnormal \textup \mathrm \mathbf \mathit \mathsf \mathtt \mbox "
        r"\hbox \bm \bold \boldsymbol \operatorname \boxed \fbox \si",
        r"\frac": r"\dfrac \tfrac \cfrac \nicefrac \sfrac \flatfrac", r"\binom": r"\dbinom \tbinom", "|": r"\vert",
        r"\cdot": "· ⋅ ∙ ∗", r"\times": "×", r"\div": "÷", "/": "⁄", "-": "− – —",
        r"\le": r"\leq \leqslant <= ≤", r"\ge": r"\geq \geqslant >= ≥", "<": r"\lt", ">": r"\gt",
        r"\ne": r"\neq != ≠", r"\approx": "≈", r"\in": "∈", r"\cup": "∪", r"\emptyset": r"\varnothing ∅",
        r"\dots": r"\ldots \cdots", "i": r"\imath", r"\epsilon": r"\varepsilon", r"\phi": r"\varphi", r"\vee": r"\lor",
        r"\to": r"\rightarrow \longrightarrow →", r"\implies": r"\Rightarrow \Longrightarrow ⇒", r"\subset": "⊂",
        r"\setminus": r"\smallsetminus \backslash ∖", r"\circ": "∘", r"\mapsto": "↦", r"\subseteq": "⊆",
        ":": r"\mid \colon", "'": "′ ’", r"\pm": "±", r"\sqrt": "√", r"\infty": r"∞ \infinity", r"\{": r"\lbrace",
        r"\}": r"\rbrace", "(": r"\langle", ")": r"\rangle", r"\degree": r"° \degrees \deg", r"\mod": r"\pmod \bmod",
        r"\mathbb{R}": r"ℝ \R", r"\lfloor": "⌊", r"\rfloor": "⌋", r"\lceil": "⌈", r"\rceil": "⌉",
        r"\unit{dollar}": r"\$ \textdollar", r"\unit{euro}": "€", r"\unit{pound}": "£", r"\unit{yen}": "¥",
    }.items() for name in names.split()
} | {
    "\\ ": " ", **{letter: rf"^{{{plain}}}" for letter, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True)},
    **{letter: rf"_{{{plain}}}" for letter, plain in zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True)},
    **{letter: f" {plain} " for letter, plain in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒", "1/2 1/3 2/3 1/4 3/4 1/5 2/5 3/5 4/5 "
       "1/6 5/6 1/7 1/8 3/8 5/8 7/8 1/9 1/10".split(), strict=True)},
    **{letter: rf"\{name} " for letter, name in zip("αβγδεθλμµπρσφωΔΩ", "alpha beta gamma delta epsilon theta lambda "
       "mu mu pi rho sigma phi omega Delta Omega".split(), strict=True)},
}  # fmt: skip
_WORDS = {
    **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())},
    **dict.fromkeys(("st", "nd", "rd", "th"), ""), **{name: rf"\{name}" for name in FUNCTIONS}, "to": ":", "i": "i",
    "e": "e", "and": ", ", "minus": "-", "negative": "-", "infinity": r"\infty", "pi": r"\pi",
}  # fmt: skip
_MAGNITUDES = {
    word: rf"\times {number} " for number, word in (
        ("12", "dozen"), ("100", "hundred"), ("10^3", "thousand"), ("10^6", "million"), ("10^9", "billion"),
        ("10^{12}", "trillion"),
    )
}  # fmt: skip
_UNITS = {
    alias: aliases.split()[0] for aliases in (
        "m meter metre", "g gram", "l L liter litre", "s sec second", "h hr hour", "min minute", "day d", "year yr",
        "in inch inche", "ft foot feet", "yd yard", "mi mile", "lb pound", "oz ounce", "dollar usd buck", "euro eur",
        "degree deg", "percent percentage", "rad radian", "N newton", "J joule", "W watt", "V volt", "Hz hertz",
        "Pa pascal", "K kelvin", "Ω ohm", "Å angstrom", "mol mole", "C celsius", "F fahrenheit", "people person",
        "erg", "eV", "cent", "yen", "week", "month", "unit", "am", "pm", "men", "women", "children", "cup",
        "pint", "quart", "gallon gal", "teaspoon tsp", "tablespoon tbsp", "acre", "hectare", "ton tonne", "decade",
        "century centurie",
    ) for alias in aliases.split()
}  # fmt: skip
_PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "micro": "µ", "nano": "n", "mega": "M"}
_PREFIXES |= {short: short for short in _PREFIXES.values()}
_UNITS = {name + alias: short + unit for name, short in _PREFIXES.items() for alias, unit in _UNITS.items()} | _UNITS
_PARTS = (
    "thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths millionths".split()
)
_NO_NOUN = {"times", "plus", "minus", "half", "halves", *_PARTS, *_MAGNITUDES, *(word + "s" for word in _MAGNITUDES)}
_OF_FORMULAS = {*_WORDS, *_NO_NOUN, *(form for unit in _UNITS for form in (unit, unit + "s"))}
_OF_ANSWERS = re.compile(  # what a text says around an answer, which is no part of it
    r"(?i)^(?:so |thus |hence |therefore |,)*(?:the |my )?(?:final |correct )?answers?\b(?: is\b| are\b)?[ :=]*"
    r"|[ ,]*\b(?:is|are) (?:the|my) (?:final |correct )?answers?$"
)
_ONES = {word: n for n, word in enumerate("zero one two three four five six seven eight nine".split())}
_BELOW_20 = _ONES | {
    word: n
    for n, word in enumerate(
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split(), 10
    )
}
_TENS = {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_THOUSANDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_ONES)}))?\b|(?:{'|'.join(_BELOW_20)})\b)"
_BELOW_1000 = rf"(?:(?:{'|'.join(_ONES)}|a) hundred(?: (?:and )?{_BELOW_100})?|{_BELOW_100})"
_NUMERAL = re.compile(
    rf"(minus |negative )?((?:{_BELOW_1000}|a)(?: (?:{'|'.join(_THOUSANDS)})\b(?:,? (?:and )?{_BELOW_1000})?)*)"
)
_DENOMINATORS = {"half": 2, "halves": 2, "third": 3, "quarter": 4} | {
    word: n for n, word in enumerate("fourth fifth sixth seventh eighth ninth tenth".split(), 4)
}
_QUANTITY = re.compile(  # a number, mixed or not, with a sign and a currency; and what is counted
    r"((?:[-+ ]|\\unit\{\w+\})*(?:(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?: ?[/:] ?\d+)?|\(\d+\+\\frac\{\d+\}\{\d+\}\)))"
    r"(?: +|(?=[^a-zA-Z]|[a-zA-Z]{2}|$))(|\D.*)"  # 3D is no number of days
)
_REWRITES = [
    # A backslash that was escaped, thousands, characters and commands
    (r"[\u200b-\u200f\u2060\ufeff\xad]", ""), (r"\s", " "), (r"\\\\(?=[a-zA-Z])(?!.*\\end)", r"\\"),
    (r"^ *([\"'`])([^\"'`]+)\1 *$", r"\2"), (r"\+ ?/ ?-|(^|[=(,{]) *\+ ?-", r"\1\\pm "),
    (r"^(?:[^\\\d{}]+| *\\text *\{[^\\\d{}]+\} *)$", lambda m: _numeral(m[0]) or m[0]),
    (r"(?i)^ *(?:\\text *\{)? ?(?:minus|negative) ?\}? ?(?=[\d.\\($])", "-"), (r"(?<=\d)(?:st|nd|rd|th)\b", ""),
    (r"(?i)^ *(?:\\text *\{)? ?(?:approximately|approx\.?|about|roughly) ?\}? ?(?=[-\d.\\$])", ""),
    (r"(?i)(?<=[\d})]) ?(?:\\text *\{ ?)?\(?(?:approximately|approx\.?)\)? ?\}? *$", ""),
    (r"(?<![a-zA-Z\\])(?:inf|oo)(?![a-zA-Z])", r"\\infty "), (r"\((\d+)\)(?= ?_)", r"\1"),
    (r"\\(?:bold|bm|boldsymbol|mathbf) *\{((?:[^{}]|\{[^{}]*\}){0,99})\}",
     lambda m: f" {m[1]} " if re.search(r"[=^]|\\frac|\\sqrt", m[1]) else m[0]),
    (r"\\\\ *\[-?[\d.]+ *[a-z]{2}\]|\\cr(?![a-zA-Z])", r"\\\\"),
    (r"\\begin *\{array\} *\{[lcr|]*\}((?:(?!\\\\|&|\\begin).)*)\\end *\{array\}", r" \1 "),
    (r"\\(mathbb|mathcal) *([A-Z])(?![a-zA-Z])", r"\\\1{\2}"),
    (r"\\num *(?=\{)", " "), (r"\\(?:SI|qty) *\{([^{}]*)\} *\{([^{}]*)\}", r"\1\\text{ \2}"),
    # Thousands and decimals of other languages, where they can't be a list: 1.000.000, 1.234,5, 1_000
    (r"(?<![\w.,])\d{1,3}(?:\.\d{3}){2,}(?![\w.,])", lambda m: m[0].replace(".", "")),
    (r"(?<![\w.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\w.,])", lambda m: f"{m[1].replace('.', '')}.{m[2]}"),
    (r"(?<=\d)\{,\}(?=\d+)(?!\d{3}(?!\d))", "."),
    (r"(?<![\w.])\d{1,3}(?:_\d{3})+(?![\w.])", lambda m: m[0].replace("_", "")),
    (r"(?<=\d) ?[xX] ?(?=10 ?(?:\^|\*\*))", r"\\times "),
    # Two asterisks are bold type around a whole side, a power between operands, and else nothing
    (r"((?:^|[^\s\w)}\]|!'*])\s*)\*\*([^*]+)\*\*(?=\W*$|\s*[,;=])", r"\1\2"),
    (r"(?<=[\w)}\]|!'])(\s?)\*\*(?=\s?[\w({\[\\+.√|−-])", r"\1^"),
    (r"(?<=\d)(?<![_^]\d)(?<![_^]\d\d)(?<![_^]\d\d\d)"  # not of \log_2 128
     r"(?:\{,\}|,?\\[,;:! ]\s*,?|['~\u2009\u202f\xa0]|(?<!\d{4}) )(?=\d{3}(?!\d))", ""),
    (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"), (r"\\(?:[hv]space|tag|label|[hv]?phantom)\*?\s*\{[^{}]*\}", " "),
    (r"\\sim(?=\s*[-+]?[\d.])", r"\\approx "), (r"^\s*([a-zA-Z]+(?: +[a-zA-Z]+)+)[ .!]*$", lambda m: _phrase(m[1])),
    (r"\\[a-zA-Z]+|\\.|[<>!]=|~|\*\*|[^\0-\x7f]", lambda m: _SAME[m[0]] if m[0] in _SAME else _plain(m[0])),
    (r"^\s*\\(?:implies|to)\s*", ""), (r"(?<=\d)\s*\\mu\s*([mgsl])(?![a-zA-Z])", r"\\unit{µ\1}"),
    (r"\^\{([^{}]*)\}\^\{", r"^{\1"), (r"\}_\{\}", "}"),  # 10⁻⁵, letter by letter
    (r"(?<!\\)\$|\\(?:text)?color\s*\{\w*\}", " "), (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    (r"\^\s*\{?\s*(?:\\degree|\\circ)\s*\}?|\^o\b", r"\\degree "), (r"\\?%", r"\\% "),
    # Numbers: 3., 1e5, 0.1\overline{6} as 0.1 + 6/90, \frac12, mixed ones
    (r"(?<=\d)\.(?![\d.\\])", ""), (r"(?<=\d)[eE]([+-]?\d+)(?![\d.])", r"\\times 10^{\1}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}",
     lambda m: rf"({m[1]}.{m[2]}0+\frac{{{m[3]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}})"),
    (r"\\(frac|sqrt|binom)\s*(\d|\\[a-zA-Z]+)(?!\s*\[)", r"\\\1{\2}"),
    (r"\\(frac|binom)\s*(\{[^{}]*\})\s*(\d)", r"\\\1\2{\3}"),
    (r"(?<![\w.^_}\\])(\d+)\s*(?:\\frac\s*\{(\d+)\}\s*\{(\d+)\}|(?<=\s)(\d+)\s*/\s*(\d+)(?!\d))",
     lambda m: f"({m[1]}+\\frac{{{m[2] or m[4]}}}{{{m[3] or m[5]}}})"),
    # Words, units, bases; then forms
    (rf"(?:np\.)?(?<![a-zA-Z\\])({'|'.join([*FUNCTIONS, 'pi', 'theta', 'alpha', 'beta'])})(?![a-z])", r"\\\1"),
    (r"\\text\s*\{\s*\(?or\b([^{}]*?)\)?\s*\}", r" \\vee \1"), (r"\\mu\s*\\text\s*\{", r"\\text{µ"),
    (r"(?<=\d)\s*\\text\s*\{\s*([AaPp])\.?\s?[Mm]\.?\s*\}|(?:(?<=:\d\d)\s?([AaPp])\.?|(?<=\d)\s?([AaPp])\.)[Mm]\b\.?",
     lambda m: rf"\unit{{{(m[1] or m[2] or m[3]).lower()}m}}"),
    (r"\(?\\text\s*\{\s*\(?(?:in )?base (\w+)\)?\s*\}", r"_{\\text{\1}}"),
    (r"^\s*(?:\\text\s*\{)?\s*(USD|EUR|GBP)\s*\}?(?=\s*\d)", r"\\unit{\1}"),
    (r"\\degree\s*([CF])\b", r"\\degree\\unit{\1}"),
    (r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}|(?<=[\d)} ])(?<!\\)((?:[a-zA-Z]{4,}|[ckm]m|[km]g|cup|ft|ml|mi|hr|sq|lb|oz"
     r"|min|ton|men|mph|m(?=/s)|[kM]?Hz|k?Pa|k[NJWV]|[kMG]?eV|rad|mol|deg|lbs|hrs|yrs|yd|gal|USD|EUR|GBP"
     r"|in(?= ?(?:\^|$)))\b(?:[ /]+[a-zA-Z]{2,}|/[hsm]\b)*\.?(?![(']))", lambda m: _word(m)),
    (r"^\s*(\d\w*?|[a-fA-F][\da-fA-F]+)\s*(_\s*\{?\s*(?:1[1-9]|2\d|3[0-6])\s*\}?)\s*$", lambda m: m[1].upper() + m[2]),
    (r"\^\s*\{\s*\}", ""), (r"(?<=\d)\s*_\s*\{?\s*(\d+)\s*\}?", r"\\unit{base\1}"),
    (r",?(?<![a-zA-Z\\])\s*(?:and|(or))(?![a-zA-Z])\s*", lambda m: r" \vee " if m[1] else ", "),
    (r"\\begin\s*\{cases\}(.*)\\end\s*\{cases\}", lambda m: m[1].replace(r"\\", ",")),
    (r"\\begin\s*\{((?:align(?:ed)?|gather(?:ed)?|split|equation)\*?)\}(.*)\\end\s*\{\1\}",  # also 1 + 2 \\ &= 3
     lambda m: re.sub(r"(?<!\\)&", "", re.sub(r"\\\\[\s&]*(?==)", "", m[2])).replace(r"\\", ",")),
    (r"\\begin\{(?:\w*matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*(?:\\\\|&).*?)\\end\{\w+\}",
     lambda m: _matrix([row.replace("&", ",") for row in m[1].split(r"\\") if row.strip()])),
    (r"^\s*(\d{4}-\d\d-\d\d)\s*$", r"\\text{\1}"),  # a date is no difference
    (r"\\+\s*$", ""), (r"^\s*([a-zA-Z]?)\s*\\approx", r"\1="), (r"\\approx.*", ""),
    (r"\|([^|]+)\|", r"\\lvert \1\\rvert "), (r"\\\{\s*\\\}", r"\\emptyset"),
    (r"^\\\{\s*\\emptyset\s*\\\}$", r"\\text{set of the empty set}"),
    # Open ends as outward brackets: ]0, 1] is (0, 1]
    (r"(^|\\cup|\\in|=)\s*([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]])",
     lambda m: m[1] + ("[" if m[2] == "[" else "(") + m[3] + ("]" if m[4] == "]" else ")")),
    (r"\{?([^{}]{0,99})\\(over|choose)(?![a-z])([^{}]{0,99})\}?", r"\\\2{\1}{\3}"), (r"\\over\{", r"\\frac{"),
    (r"\\(?:binom|choose)\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\\frac{(\1)!}{(\2)!(\1-(\2))!}"),
    (r"^(?:\w \\in )?(?:\\mathbb\{R\}|(?:\\text\{)?all real numbers\}?)$", r"(-\\infty,\\infty)"),
    # Sets as intervals and points
    (r"^\\\{\s*(\w)\s*\\in\s*\\mathbb\{([ZN])\}\s*[:|]\s*(.*)\\\}$", lambda m: _integers(*m.groups()) or m[0]),
    (r"^\\\{\s*\w\s*(?:\\in\s*\\mathbb\{R\}\s*)?[:|](.*)\\\}$", r"\1"),
    (r"^\s*(\w)\s*\\ne(?![a-z])(.*)$", lambda m: _except(*m.groups()) or m[0]),
    (r"\\mathbb\{R\}\s*(?:\\setminus|-)\s*(?=\\\{)", r"(-\\infty,\\infty)\\setminus"),
    (r"(?<=\\setminus)\s*\\\{(.*)\\\}$", lambda m: _points(m[1])), (r"(?<=\d)\s*\\Omega", r"\\unit{Ω}"),
    (r"^\\lvert\s*(\w)\s*\\rvert\s*(<|\\le\b)(.*)", r"-(\3)\2 \1\2\3"),
    (r"^\s*((?i:no)|[A-Za-z]{3}[A-Za-z ]*)$", lambda m: _WORDS.get(m[1].strip().lower(), rf"\text{{{m[1]}}}")),
    (r"^[^:,<>=]+(?::[^:,<>=]+){2,}$", lambda m: _ratio(m[0])), (r"\s+", " "), (r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1"),
]  # fmt: skip


def normalize(text: str) -> str:
    r"""One spelling for an answer: `\frac{5}{9}` for `$\dfrac 59$`, `\sqrt{2}` for `√2`, `10080` for `10{,}080`."""
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"^[ ,;:]*(?:\.(?!\d)[ .,;:]*)?", "", text).rstrip(" .,;:")


def _plain(character: str) -> str:
    """A character without a style; a currency's sign is a unit."""
    if unicodedata.category(character[0]) == "Sc":
        return rf"\unit{{{unicodedata.name(character).lower().replace('sign', '').replace(' ', '')}}} "
    return unicodedata.normalize("NFKC", character)


def _numeral(text: str) -> str | None:
    """A number in words, of what is counted or of parts: twenty-one, two apples, three quarters."""
    text = re.sub(r"\\text *\{|\}", "", text.lower()).strip(" .!")
    text = text if text != "half" else "one half"
    found = _NUMERAL.match(text)
    if not found or found[2] == "a" and not re.match(r" \w+$", text[found.end() :]):
        return None
    total = group = 0
    for word in re.findall(r"\w+", found[2]):
        if word == "hundred":
            group *= 100
        elif word in _THOUSANDS:
            total, group = total + group * _THOUSANDS[word], 0
        elif word != "and":
            group += 1 if word == "a" else (_BELOW_20 | _TENS)[word]
    number, rest = f"{'-' if found[1] else ''}{total + group}", text[found.end() :].strip(" -")
    part = _DENOMINATORS.get(rest) or _DENOMINATORS.get(rest.removesuffix("s"))
    if part:
        return rf"\frac{{{number}}}{{{part}}}"
    counted = "" if not rest else None if found[2] == "a" else _counted(rest)
    return None if counted is None else number + counted


def _except(variable: str, values: str) -> str | None:
    """The set of `x \\ne 1, x \\ne 2`, or of `x \\ne 1, 2`."""
    values = re.sub(rf",\s*{variable}\s*\\ne(?![a-z])", ",", values)
    return None if re.search(r"\\ne(?![a-z])|[=<>]", values) else rf"(-\infty,\infty)\setminus\{{{values}\}}"


def _points(values: str) -> str:
    """A set in which both signs of `\\pm 2` are points of their own."""
    signed = re.sub(r"(^|,)\s*\\pm([^,]*)", r"\1\2,-(\2)", values)
    return rf"\{{{signed}\}}"


def _integers(variable: str, of: str, condition: str) -> str | None:
    """The integers between two bounds, where these are numbers, and not more than a hundred."""
    bounds = re.fullmatch(rf"\s*(-?\d{{1,9}})\s*(<|\\le)\s*{variable}\s*(<|\\le)\s*(-?\d{{1,9}})\s*", condition)
    if not bounds:
        return None
    low, high = int(bounds[1]) + (bounds[2] == "<"), int(bounds[4]) - (bounds[3] == "<")
    if high - low >= 100 or of == "N" and low < 1:  # whether 0 is natural is a convention
        return None
    return rf"\{{{','.join(map(str, range(low, high + 1)))}\}}" if low <= high else r"\emptyset"


def _matrix(rows: list[str]) -> str:
    """A list of rows. A single one is marked: it is no column."""
    return "[" + ",".join(f"[{row}]" for row in rows) + "]" if len(rows) > 1 else rf"[\text{{row}},{rows[0]}]"


def _phrase(text: str) -> str:
    """Words by themselves: "no solution" is a text, "three halves" and "sin x" are formulas."""
    words = text.lower().split()
    if any(len(word) > 3 and word not in _OF_FORMULAS for word in words):
        return rf"\text{{{text}}}"
    return " ".join(_WORDS.get(word, word) for word in words) if set(words) <= _OF_FORMULAS else text


def _ratio(text: str) -> str:
    """Of three numbers or more, over the first one: 2:4:6 is (4/2, 6/2)."""
    first, *others = text.split(":")
    return text if r"\{" in text else "(" + ",".join(f"({other})/({first})" for other in others) + ")"


def _word(found: re.Match) -> str:
    r"""What a text in LaTeX means, or a word in a formula. After a number it is units: `\unit{m}/\unit{s}`."""
    text = (found[1] if found[2] is None else found[2]).strip(" ,")
    text = _OF_ANSWERS.sub("", text)
    if text.lower() in _WORDS or not text:
        return _WORDS.get(text.lower(), "") + " "
    before = found.string[: found.start()].rstrip()
    if not re.search(r"[\w)}!\]]$", before) and (quantity := _QUANTITY.fullmatch(text)):
        units = _counted(quantity[2])
        if units is not None:
            return f" {quantity[1]}{units} "
    units = _counted(text) if re.search(r"[\w)}!\]{]$", before) else None
    return units or (rf"\text{{{text}}}" if any(map(str.isalpha, text)) else f" {text} ")


def _counted(text: str) -> str | None:
    """What follows a number: a magnitude or several, or units, or both, as of 3 million dollars."""
    if re.fullmatch(r"(?:\\degree|\\%|\\unit\{\w+\})?", text):
        return text + " "
    word, _, rest = text.partition(" ")
    factor = _MAGNITUDES.get(word.lower()) or _MAGNITUDES.get(word.lower().removesuffix("s"))
    if factor is None:
        return _units(text)
    following = _counted(rest.strip())
    return None if following is None else factor + following


def _units(text: str) -> str | None:
    """`None` where a word may be none. A plural is, and one word before a unit is dropped: 6 distinct values."""
    text = re.sub(r"\bper\b", "/", text).replace("mph", "mi/h").replace("kph", "km/h")
    text = re.sub(r"\b(sq|cu)[a-z]*\.? (\w+)", lambda m: f"{m[2]}^{2 if m[1] == 'sq' else 3}", text)
    units = []
    for word in re.findall(r"[^\W\d_]+", text):
        if word.lower() in _NO_NOUN:
            return None
        plural = word.lower() if len(word) > 3 and word.endswith("s") else ""
        forms = (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s"))
        units.append(next((_UNITS[form] for form in forms if form in _UNITS), plural))
    if not units or not units[-1] or units.count("") > 1 or re.search(r"(?<![\^{-])\d", text):
        return None
    spelled = iter({"degree": r"\degree ", "percent": r"\% ", "": ""}.get(name, rf"\unit{{{name}}}") for name in units)
    return re.sub(r"[^\W\d_]+", lambda _: next(spelled), text)
