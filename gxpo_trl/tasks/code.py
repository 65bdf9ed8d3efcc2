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

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .code_blocks import extract_code
from .code_tests import prepare_tests
from .rewards import text_of


PERMISSION = "GXPO_ALLOW_CODE_EXECUTION"
PROCESSES = 16  # in addition to the user's own
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
        entry_point (`str`, *optional*): The function that `check(candidate)` gets; the last of the code's if unset.

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
        entry_point (`list[str]`, *optional*): The dataset's column: the functions that must be written.
        log_metric: Provided by TRL's trainers.

    Raises:
        ValueError: Unless the environment allows it, or if tests assert nothing. The message names them.
    """
    check_permission()
    entry_points = entry_point or [None] * len(completions)
    sources = [_source_of(row) for row in tests]
    scores = [_score(*row) for row in zip(completions, sources, entry_points, strict=True)]
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


def _score(completion: Any, tests: str | None, entry_point: str | None) -> float | None:
    if tests is None:
        return None
    names = prepare_tests(tests).names or {entry_point} - {None}
    code = extract_code(text_of(completion), names)
    if code is None:
        return 0.0
    return run_tests(code, tests, entry_point=entry_point)
