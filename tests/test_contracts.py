"""The contracts are complete: what of other libraries the package touches stands in one of their tables."""

import ast
import functools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import test_accelerate_contract
import test_deepspeed_contract
import test_peft_contract
import test_transformers_contract
import test_trl_contract
import test_vllm_contract
from contracts import ROOT, has
from trl import GRPOTrainer

from gxpo_trl import GXPOTrainer, SFPOTrainer


CONTRACTS = (
    *(test_accelerate_contract, test_deepspeed_contract, test_peft_contract),
    *(test_transformers_contract, test_trl_contract, test_vllm_contract),
)
NAMES = [touched for contract in CONTRACTS for touched in contract.NAMES]
IN_A_CONTRACT = {touched.name for touched in NAMES}
IN_A_CONTRACT |= test_trl_contract.OVERRIDDEN.keys() | test_transformers_contract.OVERRIDDEN.keys()


class Access(NamedTuple):
    """`receiver.name` in one of our files."""

    file: str
    line: int
    receiver: str
    name: str

    def without_contract(self) -> str:
        return (
            f"gxpo_trl/{self.file}, line {self.line}, touches `{self.receiver}.{self.name}`, which is none of ours "
            "and in no contract: add it to NAMES of the library's tests/test_*_contract.py."
        )


@functools.cache
def sources() -> dict[str, ast.Module]:
    package = ROOT / "gxpo_trl"
    return {path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in package.rglob("*.py")}


def accesses() -> Iterator[Access]:
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                yield Access(file, node.lineno, ast.unparse(node.value), node.attr)


@functools.cache
def ours() -> set[str]:
    """The names that the package gives: to functions and classes, to variables and fields, and on `self`."""
    names = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return names


def unlisted(found: Iterator[Access]) -> list[str]:
    return [a.without_contract() for a in found if a.name not in IN_A_CONTRACT and not a.name.startswith("__")]


def test_no_private_name_of_another_library_is_touched_without_a_contract():
    private = (access for access in accesses() if access.name.startswith("_") and access.name not in ours())
    assert not (found := unlisted(private)), found[0]


@pytest.mark.parametrize(
    "receiver, place",
    [
        ("accelerator", ""),  # accelerate's
        ("_dist", "trainer/"),  # TRL's
        ("zero", "engines/"),  # DeepSpeed's optimizer
        ("model", "engines/deepspeed.py"),  # DeepSpeed's engine
    ],
)
def test_whatever_is_asked_of_these_is_in_a_contract(receiver, place):
    asked = [
        access
        for access in accesses()
        if access.file.startswith(place)
        and access.receiver.rpartition(".")[2] == receiver
        and access.receiver != "torch.accelerator"
    ]
    assert asked, f"Nothing is asked of `{receiver}` in gxpo_trl/{place} any more: this test looks for another name."
    assert not (found := unlisted(asked)), found[0]


def test_whatever_the_trainers_ask_of_themselves_is_in_a_contract():
    asked = [
        access
        for access in accesses()
        if access.file.startswith("trainer/") and access.receiver in ("self", "self.trainer", "super()")
    ]
    assert not (found := unlisted(access for access in asked if access.name not in ours())), found[0]


@pytest.mark.parametrize("trainer_class, base", [(GXPOTrainer, GRPOTrainer), (SFPOTrainer, GRPOTrainer)])
def test_no_name_of_ours_on_a_trainer_is_theirs_by_accident(trainer_class, base):
    """Were TRL to keep something under a name that we use, each would overwrite what is the other's."""
    parts = [part for part in trainer_class.__mro__ if part.__module__.startswith("gxpo_trl")]
    names = {name for part in parts for name in (*vars(part), *_written_on_self(part))}
    shared = {name for name in names if has(base, name) and not name.startswith("__")} - IN_A_CONTRACT
    assert not shared, (
        f"{trainer_class.__name__} has a `{', '.join(sorted(shared))}`, and {base.__name__} has one too: if that is "
        "meant it belongs into NAMES or OVERRIDDEN of tests/test_trl_contract.py, else it needs another name."
    )


def _written_on_self(part: type) -> set[str]:
    """The attributes that one of our classes writes on itself."""
    file = part.__module__.removeprefix("gxpo_trl.").replace(".", "/") + ".py"
    (tree,) = (node for node in sources()[file].body if isinstance(node, ast.ClassDef) and node.name == part.__name__)
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in stored if ast.unparse(node.value) == "self"}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_every_contract_is_about_a_name_that_we_touch(contract):
    stale = [touched for touched in contract.NAMES if touched.name not in touched.path.read_text()]
    assert not stale, (
        f"{contract.__name__} says that {stale[0].file} {stale[0].use}, `{stale[0].name}`, and that is not so any "
        "more: take it out of NAMES."
    )
