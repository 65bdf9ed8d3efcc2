"""The programme of one active step: probe, probe, extrapolate and reposition (arXiv 2605.06755, algorithm 1).

`lookahead_step` begins where pass 1 has left its gradient and ends where the corrective gradient lies ready for the
trainer's ordinary step. It holds two model-sized buffers, θ0 and g0, and, under `rollback`, the optimizer's state.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .engines import OptimizerSnapshot, TorchEngine
from .extrapolation import Extrapolation, reposition, retention_and_scale


TOTALS = (
    "dot_0_slow",
    "coordinates",
    "active",
    "lost",
    "lost_squared",
    "scale",
    "two_steps_squared",
    "lookahead_squared",
    "scale_max",
)
"""What an active step adds up over slices, shards and ranks; `scale_max`, the last, is a maximum. `lost` is r - 1."""

SLICE_SIZE = 2**20  # coordinates that are extrapolated at a time, so that temporaries stay small beside the model


@dataclass(frozen=True)
class LookaheadRule:
    """An update rule as data.

    Attributes:
        probes (`int`): Fast optimizer steps before the reposition; GXPO takes 2 whatever K is.
        extrapolation (`Extrapolation`): How the observed displacement becomes θ̃.
        rollback (`bool`): Whether the optimizer's state returns to θ0's before the slow correction.
    """

    probes: int
    extrapolation: Extrapolation
    rollback: bool = False

    @property
    def passes(self) -> int:
        """Passes over the window in an active step."""
        return self.probes + 1


@dataclass
class LookaheadReport:
    """What one active step measured, equal on every rank.

    Attributes:
        passes (`int`): Passes over the window, the first included.
        fell_back (`bool`): Something was not finite, and the step became the plain one; what follows is then `None`.
        grad_norm_0, grad_norm_1, grad_norm_slow (`float`): Gradient norms at θ0, θ1 and θ̃, before clipping.
        cos_0_slow (`float`): Cosine of g0 and g_slow.
        retention_mean, retention_std (`float`): Of the clamped retention ratio over active coordinates.
        scale_mean, scale_max (`float`): Of the scale over all coordinates.
        inactive_fraction (`float`): Fraction of coordinates with |g0| ≤ δ.
        displacement_ratio (`float`): ‖θK - θ0‖ / ‖θ2 - θ0‖.
        effective_multiplier (`float`): ‖θ̃ - θ0‖ / ‖θ2 - θ0‖, which is α times the above.
    """

    passes: int
    fell_back: bool = False
    grad_norm_0: float | None = None
    grad_norm_1: float | None = None
    grad_norm_slow: float | None = None
    cos_0_slow: float | None = None
    retention_mean: float | None = None
    retention_std: float | None = None
    scale_mean: float | None = None
    scale_max: float | None = None
    inactive_fraction: float | None = None
    displacement_ratio: float | None = None
    effective_multiplier: float | None = None


@dataclass
class _Origin:
    """Where an active step started, and the way back to it."""

    theta_0: list[torch.Tensor]
    grad_0: list[torch.Tensor | None]
    optimizer: OptimizerSnapshot | None

    @classmethod
    def of(cls, engine: TorchEngine, rollback: bool) -> "_Origin":
        return cls(
            theta_0=[shard.clone() for shard in engine.parameters()],
            grad_0=[None if grad is None else grad.clone() for grad in engine.gradients()],
            optimizer=engine.snapshot_optimizer() if rollback else None,
        )

    def return_to(self, engine: TorchEngine) -> None:
        """Restores θ0, g0 and, under `rollback`, the optimizer's state."""
        for shard, theta_0 in zip(engine.parameters(), self.theta_0, strict=True):
            shard.copy_(theta_0)
        engine.publish()
        if self.optimizer is not None:
            engine.restore_optimizer(self.optimizer)
        engine.set_gradients(self.grad_0)


@torch.no_grad()
def lookahead_step(engine: TorchEngine, replay: Callable[[], None], rule: LookaheadRule) -> LookaheadReport:
    """Takes one active step up to, and without, its slow correction.

    The gradient g0 of pass 1 lies in the engine when this is called, unclipped; g_slow does when it returns,
    unclipped, with the parameters at θ̃. When a gradient or θ̃ is not finite on any rank, the step becomes the plain
    one: θ0 is restored and g0 lies in the engine, or no gradient at all, so that nothing moves, if g0 itself is not
    finite.

    Args:
        engine (`TorchEngine`): Where parameters, gradients and optimizer state are.
        replay (`Callable[[], None]`): Runs one pass over the window at the present parameters, and leaves its
            gradient in the engine.
        rule (`LookaheadRule`): The update rule.

    Returns:
        `LookaheadReport`: What was measured.
    """
    origin = _Origin.of(engine, rule.rollback)
    try:
        return _probe_and_reposition(engine, replay, rule, origin)
    except (
        BaseException
    ):  # an interrupted notebook cell, memory run out: what is saved afterwards are committed weights
        origin.return_to(engine)
        raise


def _probe_and_reposition(
    engine: TorchEngine, replay: Callable[[], None], rule: LookaheadRule, origin: _Origin
) -> LookaheadReport:
    norms, clip_0 = [], 1.0
    for probe in range(rule.probes):
        if probe > 0:
            engine.clear_gradients()
            _run(replay)
        norm, clip = engine.clip_gradients()
        norms.append(norm)
        clip_0 = clip if probe == 0 else clip_0
        if not math.isfinite(norm):
            return _fall_back(engine, origin, norms)
        engine.step()

    totals = _reposition_shards(engine, origin, clip_0, rule.extrapolation)
    engine.publish()
    if origin.optimizer is not None:
        engine.restore_optimizer(origin.optimizer)
    engine.clear_gradients()
    _run(replay)

    norms.append(engine.gradient_norm())
    totals[TOTALS.index("dot_0_slow")] = _dot(engine, origin.grad_0)
    totals = _combine(engine.gather_over_shards(totals))
    summed = dict(zip(TOTALS, totals.tolist(), strict=True))
    if not (math.isfinite(summed["lookahead_squared"]) and math.isfinite(norms[-1])):
        return _fall_back(engine, origin, norms)
    return _report(norms, summed, rule.extrapolation.reposition_alpha)


def _run(replay: Callable[[], None]) -> None:
    with torch.enable_grad():
        replay()


def _fall_back(engine: TorchEngine, origin: _Origin, norms: list[float]) -> LookaheadReport:
    origin.return_to(engine)
    if not math.isfinite(norms[0]):
        engine.clear_gradients()
    return LookaheadReport(passes=len(norms), fell_back=True)


def _reposition_shards(engine: TorchEngine, origin: _Origin, clip_0: float, rule: Extrapolation) -> torch.Tensor:
    """Moves every parameter from θ2 to θ̃, in place, and returns the `TOTALS` of the local shards, shape (n,)."""
    totals = []
    shards = zip(engine.parameters(), origin.theta_0, origin.grad_0, engine.gradients(), strict=True)
    for theta, theta_0, grad_0, grad_1 in shards:
        grad_0 = torch.zeros_like(theta_0) if grad_0 is None else grad_0
        grad_1 = torch.zeros_like(theta_0) if grad_1 is None else grad_1
        for part in _aligned_slices(theta, theta_0, grad_0, grad_1):
            totals.append(_reposition_slice(*part, clip_0, rule).to(engine.device, torch.float32))
    return _combine(torch.stack(totals))


def _aligned_slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of equally shaped tensors, cut at the same rows into at most about `SLICE_SIZE` elements each."""
    if tensors[0].numel() <= SLICE_SIZE or tensors[0].dim() == 0:
        return iter([tensors])
    rows = max(1, SLICE_SIZE * tensors[0].shape[0] // tensors[0].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _reposition_slice(
    theta: torch.Tensor,
    theta_0: torch.Tensor,
    grad_0: torch.Tensor,
    grad_1: torch.Tensor,
    clip_0: float,
    rule: Extrapolation,
) -> torch.Tensor:
    """Writes θ̃ over θ2 in `theta`, and returns this slice's `TOTALS`, shape (n,).

    `grad_0` is as pass 1 left it, `grad_1` as the optimizer consumed it.
    """
    dtype = torch.promote_types(theta.dtype, torch.float32)
    start = theta_0.to(dtype)
    displacement = theta.to(dtype) - start
    retention, scale, active = retention_and_scale(grad_0.to(dtype) * clip_0, grad_1.to(dtype), rule)
    theta.copy_(reposition(start, displacement, scale, rule.reposition_alpha))
    lost = retention - 1.0  # 0 where not active; centred, because most ratios are close to 1
    return torch.stack(
        [
            scale.new_zeros(()),
            scale.new_full((), scale.numel()),
            active.sum(),
            lost.sum(),
            lost.square().sum(),
            scale.sum(),
            displacement.square().sum(),
            (scale * displacement).square().sum(),
            scale.max(),
        ]
    )


def _combine(rows: torch.Tensor) -> torch.Tensor:
    """Rows of `TOTALS`, shape (m, n), to one, shape (n,): the last column by its maximum, the others by their sum."""
    return torch.cat([rows[:, :-1].sum(0), rows[:, -1:].amax(0)])


def _dot(engine: TorchEngine, grad_0: list[torch.Tensor | None]) -> torch.Tensor:
    pairs = zip(engine.gradients(), grad_0, strict=True)
    dots = [torch.sum(a.float() * b.float()).to(engine.device) for a, b in pairs if a is not None and b is not None]
    return torch.stack(dots).sum() if dots else torch.zeros((), device=engine.device)


def _report(norms: list[float], totals: dict[str, float], alpha: float) -> LookaheadReport:
    active, coordinates = totals["active"], totals["coordinates"]
    lost_mean = totals["lost"] / active if active else None
    displacement_ratio = _ratio(math.sqrt(totals["lookahead_squared"]), math.sqrt(totals["two_steps_squared"]))
    return LookaheadReport(
        passes=len(norms),
        grad_norm_0=norms[0],
        grad_norm_1=norms[1],
        grad_norm_slow=norms[-1],
        cos_0_slow=_ratio(totals["dot_0_slow"], norms[0] * norms[-1]),
        retention_mean=1.0 + lost_mean if active else None,
        retention_std=math.sqrt(max(totals["lost_squared"] / active - lost_mean**2, 0.0)) if active else None,
        scale_mean=totals["scale"] / coordinates,
        scale_max=totals["scale_max"],
        inactive_fraction=1.0 - active / coordinates,
        displacement_ratio=displacement_ratio,
        effective_multiplier=None if displacement_ratio is None else alpha * displacement_ratio,
    )


def _ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, or `None` where it says nothing: no displacement while the learning rate is 0, a zero gradient."""
    return numerator / denominator if denominator > 0 else None
