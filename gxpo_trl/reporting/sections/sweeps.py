"""Sweeps of settings: a table of the values, and a map for each pair of settings."""

import statistics
from collections.abc import Sequence

from ..arms import SHORT, Arm, benchmarks_of, group_arms
from ..figures import Picture, frontier_picture, heat_map
from ..runs import Run
from ..statistics import final, mean_of, peak
from ..tables import MISSING, Table, interval, number
from .section import Section


SWEPT = ("lookahead_steps", "reposition_alpha", "gate_threshold", "learning_rate")


def sweep_section(runs: Sequence[Run]) -> Section:
    """K, α, τ and the learning rate of each method that was run with several values (GXPO, figure 4 and table 5)."""
    section = Section("Sweeps")
    for method in dict.fromkeys(run.method for run in runs):
        arms = [arm for arm in group_arms(runs) if arm.method == method and arm.runs[0].settings]
        varied = [n for n in SWEPT if len({arm.runs[0].settings.get(n) for arm in arms} - {None}) > 1]
        arms = [arm for arm in arms if all(arm.runs[0].settings.get(name) is not None for name in varied)]
        for benchmark in benchmarks_of([run for arm in arms for run in arm.runs]):
            slug = f"{method.lower()}-sweep-{benchmark.replace(' ', '-')}"
            if varied:
                section.tables.append(_sweep_table(arms, varied, benchmark, slug))
            for i, first in enumerate(varied):
                for second in varied[i + 1 :]:
                    section.pictures.append(_sweep_map(arms, first, second, benchmark, slug))
            if varied and (picture := frontier_picture(arms, benchmark, "hours", f"{slug}-frontier")):
                section.pictures.append(picture)
    return section


def _sweep_map(arms: Sequence[Arm], first: str, second: str, benchmark: str, slug: str) -> Picture:
    values: dict[tuple, list[float]] = {}
    for arm in arms:
        key = arm.runs[0].settings[first], arm.runs[0].settings[second]
        values.setdefault(key, []).extend(peak(points).value for points in arm.curves(benchmark))
    cells = {key: mean for key, of_it in values.items() if (mean := mean_of(of_it)) is not None}
    names = SHORT.get(first, first), SHORT.get(second, second)
    title = f"Peak of {benchmark} over {names[0]} and {names[1]}; means over n seeds."
    return heat_map(cells, names, f"{slug}-{first}-{second}", title)


def _sweep_table(arms: Sequence[Arm], varied: Sequence[str], benchmark: str, slug: str) -> Table:
    rows = []
    for arm in sorted(arms, key=lambda arm: [arm.runs[0].settings[name] for name in varied]):
        peaks = [peak(points) for points in arm.curves(benchmark)]
        if not peaks:
            continue
        shut = [run.shutoff_step for run in arm.runs if run.shutoff_step is not None]
        hours = [point.hours for point in peaks if point.hours is not None]
        rows.append(
            [
                *(f"{arm.runs[0].settings[name]:g}" for name in varied),
                interval(mean_of([final(points) for points in arm.curves(benchmark)])),
                interval(mean_of([point.value for point in peaks])),
                number(statistics.fmean(point.step for point in peaks), 0),
                number(statistics.fmean(point.backward_passes for point in peaks), 0),
                number(statistics.fmean(hours) if hours else None, 3),
                ", ".join(map(str, shut)) or MISSING,
            ]
        )
    columns = [SHORT.get(name, name) for name in varied]
    columns += ["final", "peak", "steps to peak", "passes to peak", "hours to peak", "shut-off step"]
    return Table(slug, f"{arms[0].method} over {', '.join(columns[: len(varied)])}: {benchmark}", columns, rows)
