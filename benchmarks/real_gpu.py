"""A real language model on a GPU: the arms of real_model.py, and step control from rates 30 times apart.

    python benchmarks/real_gpu.py --task addition       # sums, as on the CPU, held-out accuracy
    python benchmarks/real_gpu.py --task reasoning      # reasoning-gym's Game of Life, answers of 100 tokens and more
    python benchmarks/real_gpu.py --small --task addition                                   # a look, on a CPU

SmolLM2-135M-Instruct with LoRA as in `recipes/smollm2-135m`, in bf16 on fp32 weights, 100 batches. No rate is tuned:
the arms of `real_model.py` have the recipe's, and GRPO and step control also start from a quarter and from 7.5 times
as much. Runs are made in the order of their worth, one seed after the other, several at a time, until there is no time
for another; what is in the result is not made again. So seconds are those of a GPU that runs share: they compare arms
of one result, not machines. A run that would end later than `--seconds` stops at the step it has come to, and its
row says how many batches it had.

Sums are judged as in `real_model.py`. The boards are reasoning-gym's, 7 × 7, written as it writes them, with a solved
one before each; whole boards are hardly ever right with a model of this size, and the curve is the mean reward of the
rollouts, the part of the cells that are right, over each tenth of the run.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from common import Deadline, describe_machine, save_result
from compare_rules import Arm
from real_model import CONTROLLED, GRPO, GXPO, RECIPE, SFPO, STOCK, THREE_ITERATIONS
from training import Settings, start_worker, train_run

from gxpo_trl.callbacks.records import RunRecordCallback
from gxpo_trl.reporting.runs import Run, load_run


RATE, LOW, HIGH = 4e-4, 1e-4, 3e-3
CHECK = Arm("check", {"update_rule": "check", "per_device_train_batch_size": 8})
ORDER = (
    *((GXPO, RATE), (GRPO, RATE), (CONTROLLED, LOW), (CONTROLLED, HIGH), (STOCK, RATE)),
    *((GRPO, LOW), (GRPO, HIGH), (THREE_ITERATIONS, RATE), (CHECK, LOW), (CHECK, HIGH), (SFPO, RATE)),
)
"""Of one seed: what there is no time for is at the end."""
SEEDS = 3
BOARD, SMALL_BOARD = 7, 3  # cells a side; a board of 7 is 110 to 115 tokens
IN_SMALL: Settings = {
    "model_name_or_path": "gxpo_trl/tiny",
    "max_completion_length": 4,
    "lora_r": 4,
    "eval_samples": 1,
}


@dataclass(frozen=True)
class Bench:
    """How runs are made.

    Attributes:
        task (`str`): `"addition"` or `"reasoning"`.
        folder (`Path`): Of all runs.
        data (`Path`): The folder of sums, and of the model.
        steps (`int`): Batches of a run.
        small (`bool`): Whether the embedded model stands in, on a CPU.
        ends (`float`, *optional*): When a run stops at the step it has come to, as `time.time()` has it.
    """

    task: str
    folder: Path
    data: Path
    steps: int
    small: bool
    ends: float | None = None

    def settings(self, arm: Arm, rate: float, seed: int) -> Settings:
        settings: Settings = {"per_device_train_batch_size": 32, "learning_rate": rate, "seed": seed, **arm.settings}
        settings |= {
            "max_steps": self.steps * arm.steps_per_batch,
            "eval_steps": max(self.steps // 5, 1) * arm.steps_per_batch,
        }
        settings |= {"eval_on_start": False, "dataset_name": str(self.data / "train.jsonl")}
        settings |= {"eval_benchmarks": [str(self.data / "test.jsonl")], "eval_samples": 2}
        if not self.small:
            settings |= {"use_cpu": False, "bf16": True}
        if self.task == "reasoning":
            settings |= {"dataset_name": str(self.folder / "boards.jsonl"), "max_completion_length": 120}
            settings["reward_funcs"] = "benchmarks/real_rewards.py:board_reward"
            settings["eval_steps"] = settings["max_steps"] + 1  # never
        return settings | (IN_SMALL if self.small else {})

    def measure(self, arm: Arm, rate: float, seed: int) -> dict:
        """One run, in the process that this is called in."""
        place = self.folder / self.task / f"{arm.label}, lr {rate:g}".replace(" ", "_") / f"seed-{seed}"
        started = time.perf_counter()
        with stopping_at(self.ends):
            train_run(place, self.settings(arm, rate, seed), arm.hooks, recipe=RECIPE)
        whole = time.perf_counter() - started
        run = load_run(place, arm.label)
        batches = run.steps // arm.steps_per_batch
        curve = self._curve(run, batches)
        times = {name: sum(run.series(f"lookahead/{name}_time")[1]) for name in ("generation", "reward")}
        times["update"] = run.seconds - sum(times.values())
        return {
            **{"arm": arm.label, "learning_rate": rate, "seed": seed, "batches": batches, "curve": curve},
            "mean_accuracy": statistics.fmean(value for _, value in curve),
            "mean_length": statistics.fmean(run.series("completions/mean_length")[1]),
            "wall_seconds": {**times, "whole": whole},
            "multiplier": run.last("lookahead/step_multiplier"),
        }

    def _curve(self, run: Run, batches: int) -> list[list[float]]:
        """Batches, and what came of the sums that were held out, or of the rollouts of a tenth of the run."""
        if points := run.points.get(f"{self.data.name}--test"):
            return [[point.step * batches / run.steps, point.value] for point in points]
        rewards = run.series("reward")[1]
        tenth = max(len(rewards) // 10, 1)
        parts = [rewards[i : i + tenth] for i in range(0, len(rewards), tenth)]
        return [[(i + 1) * batches / len(parts), statistics.fmean(part)] for i, part in enumerate(parts)]


@contextlib.contextmanager
def stopping_at(ends: float | None) -> Iterator[None]:
    """Around a run: it stops after the step in which that time passes, but makes one step at least."""
    of_record = RunRecordCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        of_record(self, args, state, control, **kwargs)
        if ends is not None and time.time() > ends:
            control.should_training_stop = True

    with patch.object(RunRecordCallback, "on_step_end", on_step_end):
        yield


def key(run: dict) -> tuple[str, float, int]:
    return run["arm"], run["learning_rate"], run["seed"]


def run_jobs(bench: Bench, jobs: list[tuple[Arm, float, int]], workers: int, deadline: Deadline, path: Path) -> None:
    """Makes runs in this order, and begins none that the longest so far would not leave time for."""
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    about = {"task": bench.task, "workers": workers, **describe_machine(threads=1)}
    there = {key(run) for run in runs}
    waiting = [job for job in jobs if (job[0].label, *job[1:]) not in there]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "gxpo_trl.trainer.trainer"])  # imported once, not in every run
    start = partial(start_worker, cpu_time=False)
    running, longest = {}, 0.0
    with ProcessPoolExecutor(workers, context, start, max_tasks_per_child=1) as pool:
        while waiting or running:
            while waiting and len(running) < workers and not (runs and deadline.is_over(needed=longest)):
                running[pool.submit(bench.measure, *waiting.pop(0))] = time.perf_counter()
            if not running:
                break
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                longest = max(longest, time.perf_counter() - running.pop(job))
                runs.append(run := job.result())
                save_result("real_gpu", {"runs": runs, **about}, path)
                about_it = f"{run['arm']}, lr {run['learning_rate']:g}, seed {run['seed']}"
                print(f"{about_it}: {run['curve'][-1][1]:.3f} in {run['wall_seconds']['whole']:.0f} s", flush=True)


def prepare(data: Path, small: bool) -> None:
    """The sums, and the model's weights unless the embedded one stands in."""
    script = Path(RECIPE).with_name("prepare.py")
    spec = importlib.util.spec_from_file_location("prepare_smollm2", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data.mkdir(parents=True, exist_ok=True)
    module.make_sums(data) if small else module.prepare(data)


def make_boards(path: Path, size: int, count: int = 1024) -> None:
    """Writes boards of reasoning-gym's Game of Life and what becomes of each, with another one solved before it."""
    import reasoning_gym
    from real_rewards import TASK

    settings = {"grid_size_x": size, "grid_size_y": size, "filled_cells": size * size // 4, "simulation_steps": 1}
    items = list(reasoning_gym.create_dataset(TASK, seed=0, size=count + 1, **settings))
    boards = [json.loads(item["question"].rpartition("\n\n")[2].rstrip(".")) for item in items]
    boards = [json.dumps(board, separators=(",", ":")) for board in boards]  # in one line, as the answers are
    shot = f"Board: {boards[0]}\nNext: {items[0]['answer']}\n\n"
    prompts = [f"{shot}Board: {board}\nNext:" for board in boards[1:]]
    rows = ({"prompt": p, "answer": item["answer"]} for p, item in zip(prompts, items[1:], strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["addition", "reasoning"], default="addition")
    parser.add_argument("--steps", type=int, default=100, help="batches of a run")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time")
    parser.add_argument("--small", action="store_true", help="three runs of two batches of the embedded model")
    parser.add_argument("--seconds", type=float, help="begin no run that would end later")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/real_gpu"), help="where runs are kept")
    parser.add_argument("--result", type=Path, help="the file that is written, after each run")
    options = parser.parse_args()
    deadline = Deadline(options.seconds)
    if not options.small and not torch.cuda.is_available():
        parser.exit(2, "error: there is no GPU here: benchmarks/real_model.py is for a CPU\n")
    folder = options.out / ("small" if options.small else "runs")
    data = folder / "sums" if options.small else Path("out/smollm2-135m")
    prepare(data, options.small)
    if options.task == "reasoning":
        make_boards(folder / "boards.jsonl", SMALL_BOARD if options.small else BOARD)
    jobs = [(arm, rate, seed) for seed in range(SEEDS) for arm, rate in ORDER]
    if options.small:
        jobs = [(GXPO, RATE, 0), (STOCK, RATE, 0), (CONTROLLED, HIGH, 0)]
    ends = None if options.seconds is None else time.time() + options.seconds
    bench = Bench(options.task, folder, data, 2 if options.small else options.steps, options.small, ends)
    path = options.result or options.out / f"{options.task}.json"
    run_jobs(bench, jobs, 1 if options.small else options.workers, deadline, path)


if __name__ == "__main__":
    main()
