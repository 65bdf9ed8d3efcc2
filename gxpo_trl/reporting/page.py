"""A report as one HTML file that needs no network, and as files of its figures and tables."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader

from ..version import __version__
from .runs import Run
from .sections.section import Section
from .tables import one_line


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A page may load nothing. Browsers enforce this (Content-Security-Policy)."""


def render(runs: Sequence[Run], sections: Sequence[Section], refresh: int | None = None) -> str:
    """The page.

    Args:
        runs (`Sequence[Run]`): The runs.
        sections (`Sequence[Section]`): Its sections.
        refresh (`int`, *optional*): Seconds after which a browser loads it again.
    """
    title = str(runs[0].folder) if len(runs) == 1 else f"{len(runs)} runs"
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    subtitle = f"{', '.join(dict.fromkeys(run.label for run in runs))}. Made {now} by gxpo_trl {__version__}."
    return _fill(title, subtitle, sections, refresh)


def render_notice(title: str, notes: Sequence[str], refresh: int | None = None) -> str:
    """A page with only sentences."""
    return _fill(title, "", [Section("", list(notes))], refresh)


def _fill(title: str, subtitle: str, sections: Sequence[Section], refresh: int | None) -> str:
    environment = Environment(loader=PackageLoader("gxpo_trl.reporting", ""), autoescape=True)
    template = environment.get_template("report.html.jinja")
    page = template.render(title=title, subtitle=subtitle, sections=sections, refresh=refresh, policy=POLICY)
    return page.encode("utf-8", "replace").decode()  # names of folders may be invalid Unicode


def write_report(runs: Sequence[Run], sections: Sequence[Section], folder: Path) -> Path:
    """Writes `report.html`, each figure as PNG and SVG, each table as CSV and Markdown.

    Returns:
        `Path`: The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for section in sections:
        for picture in section.pictures:
            replace(picture, name=_file_name(picture.name, taken)).save(folder)
        for table in section.tables:
            name, note = _file_name(table.name, taken), one_line(table.note)
            _write(folder / f"{name}.csv", table.csv())
            text = f"{one_line(table.title)}\n\n{table.markdown()}\n\n{note}\n"
            _write(folder / f"{name}.md", text.rstrip() + "\n")
    page = folder / "report.html"
    _write(page, render(runs, sections))
    return page


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def _file_name(name: str, taken: set[str]) -> str:
    """A name that any file system accepts and no other figure or table has."""
    plain = re.sub(r"[^\w.@+,=-]+", "-", name).encode()[:100].decode(errors="ignore").lstrip(".-") or "unnamed"
    unique = next(n for i in itertools.count(1) if (n := plain if i == 1 else f"{plain}-{i}") not in taken)
    taken.add(unique)
    return unique
