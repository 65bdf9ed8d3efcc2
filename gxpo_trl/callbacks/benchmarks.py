"""Benchmarks scored during training, beside what the run has spent so far."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer, RLOOTrainer
from trl.models import unwrap_model_for_generation

from ..evaluation.benchmark import Benchmark, Record, judge_samples
from ..evaluation.results import benchmark_results
from ..evaluation.sampling import Sample, Sampler, transformers_sampler
from ..evaluation.scoring import load_benchmark
from ..evaluation.settings import EvaluationArguments
from ..run_folder import score_name
from ..tasks.datasets import find_overlap
from .checks import check_at_least
from .records import find_record


@dataclass
class BenchmarkArguments:
    r"""
    What is scored during training, as [`BenchmarkCallback`] does it.

    Parameters:
        eval_benchmarks (`list[str]`, *optional*):
            Problem sets, by name or file, that are scored every `eval_steps` steps as `eval/<benchmark>/avg@n`,
            sampled as in training and independent of `eval_strategy`.
        eval_samples (`int`, *optional*, defaults to `4`):
            n, the completions of each problem of `eval_benchmarks`.
        eval_prompt (`str`, *optional*):
            Template of the user's message, with `{problem}` in it, for `eval_benchmarks`. Unset for the problem alone.
        eval_system_prompt (`str`, *optional*):
            System message for `eval_benchmarks`. Unset for none.
    """

    eval_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Problem sets, by name or file, that are scored every `eval_steps` steps as "
            "`eval/<benchmark>/avg@n`, sampled as in training and independent of `eval_strategy`."
        },
    )
    eval_samples: int = field(
        default=4,
        metadata={"help": "n, the completions of each problem of `eval_benchmarks`."},
    )
    eval_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Template of the user's message, with {problem} in it, for `eval_benchmarks`. Unset for the "
            "problem alone."
        },
    )
    eval_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message for `eval_benchmarks`. Unset for none."},
    )

    def __post_init__(self):
        check_at_least("eval_samples", self.eval_samples, 1)


class BenchmarkCallback(TrainerCallback):
    """Scores benchmarks every `eval_steps` steps, with the policy as it is, sampled as in training.

    Where a trainer samples nothing, as in SFT, completions are drawn at temperature 1, as long as what it trains on
    may be. With a [`RunRecordCallback`], scores are logged beside what the run has spent, and take nothing of it.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer of TRL.
        benchmarks (`list[str]`): Problem sets, by name or file.
        samples (`int`, *optional*, defaults to 4): Completions of each problem.
        prompt (`str`, *optional*): Template of the user's message, with `{problem}` in it; unset for the problem.
        system_prompt (`str`, *optional*): Unset for none.
        at_start (`bool`, *optional*, defaults to `False`): Whether to score before the first step too.

    Raises:
        ValueError: If `eval_steps` is unset, a benchmark is not to be had, or a single turn of n samples is not what
            the trainer can sample.
    """

    def __init__(
        self,
        trainer: Trainer,
        benchmarks: list[str],
        samples: int = 4,
        prompt: str | None = None,
        system_prompt: str | None = None,
        at_start: bool = False,
    ):
        self.trainer, self.samples, self.at_start = trainer, samples, at_start
        check_at_least("eval_samples", samples, 1)
        if not trainer.args.eval_steps:
            raise ValueError("`eval_benchmarks` needs to know when: set `eval_steps`.")
        if reason := _why_not_sampled(trainer, samples):
            raise ValueError(f"`eval_benchmarks` {reason}. Leave it out.")
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._sampler: Sampler | None = None  # of the model itself, for trainers that sample nothing
        self._benchmarks = [load_benchmark(name, prompt=prompt, system_prompt=system_prompt) for name in benchmarks]
        for benchmark in self._benchmarks:
            self._report_overlap(benchmark)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.at_start and state.global_step == 0:
            self.score()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % state.eval_steps == 0:
            self.score()

    def _report_overlap(self, benchmark: Benchmark) -> None:
        train = self.trainer.train_dataset
        if not isinstance(train, Dataset) or not {"problem", "prompt"} & set(train.column_names):
            return
        if found := find_overlap(train, benchmark.problems):
            where = f"{len(found)} of {len(benchmark.problems)} problems of {benchmark.name} are in the training data"
            self.trainer.accelerator.print(f"{where}, such as {found[0]!r}.")

    # ---- Scoring

    def score(self) -> dict[str, float]:
        """Samples, judges and logs all benchmarks. Training goes on as if nothing had happened."""
        record = find_record(self.trainer)
        logs = {} if record is None else {f"eval/{name}": value for name, value in record.spent().items()}
        with contextlib.nullcontext() if record is None else record.off_the_clock():
            logs |= self._score_all()
            should_log = self.trainer.control.should_log
            Trainer.log(self.trainer, logs)  # TRL's own would flush the metrics of the step under way
            self.trainer.control.should_log = should_log  # the step's own log is still to come
        return logs

    def _score_all(self) -> dict[str, float]:
        model, accelerator = self.trainer.model, self.trainer.accelerator
        was_training, scores = model.training, {}
        model.eval()
        device = accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.trainer.args.seed + accelerator.process_index)
            for benchmark in self._benchmarks:
                scores |= self._score(benchmark)
        model.train(was_training)
        return scores

    def _score(self, benchmark: Benchmark) -> dict[str, float]:
        records: list[Record] = []
        for rows in self._deal(benchmark.problems):
            # All ranks sample equally often, since it may take all of them: without a problem left, the first again.
            samples = self._sample(rows or [benchmark.problems[0]])
            records += judge_samples(benchmark, rows, samples[: len(rows)])
        place = {row_id: i for i, row_id in enumerate(benchmark.problems["id"][:])}
        records = sorted(gather_object(records), key=lambda record: (place[record.id], record.sample))
        results = benchmark_results(records, ks=[self.samples])
        logs = {name: metric["value"] for name, metric in results["metrics"].items()}
        logs |= {name: results[name] for name in ("mean_length", "truncated", "verify_failures")}
        return {score_name(benchmark.slug, name): value for name, value in logs.items()}

    def _deal(self, problems: Dataset) -> list[list[dict[str, Any]]]:
        """The problems of this rank in batches, of which every rank has equally many."""
        accelerator = self.trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        own = problems.to_list()[rank::ranks]
        size = max(self.trainer.args.per_device_eval_batch_size // self.samples, 1)
        return [own[i : i + size] for i in range(0, math.ceil(len(problems) / ranks), size)]

    # ---- Sampling

    def _sample(self, rows: list[dict[str, Any]]) -> list[list[Sample]]:
        conversations = [row["prompt"] for row in rows]
        if _samples_itself(self.trainer):
            return self._sample_as_in_training(conversations)
        return self._sample_from_model(conversations)

    def _sample_as_in_training(self, conversations: list[list[dict[str, str]]]) -> list[list[Sample]]:
        """By whatever the trainer samples with: vLLM, grouped sampling, `generate`."""
        trainer, n = self.trainer, self.samples
        prompts = trainer._tokenize_prompts([conversation for conversation in conversations for _ in range(n)])[0]
        if isinstance(trainer, GRPOTrainer):
            completions, _ = trainer._generate_single_turn(prompts, None, {}, n)
        else:
            completions = trainer._generate_single_turn(prompts, None, {})
        ends = {*trainer.eos_token_ids, self._tokenizer.pad_token_id}
        samples = [
            Sample(self._tokenizer.decode(ids, skip_special_tokens=True), len(ids), truncated=ids[-1] not in ends)
            for ids in completions
        ]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def _sample_from_model(self, conversations: list[list[dict[str, str]]]) -> list[list[Sample]]:
        trainer = self.trainer
        prompts = self._tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        seed = int(torch.randint(2**31, ()))
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            if self._sampler is None:
                self._sampler = transformers_sampler(model, self._tokenizer, _evaluation_settings(trainer))
            return self._sampler(prompts, self.samples, seed)


def _samples_itself(trainer: Trainer) -> bool:
    """Whether the trainer samples completions on its way."""
    return hasattr(trainer, "_generate_single_turn")


def _why_not_sampled(trainer: Trainer, samples: int) -> str | None:
    """Why n samples of a single turn can't be had from this trainer; `None` if they can."""
    reason = None
    if not _samples_itself(trainer):
        return _why_not_sampled_from_model(trainer)
    if getattr(trainer, "rollout_func", None) is not None:
        reason = "`rollout_func` generates"
    elif getattr(trainer, "tools", None):
        reason = "tools are called between turns"
    elif isinstance(trainer, RLOOTrainer) and trainer.use_vllm and samples != trainer.num_generations_eval:
        reason = "with vLLM, TRL's RLOO draws `num_generations_eval` samples, and `eval_samples` is another number"
    return None if reason is None else f"would not be sampled as training is: {reason}"


def _why_not_sampled_from_model(trainer: Trainer) -> str | None:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if tokenizer.chat_template is None:
        return "asks in chats, and the tokenizer has no chat template"
    if trainer.is_fsdp_enabled:
        return f"can't be sampled under FSDP in a {type(trainer).__name__}; `gxpo eval` scores its checkpoints"
    return None


def _evaluation_settings(trainer: Trainer) -> EvaluationArguments:
    """Those of `gxpo eval`, but completions are as long as what is trained on may be."""
    longest = getattr(trainer.args, "max_length", None)
    return EvaluationArguments() if longest is None else EvaluationArguments(max_new_tokens=longest)
