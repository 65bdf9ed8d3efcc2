"""How long `gxpo report` takes over a run of many steps.

    python benchmarks/report.py                      # a minute

A log of 100,000 steps with the 45 metrics of a real one, an evaluation every 100 steps; the whole command in a process
of its own, imports included.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from common import describe_machine, save_result

from gxpo_trl.run_folder import BACKWARD_PASSES, ELAPSED_TIME, RUN_NAME, TRAINER_STATE_NAME


METRICS = (
    *("reward", "reward_std", "kl", "entropy", "grad_norm", "learning_rate", "num_tokens", "step_time", "loss"),
    *("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "frac_reward_zero_std"),
    *(f"completions/{name}" for name in ("mean_length", "max_length", "min_length", "clipped_ratio")),
    *(
        f"lookahead/{name}"
        for name in ("retention_mean", "retention_std", "scale_mean", "scale_max", "gate_z", "active")
    ),
    *(
        f"lookahead/{name}"
        for name in ("grad_norm_0", "grad_norm_1", "grad_norm_slow", "cos_0_slow", "token_fraction")
    ),
    *(f"lookahead/{name}" for name in ("generation_time", "reward_time", "update_time", "effective_multiplier")),
    *(f"rewards/function_{i}/{name}" for i in range(6) for name in ("mean", "std")),
)


def write_log(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    log = []
    for step in range(1, steps + 1):
        spent = {BACKWARD_PASSES: 3 * step, ELAPSED_TIME: 2.0 * step}
        log.append({"step": step, **{name: generator.random() for name in METRICS}, **spent})
        if step % 100 == 0:
            log.append({"step": step, "eval_reward": generator.random()})
    (folder / TRAINER_STATE_NAME).write_text(json.dumps({"log_history": log}))
    (folder / RUN_NAME).write_text(json.dumps({"settings": {"update_rule": "gxpo"}, "completions_per_step": 128}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    folder = Path("out/benchmarks/report")
    write_log(folder / "run", options.steps)
    command = [
        sys.executable,
        "-m",
        "gxpo_trl.scripts.cli",
        "report",
        str(folder / "run"),
        "--out",
        str(folder / "report"),
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    size = (folder / "run" / TRAINER_STATE_NAME).stat().st_size / 1e6
    print(f"{options.steps:,} steps, {size:.0f} MB of log: {seconds:.1f} s")
    result = {"steps": options.steps, "log_megabytes": size, "seconds": seconds, **describe_machine(threads=1)}
    print(f"written to {save_result('report', result)}")


if __name__ == "__main__":
    main()
