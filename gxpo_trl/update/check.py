"""*check*: whether a step that has been taken was too long, by one micro-batch of its rollouts.

The micro-batch's gradient where the step led is compared with that where it began. Nothing is taken back: the step
control makes the next steps longer or shorter.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .algorithm import Replay, one_pass
from .measurements import StepReport, Totals
from .slices import aligned_slices, at_least_fp32
from .state import TrainingState


@torch.no_grad()
def check_step(state: TrainingState, replay: Replay, at_theta_0: Callable[[], AbstractContextManager]) -> StepReport:
    """Compares the gradients of a micro-batch at both ends of a step. Leaves none.

    Args:
        state (`TrainingState`): At θ1, where the step led.
        replay (`Replay`): A pass over the micro-batch.
        at_theta_0 (`Callable[[], AbstractContextManager]`): Has the state at θ0 meanwhile.

    Returns:
        `StepReport`: `grad_norm_0` at θ0, `grad_norm_slow` at θ1 and their cosine, equal on every rank. One of them
            that is not finite is told as a lookahead step tells it: as a fall-back after so many passes.
    """
    totals = Totals(state)
    with at_theta_0():
        one_pass(state, replay)
        totals.add(before_squared=state.squared_norm())
        before = [None if g is None else g.clone() for g in state.gradients()]
    one_pass(state, replay)
    totals.add(after_squared=state.squared_norm())
    pairs = zip(state.gradients(), before, strict=True)  # what has no gradient at one end adds nothing
    present = [(after, other) for after, other in pairs if after is not None and other is not None]
    for _, (after, other) in aligned_slices([after for after, _ in present], [other for _, other in present]):
        totals.add(dot=torch.sum(after.to(at_least_fp32(after.dtype)) * other))
    sums = totals.reduce(("before_squared", "after_squared", "dot"))
    state.clear_gradients()
    norm_0, norm_1 = math.sqrt(sums["before_squared"]), math.sqrt(sums["after_squared"])
    if not (math.isfinite(norm_0) and math.isfinite(norm_1)):
        return StepReport(passes=2 if math.isfinite(norm_0) else 1, fell_back=True)
    cosine = sums["dot"] / (norm_0 * norm_1) if norm_0 * norm_1 > 0 else None
    return StepReport(passes=1, grad_norm_0=norm_0, grad_norm_slow=norm_1, cos_0_slow=cosine)
