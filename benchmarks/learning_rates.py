"""GRPO, SFPO and GXPO on the embedded task, each over learning rates and seeds.

    python benchmarks/learning_rates.py              # 36 runs, two at a time: about 18 minutes

A lookahead moves further per batch of rollouts, and so does a larger learning rate: a gain at equal learning rate
alone proves nothing. This prints held-out pass@1 after few batches, on average over the run and at its end, for each
method at each learning rate, so that each can be read at its best. Further options go to all recipes.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import describe_machine, save_result

from gxpo_trl.reporting.runs import HELD_OUT, Run, load_run


RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"


def train(method: str, learning_rate: str, seed: int, overrides: list[str]) -> Run:
    """One run of a recipe in a process of its own, on one thread."""
    folder = Path("out/benchmarks/learning_rates") / f"{method}-{learning_rate}-{seed}"
    command = [sys.executable, "-m", "gxpo_trl.scripts.train", "--config", str(RECIPES / f"{method}.yaml")]
    command += ["--learning_rate", learning_rate, "--seed", str(seed), "--output_dir", str(folder)]
    command += ["--eval_steps", "10", *overrides]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return load_run(folder, method.upper())


def summarise(runs: list[Run]) -> dict:
    """Mean and sample standard deviation over seeds."""

    def mean_and_deviation(values: list[float]) -> list[float]:
        return [statistics.mean(values), statistics.stdev(values)]

    return {
        "after_10_batches": mean_and_deviation([run.points[HELD_OUT][1].value for run in runs]),
        "mean": mean_and_deviation([statistics.mean(p.value for p in run.points[HELD_OUT][1:]) for run in runs]),
        "end": mean_and_deviation([run.points[HELD_OUT][-1].value for run in runs]),
        "backward_passes": mean_and_deviation([run.points[HELD_OUT][-1].backward_passes for run in runs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning_rates", nargs="+", default=["3e-5", "1e-4", "3e-4", "6e-4"])
    parser.add_argument("--seeds", type=int, default=3)
    options, overrides = parser.parse_known_args()

    arms = list(itertools.product(("grpo", "sfpo", "gxpo"), options.learning_rates))
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(lambda job: train(*job[0], job[1], overrides), itertools.product(arms, range(options.seeds)))
        )
    rows = []
    print("| method | learning rate | after 10 batches | mean | end | backward passes |")
    print("|---|---|---|---|---|---|")
    for i, (method, learning_rate) in enumerate(arms):
        summary = summarise(runs[i * options.seeds : (i + 1) * options.seeds])
        rows.append({"method": method, "learning_rate": learning_rate, **summary})
        cells = [f"{summary[k][0]:.3f} ± {summary[k][1]:.3f}" for k in ("after_10_batches", "mean", "end")]
        print(f"| {method.upper()} | {learning_rate} | {' | '.join(cells)} | {summary['backward_passes'][0]:.0f} |")
    result = {"seeds": options.seeds, "rows": rows, **describe_machine(threads=1)}
    print(f"written to {save_result('learning_rates', result)}")


if __name__ == "__main__":
    main()
