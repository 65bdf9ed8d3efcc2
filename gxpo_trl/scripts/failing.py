"""Errors in one sentence, and removing what a failed command has created."""

import contextlib
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


MOST = 1500
"""The most characters of a sentence."""


def one_sentence(error: Exception) -> str:
    """The message of an error on one line; with its type and place, unless it is meant for the user."""
    said = " ".join(str(error).split())
    if len(said) > MOST:
        said = f"{said[:MOST]} …"
    if isinstance(error, (ValueError, OSError)) and said:
        return said
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({'/'.join(Path(frames[-1].filename).parts[-3:])}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{said and f': {said}'}{place}"


@contextlib.contextmanager
def clear_away(made: list[Path]) -> Iterator[Callable[[], None]]:
    """Removes folders at the end: after an error, Ctrl-C or the SIGTERM of a launcher.

    Args:
        made (`list[Path]`): The folders, the deepest first, that `hold_folder` has made and still holds: another run
            would lose its own.

    Yields:
        `Callable`: A function that keeps the folders.
    """
    made = list(made)
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _end) if is_main_thread else None
    try:
        yield made.clear
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, before)
        if made:
            shutil.rmtree(made[0], ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs may be in them
                for path in made[1:]:
                    path.rmdir()


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
