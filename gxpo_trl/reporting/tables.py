"""Tables once, as Markdown, CSV and HTML."""

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
        name (`str`): Of its files.
        title (`str`): What it is, in a sentence.
        columns (`Sequence[str]`): Headings, with units.
        rows (`Sequence[Sequence[str]]`): Cells.
        note (`str`): What has to be known to read it.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Aligned, for a terminal too."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in (self.columns, *self.rows)
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def interval(mean: Mean | None, digits: int = 3, sign: bool = False) -> str:
    """A mean with its interval, or alone where there is one seed."""
    if mean is None:
        return MISSING
    plus = "+" if sign else ""
    text = f"{mean.value:{plus}.{digits}f}"
    return text if mean.low is None else f"{text} [{mean.low:{plus}.{digits}f}, {mean.high:{plus}.{digits}f}]"
