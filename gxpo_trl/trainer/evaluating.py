"""Benchmarks scored during training, beside what the run has spent so far."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

from ..evaluation.benchmark import Benchmark, Record, judge_samples
from ..evaluation.evaluate import load_benchmark
from ..evaluation.results import benchmark_results
from ..evaluation.sampling import Sample
from ..tasks.datasets import find_overlap


class BenchmarkCallback(TrainerCallback):
    """Scores the benchmarks every `eval_steps` steps, and at the start if `eval_on_start`."""

    def __init__(self, trainer: "BenchmarkMixin"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.resumes = args.eval_on_start and state.global_step > 0
        # Without an evaluation dataset, the training loop's own first call of `evaluate` does it.
        if args.eval_on_start and state.global_step == 0 and self.trainer.eval_dataset is not None:
            self.trainer.score_benchmarks()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.resumes = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % state.eval_steps == 0:
            self.trainer.score_benchmarks()


class BenchmarkMixin:
    """Scores `eval_benchmarks` with the policy as it is, sampled as in training."""

    def _set_up_benchmarks(self) -> None:
        args = self.args
        self.resumes = False  # whether a resumed run is about to begin, which has scored its start long ago
        if args.eval_benchmarks and (reason := self._why_no_benchmarks()):
            raise ValueError(f"`eval_benchmarks` would not be sampled as training is: {reason}. Leave it out.")
        self._benchmarks = [
            load_benchmark(name, prompt=args.eval_prompt, system_prompt=args.eval_system_prompt)
            for name in args.eval_benchmarks or []
        ]
        if self._benchmarks:
            self.add_callback(BenchmarkCallback(self))
        for benchmark in self._benchmarks:
            self._report_overlap(benchmark)

    def _why_no_benchmarks(self) -> str | None:
        """Why a single turn of n samples is not what this trainer samples; `None` if it is."""
        return None

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if self._benchmarks and eval_dataset is None and self.eval_dataset is None:
            return {} if self.resumes else self.score_benchmarks()
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _report_overlap(self, benchmark: Benchmark) -> None:
        found = find_overlap(self.train_dataset, benchmark.problems) if isinstance(self.train_dataset, Dataset) else []
        if found:
            where = f"{len(found)} of {len(benchmark.problems)} problems of {benchmark.name} are in the training data"
            self.accelerator.print(f"{where}, such as {found[0]!r}.")

    def score_benchmarks(self) -> dict[str, float]:
        """Samples, judges and logs all benchmarks. Training goes on as if nothing had happened."""
        with self.off_the_clock():
            return self._score_benchmarks()

    def _score_benchmarks(self) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        logs = {
            "eval/backward_passes": self._backward_passes,
            "eval/rollouts": self._rollouts,
            "eval/seconds": self._seconds_spent(),
        }
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            for benchmark in self._benchmarks:
                logs |= self._score(benchmark)
        self.model.train(was_training)
        should_log = self.control.should_log
        Trainer.log(self, logs)  # TRL's own would flush the metrics of the step under way
        self.control.should_log = should_log  # the step's own log is still to come
        return logs

    def _score(self, benchmark: Benchmark) -> dict[str, float]:
        records: list[Record] = []
        for rows in self._deal(benchmark.problems):
            # All ranks sample equally often, since it may take all of them: without a problem left, the first again.
            samples = self._sample_benchmark(rows or [benchmark.problems[0]])
            records += judge_samples(benchmark, rows, samples[: len(rows)])
        place = {row_id: i for i, row_id in enumerate(benchmark.problems["id"][:])}
        records = sorted(gather_object(records), key=lambda record: (place[record.id], record.sample))
        results = benchmark_results(records, ks=[self.args.eval_samples])
        logs = {name: metric["value"] for name, metric in results["metrics"].items()}
        logs |= {name: results[name] for name in ("mean_length", "truncated", "verify_failures")}
        return {f"eval/{benchmark.slug}/{name}": value for name, value in logs.items()}

    def _deal(self, problems: Dataset) -> list[list[dict[str, Any]]]:
        """The problems of this rank in batches, of which every rank has equally many."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        own = problems.to_list()[rank::ranks]
        size = max(self.args.per_device_eval_batch_size // self.args.eval_samples, 1)
        return [own[i : i + size] for i in range(0, math.ceil(len(problems) / ranks), size)]

    def _sample_benchmark(self, rows: list[dict[str, Any]]) -> list[list[Sample]]:
        n = self.args.eval_samples
        prompts = self._tokenize_prompts([row["prompt"] for row in rows for _ in range(n)])[0]
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        samples = [
            Sample(self._tokenizer.decode(ids, skip_special_tokens=True), len(ids), truncated=ids[-1] not in ends)
            for ids in self._sample(prompts, n)
        ]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def _sample(self, prompt_ids: list[list[int]], num_generations: int) -> list[list[int]]:
        """One completion of each prompt, of which `num_generations` in a row are equal, by whatever backend."""
        if isinstance(self, GRPOTrainer):
            return self._generate_single_turn(prompt_ids, None, {}, num_generations)[0]
        return self._generate_single_turn(prompt_ids, None, {})
