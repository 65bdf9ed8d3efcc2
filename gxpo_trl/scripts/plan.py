"""What a recipe needs: batch, passes, tokens and memory, from the recipe and the model's configuration."""

import math

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from trl import get_peft_config

from ..tasks.names import resolve_model
from .arguments import Recipe


DEVICES = (1, 2, 4, 8)


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
            f"{loop.extrapolate_after // recipe.trajectory.trajectory_steps} checkpoints"
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
    if args.update_rule == "check":
        passes = 1 + 2 / args.gradient_accumulation_steps / args.steps_of_batch
        text = f"1 a step and 2 of {args.gradient_accumulation_steps} micro-batches"
        text += f" in every {args.steps_of_batch} steps" if args.steps_of_batch > 1 else ""
        return f"{text}: {steps * passes:,.0f} backward passes in all; GRPO has {steps:,}" if steps > 0 else text
    passes = args.lookahead_rule().passes
    text = f"{passes} a step while the gate is open, then 1"
    if steps <= 0:
        return text
    longest = min(steps, args.max_active_steps or steps)
    shortest = min(longest, max(args.gate_warmup_steps, 2) + args.gate_patience + args.alpha_decay_steps)
    if args.gate_signal == "never":
        shortest = longest
    least, most = (active * passes + steps - active for active in (shortest, longest))
    between = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    if every := args.lookahead_diagnostics_steps:
        text += f" (and {args.lookahead_steps} in every {every}th active step for diagnostics, which are not counted)"
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
    has_copies = args.update_rule != "grpo" and args.snapshot_device == "model"
    takes_back = args.step_control != "none" and args.step_control_gain > 0 and args.update_rule != "check"
    keeps_moments = has_copies and takes_back
    sizes = {
        "frozen weights": frozen * _bytes_of_weight(recipe, config),
        "trained weights": trained * 4,
        "gradients": trained * 4,
        "Adam's moments": trained * 8,
        "copies of an active step": trained * 8 * (has_copies + keeps_moments),  # θ0, g0; Adam's state at θ0
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
    """Frozen parameters, trained parameters and the vocabulary's size, computed without allocating the model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.training.trust_remote_code)
        if (peft_config := get_peft_config(recipe.model)) is not None:
            model = get_peft_model(model, peft_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    return everything - trained, trained, config.get_text_config().vocab_size


def _bytes_of_weight(recipe: Recipe, config: PreTrainedConfig) -> float:
    """Bytes of a frozen weight; if quantized, without the constants of its blocks."""
    if recipe.model.load_in_4bit:
        return 0.5
    if recipe.model.load_in_8bit:
        return 1
    dtype = config.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype or "float32")
    return (dtype or torch.float32).itemsize


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
    tokens = min(rows * args.max_completion_length, recipe.sampling.generation_token_budget or math.inf)
    return f"sampling: the KV cache of {rows:,} completions on a device, up to {format_bytes(tokens * a_token)}"
