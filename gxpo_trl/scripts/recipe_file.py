"""A recipe's file: its keys, their values and their lines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


MOST_BYTES = 2**18
MOST_NODES = 100_000
MERGE = "tag:yaml.org,2002:merge"
STRING = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class RecipeFile:
    """The content of a file.

    Attributes:
        path (`Path`, *optional*): Where it is; `None` where there is none.
        said (`dict[str, Any]`): Values by key, as YAML has them.
        lines (`dict[str, int]`): Lines by key; the first is 1.
    """

    path: Path | None = None
    said: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read_file(path: Path) -> RecipeFile:
    """Reads a recipe.

    Raises:
        ValueError: If it can't be read, is not YAML, has no keys, or has one twice; with the line.
    """
    text = _read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        top = loader.get_single_node()
        if top is None:
            raise ValueError(f"{path} is empty. A recipe has keys, such as `learning_rate: 1e-6`.")
        if not isinstance(top, yaml.MappingNode):
            shape = "a list" if isinstance(top, yaml.SequenceNode) else "one value"
            raise ValueError(f"{_at(path, top)}: expected keys, such as `learning_rate: 1e-6`, got {shape}.")
        _check_nodes(path, top)
        loader.flatten_mapping(top)  # merged keys (`<<`) come first, then the recipe's own
        said, lines = {}, {}
        for key, node in top.value:
            said[_name(path, loader, key)], lines[key.value] = _value(path, loader, key, node), _line(key)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}, line {line}: {ascii(text[error.position])} can't be in YAML.") from error
    except yaml.MarkedYAMLError as error:
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{path}, line {error.problem_mark.line + 1}: no YAML: {said}.") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deep.") from None
    return RecipeFile(path, said, lines)


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file. `--config` needs a recipe: a file, or one of `gxpo recipes`.")
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}.") from error
    if content is None:
        raise ValueError(f"{path} is larger than {MOST_BYTES:,} bytes, too large for a recipe.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected text in UTF-8, got other bytes.") from error


def _check_nodes(path: Path, top: yaml.MappingNode) -> None:
    """Refuses repeated keys, text that can't be encoded, and endless aliases.

    Raises:
        ValueError: With the line.
    """
    for count, node in enumerate(_walk(path, top, ())):
        if count > MOST_NODES:
            raise ValueError(f"{path}: a recipe has fewer than {MOST_NODES:,} values, with aliases written out.")
        if isinstance(node, yaml.ScalarNode) and re.search("[\0\ud800-\udfff]", node.value):
            raise ValueError(f"{_at(path, node)}: expected text, got {ascii(node.value[:60])}.")
        if isinstance(node, yaml.MappingNode):
            seen = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                    if key.value in seen:
                        first = seen[key.value]
                        raise ValueError(
                            f"{_at(path, key)}: `{key.value}` is there twice, first in line {first}. Leave one out."
                        )
                    seen[key.value] = _line(key)


def _walk(path: Path, node: yaml.Node, above: tuple[yaml.Node, ...]) -> Iterator[yaml.Node]:
    """All nodes, as often as they are referred to."""
    if node in above:
        raise ValueError(f"{_at(path, node)}: an alias names what it is in.")
    yield node
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for one in part if isinstance(part, tuple) else (part,):
                yield from _walk(path, one, (*above, node))


def _name(path: Path, loader: yaml.SafeLoader, key: yaml.Node) -> str:
    """A key, which must be a string."""
    if key.tag == STRING and isinstance(key, yaml.ScalarNode):
        return key.value
    said = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
    raise ValueError(
        f"{_at(path, key)}: expected the name of a setting, got {said}, which is not a string in YAML"
        f"{' without quotes' if isinstance(key, yaml.ScalarNode) else ''}."
    )


def _value(path: Path, loader: yaml.SafeLoader, key: yaml.Node, node: yaml.Node) -> Any:
    """The value of a key. YAML may read an invalid date or number as one, such as `2024-13-45`."""
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{_at(path, node)}: `{key.value}`: {error.problem}.") from error
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        kind = node.tag.rpartition(":")[2]
        raise ValueError(
            f"{_at(path, node)}: `{key.value}`: to YAML this is of type {kind}, and it is none."
        ) from error


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {_line(node)}"
