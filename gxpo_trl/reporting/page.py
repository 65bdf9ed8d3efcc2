"""A report as one HTML file that needs no network, and as files of its figures and tables."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader

from ..version import __version__
from .runs import Run
from .sections.section import Section


def render(runs: Sequence[Run], sections: Sequence[Section], refresh: int | None = None) -> str:
    """The page.

    Args:
        runs (`Sequence[Run]`): What it is about.
        sections (`Sequence[Section]`): What is on it.
        refresh (`int`, *optional*): Seconds after which a browser loads it again.
    """
    environment = Environment(loader=PackageLoader("gxpo_trl.reporting", ""), autoescape=True)
    title = str(runs[0].folder) if len(runs) == 1 else f"{len(runs)} runs"
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    subtitle = f"{', '.join(dict.fromkeys(run.label for run in runs))}. Made {now} by gxpo_trl {__version__}."
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, subtitle=subtitle, sections=sections, refresh=refresh)


def write_report(runs: Sequence[Run], sections: Sequence[Section], folder: Path) -> Path:
    """Writes `report.html`, each figure as PNG and SVG, each table as CSV and Markdown.

    Returns:
        `Path`: The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            picture.save(folder)
        for table in section.tables:
            (folder / f"{table.name}.csv").write_text(table.csv())
            (folder / f"{table.name}.md").write_text(
                f"{table.title}\n\n{table.markdown()}\n\n{table.note}\n".rstrip() + "\n"
            )
    page = folder / "report.html"
    page.write_text(render(runs, sections))
    return page
