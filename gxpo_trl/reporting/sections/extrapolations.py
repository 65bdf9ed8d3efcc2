"""NExt: how good each prediction would have been, and what the trajectory looked like."""

from collections.abc import Sequence

from ...run_folder import (
    EXTRAPOLATED_FOLDER,
    EXTRAPOLATION_NAME,
    LOOP_FOLDERS,
    ExtrapolationReport,
    read_extrapolation,
)
from ..figures import Picture
from ..runs import Run
from ..statistics import icer
from ..tables import Table, number
from ..trajectory_figure import trajectory_figure
from .section import Section


def next_section(runs: Sequence[Run]) -> Section:
    """Results of `gxpo extrapolate` in the runs' folders, or next to them in a loop."""
    section = Section("NExt")
    for run in runs:
        places = [run.folder, run.folder.parent] if run.folder.name in LOOP_FOLDERS else [run.folder]
        reports = f"{EXTRAPOLATED_FOLDER}/**/{EXTRAPOLATION_NAME}"
        found: dict[tuple, list[ExtrapolationReport]] = {}  # results that differ only in α come from one prediction
        for path in sorted({path for place in places for path in place.glob(reports)}):
            try:
                result = read_extrapolation(path)
            except ValueError as error:
                section.notes.append(str(error))
                continue
            found.setdefault((result["method"], result["steps"][-1], result["steps_ahead"]), []).append(result)
        slug = str(run.folder).strip("./").replace("/", "-")
        section.tables.extend(_prediction_table(run, results, slug) for results in found.values())
        for results in list(found.values())[:1]:
            caption = f"Energy ratio and linearity of the trajectory of {run.folder}."
            section.pictures.append(Picture(f"next-{slug}", caption, trajectory_figure(results[0])))
    if section.tables:
        section.tables.append(_icer_table(runs))
    return section


def _prediction_table(run: Run, results: Sequence[ExtrapolationReport], slug: str) -> Table:
    first, held_out = results[0], results[0]["held_out"]
    rows = [
        [method, number(values["error"]), number(values["cosine"])] for method, values in held_out["errors"].items()
    ]
    title = f"{run.folder}, steps {held_out['from_step']} to {held_out['to_step']} as they would have been predicted"
    alphas = ", ".join(f"{result['alpha']:g}" for result in results)
    note = f"An error of 1 is as good as no prediction. Written by `{first['method']}` with α = {alphas}."
    return Table(f"next-{slug}-{first['method']}", title, ["method", "error", "cosine"], rows, note)


def _icer_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        for benchmark, points in run.points.items():
            cost = icer(run.steps, points[0].value, points[-1].value)
            text = number(cost, 2) if cost != float("inf") else "nothing gained"
            ends = number(points[0].value), number(points[-1].value)
            rows.append([str(run.folder), benchmark, *ends, str(run.steps), text])
    columns = ["run", "benchmark", "first", "last", "steps", "steps per point"]
    return Table(
        "icer", "Steps per point of accuracy gained (ICER)", columns, rows, "From a run's own first evaluation."
    )
