"""Recipes: YAML files whose keys are dataclass fields, each of which the command line can override."""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from ..spelling import nearest
from ..trainer.config import LookaheadConfig
from ..trainer.grouped import GroupedSamplingArguments
from ..trainer.gxpo import GXPOConfig
from ..trainer.sfpo import SFPOConfig
from .recipes import recipe_path


@dataclass
class ProblemArguments:
    r"""
    How problems become prompts, where `dataset_name` is a problem set (`gxpo_trl/tasks/datasets.py`) or a file.

    Parameters:
        prompt (`str`, *optional*):
            Template of the user's message, with `{problem}` in it. Unset for the problem alone.
        system_prompt (`str`, *optional*):
            System message. Unset for none.
        problem_column, answer_column (`str`, *optional*):
            Columns of a file or of a Hub dataset that has no name here.
    """

    prompt: str | None = field(default=None, metadata={"help": "Template of the user's message, with {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message. Unset for none."})
    problem_column: str | None = field(default=None, metadata={"help": "Of a dataset that has no name here."})
    answer_column: str | None = field(default=None, metadata={"help": "Of a dataset that has no name here."})


@dataclass
class ExtrapolationLoopArguments:
    r"""
    NExt in one recipe: train, extrapolate, go on. What an adapter is extrapolated from is `trajectory_steps`' doing.

    Parameters:
        resume_adapter (`str`, *optional*):
            A LoRA adapter to start from, such as one of `gxpo extrapolate`. Its own rank and α hold, whatever the
            recipe says of LoRA.
        extrapolate_after (`int`, *optional*):
            Optimizer steps after which the run is extrapolated and goes on from there, up to `max_steps`, which counts
            the steps that are trained. Unset for a run without.
        extrapolate_method (`str`, *optional*, defaults to `"next"`):
            As `method` of `gxpo extrapolate`.
        extrapolate_steps_ahead (`int`, *optional*):
            As `steps_ahead` of `gxpo extrapolate`. Unset for five checkpoints.
        extrapolate_alpha (`float`, *optional*, defaults to `1.0`):
            As `alpha` of `gxpo extrapolate`.
    """

    resume_adapter: str | None = field(default=None, metadata={"help": "A LoRA adapter to start from."})
    extrapolate_after: int | None = field(
        default=None, metadata={"help": "Steps after which the run is extrapolated and goes on from there."}
    )
    extrapolate_method: str = field(default="next", metadata={"help": "As `method` of `gxpo extrapolate`."})
    extrapolate_steps_ahead: int | None = field(
        default=None, metadata={"help": "As `steps_ahead` of `gxpo extrapolate`."}
    )
    extrapolate_alpha: float = field(default=1.0, metadata={"help": "As `alpha` of `gxpo extrapolate`."})


@dataclass
class RehearsalArguments:
    r"""
    Parameters:
        dry_run (`bool`, *optional*, defaults to `False`):
            Says what the recipe would take, in tokens, memory and backward passes, then carries it out in small: a few
            steps of the embedded model on the embedded task.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Say what the recipe would take, then carry it out in small, on the embedded model."},
    )


class Recipe(NamedTuple):
    """What a recipe says, by the dataclasses that its keys are fields of."""

    script: GRPOScriptArguments
    training: LookaheadConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    problems: ProblemArguments
    sampling: GroupedSamplingArguments
    loop: ExtrapolationLoopArguments
    rehearsal: RehearsalArguments


CONFIGS = {"gxpo": GXPOConfig, "sfpo": SFPOConfig, "grpo": LookaheadConfig}


def parse_recipe(arguments: list[str], prog: str | None = None) -> Recipe:
    """Reads a command line such as `["--config", "recipes/tiny/gxpo.yaml", "--learning_rate", "1e-4"]`.

    What a recipe leaves out has the defaults of its `update_rule`.

    Raises:
        ValueError: If a key of the file or of the command line is unknown; it names the nearest. If a setting is out
            of its bounds.
    """
    recipe = _parse_training(arguments, LookaheadConfig, prog)
    config_class = CONFIGS[recipe.training.update_rule]
    return recipe if config_class is LookaheadConfig else _parse_training(arguments, config_class, prog)


def _parse_training(arguments: list[str], config_class: type[LookaheadConfig], prog: str | None) -> Recipe:
    others = (ModelConfig, DatasetMixtureConfig, ProblemArguments, GroupedSamplingArguments)
    others += (ExtrapolationLoopArguments, RehearsalArguments)
    return Recipe(*parse_keys(arguments, (GRPOScriptArguments, config_class, *others), prog))


def find_config(arguments: list[str]) -> list[str]:
    """The command line with `--config=X` and `--config gxpo:X` as TRL's parser takes them: `--config FILE`.

    Raises:
        ValueError: If `--config` is the last word, or the package has no such recipe.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words:
        place = words.index("--config") + 1
        if place == len(words):
            raise ValueError("`--config` wants a recipe: a file, or one of `gxpo recipes`.")
        words[place] = str(recipe_path(words[place]))
    return words


NOT_OF_A_RUN = ("dry_run", "resume_from_checkpoint", "hub_token", "push_to_hub_token", "env")
"""Keys of one call, or nobody's business."""


def _as_yaml(value: Any) -> Any:
    """What a file would say of a setting that was made into an object."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_as_yaml(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def as_recipe(arguments: list[str], recipe: Recipe) -> str:
    """One file that says what the command line says: its recipe, with the keys that it overrides."""
    words = find_config(arguments)
    settings: dict[str, Any] = {}
    if "--config" in words:
        settings = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8")) or {}
    parsed = {f.name: getattr(part, f.name) for part in recipe for f in dataclasses.fields(part)}
    for word in words:
        key = word.removeprefix("--").split("=")[0].replace("-", "_")
        key = key if key in parsed else key.removeprefix("no_")
        if word.startswith("--") and key in parsed:
            settings[key] = _as_yaml(parsed[key])
    if settings.get("report_to") == []:
        settings["report_to"] = "none"
    for name in NOT_OF_A_RUN:
        settings.pop(name, None)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def parse_keys(arguments: list[str], classes: tuple[type, ...], prog: str | None = None) -> tuple:
    """Reads a recipe, `--config FILE`, and the keys that the command line gives, into dataclasses.

    Args:
        arguments (`list[str]`): The command line. FILE may be a recipe of the package, such as `gxpo:tiny/gxpo.yaml`.
        classes (`tuple[type, ...]`): Dataclasses whose fields are the keys.
        prog (`str`, *optional*): The command's name in its help.

    Raises:
        ValueError: If a key is unknown, or a setting is out of its bounds.
    """
    # Keys are whole: an abbreviation is an unknown key, not a guess.
    parser = TrlParser(classes, prog=prog, allow_abbrev=False)
    *parsed, from_file, from_command_line = parser.parse_args_and_config(
        find_config(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [action.dest for action in parser._actions]
    for source, strings in (("the recipe", from_file[::2]), ("the command line", from_command_line)):
        for key in (string.lstrip("-").split("=")[0] for string in strings):
            raise ValueError(f"Unknown key `{key}` in {source}{nearest(key, known)}")
    return tuple(parsed)
