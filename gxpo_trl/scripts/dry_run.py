"""`gxpo train --config RECIPE --dry-run`: what a recipe would take, and whether it can be carried out.

The plan is computed from the recipe and the model's configuration, without its weights. Then the recipe runs as it is,
through the same functions, with the embedded model in place of its model and the embedded task in place of its
problems, for a few small steps: two with the lookahead, one without, an extrapolation where the recipe has one.
"""

import argparse
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers.hf_argparser import string_to_bool

from ..run_folder import BACKWARD_PASSES
from ..tasks.datasets import EMBEDDED_DATASET
from ..tasks.names import EMBEDDED_MODEL
from ..tasks.tiny_model import TINY_MODEL_PATH
from .plan import describe_plan
from .recipe import Recipe, find_config, parse_recipe


Settings = dict[str, Any]
"""Of a recipe, by name."""
SUFFIX = "-dry-run"
"""Of the folder of a rehearsal, beside that of the run."""


def is_dry_run(arguments: list[str]) -> bool:
    """Whether recipe and command line ask for one. To be known before they are parsed, which may take a GPU."""
    words = find_config(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dry_run", "--dry-run", nargs="?", const=True, type=string_to_bool)
    known, _ = parser.parse_known_args(words)
    if known.dry_run is None and known.config is not None:
        return bool((yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {}).get("dry_run", False))
    return bool(known.dry_run)


def rehearse(arguments: list[str], prog: str | None = None) -> list[str]:
    """Prints the plan of a recipe, and returns the command line that carries it out in small.

    Raises:
        ValueError: If the recipe itself is refused, or a folder is where the rehearsal would be.
    """
    if not torch.accelerator.is_available():
        if not any(word.startswith(("--use_cpu", "--use-cpu")) for word in arguments):
            arguments = [*arguments, "--use_cpu", "true"]  # a plan can be made anywhere
    recipe = parse_recipe(arguments, prog)
    if (folder := _folder(recipe)).exists():
        raise ValueError(f"{folder} is in the way, left by a rehearsal that broke off. Remove it.")
    if recipe.training.process_index == 0:
        print(describe_plan(recipe))
    recipe.training.distributed_state.wait_for_everyone()
    return [*arguments, *in_small(recipe)]


def conclude(recipe: Recipe, trainer: Trainer) -> str:
    """What the rehearsal came to. Its folder is removed."""
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process and recipe.training.output_dir.endswith(SUFFIX):
        shutil.rmtree(recipe.training.output_dir)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(entry["loss"]) for entry in steps):
        raise RuntimeError(f"The rehearsal's losses are not finite: {[entry['loss'] for entry in steps]}.")
    last = " after the extrapolation" if recipe.loop.extrapolate_after is not None else ""
    return (
        f"Carried out in small, on the embedded model and {trainer.args.world_size} process(es): {len(steps)} steps "
        f"and {steps[-1][BACKWARD_PASSES]:.0f} backward passes{last}. Nothing is kept."
    )


# ---- Carrying it out in small


def _folder(recipe: Recipe) -> Path:
    return Path(f"{recipe.training.output_dir.rstrip('/')}{SUFFIX}")


def in_small(recipe: Recipe) -> list[str]:
    """What the command line adds so that the recipe runs on the embedded model and task, in a few small steps."""
    small = {
        "max_completion_length": 28,
        "max_steps": 3,
        "max_active_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "log_completions": False,
        "report_to": "none",
        "push_to_hub": False,
        "output_dir": _folder(recipe),
        **_small_batch(recipe),
        **_embedded_model(recipe),
        **_embedded_task(recipe),
        **_small_schedule(recipe),
    }
    return [word for name, value in small.items() for word in (f"--{name}", "null" if value is None else str(value))]


def _embedded_model(recipe: Recipe) -> Settings:
    """The embedded model in place of the recipe's, with what it has no use for left out."""
    model = recipe.model
    small = {"model_name_or_path": EMBEDDED_MODEL, "model_revision": "main", "use_vllm": False}
    small |= {name: False for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)}
    if model.attn_implementation is not None:
        small["attn_implementation"] = "sdpa"
    if model.use_peft:
        small |= {"lora_r": 8, "lora_alpha": 16}
    if _targets_are_unknown(recipe):
        small["lora_target_modules"] = "all-linear"
    if recipe.loop.resume_adapter is not None:
        small["resume_adapter"] = ""
    return small


def _embedded_task(recipe: Recipe) -> Settings:
    """The embedded problems in place of the recipe's, with a prompt where those have one."""
    small = {"dataset_name": EMBEDDED_DATASET, "dataset_train_split": "train"}
    if recipe.problems.prompt is None and recipe.problems.system_prompt is None:
        small |= {"problem_column": "", "answer_column": "", "dataset_test_split": "test"}
    else:  # as a set of problems, which is what has prompts
        small |= {"problem_column": "prompt", "answer_column": "solution", "prompt": "{problem}"}
        small["eval_strategy"] = "no"
    if recipe.training.eval_benchmarks:
        small |= {"eval_benchmarks": "arithmetic", "eval_samples": 1}
    if recipe.script.reward_model_name_or_path is not None:
        small |= {"reward_model_name_or_path": "", "reward_funcs": "arithmetic_reward"}
    return small


def _small_schedule(recipe: Recipe) -> Settings:
    """What happens on the way, so early that it happens."""
    args, small = recipe.training, {}
    if args.eval_steps is not None:
        small |= {"eval_steps": 3, "eval_on_start": False}
    if args.trajectory_steps is not None:
        small["trajectory_steps"] = 1
    if recipe.loop.extrapolate_after is not None:
        small |= {"extrapolate_after": 3, "extrapolate_steps_ahead": 1, "max_steps": 4}
    if args.resume_from_checkpoint is not None:
        small["resume_from_checkpoint"] = "last"  # of which there is none
    return small


def _small_batch(recipe: Recipe) -> Settings:
    """Few micro-batches, of four whole groups at least, and as many optimizer steps a generation as there were."""
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
        "steps_per_generation": None,
        "generation_batch_size": rows * steps * generations,
    }


def _targets_are_unknown(recipe: Recipe) -> bool:
    """Whether the adapter's targets are modules that the embedded model does not have."""
    targets = recipe.model.lora_target_modules
    if not recipe.model.use_peft or targets is None or targets == "all-linear" or targets == ["all-linear"]:
        return False
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_MODEL_PATH))
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return not {targets} <= modules if isinstance(targets, str) else not set(targets) <= modules
