"""From a recipe to a trainer: model, data, rewards, and the callbacks that the recipe asks for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict
from peft import PeftModel
from transformers import BitsAndBytesConfig, PrinterCallback, ProgressCallback, TrainerCallback
from trl import get_dataset, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..callbacks.benchmarks import BenchmarkCallback
from ..callbacks.hub import HubCallback, explain_hub_errors
from ..callbacks.records import RunRecordCallback
from ..callbacks.trackers import TrackerCallback
from ..callbacks.trajectories import TrajectoryCallback
from ..run_folder import ADAPTER_CONFIG, is_adapter
from ..tasks import resolve_dataset, resolve_model, resolve_reward
from ..trainer.grouped import sample_in_groups
from ..trainer.trainer import LookaheadTrainer
from .arguments import Recipe
from .parsing import trainer_class


def build_trainer(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> LookaheadTrainer:
    """The trainer that a recipe describes, with its callbacks.

    Raises:
        ValueError: If the recipe names no dataset, no model or no reward, or one that does not exist; if it asks for
            what this run can't have, such as grouped sampling with vLLM.
    """
    script, args = recipe.script, recipe.training
    _check_names(recipe)
    rewards, dataset = _load_rewards(recipe), _load_data(recipe)
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
    sample_in_groups(trainer, recipe.sampling.generation_backend, recipe.sampling.generation_token_budget)
    attach_callbacks(trainer, recipe)
    if recipe.rehearsal.dry_run:  # its end says all of it
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    return trainer


# ---- What it is made of


def _check_names(recipe: Recipe) -> None:
    """Refuses a recipe that leaves out what can't be left out, before anything is loaded.

    Raises:
        ValueError: Names the setting.
    """
    script = recipe.script
    if not script.dataset_name and not recipe.mixture.datasets:
        raise ValueError("The recipe names no data. Set `dataset_name` or `datasets`.")
    if not recipe.model.model_name_or_path:
        raise ValueError("The recipe names no model. Set `model_name_or_path`.")
    if not script.reward_funcs and not script.reward_model_name_or_path:
        raise ValueError("The recipe names no reward. Set `reward_funcs` or `reward_model_name_or_path`.")


def _load_rewards(recipe: Recipe) -> list[Callable | str]:
    """Functions, and the name of a reward model."""
    rewards = [resolve_reward(name) for name in recipe.script.reward_funcs or []]
    model = recipe.script.reward_model_name_or_path
    return [*rewards, model] if model else rewards


def _load_data(recipe: Recipe) -> DatasetDict | IterableDatasetDict:
    """The splits that the recipe names."""
    script, args = recipe.script, recipe.training
    problems = dataclasses.asdict(recipe.problems)
    if recipe.mixture.datasets:
        given = [name for name, value in problems.items() if value is not None]
        if given:
            raise ValueError(f"`datasets` mixes datasets with prompts of their own. Leave out `{'`, `'.join(given)}`.")
        dataset = get_dataset(recipe.mixture)
    else:
        where = (script.dataset_name, script.dataset_config, script.dataset_streaming, script.dataset_train_split)
        dataset = resolve_dataset(*where, **problems)
    if args.eval_strategy != "no" and script.dataset_test_split not in dataset:
        raise ValueError(
            f"`eval_strategy: {args.eval_strategy.value}` evaluates on the split "
            f"`{script.dataset_test_split}`, and the data has {', '.join(dataset)}. Name another "
            '`dataset_test_split`, or set `eval_strategy: "no"` and `eval_benchmarks`.'
        )
    return dataset


def _load_model(recipe: Recipe) -> dict[str, Any]:
    """The model as TRL's trainers take it, by argument: its name, or with `resume_adapter` itself."""
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
    """A model with an adapter on it that can be trained further.

    Raises:
        ValueError: If the folder holds no adapter.
    """
    if not is_adapter(Path(adapter)):
        raise ValueError(f"`resume_adapter: {adapter}` holds no {ADAPTER_CONFIG}. Name the folder of an adapter.")
    if quantization_config is not None:
        model_options = {**model_options, "quantization_config": quantization_config}
    base = create_model_from_path(model, **model_options)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


# ---- What watches it


def attach_callbacks(trainer: LookaheadTrainer, recipe: Recipe) -> None:
    """What a run leaves behind, and what the recipe asks for on the way: benchmarks, a trajectory.

    Raises:
        ValueError: If this trainer can't have them.
    """
    TrackerCallback.attach(trainer)
    benchmarks = recipe.benchmarks
    for name in ("prompt", "system_prompt"):  # they ask as the training data does, unless told otherwise
        if getattr(benchmarks, f"eval_{name}") is None:
            benchmarks = dataclasses.replace(benchmarks, **{f"eval_{name}": getattr(recipe.problems, name)})
    settings = _changed(benchmarks, recipe.trajectory, recipe.sampling)
    trainer.add_callback(RunRecordCallback(trainer, settings))
    trainer.add_callback(HubCallback(trainer))
    if benchmarks.eval_benchmarks:
        asked = (benchmarks.eval_samples, benchmarks.eval_prompt, benchmarks.eval_system_prompt)
        at_start = trainer.args.eval_on_start
        trainer.add_callback(BenchmarkCallback(trainer, benchmarks.eval_benchmarks, *asked, at_start))
        trainer.args.eval_on_start = at_start and trainer.eval_dataset is not None
    if recipe.trajectory.trajectory_steps is not None:
        trainer.add_callback(TrajectoryCallback(trainer, recipe.trajectory.trajectory_steps))


def _changed(*parts: Any) -> dict[str, Any]:
    """The settings that are not their defaults."""
    fields = [(part, f) for part in parts for f in dataclasses.fields(part)]
    return {f.name: getattr(part, f.name) for part, f in fields if getattr(part, f.name) != f.default}
