"""Figures: one colour for each method, seeds as a mean line with a band, shut-off as a ring."""

import base64
import io
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MultipleLocator

from .arms import Arm, group_arms
from .runs import HELD_OUT, Run
from .statistics import Mean, peak, shutoff_point


COLORS = {"GRPO": "#5B6770", "GRPO, checked": "#3F8F5B", "SFPO": "#2B7BBA", "GXPO": "#C8442B"}
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""Dashes of the arms of one method, in turn."""
SHADES = (1.0, 0.6, 0.35)
"""Shades of a method's colour, used when its dashes run out."""
AXES = {
    "step": "optimizer step",
    "rollouts": "rollouts (completions sampled)",
    "backward_passes": "backward passes over a batch of rollouts",
    "hours": "hours of training",
}
STEP_MULTIPLIER, COSINES = "lookahead/step_multiplier", ("lookahead/cos_0_slow", "lookahead/cos_check")
"""The metrics of step control: its multiplier, and the cosines that it follows."""
MOST_POINTS = 1000
"""The most points of a line: more than a figure has pixels for."""


@dataclass(frozen=True)
class Picture:
    """A figure, its file name and what it shows."""

    name: str
    caption: str
    figure: Figure

    @cached_property
    def svg(self) -> bytes:
        buffer = io.BytesIO()
        save_figure(self.figure, buffer, format="svg")
        return buffer.getvalue()

    @property
    def is_broad(self) -> bool:
        return self.figure.get_figwidth() > 8

    def save(self, folder: Path) -> None:
        """As PNG and as SVG."""
        save_figure(self.figure, folder / f"{self.name}.png", dpi=160)
        (folder / f"{self.name}.svg").write_bytes(self.svg)

    def data_uri(self) -> str:
        """For a page that is one file."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


def save_figure(figure: Figure, target: Path | IO[bytes], **options: Any) -> None:
    """Draws a figure with its texts as they are: a `$` in a label does not start mathematics."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(target, **options)


def new_figure(width: float = 5.6, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Light grid lines behind the data, and no box around it."""
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def styles_of(arms: Sequence[Arm]) -> dict[str, dict]:
    """Colour and dashes of each arm's line."""
    seen: dict[str, itertools.count] = {}
    styles = {}
    for arm in arms:
        place = next(seen.setdefault(arm.method, itertools.count()))
        color = _darker(COLORS[arm.method], SHADES[place // len(STYLES) % len(SHADES)])
        styles[arm.label] = {"color": color, "linestyle": STYLES[place % len(STYLES)]}
    return styles


def _darker(color: str, part: float) -> str:
    return color if part == 1 else to_hex([part * channel for channel in to_rgb(color)])


def draw_curves(arms: Sequence[Arm], benchmark: str, budget: str, axes: Axes) -> bool:
    """The evaluations of each arm against what was spent. Returns whether there was anything to draw.

    Lines are means over the seeds that have an evaluation at a step, of the value and of what was spent. Bands are
    from the minimum to the maximum.
    """
    styles, drawn = styles_of(arms), False
    for arm in arms:
        curves = arm.curves(benchmark)
        by_step: dict[int, list] = {}
        for points in curves:
            for point in points:
                if point.spent(budget) is not None:
                    by_step.setdefault(point.step, []).append(point)
        if not by_step:
            continue
        drawn = True
        in_order = [of_it for _, of_it in sorted(by_step.items())]
        common = [of_it for of_it in in_order if len(of_it) == len(curves)] or in_order
        x = [statistics.fmean(point.spent(budget) for point in of_it) for of_it in common]
        values = [[point.value for point in of_it] for of_it in common]
        seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
        axes.plot(x, [statistics.fmean(v) for v in values], linewidth=2, label=arm.label + seeds, **styles[arm.label])
        if len(curves) > 1:
            low, high = ([function(v) for v in values] for function in (min, max))
            axes.fill_between(x, low, high, color=COLORS[arm.method], alpha=0.15, linewidth=0)
        for run in arm.runs:
            if ring := shutoff_point(run, benchmark, budget):
                axes.plot(
                    *ring,
                    marker="o",
                    markersize=7,
                    markerfacecolor="white",
                    markeredgewidth=1.6,
                    markeredgecolor=COLORS[arm.method],
                    linestyle="none",
                )
    axes.set_ylabel(name_of(benchmark))
    axes.set_xlim(left=0)
    label_spending(axes, budget)
    return drawn


def label_spending(axes: Axes, budget: str, suffix: str = "") -> None:
    """Labels the axis. Short runs are shown in minutes."""
    if budget != "hours":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    elif axes.get_xlim()[1] < 0.5:
        axes.xaxis.set_major_formatter(lambda x, _: f"{60 * x:g}")
        axes.xaxis.set_major_locator(MultipleLocator(_round_minutes(60 * axes.get_xlim()[1]) / 60))
    in_minutes = budget == "hours" and axes.get_xlim()[1] < 0.5
    axes.set_xlabel(("minutes of training" if in_minutes else AXES[budget]) + suffix)


def _round_minutes(most: float) -> float:
    """A round distance that gives at most six ticks."""
    return next((step for step in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if most / step <= 6), 10.0)


def name_of(benchmark: str) -> str:
    return benchmark if benchmark == HELD_OUT else f"{benchmark}, accuracy"


def curve_pictures(arms: Sequence[Arm], benchmark: str, slug: str) -> list[Picture]:
    """One picture for each budget that the runs recorded."""
    pictures = []
    has_shutoff = any(run.shutoff_step is not None for arm in arms for run in arm.runs)
    for budget, label in AXES.items():
        figure, axes = new_figure()
        if draw_curves(arms, benchmark, budget, axes):
            axes.legend(frameon=False, fontsize=8, loc="lower right")
            rings = " Rings: the lookahead shuts off." if has_shutoff else ""
            pictures.append(Picture(f"{slug}-{budget}", f"{name_of(benchmark)} against {label}.{rings}", figure))
    return pictures


def metric_picture(arms: Sequence[Arm], metrics: dict[str, str], slug: str, title: str, unit: str) -> Picture | None:
    """Metrics of the log against the step, each a line of its own; means over seeds, with bands."""
    figure, axes = new_figure()
    return Picture(slug, title, figure) if draw_metrics(arms, metrics, unit, axes) else None


def step_control_picture(arms: Sequence[Arm]) -> Picture | None:
    """The multiplier of the learning rate and the cosine that it follows, for arms with a multiplier."""
    arms = [arm for arm in arms if arm.values(STEP_MULTIPLIER)]
    if not arms:
        return None
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    panels = ((above, [STEP_MULTIPLIER], "multiplier M"), (below, COSINES, "cosine of gradients"))
    for axes, metrics, unit in panels:
        style_axes(axes)
        for metric in metrics:
            draw_metrics(arms, {metric: ""}, unit, axes)
    above.set_yscale("log", base=2)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    above.set_xlabel("")
    if below.get_legend() is not None:  # the lines are those above
        below.get_legend().remove()
    title = "Step control: the multiplier of the learning rate, and the cosine of gradients that it follows."
    return Picture("step-control", title, figure)


def draw_metrics(arms: Sequence[Arm], metrics: dict[str, str], unit: str, axes: Axes) -> bool:
    """Draws what `metric_picture` describes. Returns whether there was anything to draw."""
    styles, drawn = styles_of(arms), False
    for arm in arms:
        for (metric, label), dashes in zip(metrics.items(), itertools.cycle(STYLES)):
            series = [run.series(metric) for run in arm.runs]
            stride = max(max(len(steps) for steps, _ in series) // MOST_POINTS, 1)
            by_step: dict[int, list[float]] = {}
            for steps, values in series:
                for step, value in zip(steps[::stride], values[::stride], strict=True):
                    by_step.setdefault(step, []).append(value)
            if not by_step:
                continue
            drawn, steps = True, sorted(by_step)
            name = ", ".join(
                part for part in (arm.label if len(arms) > 1 else "", label if len(metrics) > 1 else "") if part
            )
            style = styles[arm.label] if len(metrics) == 1 else {**styles[arm.label], "linestyle": dashes}
            means = [statistics.fmean(by_step[step]) for step in steps]
            axes.plot(steps, means, linewidth=1.4, label=name or None, **style)
            if len(arm.runs) > 1:
                low, high = ([function(by_step[step]) for step in steps] for function in (min, max))
                axes.fill_between(steps, low, high, color=COLORS[arm.method], alpha=0.12, linewidth=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.set_xlim(left=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    return drawn


def frontier_picture(arms: Sequence[Arm], benchmark: str, budget: str, slug: str) -> Picture | None:
    """Peak against its cost: one dot for each run, a larger one for each arm."""
    figure, axes = new_figure()
    markers = itertools.cycle("osD^vP*X")
    drawn = False
    for arm in arms:
        peaks = [peak(points) for points in arm.curves(benchmark)]
        spent = [(p.spent(budget), p.value) for p in peaks if p.spent(budget) is not None]
        if not spent:
            continue
        drawn, marker, color = True, next(markers), COLORS[arm.method]
        x, y = zip(*spent, strict=True)
        axes.plot(x, y, marker, color=color, alpha=0.35, markersize=5)
        axes.plot(statistics.fmean(x), statistics.fmean(y), marker, color=color, markersize=9, label=arm.label)
    if not drawn:
        return None
    axes.set_ylabel(f"peak of {name_of(benchmark)}")
    axes.set_xlim(left=0)
    label_spending(axes, budget, " to the peak")
    axes.legend(frameon=False, fontsize=8)
    return Picture(slug, f"Peak of {name_of(benchmark)} against its cost ({AXES[budget]}).", figure)


def heat_map(cells: dict[tuple, Mean], names: tuple[str, str], slug: str, title: str) -> Picture:
    """A mean for each pair of settings, written into its cell."""
    rows, columns = (sorted({key[i] for key in cells}) for i in (0, 1))
    figure, axes = new_figure(max(3.6, 1.1 * len(columns) + 1.6), max(2.4, 0.7 * len(rows) + 1.2))
    grid = [
        [cells[row, column].value if (row, column) in cells else float("nan") for column in columns] for row in rows
    ]
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    known = [value for line in grid for value in line if value == value]
    middle = (min(known) + max(known)) / 2
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        if (row, column) in cells:
            mean = cells[row, column]
            color = "white" if mean.value < middle else "black"
            axes.text(j, i, f"{mean.value:.3f}\nn = {mean.n}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes)
    return Picture(slug, title, figure)


def draw_demo(runs: Sequence[Run], path: Path) -> None:
    """Draws the demo's figure: held-out pass@1 against rollouts and against backward passes."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, budget in zip(panels, ("rollouts", "backward_passes"), strict=True):
        draw_curves(group_arms(runs), HELD_OUT, budget, axes)
        axes.set_ylim(0, 1)
        axes.set_ylabel("")
        style_axes(axes)
    for run in runs:
        if run.shutoff_step is not None:
            label = f"{run.label} shuts off, step {run.shutoff_step}"
            ring = {"markerfacecolor": "white", "markeredgecolor": COLORS[run.method], "markeredgewidth": 1.6}
            panels[0].plot([], [], "o", markersize=7, label=label, **ring)
    panels[0].set_ylabel("held-out pass@1")
    panels[0].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=160)
