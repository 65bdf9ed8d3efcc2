"""What a run comes to against its learning rate: with step control, without, and with what a user would try first.

    python benchmarks/rates.py                          # all parts, two runs at a time: hours
    python benchmarks/rates.py --parts full --seeds 2   # less of it
    python benchmarks/rates.py --quick --results DIR    # minutes, to see that it runs
    python benchmarks/rates.py --costs                  # after that: whole runs by turns, for their CPU time
    python benchmarks/rates.py --draw                   # trains nothing: tables and figure from the committed JSON
    python benchmarks/rates.py --write                  # nor does this, which puts the tables into the pages

Each part is a regime: full fine-tuning, LoRA, longer problems, batches of 32 and 512 completions, bf16, a long run.
In each, arms are trained at learning rates up to a factor of 2,000 apart, on the same prompts seed by seed; others at
rates around their best. Figures are the mean held-out pass@1 over a run (AUC) and at its end (final), as means over
seeds with 95 % intervals. `--costs` measures the CPU time of each arm's run, and with it the AUC over the CPU time of
a run of GRPO.

`results/rates/PART.json` has every run that was made, and what it has is not made again, so that a part can be begun
on one day and continued on another; what has no JSON yet is looked for in `--out`. Prodigy and schedule-free need
`pip install prodigyopt schedulefree`, and are left out without it.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import RESULTS, describe_machine
from compare_rules import (
    GRPO,
    GXPO,
    HELD_OUT,
    LORA,
    THREE_ITERATIONS,
    Arm,
    Bench,
    Part,
    gxpo,
    make_tasks,
    minibatches,
)
from matplotlib.figure import Figure
from pages import fill
from training import Settings, start_worker, train_run

from gxpo_trl.reporting.runs import load_run
from gxpo_trl.reporting.statistics import Mean, area, final, mean_of
from gxpo_trl.scripts.demo import quieten


DOCS = RESULTS.parents[1] / "docs"
RESULTS_PAGE, CONTROL_PAGE = DOCS / "results.md", DOCS / "step-control.md"
CONTROL = {"step_control": "cosine"}
TWO_PASSES = gxpo("two passes, controlled", steps=1, **CONTROL)
THREE_PASSES = gxpo("three passes, controlled", steps=2, **CONTROL)
PHANTOM = gxpo("phantom K 5", extrapolation="optimizer")
PHANTOM_CONTROLLED = gxpo("phantom K 5, controlled", extrapolation="optimizer", **CONTROL)
FOUR_MINIBATCHES = minibatches(4)
EIGHT_MICRO_BATCHES = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8}
CHECK = Arm("check", {"update_rule": "check", **EIGHT_MICRO_BATCHES})
CHECK_MINIBATCHES = Arm(
    "check, 4 disjoint minibatches",
    {
        **{"update_rule": "check", "per_device_train_batch_size": 16},
        **{"gradient_accumulation_steps": 2, "steps_per_generation": 8},
    },
)
RIVALS = (
    Arm("linear decay", {"lr_scheduler_type": "linear"}),
    Arm("adaptive KL", {"num_iterations": 2}, ("adaptive KL",)),
    Arm("hypergradient", {}, ("hypergradient",)),
    Arm("schedule-free", {}, ("schedule-free",)),
)
PRODIGY = Arm("Prodigy", {}, ("prodigy",))
PACKAGES = {"schedule-free": "schedulefree", PRODIGY.label: "prodigyopt"}
"""What an arm needs that the project does not install."""
ARMS = (GRPO, TWO_PASSES, CHECK)
CONTROLLED = {arm.label for arm in (TWO_PASSES, THREE_PASSES, PHANTOM_CONTROLLED, CHECK, CHECK_MINIBATCHES)}
COMPARED = (
    *(GRPO, FOUR_MINIBATCHES, TWO_PASSES, THREE_PASSES, PHANTOM_CONTROLLED, CHECK, CHECK_MINIBATCHES),
    *(THREE_ITERATIONS, GXPO, PHANTOM),
)
RIVALS_IN_PASSES = [arm.label for arm in (FOUR_MINIBATCHES, THREE_ITERATIONS, GXPO)]
LABELS = [arm.label for arm in (*COMPARED, *RIVALS, PRODIGY)]
"""Of all arms, in the order of tables."""
COLORS = {
    **{"GRPO": "#888888", THREE_ITERATIONS.label: "#4c78a8", GXPO.label: "#72b7b2"},
    **{TWO_PASSES.label: "#d62728", THREE_PASSES.label: "#ff9d3b", CHECK.label: "#9467bd"},
    **{CHECK_MINIBATCHES.label: "#e377c2"},
    **{"adaptive KL": "#2ca02c", "hypergradient": "#8c564b"},
}


@dataclass(frozen=True)
class Regime:
    """One part.

    Attributes:
        part (`Part`): Its arms, learning rates and settings, and how long a run is.
        more (`tuple[tuple[Arm, float], ...]`): Further runs, of an arm at a learning rate.
        changes (`dict[str, Settings]`): Settings of an arm, by its label, that are others here.
    """

    part: Part
    more: tuple[tuple[Arm, float], ...] = ()
    changes: dict[str, Settings] = field(default_factory=dict)

    def runs(self) -> list[tuple[Arm, float]]:
        """Of a seed: arms and their learning rates."""
        of_part = ((arm, rate) for rate in self.part.learning_rates for arm in self.part.arms)
        return list({(arm.label, rate): (arm, rate) for arm, rate in (*of_part, *self.more)}.values())


def others(*rates: float) -> tuple[tuple[Arm, float], ...]:
    """What else could be done with a batch: at rates around the best, or with step control at the middle one."""
    tuned = (FOUR_MINIBATCHES, THREE_ITERATIONS, GXPO, PHANTOM)
    controlled = (THREE_PASSES, PHANTOM_CONTROLLED)
    return (*((arm, rate) for arm in tuned for rate in rates), *((arm, rates[1]) for arm in controlled))


EVERYWHERE = (*ARMS, THREE_PASSES, THREE_ITERATIONS, GXPO, *RIVALS)


def check_minibatches(*rates: float) -> tuple[tuple[Arm, float], ...]:
    """*check* with four optimizer steps a batch, each on rows of its own, at rates that are far apart."""
    return tuple((CHECK_MINIBATCHES, rate) for rate in rates)


FULL = (1e-5, 5e-5, 2e-4, 4e-4, 8e-4, 5e-3, 2e-2)
SMALL = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
LARGE = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 16}
REGIMES = (
    Regime(
        Part("full", "Full fine-tuning, 128 completions", EVERYWHERE, FULL, seeds=8),
        more=(*others(1e-4, 2e-4, 4e-4), *check_minibatches(1e-5, 4e-4, 2e-2), (PRODIGY, 1.0)),
    ),
    Regime(
        Part("lora", "LoRA of rank 8", ARMS, (5e-5, 1e-3, 4e-3, 1e-1), LORA, seeds=8),
        more=((GRPO, 2e-3), *others(5e-4, 1e-3, 2e-3), *check_minibatches(5e-5, 1e-3, 1e-1)),
    ),
    Regime(
        Part("small", "32 completions", ARMS, (1e-5, 2e-4, 4e-4, 2e-2), SMALL, seeds=8, batches=96, every=12),
        more=((GRPO, 1e-4), *others(5e-5, 1e-4, 2e-4), *check_minibatches(1e-5, 2e-4, 2e-2)),
        changes={
            CHECK.label: {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
            CHECK_MINIBATCHES.label: {"per_device_train_batch_size": 4},
            FOUR_MINIBATCHES.label: {"per_device_train_batch_size": 8},
        },
    ),
    Regime(
        Part("large", "512 completions", ARMS, (1e-5, 4e-4, 8e-4, 2e-2), LARGE, seeds=8, batches=24, every=3),
        more=((GRPO, 1.6e-3), *others(2e-4, 4e-4, 8e-4), *check_minibatches(1e-5, 8e-4, 2e-2)),
        changes={
            CHECK.label: {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 16},
            CHECK_MINIBATCHES.label: {"per_device_train_batch_size": 64},
            FOUR_MINIBATCHES.label: {"gradient_accumulation_steps": 4, "steps_per_generation": 16},
        },
    ),
    Regime(
        Part("harder", "Longer problems", ARMS, (1e-5, 2e-4, 4e-4, 2e-2), {"max_completion_length": 48}, seeds=8),
        more=(*others(1e-4, 2e-4, 4e-4), *check_minibatches(1e-5, 4e-4, 2e-2)),
    ),
    Regime(
        Part("bf16", "bf16", ARMS, (1e-5, 4e-4, 2e-2), {"bf16": True}, seeds=4),
        more=check_minibatches(1e-5, 4e-4, 2e-2),
    ),
    Regime(
        Part("long", "A long run", ARMS, (4e-4, 8e-4), seeds=4, batches=300, every=30),
        more=check_minibatches(4e-4, 8e-4),
    ),
)


def key(run: dict) -> tuple[str, float, int]:
    return run["arm"], run["learning_rate"], run["seed"]


def submit(bench: Bench, regime: Regime, arm: Arm, rate: float, seed: int, place: Path = Path()) -> Future:
    """Trains a run, in a folder below `place` in that of the bench."""
    folder = bench.folder / place / regime.part.name / f"{arm.label}, lr {rate:g}".replace(" ", "_") / f"seed-{seed}"
    settings = bench.settings(regime.part, arm, rate, seed) | regime.changes.get(arm.label, {})
    return bench.pool.submit(train_run, folder, settings, arm.hooks)


def measure(bench: Bench, regime: Regime, seeds: int, arms: set[str], path: Path) -> dict:
    """Trains what `path` does not have of these arms, and writes each run there as soon as it is there."""
    result = json.loads(path.read_text()) if path.is_file() else {"batches": regime.part.batches, "runs": []}
    there, jobs = {key(run) for run in result["runs"]}, {}
    for seed in range(seeds):
        for arm, rate in regime.runs():
            if (arm.label, rate, seed) not in there and arm.label in arms:
                jobs[submit(bench, regime, arm, rate, seed)] = (arm.label, rate, seed)
    machine = describe_machine(threads=1)
    for job in as_completed(jobs):
        label, rate, seed = jobs[job]
        run = load_run(job.result(), label)
        points = run.points[HELD_OUT]
        row = {
            **{"arm": label, "learning_rate": rate, "seed": seed, "auc": area(points), "final": final(points)},
            "curve": [[p.rollouts, p.value, p.backward_passes] for p in points],
            "cpu_seconds": points[-1].hours * 3600,
            "revision": machine["revision"],
        }
        multipliers = run.series("lookahead/step_multiplier")[1]
        if multipliers:
            taken_back = run.series("lookahead/steps_taken_back")[1]
            row |= {"multiplier": multipliers[:: max(len(multipliers) // 8, 1)], "taken_back": taken_back[-1]}
        result["runs"].append(row)
        result |= machine
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"  {label}, lr {rate:g}, seed {seed}: AUC {row['auc']:.3f}, final {row['final']:.3f}", flush=True)
    return result


def measure_costs(bench: Bench, regime: Regime, seeds: int, result: dict, path: Path) -> None:
    """The CPU time of each arm's run over that of GRPO's, at the learning rate of its best mean AUC.

    The runs are made again, those of all arms one after the other, since the runs in `result` are of different days.
    """
    best: dict[str, tuple[float, float]] = {}
    for label, rate, runs in cells(result):
        best[label] = max(best.get(label, (0.0, rate)), (statistics.fmean(run["auc"] for run in runs), rate))
    arms = {arm.label: arm for arm, _ in regime.runs() if arm in COMPARED and arm.label in best}
    jobs = {
        (label, seed): submit(bench, regime, arm, best[label][1], seed, Path("costs"))
        for seed in range(seeds)
        for label, arm in arms.items()
    }
    seconds: dict[str, list[float]] = {label: [] for label in arms}
    for (label, _), job in jobs.items():
        seconds[label].append(load_run(job.result(), label).points[HELD_OUT][-1].hours * 3600)
    result["cost"] = {
        label: statistics.median(a / b for a, b in zip(of_arm, seconds[GRPO.label], strict=True))
        for label, of_arm in seconds.items()
    }
    result["cost_seconds"], result["cost_machine"] = seconds, describe_machine(threads=1)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("  CPU time over GRPO's: " + ", ".join(f"{label} {cost:.2f}" for label, cost in result["cost"].items()))


def area_until(curve: list[list[float]], share: float) -> float:
    """The mean of the linear interpolation over the first share of a run."""
    end, whole = curve[0][0] + share * (curve[-1][0] - curve[0][0]), 0.0
    for (x0, y0, *_), (x1, y1, *_) in itertools.pairwise(curve):
        x = min(x1, end)
        y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        whole += max(x - x0, 0.0) * (y0 + y) / 2
    return whole / (end - curve[0][0])


def cells(result: dict) -> Iterator[tuple[str, float, list[dict]]]:
    """Arm, learning rate, and the runs of both, in the order in which arms came first."""
    runs = sorted(result["runs"], key=lambda run: run["seed"])
    for arm in LABELS:
        for rate in sorted({run["learning_rate"] for run in runs if run["arm"] == arm}):
            yield arm, rate, [run for run in runs if (run["arm"], run["learning_rate"]) == (arm, rate)]


def table(result: dict) -> str:
    """AUC / final by arm and learning rate, with the number of passes and seeds."""
    found = {(arm, rate): runs for arm, rate, runs in cells(result) if arm != PRODIGY.label}
    rates = sorted({rate for _, rate in found})
    lines = [f"| {' | '.join(['arm', *(f'{rate:g}' for rate in rates), 'passes', 'seeds'])} |"]
    lines.append("|---" * (len(rates) + 3) + "|")
    for arm in dict.fromkeys(arm for arm, _ in found):
        runs = [run for (label, _), those in found.items() if label == arm for run in those]
        shown = [
            "{:.2f} / {:.2f}".format(*(statistics.fmean(run[name] for run in those) for name in ("auc", "final")))
            if (those := found.get((arm, rate)))
            else ""
            for rate in rates
        ]
        passes = statistics.fmean(run["curve"][-1][2] for run in runs)
        seeds = sorted({len(those) for (label, _), those in found.items() if label == arm})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        lines.append(f"| {' | '.join([arm, *shown, f'{passes:.0f}', count])} |")
    return "\n".join(lines)


def tuned(by_rate: dict[float, dict[int, dict]], name: str) -> dict[int, float]:
    """By seed, the figure at the learning rate that has the best AUC on the other seeds: as if tuned on those.

    With one seed the rate is chosen on it.
    """
    seeds = sorted({seed for runs in by_rate.values() for seed in runs})
    found = {}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or [seed]
        aucs = {  # of the rates that this seed was run at
            rate: statistics.fmean([runs[other]["auc"] for other in others if other in runs] or [0.0])
            for rate, runs in by_rate.items()
            if seed in runs
        }
        found[seed] = by_rate[max(aucs, key=aucs.get)][seed][name]
    return found


def over_rates(by_rate: dict[float, dict[int, dict]], name: str) -> dict[int, float]:
    """By seed, the mean over all learning rates, of seeds that have all of them."""
    seeds = set.intersection(*(set(runs) for runs in by_rate.values()))
    return {seed: statistics.fmean(runs[seed][name] for runs in by_rate.values()) for seed in sorted(seeds)}


def by_seed(arm: str, by_rate: dict[float, dict[int, dict]], name: str) -> dict[int, float]:
    """A figure of an arm as a user gets it."""
    return (over_rates if arm in CONTROLLED else tuned)(by_rate, name)


def by_arm(result: dict) -> dict[str, dict[float, dict[int, dict]]]:
    """Runs by arm, learning rate and seed."""
    found: dict[str, dict[float, dict[int, dict]]] = {}
    for arm, rate, runs in cells(result):
        found.setdefault(arm, {})[rate] = {run["seed"]: run for run in runs}
    return found


def against(result: dict, arm: str, rival: str) -> str:
    """What an arm with step control is ahead of another one by, seed by seed."""
    found, parts = by_arm(result), []
    for name, what in (("auc", "AUC"), ("final", "at the end")):
        ours, theirs = (by_seed(label, found[label], name) for label in (arm, rival))
        parts.append(f"{what} {show(mean_of([ours[seed] - theirs[seed] for seed in ours if seed in theirs]), '+')}")
    return f"{arm} − {rival}, tuned: {', '.join(parts)}."


def summary(result: dict) -> str:
    """Each arm as a user gets it: tuned, or with step control at any learning rate; differences are paired by seed."""
    heads = ("arm", "learning rate", "AUC", "− tuned GRPO's", "at the end", "− tuned GRPO's", "least / tuned GRPO's")
    costs = result.get("cost", {})
    heads = (*heads, "passes", *(("CPU time / GRPO's", "AUC in GRPO's CPU time") if costs else ()), "seeds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = by_arm(result)
    base = {name: tuned(found[GRPO.label], name) for name in ("auc", "final")}
    for arm, by_rate in found.items():
        shown, count = [], 0
        for name in ("auc", "final"):
            values = by_seed(arm, by_rate, name)
            count = len(values)
            shown.append(show(mean_of(list(values.values()))))
            pairs = [values[seed] - base[name][seed] for seed in values if seed in base[name]]
            shown.append("" if arm == GRPO.label else show(mean_of(pairs), "+"))
        means = [statistics.fmean(run["auc"] for run in runs.values()) for runs in by_rate.values()]
        least = f"{min(means) / statistics.fmean(base['auc'].values()):.2f}"
        rates = f"{min(by_rate):g} to {max(by_rate):g}" if arm in CONTROLLED else "tuned"
        rates = f"{min(by_rate):g}" if len(by_rate) == 1 else rates
        passes = statistics.fmean(run["curve"][-1][2] for runs in by_rate.values() for run in runs.values())
        shown += [least, f"{passes:.0f}", *([""] * 2 if costs else [])]
        if arm in costs:
            for run in (run for runs in by_rate.values() for run in runs.values()):
                run["in_time"] = area_until(run["curve"], min(1 / costs[arm], 1.0))
            shown[-2:] = f"{costs[arm]:.2f}", show(mean_of(list(by_seed(arm, by_rate, "in_time").values())))
        lines.append(f"| {' | '.join([arm, rates, *shown, str(count)])} |")
    return "\n".join(lines)


def show(mean: Mean | None, sign: str = "") -> str:
    if mean is None:
        return ""
    return f"{mean.value:{sign}.3f}" + ("" if mean.low is None else f" ± {mean.high - mean.value:.3f}")


def compare(result: dict, arm: str) -> list[str]:
    """Of an arm at all its rates, by seed: AUC and final less those of tuned GRPO, and the least AUC over GRPO's."""
    found, shown = by_arm(result), []
    for name in ("auc", "final"):
        ours, base = by_seed(arm, found[arm], name), tuned(found[GRPO.label], name)
        shown.append(show(mean_of([ours[seed] - base[seed] for seed in ours if seed in base]), "+"))
    means = [statistics.fmean(run["auc"] for run in runs.values()) for runs in found[arm].values()]
    return [*shown, f"{min(means) / statistics.fmean(tuned(found[GRPO.label], 'auc').values()):.2f}"]


def overview(results: dict[str, dict]) -> str:
    """What matters of all regimes: two controlled passes and *check*, at any rate, against tuned GRPO."""
    arms = {"two passes": TWO_PASSES, "check": CHECK, "check, 4 minibatches": CHECK_MINIBATCHES}
    heads = ["regime", *(head for name in arms for head in (f"{name}: AUC", "at the end", "least")), "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for regime in REGIMES:
        if (result := results.get(regime.part.name)) is not None:
            there = by_arm(result)
            shown = [compare(result, arm.label) if arm.label in there else [""] * 3 for arm in arms.values()]
            counts = sorted({len(over_rates(there[arm.label], "auc")) for arm in arms.values() if arm.label in there})
            seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
            lines.append(f"| {' | '.join([regime.part.title, *itertools.chain(*shown), seeds])} |")
    return "\n".join(lines)


def text(results: dict[str, dict]) -> str:
    """All tables, for the page of results."""
    blocks = []
    for regime in REGIMES:
        if (result := results.get(regime.part.name)) is None:
            continue
        blocks += [f"**{regime.part.title}**, {regime.part.batches} batches:", summary(result)]
        there = by_arm(result)
        pairs = itertools.product((TWO_PASSES.label, CHECK_MINIBATCHES.label), RIVALS_IN_PASSES)
        lines = [f"- {against(result, *pair)}" for pair in pairs if set(pair) <= there.keys()]
        blocks += ["\n".join(lines)]
        blocks += [table(result)]
    return "\n\n".join(block for block in blocks if block)


def pages(results: dict[str, dict]) -> dict[Path, str]:
    """The pages with the tables of these results."""
    of_results = fill(RESULTS_PAGE.read_text(), "rates", text(results))
    short = overview(results)
    return {
        RESULTS_PAGE: fill(of_results, "rates overview", short),
        CONTROL_PAGE: fill(CONTROL_PAGE.read_text(), "rates overview", short),
    }


def draw(results: Path) -> Path | None:
    """AUC against the learning rate, one panel a part, with 95 % intervals where there are three seeds or more.

    A part at two neighbouring rates is left out.
    """
    there = [
        regime
        for regime in REGIMES
        if (results / f"{regime.part.name}.json").is_file() and len(regime.part.learning_rates) > 2
    ]
    if not there:
        return None
    columns = len(there) if len(there) < 5 else 3
    count = -(-len(there) // columns)
    figure = Figure(figsize=(3.3 * columns + 2.6 * (columns == 1), 2.7 * count + 1), layout="constrained")
    panels = figure.subplots(count, columns, squeeze=False, sharey=True).flatten()
    for axes, regime in zip(panels, there, strict=False):
        found = list(cells(json.loads((results / f"{regime.part.name}.json").read_text())))
        for arm, color in COLORS.items():
            curve = [(rate, mean_of([run["auc"] for run in runs])) for label, rate, runs in found if label == arm]
            if curve:
                _draw_curve(axes, curve, arm, color)
        axes.set(xscale="log", ylim=(0, 1))
        axes.set_xlabel("learning rate", fontsize=9)
        axes.set_title(regime.part.title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in panels[len(there) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.supylabel("mean held-out pass@1 over the run", fontsize=9)
    figure.savefig(path := results / "rates.png", dpi=160)
    return path


def _draw_curve(axes, curve: list[tuple[float, Mean]], label: str, color: str) -> None:
    rates, means = zip(*curve, strict=True)
    axes.plot(rates, [mean.value for mean in means], marker="o", markersize=3, color=color, label=label, linewidth=1.4)
    if all(mean.low is not None and mean.n > 2 for mean in means):
        low, high = ([getattr(mean, name) for mean in means] for name in ("low", "high"))
        axes.fill_between(rates, low, high, color=color, alpha=0.15, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [regime.part.name for regime in REGIMES]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--arms", nargs="+", choices=LABELS, default=LABELS, metavar="LABEL", help=", ".join(LABELS))
    parser.add_argument("--seeds", type=int, help="at most so many; each part has a number of its own")
    parser.add_argument("--quick", action="store_true", help="one part, two rates, one seed, few batches")
    parser.add_argument("--costs", action="store_true", help="whole runs of `--seeds`, by turns, for their CPU time")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--write", action="store_true", help="train nothing, and fill the pages")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/rates"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "rates")
    options = parser.parse_args()
    options.draw |= options.write
    options.results.mkdir(parents=True, exist_ok=True)
    regimes = [regime for regime in REGIMES if regime.part.name in options.parts]
    if options.quick:
        part = replace(REGIMES[0].part, learning_rates=(1e-5, 4e-4), seeds=1, batches=4, every=2)
        regimes = [Regime(part)]
    arms = set(options.arms)
    for label, package in PACKAGES.items():
        if label in arms and importlib.util.find_spec(package) is None and not options.draw:
            arms.remove(label)
            print(f"{label} is left out: `pip install {package}` first.")
    if not options.draw:
        quieten()
        folder = options.out.resolve()
        make_tasks(folder, harder="harder" in options.parts and not options.quick)
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), start_worker) as pool:
            bench = Bench(folder, pool)
            for regime in regimes:
                print(f"\n{regime.part.name}", flush=True)
                path, seeds = options.results / f"{regime.part.name}.json", options.seeds or regime.part.seeds
                if options.costs:
                    measure_costs(bench, regime, seeds, json.loads(path.read_text()), path)
                else:
                    measure(bench, regime, min(seeds, regime.part.seeds), arms, path)
    found = {}
    for regime in REGIMES if options.write else regimes:
        if (path := options.results / f"{regime.part.name}.json").is_file():
            found[regime.part.name] = json.loads(path.read_text())
    print(f"\n{text(found)}")
    if options.write:
        for path, page in pages(found).items():
            path.write_text(page)
    if figure := draw(options.results):
        print(f"\ndrawn in {figure}")


if __name__ == "__main__":
    main()
