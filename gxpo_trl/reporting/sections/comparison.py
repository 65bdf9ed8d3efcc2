"""Compares arms: accuracy, its cost, and what can't be concluded."""

from collections.abc import Sequence

from ...run_folder import RUN_NAME
from ..arm_tables import budget_table, difference_table, matching_table, results_table, spending_table
from ..arms import Arm, benchmarks_of, group_arms
from ..figures import Picture, curve_pictures, frontier_picture
from ..runs import Run
from ..tables import Table
from .section import Section


def comparison_section(runs: Sequence[Run], baseline: str | None) -> Section:
    tables, pictures = compare(runs, baseline)
    arms, notes = group_arms(runs), []
    for run in runs:
        if not run.finished:
            notes.append(f"{run.folder} has not ended: it is shown up to step {run.steps}.")
        if not run.points:
            notes.append(f"{run.folder} was never evaluated: set `eval_benchmarks` or `eval_strategy: steps`.")
        if not run.about:
            notes.append(
                f"{run.folder} holds no {RUN_NAME} (plain TRL writes none): settings and rollouts are not known."
            )
    single = [arm.label for arm in arms if len(arm.runs) == 1]
    if single and len(arms) > 1:
        notes.append(f"A single seed, so noise can't be distinguished from an effect: {'; '.join(single)}.")
    rates = {run.settings.get("learning_rate") for run in runs} - {None}
    if len({arm.method for arm in arms}) > 1 and len(rates) == 1:
        notes.append(
            "All arms have one learning rate, at which a lookahead moves further than GRPO: a gain may come from "
            "the larger step. Tune the learning rate of each method."
        )
    ends = {run.steps for run in runs if run.finished}
    if len(ends) > 1:
        notes.append(f"Runs end at different steps: {', '.join(map(str, sorted(ends)))}.")
    title = "Comparison" if len(arms) > 1 else "Accuracy"
    return Section(title, notes, tables, pictures)


def compare(runs: Sequence[Run], baseline_label: str | None = None) -> tuple[list[Table], list[Picture]]:
    """The tables and figures of the comparison.

    Raises:
        ValueError: If no arm has the baseline's label.
    """
    arms = group_arms(runs)
    evaluated = [arm for arm in arms if any(run.points for run in arm.runs)]
    baseline = find_baseline(arms, baseline_label)
    if not evaluated:
        return [], []
    tables, pictures = [results_table(evaluated), spending_table(evaluated)], []
    if baseline is not None and len(evaluated) > 1:
        tables.append(difference_table(evaluated, baseline))
    for benchmark in benchmarks_of(runs):
        slug = benchmark.replace(" ", "-")
        having = [arm for arm in evaluated if arm.curves(benchmark)]
        if baseline is not None and len(having) > 1 and baseline.curves(benchmark):
            tables.append(matching_table(having, baseline, benchmark, slug))
        if len(having) > 1:
            tables += filter(None, (budget_table(having, benchmark, b, slug) for b in ("backward_passes", "hours")))
        pictures += curve_pictures(having, benchmark, slug)
        frontier = frontier_picture(having, benchmark, "hours", f"{slug}-frontier")
        pictures += [frontier] if frontier is not None and len(having) > 1 else []
    return tables, pictures


def find_baseline(arms: Sequence[Arm], label: str | None = None) -> Arm | None:
    """The arm of that label; without one the first of GRPO, if there is another to compare with it.

    Raises:
        ValueError: If there is none of that label.
    """
    if label is not None:
        for arm in arms:
            if arm.label == label:
                return arm
        raise ValueError(f"No arm is called {label!r}. There are {', '.join(repr(arm.label) for arm in arms)}.")
    return next((arm for arm in arms if arm.method == "GRPO"), None) if len(arms) > 1 else None
