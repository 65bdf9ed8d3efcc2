"""Tests for model-written code, rewritten to count their assertions.

Each assertion is counted once it has passed. Tests that are only defined are called. Comparisons do not trust objects
that the answer made (`honest` in `code_runner.py`).
"""

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache


ASSERTED, HONEST, COMPARE, SUBTRACT = "_gxpo_asserted", "_gxpo_honest", "_gxpo_compare", "_gxpo_subtract"
BUILTINS, CANDIDATE = "_gxpo_builtins", "_gxpo_candidate"
"""What `code_runner.py` provides to the rewritten tests."""
OPERATORS = {
    **{ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="},
    **{ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not"},
}
EQUAL = {"isclose", "allclose", "array_equal", "array_equiv"}
"""Functions of libraries that compare, in addition to those named `assert…`."""
GIVES_UP = {"fail", "exit", "_exit", "quit"}
ANSWERS = ("solution", "answer", "__main__")
"""Names of modules by which tests may import what the answer defines."""
BOUND_BY_PYTHON = {"super", "locals", "globals", "vars", "dir", "eval", "exec"}
"""Built-in functions that depend on where they are called."""


@dataclass(frozen=True)
class PreparedTests:
    """Tests that can be run.

    Attributes:
        source (`str`): Python that uses the names above.
        names (`frozenset[str]`): What they expect the answer to define; empty if that is known as `candidate` only.
        mentioned (`frozenset[str]`): All names in them.
        modules (`tuple[str, ...]`): What they import, apart from the answer.
        needed (`tuple[str, ...]`): Those of them that they can't do without: not imported in a `try`.
        patches (`bool`): Whether they replace parts of modules themselves.
        calls_candidate (`bool`): Whether they call `check` with a function.
    """

    source: str
    names: frozenset[str]
    mentioned: frozenset[str]
    modules: tuple[str, ...]
    needed: tuple[str, ...]
    patches: bool
    calls_candidate: bool


@lru_cache(maxsize=1024)
def prepare_tests(tests: str) -> PreparedTests:
    """Rewrites tests.

    Args:
        tests (`str`): Python that asserts: by `assert`, by an assertion of unittest, pytest or numpy, or by an `if`
            that raises; at its top level or in `test_…()`, `check(candidate)` or a `unittest.TestCase`.

    Raises:
        ValueError: If they are not Python, assert nothing, or would never be called.
    """
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"can't be read as Python: {error}") from error
    names = _Names(tree)
    tree.body = [statement for statement in tree.body if not _runs_tests(statement)]
    calls = list(_calls(tree, names))
    rewriting = _Rewriting(names)
    rewriting.visit(tree)
    if not rewriting.count:
        raise ValueError("assert nothing, so that any code would pass: use `assert`")
    tree.body += ast.parse("\n".join(calls)).body
    if not any(_does_something(statement) for statement in tree.body):
        raise ValueError("assert in functions that nothing calls: call them, or name them `test_…` or `check`")
    return PreparedTests(
        ast.unparse(ast.fix_missing_locations(tree)),
        frozenset(names.wanted),
        frozenset(names.mentioned),
        tuple(sorted(names.modules | {"unittest"} if any("run_case" in call for call in calls) else names.modules)),
        tuple(sorted(names.imported - names.guarded)),
        names.patches,
        any(CANDIDATE in call for call in calls),
    )


class _Names(ast.NodeVisitor):
    """What the names in the tests are."""

    def __init__(self, tree: ast.Module):
        self.loaded, self.bound, self.functions, self.attributes = set(), set(), set(), set()
        self.modules, self.imported, self.guarded, self.asked = set(), set(), set(), set()
        self.aliases: dict[str, str] = {}
        self.patches = False
        self.visit(tree)
        self.mentioned = self.loaded | self.bound | self.attributes
        free = self.loaded - self.bound
        # A task may ask for a function with the name of a built-in one, only if it asks for nothing else.
        is_checked = "candidate" in self.bound
        self.wanted = set() if is_checked else free - vars(builtins).keys() or (set() if self.asked else free)
        self.wanted |= self.asked
        self.built_in = {
            name for name in free & vars(builtins).keys() - self.wanted - BOUND_BY_PYTHON if not name.startswith("__")
        }

    def visit_Name(self, node: ast.Name) -> None:
        (self.loaded if isinstance(node.ctx, ast.Load) else self.bound).add(node.id)

    def visit_arg(self, node: ast.arg) -> None:
        self.bound.add(node.arg)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.attributes.add(node.attr)
        self.patches |= not isinstance(node.ctx, ast.Load) and not _is_self(node.value)
        self.patches |= "patch" in node.attr
        module = self.aliases.get(_name_of(node.value))
        if module in ANSWERS:
            self.asked.add(node.attr)
        elif module:  # `np.testing` may be a module that is not loaded yet
            self.modules.add(f"{module}.{node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.patches |= _name_of(node.func) in ("setattr", "delattr") or "patch" in _name_of(node.func)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.bound.add(node.name)
        self.functions.add(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.bound |= {node.name} - {None}
        self.generic_visit(node)

    def visit_Try(self, node: ast.Try) -> None:
        self.generic_visit(node)
        for inner in ast.walk(ast.Module(node.body, [])):
            if isinstance(inner, ast.Import):
                self.guarded |= {name.name for name in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                self.guarded |= {inner.module} - {None}

    def visit_Import(self, node: ast.Import) -> None:
        self.aliases |= {name.asname or name.name: name.name for name in node.names}
        self.bound |= {name.asname or name.name.partition(".")[0] for name in node.names}
        for name in node.names:
            if name.name not in ANSWERS:
                self._import(name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            raise ValueError("import from a package, and there is none: import the answer `from solution`")
        self.bound |= {name.asname or name.name for name in node.names} - {"*"}
        if node.module in ANSWERS:
            self.asked |= {name.name for name in node.names} - {"*"}
        elif node.module != "__future__":
            self._import(node.module)

    def _import(self, module: str) -> None:
        self.modules.add(module)
        self.imported.add(module)


def _name_of(function: ast.expr) -> str:
    """The last part of a name with dots, or nothing."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


# ---- Counting, and comparing honestly


class _Rewriting(ast.NodeTransformer):
    def __init__(self, names: _Names):
        self.names = names
        self.count = 0  # of assertions in the text

    def _counted(self) -> ast.Expr:
        self.count += 1
        return ast.Expr(_call(ASSERTED))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """If the answer defines a function with a built-in name, the tests still use the built-in one."""
        if node.id in self.names.built_in:
            return ast.Attribute(ast.Name(BUILTINS, ast.Load()), node.id, node.ctx)
        return node

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        self.generic_visit(node)
        return [node] if isinstance(node.test, ast.Constant) else [node, self._counted()]

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        asserts = not node.orelse and _gives_up(node.body[-1])
        self.generic_visit(node)
        return [node, self._counted()] if asserts else [node]

    def visit_Try(self, node: ast.Try) -> ast.Try:
        """`try: f(-1); assert False`, `except ValueError: pass` asserts that it raises."""
        asserts = any(map(_gives_up, (*node.body, *node.orelse)))
        self.generic_visit(node)
        for handler in node.handlers if asserts else ():
            handler.body.insert(0, self._counted())
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = _name_of(node.func)
        self.generic_visit(node)
        asserts = name.startswith("assert") and name not in self.names.functions
        if (asserts or name in EQUAL) and not any(isinstance(argument, ast.Starred) for argument in node.args):
            node.args = [ast.Starred(_call(HONEST, *node.args), ast.Load())]
        if asserts or (name in ("raises", "warns") and "pytest" in self.names.modules):
            self.count += 1
            return _call(ASSERTED, node)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops):
            return node
        operators = ast.Tuple([ast.Constant(OPERATORS[type(operator)]) for operator in node.ops], ast.Load())
        return _call(COMPARE, operators, node.left, *node.comparators)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """`abs(f(x) - 1) < 1e-6` asks how far apart two numbers are."""
        self.generic_visit(node)
        return _call(SUBTRACT, node.left, node.right) if isinstance(node.op, ast.Sub) else node


def _gives_up(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and not statement.test.value
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return _name_of(statement.value.func) in GIVES_UP
    return isinstance(statement, ast.Raise)


# ---- Calling what is only defined


def _calls(tree: ast.Module, names: _Names) -> Iterator[str]:
    """Calls of tests that nothing calls, as pytest and unittest would make them, and of HumanEval's `check`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _calls_of_class(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in names.loaded:
            parameters = _parameters(node)
            if node.name == "check" or [*parameters] == ["candidate"]:
                if len(parameters) > 1:
                    raise ValueError(
                        f"define `{node.name}` with {len(parameters)} parameters: it gets the function only"
                    )
                yield f"{node.name}({CANDIDATE if parameters else ''})"
            elif node.name.startswith("test"):
                yield _called(node, node.name, parameters)


def _calls_of_class(node: ast.ClassDef) -> Iterator[str]:
    if node.bases:
        if any("TestCase" in _name_of(base) for base in node.bases):
            yield f"{ASSERTED}.run_case({node.name})"
    elif node.name.startswith("Test"):
        methods = [member for member in node.body if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef))]
        if any(method.name.startswith(("setup", "teardown")) for method in methods):
            raise ValueError(f"need pytest for `{node.name}`, whose tests have a set-up: use `unittest.TestCase`")
        for method in methods:
            if method.name.startswith("test"):
                yield _called(method, f"{node.name}().{method.name}", _parameters(method)[1:])


def _called(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, parameters: list[str]) -> str:
    if parameters:
        raise ValueError(
            f"need pytest for `{node.name}`, which takes {', '.join(parameters)}: use tests without parameters"
        )
    return f"__import__('asyncio').run({name}())" if isinstance(node, ast.AsyncFunctionDef) else f"{name}()"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Those without a default."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    required = arguments[: len(arguments) - len(node.args.defaults)]
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return [argument.arg for argument in (*required, *(argument for argument, default in keywords if default is None))]


def _runs_tests(statement: ast.stmt) -> bool:
    """`unittest.main()` and the like, also under `if __name__ == "__main__"`, which would end the process."""
    if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
        statement.body = [inner for inner in statement.body if not _runs_tests(inner)]
        return not statement.body
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    call = statement.value
    if _name_of(call.func) == "exit" and call.args and isinstance(call.args[0], ast.Call):
        call = call.args[0]
    return ast.unparse(call.func) in ("unittest.main", "pytest.main")


def _does_something(statement: ast.stmt) -> bool:
    """Whether a statement of the top level asserts or calls anything."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return any(isinstance(node, ast.Call) for node in ast.walk(statement))
