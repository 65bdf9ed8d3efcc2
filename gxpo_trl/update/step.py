"""The programme of one active step: probe, reposition, correct.

GXPO (arXiv 2605.06755, algorithm 1) probes twice and extrapolates to K steps; SFPO probes K times and extrapolates
nothing. `lookahead_step` begins where pass 1 has left its gradient and ends where the corrective gradient lies ready
for the trainer's ordinary step. It holds two model-sized buffers (θ0 and g0, or θ0 and θ1 where the retention ratio is
that of updates), and, under `rollback`, the optimizer's state.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .diagnostics import Truth, candidate_totals, lookahead_errors, measure_truth
from .engines import Engine
from .extrapolation import Extrapolation, optimizer_direction, reposition, retention_and_scale
from .snapshot import Origin, Storage


TOTALS = (
    "slow_squared",
    "dot_0_slow",
    "active",
    "lost",
    "lost_squared",
    "scale",
    "probes_squared",
    "lookahead_squared",
    "scale_max",
)
"""What an active step adds up over slices, shards and ranks; `scale_max`, the last, is a maximum. `lost` is r - 1."""

SLOW_TOTALS = TOTALS[:2]
"""Those of the pass at θ̃."""

SLICE_SIZE = 2**20  # coordinates that are extrapolated at a time, so that temporaries stay small beside the model


@dataclass(frozen=True)
class LookaheadRule:
    """An update rule as data.

    Attributes:
        probes (`int`): Fast optimizer steps before the reposition.
        alpha (`float`): α, the fraction of the way to the lookahead point that is taken.
        extrapolation (`Extrapolation`, *optional*): How the probes' displacement becomes the lookahead's. `None` takes
            it as it is (SFPO).
        rollback (`bool`): Whether the optimizer's state returns to θ0's before the slow correction.
        storage (`Storage`): Where the copies are kept.
    """

    probes: int
    alpha: float
    extrapolation: Extrapolation | None = None
    rollback: bool = False
    storage: Storage = Storage()

    @property
    def passes(self) -> int:
        """Passes over the window in an active step."""
        return self.probes + 1

    @property
    def lookahead_steps(self) -> int:
        """K: the steps that the lookahead stands for."""
        return self.probes if self.extrapolation is None else self.extrapolation.lookahead_steps

    @property
    def uses_updates(self) -> bool:
        """Whether the retention ratio is that of the optimizer's directions."""
        return self.extrapolation is not None and self.extrapolation.retention == "update"


@dataclass
class LookaheadReport:
    """What one active step measured, equal on every rank. `None` stands for what was not measured or says nothing.

    Attributes:
        passes (`int`): Passes over the window, the first included, those of diagnostics not.
        fell_back (`bool`): Something was not finite, and the step became the plain one; nothing else is filled in
            then.
        grad_norm_0, grad_norm_1, grad_norm_slow (`float`): Gradient norms at θ0, θ1 and θ̃, before clipping. With one
            probe there is no pass at θ1.
        cos_0_slow (`float`): Cosine of g0 and g_slow; g0 is not kept where the ratio is that of updates.
        retention_mean, retention_std (`float`): Of the clamped retention ratio over active coordinates.
        scale_mean (`float`): Of the scale over all coordinates.
        scale_max (`float`): Of the scale over active coordinates.
        inactive_fraction (`float`): Fraction of coordinates below the activity threshold.
        displacement_ratio (`float`): ‖θK - θ0‖ over what the probes moved.
        effective_multiplier (`float`): ‖θ̃ - θ0‖ over what the probes moved, which is α times the above.
        diagnostics (`dict[str, float]`): `true_*` and `noise_*`, on the steps that measure them.
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
    diagnostics: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """What was measured, by name."""
        measured = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "_" in f.name}
        del measured["fell_back"]
        return {name: value for name, value in measured.items() if value is not None} | self.diagnostics


@torch.no_grad()
def lookahead_step(
    engine: Engine, replay: Callable[[], None], rule: LookaheadRule, diagnose: bool = False
) -> LookaheadReport:
    """Takes one active step up to, and without, its slow correction.

    The gradient g0 of pass 1 lies in the engine when this is called, unclipped; g_slow does when it returns,
    unclipped, with the parameters at θ̃. When a gradient or θ̃ is not finite on any rank, the step becomes the plain
    one: θ0 is restored and g0 lies in the engine, or no gradient at all, so that nothing moves, if g0 itself is not
    finite.

    Args:
        engine (`Engine`): Where parameters, gradients and optimizer state are.
        replay (`Callable[[], None]`): Runs one pass over the window at the present parameters, and leaves its
            gradient in the engine.
        rule (`LookaheadRule`): The update rule.
        diagnose (`bool`): Whether to compare this step with real ones.

    Returns:
        `LookaheadReport`: What was measured.
    """

    def one_pass() -> None:
        with torch.enable_grad():
            replay()

    origin = Origin.of(engine, rule.storage, keeps_grad=not rule.uses_updates, rollback=rule.rollback)
    try:
        truth = None
        if diagnose:
            truth = measure_truth(engine, one_pass, rule.extrapolation or Extrapolation(rule.probes))
        return _probe_and_reposition(engine, one_pass, rule, origin, truth)
    except BaseException:  # an interrupted notebook cell, memory run out: what is saved next are committed weights
        origin.return_to(engine, alone=True)
        raise


def _probe_and_reposition(
    engine: Engine, one_pass: Callable[[], None], rule: LookaheadRule, origin: Origin, truth: Truth | None
) -> LookaheadReport:
    norms, clip_0, theta_1 = [], 1.0, None
    for probe in range(rule.probes):
        if probe > 0:
            engine.publish()
            engine.clear_gradients()
            one_pass()
        norm, clip = engine.clip_gradients()
        norms.append(norm)
        clip_0 = clip if probe == 0 else clip_0
        if not math.isfinite(norm):
            return _fall_back(engine, one_pass, origin, norms)
        engine.step()
        if rule.uses_updates and probe == 0:
            theta_1 = [rule.storage.keep(shard) for shard in engine.parameters()]

    first_norm = _update_norm(engine, origin, theta_1, rule) if rule.uses_updates else norms[0] * clip_0
    totals, errors = _reposition_shards(engine, origin, theta_1, clip_0, first_norm, rule, truth)
    del theta_1
    engine.publish()
    if origin.optimizer is not None:
        engine.restore_optimizer(origin.optimizer)
    engine.clear_gradients()
    one_pass()

    totals[: len(SLOW_TOTALS)] = _slow_totals(engine, origin.grad_0)
    gathered = engine.gather_over_shards(torch.cat([errors, totals]))
    combined = _combine(gathered).tolist()
    summed = dict(zip(TOTALS, combined[len(errors) :], strict=True))
    norms.append(math.sqrt(summed["slow_squared"]))
    if not (math.isfinite(summed["lookahead_squared"]) and math.isfinite(norms[-1])):
        return _fall_back(engine, one_pass, origin, norms)
    report = _report(norms, summed, engine.coordinates(), rule)
    if truth is not None:
        report.diagnostics = lookahead_errors(combined[: len(errors)], rule.alpha) | truth.noise
    return report


def _fall_back(engine: Engine, one_pass: Callable[[], None], origin: Origin, norms: list[float]) -> LookaheadReport:
    origin.return_to(engine)
    passes = len(norms)
    if not math.isfinite(norms[0]):
        engine.clear_gradients()
    elif origin.grad_0 is None:  # g0 was not kept: the same pass at the same point gives it again
        one_pass()
        passes += 1
    return LookaheadReport(passes=passes, fell_back=True)


def _update_norm(engine: Engine, origin: Origin, theta_1: list[torch.Tensor], rule: LookaheadRule) -> float:
    """‖d0‖ over the model, where the activity threshold depends on it."""
    if rule.extrapolation.active_threshold_relative == 0:
        return 0.0
    squares = torch.zeros(1, dtype=engine.totals_dtype, device=engine.device)
    shards = zip(engine.parameters(), origin.theta_0, theta_1, engine.step_settings(), strict=True)
    for theta, theta_0, after, settings in shards:
        for pair in _aligned_slices(theta_0, after):
            # Copies in host memory are read through the device's stream, which has written them.
            before_slice, after_slice = (t.to(theta.device, torch.float32, non_blocking=True) for t in pair)
            squares += optimizer_direction(before_slice, after_slice, *settings).square().sum().to(squares)
    return engine.gather_over_shards(squares).sum().sqrt().item()


def _reposition_shards(
    engine: Engine,
    origin: Origin,
    theta_1: list[torch.Tensor] | None,
    clip_0: float,
    first_norm: float,
    rule: LookaheadRule,
    truth: Truth | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves every parameter from where the probes left it to θ̃, in place.

    Returns:
        The `TOTALS` of the local shards, shape (n,), and those of the comparison with real steps, shape (13,), or (0,)
        without `truth`.
    """
    in_totals = {"device": engine.device, "dtype": engine.totals_dtype}
    totals = [torch.zeros(len(TOTALS), **in_totals).index_fill_(0, torch.tensor(-1, device=engine.device), -math.inf)]
    errors = [torch.zeros(0 if truth is None else 13, **in_totals)]
    rms = first_norm / math.sqrt(engine.coordinates())
    shards = engine.parameters()
    second = theta_1 or engine.gradients()
    first = origin.grad_0 or [None] * len(shards)
    true = [None] * len(shards) if truth is None else truth.displacements
    for theta, theta_0, one, two, real, settings in zip(
        shards, origin.theta_0, first, second, true, engine.step_settings(), strict=True
    ):
        missing = theta.new_zeros(()).expand(theta.shape)
        parts = [missing if tensor is None else tensor for tensor in (one, two, real)]
        for part in _aligned_slices(theta, theta_0, *parts):
            theta_slice, *others, real_slice = part
            start, displacement, retention, scale, active = _extrapolate_slice(
                theta_slice, *others, clip_0, rms, settings, rule
            )
            theta_slice.copy_(reposition(start, displacement, scale, rule.alpha))
            totals.append(_totals(displacement, retention, scale, active).to(**in_totals))
            if truth is not None:
                linear = rule.lookahead_steps / rule.probes
                compared = candidate_totals(displacement, scale, real_slice, rule.alpha, linear)
                errors.append(compared.to(**in_totals))
    return _combine(torch.stack(totals)), torch.stack(errors).sum(0)


def _extrapolate_slice(
    theta: torch.Tensor,
    theta_0: torch.Tensor,
    one: torch.Tensor,
    two: torch.Tensor,
    clip_0: float,
    rms: float,
    settings: tuple[float, float],
    rule: LookaheadRule,
) -> tuple[torch.Tensor, ...]:
    """θ0, the probes' displacement, retention, scale and activity of one slice, in fp32 at least.

    `one` is g0 as pass 1 left it. `two` is g1 as the optimizer consumed it or, where the ratio is that of updates, θ1.
    """
    dtype = torch.promote_types(theta.dtype, torch.float32)
    start, one, two = (t.to(theta.device, dtype, non_blocking=True) for t in (theta_0, one, two))
    after = theta.to(dtype)
    displacement = after - start
    if rule.extrapolation is None:
        ones = torch.ones_like(displacement)
        return start, displacement, ones, ones, ones
    if rule.uses_updates:
        one, two = optimizer_direction(start, two, *settings), optimizer_direction(two, after, *settings)
    else:
        one = one * clip_0
    threshold = rule.extrapolation.threshold(rms)
    return start, displacement, *retention_and_scale(one, two, rule.extrapolation, threshold)


def _totals(
    displacement: torch.Tensor, retention: torch.Tensor, scale: torch.Tensor, active: torch.Tensor
) -> torch.Tensor:
    """The `TOTALS` of one slice, shape (n,)."""
    lost = (retention - 1.0) * active  # centred, because most ratios are close to 1
    return torch.stack(
        [
            *scale.new_zeros(len(SLOW_TOTALS)),
            active.sum(),
            lost.sum(),
            lost.square().sum(),
            scale.sum(),
            displacement.square().sum(),
            (scale * displacement).square().sum(),
            torch.where(active.bool(), scale, -math.inf).max(),
        ]
    )


def _aligned_slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of equally shaped tensors, cut at the same rows into at most about `SLICE_SIZE` elements each.

    None of an empty tensor: a rank may hold nothing of a small parameter.
    """
    if tensors[0].numel() <= SLICE_SIZE or tensors[0].dim() == 0:
        return iter([tensors] if tensors[0].numel() else [])
    rows = max(1, SLICE_SIZE * tensors[0].shape[0] // tensors[0].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _combine(rows: torch.Tensor) -> torch.Tensor:
    """Rows of totals, shape (m, n), to one, shape (n,): the last column by its maximum, the others by their sum."""
    return torch.cat([rows[:, :-1].sum(0), rows[:, -1:].amax(0)])


def _slow_totals(engine: Engine, grad_0: list[torch.Tensor | None] | None) -> torch.Tensor:
    """The `SLOW_TOTALS` of the local shards: ‖g_slow‖² and, where g0 is kept, g0 · g_slow."""
    squared = torch.zeros((), dtype=engine.totals_dtype, device=engine.device)
    dot = squared.clone()
    for grad, first in zip(engine.gradients(), grad_0 or itertools.repeat(None), strict=False):
        if grad is None or not grad.numel():
            continue
        squared += torch.linalg.vector_norm(grad).to(squared).square()
        if first is not None:
            for grad_slice, first_slice in _aligned_slices(grad, first):
                first_slice = first_slice.to(grad.device, grad.dtype, non_blocking=True)
                dot += torch.sum(grad_slice * first_slice).to(dot)
    return torch.stack([squared, dot])


def _report(norms: list[float], totals: dict[str, float], coordinates: int, rule: LookaheadRule) -> LookaheadReport:
    displacement_ratio = _ratio(math.sqrt(totals["lookahead_squared"]), math.sqrt(totals["probes_squared"]))
    report = LookaheadReport(
        passes=len(norms),
        grad_norm_0=norms[0],
        grad_norm_1=norms[1] if rule.probes > 1 else None,
        grad_norm_slow=norms[-1],
        cos_0_slow=None if rule.uses_updates else _ratio(totals["dot_0_slow"], norms[0] * norms[-1]),
        displacement_ratio=displacement_ratio,
        effective_multiplier=None if displacement_ratio is None else rule.alpha * displacement_ratio,
    )
    active = totals["active"]
    if rule.extrapolation is not None:
        report.scale_mean = totals["scale"] / coordinates
        report.inactive_fraction = 1.0 - active / coordinates
        if active:
            report.scale_max = totals["scale_max"]
            lost_mean = totals["lost"] / active
            report.retention_mean = 1.0 + lost_mean
            report.retention_std = math.sqrt(max(totals["lost_squared"] / active - lost_mean**2, 0.0))
    return report


def _ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, or `None` where it says nothing: no displacement while the learning rate is 0, a zero gradient."""
    return numerator / denominator if denominator > 0 else None
