"""Model-written code, really run, within limits."""

import json
import os
import socket
import time
import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from test_scripts import recipe

from gxpo_trl.evaluation.scoring import evaluate
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks.code import check_code_data, code_reward, extract_code, run_tests


GOOD = "def double(x):\n    return 2 * x\n"
BAD = "def double(x):\n    return 3 * x\n"
TESTS = "assert double(2) == 4\nassert double('a') == 'aa'\n"

READS_AND_WRITES_EVERY_DESCRIPTOR = """\
import os
found = []
for i in range(3, 64):
    try:
        os.set_blocking(i, False)
        found.append(os.read(i, 64))
    except OSError:
        pass
for data in found:
    for i in range(3, 64):
        try:
            os.write(i, data)
        except OSError:
            pass
os._exit(0)
"""
WRITES_WHAT_FRAMES_HOLD = """\
import os, sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, bytes):
            for i in range(3, 64):
                try:
                    os.write(i, value)
                except OSError:
                    pass
    frame = frame.f_back
os._exit(0)
"""
TRACES_THE_TESTS = """\
import sys
def trace(frame, event, argument):
    return trace
def double(x):
    sys._getframe(1).f_trace = trace
    sys.settrace(trace)
    return 4
"""


def test_code_passes_if_its_tests_come_to_their_end():
    assert run_tests(GOOD, TESTS) == 1.0
    assert run_tests("def double(x):\n    return 3 * x\n", TESTS) == 0.0
    assert run_tests("this is no Python", TESTS) == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('1.0 ok passed')\nraise SystemExit",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed' * 9)\n    except OSError: pass\nos._exit(0)",
        "open('tests.py', 'w').write('')",  # the tests are read before
        "import __main__, os\nos.write(__main__.result, __main__.token)\nos._exit(0)",
        "import builtins\nbuiltins.compile = lambda *arguments: '0'",
        "import __main__\n__main__.tests = ''",
        "x = '\ud800'",
        "import sys\ndef double(x): sys.exit(0)",
        "import os\nif os.fork(): os._exit(0)\n" + BAD,
        "import atexit, os\natexit.register(lambda: os._exit(0))\n" + BAD,
        "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\n" + BAD,
        READS_AND_WRITES_EVERY_DESCRIPTOR,
        WRITES_WHAT_FRAMES_HOLD,
        TRACES_THE_TESTS,
    ],
    ids=[
        *("exit", "hard exit", "printed", "written everywhere", "tests emptied", "main module", "compile replaced"),
        *("tests replaced", "no unicode", "exit in a call", "fork", "exit at the end", "exit on failure"),
        *("descriptors", "frames", "trace"),
    ],
)
def test_passing_is_not_claimed_by_accident(code):
    assert run_tests(code, "assert double(2) == 4") == 0.0


EQUAL = "\n    def __eq__(self, other): return True\n"


@pytest.mark.parametrize(
    "code",
    [
        f"class A:{EQUAL}def double(x): return A()",
        f"class A(int):{EQUAL}def double(x): return A(1)",
        f"class A(list):{EQUAL}def double(x): return A()",
        f"class A:{EQUAL}    __module__ = 'builtins'\ndef double(x): return A()",
        f"class A(type):{EQUAL}class B(metaclass=A): pass\ndef double(x): return B",
        f"class double:{EQUAL}    def __init__(self, x): pass",
        "class double:\n    def __init__(self, x): pass\n    def __eq__(self, other): return isinstance(other, int)",
        "from unittest.mock import ANY\ndef double(x): return ANY",
    ],
    ids=["object", "number", "list", "module", "class", "named in the tests", "all numbers", "library"],
)
def test_an_object_that_is_equal_to_everything_is_not_right(code):
    assert run_tests(code, "assert double(2) == 4") == 0.0


@pytest.mark.parametrize(
    "test", ["double(2) in [4]", "[double(2)] == [4]", "not double(2) != 4", "3 < double(2) == 4"]
)
def test_nor_is_it_however_it_is_compared(test):
    """`!=` is the opposite of `==` where a class says nothing else."""
    assert run_tests(f"class A:{EQUAL}def double(x): return A()", f"assert {test}") == 0.0
    assert run_tests(GOOD, f"assert {test}") == 1.0


def test_a_number_that_is_near_to_everything_is_not_right():
    code = "class A(float):\n    def __sub__(self, o): return 0.0\n    def __float__(self): return 4.0\n"
    for of_it in ("def double(x): return A(0)", "class double(A): pass"):
        assert run_tests(code + of_it, "assert abs(double(0) - 4) < 1e-6") == 0.0
        assert run_tests(code + of_it, "import math\nassert math.isclose(double(0), 4)") == 0.0
        assert run_tests(code + of_it, CASE.replace("double(2)", "double(0)")) == 0.0


@pytest.mark.parametrize(
    "code, tests",
    [
        ("class V:\n def __init__(s, x): s.x = x\n def __eq__(s, o): return isinstance(o, V) and s.x == o.x\n"
         " def __sub__(s, o): return V(s.x - o.x)\ndef make(x): return V(x)",
         "assert make(1) == make(1) != make(2)\nassert V(3) - V(1) == V(2) and [V(1)] == [make(1)] and V(1) != 3"),
        ("class Money:\n def __init__(s, x): s.x = x\n def __eq__(s, o): return s.x == getattr(o, 'x', o)",
         "assert Money(5) == 5 and Money(5) in [5]"),
        ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
         "assert f() == (1, 2) and f().x == 1"),
        ("from fractions import Fraction\ndef f(): return Fraction(1, 2)",
         "assert f() == 0.5 and abs(f() - 0.5) < 1e-9"),
        ("import enum\nclass C(enum.IntEnum):\n    A = 1\ndef f(): return C.A", "assert f() == 1"),
        ("import numpy as np\ndef f(): return np.ones(2)", "assert (f() == 1).all() and (f() - 1 == 0).all()"),
        ("from collections import OrderedDict\nclass D(OrderedDict):\n def __getitem__(s, k): return 1",
         "d = D(a=1)\nassert d == {'a': 1} and d['b'] == 1"),
        ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
        ("state = 0\ndef inc():\n    global state\n    state += 1", "inc()\nassert state == 1 and 0 < state <= 1"),
        ("def f(): return int(input()) * 2", "import builtins\nbuiltins.input = lambda: '3'\nassert f() == 6"),
        ("import time\ndef f(): return time.time()",
         "from unittest.mock import patch\nwith patch('time.time', return_value=3):\n    assert f() == 3"),
    ],
    ids=["vector", "money", "tuple", "fraction", "enum", "array", "dict", "built-in", "global", "input", "mock"],
)  # fmt: skip
def test_objects_that_say_what_they_are_equal_to_may_be_right(code, tests):
    assert run_tests(code, tests) == 1.0


CASE = "import unittest\nclass Case(unittest.TestCase):\n    def test(self): self.assertEqual(double(2), 4)\n"


@pytest.mark.parametrize(
    "code, tests",
    [
        ("import math\nmath.isclose = lambda *a: True", "import math\nassert math.isclose(double(2), 4)"),
        ("import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)",
         "import math\nassert math.isclose(double(2), 4)"),
        ("import builtins\nbuiltins.abs = lambda x: 0", "assert abs(double(2) - 4) < 1e-6"),
        ("def abs(x): return 0", "assert abs(double(2) - 4) < 1e-6"),
        ("import builtins\nbuiltins.AssertionError = Exception", "assert double(2) == 4"),
        ("import unittest\nunittest.TestCase.assertEqual = lambda *a: None", CASE),
        ("import unittest\nunittest.TestCase.assertEqual.__code__ = (lambda self, a, b, msg=None: 0).__code__",
         CASE),
        ("import numpy.testing\nnumpy.testing.assert_allclose = lambda *a: None",
         "import numpy as np\nnp.testing.assert_allclose(double(2), 4)"),
    ],
    ids=["module", "sys.modules", "builtins", "global", "exception", "class", "code", "submodule"],
)  # fmt: skip
def test_what_the_tests_call_can_not_be_replaced(code, tests):
    assert run_tests(f"{code}\n{BAD}", tests) == 0.0
    in_the_call = f"def double(x):\n    import math\n    math.isclose = lambda *a: True\n    return 3 * x\n{code}\n"
    assert (
        run_tests(in_the_call, "import math\nassert math.isclose(double(0), 0) and math.isclose(double(2), 4)") == 0.0
    )


@pytest.mark.parametrize(
    "tests",
    [
        "def check(candidate):\n    assert candidate(2) == 4",
        "METADATA = {}\ndef check(f):\n    assert f(2) == 4",
        "def check(candidate):\n    assert candidate(2) == 4\ncheck(double)",
        "def test_two():\n    assert double(2) == 4",
        "async def test_two():\n    assert double(2) == 4",
        "class TestTwo:\n    def test_two(self):\n        assert double(2) == 4",
        CASE + "if __name__ == '__main__':\n    unittest.main()",
        CASE + "assert unittest.main(argv=['x'], exit=False).result.wasSuccessful()",
        "if __name__ == '__main__':\n    assert double(2) == 4",
        "def run(x, y):\n    assert double(x) == y\nrun(2, 4)",
        "for x in (1, 2):\n    assert double(x) == x + x",
        "if double(2) != 4:\n    raise Exception('wrong')",
        "try:\n    double(2)[0]\n    assert False\nexcept TypeError:\n    double(2) * 'a'",
        "import pytest\nassert double(2) == pytest.approx(4)",
        "import numpy as np\nnp.testing.assert_allclose(double(np.full(2, 2)), 4)",
    ],
)
def test_tests_are_called_and_assert(tests):
    assert run_tests(GOOD, tests) == 1.0
    assert run_tests("def double(x):\n    return 'wrong'", tests) == 0.0


def test_check_gets_the_function_of_that_name():
    code, tests = f"{GOOD}\ndef other(x):\n    return 0\n", "def check(candidate):\n    assert candidate(2) == 4"
    assert run_tests(code, tests, entry_point="double") == 1.0
    assert run_tests(code, tests) == 0.0  # the last
    assert run_tests(code, tests, entry_point="missing") == 0.0


@pytest.mark.parametrize(
    "tests, message",
    [
        ("", "assert nothing"),
        ("print(double(2))", "assert nothing"),
        ("assert True", "assert nothing"),
        ("def run():\n    assert double(2) == 4", "nothing calls"),
        ("assert double(2) ==", "can't be read"),
        ("def test_two(x):\n    assert double(x) == 4", "takes x"),
        ("class TestTwo:\n    def setup_method(self): pass\n    def test(self): assert double(2) == 4", "set-up"),
        ("def check(f, g):\n    assert f(2) == 4", "2 parameters"),
    ],
)
def test_tests_that_any_code_would_pass_are_refused(tests, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run_tests(GOOD, tests)
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    with pytest.raises(ValueError, match="^The column `tests` holds '.*" + message):
        code_reward(["no code"] * 2, [TESTS, tests])


IMPORTS = [
    "from solution import double\nassert double(2) == 4",
    "from solution import double as twice\ndef test_two():\n    assert twice(2) == 4",
    "from solution import *\nassert double(2) == 4",
    "import solution\nassert solution.double(2) == 4",
    "import solution as s\ndef test_two():\n    assert s.double(2) == 4",
    "def test_two():\n    from solution import double\n    assert double(2) == 4",
    "from answer import double\nassert double(2) == 4",
    "from __main__ import double\nassert double(2) == 4",
    CASE.replace("import unittest", "import unittest\nfrom solution import double"),
]


@pytest.mark.parametrize("tests", IMPORTS)
def test_tests_may_import_the_answer(tests, monkeypatch):
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    assert run_tests(GOOD, tests) == 1.0 and run_tests(BAD, tests) == 0.0
    assert run_tests(GOOD.replace("double", "other"), tests) == 0.0
    assert run_tests(f"{GOOD}\ndef solution(x):\n    return 0\n", tests) == 1.0  # a function of the module's name
    usage = "```python\nprint(double(2))\nclass Shown: ...\n```"
    assert code_reward([f"```python\n{GOOD}```\nUse it so:\n{usage}"], [tests]) == [1.0]


@pytest.mark.parametrize("module", ["solution", "answer"])
@pytest.mark.parametrize("named", [False, True])
def test_who_imports_the_answer_does_not_trust_it(module, named):
    lies = f"class Liar:\n    __module__ = '{module}'\n    __eq__ = lambda self, other: other == 4\n"
    code = f"{lies}def double(x):\n    return Liar()\n" + ("def solution(): ...\n" if named else "")
    assert run_tests(code, f"from {module} import double\nassert double(2) == 4") == 0.0


METHOD = "class Solution:\n    def double(self, x):\n        return 2 * x\n"


def test_an_entry_point_may_be_a_method():
    tests = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(x=3) == 6"
    assert run_tests(METHOD, tests, entry_point="Solution().double") == 1.0
    assert run_tests(METHOD.replace("2 * x", "x"), tests, entry_point="Solution().double") == 0.0
    assert run_tests(METHOD, tests, entry_point="Solution().triple") == 0.0
    static = METHOD.replace("    def double(self, x)", "    @staticmethod\n    def double(x)")
    assert run_tests(static, tests, entry_point="Solution.double") == 1.0


def test_the_block_of_an_entry_point_is_the_answer_and_a_wrong_one_is_said(monkeypatch):
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    check = "def check(candidate):\n    assert candidate(2) == 4"
    said = f"```python\n{METHOD}```\nFor example:\n```python\ndef main(): ...\n```"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_reward([said] * 2, [check] * 2, entry_point=["Solution().double"] * 2) == [1.0] * 2
        assert code_reward([said, "no code"], [check] * 2, entry_point=["double", "dubble"]) == [0.0] * 2
        assert code_reward([GOOD] * 2, [TESTS] * 2, entry_point=["dubble"] * 2) == [1.0] * 2  # not asked for
    with pytest.warns(UserWarning, match="None of 2 answers defines `dubble`, which the column `entry_point` names"):
        assert code_reward([GOOD] * 2, [check] * 2, entry_point=["dubble"] * 2) == [0.0] * 2


@pytest.mark.parametrize("point", ["", "a b", "Solution(1).f", "import os", "f().", 3], ids=str)
def test_an_entry_point_that_is_no_name_is_refused(monkeypatch, point):
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    with pytest.raises(ValueError, match="The column `entry_point` holds .* it takes the name of a function"):
        code_reward([GOOD], [TESTS], entry_point=[point])


@pytest.mark.parametrize(
    "tests, message",
    [
        ("print(double(2))", "row 1: The column `tests` holds 'print.*assert nothing"),
        (3, "row 1: The column `tests` holds 3"),
        (
            "from my_module import double\nassert double(2) == 4",
            "row 1: .* imports `my_module`, which is not installed",
        ),
        ("def test():\n    import my_module.x\n    assert double(2) == 4", "imports `my_module.x`, which is not"),
        ("from .solution import double\nassert double(2) == 4", "row 1: .* import from a package"),
    ],
    ids=str,
)
def test_all_rows_of_tests_are_checked_at_once(tests, message):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "tests": [json.dumps(TESTS), json.dumps(tests)]})
    rows = rows.with_transform(
        lambda batch: {k: [json.loads(v) if k == "tests" else v for v in batch[k]] for k in batch}
    )
    with pytest.raises(ValueError, match=message):
        check_code_data(rows, "data")


def test_rows_that_can_be_used_are_let_through():
    optional = "try:\n    import my_module\nexcept ImportError:\n    my_module = None\nassert double(2) == 4"
    rows = Dataset.from_dict(
        {"tests": [TESTS, None, optional, *IMPORTS], "entry_point": [None] * 3 + ["f"] * len(IMPORTS)}
    )
    check_code_data(rows, "data")
    with pytest.raises(ValueError, match="data has no column `tests`, which `code_reward` runs. It has entry_point"):
        check_code_data(rows.remove_columns("tests"), "data")


@pytest.mark.parametrize("where", ["training", "benchmark", "evaluation"])
def test_tests_are_checked_before_a_run_begins(where, tmp_path, monkeypatch):
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Double {i}.", "tests": TESTS} for i in range(16)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[5]["tests"] = "print(double(2))"
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*recipe("gxpo"), "--dataset_name", "bad.jsonl" if where == "training" else "good.jsonl"]
    words += ["--eval_strategy", "no", "--reward_funcs", "code_reward", "--output_dir", "out", "--eval_steps", "1"]
    words += ["--eval_benchmarks", "bad.jsonl"] if where == "benchmark" else []
    with pytest.raises(ValueError, match="bad.jsonl, row 5: The column `tests` holds"):
        if where == "evaluation":
            options = {"models": ["gxpo_trl/tiny"], "benchmarks": ["bad.jsonl"], "reward_funcs": ["code_reward"]}
            evaluate(EvaluationArguments(**options, output_dir="out"))
        else:
            build_trainer(parse_recipe(words))


def test_an_answer_that_makes_the_tests_assert_nothing_is_not_right():
    tests = "for value in double(2):\n    assert value == 4"
    assert run_tests("def double(x):\n    return [4]", tests) == 1.0
    assert run_tests("def double(x):\n    return []", tests) == 0.0


def test_a_demonstration_does_not_run():
    assert run_tests(f"{GOOD}\nif __name__ == '__main__':\n    print(double(int(input())))\n", TESTS) == 1.0


def test_threads_that_go_on_are_not_waited_for():
    code = f"import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n{GOOD}"
    assert run_tests(code, TESTS) == 1.0


def test_classes_of_the_code_can_be_pickled():
    code = "import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    assert run_tests(code, "assert pickle.loads(pickle.dumps(P(1))) == P(1)") == 1.0


def test_an_endless_loop_ends_with_its_children():
    marker = f"marker-{time.time()}"
    child = f"[sys.executable, '-c', 'import time; time.sleep(60)', '{marker}']"
    code = f"import subprocess, sys\nsubprocess.Popen({child})\n"
    started = time.perf_counter()
    assert run_tests(code + "while True: pass", "assert code", time_limit=1.0) == 0.0
    assert time.perf_counter() - started < 5
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(marker.encode() in command for command in commands)


def test_memory_files_and_descriptors_are_limited():
    assert run_tests("x = bytearray(2 * 2**30)", "assert len(x)") == 0.0
    assert run_tests("x = bytearray(2**20)", "assert len(x)") == 1.0
    assert run_tests("x = open('big', 'wb').write(b'0' * 2**21)", "assert x") == 0.0
    assert run_tests("x = open('small', 'wb').write(b'0' * 2**19)", "assert x") == 1.0
    assert run_tests("files = [open('f', 'w') for _ in range(100)]", "assert files") == 0.0


@pytest.mark.skipif(os.getuid() == 0, reason="root may start as many processes as it likes")
def test_processes_are_limited():
    code = "import os\nfor _ in range(200):\n    if os.fork() == 0:\n        import time; time.sleep(5)"
    assert run_tests(code, "assert os.getpid()") == 0.0


def test_the_environment_and_the_folder_are_its_own(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    tests = "assert 'HF_TOKEN' not in os.environ and os.listdir() == []"
    assert run_tests("import os", tests) == 1.0


def test_there_is_no_network_where_the_platform_can_do_without():
    server = socket.create_server(("127.0.0.1", 0))
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
    outcome = run_tests(code, "assert socket")
    server.close()
    if outcome == 1.0:
        pytest.skip("this machine lets no process leave its network")
    assert outcome == 0.0


def test_the_last_block_counts():
    assert extract_code("```python\na = 1\n```\nBetter:\n```py\nb = 2\n```") == "b = 2\n"
    assert extract_code("```\nc = 3\n```") == "c = 3\n"
    assert extract_code("no code") is None


@pytest.mark.parametrize(
    "tag", ["python", "py", "python3", "py3", "Python", " python ", "python3.11", "{.python}", "py a=1"]
)
def test_a_block_of_python_has_many_names(tag):
    assert extract_code(f"```{tag}\n{GOOD}```\nIt prints\n```\n4\n```\n```bash\ndef x\n```") == GOOD


@pytest.mark.parametrize("tag", ["pycon", "python-repl", "pyx", "python_", "cython", "text", "js"])
def test_other_languages_are_not_python(tag):
    assert extract_code(f"```{tag}\n{GOOD}```") is None


@pytest.mark.parametrize(
    "completion",
    [
        f"```python\n{GOOD}```".replace("\n", "\r\n"),
        f"~~~python\n{GOOD}~~~",
        f"````py\n{GOOD}````\n",
        f"```python\n{GOOD}",
        f"1. So:\n\n   ```python\n   {GOOD.strip().replace(chr(10), chr(10) + '   ')}\n   ```\n",
        f"- ```python\n  {GOOD.strip().replace(chr(10), chr(10) + '  ')}\n  ```\n",
        f"> ```python\n> {GOOD.strip().replace(chr(10), chr(10) + '> ')}\n> ```\n",
        f"````markdown\n```python\n{GOOD}```\n````\n",
        f"```python\ndef double(x): return 3 * x\n```python\n{GOOD}```",
        f"```json\n{{}}\n```\n```python\n{GOOD}```\n```text\n4\n```",
        f"```python\n{GOOD}```\nUsage:\n```python\nprint(double(2))\n```",
        f"```python\n{GOOD}```\n```python\nresult = double(2)\n```",
        f"<think>```python\n{BAD}```</think>\n```python\n{GOOD}```",
        f"```python\n{BAD}``` no.\n</think>\n```python\n{GOOD}```",
        GOOD,
    ],
)
def test_fences_are_read_as_models_write_them(completion):
    assert extract_code(completion, {"double"}).strip() == GOOD.strip()


@pytest.mark.parametrize(
    "completion", [f"<think>```python\n{GOOD}```", f"<think>```python\n{GOOD}```</think> Done.", ""]
)
def test_code_of_a_thought_is_no_answer(completion):
    assert extract_code(completion, {"double"}) is None


def test_a_fence_in_a_string_ends_nothing():
    code = 'def double(x):\n    """Doubles.\n\n```\ndouble(2)\n```\n    """\n    return 2 * x\n'
    assert extract_code(f"```python\n{code}```\nSo.") == code
    code = "def think(text):\n    return text.split('</think>')[1]\n"
    assert extract_code(f"```python\n{code}```") == code


def test_blocks_that_others_use_come_before_them():
    first, second = "import math\ndef half(x):\n    return x / 2\n", "def double(x):\n    return 4 * half(x)\n"
    text = f"```python\n{first}```\nand\n```python\n{second}```\nso\n```python\nprint(half(1))\n```"
    assert extract_code(text, {"double"}) == first + second
    assert extract_code(f"```python\n{BAD}```\n```python\n{GOOD}```", {"double"}) == GOOD  # a draft is not used


@pytest.mark.parametrize(
    "text", ["`", "```", "~", "> ", "- ", "<think>", "def a", '"""', "```\n", "\t", "import a,", "a" * 9, "```py\n"]
)
def test_long_completions_take_linear_time(text):
    started = time.perf_counter()
    extract_code(text * 100_000, {"double"})
    assert time.perf_counter() - started < 20


def test_nothing_runs_unless_it_is_allowed(monkeypatch):
    completion = f"```python\n{GOOD}```"
    monkeypatch.delenv("GXPO_ALLOW_CODE_EXECUTION", raising=False)
    with pytest.raises(ValueError, match="GXPO_ALLOW_CODE_EXECUTION=1"):
        code_reward([completion], [TESTS])
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    conversational = [{"role": "assistant", "content": completion}]
    assert code_reward([completion, conversational, "no code"], [TESTS] * 3) == [1.0, 1.0, 0.0]
    assert code_reward([completion] * 2, [TESTS.splitlines(), None]) == [1.0, None]
    check = "def check(candidate):\n    assert candidate(2) == 4"
    assert code_reward([f"{completion}\n```python\ndef main(): ...\n```"], [check], entry_point=["double"]) == [1.0]
    with pytest.raises(ValueError, match="holds 3: it takes"):
        code_reward([completion], [3])


def test_an_answer_that_could_not_be_run_is_wrong_and_counted(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError

    logged = {}
    monkeypatch.setenv("GXPO_ALLOW_CODE_EXECUTION", "1")
    monkeypatch.setattr("gxpo_trl.tasks.code.subprocess.Popen", fail)
    assert code_reward([GOOD, "none"], [TESTS] * 2, log_metric=logged.__setitem__) == [0.0, 0.0]
    assert logged == {"code_failures": 1.0}
