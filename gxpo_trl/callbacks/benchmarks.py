"""Scores benchmarks during training, and logs them with what the run has spent so far."""

import contextlib
import math
from dataclasses import dataclass, field

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer, RLOOTrainer
from trl.models import unwrap_model_for_generation

from ..checks import check_at_least
from ..evaluation.benchmark import Record, check_slugs, in_order, judge_samples, slug, tokenize_prompts
from ..evaluation.results import benchmark_results, why_doubtful
from ..evaluation.sampling import Sample, Sampler, transformers_sampler
from ..evaluation.settings import EvaluationArguments
from ..run_folder import score_name
from ..tasks.datasets import find_overlap
from ..tasks.examples import Prompt
from ..tasks.task import RewardSum, Task, load_task, reward_sum
from .records import find_record


logger = get_logger(__name__)


@dataclass
class BenchmarkArguments:
    r"""
    Settings of [`BenchmarkCallback`]: what is scored during training.

    Parameters:
        eval_benchmarks (`list[str]`, *optional*):
            Problem sets, tasks of reasoning-gym, files, folders or Hub names that are scored every `eval_steps` steps
            as `eval/<benchmark>/avg@n`, sampled as in training and independent of `eval_strategy`. A benchmark without
            its own scorer is scored by the run's reward functions and their weights.
        eval_samples (`int`, *optional*, defaults to `4`):
            n, the completions of each problem of `eval_benchmarks`.
        eval_prompt (`str`, *optional*):
            Template of the user's message, with `{problem}` in it, for `eval_benchmarks`. Unset for only the problem.
        eval_system_prompt (`str`, *optional*):
            System message for `eval_benchmarks`. Unset for none.
        eval_threshold (`float`, *optional*, defaults to `1.0`):
            The (weighted) reward from which a completion of `eval_benchmarks` counts as right.
    """

    eval_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Problem sets, by name or path, that are scored every `eval_steps` steps as "
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
            "help": "Template of the user's message, with {problem} in it, for `eval_benchmarks`. Unset for "
            "only the problem."
        },
    )
    eval_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message for `eval_benchmarks`. Unset for none."},
    )
    eval_threshold: float = field(
        default=1.0,
        metadata={"help": "The reward from which a completion of `eval_benchmarks` counts as right."},
    )

    def __post_init__(self):
        check_at_least("eval_samples", self.eval_samples, 1)
        check_slugs("eval_benchmarks", self.eval_benchmarks or [])


class BenchmarkCallback(TrainerCallback):
    """Scores benchmarks every `eval_steps` steps with the current policy, sampled as in training.

    If a trainer does not sample, as in SFT, completions are drawn at temperature 1 and are at most as long as its
    training texts. With a [`RunRecordCallback`], scores are logged with what the run has spent. Scoring does not count
    as spent.

    Args:
        trainer ([`~transformers.Trainer`]): Any trainer of TRL.
        benchmarks (`list[str | Task]`): Problem sets, tasks of reasoning-gym, files, folders or Hub names. Without its
            own scorer a benchmark is scored by the trainer's reward functions and their weights, or else by its right
            answers. A task of `load_task` may have its own columns and threshold.
        samples (`int`, *optional*, defaults to 4): Completions of each problem.
        prompt (`str`, *optional*): Template of the user's message, with `{problem}` in it; unset for the problem.
        system_prompt (`str`, *optional*): Unset for none.
        at_start (`bool`, *optional*, defaults to `False`): Whether to score before the first step too.

    Raises:
        ValueError: If `eval_steps` is unset, a benchmark is not available, two would be logged under one name, a
            reward function fails on one, or the trainer can't sample a single turn of n samples.
    """

    def __init__(
        self,
        trainer: Trainer,
        benchmarks: list[str | Task],
        samples: int = 4,
        prompt: str | None = None,
        system_prompt: str | None = None,
        at_start: bool = False,
    ):
        self.trainer, self.samples, self.at_start = trainer, samples, at_start
        check_at_least("eval_samples", samples, 1)
        if not trainer.args.eval_steps:
            raise ValueError("`eval_benchmarks` needs an interval: set `eval_steps`.")
        if reason := _why_not_sampled(trainer, samples):
            raise ValueError(f"`eval_benchmarks` {reason}. Leave it out.")
        check_slugs("benchmarks", [named if isinstance(named, str) else named.name for named in benchmarks])
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._doubted: set[str] = set()
        self._sampler: Sampler | None = None  # of the model itself, for trainers that do not sample
        options = {"prompt": prompt, "system_prompt": system_prompt, "rewards": _rewards(trainer)}
        tasks = [load_task(named, **options) if isinstance(named, str) else named for named in benchmarks]
        self._tasks = [task.asked_of(self._tokenizer, "the model") for task in tasks]
        for task in self._tasks:
            task.check_rewards()
            self._report_overlap(task)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.at_start and state.global_step == 0:
            self.score()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % state.eval_steps == 0:
            self.score()

    def _report_overlap(self, task: Task) -> None:
        train = self.trainer.train_dataset
        if not isinstance(train, Dataset) or not {"problem", "prompt"} & set(train.column_names):
            return
        if found := find_overlap(train, task.problems):
            where = f"{len(found)} of {len(task.problems)} problems of {task.name} are in the training data"
            self.trainer.accelerator.print(f"{where}, such as {found[0]!r}.")

    # ---- Scoring

    def score(self) -> dict[str, float]:
        """Samples, judges and logs all benchmarks. It does not change the training that follows."""
        record = find_record(self.trainer)
        logs = {} if record is None else {f"eval/{name}": value for name, value in record.spent().items()}
        with contextlib.nullcontext() if record is None else record.off_the_clock():
            logs |= self._score_all()
            should_log = self.trainer.control.should_log
            Trainer.log(self.trainer, logs)  # TRL's own would flush the metrics of the current step
            self.trainer.control.should_log = should_log  # the step's own log is still to come
        return logs

    def _score_all(self) -> dict[str, float]:
        model, accelerator = self.trainer.model, self.trainer.accelerator
        was_training, scores = model.training, {}
        model.eval()
        device = accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.trainer.args.seed + accelerator.process_index)
            for task in self._tasks:
                scores |= self._score(task)
        model.train(was_training)
        return scores

    def _score(self, task: Task) -> dict[str, float]:
        records: list[Record] = []
        for places in self._deal(task.problems):
            # All ranks sample equally often, because sampling may need all of them: a rank without a problem left
            # samples the first again.
            samples = self._sample([task.problems[place]["prompt"] for place in places or [0]])
            records += judge_samples(task, places, samples[: len(places)], self.trainer.state)
        records = in_order(gather_object(records))
        if (reason := why_doubtful(records)) and task.name not in self._doubted:
            self._doubted.add(task.name)
            logger.warning(f"{task.name}: {reason}")
        results = benchmark_results(records, ks=[self.samples])
        logs = {name: metric["value"] for name, metric in results["metrics"].items()}
        logs |= {name: results[name] for name in ("mean_length", "truncated", "mean_reward", "verify_failures")}
        return {score_name(slug(task.name), name): value for name, value in logs.items() if value is not None}

    def _deal(self, problems: Dataset) -> list[list[int]]:
        """The indices of this rank's problems, in batches. Every rank has the same number of batches."""
        accelerator = self.trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        own = list(range(len(problems)))[rank::ranks]
        size = max(self.trainer.args.per_device_eval_batch_size // self.samples, 1)
        return [own[i : i + size] for i in range(0, math.ceil(len(problems) / ranks), size)]

    # ---- Sampling

    def _sample(self, prompts: list[Prompt]) -> list[list[Sample]]:
        if _samples_itself(self.trainer):
            return self._sample_as_in_training(prompts)
        return self._sample_from_model(prompts)

    def _sample_as_in_training(self, asked: list[Prompt]) -> list[list[Sample]]:
        """Samples with whatever the trainer uses: vLLM, grouped sampling or `generate`."""
        trainer, n = self.trainer, self.samples
        prompts = trainer._tokenize_prompts([prompt for prompt in asked for _ in range(n)])[0]
        if isinstance(trainer, GRPOTrainer):
            completions, _ = trainer._generate_single_turn(prompts, None, {}, n)
        else:
            completions = trainer._generate_single_turn(prompts, None, {})
        ends = {*trainer.eos_token_ids, self._tokenizer.pad_token_id}
        samples = [
            Sample(self._tokenizer.decode(ids, skip_special_tokens=True), ids, truncated=ids[-1] not in ends)
            for ids in completions
        ]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def _sample_from_model(self, asked: list[Prompt]) -> list[list[Sample]]:
        trainer = self.trainer
        options = getattr(trainer.args, "chat_template_kwargs", None) or {}
        prompts = tokenize_prompts(asked, self._tokenizer, **options)
        seed = int(torch.randint(2**31, ()))
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            if self._sampler is None:
                self._sampler = transformers_sampler(model, self._tokenizer, _evaluation_settings(trainer))
            return self._sampler(prompts, self.samples, seed)


def _rewards(trainer: Trainer) -> RewardSum | None:
    """The reward functions of a trainer with their weights; `None` if it has none.

    Raises:
        ValueError: If one of them is a model, which is not called here.
    """
    functions = getattr(trainer, "reward_funcs", None)
    if not functions or any(isinstance(function, torch.nn.Module) for function in functions):
        return None
    return reward_sum(functions, trainer.reward_weights.tolist())


def _samples_itself(trainer: Trainer) -> bool:
    """Whether the trainer samples completions during training."""
    return hasattr(trainer, "_generate_single_turn")


def _why_not_sampled(trainer: Trainer, samples: int) -> str | None:
    """Why this trainer can't sample n completions of a single turn; `None` if it can."""
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
    if trainer.is_fsdp_enabled:
        return f"can't be sampled under FSDP in a {type(trainer).__name__}; `gxpo eval` scores its checkpoints"
    return None


def _evaluation_settings(trainer: Trainer) -> EvaluationArguments:
    """The settings of `gxpo eval`, with completions as long as the training texts may be."""
    longest = getattr(trainer.args, "max_length", None)
    return EvaluationArguments() if longest is None else EvaluationArguments(max_new_tokens=longest)
