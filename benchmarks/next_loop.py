"""NExt on the embedded task: does a run that is extrapolated during training get further in as many steps?

    python benchmarks/next_loop.py            # 50 runs, two at a time: half an hour; if interrupted, it continues
    python benchmarks/next_loop.py --again    # run everything again

Each seed trains `recipes/tiny/next.yaml` up to its extrapolation once; every method continues from there, and so does
a control that is only restarted (α = 0: another optimizer, other prompts). The peer is the same recipe without an
extrapolation. Printed are held-out pass@1 before, right after, and at the end, and steps per point gained (ICER).
Arms that the JSON has with the same options are not run again, where the run up to the extrapolation still comes to
the same figures. Further options go to all runs.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from common import RESULTS, describe_machine, save_result

from gxpo_trl.reporting.runs import HELD_OUT, load_run
from gxpo_trl.reporting.statistics import icer
from gxpo_trl.run_folder import TRAINER_STATE_NAME


RECIPE = Path(__file__).parents[1] / "recipes" / "tiny" / "next.yaml"
OUT = Path("out/benchmarks/next_loop")
ARMS = {  # what continues after the extrapolation
    "restarted (α = 0)": ["--extrapolate_alpha", "0"],
    "NExt, α = 0.5": ["--extrapolate_alpha", "0.5"],
    "NExt, α = 1": [],
    "NExt, α = 1.5": ["--extrapolate_alpha", "1.5"],
    "AlphaRL": ["--extrapolate_method", "alpharl"],
    "RL-Extra": ["--extrapolate_method", "rl-extra"],
    "least-squares line": ["--extrapolate_method", "linear"],
    "RELEX": ["--extrapolate_method", "relex"],
}


def train(folder: Path, seed: int, arguments: list[str], common: Path | None = None) -> None:
    """A run, or the part of a loop that follows after a common one, unless it is there."""
    if ((folder / "after" if common else folder) / TRAINER_STATE_NAME).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    if common is not None:
        shutil.copytree(common, folder)
    command = [sys.executable, "-m", "gxpo_trl.scripts.train", "--config", str(RECIPE), "--output_dir", str(folder)]
    command += ["--seed", str(seed), "--disable_tqdm", "true", *arguments]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def one_seed(
    seed: int, out: Path, overrides: list[str], known: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """pass@1 of all arms: at the start, before and right after the extrapolation, at the end.

    `known` has those of arms that were run before.
    """
    settings = yaml.safe_load(RECIPE.read_text())
    after, steps = settings["extrapolate_after"], settings["max_steps"]
    folder = out / f"seed-{seed}"
    common = folder / "common"
    train(common / "before", seed, [*_without_loop(), "--max_steps", str(after), *overrides])
    points = load_run(common / "before").points[HELD_OUT]
    ends = {"start": points[0].value, "before": points[-1].value}
    found = {label: run for label, run in known.items() if ends.items() <= run.items()}
    if "GRPO" not in found:
        train(folder / "plain", seed, [*_without_loop(), *overrides])
        plain = {point.step: point.value for point in load_run(folder / "plain").points[HELD_OUT]}
        found["GRPO"] = {"start": plain[0], "before": plain[after], "after": plain[after], "end": plain[steps]}
    for label, arguments in ARMS.items():
        if label in found:
            continue
        arm = folder / label.replace(" ", "_")
        train(arm, seed, ["--resume_from_checkpoint", "last", *arguments, *overrides], common)
        before, points = (load_run(arm / part).points[HELD_OUT] for part in ("before", "after"))
        found[label] = {
            "start": before[0].value,
            "before": before[-1].value,
            "after": points[0].value,
            "end": points[-1].value,
        }
    return found


def _without_loop() -> list[str]:
    """The recipe with its trajectory, and without what follows from it."""
    return ["--extrapolate_after", "null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--result", default="next_loop", help="name of the file in benchmarks/results")
    parser.add_argument("--again", action="store_true", help="run what is there, too")
    options, overrides = parser.parse_known_args()
    path = RESULTS / f"{options.result}.json"
    out = OUT / "_".join(word.replace("/", "-") for word in ("runs", *overrides))
    known: list[dict[str, dict[str, float]]] = [{} for _ in range(options.seeds)]
    if options.again:
        shutil.rmtree(out, ignore_errors=True)
    elif path.is_file() and (result := json.loads(path.read_text()))["overrides"] == overrides:
        for row in result["rows"]:
            for of_seed, run in zip(known, row["runs"], strict=False):
                of_seed[row["arm"]] = run
    with ThreadPoolExecutor(2) as pool:
        same = (out, overrides)
        seeds = list(pool.map(one_seed, range(options.seeds), *map(itertools.repeat, same), known))
    steps = yaml.safe_load(RECIPE.read_text())["max_steps"]
    rows = []
    print("| after 60 steps | pass@1 before | right after | after 40 more | difference to GRPO | ICER |")
    print("|---|---|---|---|---|---|")
    for label in ("GRPO", *ARMS):
        runs = [seed[label] for seed in seeds]
        ahead = [run["end"] - seed["GRPO"]["end"] for run, seed in zip(runs, seeds, strict=True)]
        values = {name: [run[name] for run in runs] for name in ("before", "after", "end")} | {"ahead": ahead}
        row = {name: [statistics.mean(v), statistics.stdev(v)] for name, v in values.items()}
        start = statistics.mean(run["start"] for run in runs)
        row["icer"] = icer(steps, start, row["end"][0])
        rows.append({"arm": label, "start": start, **row, "runs": runs})
        cells = [f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for name in ("before", "after", "end")]
        difference = "" if label == "GRPO" else f"{row['ahead'][0]:+.3f} ± {row['ahead'][1]:.3f}"
        print(f"| {label} | {' | '.join(cells)} | {difference} | {row['icer']:.2f} |")
    result = {"seeds": options.seeds, "overrides": overrides, "rows": rows, **describe_machine(threads=1)}
    print(f"written to {save_result(options.result, result)}")


if __name__ == "__main__":
    main()
