"""From a recipe and a command line to one object, and to one file that says the same."""

import dataclasses
from enum import Enum
from typing import Any

import torch
import yaml
from transformers.hf_argparser import string_to_bool

import gxpo_trl

from ..trainer.config import LookaheadConfig
from ..trainer.rules import RULES
from ..trainer.trainer import LookaheadTrainer
from .arguments import PARTS, Recipe
from .keys import find_config, parse_keys, read_config, read_early


NOT_OF_A_RUN = ("dry_run", "resume_from_checkpoint", "hub_token", "push_to_hub_token", "env")
"""Keys of one call, or nobody's business."""


def parse_recipe(arguments: list[str], prog: str | None = None) -> Recipe:
    """Reads a command line such as `["--config", "recipes/tiny/gxpo.yaml", "--learning_rate", "1e-4"]`.

    What a recipe leaves out has the defaults of its `update_rule`. A rehearsal (`dry_run`) is one on the CPU where
    there is nothing else: a plan can be made anywhere.

    Raises:
        ValueError: If a key of the file or of the command line is unknown; it names the nearest. If a setting is out
            of its bounds.
    """
    said = read_early(arguments, update_rule=str, dry_run=string_to_bool)
    if said.get("dry_run") and not torch.accelerator.is_available():
        if not any(word.startswith(("--use_cpu", "--use-cpu")) for word in arguments):
            arguments = [*arguments, "--use_cpu", "true"]
    rule = said.get("update_rule", LookaheadConfig.update_rule)
    config_class = trainer_class(rule)._config_class if rule in RULES else LookaheadConfig  # which refuses it
    recipe = Recipe(*parse_keys(arguments, tuple((PARTS | {"training": config_class}).values()), prog))
    return dataclasses.replace(recipe, text=_as_one_file(arguments, recipe))


def trainer_class(update_rule: str) -> type[LookaheadTrainer]:
    """The public class that runs an update rule."""
    return getattr(gxpo_trl, RULES[update_rule].trainer)


def _as_one_file(arguments: list[str], recipe: Recipe) -> str:
    """What the command line says: its recipe, with the keys that it overrides."""
    said, settings = read_config(arguments), recipe.settings()
    for word in find_config(arguments):
        key = word.removeprefix("--").split("=")[0].replace("-", "_")
        key = key if key in settings else key.removeprefix("no_")
        if word.startswith("--") and key in settings:
            said[key] = _as_yaml(settings[key])
    if said.get("report_to") == []:
        said["report_to"] = "none"
    for name in NOT_OF_A_RUN:
        said.pop(name, None)
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def _as_yaml(value: Any) -> Any:
    """What a file would say of a setting that was made into an object."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_as_yaml(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
