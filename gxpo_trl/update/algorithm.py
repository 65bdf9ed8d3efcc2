"""Algorithm 1 of GXPO (arXiv 2605.06755), and SFPO (arXiv 2510.04072): probe, predict, reposition, correct.

GXPO probes twice and extrapolates to K steps: it scales the displacement, or steps the optimizer on (`phantom.py`).
SFPO probes K times and extrapolates nothing. `lookahead_step` begins where the first pass over the rollouts has left
its gradient g0, and ends where the corrective gradient g_slow is ready for the trainer's ordinary step, which is the
slow correction. It holds two model-sized buffers, θ0 and g0, and g1 while an optimizer steps that overwrites it.
"""

import math
from collections.abc import Callable

import torch

from .extrapolation import reposition, retention_and_scale
from .measurements import Measurements, StepReport
from .phantom import retention_of_model, step_and_keep, take_phantom_steps
from .rule import LookaheadRule
from .snapshot import Origin
from .state import TrainingState


Replay = Callable[[], None]
"""Adds up the gradient of the same rollouts at the present parameters, and leaves it in the state."""


@torch.no_grad()
def lookahead_step(
    state: TrainingState,
    replay: Replay,
    rule: LookaheadRule,
    measure: Measurements | None = None,
    origin: Origin | None = None,
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
        origin (`Origin`, *optional*): θ0 and g0, of a caller who keeps the way back until the slow correction is made.

    Returns:
        `StepReport`: What was measured, equal on every rank.
    """
    measure = measure or Measurements(state, rule)
    origin = origin or Origin.of(state, rule.copies_on_host, with_optimizer=rule.rollback)  # θ0, g0
    try:
        # Probe: θ1, θ2 (SFPO: up to θK), fast steps on the same rollouts.
        clips, overwrites = [], False
        for probe in range(rule.probes):
            if probe > 0:
                one_pass(state, replay)  # g_k = ∇L(θ_k)
            norm, clip = state.clip_gradients()
            measure.probe(norm)
            if not math.isfinite(norm):
                return _fall_back(state, origin, measure)
            clips.append(clip)
            if probe == 0 and rule.extrapolation is not None:
                overwrites = _step_and_compare(state)
            else:
                step_and_keep(state, overwrites)  # g1, which the prediction needs

        # Predict θK, and reposition: θ̃ = θ0 + α (θK - θ0).
        if rule.phantom_steps:
            retention = retention_of_model(state, origin, clips[0], measure)  # ρ
            take_phantom_steps(state, rule.phantom_steps, retention, overwrites)  # θK
        if rule.scales:
            _scale_and_reposition(state, origin, clips[0], rule, measure)
        else:
            _reposition(state, origin, rule, measure)

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


def _scale_and_reposition(
    state: TrainingState, origin: Origin, clip_0: float, rule: LookaheadRule, measure: Measurements
) -> None:
    """Predicts θK from g0, g1 and θ2 - θ0, and moves to θ̃, coordinate by coordinate."""
    for (part, theta, theta_0), grads in zip(origin.moves(state), origin.consumed(state, clip_0), strict=True):
        displacement = theta.to(theta_0.dtype) - theta_0
        retention, scale, active = retention_and_scale(*grads, rule.extrapolation)
        theta.copy_(reposition(theta_0, displacement, scale, rule.alpha))
        measure.probes(part, displacement)
        measure.scale(retention, scale, active)
        measure.lookahead(part, scale * displacement)


def _reposition(state: TrainingState, origin: Origin, rule: LookaheadRule, measure: Measurements) -> None:
    """Moves to θ̃ from θK, where steps have led."""
    for part, theta, theta_0 in origin.moves(state):
        displacement = theta.to(theta_0.dtype) - theta_0
        if rule.alpha != 1:
            theta.copy_(reposition(theta_0, displacement, 1.0, rule.alpha))
        if not rule.phantom_steps:
            measure.probes(part, displacement)
        measure.lookahead(part, displacement)


def _step_and_compare(state: TrainingState) -> bool:
    """Steps, and says whether that has changed this rank's gradients: some optimizers add the momentum to them."""
    before = state.squared_norm()
    state.step()
    return not torch.equal(before, state.squared_norm())


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
