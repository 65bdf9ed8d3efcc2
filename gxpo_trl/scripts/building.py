"""From a recipe to a trainer: model, data, rewards, and the callbacks that the recipe asks for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    get_scheduler,
)
from trl import get_dataset, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..callbacks.benchmarks import BenchmarkArguments, BenchmarkCallback
from ..callbacks.hub import HubCallback, explain_hub_errors
from ..callbacks.records import RunRecordCallback
from ..callbacks.trackers import TrackerCallback
from ..callbacks.trajectories import TrajectoryCallback
from ..run_folder import ADAPTER_CONFIG, adapter_base, check_model, check_output_dir, is_adapter
from ..tasks import resolve_dataset, resolve_model, resolve_reward
from ..tasks.datasets import has_name
from ..tasks.examples import check_columns, without_chat_template
from ..tasks.generated import is_generated, reasoning_gym_reward
from ..tasks.task import OWN_REWARD, Task, load_task, reward_sum
from ..trainer.grouped import sample_in_groups
from ..trainer.trainer import LookaheadTrainer
from .arguments import Recipe
from .parsing import trainer_class


MIXTURE = "The mixture in `datasets`"
"""What data is called that has no single name."""


def build_trainer(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> LookaheadTrainer:
    """Builds the trainer that a recipe describes, with its callbacks.

    Raises:
        ValueError: If the recipe names no dataset, model or reward, or one that does not exist; or if it asks for an
            unsupported combination, such as grouped sampling with vLLM.
    """
    script, args = recipe.script, recipe.training
    _check_names(recipe)
    rewards, dataset = load_rewards(recipe), load_data(recipe)
    if isinstance(dataset, DatasetDict):
        dataset = as_model_takes_it(dataset, recipe)
    check_rewards(rewards, dataset, recipe)
    model = _load_model(recipe)
    with explain_hub_errors(args):
        trainer = trainer_class(args.update_rule)(
            **model,
            reward_funcs=rewards,
            args=args,
            train_dataset=dataset[script.dataset_train_split],
            eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
            callbacks=callbacks,
        )
    _check_optimizer(trainer)
    sample_in_groups(trainer, recipe.sampling.generation_backend, recipe.sampling.generation_token_budget)
    attach_callbacks(trainer, recipe)
    if recipe.rehearsal.dry_run:  # the summary at the end has it
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    return trainer


# ---- Its parts


def _check_names(recipe: Recipe) -> None:
    """Refuses a recipe without a required key, a model or a writable output folder, before anything is loaded.

    Raises:
        ValueError: Names the setting.
    """
    script = recipe.script
    check_output_dir(recipe.training.output_dir)
    if not script.dataset_name and not recipe.mixture.datasets:
        raise ValueError("The recipe names no data. Set `dataset_name` or `datasets`.")
    if not recipe.model.model_name_or_path:
        raise ValueError("The recipe names no model. Set `model_name_or_path`.")
    check_model(resolve_model(recipe.model.model_name_or_path), "model_name_or_path")
    scores_itself = script.dataset_name is not None and is_generated(script.dataset_name)
    if not script.reward_funcs and not script.reward_model_name_or_path and not scores_itself:
        raise ValueError("The recipe names no reward. Set `reward_funcs` or `reward_model_name_or_path`.")


def load_rewards(recipe: Recipe) -> list[Callable | str]:
    """The reward functions, and the name of a reward model."""
    rewards = [resolve_reward(name) for name in recipe.script.reward_funcs or []]
    model = recipe.script.reward_model_name_or_path
    return [*rewards, model] if model else rewards or [reasoning_gym_reward]  # its tasks score with it


def load_data(recipe: Recipe) -> DatasetDict | IterableDatasetDict:
    """The splits that the recipe names.

    Raises:
        ValueError: If there are none, the split to evaluate on is missing, or a column is called as TRL's arguments.
    """
    script, args = recipe.script, recipe.training
    problems = dataclasses.asdict(recipe.problems)
    if recipe.mixture.datasets:
        given = [name for name, value in problems.items() if value is not None and name != "reasoning_gym"]
        if given:
            raise ValueError(f"`datasets` mixes datasets with prompts of their own. Leave out `{'`, `'.join(given)}`.")
        dataset = get_dataset(recipe.mixture)
    else:
        where = (script.dataset_name, script.dataset_config, script.dataset_streaming, script.dataset_train_split)
        dataset = resolve_dataset(*where, **problems, test_split=script.dataset_test_split)
    if args.eval_strategy != "no" and script.dataset_test_split not in dataset:
        raise ValueError(
            f"`eval_strategy: {args.eval_strategy.value}` evaluates on the split "
            f"`{script.dataset_test_split}`, and the data has {', '.join(dataset)}. Name another "
            '`dataset_test_split`, or set `eval_strategy: "no"` and `eval_benchmarks`.'
        )
    for split in _used_splits(dataset, recipe):  # of a stream they may be unknown
        check_columns(split.column_names or (), script.dataset_name or MIXTURE)
    return dataset


def _used_splits(dataset: DatasetDict | IterableDatasetDict, recipe: Recipe) -> list[Dataset | IterableDataset]:
    names = {recipe.script.dataset_train_split}
    if recipe.training.eval_strategy != "no":
        names.add(recipe.script.dataset_test_split)
    return [split for name, split in dataset.items() if name in names]


def check_rewards(rewards: list[Callable | str], dataset: DatasetDict | IterableDatasetDict, recipe: Recipe) -> None:
    """Calls the reward functions on the first example of each split, except of a stream.

    Raises:
        ValueError: If one fails, or could not run the tests of an example.
    """
    functions = reward_sum([reward for reward in rewards if callable(reward)], None)
    name = recipe.script.dataset_name or MIXTURE
    for split in _used_splits(dataset, recipe):
        if isinstance(split, Dataset) and len(split):
            gold = "solution" if "solution" in split.column_names else None
            Task(name, OWN_REWARD, split, functions, gold).check_rewards()


def own_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe's model."""
    options = {"revision": recipe.model.model_revision, "trust_remote_code": recipe.training.trust_remote_code}
    return AutoTokenizer.from_pretrained(resolve_model(recipe.model.model_name_or_path), **options)


def as_model_takes_it(dataset: DatasetDict, recipe: Recipe) -> DatasetDict:
    """Turns prompts into texts if the model's tokenizer has no chat template.

    Raises:
        ValueError: If a prompt is more than one user message.
    """
    if own_tokenizer(recipe).chat_template is not None:
        return dataset
    return DatasetDict(
        {split: without_chat_template(rows, recipe.model.model_name_or_path) for split, rows in dataset.items()}
    )


def _load_model(recipe: Recipe) -> dict[str, Any]:
    """The model arguments of TRL's trainers: the model's name, or with `resume_adapter` the model."""
    args, settings, adapter = recipe.training, recipe.model, recipe.loop.resume_adapter
    args.model_init_kwargs = {
        "revision": settings.model_revision,
        "attn_implementation": settings.attn_implementation,
        "dtype": settings.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    name, quantization_config = resolve_model(settings.model_name_or_path), get_quantization_config(settings)
    if not adapter:
        return {"model": name, "peft_config": get_peft_config(settings), "quantization_config": quantization_config}
    options, args.model_init_kwargs = args.model_init_kwargs, None
    return {"model": load_adapter(name, adapter, options, quantization_config)}


def load_adapter(
    model: str, adapter: str, model_options: dict[str, Any], quantization_config: BitsAndBytesConfig | None
) -> PeftModel:
    """Loads a model with an adapter that can be trained further.

    Raises:
        ValueError: If the folder holds no adapter, or one whose settings can't be read.
    """
    if not is_adapter(Path(adapter)):
        raise ValueError(f"`resume_adapter: {adapter}` holds no {ADAPTER_CONFIG}. Name the folder of an adapter.")
    adapter_base(Path(adapter))
    if quantization_config is not None:
        model_options = {**model_options, "quantization_config": quantization_config}
    base = create_model_from_path(model, **model_options)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def _check_optimizer(trainer: LookaheadTrainer) -> None:
    """Creates the optimizer and the schedule as training will, so that their errors come before the run begins."""
    args = trainer.args
    trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    get_scheduler(args.lr_scheduler_type, optimizer, 0, 1_000_000, args.lr_scheduler_kwargs)


# ---- Callbacks


def attach_callbacks(trainer: LookaheadTrainer, recipe: Recipe) -> None:
    """Adds the callbacks for the run's files, and those that the recipe asks for: benchmarks, a trajectory.

    Raises:
        ValueError: If this trainer does not support them.
    """
    TrackerCallback.attach(trainer)
    benchmarks = asked_like_training(recipe)
    settings = _changed(benchmarks, recipe.trajectory, recipe.sampling)
    trainer.add_callback(RunRecordCallback(trainer, _of_data(recipe) | settings))
    trainer.add_callback(HubCallback(trainer))
    at_start = trainer.args.eval_on_start
    trainer.args.eval_on_start = at_start and trainer.eval_dataset is not None
    if benchmarks.eval_benchmarks:
        tasks = load_benchmarks(recipe)
        trainer.add_callback(BenchmarkCallback(trainer, tasks, benchmarks.eval_samples, at_start=at_start))
    if recipe.trajectory.trajectory_steps is not None:
        trainer.add_callback(TrajectoryCallback(trainer, recipe.trajectory.trajectory_steps))


def asked_like_training(recipe: Recipe) -> BenchmarkArguments:
    """The recipe's settings of benchmarks. By default they use the prompt template of the training data."""
    benchmarks = recipe.benchmarks
    for name in ("prompt", "system_prompt"):
        if getattr(benchmarks, f"eval_{name}") is None:
            benchmarks = dataclasses.replace(benchmarks, **{f"eval_{name}": getattr(recipe.problems, name)})
    return benchmarks


def load_benchmarks(recipe: Recipe) -> list[Task]:
    """The tasks of `eval_benchmarks`. The recipe's rewards score those without their own scorer.

    Raises:
        ValueError: If one is not available.
    """
    return [load_benchmark(name, recipe) for name in recipe.benchmarks.eval_benchmarks or []]


def load_benchmark(name: str, recipe: Recipe) -> Task:
    """One of them."""
    benchmarks, problems = asked_like_training(recipe), recipe.problems
    rewards = None
    if not recipe.script.reward_model_name_or_path:
        rewards = reward_sum(load_rewards(recipe), recipe.training.reward_weights)
    columns = {"problem_column": problems.problem_column, "answer_column": problems.answer_column}
    return load_task(
        name,
        benchmarks.eval_prompt,
        benchmarks.eval_system_prompt,
        rewards=rewards,
        threshold=benchmarks.eval_threshold,
        reasoning_gym=problems.reasoning_gym,
        **({} if has_name(name) else columns),
    )


def _of_data(recipe: Recipe) -> dict[str, Any]:
    """What is trained on, and where the run starts."""
    script = {name: getattr(recipe.script, name) for name in ("dataset_name", "dataset_config", "dataset_train_split")}
    mixture = dataclasses.asdict(recipe.mixture).get("datasets") or None
    return script | {"datasets": mixture} | vars(recipe.problems) | {"resume_adapter": recipe.loop.resume_adapter}


def _changed(*parts: Any) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    fields = [(part, f) for part in parts for f in dataclasses.fields(part)]
    return {f.name: getattr(part, f.name) for part, f in fields if getattr(part, f.name) != f.default}
