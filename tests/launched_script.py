"""The training command, for `accelerate launch` on a machine without an accelerator; says which engine it ran on."""

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401  offline, as the tests are
import cpu_engines


if "LOCAL_RANK" in os.environ:
    cpu_engines.install()

import torch  # noqa: E402

from gxpo_trl.engines import FSDP2Engine, TorchEngine  # noqa: E402
from gxpo_trl.scripts import train  # noqa: E402
from gxpo_trl.scripts.recipes import recipe_names  # noqa: E402


def accumulates_in(engine) -> torch.dtype:
    """The precision in which gradients are accumulated and reduced."""
    if isinstance(engine, FSDP2Engine):
        return engine.accelerator.state.fsdp_plugin.mixed_precision_policy.reduce_dtype
    if isinstance(engine, TorchEngine):
        return engine.parameters()[0].dtype
    return engine.model.get_data_types()[1]


def completions_per_step(name: str, arguments: list[str]) -> list[int]:
    """Of a recipe of the package, on this many processes: of an optimizer step, and sampled at a time."""
    machine = [word for key in ("--use_cpu", "--ddp_backend") if key in arguments for word in option(key, arguments)]
    args = train.parse_recipe(["--config", f"gxpo:{name}", *machine]).training
    rows = args.per_device_train_batch_size * args.world_size
    return [rows * args.gradient_accumulation_steps, args.generation_batch_size]


def option(key: str, arguments: list[str]) -> list[str]:
    place = arguments.index(key)
    return arguments[place : place + 2]


def main() -> None:
    report, *arguments = sys.argv[1:]
    recipe = train.parse_recipe(arguments)
    if recipe.rehearsal.dry_run or recipe.loop.extrapolate_after is not None:
        return train.main(arguments)
    trainer = train.build_trainer(recipe)
    train.train(trainer, recipe)
    engine = trainer._engine
    result = {
        "engine": type(engine).__name__,
        "processes": trainer.accelerator.num_processes,
        "bf16": trainer.args.bf16,
        "parameters": str(engine.parameters()[0].dtype),
        "accumulates": str(accumulates_in(engine)),
        "clips_at": engine.max_grad_norm,
        "passes": trainer._backward_passes,
        "steps": {name: completions_per_step(name, arguments) for name in recipe_names()},
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
    }
    if trainer.accelerator.is_main_process:
        Path(report).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
