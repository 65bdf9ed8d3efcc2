"""*check*: whether a step that has been taken was too long, by one micro-batch of its rollouts.

The micro-batch's gradient where the step led is compared with that where it began. Nothing is taken back: the step
control makes the next steps longer or shorter. Before the first step, steps that are undone again find its length.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .algorithm import Replay, one_pass
from .measurements import StepReport, Totals
from .slices import aligned_slices
from .snapshot import Origin
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
    comparison = Comparison(state, replay)
    with at_theta_0():
        comparison.begin()
    report = comparison.end()
    state.clear_gradients()
    return report


@torch.no_grad()
def try_step(state: TrainingState, replay: Replay, origin: Origin) -> StepReport:
    """Takes the plain step, compares the gradients of a micro-batch at both of its ends, and undoes it.

    Args:
        state (`TrainingState`): At θ0 with g0, to both of which it returns.
        replay (`Replay`): A pass over the micro-batch.
        origin (`Origin`): θ0, g0, and the optimizer's state.

    Returns:
        `StepReport`: As `check_step`.
    """
    comparison = Comparison(state, replay)
    try:
        comparison.begin()
        origin.return_to(state)
        state.clip_gradients()
        state.step()
        report = comparison.end()
    except BaseException:
        origin.return_to(state, alone=True)
        raise
    origin.return_to(state)
    return report


class Comparison:
    """Of the gradients of a micro-batch at two points.

    Args:
        state (`TrainingState`): Parameters and gradients, which each pass replaces.
        replay (`Replay`): A pass over the micro-batch.
    """

    def __init__(self, state: TrainingState, replay: Replay):
        self.state, self.replay = state, replay
        self.totals = Totals(state)
        self.before: list[torch.Tensor | None] = []

    def begin(self) -> None:
        """The state is at the first point."""
        one_pass(self.state, self.replay)
        self.totals.add(before_squared=self.state.squared_norm())
        self.before = [None if g is None else g.clone() for g in self.state.gradients()]

    def end(self) -> StepReport:
        """The state is at the second point."""
        one_pass(self.state, self.replay)
        self.totals.add(after_squared=self.state.squared_norm())
        present = [(g, b) for g, b in zip(self.state.gradients(), self.before, strict=True) if b is not None]
        for _, (after, before) in aligned_slices([g for g, _ in present], [b for _, b in present]):
            self.totals.add(dot=torch.sum(before * after))
        sums = self.totals.reduce(("before_squared", "after_squared", "dot"))
        before, after = math.sqrt(sums["before_squared"]), math.sqrt(sums["after_squared"])
        if not (math.isfinite(before) and math.isfinite(after)):
            return StepReport(passes=2 if math.isfinite(before) else 1, fell_back=True)
        cosine = sums["dot"] / (before * after) if before * after > 0 else None
        return StepReport(passes=1, grad_norm_0=before, grad_norm_slow=after, cos_0_slow=cosine)
