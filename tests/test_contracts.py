"""The contracts are complete: what of other libraries the package touches stands in one of their tables."""

import ast
import functools
import inspect
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import test_accelerate_contract
import test_deepspeed_contract
import test_peft_contract
import test_torch_contract
import test_transformers_contract
import test_trl_contract
import test_vllm_contract
from contracts import ROOT, Name, check, has
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOTrainer, LookaheadConfig, LookaheadTrainer, SFPOTrainer


CONTRACTS = (
    *(test_accelerate_contract, test_deepspeed_contract, test_peft_contract, test_torch_contract),
    *(test_transformers_contract, test_trl_contract, test_vllm_contract),
)
NAMES = [touched for contract in CONTRACTS for touched in contract.NAMES]
OVERRIDDEN = test_trl_contract.OVERRIDDEN.keys() | test_transformers_contract.OVERRIDDEN.keys()
IN_A_CONTRACT = {touched.name for touched in NAMES} | OVERRIDDEN | test_trl_contract.STOOD_IN_FOR.keys()
"""Whoever has the name."""
TRAINERS = ("transformers.Trainer", "trl.GRPOTrainer", "trl.RLOOTrainer")
BY_NAME = ("getattr", "hasattr", "setattr", "wrap_method")
"""Functions that are given an object and the name of what they touch on it."""


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
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield from (Access(file, node.lineno, node.module, imported.name) for imported in node.names)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
                receiver, name = node.args[:2]
                if isinstance(name, ast.Constant):
                    yield Access(file, node.lineno, ast.unparse(receiver), name.value)


def private_names_in_strings() -> Iterator[Access]:
    """In the rooms that know TRL these are what a trainer is asked for, one after the other."""
    for file in filter(knows_trl, sources()):
        for node in ast.walk(sources()[file]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                yield Access(file, node.lineno, "trainer", node.value)


def knows_trl(file: str) -> bool:
    return file.startswith(("trainer/", "callbacks/"))


@functools.cache
def given_in(file: str) -> set[str]:
    """What the functions and classes of a file are called, the fields of these, and what is written on `self`."""
    names = set()
    for node in ast.walk(sources()[file]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) == "self" else set()
        if isinstance(node, (ast.Module, ast.ClassDef)):
            assigned = (part for part in node.body if isinstance(part, (ast.Assign, ast.AnnAssign)))
            names |= {name.id for part in assigned for name in ast.walk(part) if _is_stored(name)}
    return names


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def unlisted(found: Iterator[Access], listed: set[str] = IN_A_CONTRACT) -> list[str]:
    return [a.without_contract() for a in found if a.name not in listed and not a.name.startswith("__")]


def listed_of(*owners: str) -> set[str]:
    """The names that are in a contract as those of one of these."""
    return {touched.name for touched in NAMES if touched.owner in owners}


def test_no_private_name_of_another_library_is_touched_without_a_contract():
    ours = set().union(*map(given_in, sources()))
    found = (*accesses(), *private_names_in_strings())
    private = (access for access in found if access.name.startswith("_") and access.name not in ours)
    of_others = (access for access in private if (access.receiver, access.name) != ("os", "_exit"))
    assert not (found := unlisted(of_others)), found[0]


@pytest.mark.parametrize(
    "receiver, place, owners",
    [
        ("accelerator", "", [test_accelerate_contract.ACCELERATOR]),
        ("_dist", "trainer/", ["trl.distributed.DistributedBackend"]),
        ("zero", "engines/", [getattr(test_deepspeed_contract, name) for name in ("ZERO_12", "ZERO_3", "BF16")]),
        ("model", "engines/deepspeed.py", [test_deepspeed_contract.ENGINE]),
        ("model", "engines/passes.py", [test_deepspeed_contract.ENGINE]),
    ],
)
def test_whatever_is_asked_of_these_is_in_a_contract(receiver, place, owners):
    asked = [
        access
        for access in accesses()
        if access.file.startswith(place)
        and access.receiver.rpartition(".")[2] == receiver
        and access.receiver != "torch.accelerator"
    ]
    assert asked, f"Nothing is asked of `{receiver}` in gxpo_trl/{place} any more: this test looks for another name."
    assert not (found := unlisted(asked, listed_of(*owners))), found[0]


def test_whatever_is_asked_of_a_trainer_is_in_a_contract():
    """By our parts of it and by those that hold one; what our own trainer adds is ours."""
    asked = [a for a in accesses() if knows_trl(a.file) and a.receiver in ("trainer", "self.trainer")]
    files = {access.file for access in asked}
    assert {"trainer/update.py", "trainer/layout.py", "trainer/grouped.py", "callbacks/benchmarks.py"} <= files, (
        "A file that asked a `trainer` does so no more: this test looks for another name."
    )
    listed = listed_of(*TRAINERS) | OVERRIDDEN | test_trl_contract.STOOD_IN_FOR.keys()
    assert not (found := unlisted(asked, listed | given_in("trainer/trainer.py"))), found[0]


def test_whatever_trainers_settings_and_callbacks_ask_of_themselves_is_in_a_contract():
    asked = [a for a in accesses() if knows_trl(a.file) and a.receiver in ("self", "super()")]
    assert not (found := unlisted(a for a in asked if a.name not in given_in(a.file))), found[0]


def test_the_methods_that_are_said_to_be_overridden_are():
    ours = {name for name, value in vars(LookaheadTrainer).items() if inspect.isfunction(value)}
    found = {name for name in ours if hasattr(GRPOTrainer, name)}
    assert found == OVERRIDDEN, (
        f"LookaheadTrainer overrides {', '.join(sorted(found))}: OVERRIDDEN of tests/test_trl_contract.py and "
        f"test_transformers_contract.py differ from that by {', '.join(sorted(found ^ OVERRIDDEN))}."
    )


@pytest.mark.parametrize(
    "our_class, base", [(GXPOTrainer, GRPOTrainer), (SFPOTrainer, GRPOTrainer), (LookaheadConfig, GRPOConfig)]
)
def test_no_name_of_ours_on_a_trainer_is_theirs_by_accident(our_class, base):
    """Were TRL to keep something under a name that we use, each would overwrite what is the other's."""
    parts = [part for part in our_class.__mro__ if part.__module__.startswith("gxpo_trl")]
    names = {name for part in parts for name in (*vars(part), *_written_on_self(part))}
    shared = {name for name in names if has(base, name) and not name.startswith("__")} - IN_A_CONTRACT
    assert not shared, (
        f"{our_class.__name__} has a `{', '.join(sorted(shared))}`, and {base.__name__} has one too: if that is "
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
    stale = [touched for touched in contract.NAMES if not touched.touching]
    assert not stale, (
        f"{contract.__name__} says that {stale[0].file} {stale[0].use}, `{stale[0].name}`, and that is not so any "
        "more: take it out of NAMES, or say which file does."
    )


def test_a_contract_of_the_scripts_holds_for_any_file_of_them():
    moved, gone = Name("trl", "get_dataset", "scripts/", "mixes"), Name("trl", "no_such_name", "scripts/", "mixes")
    (file,) = moved.touching
    assert file.startswith("scripts/") and moved.where == file and not gone.touching
    with pytest.raises(pytest.fail.Exception, match=r"^TRL has no `no_such_name` any more: scripts/ mixes\.$"):
        check(gone)
