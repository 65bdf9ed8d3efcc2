"""NExt: how good each prediction would have been, and what the trajectory looked like."""

import json
from collections.abc import Sequence
from pathlib import Path

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
        found: dict[str, list[ExtrapolationReport]] = {}  # results that differ only in α come from one prediction
        for path in sorted(_reports_of(run)):
            try:
                result = read_extrapolation(path)
            except ValueError as error:
                section.notes.append(str(error))
                continue
            if EXTRAPOLATED_FOLDER in path.relative_to(run.folder.parent).parts[:1]:  # of a loop: of one of its runs
                if Path(result["run"]).name != run.folder.name:
                    continue
            of_prediction = {name: value for name, value in result.items() if name not in ("alpha", "seconds")}
            found.setdefault(json.dumps(of_prediction, sort_keys=True), []).append(result)
        slug = str(run.folder).strip("./").replace("/", "-")
        predictions = list(found.values())
        varied = _varied([results[0] for results in predictions])
        section.tables.extend(_prediction_table(run, results, slug, varied) for results in predictions)
        for results in predictions[:1]:
            caption = f"Energy ratio and linearity of the trajectory of {run.folder}."
            section.pictures.append(Picture(f"next-{slug}", caption, trajectory_figure(results[0])))
    if section.tables:
        section.tables.append(_icer_table(runs))
    return section


def _reports_of(run: Run) -> set[Path]:
    places = [run.folder, run.folder.parent] if run.folder.name in LOOP_FOLDERS else [run.folder]
    return {path for place in places for path in place.glob(f"{EXTRAPOLATED_FOLDER}/**/{EXTRAPOLATION_NAME}")}


def _varied(results: Sequence[ExtrapolationReport]) -> list[str]:
    """The settings of the predictor in which these predictions differ."""
    settings = [result.get("predictor", {}) for result in results]
    names = dict.fromkeys(name for of_it in settings for name in of_it)
    return [name for name in names if any(of_it.get(name) != settings[0].get(name) for of_it in settings)]


def _prediction_table(run: Run, results: Sequence[ExtrapolationReport], slug: str, varied: Sequence[str]) -> Table:
    first, held_out = results[0], results[0]["held_out"]
    rows = [
        [method, number(values["error"]), number(values["cosine"])] for method, values in held_out["errors"].items()
    ]
    title = f"{run.folder}, steps {held_out['from_step']} to {held_out['to_step']} as they would have been predicted"
    alphas = ", ".join(f"{result['alpha']:g}" for result in results)
    settings = "".join(f", {name} {first.get('predictor', {}).get(name)}" for name in varied)
    note = f"An error of 1 is as good as no prediction. Written by `{first['method']}` with α = {alphas}{settings}."
    return Table(f"next-{slug}-{first['method']}", title, ["method", "error", "cosine"], rows, note)


def _icer_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        for benchmark, points in run.points.items():
            steps = points[-1].step - points[0].step
            cost = icer(steps, points[0].value, points[-1].value)
            text = number(cost, 2) if cost != float("inf") else "nothing gained"
            ends = number(points[0].value), number(points[-1].value)
            rows.append([str(run.folder), benchmark, *ends, str(steps), text])
    columns = ["run", "benchmark", "first", "last", "steps", "steps per point"]
    return Table(
        "icer",
        "Steps per point of accuracy gained (ICER)",
        columns,
        rows,
        "From a run's first evaluation to its last one.",
    )
