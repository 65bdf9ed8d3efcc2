"""What the benchmarks share: the machine in words, and results as committed files."""

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
import trl
from torch.profiler import profile


RESULTS = Path(__file__).parent / "results"
KEEP_FREED_MEMORY = {  # glibc
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "300000000",
}


def keep_freed_memory() -> None:
    """Starts the script again with a C library that keeps freed memory, as the caching allocator of a GPU does.

    Otherwise page faults decide, and they depend on what ran before.
    """
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})


def describe_machine(threads: int) -> dict:
    """Where and with what a result was measured."""
    described = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "revision": _output_of("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join(["python", *sys.argv]),
    }
    if torch.cuda.is_available():
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        described |= {
            "machine": torch.cuda.get_device_name(),
            "devices": torch.cuda.device_count(),
            "device_memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "cuda": torch.version.cuda,
            "driver": _output_of(*query).partition("\n")[0],
        }
    return described


def _output_of(*command: str) -> str:
    """What a program prints, or nothing where it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def save_result(name: str, result: dict, path: Path | None = None) -> Path:
    """Writes `benchmarks/results/NAME.json`, or `path`. A kill meanwhile leaves what was there before."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)
    return path


class Deadline:
    """The deadline of a measurement.

    Args:
        seconds (`float`, *optional*): From now on; unset for never.
    """

    def __init__(self, seconds: float | None = None):
        self._ends = None if seconds is None else time.perf_counter() + seconds

    def is_over(self, needed: float = 0.0) -> bool:
        """Whether it has passed, or will have in `needed` seconds."""
        return self._ends is not None and time.perf_counter() + needed > self._ends


def synchronize() -> None:
    """Waits until the accelerator has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function) -> int:
    """The most that is allocated at once while `function` runs, above what was there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
