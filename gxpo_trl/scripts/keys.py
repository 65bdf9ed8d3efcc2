"""Keys of a YAML file and a command line, as fields of dataclasses. Anything else is an error."""

import argparse
import dataclasses
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from ..spelling import nearest
from ..values import item_kind, read_value, show
from .bounds import bounds_of, check_bounds
from .failing import one_sentence
from .recipe_file import RecipeFile, read_file
from .recipes import recipe_path


GONE = {
    "retention": "r is g1 / g0, as in the paper (docs/results.md has results of the other). Leave it out.",
    "active_threshold_relative": "δ is `active_threshold`, an absolute number. Leave it out.",
    "scale_min": "the scale is never below 1, that of the two probes. Leave it out.",
    "probe_optimizer_state": "the probes advance the optimizer's state, as in the papers (docs/results.md has "
    "results of the other). Leave it out.",
    "gate_robust": "the z-score uses the mean and standard deviation. Raise `gate_patience` against single spikes.",
    "gate_fallback": "the active phase ends permanently, as in the papers. Leave it out.",
    "gate_cooldown_steps": "the active phase ends permanently, as in the papers. Leave it out.",
    "snapshot_dtype": "copies have the dtype of the parameters. Set `snapshot_device: cpu` if memory is short.",
    "prune_zero_advantage": "it follows `compact_batches`. Leave it out, or set `compact_batches: false`.",
    "old_logps_from_sampling": "it is done whenever the numbers are the same. Leave it out.",
}
"""Settings of earlier versions, and what to do."""


BEYOND = {
    "alpha": str | float | list[float],
    "fsdp": str | bool | list[str] | None,
    "resume_from_checkpoint": str | bool | None,
    "scale_rewards": str | bool,
}
"""Values that are accepted in addition to the annotated types."""
NEGATIVE = r"-(?:inf(?:inity)?|(?:\d+\.?\d*|\.\d+)e[-+]?\d+)"
OF_THE_SHELL = re.compile(
    "GXPO_ALLOW.*|PYTHON.*|LD_.*|DYLD_.*|(.*_)?(PATH|HOME|PRELOAD|PLUGINS?|COMMAND|SHELL|LIBRARIES)|PATH|BASH_ENV|ENV|"
    ".*TRUST_REMOTE_CODE.*|.*INSECURE.*|CC|CXX|NVCC|EDITOR|VISUAL|PAGER|BROWSER|GIT_.*",
    re.IGNORECASE,
)
"""Variables that decide which code runs, or what it may do. They are set in the shell, not in a recipe."""


@dataclass(frozen=True)
class Origin:
    """Where settings came from: a file, and a command line, which overrides it.

    Attributes:
        file (`RecipeFile`): The file; an empty one if there is none.
        given (`dict[str, list[str]]`): Words of the command line by key.
    """

    file: RecipeFile = field(default_factory=RecipeFile)
    given: dict[str, list[str]] = field(default_factory=dict)

    def explain(self, error: Exception) -> str:
        """An error about settings as one sentence. It begins with the place of the first setting that it names."""
        sentence, said = one_sentence(error), str(error)  # not the place in the code, whose names may be settings' too
        if sentence.startswith(("the command line", f"{self.file.path}")):
            return sentence
        for key, bare in re.findall(r"`(\w+)|\b([a-z0-9]+(?:_[a-z0-9]+)+)\b", said):
            if place := self._place(key or bare):
                return f"{place}: {sentence}"
        for key, value in (self.file.said | self.given).items():  # or by a value that it names: a model, a file
            words = value if isinstance(value, list) else [value]
            if any(_names(said, key, word) for word in words if isinstance(word, str)):
                return f"{self._place(key)}: `{key}`: {sentence}"
        return sentence if self.file.path is None else f"{self.file.path}: {sentence}"

    def _place(self, key: str) -> str | None:
        """The place of a setting, such as `recipe.yaml, line 5`; `None` if it has its default."""
        if key in self.given:
            return "the command line"
        return f"{self.file.path}, line {self.file.lines[key]}" if key in self.file.lines else None


def _names(said: str, key: str, word: str) -> bool:
    """Whether an error names this value of a setting: in quotes, unless it is distinct without them."""
    if not re.search(r"[^\W\d]{2}", word) or word in ("all", "none"):  # many settings may be 1
        return False
    is_distinct = "/" in word or key in ("model_name_or_path", "resume_adapter", "report_to")
    around = "" if is_distinct else "['\"`]"
    return re.search(rf"{around}{re.escape(word)}{around}", said) is not None


class KeyParser(TrlParser):
    """TRL's parser, which reads each value by the type of its field.

    Args:
        classes (`tuple[type, ...]`): Dataclasses whose fields are the keys.
        **options: As for `argparse.ArgumentParser`.
    """

    def __init__(self, classes: tuple[type, ...], **options: Any):
        # Keys are not abbreviated: an abbreviation is an unknown key.
        super().__init__(classes, allow_abbrev=False, exit_on_error=False, **options)
        self.kinds, self.bounds = {}, bounds_of(classes)
        for one in classes:
            hints = typing.get_type_hints(one)
            self.kinds |= {f.name: BEYOND.get(f.name, hints[f.name]) for f in dataclasses.fields(one) if f.init}
        for action in self._actions:
            if action.type is not None:
                action.type = self._reader(action.dest, of_list=action.nargs == "+")

    def read(self, key: str, value: Any, of_list: bool = False) -> Any:
        """The value of a setting, or of one item of its list.

        Raises:
            ValueError: If the setting does not accept the value.
        """
        value = read_value(value, item_kind(self.kinds[key]) if of_list else self.kinds[key])
        check_bounds(value, self.bounds.get(key))
        return value

    def take_file(self, file: RecipeFile) -> None:
        """Sets the values of a file as defaults.

        Raises:
            ValueError: If a key is unknown or gone, or its value is none that it takes; it says where.
        """
        values = {}
        for key, value in file.said.items():
            if key != "env":
                place = f"{file.path}, line {file.lines[key]}: "
                if key not in self.kinds:
                    raise ValueError(f"{place}{self._of_unknown(key, 'the recipe')}")
                try:
                    values[key] = self.read(key, value)
                except ValueError as error:
                    raise ValueError(f"{place}`{key}`: {error}") from error
        self.set_defaults_with_config(**values)

    def take_words(self, words: list[str]) -> dict[str, Any]:
        """All settings by key, with those that a command line gives.

        Raises:
            ValueError: If a key is unknown or gone, its value is none that it takes, or a list is given in pieces, of
                which argparse would take the last.
        """
        self._check_lists(words)
        try:
            settings, unknown = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            key = error.argument_name.split("/")[0].lstrip("-")
            raise ValueError(f"the command line: `{key}`: {error.message}") from error
        if unknown:
            raise ValueError(self._of_unknown(unknown[0], "the command line"))
        return vars(settings)

    def _check_lists(self, words: list[str]) -> None:
        said = [word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        for action in self._actions:
            if action.nargs == "+" and said.count(action.dest) > 1:
                key = action.dest
                raise ValueError(f"the command line: `{key}` is given twice. Give all in one: `--{key} A B`.")

    def _reader(self, key: str, of_list: bool) -> Callable[[str], Any]:
        def read(word: str) -> Any:
            try:
                return self.read(key, word, of_list)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error  # other errors lose their message

        return read

    def _of_unknown(self, word: str, source: str) -> str:
        key = word.removeprefix("--").split("=")[0]
        if remedy := GONE.get(key.replace("-", "_").removeprefix("no_")):
            return f"`{key}` in {source} is gone: {remedy}"
        if word.endswith((".yaml", ".yml")):
            return f"Unknown key `{key}` in {source}; a recipe is `--config {word}`."
        return f"Unknown key `{key}` in {source}{nearest(key, self.kinds)}"


def parse_keys(arguments: list[str], classes: tuple[type, ...], prog: str | None = None) -> tuple:
    """Reads a recipe, `--config FILE`, and the keys that the command line gives, into dataclasses.

    Args:
        arguments (`list[str]`): The command line. FILE may be a recipe of the package, such as `gxpo:tiny/gxpo.yaml`.
        classes (`tuple[type, ...]`): Dataclasses whose fields are the keys.
        prog (`str`, *optional*): The command's name in its help.

    Raises:
        ValueError: If a key is unknown or gone, or a setting is of another type or out of its bounds; it says where.
    """
    origin, words = find_origin(arguments)
    parser = KeyParser(classes, prog=prog)
    parser.take_file(origin.file)
    parser.take_words(words)
    os.environ.update(read_environment(origin.file))
    try:
        return parser.parse_args_and_config(words)
    except Exception as error:  # a dataclass may raise any error
        raise ValueError(origin.explain(error)) from error


def peek(arguments: list[str], classes: tuple[type, ...]) -> dict[str, Any]:
    """All settings by key, before dataclasses are made of them.

    Raises:
        ValueError: As for `parse_keys`.
    """
    origin, words = find_origin(arguments)
    parser = KeyParser(classes)
    parser.take_file(origin.file)
    return parser.take_words([word for word in words if word not in ("-h", "--help")])


def find_origin(arguments: list[str]) -> tuple[Origin, list[str]]:
    """The file that a command line names, and the remaining words.

    Raises:
        ValueError: If `--config` is the last word, or is given twice, or the file can't be read.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if broken := [word for word in words if re.search("[\ud800-\udfff]", word)]:
        raise ValueError(f"the command line: expected text in UTF-8, got {ascii(broken[0])}.")
    file = RecipeFile()
    if words.count("--config") > 1:
        raise ValueError("the command line: `--config` is given twice. Name one recipe.")
    if "--config" in words:
        place = words.index("--config")
        if place + 1 == len(words):
            raise ValueError("`--config` needs a recipe: a file, or one of `gxpo recipes`.")
        file = read_file(recipe_path(words[place + 1]))
        del words[place : place + 2]
    words = _join_negative_numbers(words)
    given, values = {}, []
    for word in words:
        if word.startswith("--"):
            key, _, value = word.removeprefix("--").partition("=")
            values = [value] if value else []
            given |= dict.fromkeys((key.replace("-", "_"), key.replace("-", "_").removeprefix("no_")), values)
        else:
            values.append(word)
    return Origin(file, given), words


def _join_negative_numbers(words: list[str]) -> list[str]:
    """`--key -inf` as `--key=-inf`: argparse would take such a number for a key."""
    joined: list[str] = []
    for word in words:
        if joined and re.fullmatch(r"--\w[\w-]*", joined[-1]) and re.fullmatch(NEGATIVE, word, re.IGNORECASE):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def read_environment(file: RecipeFile) -> dict[str, str]:
    """The environment variables that a recipe sets, under `env`.

    Raises:
        ValueError: If these are none, or decide which code runs.
    """
    variables, place = file.said.get("env", {}), f"{file.path}, line {file.lines.get('env')}: `env`"
    if not isinstance(variables, dict):
        raise ValueError(f"{place}: expected names and values of variables, got {show(variables)}.")
    for name, value in variables.items():
        if not (isinstance(name, str) and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)):
            raise ValueError(f"{place}: expected the name of a variable, got {show(name)}.")
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"{place}: expected text or a number for `{name}`, got {show(value)}.")
        if OF_THE_SHELL.fullmatch(name):
            raise ValueError(f"{place}: `{name}` decides which code runs, so no recipe sets it. Set it in your shell.")
    return {name: str(value) for name, value in variables.items()}
