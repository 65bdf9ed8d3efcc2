"""Tables that compare arms over seeds, with intervals of their differences."""

from collections.abc import Sequence

from .arms import Arm, benchmarks_of
from .runs import HELD_OUT, Run
from .statistics import (
    BUDGETS,
    Mean,
    area,
    final,
    match_peak,
    matched_amounts,
    mean_of,
    paired_difference,
    peak,
    value_at,
)
from .tables import MISSING, Table, interval, number


def results_table(arms: Sequence[Arm]) -> Table:
    """Final, peak and mean of each benchmark (GXPO, table 1)."""
    benchmarks = benchmarks_of([run for arm in arms for run in arm.runs])
    measures = ("final", "peak", "AUC")
    columns = ["arm", "seeds", *(f"{benchmark}, {what}" for benchmark in benchmarks for what in measures)]
    if len(benchmarks) > 1:
        columns.append("average, final")
    rows = []
    for arm in arms:
        row = [arm.label, str(len(arm.runs))]
        for benchmark in benchmarks:
            curves = arm.curves(benchmark)
            row += [interval(mean_of([final(points) for points in curves]))]
            row += [interval(mean_of([peak(points).value for points in curves]))]
            row += [interval(mean_of([area(points) for points in curves]))]
        if len(benchmarks) > 1:
            whole = [run for run in arm.runs if all(benchmark in run.points for benchmark in benchmarks)]
            averages = [sum(final(run.points[b]) for b in benchmarks) / len(benchmarks) for run in whole]
            row.append(interval(mean_of(averages)))
        rows.append(row)
    note = (
        "Mean over seeds [95 % interval, Student's t]; a single seed has none. A peak is chosen afterwards, so "
        "noise makes it too high. AUC: the area under the curve over steps, with the length of the run as 1."
    )
    return Table("results", "Final and peak accuracy", columns, rows, note)


def spending_table(arms: Sequence[Arm]) -> Table:
    """The total that each arm spent."""
    rows = []
    for arm in arms:
        lasts = [points[-1] for run in arm.runs for points in list(run.points.values())[:1]]
        cells = [arm.label]
        for budget, digits in zip(BUDGETS, (0, 0, 0, 3), strict=True):
            values = [point.spent(budget) for point in lasts if point.spent(budget) is not None]
            cells.append(number(sum(values) / len(values) if values else None, digits))
        shut = [run.shutoff_step for run in arm.runs if run.shutoff_step is not None]
        cells.append(", ".join(map(str, shut)) or MISSING)
        rows.append(cells)
    columns = ["arm", "steps", "rollouts", "backward passes", "hours", "shut-off step"]
    return Table("spending", "What was spent", columns, rows, "Means over seeds, up to the last evaluation.")


def matching_table(arms: Sequence[Arm], baseline: Arm, benchmark: str, slug: str) -> Table:
    """The cost of matching the baseline's peak (GXPO, table 2)."""
    names = {"step": "steps", "rollouts": "rollouts", "backward_passes": "passes", "hours": "hours"}
    columns = ["arm", "matched", *(f"{name}{what}" for name in names.values() for what in ("", " ×"))]
    rows = []
    for arm in arms:
        found = match_peak(arm, baseline, benchmark)
        row = [arm.label, f"{found.matched} of {found.n}" if found.n else "no common seed"]
        for budget in names:
            row.append(number(found.spent.get(budget), 3 if budget == "hours" else 0))
            row.append(number(found.speedup.get(budget), 2))
        rows.append(row)
    note = (
        f"Medians over the seeds that matched {baseline.label} of the same seed, at the first evaluation that did; × "
        "is what the baseline had spent at its own peak, over that. Seeds that did not match would have taken longer."
    )
    return Table(f"{slug}-matching", f"To match {baseline.label}'s peak on {benchmark}", columns, rows, note)


def budget_table(arms: Sequence[Arm], benchmark: str, budget: str, slug: str) -> Table | None:
    """Accuracy at equal spending (GXPO, tables 3 and 4)."""
    amounts = matched_amounts(arms, benchmark, budget)
    if not amounts:
        return None
    digits = 3 if budget == "hours" else 0
    rows = []
    for arm in arms:
        cells = [arm.label]
        for amount in amounts:
            values = [value_at(points, budget, amount) for points in arm.curves(benchmark)]
            cells.append(MISSING if None in values else interval(mean_of(values)))
        rows.append(cells)
    name = {"hours": "hours", "backward_passes": "backward passes"}[budget]
    columns = ["arm", *(f"{amount:,.{digits}f} {name}" for amount in amounts)]
    note = (
        "Interpolated linearly between evaluations; at fractions of what the cheapest run has spent. "
        f"{MISSING}: some run of the arm was not evaluated before or after it."
    )
    return Table(f"{slug}-at-{budget}", f"{benchmark} at matched {name}", columns, rows, note)


def difference_table(arms: Sequence[Arm], baseline: Arm) -> Table:
    """Differences to the baseline at the end and over the run, paired by seed."""
    rows = []
    for benchmark in benchmarks_of(baseline.runs):
        for arm in arms:
            if arm is baseline:
                continue
            row = [benchmark, arm.label]
            for measure in (final, area):
                found = paired_difference(arm, baseline, benchmark, measure)
                row += [interval(found, sign=True), _verdict(found)]
            rows.append([*row, str(found.n if found else 0)])
    columns = ["benchmark", "arm", f"final, to {baseline.label}", "at 95 %", f"AUC, to {baseline.label}", "at 95 %"]
    columns.append("pairs")
    note = "Differences, paired by seed; interval by Student's t, not corrected for the number of comparisons."
    return Table("differences", "Differences", columns, rows, note)


def _verdict(difference: Mean | None) -> str:
    if difference is None:
        return "no common seed"
    if difference.n == 1:
        return "one seed: not known"
    if not difference.excludes_zero:
        return "within noise"
    return "higher" if difference.value > 0 else "lower"


def demo_table(runs: Sequence[Run]) -> Table:
    """The demo's table, one row for each run."""
    rows = []
    for run in runs:
        first, last = run.points[HELD_OUT][0], run.points[HELD_OUT][-1]
        spent = (number(last.rollouts, 0), number(last.backward_passes, 0), number(run.seconds, 0))
        rows.append([run.label, number(first.value), number(last.value), *spent])
    columns = ("method", "pass@1 at start", "pass@1 at end", "rollouts", "backward passes", "seconds")
    return Table("demo", "The demo", columns, rows)
