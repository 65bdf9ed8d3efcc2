"""Runs beside each other: one table, one figure."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .runs import Run


COLORS = {"GRPO": "#5B6770", "SFPO": "#2B7BBA", "GXPO": "#C8442B"}  # one colour per method, throughout
COLUMNS = ("method", "pass@1 at start", "pass@1 at end", "rollouts", "backward passes", "seconds")


def comparison_table(runs: list[Run]) -> str:
    """The runs as a Markdown table, aligned for a terminal too."""
    rows = [
        (
            run.label,
            f"{run.points[0].pass_at_1:.3f}",
            f"{run.points[-1].pass_at_1:.3f}",
            f"{run.points[-1].rollouts:,}",
            f"{run.points[-1].backward_passes:,}",
            f"{run.seconds:.0f}",
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (COLUMNS, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def draw_comparison(runs: list[Run], path: Path) -> None:
    """Draws held-out pass@1 against rollouts and against backward passes; shut-off is a ring on the curve."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    against_rollouts, against_passes = figure.subplots(1, 2, sharey=True)
    _draw_panel(against_rollouts, runs, "rollouts", "rollouts (completions sampled)")
    _draw_panel(against_passes, runs, "backward_passes", "backward passes over a batch of rollouts")
    against_rollouts.set_ylabel("held-out pass@1")
    against_rollouts.legend(frameon=False, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _draw_panel(axes: Axes, runs: list[Run], cost: str, label: str) -> None:
    for run in runs:
        color = COLORS[run.label]
        axes.plot(
            [getattr(point, cost) for point in run.points],
            [point.pass_at_1 for point in run.points],
            color=color,
            linewidth=2,
            label=run.label,
        )
        if run.shutoff is not None:
            axes.plot(
                getattr(run.shutoff, cost),
                run.shutoff.pass_at_1,
                marker="o",
                markersize=9,
                markerfacecolor="white",
                markeredgecolor=color,
                markeredgewidth=2,
                linestyle="none",
                label=f"{run.label} shuts off, step {run.shutoff.step}",
            )
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
