"""A real language model on a CPU: TRL's trainer, GRPO, three iterations, GXPO and SFPO, each at its own best rate.

    make real OPTIONS="--max_steps 1"                  # installs the weights, and makes model and data
    python benchmarks/real_model.py                    # about two hours of CPU time, on one thread a run
    python benchmarks/real_model.py --batches 4 --tuning-batches 4 --seeds 1     # a look
    python benchmarks/real_model.py --draw             # trains nothing: the table and the figure from the JSON there

SmolLM2-135M-Instruct learns sums as in `recipes/smollm2-135m`, with LoRA; 32 completions a batch, held-out accuracy on
96 sums with two samples each. Each arm has its own best of four learning rates, by the mean accuracy of its
evaluations in shorter runs on a seed of its own; TRL's trainer takes GRPO's, since its update is the same to rounding.
Each run is a process of its own. `results/real_model.json` is written again after each run; the runs of this length
that it has are not trained again, so that the comparison can be continued on another day. A first look at all arms
comes first, then the rates and seeds of GRPO and GXPO, then those of the others, so that what is there at any time is
worth most.

Seconds are of CPU time, so that a busy machine matters less. Memory is the most that the process had resident, the
model, the libraries (about 0.7 GiB) and evaluations included. In float32: on a CPU with only AVX2, a forward and
a backward pass over four rows of 22 tokens took 1.3 CPU seconds in float32, and 21 in bf16.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, describe_machine, save_result
from compare_rules import Arm, triple
from matplotlib.figure import Figure
from training import start_worker, train_run

from gxpo_trl.reporting.arms import group_arms
from gxpo_trl.reporting.figures import draw_curves, style_axes
from gxpo_trl.reporting.runs import Run, load_run
from gxpo_trl.reporting.statistics import area, mean_of
from gxpo_trl.reporting.tables import number


NAME = "real_model"
RECIPE = "recipes/smollm2-135m/grpo.yaml"
BENCHMARK = "smollm2-135m--test"
RATES = (4e-4, 8e-4, 2e-4, 1e-4)
TUNING_SEEDS = (100,)
COMMON = {"per_device_train_batch_size": 32, "eval_samples": 2}
"""Settings of all runs, in addition to their recipe: the batch in one piece."""

GRPO = Arm("GRPO")
STOCK = Arm("GRPO (TRL)", hooks=("trainer of TRL",))
THREE_ITERATIONS = Arm("GRPO, 3 iterations", {"num_iterations": 3})
GXPO = Arm("GXPO", {"update_rule": "gxpo", "lookahead_steps": 5, "reposition_alpha": 0.5, "gate_signal": "never"})
SFPO = Arm("SFPO", {"update_rule": "sfpo", "lookahead_steps": 3, "reposition_alpha": 0.8, "gate_signal": "never"})
ARMS = (STOCK, GRPO, THREE_ITERATIONS, GXPO, SFPO)
CONTROLLED = Arm("two passes, controlled", {**GXPO.settings, "lookahead_steps": 1, "step_control": "cosine"})
CHECK = Arm("check", {"update_rule": "check", "per_device_train_batch_size": 8})
CHECK_MINIBATCHES = Arm(
    "check, 4 disjoint minibatches",
    {
        **{"update_rule": "check", "prompts_per_step": None, "per_device_train_batch_size": 4},
        **{"gradient_accumulation_steps": 2, "steps_per_generation": 8},
    },
)
CONTROLLED_ARMS = (CONTROLLED, CHECK, CHECK_MINIBATCHES)
CONTROL_RATES = (2e-5, 2e-4, 2e-3)
"""At which they and GRPO are compared."""
PHASES = (
    ("look", (GRPO, GXPO, STOCK, THREE_ITERATIONS, SFPO)),
    ("rates", (GRPO, GXPO)),
    ("seeds", (GRPO, GXPO)),
    ("rates", (THREE_ITERATIONS, SFPO)),
    ("seeds", (THREE_ITERATIONS, SFPO)),
    ("seeds", (STOCK,)),
    ("control", (CONTROLLED,)),
    ("control", (CHECK_MINIBATCHES,)),
    ("control", (CHECK,)),
    ("control", (GRPO,)),
)


@dataclass(frozen=True)
class Bench:
    """Where runs are kept, and how long they are.

    Attributes:
        folder (`Path`): Of all runs.
        batches (`int`): Of rollouts, in a run.
        tuning_batches (`int`): Of rollouts, in a run that only chooses a learning rate.
        every (`int`): Batches between evaluations.
        seeds (`int`): Of each arm at its rate.
    """

    folder: Path
    batches: int
    tuning_batches: int
    every: int
    seeds: int

    def batches_of(self, seed: int) -> int:
        return self.tuning_batches if seed in TUNING_SEEDS else self.batches

    def measure(self, label: str, rate: float, seed: int) -> dict:
        """One run, in the process that this is called in, and what came of it as `result.json` in its folder."""
        arm = next(arm for arm in (*ARMS, *CONTROLLED_ARMS) if arm.label == label)
        batches = self.batches_of(seed)
        folder = self.folder / f"{batches}-batches"
        place = folder / f"{label}, lr {rate:g}".replace(" ", "_") / f"seed-{seed}"
        path = place / "result.json"
        if not path.is_file():
            settings = {**COMMON, "learning_rate": rate, "seed": seed, **arm.settings}
            settings |= {"max_steps": batches * arm.steps_per_batch, "eval_steps": self.every * arm.steps_per_batch}
            settings["eval_on_start"] = arm is GRPO and seed not in TUNING_SEEDS  # all start from one model
            started = time.perf_counter()
            train_run(place, settings, arm.hooks, recipe=RECIPE)
            path.write_text(json.dumps(self._describe(place, label, batches, time.perf_counter() - started)) + "\n")
        return json.loads(path.read_text())

    def _describe(self, place: Path, label: str, batches: int, wall_seconds: float) -> dict:
        run = load_run(place, label)
        points = run.points[BENCHMARK]
        times = {name: sum(run.series(f"lookahead/{name}_time")[1]) for name in ("generation", "reward")}
        multipliers = run.series("lookahead/effective_multiplier")[1]
        return {
            "arm": label,
            "update_rule": run.settings.get("update_rule", "grpo"),
            "learning_rate": run.settings["learning_rate"],
            "seed": run.seed,
            "batches": batches,
            "curve": [[p.rollouts, p.value, p.backward_passes, p.hours * 3600] for p in points],
            "mean_accuracy": area(points),
            "cpu_seconds": {**times, "update": run.seconds - sum(times.values())},
            "wall_seconds": wall_seconds,
            "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "effective_multiplier": statistics.median(multipliers) if multipliers else None,
        }


def best_rate(arm: Arm, rows: Sequence[dict]) -> float:
    """Of the rates that an arm was tried at, on other seeds than it is compared on."""
    label = GRPO.label if arm is STOCK else arm.label
    tried: dict[float, list[float]] = {}
    for row in rows:
        if row["arm"] == label and row["seed"] in TUNING_SEEDS:
            tried.setdefault(row["learning_rate"], []).append(row["mean_accuracy"])
    return max(tried, key=lambda rate: statistics.fmean(tried[rate]))


def jobs_of(kind: str, arms: Sequence[Arm], rows: Sequence[dict], seeds: int) -> list[tuple[str, float, int]]:
    """Label, learning rate and seed of each run of a phase that is not among the rows yet."""
    if kind == "seeds":
        jobs = [(arm.label, best_rate(arm, rows), seed) for seed in range(seeds) for arm in arms]
    elif kind == "control":
        jobs = [(arm.label, rate, seed) for seed in range(seeds) for rate in CONTROL_RATES for arm in arms]
    else:
        rates = RATES[:1] if kind == "look" else RATES
        jobs = [(arm.label, rate, seed) for seed in TUNING_SEEDS for rate in rates for arm in arms]
    known = {(row["arm"], row["learning_rate"], row["seed"]) for row in rows}
    return [job for job in jobs if job not in known]


def run_phases(bench: Bench, workers: int) -> None:
    machine, path = describe_machine(threads=1), RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["runs"] if path.is_file() else []
    rows = [row for row in rows if row["batches"] == bench.batches_of(row["seed"])]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "gxpo_trl.trainer.trainer"])  # imported once, not in every run
    for kind, arms in PHASES:
        jobs = jobs_of(kind, arms, rows, bench.seeds)
        with ProcessPoolExecutor(workers, context, start_worker, max_tasks_per_child=1) as pool:
            for job in as_completed([pool.submit(bench.measure, *job) for job in jobs]):
                rows.append(row := job.result())
                save_result(NAME, {**machine, "tuning_seeds": TUNING_SEEDS, "rates": sorted(RATES), "runs": rows})
                about = f"{row['arm']}, lr {row['learning_rate']:g}, seed {row['seed']}"
                print(f"{about}: {row['curve'][-1][1]:.3f} in {row['curve'][-1][3]:.0f} CPU s", flush=True)


# ---- What came of it


def chosen(rows: Sequence[dict]) -> list[list[dict]]:
    """The runs of each arm at its best rate on seeds of their own; where there are none yet, its first look. With step
    control the rate is not chosen: it is the one in the middle.
    """
    found = []
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm.label]
        if not own:
            continue
        best = best_rate(arm, rows)
        compared = [row for row in own if row["seed"] not in TUNING_SEEDS and row["learning_rate"] == best]
        found.append(compared or [row for row in own if row["learning_rate"] == RATES[0]])
    for arm in CONTROLLED_ARMS:
        runs = [row for row in rows if (row["arm"], row["learning_rate"]) == (arm.label, CONTROL_RATES[1])]
        found += [runs] if runs else []
    return found


def show(rows: Sequence[dict]) -> None:
    columns = ("arm", "learning rate", "seeds", "accuracy over the run", "at the end", "passes", "rollouts")
    columns += ("sampling, CPU s a batch", "update, CPU s a batch", "peak, GiB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for runs in chosen(rows):
        first, batches = runs[0], runs[0]["batches"]
        seconds = {name: statistics.fmean(run["cpu_seconds"][name] / batches for run in runs) for name in COLUMNS}
        seeds = str(len(runs)) + (" (look)" if first["seed"] in TUNING_SEEDS else "")
        accuracies = over_runs(runs), at_ends(runs)
        cells = [first["arm"], f"{first['learning_rate']:g}", seeds, *map(with_interval, accuracies)]
        cells += [f"{whole_passes(first, first['curve'][-1][2]):.0f}", str(first["curve"][-1][0])]
        cells += [number(seconds[name], 1) for name in COLUMNS]
        cells += [number(max(run["peak_resident_gib"] for run in runs), 2)]
        print(f"| {' | '.join(cells)} |")
    show_control(rows)


def over_runs(runs: Sequence[dict]) -> list[float]:
    """The mean accuracy of each run's evaluations during training; only GRPO's runs are also evaluated before."""
    return [statistics.fmean(point[1] for point in run["curve"] if point[0] > 0) for run in runs]


def at_ends(runs: Sequence[dict]) -> list[float]:
    return [run["curve"][-1][1] for run in runs]


def mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}"


def with_interval(values: Sequence[float]) -> str:
    _, low, high = triple(mean_of(values))
    return mean(values) + (f" [{low:.3f}, {high:.3f}]" if len(values) > 2 else "")


def show_control(rows: Sequence[dict]) -> None:
    """Accuracy of GRPO and of the arms with step control, over the run and at its end, by learning rate."""
    compared = [row for row in rows if row["seed"] not in TUNING_SEEDS]
    if any(row["arm"] in {arm.label for arm in CONTROLLED_ARMS} for row in compared):
        print(f"\n| arm | {' | '.join(f'{rate:g}' for rate in CONTROL_RATES)} |\n|{'---|' * (len(CONTROL_RATES) + 1)}")
        for arm in (GRPO, *CONTROLLED_ARMS):
            cells = []
            for rate in CONTROL_RATES:
                runs = [row for row in compared if (row["arm"], row["learning_rate"]) == (arm.label, rate)]
                cells.append(f"{mean(over_runs(runs))} / {mean(at_ends(runs))} ({len(runs)})" if runs else "")
            if any(cells):
                print(f"| {arm.label} | {' | '.join(cells)} |")


def whole_passes(row: dict, passes: float) -> float:
    """Passes over whole batches: with minibatches those of an optimizer step are over a part of one."""
    return passes / (CHECK_MINIBATCHES.steps_per_batch if row["arm"] == CHECK_MINIBATCHES.label else 1)


COLUMNS = ("generation", "update")


def draw(rows: Sequence[dict]) -> Path:
    """Accuracy against rollouts, CPU time and backward passes."""
    runs = [as_run(row) for of_arm in chosen(rows) for row in of_arm]
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, budget in zip(panels, ("rollouts", "hours", "backward_passes"), strict=True):
        draw_curves(group_arms(runs), BENCHMARK, budget, axes)
        axes.set_ylabel("")
        style_axes(axes)
    panels[0].set_ylabel("held-out accuracy")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(path := RESULTS / f"{NAME}.png", dpi=160)
    return path


def as_run(row: dict) -> Run:
    log = []
    for i, (rollouts, value, passes, seconds) in enumerate(row["curve"]):
        spent = {"eval/rollouts": rollouts, "eval/seconds": seconds}
        spent |= {"eval/backward_passes": whole_passes(row, passes)}
        log.append({"step": i, f"eval/{BENCHMARK}/avg@2": value, **spent})
    settings = {"update_rule": row["update_rule"], "learning_rate": row["learning_rate"], "seed": row["seed"]}
    return Run(Path(NAME) / row["arm"] / f"seed-{row['seed']}", row["arm"], log, about={"settings": settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="of rollouts, in a run")
    parser.add_argument("--tuning-batches", type=int, default=8, help="of rollouts, in a run that chooses a rate")
    parser.add_argument("--every", type=int, default=4, help="batches between evaluations")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm at its best rate")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="train nothing: table and figure from the JSON there")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/real_model"), help="where runs are kept")
    options = parser.parse_args()
    if not options.draw:
        lengths = options.batches, options.tuning_batches, options.every
        run_phases(Bench(options.out.resolve(), *lengths, options.seeds), options.workers)
    rows = json.loads((RESULTS / f"{NAME}.json").read_text())["runs"]
    show(rows)
    print(f"drawn in {draw(rows)}")


if __name__ == "__main__":
    main()
