"""Parses a recipe and a command line into one object, and into one equivalent file."""

import dataclasses
import re
from enum import Enum
from typing import Any

import torch
import yaml
from trl.scripts.grpo import GRPOScriptArguments

import gxpo_trl

from ..tasks.names import reward_file
from ..trainer.config import LookaheadConfig
from ..trainer.rules import RULES
from ..trainer.trainer import LookaheadTrainer
from .arguments import PARTS, Recipe
from .keys import Origin, find_origin, parse_keys, peek


NOT_OF_A_RUN = ("dry_run", "resume_from_checkpoint", "hub_token", "push_to_hub_token", "env")
"""Keys of a single call, or private ones."""


def parse_recipe(arguments: list[str], prog: str | None = None) -> Recipe:
    """Reads a command line such as `["--config", "recipes/tiny/gxpo.yaml", "--learning_rate", "1e-4"]`.

    Keys that a recipe leaves out have the defaults of its `update_rule`. A rehearsal (`dry_run`) runs on the CPU if
    there is no accelerator.

    Raises:
        ValueError: If a key of the file or of the command line is unknown (the message has the nearest one), or a
            setting has another type or is out of its bounds. The message has the line.
    """
    if not arguments:
        raise ValueError("Name a recipe: `--config gxpo:tiny/gxpo.yaml`. `gxpo recipes` lists those of the package.")
    classes = PARTS | {"training": LookaheadConfig}
    said, (origin, _) = peek(arguments, tuple(classes.values())), find_origin(arguments)
    if said["dry_run"] and "use_cpu" not in origin.given and not torch.accelerator.is_available():
        arguments = [*arguments, "--use_cpu", "true"]
        origin, _ = find_origin(arguments)
    if said["update_rule"] in RULES:  # the class refuses any other rule
        classes["training"] = trainer_class(said["update_rule"])._config_class
    recipe = Recipe(*parse_keys(arguments, tuple(classes.values()), prog), origin=origin)
    _check_switches(recipe, origin)
    recipe = dataclasses.replace(recipe, script=_find_rewards(recipe.script, origin))
    return dataclasses.replace(recipe, text=_as_one_file(recipe))


SWITCHES = {
    "use_peft": ("model", "true", r"lora_\w+|use_rslora|use_dora"),
    "use_vllm": ("training", "true", r"vllm_\w+"),
    "eval_benchmarks": ("benchmarks", "[MATH-500]", r"eval_(samples|prompt|system_prompt|threshold)"),
    "extrapolate_after": ("loop", "100", r"extrapolate_\w+"),
}
"""What turns other settings on: the part of a recipe, a value, and a pattern of the names of those settings."""


def _check_switches(recipe: Recipe, origin: Origin) -> None:
    """Refuses settings of something that is off, if the recipe does not say that it is.

    Raises:
        ValueError: Names the setting and its switch.
    """
    said = origin.file.said.keys() | origin.given.keys()
    for switch, (part, value, names) in SWITCHES.items():
        if getattr(getattr(recipe, part), switch) or switch in said:
            continue
        for name in sorted(said):
            if re.fullmatch(names, name):
                sentence = f"`{name}` does nothing without `{switch}`. Set `{switch}: {value}`, or leave it out."
                raise ValueError(origin.explain(ValueError(sentence)))


def trainer_class(update_rule: str) -> type[LookaheadTrainer]:
    """The public class that runs an update rule."""
    return getattr(gxpo_trl, RULES[update_rule].trainer)


def _find_rewards(script: GRPOScriptArguments, origin: Origin) -> GRPOScriptArguments:
    """Finds files of reward functions next to the recipe, whatever the working directory is."""
    if origin.file.path is None or "reward_funcs" in origin.given or not script.reward_funcs:
        return script
    nearby = [(name, origin.file.path.parent / name) for name in script.reward_funcs]
    names = [str(path) if (file := reward_file(str(path))) and file.is_file() else name for name, path in nearby]
    return dataclasses.replace(script, reward_funcs=names)


def _as_one_file(recipe: Recipe) -> str:
    """The recipe of the command line, with the keys that it overrides."""
    said, settings = dict(recipe.origin.file.said), recipe.settings()
    for key in settings:
        if key in recipe.origin.given or key in said and key == "reward_funcs":
            said[key] = _as_yaml(settings[key])
    if said.get("report_to") == []:
        said["report_to"] = "none"
    for name in NOT_OF_A_RUN:
        said.pop(name, None)
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def _as_yaml(value: Any) -> Any:
    """The text in a file for a setting that was parsed into an object."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_as_yaml(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
