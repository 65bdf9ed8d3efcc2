"""Arms beside each other: accuracy, what was spent for it, and what can't be concluded."""

from collections.abc import Sequence

from ..comparison import compare
from ..runs import Run, group_arms
from .section import Section


def comparison_section(runs: Sequence[Run], baseline: str | None) -> Section:
    tables, pictures = compare(runs, baseline)
    arms, notes = group_arms(runs), []
    for run in runs:
        if not run.finished:
            notes.append(f"{run.folder} has not come to its end: it is shown up to step {run.steps}.")
        if not run.points:
            notes.append(f"{run.folder} was never evaluated: set `eval_benchmarks` or `eval_strategy: steps`.")
        if not run.about:
            notes.append(
                f"{run.folder} holds no run.json (plain TRL writes none): settings and rollouts are not known."
            )
    single = [arm.label for arm in arms if len(arm.runs) == 1]
    if single and len(arms) > 1:
        notes.append(f"A single seed, so that noise can't be told from an effect: {'; '.join(single)}.")
    rates = {run.settings.get("learning_rate") for run in runs} - {None}
    if len({arm.method for arm in arms}) > 1 and len(rates) == 1:
        notes.append(
            "All arms have one learning rate, at which a lookahead moves further than GRPO does: a gain here may be "
            "that of a larger step. Compare each method at its best, over several."
        )
    ends = {run.steps for run in runs if run.finished}
    if len(ends) > 1:
        notes.append(f"Runs end at different steps: {', '.join(map(str, sorted(ends)))}.")
    title = "Comparison" if len(arms) > 1 else "Accuracy"
    return Section(title, notes, tables, pictures)
