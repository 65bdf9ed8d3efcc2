"""Measurements that could refute the method: where K real steps lead, and how far a gradient repeats itself.

Both run from θ0 on the same rollouts and leave no trace. They cost K further passes (one for the noise floor, K - 1
for the real steps, which begin with g0) and, for their time, copies of the parameters, of the gradient, of the
optimizer's state and of the real displacement.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .engines import Engine
from .extrapolation import Extrapolation, retention_and_scale
from .snapshot import Origin, Storage


CANDIDATES = ("", "_reposition", "_linear", "_two_step")
"""θK, θ̃, the two-step point scaled by K / 2, and the two-step point itself: suffixes of their metrics."""


@dataclass
class Truth:
    """What real steps and a repeated gradient showed.

    Attributes:
        displacements (`list[torch.Tensor]`): θK_true - θ0, one a local shard.
        noise (`dict[str, float]`): `noise_cos` and `noise_retention_std` of the same gradient computed twice.
    """

    displacements: list[torch.Tensor]
    noise: dict[str, float]


def measure_truth(engine: Engine, replay: Callable[[], None], rule: Extrapolation) -> Truth | None:
    """Computes g0 a second time and takes K real optimizer steps, then restores everything.

    Args:
        engine (`Engine`): Holds θ0 and g0, as pass 1 left it, before and after.
        replay (`Callable[[], None]`): Runs one pass over the window at the present parameters.
        rule (`Extrapolation`): K, and the bounds of the retention ratio.

    Returns:
        `Truth | None`: `None` if a gradient on the way was not finite.
    """
    start = Origin.of(engine, Storage(), keeps_grad=True, rollback=True)
    try:
        truth = _repeat_and_step(engine, replay, rule, start)
    except BaseException:
        start.return_to(engine, alone=True)
        raise
    start.return_to(engine)
    return truth


def _repeat_and_step(engine: Engine, replay: Callable[[], None], rule: Extrapolation, start: Origin) -> Truth | None:
    engine.clear_gradients()
    replay()
    noise = _noise(engine, start, rule)
    engine.set_gradients([None if g is None else g.clone() for g in start.grad_0])
    for step in range(rule.lookahead_steps):
        if step > 0:
            engine.publish()
            engine.clear_gradients()
            replay()
        norm, _ = engine.clip_gradients()
        if not math.isfinite(norm):
            return None
        engine.step()
    displacements = [p - theta_0 for p, theta_0 in zip(engine.parameters(), start.theta_0, strict=True)]
    return Truth(displacements, noise)


def _noise(engine: Engine, start: Origin, rule: Extrapolation) -> dict[str, float]:
    totals = torch.zeros(6, dtype=engine.totals_dtype, device=engine.device)
    threshold = rule.threshold(engine.gradient_norm() / math.sqrt(engine.coordinates()))
    for again, grad_0 in zip(engine.gradients(), start.grad_0, strict=True):
        if again is None or grad_0 is None:
            continue
        retention, _, active = retention_and_scale(grad_0.float(), again.float(), rule, threshold)
        lost = retention - 1.0
        sums = [(again * grad_0).sum(), again.square().sum(), grad_0.square().sum()]
        totals += torch.stack([*sums, active.sum(), lost.sum(), lost.square().sum()]).to(totals)
    dot, again, first, active, lost, lost_squared = engine.gather_over_shards(totals).sum(0).tolist()
    if not (active and again and first):
        return {}
    spread = max(lost_squared / active - (lost / active) ** 2, 0.0)
    return {"noise_cos": dot / math.sqrt(again * first), "noise_retention_std": math.sqrt(spread)}


def candidate_totals(
    displacement: torch.Tensor, scale: torch.Tensor | float, true: torch.Tensor, alpha: float, linear: float
) -> torch.Tensor:
    """Sums over one slice, shape (13,): ‖true‖², then of each candidate ‖c - true‖², c · true and ‖c‖².

    Args:
        displacement (`torch.Tensor`): What the probes moved, θ2 - θ0.
        scale (`torch.Tensor` or `float`): The extrapolation's factor.
        true (`torch.Tensor`): θK_true - θ0.
        alpha (`float`): α.
        linear (`float`): K over the number of probes.
    """
    totals = [true.square().sum()]
    for candidate in (scale * displacement, alpha * scale * displacement, linear * displacement, displacement):
        totals += [(candidate - true).square().sum(), (candidate * true).sum(), candidate.square().sum()]
    return torch.stack(totals)


def lookahead_errors(totals: list[float], alpha: float) -> dict[str, float]:
    """The totals of `candidate_totals` over the model as metrics: relative errors and cosines of each candidate.

    `true_abs_error` is ‖θK - θK_true‖, and `true_abs_error_reposition` its part that the reposition takes over, α of
    it: the columns of the paper's Table 6 with 1 - `true_cosine`.
    """
    true_squared, *sums = totals
    if true_squared <= 0:
        return {}
    errors = {"true_abs_error": math.sqrt(sums[0]), "true_abs_error_reposition": alpha * math.sqrt(sums[0])}
    for i, suffix in enumerate(CANDIDATES):
        error_squared, dot, candidate_squared = sums[3 * i : 3 * i + 3]
        errors[f"true_error{suffix}"] = math.sqrt(error_squared / true_squared)
        if candidate_squared > 0:
            errors[f"true_cosine{suffix}"] = dot / math.sqrt(candidate_squared * true_squared)
    return errors
