"""A lock for one run at a time in a folder, and one decision for all processes of a run."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..run_folder import LOCK_NAME


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = get_logger(__name__)

HELD = (errno.EACCES, errno.EAGAIN)
"""Error numbers for a file that another process has locked."""


def on_main_process(decide: Callable[[], Any]) -> Any:
    """Returns on each process what `decide` returned on the main process.

    Raises:
        ValueError: On each process, if `decide` raised a `ValueError` or an `OSError`.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = decide()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def hold_folder(folder: str | Path) -> Iterator[list[Path]]:
    """Holds the folder of a run: no other `gxpo train` can write into it, on this machine or, if the file system locks
    across machines, on another one.

    The lock belongs to the main process and ends with it. A new folder that is still empty is then removed.

    Yields:
        `list[Path]`: The folders that this process has made for it, the deepest first.

    Raises:
        ValueError: If another run has the folder.
    """
    folder, file, new = Path(folder), None, []

    def take() -> None:
        nonlocal file
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # of another run, which began at the same time
                path.mkdir()
                new.insert(0, path)
        file = _lock(folder / LOCK_NAME)

    try:
        on_main_process(take)
        yield new
    finally:
        if file is not None:
            (folder / LOCK_NAME).unlink(missing_ok=True)
            file.close()
            with contextlib.suppress(OSError):  # they are usually not empty
                for path in new:
                    path.rmdir()


def _lock(path: Path):
    """The locked file. The lock belongs to this process and not to its forks."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  open during the whole run
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no fcntl")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                raise ValueError(
                    f"{path.parent} is in use by another run ({file.read() or 'which has just begun'}). Wait for its "
                    "end, or choose another `output_dir`."
                ) from error
            logger.warning(
                f"{path.parent} can't be locked ({error}): start no second run there while this one lasts, since each "
                "would write over the other."
            )
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # the run that held it has just ended and removed it
