"""Keys: what a YAML file and a command line say, by the fields of dataclasses. Unknown ones are errors."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..spelling import nearest
from .recipes import recipe_path


GONE = {
    "retention": "r is g1 / g0, as in the paper (docs/results.md has what the other came to). Leave it out.",
    "active_threshold_relative": "δ is `active_threshold`, an absolute number. Leave it out.",
    "scale_min": "the scale is never below 1, that of the two probes. Leave it out.",
    "probe_optimizer_state": "the probes advance the optimizer's state, as in the papers (docs/results.md has what "
    "the other came to). Leave it out.",
    "gate_robust": "the z-score is that of mean and standard deviation. Raise `gate_patience` against single spikes.",
    "gate_fallback": "the active phase ends for good, as in the papers. Leave it out.",
    "gate_cooldown_steps": "the active phase ends for good, as in the papers. Leave it out.",
    "snapshot_dtype": "copies are as precise as what they are of. Set `snapshot_device: cpu` where memory is short.",
    "prune_zero_advantage": "it follows `compact_batches`. Leave it out, or set `compact_batches: false`.",
    "old_logps_from_sampling": "it is done wherever the numbers are the same. Leave it out.",
}
"""Settings of earlier versions, and what to do."""


def parse_keys(arguments: list[str], classes: tuple[type, ...], prog: str | None = None) -> tuple:
    """Reads a recipe, `--config FILE`, and the keys that the command line gives, into dataclasses.

    Args:
        arguments (`list[str]`): The command line. FILE may be a recipe of the package, such as `gxpo:tiny/gxpo.yaml`.
        classes (`tuple[type, ...]`): Dataclasses whose fields are the keys.
        prog (`str`, *optional*): The command's name in its help.

    Raises:
        ValueError: If a key is unknown or gone, or a setting is out of its bounds.
    """
    # Keys are whole: an abbreviation is an unknown key, not a guess.
    parser = TrlParser(classes, prog=prog, allow_abbrev=False)
    *parsed, from_file, from_command_line = parser.parse_args_and_config(
        find_config(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [action.dest for action in parser._actions]
    for source, strings in (("the recipe", from_file[::2]), ("the command line", from_command_line)):
        for key in (string.lstrip("-").split("=")[0] for string in strings):
            if remedy := GONE.get(key.replace("-", "_").removeprefix("no_")):
                raise ValueError(f"`{key}` in {source} is gone: {remedy}")
            raise ValueError(f"Unknown key `{key}` in {source}{nearest(key, known)}")
    return tuple(parsed)


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


def read_config(arguments: list[str]) -> dict[str, Any]:
    """What the file says that a command line names; nothing if it names none, or one that holds no keys."""
    words = find_config(arguments)
    if "--config" not in words:
        return {}
    said = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
    return said if isinstance(said, dict) else {}  # TRL's parser refuses what is no mapping


def read_early(arguments: list[str], **types: Callable[[str], Any]) -> dict[str, Any]:
    """Some settings, to be known before all are parsed: those that the command line gives, else the file.

    Args:
        arguments (`list[str]`): The command line.
        **types: Names of settings, and what makes a value of a word. An option without a word is `True`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, kind in types.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const=True, type=kind)
    given, _ = parser.parse_known_args(find_config(arguments))
    return {name: value for name, value in read_config(arguments).items() if name in types} | vars(given)
