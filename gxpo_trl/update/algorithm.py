"""Algorithm 1 of GXPO (arXiv 2605.06755), and SFPO (arXiv 2510.04072): probe, predict, reposition, correct.

GXPO probes twice and extrapolates to K steps; SFPO probes K times and extrapolates nothing. `lookahead_step` begins
where the first pass over the rollouts has left its gradient g0, and ends where the corrective gradient g_slow is ready
for the trainer's ordinary step, which is the slow correction. It holds two model-sized buffers, θ0 and g0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .extrapolation import Extrapolation, reposition, retention_and_scale
from .measurements import Measurements, StepReport
from .slices import aligned_slices
from .snapshot import Origin
from .state import TrainingState


Replay = Callable[[], None]
"""Adds up the gradient of the same rollouts at the present parameters, and leaves it in the state."""


@dataclass(frozen=True)
class LookaheadRule:
    """An update rule as data.

    Attributes:
        probes (`int`): Fast optimizer steps before the reposition.
        alpha (`float`): α, the fraction of the way to the lookahead point that is taken.
        extrapolation (`Extrapolation`, *optional*): How the probes' displacement becomes the lookahead's. `None` takes
            it as it is (SFPO).
        rollback (`bool`): Whether the optimizer's state returns to θ0's before the slow correction, instead of going
            on from the probes' (the papers).
        copies_on_host (`bool`): Whether θ0 and g0 are kept in pinned host memory, not next to the parameters.
    """

    probes: int
    alpha: float
    extrapolation: Extrapolation | None = None
    rollback: bool = False
    copies_on_host: bool = False

    @property
    def passes(self) -> int:
        """Passes over the rollouts in an active step."""
        return self.probes + 1

    @property
    def lookahead_steps(self) -> int:
        """K: the steps that the lookahead stands for."""
        return self.probes if self.extrapolation is None else self.extrapolation.lookahead_steps


@torch.no_grad()
def lookahead_step(
    state: TrainingState, replay: Replay, rule: LookaheadRule, measure: Measurements | None = None
) -> StepReport:
    """Takes one active step up to, and without, its slow correction.

    On entry g0 is in the state, unclipped. On return g_slow is, unclipped, with the parameters at θ̃. Where a gradient
    or θ̃ is not finite on any rank, the step becomes the plain one: θ0 is restored and g0 is in the state, or no
    gradient at all, so that nothing moves, if g0 itself is not finite.

    Args:
        state (`TrainingState`): Parameters, gradients and optimizer.
        replay (`Replay`): One pass over the rollouts.
        rule (`LookaheadRule`): The update rule.
        measure (`Measurements`, *optional*): What watches the step.

    Returns:
        `StepReport`: What was measured, equal on every rank.
    """
    measure = measure or Measurements(state, rule)
    origin = Origin.of(state, rule.copies_on_host, with_optimizer=rule.rollback)  # θ0, g0
    try:
        # Probe: θ1, θ2 (SFPO: up to θK), fast steps on the same rollouts.
        clips = []
        for probe in range(rule.probes):
            if probe > 0:
                one_pass(state, replay)  # g_k = ∇L(θ_k)
            norm, clip = state.clip_gradients()
            measure.probe(norm)
            if not math.isfinite(norm):
                return _fall_back(state, origin, measure)
            clips.append(clip)
            state.step()

        _reposition(state, origin, clips[0], rule, measure)  # θ̃ = θ0 + α (θK - θ0)

        # Correct: the true gradient at θ̃. The trainer clips it and steps, as always.
        if rule.rollback:
            state.restore_optimizer(origin.optimizer)
        one_pass(state, replay)  # g_slow = ∇L(θ̃)
        measure.correction(origin.grad_0)
        report = measure.report()
        return report if report.is_finite else _fall_back(state, origin, measure)
    except BaseException:  # an interrupted notebook cell, memory run out: what is saved next are committed weights
        origin.return_to(state, alone=True)
        raise


def _reposition(
    state: TrainingState, origin: Origin, clip_0: float, rule: LookaheadRule, measure: Measurements
) -> None:
    """Predicts θK from g0, g1 and θ2 - θ0, and moves to θ̃, coordinate by coordinate."""
    shards = aligned_slices(state.parameters(), origin.theta_0, origin.grad_0, state.gradients())
    for part, (theta, *copies) in shards:
        dtype = torch.promote_types(theta.dtype, torch.float32)
        theta_0, grad_0, grad_1 = (copy.to(theta.device, dtype, non_blocking=True) for copy in copies)
        displacement = theta.to(dtype) - theta_0
        if rule.extrapolation is None:
            retention = scale = active = torch.ones_like(displacement)
        else:  # of the gradients that the optimizer consumed: g1 is clipped already
            retention, scale, active = retention_and_scale(grad_0 * clip_0, grad_1, rule.extrapolation)
        theta.copy_(reposition(theta_0, displacement, scale, rule.alpha))
        measure.extrapolation(part, displacement, retention, scale, active)


def one_pass(state: TrainingState, replay: Replay) -> None:
    """Replaces the gradients by those of a new pass at the parameters as they are now."""
    state.publish()
    state.clear_gradients()
    with torch.enable_grad():
        replay()


def _fall_back(state: TrainingState, origin: Origin, measure: Measurements) -> StepReport:
    """Back to θ0 and g0: the step becomes the plain one."""
    origin.return_to(state)
    if not math.isfinite(measure.norms[0]):
        state.clear_gradients()
    return StepReport(passes=len(measure.norms), fell_back=True)
