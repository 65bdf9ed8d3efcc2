"""Lists the phrases of `phrases.txt` in texts, as `file:line: phrase: remedy`. Exits with 1 if there are any.

`make lint` runs it. It reads pages, the comments of recipes, the text of notebooks, and the docstrings, comments and
strings of the package and the benchmarks. Tests are not read.
"""

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
PHRASES = Path(__file__).with_suffix(".txt")
FILES = ("*.md", "docs/*.md", "recipes/**/*.md", "benchmarks/**/*.md", "recipes/**/*.yaml", "notebooks/*.ipynb")
FILES += ("gxpo_trl/**/*.py", "benchmarks/*.py", "recipes/**/*.py", "notebooks/*.py", ".ci/*.py")
LEAST_WORDS = 3
"""Of a string in code: shorter ones are names and data."""
PART_OF_F_STRING = getattr(tokenize, "FSTRING_MIDDLE", None)
"""Before Python 3.12 an f-string is one string."""


def read_phrases(text: str) -> list[tuple[re.Pattern, str]]:
    """The pattern and the remedy of each line that is not a comment. A space matches any white space."""
    phrases = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pattern, arrow, remedy = line.partition(" -> ")
            if not (arrow and remedy):
                raise ValueError(f"{PHRASES.name}: {line!r} has no remedy: write `pattern -> remedy`.")
            phrases.append((re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), remedy))
    return phrases


def find_phrases(page: str, phrases: list[tuple[re.Pattern, str]]) -> Iterator[tuple[int, str, str]]:
    """The line, the words and the remedy of each phrase on a page. Code in backticks counts as one unknown word."""
    prose = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: "_" + "\n" * code[0].count("\n"), page)
    for pattern, remedy in phrases:
        for found in pattern.finditer(prose):
            yield prose.count("\n", 0, found.start()) + 1, " ".join(found[0].split()), remedy


def read_prose(path: Path) -> str:
    """The prose of a file, with as many lines before each word as in the file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return _prose_of_python(text)
    if path.suffix == ".yaml":
        return re.sub(r"^[^#\n]+", "", text, flags=re.MULTILINE).replace("#", " ")
    if path.suffix == ".ipynb":
        return _prose_of_notebook(text)
    return text


def _prose_of_python(source: str) -> str:
    """Comments, docstrings and strings. Joined strings are one text."""
    lines = [[] for _ in range(source.count("\n") + 2)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1].append(token.string.lstrip("# "))
        elif token.type == tokenize.STRING or token.type == PART_OF_F_STRING:
            is_part = token.type == PART_OF_F_STRING
            text = token.string if is_part else re.sub(r"^\w{0,2}(\"{3}|[\"'])|(\"{3}|[\"'])$", "", token.string)
            if is_part or len(text.split()) >= LEAST_WORDS:
                for i, line in enumerate(text.splitlines()):
                    lines[token.start[0] - 1 + i].append(line)
    return "\n".join(" ".join(words) for words in lines)


def _prose_of_notebook(text: str) -> str:
    """The lines of Markdown cells. In the file each is a line of its own, as JSON."""
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    waiting = [line for cell in cells for line in cell["source"]]
    prose = []
    for line in text.splitlines():
        found = bool(waiting) and line.strip().removesuffix(",") == json.dumps(waiting[0], ensure_ascii=False)
        prose.append(waiting.pop(0).rstrip("\n") if found else "")
    return "\n".join(prose)


def main() -> int:
    phrases = read_phrases(PHRASES.read_text(encoding="utf-8"))
    files = sorted({file for pattern in FILES for file in ROOT.glob(pattern)})
    complaints = [
        f"{file.relative_to(ROOT)}:{line}: {words}: {remedy}"
        for file in files
        for line, words, remedy in sorted(find_phrases(read_prose(file), phrases))
    ]
    print("\n".join([*complaints, f"{len(files)} files, {len(complaints)} phrases to replace."]))
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
