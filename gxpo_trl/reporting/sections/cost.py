"""Time and memory."""

import statistics
from collections.abc import Sequence

from ..arms import group_arms
from ..runs import Run
from ..tables import Table, number
from .section import Section


TIMES = ("generation_time", "reward_time", "update_time")
FRACTIONS = ("token_fraction", "forward_only_token_fraction", "replay_token_fraction")


def cost_section(runs: Sequence[Run]) -> Section:
    rows = []
    for arm in group_arms(runs):
        known = [run for run in arm.runs if run.seconds and run.steps]
        per_step = [run.seconds / run.steps for run in known]
        parts = [statistics.fmean(v) if (v := arm.values(f"lookahead/{name}")) else None for name in TIMES]
        total = statistics.fmean(per_step) if per_step else None
        rest = max(total - sum(parts), 0.0) if total is not None and None not in parts else None
        tokens = [tokens for run in arm.runs if (tokens := run.last("num_tokens")) is not None]
        fractions = [statistics.fmean(v) if (v := arm.values(f"lookahead/{name}")) else None for name in FRACTIONS]
        memory = max(arm.values("lookahead/peak_memory"), default=None)
        row = [arm.label, number(total), *(number(part) for part in (*parts, rest))]
        row += [number(statistics.fmean(tokens) / 1e6 if tokens else None, 2), *(number(f, 2) for f in fractions)]
        rows.append([*row, number(memory, 2)])
    columns = ["arm", "seconds a step", "generation", "rewards", "passes", "rest"]
    columns += ["tokens (M)", "first pass", "forward only", "replays", "GiB"]
    note = (
        "Seconds a step of the first process; evaluations left out. Rest: the optimizer, logging, and saving. "
        "First pass, forward only and replays: tokens that are computed with a gradient, without one, and in each "
        "later pass, as fractions of those in TRL's layout with padding. GiB: peak of the first GPU."
    )
    return Section("Cost", [], [Table("cost", "Where the time went", columns, rows, note)] if rows else [])
