"""A table, as Markdown, CSV and HTML."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import Mean


MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        name (`str`): The name of its files.
        title (`str`): Its title.
        columns (`Sequence[str]`): Headings, with units.
        rows (`Sequence[Sequence[str]]`): Cells.
        note (`str`): An explanation for the reader.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """As aligned Markdown, which is readable in a terminal too."""
        rows = [[_markdown(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def one_line(text: str) -> str:
    """The text on one line, so that it does not end a row or a heading of Markdown."""
    return " ".join(text.split())


def _markdown(cell: str) -> str:
    """A cell with `|` and `<` escaped."""
    return one_line(cell).replace("|", "\\|").replace("<", "\\<")


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def interval(mean: Mean | None, digits: int = 3, sign: bool = False) -> str:
    """A mean with its interval; for one seed only the value."""
    if mean is None:
        return MISSING
    plus = "+" if sign else ""
    text = f"{mean.value:{plus}.{digits}f}"
    return text if mean.low is None else f"{text} [{mean.low:{plus}.{digits}f}, {mean.high:{plus}.{digits}f}]"
