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

import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.hf_argparser import string_to_bool
from trl import get_peft_config

from ..tasks.datasets import EMBEDDED_DATASET
from ..tasks.names import EMBEDDED_MODEL, resolve_model
from ..tasks.tiny_model import TINY_MODEL_PATH
from .recipe import Recipe, find_config, parse_recipe


SUFFIX = "-dry-run"
"""Of the folder of a rehearsal, beside that of the run."""
DEVICES = (1, 2, 4, 8)


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


def conclude(recipe: Recipe, trainer) -> str:
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
        f"and {steps[-1]['lookahead/backward_passes']:.0f} backward passes{last}. Nothing is kept."
    )


# ---- What it would take


def describe_plan(recipe: Recipe) -> str:
    """The batch, the passes, the tokens and the memory of the run that the recipe describes."""
    args, loop = recipe.training, recipe.loop
    completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = args.max_steps
    lines = [
        f"An optimizer step  {completions // args.num_generations} prompts × {args.num_generations} completions = "
        f"{completions:,} completions, sampled up to {args.max_completion_length:,} tokens each",
        f"                   {_describe_accumulation(recipe, completions)}",
        f"Passes             {_describe_passes(recipe)}",
    ]
    if steps > 0:
        sampled = completions * steps // args.num_iterations
        lines.append(
            f"The whole run      {steps:,} steps, {sampled:,} completions, at most "
            f"{sampled * args.max_completion_length / 1e6:,.1f} million tokens sampled"
        )
    if loop.extrapolate_after is not None:
        lines.append(
            f"                   extrapolated after step {loop.extrapolate_after:,}, from "
            f"{loop.extrapolate_after // args.trajectory_steps} checkpoints"
        )
    return "\n".join([*lines, *_describe_memory(recipe), ""])


def _describe_accumulation(recipe: Recipe, completions: int) -> str:
    args = recipe.training
    rows = args.per_device_train_batch_size
    if args.prompts_per_step is None:
        return f"{args.world_size} process(es) × {args.gradient_accumulation_steps} accumulation steps × {rows}"
    counts = {n: completions / (rows * n) for n in DEVICES}
    fitting = [f"{count:.0f} on {n}" for n, count in counts.items() if count.is_integer()]
    return f"micro-batches of {rows}: {', '.join(fitting)} devices"


def _describe_passes(recipe: Recipe) -> str:
    args, steps = recipe.training, recipe.training.max_steps
    if args.update_rule == "grpo":
        return f"1 a step: {steps:,} backward passes in all" if steps > 0 else "1 a step"
    passes = args.lookahead_rule().passes
    text = f"{passes} a step while the gate is open, then 1"
    if steps <= 0:
        return text
    longest = min(steps, args.max_active_steps or steps)
    shortest = min(longest, args.gate_warmup_steps + args.gate_patience + args.alpha_decay_steps)
    if args.gate_signal == "never":
        shortest = longest
    least, most = (active * passes + steps - active for active in (shortest, longest))
    between = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    return f"{text}: {between} backward passes in all; GRPO has {steps:,}"


def _describe_memory(recipe: Recipe) -> list[str]:
    args, name = recipe.training, recipe.model.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            resolve_model(name), revision=recipe.model.model_revision, trust_remote_code=args.trust_remote_code
        )
    except OSError:
        return [f"Memory             not known: the configuration of {name} can't be read here"]
    frozen, trained, vocabulary = count_parameters(recipe, config)
    sizes = {
        "frozen weights": frozen * (2 if recipe.model.dtype in ("bfloat16", "float16") else 4),
        "trained weights": trained * 4,
        "gradients": trained * 4,
        "Adam's moments": trained * 8,
        "copies of an active step": trained * _bytes_of_copies(recipe),
        "reference model": trained * 4 if args.beta and not recipe.model.use_peft else 0,
    }
    total = sum(sizes.values())
    shares = ", ".join(f"{format_bytes(total / n)} on {n}" for n in DEVICES[1:])
    logits = args.per_device_train_batch_size * args.max_completion_length * vocabulary * 4
    return [
        f"The model          {(frozen + trained) / 1e6:,.1f} million parameters, {trained / 1e6:,.1f} million trained",
        f"Memory             {', '.join(f'{part} {format_bytes(size)}' for part, size in sizes.items() if size)}",
        f"                   {format_bytes(total)} in all; where an engine shards all of it, {shares} devices each",
        f"                   logits of a micro-batch of the longest completions, in fp32: {format_bytes(logits)}",
        f"                   {_describe_sampling_memory(recipe, config)}",
        "                   not counted: activations, prompts, what libraries hold",
    ]


def format_bytes(size: float) -> str:
    """Such as `1.5 GiB` or `20.0 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def count_parameters(recipe: Recipe, config: PreTrainedConfig) -> tuple[int, int, int]:
    """Frozen parameters, trained parameters and the vocabulary's size, of a model that is never allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.training.trust_remote_code)
        if (peft_config := get_peft_config(recipe.model)) is not None:
            model = get_peft_model(model, peft_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    return everything - trained, trained, config.get_text_config().vocab_size


def _bytes_of_copies(recipe: Recipe) -> int:
    """What an active step keeps of each trained parameter (README, "What it holds in memory")."""
    args = recipe.training
    if args.update_rule == "grpo" or args.snapshot_device == "cpu":
        return 0
    gradient = 2 if args.snapshot_dtype == "bfloat16" else 4
    return 4 + gradient + (8 if args.probe_optimizer_state == "rollback" else 0)


def _describe_sampling_memory(recipe: Recipe, config: PreTrainedConfig) -> str:
    args, text = recipe.training, config.get_text_config()
    if args.use_vllm:
        if args.vllm_mode == "server":
            return "sampling: vLLM's server"
        return f"sampling: vLLM takes {args.vllm_gpu_memory_utilization:.0%} of each GPU"
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    a_token = 2 * text.num_hidden_layers * heads * size * (2 if args.bf16 else 4)
    rows = args.per_device_train_batch_size * args.steps_per_generation
    tokens = min(rows * args.max_completion_length, args.generation_token_budget or math.inf)
    return f"sampling: the KV cache of {rows:,} completions on a device, up to {format_bytes(tokens * a_token)}"


# ---- Carrying it out in small


def _folder(recipe: Recipe) -> Path:
    return Path(f"{recipe.training.output_dir.rstrip('/')}{SUFFIX}")


def in_small(recipe: Recipe) -> list[str]:
    """What the command line adds so that the recipe runs on the embedded model and task, in a few small steps."""
    args, loop = recipe.training, recipe.loop
    small = {
        "model_name_or_path": EMBEDDED_MODEL,
        "model_revision": "main",
        "max_completion_length": 28,
        "use_vllm": False,
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
    }
    small |= {"dataset_name": EMBEDDED_DATASET, "dataset_train_split": "train"}
    if recipe.problems.prompt is None and recipe.problems.system_prompt is None:
        small |= {"problem_column": "", "answer_column": "", "dataset_test_split": "test"}
    else:  # as a set of problems, which is what has prompts
        small |= {
            "problem_column": "prompt",
            "answer_column": "solution",
            "prompt": "{problem}",
            "eval_strategy": "no",
        }
    if args.eval_benchmarks:
        small |= {"eval_benchmarks": "arithmetic", "eval_samples": 1}
    if args.eval_steps is not None:
        small |= {"eval_steps": 3, "eval_on_start": False}
    if args.trajectory_steps is not None:
        small["trajectory_steps"] = 1
    if loop.extrapolate_after is not None:
        small |= {"extrapolate_after": 3, "extrapolate_steps_ahead": 1, "max_steps": 4}
    if loop.resume_adapter is not None:
        small["resume_adapter"] = ""
    if args.resume_from_checkpoint is not None:
        small["resume_from_checkpoint"] = "last"  # of which there is none
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe.model, name):
            small[name] = False
    if recipe.script.reward_model_name_or_path is not None:
        small |= {"reward_model_name_or_path": "", "reward_funcs": "arithmetic_reward"}
    if recipe.model.attn_implementation is not None:
        small["attn_implementation"] = "sdpa"
    if recipe.model.use_peft:
        small |= {"lora_r": 8, "lora_alpha": 16}
    if _targets_are_unknown(recipe):
        small["lora_target_modules"] = "all-linear"
    return [word for name, value in small.items() for word in (f"--{name}", "null" if value is None else str(value))]


def _small_batch(recipe: Recipe) -> dict[str, int | None]:
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
