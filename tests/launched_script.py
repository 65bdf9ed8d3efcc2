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

from gxpo_trl.engines.deepspeed import DeepSpeedState  # noqa: E402
from gxpo_trl.engines.fsdp2 import FSDP2State  # noqa: E402
from gxpo_trl.scripts.building import build_trainer  # noqa: E402
from gxpo_trl.scripts.parsing import parse_recipe  # noqa: E402
from gxpo_trl.scripts.recipes import recipe_names  # noqa: E402
from gxpo_trl.scripts.running import prepare, train  # noqa: E402
from gxpo_trl.scripts.train import main as train_command  # noqa: E402


def accumulates_in(state) -> torch.dtype:
    """The precision in which gradients are accumulated and reduced."""
    if isinstance(state, DeepSpeedState):
        return state.model.get_data_types()[1]
    if isinstance(state, FSDP2State):
        return state.accelerator.state.fsdp_plugin.mixed_precision_policy.reduce_dtype
    return state.parameters()[0].dtype


def completions_per_step(name: str, arguments: list[str]) -> list[int]:
    """Of a recipe of the package, on this many processes: of an optimizer step, and sampled at a time."""
    machine = [word for key in ("--use_cpu", "--ddp_backend") if key in arguments for word in option(key, arguments)]
    args = parse_recipe(["--config", f"gxpo:{name}", *machine]).training
    rows = args.per_device_train_batch_size * args.world_size
    return [rows * args.gradient_accumulation_steps, args.generation_batch_size]


def option(key: str, arguments: list[str]) -> list[str]:
    place = arguments.index(key)
    return arguments[place : place + 2]


def main() -> None:
    report, *arguments = sys.argv[1:]
    recipe = parse_recipe(arguments)
    if recipe.rehearsal.dry_run or recipe.loop.extrapolate_after is not None:
        return train_command(arguments)
    trainer = prepare(recipe, build_trainer)
    train(trainer, recipe)
    state = trainer.lookahead.engine.state
    result = {
        "engine": type(state).__name__,
        "processes": trainer.accelerator.num_processes,
        "bf16": trainer.args.bf16,
        "parameters": str(state.parameters()[0].dtype),
        "accumulates": str(accumulates_in(state)),
        "clips_at": state.max_grad_norm,
        "passes": trainer.backward_passes,
        "steps": {name: completions_per_step(name, arguments) for name in recipe_names()},
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
    }
    if trainer.accelerator.is_main_process:
        Path(report).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
