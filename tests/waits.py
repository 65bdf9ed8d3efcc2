"""Where Python waits for the accelerator in a step: found on any device, and counted by who asks."""

import sys
import warnings
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"}
"""Methods of a tensor that need its values on the host."""
PACKAGES = ("gxpo_trl", "trl", "transformers", "accelerate", "deepspeed", "peft")
RUNTIME = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "Memcpy HtoD")

DESIGN = {
    # Which rows have an advantage, in pass 1 and in replays; how wide rows are; where a micro-batch's columns end.
    "gxpo_trl.rollout.compaction:_contributing": 2,
    "gxpo_trl.rollout.compaction:compact": 2,
    "gxpo_trl.rollout.compaction:prune": 1,
    "gxpo_trl.rollout.compaction:partition": 3,
    "gxpo_trl.rollout.compaction:take": 12,
    # Whether all ranks have the same layout; tokens and rows, for the log.
    "gxpo_trl.trainer.layout:agree": 1,
    "gxpo_trl.trainer.layout:of": 1,
    # The norm of each probe's gradient, which says whether it is finite, and what it was multiplied with.
    "gxpo_trl.engines.replicated:clip_gradients": 4,
    "gxpo_trl.engines.base:gradient_norm": 2,
    # All that the step reports, at once.
    "gxpo_trl.update.measurements:reduce": 1,
}
"""Places of the package that may read values in an active step of GXPO, and how often, with two micro-batches."""

COPIES = {
    "gxpo_trl.rollout.compaction:_choose": 2,
    "gxpo_trl.rollout.compaction:take": 12,
    "gxpo_trl.trainer.layout:agree": 1,
    "gxpo_trl.trainer.layout:of": 1,
}
"""Where torch may warn, besides: a small tensor is made on the host and sent. Read in the code, not found by a run."""


class CountingReads(TorchFunctionMode):
    """Notes each read of a tensor's values, by the innermost function of a package that led to it."""

    def __init__(self):
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in READS and not _is_on_host(args):
            self.sites[site_of(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def _is_on_host(args) -> bool:
    """Whether there is an accelerator, and the tensor is not on it: what optimizers count steps with, for example."""
    return torch.cuda.is_available() and len(args) > 0 and torch.is_tensor(args[0]) and args[0].device.type == "cpu"


def site_of(frame) -> str:
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in PACKAGES:
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class WatchingOneStep(TrainerCallback):
    """Counts, in one step of a run, reads from Python and, with CUDA, what torch and its profiler see.

    Args:
        step (`int`): The number of steps before it.

    Attributes:
        reads (`dict[str, int]`): Reads by place.
        warned (`dict[str, int]`): Waits that torch warns of, by place; with CUDA alone.
        runtime (`dict[str, int]`): Calls and copies of the CUDA runtime.
    """

    def __init__(self, step: int):
        self.step = step
        self.reads, self.warned, self.runtime = {}, {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        self._warned: Counter[str] = Counter()
        if torch.cuda.is_available():
            self._catching = warnings.catch_warnings()
            self._catching.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._show
            torch.cuda.synchronize()
            self._profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]).__enter__()
            torch.cuda.set_sync_debug_mode("warn")
        self._counting = CountingReads()
        self._counting.__enter__()

    def _show(self, message, *args, **kwargs):
        if "synchroniz" in str(message):
            self._warned[site_of(sys._getframe(1))] += 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step + 1:
            return
        self._counting.__exit__(None, None, None)
        self.reads = dict(self._counting.sites)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            self._profiler.__exit__(None, None, None)
            self._catching.__exit__(None, None, None)
            self.warned = dict(self._warned)
            names = Counter(event.name for event in self._profiler.events())
            self.runtime = {r: sum(n for name, n in names.items() if name.startswith(r)) for r in RUNTIME}


def unexpected(reads: dict[str, int], warned: dict[str, int] | None = None) -> list[str]:
    """Places of the package that are not in the design, or more often: of reads, and of what torch warned of."""
    found = []
    for what, sites, further in (("read", reads, {}), ("torch warned of", warned or {}, COPIES)):
        for site, times in sites.items():
            design = DESIGN.get(site, 0) + further.get(site, 0)
            if site.startswith("gxpo_trl.") and times > design:
                found.append(f"{site} ({what} {times} times, {design} in the design)")
    return found
