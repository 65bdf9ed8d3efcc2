"""`gxpo train --config RECIPE --dry-run`: what a recipe needs, and whether it can run.

The plan is computed from the recipe and the model's configuration, without its weights. The data, the tokenizer and
the rewards are opened and shown (`preview.py`). Then the recipe runs through the same functions for a few small steps,
    with the embedded model instead of its model: two steps with the lookahead, one without, and an extrapolation if
    the recipe has one. If the data is on a Hub that can't be reached, the embedded task replaces it.
"""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from trl import DatasetMixtureConfig

from ..run_folder import BACKWARD_PASSES, check_model
from ..tasks.datasets import EMBEDDED_DATASET
from ..tasks.names import EMBEDDED_MODEL, resolve_model
from ..tasks.tiny_model import TINY_MODEL_PATH
from .arguments import Recipe, replace_training
from .next_loop import check_settings
from .plan import describe_plan
from .preview import describe_task, open_data


Settings = dict[str, Any]
"""Settings of a rehearsal, by name."""
SUFFIX = "-dry-run"
"""Ending of a rehearsal's folder, which is next to the run's."""


def rehearse(recipe: Recipe) -> Recipe:
    """Prints the plan of a recipe, and returns the recipe of its rehearsal.

    Raises:
        ValueError: If the model's folder holds none, the rehearsal's folder exists already, the data do not fill a
            generation batch, or the recipe's extrapolation can't work.
    """
    sys.dont_write_bytecode = True  # of a file with rewards
    if recipe.model.model_name_or_path:
        check_model(resolve_model(recipe.model.model_name_or_path), "model_name_or_path")
    if recipe.loop.extrapolate_after is not None:
        check_settings(recipe)
    data = open_data(recipe)
    if data is not None and isinstance(split := data[recipe.script.dataset_train_split], Dataset):
        recipe.training.check_prompts(len(split))
    small = in_small(recipe, has_data=data is not None)
    if (folder := Path(small.training.output_dir)).exists():
        raise ValueError(f"{folder} exists, left by a rehearsal that was killed. Remove it.")
    if recipe.training.process_index == 0:
        print(describe_plan(recipe))
        print(describe_task(recipe, data))
    small.training.distributed_state.wait_for_everyone()
    return small


def conclude(recipe: Recipe, trainer: Trainer) -> str:
    """The result of the rehearsal."""
    trainer.accelerator.wait_for_everyone()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(entry["loss"]) for entry in steps):
        raise RuntimeError(f"The rehearsal's losses are not finite: {[entry['loss'] for entry in steps]}.")
    last = " after the extrapolation" if recipe.loop.extrapolate_after is not None else ""
    return (
        f"Rehearsed on the embedded model and {trainer.args.world_size} process(es): {len(steps)} steps "
        f"and {steps[-1][BACKWARD_PASSES]:.0f} backward passes{last}. Nothing is kept."
    )


# ---- The rehearsal


def in_small(recipe: Recipe, has_data: bool) -> Recipe:
    """The recipe for the embedded model, in a few small steps, with the recipe's data or the embedded task.

    A reward model is left out. The embedded task has its own reward.
    """
    loop, benchmarks, trajectory = recipe.loop, recipe.benchmarks, recipe.trajectory
    if loop.extrapolate_after is not None:
        loop = replace(loop, extrapolate_after=3, extrapolate_steps_ahead=1)
    if benchmarks.eval_benchmarks:
        benchmarks = replace(benchmarks, eval_benchmarks=["arithmetic"], eval_samples=1)
    if trajectory.trajectory_steps is not None:
        trajectory = replace(trajectory, trajectory_steps=1)
    has_data = has_data and recipe.script.reward_model_name_or_path is None
    return replace(
        recipe if has_data else _with_embedded_task(recipe),
        training=replace_training(recipe.training, **_short_run(recipe, has_data), **_small_batch(recipe)),
        model=replace(recipe.model, **_embedded_model(recipe)),
        loop=replace(loop, resume_adapter=None),
        benchmarks=benchmarks,
        trajectory=trajectory,
    )


def _short_run(recipe: Recipe, has_data: bool) -> Settings:
    """Settings of a run that keeps nothing, and in which everything happens within a few steps."""
    args = recipe.training
    short = {
        "max_completion_length": 28,
        "max_steps": 3 if recipe.loop.extrapolate_after is None else 4,
        "max_active_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "load_best_model_at_end": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "log_completions": False,
        "log_completions_hub_repo": None,
        "report_to": "none",
        "push_to_hub": False,
        "use_vllm": False,
        "output_dir": f"{args.output_dir.rstrip('/')}{SUFFIX}",
    }
    if args.eval_steps is not None:
        short |= {"eval_steps": 3, "eval_on_start": False}
    if _has_prompt(recipe) or has_data and recipe.script.dataset_name != EMBEDDED_DATASET:
        short["eval_strategy"] = "no"
    if args.resume_from_checkpoint is not None:
        short["resume_from_checkpoint"] = "last"  # of which there is none
    return short


def _small_batch(recipe: Recipe) -> Settings:
    """Few micro-batches of at least four whole groups, with the recipe's optimizer steps for each generation."""
    args = recipe.training
    rows = args.per_device_train_batch_size * args.world_size
    enough = (n for n in itertools.count(2) if rows * n >= 4 * args.num_generations)
    steps = next(n for n in enough if rows * n % args.num_generations == 0)
    if args.gradient_accumulation_steps < steps or args.steps_per_generation % args.gradient_accumulation_steps:
        return {}
    generations = args.steps_per_generation // args.gradient_accumulation_steps
    return {
        "prompts_per_step": None,
        "gradient_accumulation_steps": steps,
        "generation_batch_size": rows * steps * generations,
    }


def _embedded_model(recipe: Recipe) -> Settings:
    """The embedded model instead of the recipe's, without settings that do not apply to it."""
    model = recipe.model
    small = {"model_name_or_path": EMBEDDED_MODEL, "model_revision": "main"}
    small |= {"load_in_4bit": False, "load_in_8bit": False}
    if model.attn_implementation is not None:
        small["attn_implementation"] = "sdpa"
    if model.use_peft:
        small |= {"lora_r": 8, "lora_alpha": 16}
    if _targets_are_unknown(recipe):
        small["lora_target_modules"] = "all-linear"
    return small


def _with_embedded_task(recipe: Recipe) -> Recipe:
    """The embedded problems instead of the recipe's, with a prompt template if the recipe has one."""
    script = replace(recipe.script, dataset_name=EMBEDDED_DATASET, dataset_train_split="train")
    if script.reward_model_name_or_path is not None:
        script = replace(script, reward_model_name_or_path=None, reward_funcs=["arithmetic_reward"])
    if _has_prompt(recipe):  # as a set of problems, which is what has prompts
        columns = {"problem_column": "prompt", "answer_column": "solution", "prompt": "{problem}"}
    else:
        script = replace(script, dataset_test_split="test")
        columns = {"problem_column": None, "answer_column": None}
    return replace(recipe, script=script, problems=replace(recipe.problems, **columns), mixture=DatasetMixtureConfig())


def _has_prompt(recipe: Recipe) -> bool:
    return recipe.problems.prompt is not None or recipe.problems.system_prompt is not None


def _targets_are_unknown(recipe: Recipe) -> bool:
    """Whether the adapter's targets are modules that the embedded model does not have."""
    targets = recipe.model.lora_target_modules
    if not recipe.model.use_peft or targets is None or targets == "all-linear" or targets == ["all-linear"]:
        return False
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_MODEL_PATH))
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return not {targets} <= modules if isinstance(targets, str) else not set(targets) <= modules
