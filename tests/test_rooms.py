"""Who may know whom: the rooms of the package import what the plan of the house lets them, and nothing else."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "gxpo_trl"
ROOMS = {
    *("update", "engines", "rollout", "sampling", "trainer", "callbacks"),
    *("trajectory", "tasks", "evaluation", "reporting", "scripts"),
}
BELOW = ROOMS - {"trainer", "callbacks", "scripts"}
MAY_IMPORT = {
    "update": set(),
    "engines": {"update"},
    "rollout": BELOW,
    "sampling": BELOW,
    "trajectory": BELOW,
    "tasks": BELOW,
    "evaluation": BELOW,
    "reporting": BELOW,
    "trainer": {"update", "engines", "rollout", "sampling"},
    "callbacks": ROOMS - {"scripts"},
    "scripts": ROOMS | {"gxpo_trl"},
    "gxpo_trl": ROOMS - {"scripts"},
}
"""Rooms by room, beside its own. `gxpo_trl` is the front door: the public names, which only scripts come in by."""
LIBRARIES = {"update": {"torch"}, "run_folder.py": set()}
"""Where little may be imported: libraries beside Python's own, and no file of the package's root either."""


def imports(path: Path) -> Iterator[str]:
    """The full names of what a file imports, wherever in it, from the package as `gxpo_trl.room.file`."""
    here = ("gxpo_trl", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


def room_of(name: str) -> str | None:
    """The room that a name of the package is in, `gxpo_trl` for a public name; `None` for a file beside the rooms."""
    inside = name.partition(".")[2].partition(".")[0]
    if (PACKAGE / f"{inside}.py").is_file():
        return None
    return inside if inside and (PACKAGE / inside).is_dir() else "gxpo_trl"


def violations(path: Path) -> Iterator[str]:
    """What a file imports that it may not."""
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0] if len(relative.parts) > 1 else "gxpo_trl"
    libraries = LIBRARIES.get(relative.parts[0])
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "gxpo_trl":
            target = room_of(name)
            allowed = target == own or (libraries is None if target is None else target in MAY_IMPORT[own])
            target = target or name.split(".")[1]
        else:
            target, allowed = top, libraries is None or top in libraries or top in sys.stdlib_module_names
        if not allowed:
            yield f"{relative.as_posix()} -> {target}"


def test_rooms_import_what_they_may():
    found = sorted(line for path in PACKAGE.rglob("*.py") for line in violations(path))
    assert not found, f"The plan of the rooms forbids: {', '.join(found)}."


def test_every_room_is_in_the_plan():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= ROOMS


@pytest.mark.parametrize(
    "place, line, expected",
    [
        ("tasks/x.py", "from ..trainer.gxpo import GXPOTrainer", ["tasks/x.py -> trainer"]),
        ("tasks/x.py", "from .. import trainer", ["tasks/x.py -> trainer"]),
        ("tasks/x.py", "def f():\n    import gxpo_trl.scripts.cli", ["tasks/x.py -> scripts"]),
        ("tasks/x.py", "from gxpo_trl import GXPOTrainer\nimport gxpo_trl", ["tasks/x.py -> gxpo_trl"] * 2),
        ("tasks/deep/x.py", "from ...spelling import nearest\nfrom ..names import resolve_model\nimport trl", []),
        ("update/x.py", "import math\nimport torch.nn\nfrom .gate import Gate", []),
        (
            "update/x.py",
            "import trl\nfrom ..spelling import nearest",
            ["update/x.py -> trl", "update/x.py -> spelling"],
        ),
        ("scripts/x.py", "from .cli import main\nfrom gxpo_trl import GXPOTrainer", []),
        ("spelling.py", "from .scripts import cli", ["spelling.py -> scripts"]),
        ("run_folder.py", "import torch", ["run_folder.py -> torch"]),
    ],
)
def test_what_is_a_violation(tmp_path, monkeypatch, place, line, expected):
    """In a house with the same rooms."""
    for room in ("tasks", "trainer", "scripts", "update"):
        (tmp_path / room).mkdir()
    (tmp_path / "spelling.py").touch()
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert list(violations(path)) == expected
