"""Python code, run against given tests in a process of its own.

Code passes if its tests finish and have asserted something. An answer does not pass by exiting, printing what a test
would print, writing to every descriptor, replacing functions that the tests use, or returning objects that are equal
to everything. But tests and answer share a process: an answer that reads the frames of its callers can learn what is
expected, and one that knows these files can claim to have passed.

The limits here stop accidents: endless loops, memory that grows, files that fill a disk. They are not a security
boundary. Code runs as the user who trains, can read what that user can, and can escape if it is written to. If that
matters, run the whole training in a container or a virtual machine without secrets. Nothing runs unless the
environment has `GXPO_ALLOW_CODE_EXECUTION=1`.

If Linux lets users create namespaces, the code has no network, and all processes that it started end with it.
Elsewhere it runs with the network, and children that leave its session may outlive it.
"""

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from .code_blocks import extract_code
from .code_tests import prepare_tests
from .rewards import text_of


PERMISSION = "GXPO_ALLOW_CODE_EXECUTION"
PROCESSES = 16  # in addition to the user's own
_ENTRY_POINT = re.compile(r"[^\W\d]\w*(?:\(\))?(?:\.[^\W\d]\w*(?:\(\))?)*")
"""A name, or names and calls without arguments, joined by dots."""
_RUNNER = str(Path(__file__).with_name("code_runner.py"))


def run_tests(
    code: str,
    tests: str,
    time_limit: float = 10.0,
    memory_limit: int = 2**30,
    file_limit: int = 2**20,
    entry_point: str | None = None,
) -> float | None:
    """Runs code, and then tests that see its names.

    Args:
        code, tests (`str`): Python sources; a test fails by raising. Tests that are only defined are called
            (`prepare_tests`).
        time_limit (`float`): Seconds, of the clock and of the processor.
        memory_limit, file_limit (`int`): Bytes, of the address space and of a file written.
        entry_point (`str`, *optional*): The function that `check(candidate)` gets, which may be a method, as
            `Solution().name`; the last of the code's if unset.

    Returns:
        `float`, *optional*: 1.0 if the tests finish and asserted something, 0.0 if not; `None` if no
        process could be started.

    Raises:
        ValueError: If the tests are not Python, or can't assert anything.
    """
    prepared = prepare_tests(tests)
    job = {
        "tests": prepared.source,
        "modules": prepared.modules,
        "mentioned": sorted(prepared.mentioned),
        "patches": prepared.patches,
        "calls_candidate": prepared.calls_candidate,
        "entry_point": entry_point,
    }
    secret = secrets.token_bytes(64)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as result:
        for name, text in (("answer.py", code), ("tests.json", json.dumps(job))):
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        reader, writer = os.pipe()
        os.write(writer, secret)
        os.close(writer)
        limits = [max(int(time_limit), 1) + 1, memory_limit, file_limit, _process_limit()]
        try:
            process = _start(folder, [*limits, reader, result.fileno()])
        except OSError:
            return None
        finally:
            os.close(reader)
        _wait(process, time_limit)
        expected = bytes(a ^ b for a, b in zip(secret[:32], secret[32:], strict=True))
        return float(process.returncode == 0 and os.pread(result.fileno(), 64, 0) == expected)


def _start(folder: str, arguments: list[int]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", _RUNNER, *map(str, arguments)],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=arguments[-2:],
        start_new_session=True,
    )


def _process_limit() -> int:
    """RLIMIT_NPROC counts every process and thread of the user."""
    uid = os.getuid()
    count = sum(1 for entry in Path("/proc").glob("[0-9]*/task/*") if _owner(entry) == uid)
    return count + PROCESSES


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:  # it has ended
        return None


def _wait(process: subprocess.Popen, time_limit: float) -> None:
    """Waits for the process up to its time limit, and ends its whole session."""
    try:
        process.wait(time_limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def check_permission() -> None:
    """Raises a ValueError unless the environment allows running model-written code."""
    if os.environ.get(PERMISSION) != "1":
        raise ValueError(
            "`code_reward` runs what a model writes, as you, on this machine. If that is what you want, set "
            f"{PERMISSION}=1."
        )


def code_reward(
    completions: list,
    tests: list[str | list[str] | None],
    entry_point: list[str | None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 if the code of a completion passes its tests, else 0.0; `None` for a row without tests.

    Logs `code_failures`, the answers of the batch for which no process could be started. They score 0.

    Args:
        completions (`list`): In TRL's form.
        tests (`list`): Python sources, one a completion: the dataset's column `tests`; a list is one of lines.
        entry_point (`list[str]`, *optional*): The dataset's column: the functions that must be written, or methods, as
            `Solution().name`. A warning comes where no answer of the batch defines one.
        log_metric: Provided by TRL's trainers.

    Raises:
        ValueError: Unless the environment allows it, or if tests assert nothing. The message names them.
    """
    check_permission()
    entry_points = entry_point or [None] * len(completions)
    sources = [_source_of(row) for row in tests]
    for point in entry_points:
        _check_entry_point(point)
    codes = [_code_of(*row) for row in zip(completions, sources, entry_points, strict=True)]
    _warn_of_missing(codes, sources, entry_points)
    scores = [_score(*row) for row in zip(codes, sources, entry_points, strict=True)]
    not_run = [score is None and source is not None for score, source in zip(scores, sources, strict=True)]
    if log_metric is not None:
        log_metric("code_failures", float(sum(not_run)))
    return [0.0 if failed else score for score, failed in zip(scores, not_run, strict=True)]


def _source_of(tests: Any) -> str | None:
    """Prepares the tests of all rows, before the first answer runs."""
    if tests is None:
        return None
    source = "\n".join(tests) if isinstance(tests, list) and all(isinstance(line, str) for line in tests) else tests
    if not isinstance(source, str):
        raise ValueError(
            f"The column `tests` holds {tests!r:.60}: it takes Python sources, as text or a list of lines."
        )
    try:
        prepare_tests(source)
    except ValueError as error:
        raise ValueError(f"The column `tests` holds {source!r:.60}, which {error}.") from error
    return source


def _check_entry_point(entry_point: Any) -> None:
    if entry_point is not None and not (isinstance(entry_point, str) and _ENTRY_POINT.fullmatch(entry_point)):
        raise ValueError(
            f"The column `entry_point` holds {entry_point!r:.60}: it takes the name of a function, or "
            "`Solution().name`."
        )


def check_code_data(rows: Dataset, name: str) -> None:
    """Refuses data whose `tests` or `entry_point` could not be used, all rows at once.

    Args:
        rows (`Dataset`): The examples.
        name (`str`): What the data is called, for the message.

    Raises:
        ValueError: If there are no tests, or a row's can't be read, assert nothing, or need what is not installed. The
            message has the row.
    """
    if "tests" not in rows.column_names:
        raise ValueError(
            f"{name} has no column `tests`, which `code_reward` runs. It has {', '.join(rows.column_names)}."
        )
    entry_points = rows["entry_point"][:] if "entry_point" in rows.column_names else [None] * len(rows)
    for row, (tests, entry_point) in enumerate(zip(rows["tests"][:], entry_points, strict=True)):
        try:
            source = _source_of(tests)
            _check_entry_point(entry_point)
            missing = (
                [module for module in prepare_tests(source).needed if not _is_installed(module)] if source else ()
            )
        except ValueError as error:
            raise ValueError(f"{name}, row {row}: {error}") from error
        if missing:
            raise ValueError(
                f"{name}, row {row}: the column `tests` imports `{missing[0]}`, which is not installed, so that any "
                "code would fail. Install it; if it is the answer that is meant, call it `solution`."
            )


@lru_cache
def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _first_name(entry_point: str) -> str:
    return re.match(r"\w+", entry_point)[0]


def _code_of(completion: Any, tests: str | None, entry_point: str | None) -> str | None:
    if tests is None:
        return None
    names = prepare_tests(tests).names or (set() if entry_point is None else {_first_name(entry_point)})
    return extract_code(text_of(completion), names)


def _warn_of_missing(codes: list[str | None], sources: list[str | None], entry_points: list[str | None]) -> None:
    """Warns of a function that several answers, and no one of them, should have defined: it may be misspelled."""
    for point in set(entry_points) - {None}:
        rows = zip(codes, sources, entry_points, strict=True)
        given = [
            code for code, tests, of_row in rows if of_row == point and code and prepare_tests(tests).calls_candidate
        ]
        if len(given) > 1 and not any(re.search(rf"\b{_first_name(point)}\b", code) for code in given):
            warnings.warn(
                f"None of {len(given)} answers defines `{_first_name(point)}`, which the column `entry_point` names, "
                "and all of them score 0. The prompt must ask for a function of that name.",
                stacklevel=3,
            )


def _score(code: str | None, tests: str | None, entry_point: str | None) -> float | None:
    if tests is None:
        return None
    return 0.0 if code is None else run_tests(code, tests, entry_point=entry_point)
