"""The parts of a report: each is made from runs, says what is missing, and is left out where it has nothing to say."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet

from .comparison import compare
from .figures import Picture, frontier_picture, heat_map, metric_picture
from .runs import SHORT, Arm, Run, benchmarks_of, group_arms
from .statistics import final, icer, mean_of, peak
from .tables import MISSING, Table, interval, number
from .trajectory import trajectory_figure


@dataclass(frozen=True)
class Section:
    """A heading and what is under it.

    Attributes:
        title (`str`): The heading.
        notes (`list[str]`): What is missing, and other sentences.
        tables (`list[Table]`), pictures (`list[Picture]`): In order.
        samples (`list[dict[str, str]]`): Completions, with `title`, `prompt`, `completion` and `score`.
    """

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.notes or self.tables or self.pictures or self.samples)


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


# ---- Evaluations


def evaluation_section(runs: Sequence[Run], folder: Path) -> Section:
    """What `gxpo eval` found out about the runs' models: its results lie in the runs' folders, or in its own."""
    rows = []
    for run in runs:
        root = run.folder.resolve()
        own = run.folder.glob("*/**/results.json")
        for path in sorted({*own, *folder.glob("*/results.json")}):
            found = json.loads(path.read_text())
            model = Path(found["model"]).resolve()
            if root not in (model, *model.parents):
                continue
            place = "the end" if model == root else str(model.relative_to(root))
            for benchmark, results in found["benchmarks"].items():
                scores = [
                    f"{name} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                    for name, score in results["metrics"].items()
                ]
                counts = str(results["problems"]), str(results["verify_failures"])
                rows.append(
                    [
                        run.label,
                        MISSING if run.seed is None else str(run.seed),
                        place,
                        benchmark,
                        counts[0],
                        "; ".join(scores),
                        counts[1],
                    ]
                )
    columns = ["arm", "seed", "model", "benchmark", "problems", "scores", "undecided"]
    note = "Each score with its 95 % bootstrap interval over problems, of one model: it knows nothing of other seeds."
    return Section(
        "Evaluations", [], [Table("evaluations", "What `gxpo eval` measured", columns, rows, note)] if rows else []
    )


# ---- Sweeps

SWEPT = ("lookahead_steps", "reposition_alpha", "gate_threshold", "learning_rate")


def sweep_section(runs: Sequence[Run]) -> Section:
    """K, α, τ and the learning rate, of each method that was run with several (GXPO, figure 4 and table 5)."""
    section = Section("Sweeps")
    for method in dict.fromkeys(run.method for run in runs):
        arms = [arm for arm in group_arms(runs) if arm.method == method and arm.runs[0].settings]
        varied = [n for n in SWEPT if len({arm.runs[0].settings.get(n) for arm in arms} - {None}) > 1]
        for benchmark in benchmarks_of([run for arm in arms for run in arm.runs]):
            slug = f"{method.lower()}-sweep-{benchmark.replace(' ', '-')}"
            if varied:
                section.tables.append(_sweep_table(arms, varied, benchmark, slug))
            for i, first in enumerate(varied):
                for second in varied[i + 1 :]:
                    section.pictures.append(_sweep_map(arms, first, second, benchmark, slug))
            if varied and (picture := frontier_picture(arms, benchmark, "hours", f"{slug}-frontier")):
                section.pictures.append(picture)
    return section


def _sweep_map(arms: Sequence[Arm], first: str, second: str, benchmark: str, slug: str) -> Picture:
    values: dict[tuple, list[float]] = {}
    for arm in arms:
        key = arm.runs[0].settings[first], arm.runs[0].settings[second]
        values.setdefault(key, []).extend(peak(points).value for points in arm.curves(benchmark))
    cells = {key: mean for key, of_it in values.items() if (mean := mean_of(of_it)) is not None}
    names = SHORT.get(first, first), SHORT.get(second, second)
    title = f"Peak of {benchmark} over {names[0]} and {names[1]}; means over n seeds."
    return heat_map(cells, names, f"{slug}-{first}-{second}", title)


def _sweep_table(arms: Sequence[Arm], varied: Sequence[str], benchmark: str, slug: str) -> Table:
    rows = []
    for arm in sorted(arms, key=lambda arm: [arm.runs[0].settings[name] for name in varied]):
        peaks = [peak(points) for points in arm.curves(benchmark)]
        if not peaks:
            continue
        shut = [run.shutoff_step for run in arm.runs if run.shutoff_step is not None]
        hours = [point.hours for point in peaks if point.hours is not None]
        rows.append(
            [
                *(f"{arm.runs[0].settings[name]:g}" for name in varied),
                interval(mean_of([final(points) for points in arm.curves(benchmark)])),
                interval(mean_of([point.value for point in peaks])),
                number(statistics.fmean(point.step for point in peaks), 0),
                number(statistics.fmean(point.backward_passes for point in peaks), 0),
                number(statistics.fmean(hours) if hours else None, 3),
                ", ".join(map(str, shut)) or MISSING,
            ]
        )
    columns = [SHORT.get(name, name) for name in varied]
    columns += ["final", "peak", "steps to peak", "passes to peak", "hours to peak", "shut-off step"]
    return Table(slug, f"{arms[0].method} over {', '.join(columns[: len(varied)])}: {benchmark}", columns, rows)


# ---- Diagnostics

METRICS = (  # file, title, unit, the metrics of the log with their names
    ("reward", "Reward of the rollouts.", "mean reward", {"reward": ""}),
    ("retention", "Retention r of coordinates: how much of the gradient the first probe left.", "retention r",
     {"lookahead/retention_mean": "mean", "lookahead/retention_std": "standard deviation"}),
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


def diagnostics_section(runs: Sequence[Run]) -> Section:
    arms = group_arms(runs)
    pictures = [metric_picture(arms, metrics, name, title, unit) for name, title, unit, metrics in METRICS]
    tables = [_displacement_table(arms), _active_table(arms), _clipping_table(arms)]
    return Section("Diagnostics", [], [t for t in tables if t.rows], [p for p in pictures if p is not None])


def _medians(arm: Arm, metrics: Sequence[str]) -> list[float | None]:
    """Over all logged steps of all seeds."""
    found = [[value for run in arm.runs for value in run.series(metric)[1]] for metric in metrics]
    return [statistics.median(values) if values else None for values in found]


def _metric_table(arms: Sequence[Arm], metrics: dict[str, str], name: str, title: str, note: str) -> Table:
    rows = [[arm.label, *(number(v, 4) for v in _medians(arm, list(metrics)))] for arm in arms]
    rows = [row for row in rows if any(cell != MISSING for cell in row[1:])]
    return Table(name, title, ["arm", *metrics.values()], rows, note)


def _displacement_table(arms: Sequence[Arm]) -> Table:
    metrics = {
        "lookahead/true_abs_error": "‖θK − true θK‖",
        "lookahead/true_abs_error_reposition": "α times that",
        "lookahead/true_error": "relative",
        "lookahead/true_cosine": "cosine",
        "lookahead/true_error_linear": "relative, K/2 for the scale",
        "lookahead/true_error_two_step": "relative, two steps alone",
        "lookahead/noise_cos": "cosine of g0 with itself",
        "lookahead/noise_retention_std": "noise of r",
    }
    note = (
        "Medians over the steps with `lookahead_diagnostics_steps`. The paper's table gives absolute errors alone; "
        "beside them stand errors relative to K real steps, what simpler rules would have missed by, and the noise."
    )
    return _metric_table(arms, metrics, "displacement", "Displacement, against K real steps (GXPO, table 6)", note)


def _active_table(arms: Sequence[Arm]) -> Table:
    metrics = {
        "lookahead/grad_norm_0": "‖g0‖",
        "lookahead/grad_norm_slow": "‖g_slow‖",
        "lookahead/cos_0_slow": "cos(g0, g_slow)",
        "lookahead/retention_mean": "retention",
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
        values = [_all(arm, metric) for metric in metrics]
        if any(values):
            cells = [(function(v) if v else None) for v in values for function in (statistics.fmean, max)]
            rows.append([arm.label, *(number(cell, 5) for cell in cells)])
    columns = ["arm", *(f"{name}, {what}" for name in metrics.values() for what in ("mean", "max"))]
    note = "Fractions of tokens, and nats a token, over the logged steps of all seeds."
    return Table("clipping", "Clipping and KL (GXPO, table 8)", columns, rows, note)


# ---- NExt


def next_section(runs: Sequence[Run]) -> Section:
    """What `gxpo extrapolate` left in the runs' folders, or beside them in a loop."""
    section = Section("NExt")
    for run in runs:
        places = [run.folder, run.folder.parent] if run.folder.name in ("before", "after") else [run.folder]
        found: dict[tuple, list[dict]] = {}  # what differs in α alone was predicted once
        for path in sorted({path for place in places for path in place.glob("extrapolated/**/extrapolation.json")}):
            result = json.loads(path.read_text())
            found.setdefault((result["method"], result["steps"][-1], result["steps_ahead"]), []).append(result)
        slug = str(run.folder).strip("./").replace("/", "-")
        section.tables.extend(_prediction_table(run, results, slug) for results in found.values())
        for results in list(found.values())[:1]:
            caption = f"Energy ratio and linearity of the trajectory of {run.folder}."
            section.pictures.append(Picture(f"next-{slug}", caption, trajectory_figure(results[0])))
    if section.tables:
        section.tables.append(_icer_table(runs))
    return section


def _prediction_table(run: Run, results: Sequence[dict], slug: str) -> Table:
    first, held_out = results[0], results[0]["held_out"]
    rows = [
        [method, number(values["error"]), number(values["cosine"])] for method, values in held_out["errors"].items()
    ]
    title = f"{run.folder}, steps {held_out['from_step']} to {held_out['to_step']} as they would have been predicted"
    alphas = ", ".join(f"{result['alpha']:g}" for result in results)
    note = f"An error of 1 is that of no prediction. Written by `{first['method']}` with α = {alphas}."
    return Table(f"next-{slug}-{first['method']}", title, ["method", "error", "cosine"], rows, note)


def _icer_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        for benchmark, points in run.points.items():
            cost = icer(run.steps, points[0].value, points[-1].value)
            text = number(cost, 2) if cost != float("inf") else "nothing gained"
            ends = number(points[0].value), number(points[-1].value)
            rows.append([str(run.folder), benchmark, *ends, str(run.steps), text])
    columns = ["run", "benchmark", "first", "last", "steps", "steps per point"]
    return Table(
        "icer", "Steps per point of accuracy gained (ICER)", columns, rows, "From a run's own first evaluation."
    )


# ---- Cost


def cost_section(runs: Sequence[Run]) -> Section:
    rows, times = [], ("generation_time", "reward_time", "update_time")
    for arm in group_arms(runs):
        known = [run for run in arm.runs if run.seconds and run.steps]
        per_step = [run.seconds / run.steps for run in known]
        parts = [statistics.fmean(v) if (v := _all(arm, f"lookahead/{name}")) else None for name in times]
        total = statistics.fmean(per_step) if per_step else None
        rest = max(total - sum(parts), 0.0) if total is not None and None not in parts else None
        tokens = [tokens for run in arm.runs if (tokens := run.last("num_tokens")) is not None]
        fractions = [statistics.fmean(v) if (v := _all(arm, f"lookahead/{name}")) else None for name in FRACTIONS]
        memory = max(_all(arm, "lookahead/peak_memory"), default=None)
        row = [arm.label, number(total), *(number(part) for part in (*parts, rest))]
        row += [number(statistics.fmean(tokens) / 1e6 if tokens else None, 2), *(number(f, 2) for f in fractions)]
        rows.append([*row, number(memory, 2)])
    columns = ["arm", "seconds a step", "generation", "rewards", "passes", "rest"]
    columns += ["tokens (M)", "first pass", "replays", "GiB"]
    note = (
        "Seconds a step of the first process; evaluations left out. Rest: the optimizer, logging, and saving. "
        "First pass and replays: the tokens that are computed beside TRL's layout, padding included. GiB: what the "
        "first GPU held at most."
    )
    return Section("Cost", [], [Table("cost", "Where the time went", columns, rows, note)] if rows else [])


FRACTIONS = ("token_fraction", "replay_token_fraction")


def _all(arm: Arm, metric: str) -> list[float]:
    return [value for run in arm.runs for value in run.series(metric)[1]]


# ---- One run


def run_section(run: Run) -> Section:
    """Settings, environment, and completions early and late."""
    section = Section("The run")
    changed = run.about.get("changed", {})
    if changed:
        rows = [[name, json.dumps(value, ensure_ascii=False, default=str)] for name, value in sorted(changed.items())]
        section.tables.append(Table("settings", "Settings that differ from the defaults", ["setting", "value"], rows))
    if run.about:
        names = ("trainer", "model", "rewards", "training_examples", "parameters", "trainable_parameters", "processes",
                 "completions_per_step", "started", "machine", "python", "package", "versions")  # fmt: skip
        rows = [[name.replace("_", " "), _text(run.about[name])] for name in names if run.about.get(name) is not None]
        section.tables.append(Table("environment", "What was trained, on what", ["", ""], rows))
    files = sorted((run.folder / "completions").glob("completions_*.parquet"))
    if files:
        for title, path in (("Early", files[0]), ("Late", files[-1]))[: len(files)]:
            section.samples.extend(_samples(path, title))
    else:
        section.notes.append("No completions were kept: `log_completions: true` keeps them.")
    return section


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _samples(path: Path, when: str, count: int = 3) -> list[dict[str, str]]:
    rows = pyarrow.parquet.read_table(path).slice(0, count).to_pylist()
    samples = []
    for row in rows:
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
        scores = [f"{name} {value:g}" for name, value in numbers.items()]
        title = f"{when}: step {row['step']}"
        texts = {name: _message(row[name]) for name in ("prompt", "completion")}
        samples.append({"title": title, "score": ", ".join(scores), **texts})
    return samples


def _message(value) -> str:
    """A text, or the last of a conversation's messages."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def make_sections(
    runs: Sequence[Run], baseline: str | None = None, evaluations: Path = Path("out/eval")
) -> list[Section]:
    """All sections that have something to say.

    Args:
        runs (`Sequence[Run]`): What they are about.
        baseline (`str`, *optional*): Label of the arm that others are compared with; the first of GRPO if unset.
        evaluations (`Path`): Output folder of `gxpo eval`, beside what is in the runs' own.

    Raises:
        ValueError: If no arm has the baseline's label.
    """
    sections = [comparison_section(runs, baseline), evaluation_section(runs, evaluations), sweep_section(runs)]
    sections += [diagnostics_section(runs), next_section(runs), cost_section(runs)]
    if len(runs) == 1:
        sections.insert(1, run_section(runs[0]))
    return [section for section in sections if not section.is_empty]
