"""Python code, run against given tests in a process of its own.

The limits here stop accidents: endless loops, memory that grows, files that fill a disk. They are no security
boundary. Code runs as the user who trains, can read what that user can, and will find a way out if it is meant to.
Where that matters, run the whole training in a container or a virtual machine without secrets. Therefore nothing runs
unless the environment says `GXPO_ALLOW_CODE_EXECUTION=1`.

Where Linux lets a user make namespaces, the code has no network, and all that it started ends with it. Elsewhere it
runs with the network, and children that leave its session may outlive it.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .rewards import text_of


PERMISSION = "GXPO_ALLOW_CODE_EXECUTION"
PROCESSES = 16  # beyond those that the user has
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

_RUNNER = """\
import ctypes, os, resource, signal, sys, types

def isolate():
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

def limit(seconds, memory, file_size, processes):
    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NOFILE": 64, "CORE": 0, "NPROC": processes}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))

def main():
    *limits, secret, result = map(int, sys.argv[1:])
    sys.argv[1:] = []
    code, tests = (open(name, encoding="utf-8").read() for name in ("code.py", "tests.py"))
    for name in ("code.py", "tests.py", "runner.py"):
        os.unlink(name)
    isolate()
    limit(*limits)
    # What the code could replace is taken before it runs, and what it must not know is read after the tests.
    run, translate, read, write = exec, compile, os.read, os.write
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    run(translate(code, "code.py", "exec"), vars(module))
    run(translate(tests, "tests.py", "exec"), vars(module))
    write(result, read(secret, 64))

main()
"""
"""Passes only if it comes to its last line, where it repeats what it reads there."""


def extract_code(completion: str) -> str | None:
    """The last fenced Python block of a completion, or `None`."""
    blocks = _FENCED.findall(completion)
    return blocks[-1] if blocks else None


def run_tests(
    code: str, tests: str, time_limit: float = 10.0, memory_limit: int = 2**30, file_limit: int = 2**20
) -> float | None:
    """Runs code, and then tests that see its names.

    Args:
        code, tests (`str`): Python sources; a test fails by raising.
        time_limit (`float`): Seconds, of the clock and of the processor.
        memory_limit, file_limit (`int`): Bytes, of the address space and of a file written.

    Returns:
        `float`, *optional*: 1.0 if the tests come to their end, 0.0 if not; `None` if no process could be started.
    """
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as result:
        for name, text in (("code.py", code), ("tests.py", tests), ("runner.py", _RUNNER)):
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        secret, writer = os.pipe()
        os.write(writer, token)
        os.close(writer)
        limits = [max(int(time_limit), 1) + 1, memory_limit, file_limit, _process_limit()]
        try:
            process = _start(folder, [*limits, secret, result.fileno()])
        except OSError:
            return None
        finally:
            os.close(secret)
        _wait(process, time_limit)
        return float(process.returncode == 0 and os.pread(result.fileno(), 64, 0) == token)


def _start(folder: str, arguments: list[int]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "runner.py", *map(str, arguments)],
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
    """Waits for the process as long as it may take, and ends all of its session."""
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
    """Raises a ValueError unless the environment allows model-written code to be run."""
    if os.environ.get(PERMISSION) != "1":
        raise ValueError(
            "`code_reward` runs what a model writes, as you, on this machine. If that is what you want, set "
            f"{PERMISSION}=1."
        )


def code_reward(completions: list, tests: list[str], **kwargs: Any) -> list[float | None]:
    """1.0 where the last Python block of a completion passes its tests, else 0.0.

    Args:
        completions (`list`): In TRL's form.
        tests (`list[str]`): Python sources, one a completion: the dataset's column `tests`.

    Raises:
        ValueError: Unless the environment allows it.
    """
    check_permission()
    sources = [extract_code(text_of(completion)) for completion in completions]
    return [0.0 if code is None else run_tests(code, test) for code, test in zip(sources, tests, strict=True)]
