"""Runs an answer and its tests; started by `code.py` as a script, in a process of its own, with Python's library only.

    python -I code_runner.py LIMITS… SECRET RESULT

Its folder holds `answer.py` and `tests.json`. It writes the secret to the descriptor RESULT if the tests finished,
asserted something, and found the modules that they use as they were before the answer ran.
"""

import builtins
import contextlib
import ctypes
import json
import operator
import os
import resource
import signal
import sys
import threading
import types


COMPARISONS = {
    **{"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    **{"in": lambda a, b: a in b, "not in": lambda a, b: a not in b, "is": operator.is_, "is not": operator.is_not},
}
NUMBERS = {int: int.__pos__, float: float.__pos__, complex: complex.__pos__}
CONTAINERS = {
    **{list: list.copy, tuple: lambda value: tuple(tuple.__iter__(value)), dict: dict.copy},
    **{set: lambda value: set(set.__iter__(value)), frozenset: lambda value: frozenset(frozenset.__iter__(value))},
}
PLAIN = {**NUMBERS, **CONTAINERS, str: str.__str__, bytes: lambda value: bytes.__getitem__(value, slice(None))}
"""Reads the value of a subclass without calling its methods."""
LEAVES = frozenset({int, float, complex, bool, str, bytes, type(None), type, types.FunctionType, type(len), range})
SPECIAL = {f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "sub", "rsub", "contains")}
DEEPEST = 50
IMPORTED = "solution"
"""The module by which tests import what the answer defines. `answer`, which is its name, is another."""
OF_ANSWER = ("__main__", "answer", IMPORTED)


# ---- Limits


def isolate() -> None:
    # CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID. The first child is the namespace's init: with it all others end.
    try:
        isolated = ctypes.CDLL(None).unshare(0x10000000 | 0x40000000 | 0x20000000) == 0
    except AttributeError:  # not Linux
        return
    if not isolated:
        return
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def limit(seconds: int, memory: int, file_size: int, processes: int) -> None:
    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NOFILE": 64, "CORE": 0, "NPROC": processes}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


# ---- Modules as they were


class Untouched:
    """The functions and classes of modules, as they are when this is made.

    Args:
        names (`list[str]`): Modules that are loaded; all loaded modules of the same packages are kept.
    """

    def __init__(self, names: list[str]):
        packages = {name.partition(".")[0] for name in names} | {"builtins"}
        self.modules = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in packages}
        self.places = []
        for module in self.modules.values():
            if isinstance(module, types.ModuleType):
                self._keep(module)
                for value in list(vars(module).values()):
                    if isinstance(value, type) and str(value.__module__).partition(".")[0] in packages:
                        self._keep(value)

    def _keep(self, owner: types.ModuleType | type) -> None:
        code, read = types.FunctionType, dict.items
        kept = [(k, v, v.__code__ if type(v) is code else None) for k, v in read(dict(vars(owner))) if _is_code(v)]
        self.places.append((owner, kept))

    def put_back(self) -> bool:
        """Restores what has been replaced since. Returns whether something was."""
        found = False
        for name, module in self.modules.items():
            if sys.modules.get(name) is not module:
                sys.modules[name], found = module, True
        for owner, kept in self.places:
            now = vars(owner)
            for name, value, code in kept:
                if now.get(name) is not value:
                    setattr(owner, name, value)
                    found = True
                if code is not None and value.__code__ is not code:
                    value.__code__, found = code, True
        return found


def _is_code(value) -> bool:
    return callable(value) or isinstance(value, (classmethod, staticmethod, property))


# ---- Objects that the answer made


def is_of_library(kind: type) -> bool:
    """Whether a class is Python's, or is in the module that it names as its own."""
    if not type.__dict__["__flags__"].__get__(kind) & 1 << 9:  # Py_TPFLAGS_HEAPTYPE
        return True
    try:
        found = sys.modules[kind.__module__]
        if any(found is sys.modules.get(name) for name in OF_ANSWER):
            return False
        for part in kind.__qualname__.split("."):
            found = getattr(found, part)
    except (AttributeError, KeyError, TypeError):
        return False
    return found is kind


def has_own_ways(kind: type) -> bool:
    """Whether a class outside the libraries defines its own comparisons."""
    classes = type.__dict__["__mro__"].__get__(kind)
    return any(SPECIAL & vars(c).keys() and not is_of_library(c) for c in classes)


class Opaque:
    """Replaces an object whose comparisons are not trusted: equal only to itself."""


class LiarError(AssertionError):
    pass


class Honesty:
    """The comparisons of the tests.

    A number, a text or a container is compared by its value, whatever a subclass in the answer defines. Other objects
    of the answer are never equal to a plain value, unless the tests name their class. Nothing is equal to everything.

    Args:
        mentioned (`list[str]`): All names in the tests.
    """

    def __init__(self, mentioned: list[str]):
        self.mentioned = frozenset(mentioned)

    def honest(self, *values: object) -> tuple:
        """The values in a form that may be compared."""
        taken, unknown = [], 0
        for value in values:
            opaque: list[object] = []
            taken.append(self._take(value, opaque, DEEPEST))
            unknown += bool(opaque)
        return tuple(taken) if unknown < 2 else values  # two objects of the answer may know each other

    def compare(self, operators: tuple[str, ...], *values: object) -> object:
        """`a < b <= c`, with all of its operands evaluated."""
        result: object = True
        for symbol, left, right in zip(operators, values, values[1:], strict=False):
            taken, container = self.honest(left, right)
            if symbol in ("in", "not in") and type(container) is Opaque:  # it may contain anything
                taken, container = left, right
            result = COMPARISONS[symbol](taken, container)
            if len(operators) > 1 and not result:
                return result
        return result

    def subtract(self, left: object, right: object) -> object:
        kinds = type(left), type(right)
        if any(kind in CONTAINERS for kind in kinds):
            return left - right
        taken = self.honest(left, right)
        return operator.sub(*taken)

    def _take(self, value: object, opaque: list[object], depth: int) -> object:
        kind = type(value)
        if kind in LEAVES or depth == 0:
            return value
        if kind in CONTAINERS:
            return self._take_all(value, opaque, depth - 1)
        own = has_own_ways(kind)
        if own:
            for base, read in PLAIN.items():
                if isinstance(value, base):
                    return self._take(read(value), opaque, depth)
            if kind.__name__ not in self.mentioned:
                opaque.append(value)
                return Opaque()
        if not kind.__module__.startswith("numpy") and _equals_everything(value):
            raise LiarError("An object says that it is equal to everything.")
        return value

    def _take_all(self, value: object, opaque: list[object], depth: int) -> object:
        members = [*value.items()] if type(value) is dict else value
        if all(type(member) in LEAVES for member in members):
            return value
        taken = [self._take(member, opaque, depth) for member in members]
        if all(new is old for new, old in zip(taken, members, strict=True)):
            return value
        return type(value)(taken)


def _equals_everything(value: object) -> bool:
    """Whether it is equal to a stranger, to two numbers, or to two texts."""
    numbers = [int.from_bytes(os.urandom(6), "big") for _ in range(2)]
    with contextlib.suppress(Exception):
        return any(all(value == other for other in kind) for kind in ([object()], numbers, list(map(str, numbers))))
    return False


# ---- From the answer to the result


class Asserted:
    """Counts the assertions that held."""

    def __init__(self):
        self.count = 0

    def __call__(self, value: object = None) -> object:
        self.count += 1
        return value

    def run_case(self, case: type) -> None:
        import unittest

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        if not result.wasSuccessful():
            raise AssertionError(f"{case.__name__} failed.")


def candidate_of(module: types.ModuleType, entry_point: str | None) -> object:
    """The argument of `check`: what is called so, as `Solution().name`, else the last function of the answer."""
    if entry_point:
        found = module
        for part in entry_point.split("."):
            found = getattr(found, part.removesuffix("()"))
            found = found() if part.endswith("()") else found
        return found
    functions = [
        value
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    return functions[-1]


def as_imported(module: types.ModuleType) -> types.ModuleType:
    """The answer for `import solution`, which must not take the place of a function of that name."""
    if IMPORTED not in vars(module):
        return module
    copy = types.ModuleType(module.__name__)
    vars(copy).update(vars(module))
    return copy


def import_all(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # the tests will fail, or expect it
            __import__(name)


def stop_tracing() -> None:
    sys.settrace(None)
    sys.setprofile(None)
    threading.settrace(None)
    threading.setprofile(None)


def main() -> None:
    *limits, secret, result = map(int, sys.argv[1:])
    sys.argv[1:] = []
    with open("answer.py", encoding="utf-8") as file:
        answer = file.read()
    with open("tests.json", encoding="utf-8") as file:
        job = json.load(file)
    for name in ("answer.py", "tests.json"):
        os.unlink(name)
    isolate()
    limit(*limits)
    # Half of the secret is read now and half after the tests, so that neither the frames nor the descriptors have it.
    read, write, leave, run = os.read, os.write, os._exit, exec
    half = read(secret, 32)
    import_all(job["modules"])
    tests = compile(job.pop("tests"), "tests.py", "exec", dont_inherit=True)
    untouched, asserted, honesty = Untouched(job["modules"]), Asserted(), Honesty(job["mentioned"])
    genuine = types.SimpleNamespace(**vars(builtins))
    # Not `__main__`, so that a demonstration under `if __name__ == "__main__"` does not run.
    module = sys.modules["answer"] = sys.modules["__main__"] = types.ModuleType("answer")

    run(compile(answer, "answer.py", "exec", dont_inherit=True), vars(module))

    untouched.put_back()
    stop_tracing()
    sys.modules[IMPORTED] = as_imported(module)
    vars(module).update(
        __name__="__main__",
        _gxpo_asserted=asserted,
        _gxpo_honest=honesty.honest,
        _gxpo_compare=honesty.compare,
        _gxpo_subtract=honesty.subtract,
        _gxpo_builtins=genuine,
        _gxpo_candidate=candidate_of(module, job["entry_point"]) if job["calls_candidate"] else None,
    )
    run(tests, vars(module))

    replaced = untouched.put_back() and not job["patches"]
    if asserted.count and not replaced and sys.gettrace() is None:
        write(result, bytes(a ^ b for a, b in zip(half, read(secret, 32), strict=True)))
        leave(0)  # threads of the answer's may still be at work
    leave(1)


if __name__ == "__main__":
    main()
