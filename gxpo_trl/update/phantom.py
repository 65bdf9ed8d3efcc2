"""Phantom steps: the optimizer stepped on predicted gradients, without forward or backward passes.

GXPO's model of the gradient, a geometric one, carried through the optimizer instead of the displacement: momentum,
normalisation and weight decay do what they would do in real steps, and the optimizer's state advances with them. One
ratio serves the whole model.
"""

import itertools

import torch

from .measurements import Measurements, Totals
from .snapshot import Origin
from .state import TrainingState


def retention_of_model(state: TrainingState, origin: Origin, clip_0: float, measure: Measurements) -> float:
    """ρ = clip(⟨g0, g1⟩ / ⟨g0, g0⟩, 0, 1), of the gradients that the optimizer consumed.

    Args:
        state (`TrainingState`): At θ2, with g1 as it was stepped.
        origin (`Origin`): θ0, and g0 before clipping.
        clip_0 (`float`): What g0 was multiplied with before it was stepped.
        measure (`Measurements`): What watches the step.

    Returns:
        `float`: Over all ranks, and equal on each; 0 where g0 is 0.
    """
    totals = Totals(state)
    for (part, theta, theta_0), grads in zip(origin.moves(state), origin.consumed(state, clip_0), strict=True):
        grad_0, grad_1 = grads
        totals.add(dot=torch.sum(grad_0 * grad_1), squared=grad_0.square().sum())
        measure.probes(part, theta.to(theta_0.dtype) - theta_0, *grads)
    sums = totals.reduce(("dot", "squared"))
    measure.retention = min(max(sums["dot"] / sums["squared"], 0.0), 1.0) if sums["squared"] > 0 else 0.0
    return measure.retention


def step_and_keep(state: TrainingState, overwrites: bool) -> None:
    """Steps, and leaves the gradients as they were stepped.

    Args:
        state (`TrainingState`): With gradients that are clipped.
        overwrites (`bool`): Whether the optimizer changes gradients when it steps. A copy of them is held then.
    """
    kept = [None if g is None else g.clone() for g in state.gradients()] if overwrites else None
    state.step()
    if kept is not None:
        state.set_gradients(kept)


def take_phantom_steps(state: TrainingState, count: int, retention: float, overwrites: bool = False) -> None:
    """From θ2 to θK: steps the optimizer on ρ·g1, ρ²·g1, ….

    Args:
        state (`TrainingState`): At θ2, with g1 as it was stepped; it is scaled in place.
        count (`int`): How many steps, K - 2.
        retention (`float`): ρ.
        overwrites (`bool`): As above.
    """
    stepped = len(state.parameters())
    for _ in range(count):
        for gradient in itertools.islice(state.gradients(), stepped):
            if gradient is not None:
                gradient.mul_(retention)
        step_and_keep(state, overwrites)
