"""Sweeps of settings: a table of the values, and a map for each pair of settings."""

import itertools
import statistics
from collections.abc import Sequence

from ..arms import SHORT, Arm, benchmarks_of, differences, group_arms, shown_setting
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
        names = [*varied, *sorted(differences([arm.runs[0] for arm in arms]) - set(varied))]
        for benchmark in benchmarks_of([run for arm in arms for run in arm.runs]):
            slug = f"{method.lower()}-sweep-{benchmark.replace(' ', '-')}"
            if varied:
                section.tables.append(_sweep_table(arms, names, benchmark, slug))
            for first, second in itertools.combinations(varied, 2):
                section.pictures.extend(_sweep_maps(arms, names, (first, second), benchmark, slug))
            if varied and (picture := frontier_picture(arms, benchmark, "hours", f"{slug}-frontier")):
                section.pictures.append(picture)
    return section


def _sweep_maps(
    arms: Sequence[Arm], names: Sequence[str], axes: tuple[str, str], benchmark: str, slug: str
) -> list[Picture]:
    """A map for each combination of the other settings that differ."""
    others = [name for name in names if name not in axes]
    maps: dict[tuple[str, ...], dict[tuple, list[float]]] = {}
    for arm in arms:
        held = tuple(f"{SHORT.get(name, name)} {shown_setting(arm, name) or MISSING}" for name in others)
        key = tuple(arm.runs[0].settings[name] for name in axes)
        values = maps.setdefault(held, {}).setdefault(key, [])
        values.extend(peak(points).value for points in arm.curves(benchmark))
    pictures, shorts = [], (SHORT.get(axes[0], axes[0]), SHORT.get(axes[1], axes[1]))
    for held, values in maps.items():
        cells = {key: mean for key, of_it in values.items() if (mean := mean_of(of_it)) is not None}
        if len(cells) < 2 and len(maps) > 1:
            continue
        at = f" at {', '.join(held)}" if held else ""
        title = f"Peak of {benchmark} over {shorts[0]} and {shorts[1]}{at}; means over n seeds."
        pictures.append(heat_map(cells, shorts, "-".join([slug, *axes, *held]), title))
    return pictures


def _sweep_table(arms: Sequence[Arm], names: Sequence[str], benchmark: str, slug: str) -> Table:
    rows, varied = [], [name for name in names if name in SWEPT]
    for arm in sorted(arms, key=lambda arm: [arm.runs[0].settings[name] for name in varied]):
        peaks = [peak(points) for points in arm.curves(benchmark)]
        if not peaks:
            continue
        shut = [run.shutoff_step for run in arm.runs if run.shutoff_step is not None]
        hours = [point.hours for point in peaks if point.hours is not None]
        rows.append(
            [
                *(shown_setting(arm, name) or MISSING for name in names),
                interval(mean_of([final(points) for points in arm.curves(benchmark)])),
                interval(mean_of([point.value for point in peaks])),
                number(statistics.fmean(point.step for point in peaks), 0),
                number(statistics.fmean(point.backward_passes for point in peaks), 0),
                number(statistics.fmean(hours) if hours else None, 3),
                ", ".join(map(str, shut)) or MISSING,
            ]
        )
    columns = [SHORT.get(name, name) for name in names]
    columns += ["final", "peak", "steps to peak", "passes to peak", "hours to peak", "shut-off step"]
    return Table(slug, f"{arms[0].method} over {', '.join(columns[: len(names)])}: {benchmark}", columns, rows)
