"""Whether several passes over a batch pay in time: the costs that runs logged, and the rollouts they must save."""

from collections.abc import Sequence

from ..arms import Arm, benchmarks_of, group_arms
from ..runs import Run
from ..statistics import match_peak
from ..step_costs import Cost, factor_needed, find_cost, is_plain, plain_steps, share_needed, share_outside
from ..tables import MISSING, Table, number
from .comparison import find_baseline
from .section import Section


COLUMNS = ("arm", "s", "c", "c is from", "steps active", "needs f above, while active", "over the run", "measured f")
COLUMNS += ("which pays where s is above",)
NOTE = (
    "s: share of a plain step outside its update (sampling, rewards, the rest). c: seconds of an active update "
    "divided by those of a plain one. Both from medians over the steps of all seeds. f: rollouts of the baseline at "
    "its peak divided by the rollouts that the arm took to match it, median over the seeds that did. The time is "
    "(s + c (1 - s)) / f of the baseline's. Over the run, c is the mean over active and plain steps. An estimate by "
    "passes is too high if later passes leave out rows. docs/pays.md has the rest."
)


def pays_section(runs: Sequence[Run], baseline_label: str | None = None) -> Section:
    """s, c and the factor of rollouts that an arm must save; for GRPO without such an arm, estimates by passes."""
    arms = group_arms(runs)
    baseline = find_baseline(arms, baseline_label)
    several = [arm for arm in arms if arm.method != "GRPO"]
    rows, notes = [], []
    for arm in several:
        cost = find_cost(arm, arms, baseline)
        if cost is None:
            notes.append(f"{arm.label} logged no active step with the time of its update: s and c are not known.")
        else:
            rows.append([arm.label, *_cost_cells(cost), *_saved_cells(arm, baseline, cost)])
    if not several:
        rows = [row for arm in arms if is_plain(arm) for row in _estimates(arm)]
    if any(row[1] == MISSING for row in rows):
        notes.append("The time of whole steps was not logged, so s is not known: add a `RunRecordCallback`.")
    tables = [Table("pays", "When several passes pay in time", COLUMNS, rows, NOTE)] if rows else []
    return Section("When it pays", notes, tables)


def _cost_cells(cost: Cost) -> list[str]:
    needed = [None if cost.s is None else factor_needed(cost.s, c) for c in (cost.c, cost.c_of_run)]
    return [number(cost.s, 2), number(cost.c, 2), cost.source, f"{cost.active:.0%}", *(number(f, 2) for f in needed)]


def _saved_cells(arm: Arm, baseline: Arm | None, cost: Cost) -> list[str]:
    """The factor that was measured on each benchmark, and the share at which it would pay."""
    factors, shares = [], []
    for benchmark in benchmarks_of(arm.runs) if baseline is not None else []:
        found = match_peak(arm, baseline, benchmark)
        f = found.speedup.get("rollouts")
        if f is not None:
            factors.append(f"{f:.2f} on {benchmark} ({found.matched} of {found.n} seeds)")
            share = share_needed(cost.c_of_run, f)
            shares.append("no share" if share is None else f"{share:.2f}")
    return ["; ".join(factors) or MISSING, "; ".join(shares) or MISSING]


def _estimates(arm: Arm) -> list[list[str]]:
    """What two and three passes would need on top of a run of GRPO."""
    plain = plain_steps(arm)
    if not plain:
        return []
    s, rows = share_outside(plain), []
    for passes, name in ((2, "two"), (3, "three")):
        cost = Cost(s, float(passes), "passes (an estimate)", 1.0)
        rows.append([f"{arm.label}, if it made {name} passes", *_cost_cells(cost), MISSING, MISSING])
    return rows
