"""What lookahead updates refuse, and what to do instead: the only room that does."""

import os
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments


REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_HPU,
)

DEEPSPEED_SETTINGS = {
    "fp16.enabled": (False,),
    "bf16.bf16_master_weights_and_grads": (False,),
    "zero_optimization.stage": (1, 2, 3),
    "zero_optimization.offload_optimizer.device": ("none", "cpu"),
    "zero_optimization.offload_optimizer.ratio": (1.0,),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.offload_param.device": ("none", "cpu"),
    "zero_optimization.zenflow": (),
    "zero_optimization.mics_shard_size": (-1, 0),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_weights": (False,),
    "zero_optimization.zero_quantized_gradients": (False,),
    "tensor_parallel.autotp_size": (0, 1),
    "sequence_parallel_size": (1,),
    "managed_gradient_accumulation": (True,),
    "optimizer.type": ("Adam", "AdamW", "Lion", "SGD"),
}
"""Settings that move where parameters and gradients are, or how they are stepped, with the values that are known here.

A missing setting is always fine, except the stage.
"""

OWN_STEP_OPTIMIZERS = {
    "lomo": "it steps during the backward pass and leaves no gradient to extrapolate",
    "layerwise": "it steps layer by layer during the backward pass and leaves no gradient to extrapolate",
    "schedule_free": "its state holds a second copy of the parameters that a reposition would leave behind",
}
"""By what their `optim` name contains."""

INSTEAD = "or set `update_rule: grpo`"


def check_arguments(args: TrainingArguments) -> None:
    """Refuses precisions and optimizers, before a model is loaded.

    Raises:
        ValueError: Names the setting and what to do instead.
    """
    if args.fp16:
        _refuse_fp16()
    optimizer = str(args.optim.value)
    for name, reason in OWN_STEP_OPTIMIZERS.items():
        if name in optimizer:
            raise ValueError(
                f"Lookahead updates don't support `optim: {optimizer}`: {reason}. Use `optim: adamw_torch`."
            )


def _refuse_fp16() -> NoReturn:
    raise ValueError(
        "Lookahead updates don't support `fp16: true`: its loss scaler skips steps on its own. Use `bf16: true` (or "
        "neither, for fp32)."
    )


def check_trainable(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Refuses a model of which nothing is trained, whatever the update rule; `optimizer` is one of the user's own.

    Raises:
        ValueError: Says what to do instead.
    """
    trainable = {p for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "No parameter of the model requires a gradient, so that nothing would be trained. Load an adapter with "
            "`PeftModel.from_pretrained(…, is_trainable=True)` (in a recipe: with `resume_adapter`), or unfreeze the "
            "parameters before the trainer is made."
        )
    if optimizer is not None and trainable.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
        raise nothing_to_step()


def nothing_to_step() -> ValueError:
    """Of an optimizer that would step nothing."""
    return ValueError(
        "The optimizer holds no parameter of the model that requires a gradient, so that nothing would be trained. "
        "Make it from the parameters of the model that the trainer gets, with its adapter, or leave `optimizers` out."
    )


def check_rates(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer whose steps can't be made longer and shorter by its learning rates.

    Raises:
        ValueError: Says what to do instead.
    """
    name = type(optimizer).__name__
    instead = "set `step_control: none` (with `update_rule: check`, which always has one: `update_rule: grpo`)"
    if isinstance(optimizer, (torch.optim.Rprop, torch.optim.ASGD)):
        raise ValueError(
            f"`step_control` multiplies learning rates, and {name} steps by lengths of its own, which it makes from "
            f"those of earlier steps. Use another optimizer, or {instead}."
        )
    if any(group.get("relative_step") or group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"`step_control` multiplies learning rates, and {name} makes its own. Give it an `lr` and "
            f"`relative_step=False`, or {instead}."
        )
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"`step_control` follows the steps of an optimizer by torch's hooks, and {name} has none. Have it call "
            f"`torch.optim.Optimizer.__init__`, or {instead}."
        )


def check_engine(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Refuses an engine whose storage is not known here; `model` may be wrapped or not.

    Raises:
        ValueError: Names the engine and what to use instead.
    """
    if accelerator.scaler is not None or accelerator.mixed_precision == "fp16":
        _refuse_fp16()
    parallelism = accelerator.parallelism_config
    for size in ("tp_size", "cp_size", "sp_size"):
        if parallelism is not None and getattr(parallelism, size) > 1:
            raise ValueError(
                "Lookahead updates don't support tensor, context or sequence parallelism. Set "
                f"`{size}` to 1 and use FSDP2 or DeepSpeed ZeRO-3 for a model that is too large for one device, "
                f"{INSTEAD}."
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
    elif accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "Lookahead updates don't support FSDP1, whose flat parameters hide what the optimizer steps. Set "
                f"`fsdp_version: 2` (recipes/accelerate/fsdp2.yaml), {INSTEAD}."
            )
    elif any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            "Lookahead updates don't support a model that transformers has sharded while loading it. Leave out "
            f"`tp_plan` and `distributed_config`, and use FSDP2 or DeepSpeed ZeRO-3, {INSTEAD}."
        )
    elif accelerator.distributed_type not in REPLICATED:
        raise ValueError(
            f"Lookahead updates don't support the engine {accelerator.distributed_type.value}. Use a single process, "
            f"DDP, FSDP2 or DeepSpeed ZeRO-1, 2 or 3 (recipes/accelerate), {INSTEAD}."
        )


def launcher_surprises(accelerator: Accelerator, precision: str) -> Iterator[str]:
    """Sentences on what the launcher was told and the run doesn't do, or the other way round.

    Args:
        accelerator (`Accelerator`): Of the run.
        precision (`str`): `bf16`, `fp16` or `no`, as the run's own settings have it.
    """
    if accelerator.mixed_precision in ("no", "bf16", "fp16") and accelerator.mixed_precision != precision:
        yield (
            f"The launcher has `mixed_precision: {accelerator.mixed_precision}`, which the run computes in, and its "
            f"own settings say {precision}. Give `accelerate launch` the option `--mixed_precision no`, so that "
            "they decide."
        )
    kind = accelerator.distributed_type
    for engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if os.environ.get(f"ACCELERATE_USE_{engine.value}", "").lower() == "true" and kind != engine:
            yield (
                f"The launcher was told to use {engine.value}, and the run has {kind.value}: accelerate has no "
                f"{engine.value} with `use_cpu: true`. On a CPU set `use_cpu: false` and `ddp_backend: gloo`."
            )


def unknown_deepspeed_optimizer(name: str) -> ValueError:
    """Of a class of DeepSpeed's whose storage is not known here."""
    return ValueError(
        f"Lookahead updates don't know DeepSpeed's {name}. Use plain ZeRO-1, 2 or 3 (recipes/accelerate), {INSTEAD}."
    )


def _check_deepspeed(config: dict[str, Any]) -> None:
    for path, known in DEEPSPEED_SETTINGS.items():
        value = _look_up(config, path)
        if value is None and path == "zero_optimization.stage":
            value = 0
        if value not in (None, "auto", *known):  # "auto" is accelerate's to fill in, from settings checked above
            remedy = f"Set it to {' or '.join(map(str, known))}" if known else "Remove it"
            raise ValueError(
                f"Lookahead updates don't support DeepSpeed with `{path}: {value}`. {remedy} "
                f"(recipes/accelerate holds configurations that work), {INSTEAD}."
            )


def _look_up(config: dict[str, Any], path: str) -> Any:
    value = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def keeps_fp32_parameters(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether the engine will step fp32 parameters whatever precision the model was loaded in."""
    if accelerator.distributed_type == DistributedType.FSDP:  # accelerate's own condition
        quantized = any(type(p).__name__ == "Params4bit" for p in model.parameters())
        return accelerator.mixed_precision != "no" and not quantized
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_parameter_precision(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Refuses trainable parameters in bf16 or fp16 that the engine would step as they are.

    Raises:
        ValueError: Names the dtypes and what to do instead.
    """
    if keeps_fp32_parameters(accelerator, model):
        return
    low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if low:
        raise ValueError(
            f"Trainable parameters are stored in {', '.join(sorted(map(str, low)))}: a step of a small learning "
            "rate vanishes in its rounding, and with it what later passes measure. Load the model in fp32 (`dtype: "
            "float32`; `bf16: true` still computes in bf16), or set `allow_low_precision_parameters: true`."
        )
