"""The figure of a run's trajectory: the share of one direction, and how straight it is."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder import ExtrapolationReport
from .figures import style_axes


COLOR = "#6A4C93"
SHADES = ("#6A4C93", "#A78BC0", "#D6C8E2", "#F2EDF6")  # from the most crooked to the straightest


def trajectory_figure(report: ExtrapolationReport) -> Figure:
    """Plots against the step the energy ratio and R² of straight lines, so far and ahead (NExt, figures 2 and 3).

    Args:
        report (`ExtrapolationReport`): The content of `extrapolation.json`.
    """
    figure = Figure(figsize=(12.0, 3.9), layout="constrained")
    energy, so_far, ahead = figure.subplots(1, 3)
    _draw_band(energy, report["energy_ratio"])
    energy.set_title("Energy ratio of the first direction, σ₁ / Σσ", fontsize=10)
    energy.legend(frameon=False, loc="upper right")
    _draw_band(so_far, report["linearity"]["so_far"])
    so_far.set_title("R² of a straight line through the deltas so far", fontsize=10)
    _draw_shares(ahead, report["linearity"]["ahead"], width=0.9 * (report["steps"][1] - report["steps"][0]))
    ahead.set_title(f"Matrices, by its R² on the next {max(report['checkpoints_ahead'], 2)} checkpoints", fontsize=10)
    for axes in (energy, so_far, ahead):
        axes.set_ylim(0, 1)
        axes.set_xlim(0, report["steps"][-1] + 1)
        axes.set_xlabel("optimizer step")
        style_axes(axes)
    return figure


def _draw_band(axes: Axes, values: dict[str, list[float]]) -> None:
    axes.plot(values["steps"], values["mean"], color=COLOR, linewidth=2, marker="o", markersize=3, label="mean")
    axes.fill_between(
        values["steps"],
        values["low"],
        values["high"],
        color=COLOR,
        alpha=0.2,
        linewidth=0,
        label="half of the matrices",
    )


def _draw_shares(axes: Axes, values: dict[str, list], width: float) -> None:
    if not values["steps"]:
        axes.text(0.5, 0.5, "too few checkpoints", ha="center", va="center", transform=axes.transAxes)
        return
    edges = [f"{edge:g}".replace("-", "−") for edge in values["edges"]]
    between = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)]
    bottom = [0.0] * len(values["steps"])
    labels = (f"below {edges[0]}", *between, f"above {edges[-1]}")
    for shares, shade, label in zip(zip(*values["shares"], strict=True), SHADES, labels, strict=True):
        axes.bar(values["steps"], shares, width, bottom=bottom, color=shade, edgecolor="white", label=label)
        bottom = [b + share for b, share in zip(bottom, shares, strict=True)]
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, fontsize=8, handlelength=1.2)
