"""What the contract tests share: a name of another library that we touch, and the sentence for when it is gone."""

import ast
import functools
import inspect
import pkgutil
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
LIBRARIES = {"trl": "TRL", "peft": "PEFT", "deepspeed": "DeepSpeed", "vllm": "vLLM"}
"""How those are spelt that are not spelt as their package."""


class Name(NamedTuple):
    """A name of another library that we touch.

    Attributes:
        owner (`str`): The path of the class or module that has it.
        name (`str`): The name itself.
        file (`str`): Ours that touches it, in `gxpo_trl/` or else in the repository; `scripts/` for any file of them.
        use (`str`): What that file does with it; the end of the sentence.
        takes (`str`, *optional*): The arguments that we pass: by position, and behind a `*` by name.
    """

    owner: str
    name: str
    file: str
    use: str
    takes: str | None = None

    def __str__(self) -> str:
        return f"{self.owner.rpartition('.')[2]}.{self.name}"

    @property
    def touching(self) -> list[str]:
        """Those of our files, by their path in `gxpo_trl/` or else in the repository, that still touch the name."""
        base = ROOT / "gxpo_trl" if (ROOT / "gxpo_trl" / self.file).exists() else ROOT
        files = [base / self.file] if not self.file.endswith("/") else sorted((base / self.file).glob("*.py"))
        return [file.relative_to(base).as_posix() for file in files if self.name in names_in(file)]

    @property
    def where(self) -> str:
        """Whom to blame: the file, of a room all files that touch the name."""
        return self.file if not self.file.endswith("/") else " and ".join(self.touching) or self.file

    @property
    def spelt_owner(self) -> str:
        """Such as "DeepSpeed's DeepSpeedEngine", or the library's name alone."""
        package, _, rest = self.owner.partition(".")
        library = LIBRARIES.get(package, package)
        short = rest.rpartition(".")[2]
        whose = f"{library}'" if library.endswith("s") else f"{library}'s"
        return f"{whose} {short if short[:1].isupper() else rest}" if rest else library


def check(touched: Name) -> None:
    """Fails with one sentence where a name is gone, or is called otherwise than we call it."""
    where = f"{touched.where} {touched.use}."
    try:
        owner = pkgutil.resolve_name(touched.owner)
    except (ImportError, AttributeError):
        pytest.fail(f"{touched.spelt_owner} is not at `{touched.owner}` any more: {where}", pytrace=False)
    if not has(owner, touched.name):
        pytest.fail(f"{touched.spelt_owner} has no `{touched.name}` any more: {where}", pytrace=False)
    if touched.takes is not None and (found := differs(getattr(owner, touched.name), touched.takes)):
        pytest.fail(f"`{touched.name}` of {touched.spelt_owner} {found}: {where}", pytrace=False)


@functools.cache
def names_in(file: Path) -> frozenset[str]:
    """What our file names: in its code, and in strings that are nothing but a name. Not in what it says of itself."""
    if not file.is_file():
        return frozenset()
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    named = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "arg", "name", "value")}
    return frozenset(name for name in named if isinstance(name, str))


def has(owner: Any, name: str) -> bool:
    """Whether a module or a class has a name, or the methods of the class write it."""
    return hasattr(owner, name) or (inspect.isclass(owner) and name in written_by(owner))


@functools.cache
def written_by(owner: type) -> frozenset[str]:
    """The attributes that the methods of a class write, be it on `self` or on what they are given, and its fields."""
    return frozenset().union(*(_written_in(part) for part in owner.__mro__))


@functools.cache
def _written_in(owner: type) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError):  # of C
        return frozenset()
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    written = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return frozenset(written | inspect.get_annotations(owner).keys())


def signature(function: Any) -> inspect.Signature:
    """Where a decorator does not say what it decorates, as DeepSpeed's don't, that of the function below."""
    found = inspect.signature(function)
    if list(found.parameters) == ["args", "kwargs"] and inspect.isfunction(function):
        below = inspect.getclosurevars(function).nonlocals.get("func")
        return found if below is None else signature(below)
    return found


def parameter_names(function: Any) -> list[str]:
    return [name for name in signature(function).parameters if name != "self"]


def differs(function: Any, takes: str) -> str | None:
    """What is wrong with calling a function so, to stand behind its name; `None` if nothing is."""
    by_position, by_name = (part.replace(",", " ").split() for part in (*takes.split("*"), "")[:2])
    names = parameter_names(function)
    if names[: len(by_position)] != by_position:
        return f"does not begin with the arguments {', '.join(by_position)} any more"
    if missing := [name for name in by_name if name not in names]:
        return f"takes no argument `{missing[0]}` any more"
    for name, parameter in signature(function).parameters.items():
        is_asked_for = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if is_asked_for and name not in ("self", *by_position, *by_name):
            return f"asks for an argument `{name}` now"
    return None
