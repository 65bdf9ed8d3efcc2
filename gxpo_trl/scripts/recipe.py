"""Recipes: YAML files whose keys are dataclass fields, each of which the command line can override."""

from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from ..tasks.names import nearest
from ..trainer.gxpo import GXPOConfig
from ..trainer.lookahead_config import LookaheadConfig
from ..trainer.sfpo import SFPOConfig


Recipe = tuple[GRPOScriptArguments, LookaheadConfig, ModelConfig, DatasetMixtureConfig]

CONFIGS = {"gxpo": GXPOConfig, "sfpo": SFPOConfig, "grpo": LookaheadConfig}


def parse_recipe(arguments: list[str], prog: str | None = None) -> Recipe:
    """Reads a command line such as `["--config", "recipes/tiny/gxpo.yaml", "--learning_rate", "1e-4"]`.

    What a recipe leaves out has the defaults of its `update_rule`.

    Raises:
        ValueError: If a key of the file or of the command line is unknown; it names the nearest. If a setting is out
            of its bounds.
    """
    recipe = _parse(arguments, LookaheadConfig, prog)
    config_class = CONFIGS[recipe[1].update_rule]
    return recipe if config_class is LookaheadConfig else _parse(arguments, config_class, prog)


def _parse(arguments: list[str], config_class: type[LookaheadConfig], prog: str | None) -> Recipe:
    # Keys are whole: an abbreviation is an unknown key, not a guess.
    parser = TrlParser(
        (GRPOScriptArguments, config_class, ModelConfig, DatasetMixtureConfig), prog=prog, allow_abbrev=False
    )
    *dataclasses, from_file, from_command_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [action.dest for action in parser._actions]
    for source, strings in (("the recipe", from_file[::2]), ("the command line", from_command_line)):
        for key in (string.lstrip("-").split("=")[0] for string in strings):
            raise ValueError(f"Unknown key `{key}` in {source}{nearest(key, known)}")
    return tuple(dataclasses)
