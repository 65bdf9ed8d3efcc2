"""The log's metrics against the step, and their medians."""

import statistics
from collections.abc import Sequence

from ..arms import Arm, group_arms
from ..figures import metric_picture, step_control_picture
from ..runs import Run
from ..tables import Table, number
from .section import Section


METRICS = (  # file, title, unit, the metrics of the log with their names
    ("reward", "Reward of the rollouts.", "mean reward", {"reward": ""}),
    ("retention", "Retention r of coordinates, or ρ of the model: the fraction of the gradient after the first probe.",
     "retention", {"lookahead/retention_mean": "mean", "lookahead/retention_std": "standard deviation",
                   "lookahead/retention": "of the model"}),
    ("scale", "Scale of the extrapolation, mean over coordinates.", "scale", {"lookahead/scale_mean": ""}),
    ("gate-z", "The gate's z-score.", "z", {"lookahead/gate_z": ""}),
    ("grad-norm", "Norms of the gradients of the passes of an active step.", "gradient norm",
     {"lookahead/grad_norm_0": "first", "lookahead/grad_norm_1": "second", "lookahead/grad_norm_slow": "corrective"}),
    ("cosine", "Cosine of the first and the corrective gradient.", "cosine", {"lookahead/cos_0_slow": ""}),
    ("kl", "KL divergence to the reference.", "KL (nats a token)", {"kl": ""}),
    ("clipping", "Tokens whose ratio was clipped.", "fraction of tokens", {"clip_ratio/region_mean": ""}),
    ("entropy", "Entropy of the policy.", "nats a token", {"entropy": ""}),
    ("length", "Length of completions.", "tokens", {"completions/mean_length": ""}),
    ("groups", "Groups whose completions have one reward.", "fraction of groups", {"frac_reward_zero_std": ""}),
)  # fmt: skip
OF_PHANTOM_STEPS = ("lookahead/retention", "lookahead/true_error_scaled")
"""Tables have a column for them where an arm has phantom steps."""


def diagnostics_section(runs: Sequence[Run]) -> Section:
    arms = group_arms(runs)
    pictures = [metric_picture(arms, metrics, name, title, unit) for name, title, unit, metrics in METRICS]
    pictures.append(step_control_picture(arms))
    tables = [_displacement_table(arms), _active_table(arms), _clipping_table(arms)]
    return Section("Diagnostics", [], [t for t in tables if t.rows], [p for p in pictures if p is not None])


def _metric_table(arms: Sequence[Arm], metrics: dict[str, str], name: str, title: str, note: str) -> Table:
    """Medians over all logged steps of all seeds; an arm that logged none of the metrics has no row."""
    unseen = {metric for metric in OF_PHANTOM_STEPS if not any(arm.values(metric) for arm in arms)}
    metrics = {metric: label for metric, label in metrics.items() if metric not in unseen}
    rows = []
    for arm in arms:
        medians = [statistics.median(values) if (values := arm.values(metric)) else None for metric in metrics]
        if any(median is not None for median in medians):
            rows.append([arm.label, *(number(median, 4) for median in medians)])
    return Table(name, title, ["arm", *metrics.values()], rows, note)


def _displacement_table(arms: Sequence[Arm]) -> Table:
    metrics = {
        "lookahead/true_abs_error": "‖θK − true θK‖",
        "lookahead/true_abs_error_reposition": "α times that",
        "lookahead/true_error": "relative",
        "lookahead/true_cosine": "cosine",
        "lookahead/true_error_scaled": "relative, the paper's scale for phantom steps",
        "lookahead/true_error_linear": "relative, K/2 for the scale",
        "lookahead/true_error_two_step": "relative, only two steps",
        "lookahead/noise_cos": "cosine of g0 with itself",
        "lookahead/noise_retention_std": "noise of r",
    }
    note = (
        "Medians over the steps with `lookahead_diagnostics_steps`. The paper's table has only absolute errors. "
        "Added are errors relative to K real steps, the errors of simpler rules, and the noise."
    )
    return _metric_table(arms, metrics, "displacement", "Displacement, against K real steps (GXPO, table 6)", note)


def _active_table(arms: Sequence[Arm]) -> Table:
    metrics = {
        "lookahead/grad_norm_0": "‖g0‖",
        "lookahead/grad_norm_slow": "‖g_slow‖",
        "lookahead/cos_0_slow": "cos(g0, g_slow)",
        "lookahead/retention_mean": "retention",
        "lookahead/retention": "retention of the model",
        "lookahead/scale_mean": "scale",
        "lookahead/effective_multiplier": "effective multiplier",
        "lookahead/inactive_fraction": "inactive coordinates",
    }
    note = "Medians over the steps of the active phase, all seeds."
    return _metric_table(arms, metrics, "active-phase", "The active phase (GXPO, table 7)", note)


def _clipping_table(arms: Sequence[Arm]) -> Table:
    metrics = {
        "clip_ratio/region_mean": "clipped, first pass",
        "lookahead/clip_ratio_slow": "clipped, corrective pass",
        "kl": "KL, first pass",
        "lookahead/kl_slow": "KL, corrective pass",
    }
    rows = []
    for arm in arms:
        values = [arm.values(metric) for metric in metrics]
        if any(values):
            cells = [(function(v) if v else None) for v in values for function in (statistics.fmean, max)]
            rows.append([arm.label, *(number(cell, 5) for cell in cells)])
    columns = ["arm", *(f"{name}, {what}" for name in metrics.values() for what in ("mean", "max"))]
    note = "Fractions of tokens, and nats a token, over the logged steps of all seeds."
    return Table("clipping", "Clipping and KL (GXPO, table 8)", columns, rows, note)
