"""GRPO, SFPO, GXPO and NExt over seeds: what a lookahead is worth, at equal and at tuned learning rates.

    python benchmarks/compare_rules.py                     # all parts, two runs at a time: two to three hours
    python benchmarks/compare_rules.py --parts equal lora  # some of them
    python benchmarks/compare_rules.py --quick             # few batches, arms and seeds: minutes, to see that it runs
    python benchmarks/compare_rules.py --draw              # trains nothing: pages and figure from the committed JSON

All arms of a part start from one warm start and see the same prompts, seed by seed, and as many rollouts. A lookahead
moves further on a batch, and so does a larger learning rate, so that a gain at an equal one proves nothing: `equal`
has every rule and variant at one learning rate, next to GRPO at multiples of it, and `tuned` has each at its own best,
found on other seeds with equal budget. `onepass` is `tuned` with what costs no further pass: AdamW with another β1,
other optimizers, and smaller minibatches; `cheaper` has fewer passes, and passes on a part of the rows. `lora`,
`decay` and `harder` are `tuned` with adapters, with a learning rate that falls to 0, and with longer problems;
`precision` measures the noise under the retention ratio and the true error of the lookahead, `next` what NExt adds.

What has been trained is not trained again; `--out` holds the runs. Each part leaves `results/compare_rules/PART.json`
and a page, `PART.html`, next to it. Git has the JSON and the figure, not the pages: `--draw` makes them from the JSON,
with every curve and the medians of the diagnostics; those of a training also show metrics over steps and the time.
The committed rows of the ratio of updates and of a relative threshold are of version 0.1, which had them as settings.
Seconds are of CPU time, so that a busy machine matters less.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import RESULTS, describe_machine
from matplotlib.figure import Figure
from training import HELD_OUT, Settings, start_worker, train_loop, train_run

from gxpo_trl.reporting.arms import Arm as ArmOfRuns
from gxpo_trl.reporting.arms import group_arms
from gxpo_trl.reporting.figures import COLORS
from gxpo_trl.reporting.page import render, write_report
from gxpo_trl.reporting.runs import Run, load_run
from gxpo_trl.reporting.sections import make_sections
from gxpo_trl.reporting.sections.comparison import comparison_section
from gxpo_trl.reporting.sections.section import Section
from gxpo_trl.reporting.sections.sweeps import sweep_section
from gxpo_trl.reporting.statistics import Mean, area, final, match_peak, mean_of, paired_difference, peak
from gxpo_trl.reporting.tables import Table, number
from gxpo_trl.scripts.demo import quieten
from gxpo_trl.tasks.arithmetic import OPERATIONS, load_arithmetic
from gxpo_trl.tasks.names import EMBEDDED_MODEL
from gxpo_trl.tasks.tiny_model import build_model, build_tokenizer, warm_start


TUNING_SEEDS = (100, 101)
HELD_OUT_PROBLEMS, SAMPLES = 64, 16
HARDER_OPERATIONS = (5, 6, 7)


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison.

    Attributes:
        label (`str`): What tables and figures call it.
        settings (`Settings`): Where its recipe differs from that of GRPO.
        hooks (`tuple[str, ...]`): Of `training.HOOKS`.
        rate_factor (`float`): Its learning rates are those of a part times this.
    """

    label: str
    settings: Settings = field(default_factory=dict)
    hooks: tuple[str, ...] = ()
    rate_factor: float = 1.0

    @property
    def steps_per_batch(self) -> int:
        """How many steps, as TRL counts them, it takes on a batch of rollouts."""
        accumulation = self.settings.get("gradient_accumulation_steps", 1)
        generations = self.settings.get("steps_per_generation", accumulation) // accumulation
        return self.settings.get("num_iterations", 1) * generations


def gxpo(label: str, steps: int = 5, alpha: float = 1.0, **settings: Any) -> Arm:
    """An arm of GXPO whose gate never closes, unless the settings say otherwise."""
    rule = {"update_rule": "gxpo", "lookahead_steps": steps, "reposition_alpha": alpha, "gate_signal": "never"}
    return Arm(label, rule | settings)


def sfpo(steps: int) -> Arm:
    rule = {"update_rule": "sfpo", "lookahead_steps": steps, "reposition_alpha": 0.8, "gate_signal": "never"}
    return Arm(f"SFPO K {steps}", rule)


GRPO = Arm("GRPO")
TWO_ITERATIONS = Arm("GRPO, 2 iterations", {"num_iterations": 2})
THREE_ITERATIONS = Arm("GRPO, 3 iterations", {"num_iterations": 3})
GXPO = gxpo("GXPO K 5 α 1")
TWO_PROBES = gxpo("scale 1, α 1", scale_max=1.0)
LINEAR = replace(gxpo("scale K/2, K 5 α 1"), hooks=("scale K/2",))
ROLLBACK = replace(gxpo("GXPO K 5 α 1, rollback"), hooks=("rollback",))
FASTER = {"adam_beta1": 0.9**3, "adam_beta2": 0.999**3}
"""AdamW forgets in one step what its defaults forget in three, which the passes of a batch are where probes carry."""
FASTER_ADAM = Arm("GRPO, AdamW betas cubed", FASTER)
FASTER_ROLLBACK = replace(gxpo("GXPO K 5 α 1, rollback, AdamW betas cubed", **FASTER), hooks=("rollback",))
PER_MATRIX = replace(gxpo("GXPO K 5 α 1, ratio per matrix"), hooks=("ratio per matrix",))
GATE = {"gate_signal": "grad_norm", "gate_threshold": 0.5, "gate_window": 10, "gate_warmup_steps": 10}
GATED = gxpo("GXPO K 5 α 1, gate", **GATE)

EQUAL = (
    *(GRPO, TWO_ITERATIONS, THREE_ITERATIONS, sfpo(3), sfpo(5)),
    *(gxpo("GXPO K 5 α 0.1", alpha=0.1), gxpo("GXPO K 5 α 0.5", alpha=0.5), GXPO),
    *(gxpo("GXPO K 3 α 1", steps=3), gxpo("GXPO K 10 α 1", steps=10), gxpo("GXPO K 5 α 1.5", alpha=1.5)),
    *(TWO_PROBES, LINEAR, ROLLBACK, GATED),
)
TUNED = (
    *(GRPO, THREE_ITERATIONS, sfpo(3), gxpo("GXPO K 5 α 0.5", alpha=0.5), GXPO),
    *(gxpo("GXPO K 10 α 1", steps=10), LINEAR, ROLLBACK, PER_MATRIX, FASTER_ADAM, FASTER_ROLLBACK),
)
NADAM = Arm("GRPO, NAdamW", hooks=("nadamw",))
MOMENTUM = Arm("GRPO, SGD with momentum", hooks=("sgd with momentum",), rate_factor=1000)
"""Its learning rate is another quantity than AdamW's: the length of a step over the clipped gradient's."""


def minibatches(count: int) -> Arm:
    """GRPO of as many optimizer steps a batch of rollouts, each on rows of its own: one pass over each row."""
    settings = {"gradient_accumulation_steps": 4 // count, "steps_per_generation": 4}
    return Arm(f"GRPO, {count} disjoint minibatches", settings)


ONE_PASS = (
    *(GRPO, *(Arm(f"GRPO, AdamW β1 {beta}", {"adam_beta1": beta}) for beta in (0.0, 0.5, 0.73))),
    *(NADAM, MOMENTUM, minibatches(2), minibatches(4)),
)
"""What a user can change for nothing."""
TWO_PASSES = gxpo("two passes", steps=1)
UP_TO_FIVE = replace(sfpo(4), settings={**sfpo(4).settings, "reposition_alpha": 1.0})
CHEAPER = (
    *(GRPO, TWO_PASSES, replace(TWO_PROBES, label="three passes")),
    replace(TWO_PROBES, label="three passes, the later on half of the rows", hooks=("half of the rows",)),
    replace(TWO_PROBES, label="three passes, the later on a quarter of the rows", hooks=("a quarter of the rows",)),
    replace(GXPO, label=f"{GXPO.label}, the later on half of the rows", hooks=("half of the rows",)),
    replace(TWO_PROBES, label="three passes, the later on earlier batches", hooks=("earlier batches",)),
    replace(UP_TO_FIVE, label="up to five passes, until ⟨g, g0⟩ falls", hooks=("until the projection falls",)),
    replace(UP_TO_FIVE, label="up to five passes, until the head surges", hooks=("until the head surges",)),
)
"""Less than three whole passes, or as many as a batch is good for."""
QUICK = (GRPO, THREE_ITERATIONS, GXPO, LINEAR, ROLLBACK, PER_MATRIX, NADAM, MOMENTUM, ONE_PASS[-1])
"""What `--quick` runs of them: each way of making a run once."""
FIRST_STEPS = gxpo("GXPO K 5 α 1, first 12 steps", max_active_steps=12)
SCHEDULED = (GATED, FIRST_STEPS)
"""At the learning rate found for `GXPO`: when to stop looking ahead."""
ON_PAGES = [
    arm.label for arm in (*ONE_PASS, *CHEAPER, THREE_ITERATIONS, sfpo(3), GXPO, LINEAR, ROLLBACK, GATED, FIRST_STEPS)
]
"""Pages are of these arms: the curves of all twenty could not be told apart."""
LORA = {
    **{"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Part:
    """Arms that are compared with each other.

    Attributes:
        name (`str`): Of its file and folder.
        title (`str`): Of its panel.
        arms (`tuple[Arm, ...]`): The first is what others are compared with.
        learning_rates (`tuple[float, ...]`): Of several, each arm has the best of its own; a single one is everyone's.
        settings (`Settings`): Of all its arms.
        seeds (`int`): Runs of an arm.
        batches (`int`): Of rollouts, in a run.
        every (`int`): Batches between evaluations.
        extends (`bool`): Whether learning rates beyond the given ones are tried where the last is the best.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    learning_rates: tuple[float, ...]
    settings: Settings = field(default_factory=dict)
    seeds: int = 8
    batches: int = 48
    every: int = 6
    extends: bool = True


RATES = (1e-4, 2e-4, 4e-4)
FALLING, LONGER = {"lr_scheduler_type": "linear"}, {"max_completion_length": 48}
PARTS = (
    Part("tuned", "Full fine-tuning, constant learning rate", TUNED, (5e-5, *RATES)),
    Part("onepass", "One pass over a batch", ONE_PASS, RATES),
    Part("cheaper", "Passes on a part of the rows", CHEAPER, RATES),
    Part("equal", "One learning rate for all", EQUAL, (3e-5,), batches=36),
    Part("lora", "LoRA of rank 8", (GRPO, sfpo(3), GXPO), (5e-4, 1e-3, 2e-3, 4e-3), LORA),
    Part("decay", "A learning rate that falls to 0", (GRPO, GXPO, FIRST_STEPS), (*RATES, 8e-4), FALLING),
    Part("harder", "Longer problems, a weaker start", (GRPO, sfpo(3), GXPO), RATES, LONGER),
)


# ---- Many runs


@dataclass
class Bench:
    """Where runs are trained and kept.

    Attributes:
        folder (`Path`): Of all runs.
        pool (`ProcessPoolExecutor`): Trains them.
        quick (`bool`): Whether they only show that everything runs.
    """

    folder: Path
    pool: ProcessPoolExecutor
    quick: bool = False

    def train(self, part: Part, arms: Sequence[tuple[Arm, float]], seeds: Sequence[int]) -> dict[tuple, list[Run]]:
        """The runs of arms at their learning rates, one a seed; says of each arm when it is done."""
        jobs = {}
        for seed in seeds:
            for arm, rate in arms:
                folder = self.folder / part.name / f"{arm.label}, lr {rate:g}".replace(" ", "_").replace("/", "-")
                settings = self.settings(part, arm, rate, seed)
                place = folder / f"seed-{seed}"
                jobs[self.pool.submit(train_run, place, settings, arm.hooks)] = (arm.label, rate)
        found: dict[tuple, list[Run]] = {}
        for job in as_completed(jobs):
            label, rate = jobs[job]
            runs = found.setdefault((label, rate), [])
            runs.append(load_run(job.result(), label))
            if len(runs) == len(seeds):
                runs.sort(key=lambda run: run.seed)
                curves = [run.points[HELD_OUT] for run in runs]
                auc, end = (statistics.fmean(map(value, curves)) for value in (area, final))
                print(f"  {label}, lr {rate:g}: AUC {auc:.3f}, final {end:.3f}, {len(runs)} seeds", flush=True)
        return found

    def settings(self, part: Part, arm: Arm, rate: float, seed: int) -> Settings:
        """Where a run's recipe differs from `recipes/tiny/grpo.yaml`."""
        task = self.folder / ("task-harder" if part.name == "harder" else "task")
        return {
            "dataset_name": task / "data",
            "model_name_or_path": task / "model" if part.name == "harder" else EMBEDDED_MODEL,
            "max_steps": part.batches * arm.steps_per_batch,
            "eval_strategy": "no",
            "eval_steps": part.every * arm.steps_per_batch,
            "eval_benchmarks": HELD_OUT,
            "eval_samples": SAMPLES,
            "per_device_eval_batch_size": HELD_OUT_PROBLEMS * SAMPLES,
            "learning_rate": rate,
            "seed": seed,
            **part.settings,
            **arm.settings,
            **({"eval_samples": 2} if self.quick else {}),
        }


def make_tasks(folder: Path, harder: bool) -> None:
    """The embedded task, and one of longer problems with a warm start of its own, as files."""
    tasks = {"task": OPERATIONS} | ({"task-harder": HARDER_OPERATIONS} if harder else {})
    for name, operations in tasks.items():
        if (folder / name / "data").is_dir():
            continue
        if operations == HARDER_OPERATIONS:
            print("warm start on longer problems: about three minutes", flush=True)
            tokenizer = build_tokenizer()
            model = build_model(tokenizer)
            warm_start(model, tokenizer, operations=operations, bare_fraction=0.9)
            model.save_pretrained(folder / name / "model")
            tokenizer.save_pretrained(folder / name / "model")
        rows = load_arithmetic(test_size=HELD_OUT_PROBLEMS, operations=operations)
        rows["train"].to_json(folder / name / "data" / "train.jsonl")
        problems = [{"problem": row["prompt"][-1]["content"], "answer": row["solution"]} for row in rows["test"]]
        (folder / name / "held-out.json").write_text(json.dumps(problems, indent=1) + "\n")


def tune(bench: Bench, part: Part) -> tuple[list[tuple[Arm, float]], dict[str, dict[str, float]]]:
    """The learning rate of the best mean AUC for each arm, and what was tried.

    An arm that is best at the end of the grid is tried beyond it, by the grid's own factor, until it is not.
    """
    tried: dict[str, dict[float, float]] = {arm.label: {} for arm in part.arms}
    factor = part.learning_rates[1] / part.learning_rates[0]
    missing = [(arm, float(f"{arm.rate_factor * rate:.3g}")) for arm in part.arms for rate in part.learning_rates]
    while missing:
        for (label, rate), runs in bench.train(part, missing, TUNING_SEEDS[: 1 if bench.quick else None]).items():
            tried[label][rate] = statistics.fmean(area(run.points[HELD_OUT]) for run in runs)
        missing = []
        for arm in part.arms:
            rates = tried[arm.label]
            best = max(rates, key=rates.get)
            beyond = best * factor if best == max(rates) else best / factor
            if best in (max(rates), min(rates)) and part.extends:
                missing.append((arm, float(f"{beyond:.3g}")))
    chosen = [(arm, max(tried[arm.label], key=tried[arm.label].get)) for arm in part.arms]
    return chosen, {label: {f"{r:g}": auc for r, auc in sorted(rates.items())} for label, rates in tried.items()}


def run_part(bench: Bench, part: Part) -> tuple[list[Run], dict]:
    """Its runs, and further results about them."""
    seeds = range(part.seeds)
    if len(part.learning_rates) > 1:
        arms, tried = tune(bench, part)
        if part.name == "tuned":
            rate = next(rate for arm, rate in arms if arm is GXPO)
            arms += [(arm, rate) for arm in SCHEDULED]
        about = {"tuned_on_seeds": TUNING_SEEDS, "tried": tried}
        found = bench.train(part, arms, seeds)
    else:
        (rate,) = part.learning_rates
        arms = [(arm, rate) for arm in part.arms]
        arms += [(Arm(f"GRPO, lr × {times}"), float(f"{times * rate:.3g}")) for times in (2, 3)]
        found = bench.train(part, arms, seeds)
        times = effective_steps(found[(GXPO.label, rate)])
        same_reach = (Arm(f"GRPO, lr × {times:.1f}, the reach of {GXPO.label}"), float(f"{times * rate:.3g}"))
        arms.append(same_reach)
        found |= bench.train(part, [same_reach], seeds)
        about = {"effective_steps": times}
    return [run for arm, rate in arms for run in found[(arm.label, rate)]], about


def effective_steps(runs: Sequence[Run]) -> float:
    """Steps that one lookahead step is as long as: the reposition in units of its two probes, and the correction."""
    return 1 + 2 * statistics.median(v for run in runs for v in run.series("lookahead/effective_multiplier")[1])


# ---- What came of it

DIAGNOSTICS = ("retention_mean", "retention_std", "scale_mean", "effective_multiplier", "cos_0_slow")
DIAGNOSTICS += ("inactive_fraction", "gate_z")
ERRORS = ("true_error", "true_error_linear", "true_error_two_step", "true_cosine", "noise_cos", "noise_retention_std")


def summarise(arm: ArmOfRuns, baseline: ArmOfRuns) -> dict:
    """One arm in figures: means with 95 % intervals over seeds, differences to the baseline seed by seed."""
    curves = arm.curves(HELD_OUT)
    matched = match_peak(arm, baseline, HELD_OUT)
    measures = {"auc": area, "final": final, "peak": lambda points: peak(points).value}
    return {
        "arm": arm.label,
        "learning_rate": arm.runs[0].settings["learning_rate"],
        "seeds": len(arm.runs),
        **{name: triple(mean_of(list(map(value, curves)))) for name, value in measures.items()},
        **{f"{name}_ahead": triple(paired_difference(arm, baseline, HELD_OUT, measures[name])) for name in measures},
        "to_baselines_peak": {"matched": matched.matched, "spent": matched.spent, "speedup": matched.speedup},
        "backward_passes": statistics.fmean(points[-1].backward_passes for points in curves),
        "cpu_seconds": statistics.median(points[-1].hours * 3600 for points in curves),
        "shutoff_steps": [run.shutoff_step for run in arm.runs if run.shutoff_step is not None],
        "diagnostics": medians(arm.runs, (*DIAGNOSTICS, *ERRORS)),
        "runs": [
            {"seed": run.seed, "curve": [[p.rollouts, p.value, p.backward_passes] for p in run.points[HELD_OUT]]}
            for run in arm.runs
        ],
    }


def triple(mean: Mean) -> list[float | None]:
    return [mean.value, mean.low, mean.high]


def medians(runs: Sequence[Run], names: Sequence[str]) -> dict[str, float]:
    values = {name: [v for run in runs for v in run.series(f"lookahead/{name}")[1]] for name in names}
    return {name: statistics.median(found) for name, found in values.items() if found}


def show(rows: Sequence[dict]) -> None:
    columns = ("arm", "learning rate", "AUC", "ahead of the first", "final", "ahead of the first", "passes", "seconds")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [row["arm"], f"{row['learning_rate']:g}"]
        for name in ("auc", "final"):
            cells += [f"{row[name][0]:.3f}", "" if row is rows[0] else around(row[f"{name}_ahead"])]
        cells += [f"{row['backward_passes']:.0f}", f"{row['cpu_seconds']:.1f}"]
        print(f"| {' | '.join(cells)} |")


def around(triple: Sequence[float | None]) -> str:
    mean, low, high = triple
    return f"{mean:+.3f}" if low is None else f"{mean:+.3f} ± {(high - low) / 2:.3f}"


def precision(bench: Bench, seeds: int, batches: int) -> list[dict]:
    """The noise under the retention ratio, and what the lookahead missed K real steps by, in each precision."""
    cells = [("full", "fp32", 3), ("full", "fp32", 10)]
    cells += [(tuning, dtype, 5) for tuning in ("full", "LoRA") for dtype in ("fp32", "bf16")]
    rows = []
    for tuning, dtype, k in cells if not bench.quick else (cells[0], cells[-1]):
        arm = gxpo(f"{tuning}, {dtype}, K {k}", steps=k, lookahead_diagnostics_steps=4, bf16=dtype == "bf16")
        arm = replace(arm, hooks=("noise of rounding",))
        part = Part("precision", "", (arm,), (), LORA if tuning == "LoRA" else {}, seeds, batches, batches)
        rate = 1e-3 if tuning == "LoRA" else 1e-4
        (runs,) = bench.train(part, [(arm, rate)], range(seeds)).values()
        measured = medians(runs, (*DIAGNOSTICS, *ERRORS))
        rows.append({"arm": arm.label, "learning_rate": rate, "seeds": seeds, "diagnostics": measured})
    columns = ("retention_mean", "retention_std", "noise_retention_std", *ERRORS[:3])
    print(f"| arm | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for row in rows:
        cells = [f"{row['diagnostics'][name]:.4f}" for name in columns]
        print(f"| {row['arm']} | {' | '.join(cells)} |")
    return rows


def extrapolated(bench: Bench, seeds: int, batches: int) -> list[dict]:
    """NExt in two thirds of a LoRA run, after GRPO and after GXPO; its control is restarted too, from the unchanged
    adapter.
    """
    spacing = max(batches // 18, 1)
    loop = {"trajectory_steps": spacing, "extrapolate_after": 12 * spacing, "extrapolate_steps_ahead": 4 * spacing}
    part = Part("next", "", (GRPO, GXPO), (3e-4,), LORA | loop, seeds, 18 * spacing, 2 * spacing)
    jobs = {}
    arms = part.arms[: 1 if bench.quick else None]
    for arm in arms:
        for seed in range(seeds):
            settings = bench.settings(part, arm, part.learning_rates[0], seed)
            folder = bench.folder / part.name / arm.label.replace(" ", "_") / f"seed-{seed}"
            jobs[(arm.label, seed)] = bench.pool.submit(train_loop, folder, settings, (0.0, 1.0))
    rows = []
    print("| arm | before | right after | at the end | ahead of a restart |\n|---|---|---|---|---|")
    for arm in arms:
        loops = [jobs[(arm.label, seed)].result() for seed in range(seeds)]
        anew = [final(load_run(loop[0.0] / "after").points[HELD_OUT]) for loop in loops]
        for alpha, name in ((0.0, "restarted"), (1.0, "NExt, α 1")):
            before = [final(load_run(loop[alpha] / "before").points[HELD_OUT]) for loop in loops]
            after = [load_run(loop[alpha] / "after").points[HELD_OUT] for loop in loops]
            values = {"before": before, "right_after": [points[0].value for points in after]}
            values |= {"end": [final(points) for points in after]}
            values["ahead"] = [end - other for end, other in zip(values["end"], anew, strict=True)]
            row = {"arm": f"{arm.label}, {name}", "learning_rate": part.learning_rates[0], "seeds": seeds}
            rows.append(row | {key: triple(mean_of(of_it)) for key, of_it in values.items()} | {"runs": values})
            cells = [f"{rows[-1][key][0]:.3f}" for key in ("before", "right_after", "end")]
            print(f"| {row['arm']} | {' | '.join(cells)} | {around(rows[-1]['ahead']) if alpha else ''} |", flush=True)
    return rows


def draw(results: Path) -> Path:
    """How far ahead of GRPO each arm is over the run, in each part that has tuned its learning rates."""
    tuned = [part for part in PARTS if len(part.learning_rates) > 1 and (results / f"{part.name}.json").is_file()]
    rows = {part.name: json.loads((results / f"{part.name}.json").read_text())["rows"] for part in tuned}
    heights = [len(rows[part.name]) - 1 for part in tuned]
    figure = Figure(figsize=(7.6, 0.27 * sum(heights) + 0.5 * len(tuned) + 0.4), layout="constrained")
    panels = figure.subplots(len(tuned), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, part in zip(panels, tuned, strict=True):
        axes.axvline(0, color="#888888", linewidth=1)
        for place, row in enumerate(rows[part.name][1:]):
            mean, low, high = row["auc_ahead"]
            color = COLORS[next((name for name in COLORS if row["arm"].startswith(name)), "GXPO")]
            axes.errorbar(mean, -place, xerr=[[mean - low], [high - mean]], fmt="o", markersize=5, color=color)
        axes.set_yticks([-i for i in range(len(rows[part.name]) - 1)], [row["arm"] for row in rows[part.name][1:]])
        axes.set_title(f"{part.title}: GRPO {rows[part.name][0]['auc'][0]:.3f}", loc="left", fontsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.set_ylim(1.4 - len(rows[part.name]), 0.6)
    seeds = rows[tuned[0].name][0]["seeds"]
    panels[-1].set_xlabel(f"mean held-out pass@1 over the run, minus GRPO's ({seeds} seeds, 95 %)", fontsize=9)
    figure.savefig(path := results / "ahead.png", dpi=160)
    return path


def show_against(results: Path, part: Part, label: str) -> None:
    """How far ahead of an arm the others of its part are, from the JSON only."""
    result = json.loads((results / f"{part.name}.json").read_text())
    known = {arm.label: arm for arm in (*part.arms, *SCHEDULED)}
    arms = {
        row["arm"]: ArmOfRuns(row["arm"], tuple(runs_of(row, part, known[row["arm"]], result["batches"])))
        for row in result["rows"]
        if row["arm"] in known
    }
    if label not in arms:
        return
    print(f"\n{part.name}\n\n| arm | AUC, ahead of {label} | final | seeds |\n|---|---|---|---|")
    for name, arm in arms.items():
        found = [paired_difference(arm, arms[label], HELD_OUT, measure) for measure in (area, final)]
        print(f"| {name} | {around(triple(found[0]))} | {around(triple(found[1]))} | {found[0].n} |")


def draw_page(results: Path, part: Part) -> Path:
    """The page of a part from its JSON only, without the runs: they are not in git."""
    result = json.loads((results / f"{part.name}.json").read_text())
    arms = {arm.label: arm for arm in (*part.arms, *SCHEDULED)}
    rows = [row for row in result["rows"] if row["arm"] in ON_PAGES]
    runs = [run for row in rows for run in runs_of(row, part, arms[row["arm"]], result["batches"])]
    sections = [comparison_section(runs, rows[0]["arm"]), sweep_section(runs), medians_section(result["rows"])]
    page = results / f"{part.name}.html"
    page.write_text(render(runs, [section for section in sections if not section.is_empty]))
    return page


def runs_of(row: dict, part: Part, arm: Arm, batches: int) -> list[Run]:
    """The runs of an arm as far as its row in the JSON has them: seeds, curves, and where the gates shut off."""
    settings = {"update_rule": "grpo", "learning_rate": row["learning_rate"], **part.settings, **arm.settings}
    steps = batches * arm.steps_per_batch
    shutoffs = row["shutoff_steps"] if len(row["shutoff_steps"]) == len(row["runs"]) else [None] * len(row["runs"])
    found = []
    for of_seed, shutoff in zip(row["runs"], shutoffs, strict=True):
        log = []
        for rollouts, value, passes in of_seed["curve"]:
            step = steps * rollouts // of_seed["curve"][-1][0]
            spent = {"eval/rollouts": rollouts, "eval/backward_passes": passes}
            log.append({"step": step, f"eval/{HELD_OUT}/avg@{SAMPLES}": value, **spent})
        if shutoff is not None:
            log[-1]["lookahead/shutoff_step"] = shutoff
        about = {"settings": settings | {"seed": of_seed["seed"]}}
        found.append(Run(Path(part.name) / f"seed-{of_seed['seed']}", row["arm"], log, about=about))
    return found


def medians_section(rows: Sequence[dict]) -> Section:
    """What the JSON has of the log of each arm, those without a curve on the page too."""
    names = [name for name in (*DIAGNOSTICS, *ERRORS) if any(name in row["diagnostics"] for row in rows)]
    columns = ["arm", "learning rate", "backward passes", "CPU s", *(name.replace("_", " ") for name in names)]
    cells = [
        [row["arm"], f"{row['learning_rate']:g}", number(row["backward_passes"], 0), number(row["cpu_seconds"], 1)]
        + [number(row["diagnostics"].get(name), 4) for name in names]
        for row in rows
    ]
    note = "Medians over the logged steps of all seeds; passes are means, seconds medians over seeds."
    return Section(
        "All arms", tables=[Table("medians", "Cost, and diagnostics of the active phase", columns, cells, note)]
    )


OTHER_PARTS = {"precision": (precision, 3, 20), "next": (extrapolated, 4, 72)}
"""What measures them, with how many seeds and batches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(part.name for part in PARTS), *OTHER_PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="few batches, arms and seeds; leaves no results")
    parser.add_argument("--draw", action="store_true", help="train nothing: draw pages and figure from the JSON there")
    parser.add_argument("--against", metavar="LABEL", help="with `--draw`: differences to this arm, seed by seed")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/compare_rules"), help="where runs are kept")
    options = parser.parse_args()
    folder = (options.out / "quick" if options.quick else options.out).resolve()
    results = folder / "results" if options.quick else RESULTS / "compare_rules"
    if not options.draw:
        measure_parts(options, folder, results)
    elif not (there := [p for p in PARTS if p.name in options.parts and (results / f"{p.name}.json").is_file()]):
        parser.error(f"{results} holds no results of these parts that have a page")
    else:
        for part in there:
            print(f"drawn in {draw_page(results, part)}", flush=True)
            if options.against:
                show_against(results, part, options.against)
    if any((results / f"{part.name}.json").is_file() for part in PARTS if len(part.learning_rates) > 1):
        print(f"drawn in {draw(results)}")


def measure_parts(options: argparse.Namespace, folder: Path, results: Path) -> None:
    """Trains what is not trained yet, and leaves the JSON and the page of each part."""
    results.mkdir(parents=True, exist_ok=True)
    quieten()
    make_tasks(folder, harder="harder" in options.parts)
    machine = describe_machine(threads=1)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, start_worker) as pool:
        bench = Bench(folder, pool, options.quick)
        for part in [part for part in PARTS if part.name in options.parts]:
            if options.quick:
                rates = part.learning_rates[1:3] or part.learning_rates
                arms = tuple(arm for arm in part.arms if arm in QUICK or part.name not in ("tuned", "onepass"))
                part = replace(part, arms=arms, learning_rates=rates, extends=False, seeds=2, batches=2, every=1)
            print(f"\n{part.name}", flush=True)
            runs, about = run_part(bench, part)
            arms = group_arms(runs)
            rows = [summarise(arm, arms[0]) for arm in arms]
            show(rows)
            shown = [run for run in runs if run.label in ON_PAGES]
            page = write_report(shown, make_sections(shown, arms[0].label), folder / part.name / "report")
            shutil.copy(page, results / f"{part.name}.html")
            save(results, part.name, {**about, "batches": part.batches, "rows": rows, **machine})
        for name, (measure, seeds, batches) in OTHER_PARTS.items():
            if name in options.parts:
                print(f"\n{name}", flush=True)
                rows = measure(bench, *((1, batches // 4) if options.quick else (seeds, batches)))
                save(results, name, {"rows": rows, **machine})


def save(folder: Path, name: str, result: dict) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}", flush=True)


if __name__ == "__main__":
    main()
