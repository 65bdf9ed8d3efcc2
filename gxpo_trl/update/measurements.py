"""What a step reports: observers of the algorithm, which change nothing, and comparisons that could refute the method.

Each adds up named totals over slices and shards; one reduction over all ranks makes the report of them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .extrapolation import Extrapolation, retention_and_scale
from .rule import LookaheadRule
from .slices import Part, aligned_slices, at_least_fp32
from .snapshot import Origin
from .state import TrainingState


CANDIDATES = ("", "_reposition", "_linear", "_two_step")
"""θK, θ̃, the two-step point scaled by K / 2, and the two-step point itself: suffixes of their metrics."""
SCALED = "_scaled"
"""The two-step point scaled by coordinate, where that is not θK."""


@dataclass
class StepReport:
    """What one active step measured, equal on every rank. `None` stands for what was not measured or says nothing.

    Attributes:
        passes (`int`): Passes over the rollouts, the first included, those of diagnostics not.
        fell_back (`bool`): Something was not finite, and the step became the plain one; nothing else is filled in
            then.
        taken_back (`bool`): The step went too far for the step control, and became a shorter, plain one.
        grad_norm_0, grad_norm_1, grad_norm_slow (`float`): Gradient norms at θ0, θ1 and θ̃, before clipping, of all
            that is clipped together. With one probe there is no pass at θ1.
        cos_0_slow (`float`): Cosine of g0 and g_slow, of the same gradients.
        retention (`float`): ρ, of phantom steps.
        retention_mean, retention_std (`float`): Of the clamped retention ratio over active coordinates.
        scale_mean (`float`): Of the scale over all coordinates.
        scale_max (`float`): Of the scale over active coordinates.
        inactive_fraction (`float`): Fraction of coordinates below the activity threshold.
        displacement_ratio (`float`): ‖θK - θ0‖ over what the probes moved.
        effective_multiplier (`float`): ‖θ̃ - θ0‖ over what the probes moved, which is α times the above.
        diagnostics (`dict[str, float]`): `true_*` and `noise_*`, on the steps that measure them.
        is_finite (`bool`): Whether θ̃ and g_slow are, on every rank.
    """

    passes: int
    fell_back: bool = False
    taken_back: bool = False
    grad_norm_0: float | None = None
    grad_norm_1: float | None = None
    grad_norm_slow: float | None = None
    cos_0_slow: float | None = None
    retention: float | None = None
    retention_mean: float | None = None
    retention_std: float | None = None
    scale_mean: float | None = None
    scale_max: float | None = None
    inactive_fraction: float | None = None
    displacement_ratio: float | None = None
    effective_multiplier: float | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)
    is_finite: bool = True

    def metrics(self) -> dict[str, float]:
        """What was measured, by name."""
        numbers = (f.name for f in dataclasses.fields(self) if f.default is None)
        measured = {name: getattr(self, name) for name in numbers}
        return {name: value for name, value in measured.items() if value is not None} | self.diagnostics


class Totals:
    """Sums and maxima by name, over slices, shards and ranks.

    Args:
        state (`TrainingState`): Says where, and in which dtype, they are added up.
    """

    def __init__(self, state: TrainingState):
        self.state = state
        self.sums: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}

    def add(self, **values: torch.Tensor) -> None:
        """Adds scalars to the sums of these names."""
        for name, value in values.items():
            value = value.to(self.state.device, self.state.totals_dtype)
            self.sums[name] = value if name not in self.sums else self.sums[name] + value

    def maximum(self, **values: torch.Tensor) -> None:
        """Raises the maxima of these names to scalars that are larger."""
        for name, value in values.items():
            value = value.to(self.state.device, self.state.totals_dtype)
            self.maxima[name] = value if name not in self.maxima else torch.maximum(self.maxima[name], value)

    def reduce(self, sums: tuple[str, ...], maxima: tuple[str, ...] = ()) -> dict[str, float]:
        """The totals of these names over all ranks, in one collective.

        The names are given, since a rank that holds no coordinate has added nothing.
        """
        empty = torch.zeros((), device=self.state.device, dtype=self.state.totals_dtype)
        local = [self.sums.get(name, empty) for name in sums]
        local += [self.maxima.get(name, empty - math.inf) for name in maxima]
        gathered = self.state.gather_over_shards(torch.stack(local))  # (ranks, n)
        combined = torch.cat([gathered[:, : len(sums)].sum(0), gathered[:, len(sums) :].amax(0)])
        return dict(zip((*sums, *maxima), combined.tolist(), strict=True))


class Measurements:
    """Watches one active step: what `lookahead_step` calls as it goes, and the report of it.

    Args:
        state (`TrainingState`): Parameters and gradients.
        rule (`LookaheadRule`): The update rule.
        real_steps (`RealSteps`, *optional*): Where real steps lead, to compare with.

    Attributes:
        retention (`float`, *optional*): ρ, of phantom steps.
    """

    SUMS = (
        *("first_squared", "slow_squared", "dot_0_slow", "active", "centered", "centered_squared", "scale"),
        *("probes_squared", "lookahead_squared"),
    )

    def __init__(self, state: TrainingState, rule: LookaheadRule, real_steps: "RealSteps | None" = None):
        self.state, self.rule, self.real_steps = state, rule, real_steps
        self.retention: float | None = None
        self.norms: list[float] = []  # of the gradients at θ0, θ1, … and θ̃
        self.totals = Totals(state)

    def probe(self, norm: float) -> None:
        """A gradient of this norm is about to be stepped."""
        self.norms.append(norm)

    def probes(self, part: Part, displacement: torch.Tensor, *grads: torch.Tensor) -> None:
        """A slice has moved by so much in the probes. Where these gradients, g0 and g1, don't scale it, the comparison
        with real steps says what that would have been worth."""
        self.totals.add(probes_squared=displacement.square().sum())
        if self.real_steps is None:
            return
        linear = self.rule.lookahead_steps / self.rule.probes  # K over the number of probes
        candidates = {"_linear": linear * displacement, "_two_step": displacement}
        if grads:
            _, scale, _ = retention_and_scale(*grads, self.rule.extrapolation)
            candidates[SCALED] = scale * displacement
        self.totals.add(**self.real_steps.compare(part, candidates))

    def scale(self, retention: torch.Tensor, scale: torch.Tensor, active: torch.Tensor) -> None:
        """The displacement of a slice is scaled."""
        centered = (retention - 1.0) * active  # since most ratios are close to 1
        self.totals.add(
            active=active.sum(),
            centered=centered.sum(),
            centered_squared=centered.square().sum(),
            scale=scale.sum(),
        )
        self.totals.maximum(scale_max=torch.where(active, scale, -math.inf).max())

    def lookahead(self, part: Part, displacement: torch.Tensor) -> None:
        """θK - θ0 of a slice is so much."""
        self.totals.add(lookahead_squared=displacement.square().sum())
        if self.real_steps is not None:
            candidates = {"": displacement, "_reposition": self.rule.alpha * displacement}
            self.totals.add(**self.real_steps.compare(part, candidates), **self.real_steps.moved(part))

    def correction(self, grad_0: list[torch.Tensor | None]) -> None:
        """g_slow is there."""
        self.totals.add(slow_squared=self.state.squared_norm())
        present = [(first, g) for first, g in zip(grad_0, self.state.gradients(), strict=True) if first is not None]
        for _, (first, grad) in aligned_slices([first for first, _ in present], [g for _, g in present]):
            dtype = at_least_fp32(first.dtype)
            first, grad = first.to(grad.device, dtype, non_blocking=True), grad.to(dtype)
            self.totals.add(first_squared=first.square().sum(), dot_0_slow=torch.sum(grad * first))

    def report(self) -> StepReport:
        """What was measured, over all ranks: one collective."""
        candidates = (*CANDIDATES, *([SCALED] if self.rule.phantom_steps else []))
        errors = () if self.real_steps is None else RealSteps.sums_of(candidates)
        totals = self.totals.reduce((*self.SUMS, *errors), ("scale_max",))
        self.norms.append(math.sqrt(totals["slow_squared"]))
        report = StepReport(passes=len(self.norms))
        report.is_finite = math.isfinite(totals["lookahead_squared"]) and math.isfinite(self.norms[-1])
        if not report.is_finite:
            return report
        report.grad_norm_0, report.grad_norm_slow = self.norms[0], self.norms[-1]
        report.grad_norm_1 = self.norms[1] if self.rule.probes > 1 else None
        report.cos_0_slow = _ratio(totals["dot_0_slow"], math.sqrt(totals["first_squared"]) * self.norms[-1])
        probes, lookahead = math.sqrt(totals["probes_squared"]), math.sqrt(totals["lookahead_squared"])
        report.displacement_ratio = _ratio(lookahead, probes)
        if report.displacement_ratio is not None:
            report.effective_multiplier = self.rule.alpha * report.displacement_ratio
        report.retention = self.retention
        if self.rule.scales:
            self._report_extrapolation(report, totals)
        if self.real_steps is not None:
            report.diagnostics = RealSteps.errors(totals, self.rule.alpha, candidates) | self.real_steps.noise
        return report

    def _report_extrapolation(self, report: StepReport, totals: dict[str, float]) -> None:
        active, coordinates = totals["active"], self.state.coordinates()
        report.scale_mean = totals["scale"] / coordinates
        report.inactive_fraction = 1.0 - active / coordinates
        if active:
            report.scale_max = totals["scale_max"]
            centered_mean = totals["centered"] / active
            report.retention_mean = 1.0 + centered_mean
            report.retention_std = math.sqrt(max(totals["centered_squared"] / active - centered_mean**2, 0.0))


def _ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, or `None` where it says nothing: no displacement while the learning rate is 0, a zero gradient."""
    return numerator / denominator if denominator > 0 else None


@dataclass
class RealSteps:
    """Where K real steps lead, and how far a gradient repeats itself.

    Attributes:
        displacements (`list[torch.Tensor]`): θK_true - θ0, one a local shard.
        noise (`dict[str, float]`): `noise_cos` and `noise_retention_std` of the same gradient computed twice.
    """

    displacements: list[torch.Tensor]
    noise: dict[str, float]

    @staticmethod
    def sums_of(candidates: Sequence[str]) -> tuple[str, ...]:
        """What is added up for these suffixes: ‖true‖², and of each candidate c ‖c - true‖², c · true and ‖c‖²."""
        return ("true_squared", *(f"{kind}{suffix}" for suffix in candidates for kind in ("error", "dot", "squared")))

    def compare(self, part: Part, candidates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums of a slice of candidates, by their suffixes; without the first."""
        true, sums = part.of(self.displacements), {}
        for suffix, candidate in candidates.items():
            sums[f"error{suffix}"] = (candidate - true).square().sum()
            sums[f"dot{suffix}"] = (candidate * true).sum()
            sums[f"squared{suffix}"] = candidate.square().sum()
        return sums

    def moved(self, part: Part) -> dict[str, torch.Tensor]:
        """The first of the sums."""
        return {"true_squared": part.of(self.displacements).square().sum()}

    @staticmethod
    def errors(totals: dict[str, float], alpha: float, candidates: Sequence[str]) -> dict[str, float]:
        """The totals over the model as metrics: relative errors and cosines of each candidate.

        `true_abs_error` is ‖θK - θK_true‖, and `true_abs_error_reposition` its part that the reposition takes over, α
        of it: the columns of the paper's Table 6 with 1 - `true_cosine`.
        """
        if totals["true_squared"] <= 0:
            return {}
        absolute = math.sqrt(totals["error"])
        errors = {"true_abs_error": absolute, "true_abs_error_reposition": alpha * absolute}
        for suffix in candidates:
            errors[f"true_error{suffix}"] = math.sqrt(totals[f"error{suffix}"] / totals["true_squared"])
            if (squared := totals[f"squared{suffix}"]) > 0:
                errors[f"true_cosine{suffix}"] = totals[f"dot{suffix}"] / math.sqrt(squared * totals["true_squared"])
        return errors


@torch.no_grad()
def take_real_steps(
    state: TrainingState, one_pass: Callable[[], None], extrapolation: Extrapolation, start: Origin | None = None
) -> RealSteps | None:
    """Computes g0 a second time and takes K real optimizer steps from θ0 on the same rollouts, then restores all.

    It costs K further passes (one for the noise floor, K - 1 for the real steps, which begin with g0) and, while it
    lasts, copies of the parameters, of the gradient, of the optimizer's state and of the real displacement.

    Args:
        state (`TrainingState`): Holds θ0 and g0, as pass 1 left it, before and after.
        one_pass (`Callable[[], None]`): Replaces the gradients by those of a new pass at the present parameters.
        extrapolation (`Extrapolation`): K, and the bounds of the retention ratio.
        start (`Origin`, *optional*): Where the state is, with the optimizer's; unset to copy it.

    Returns:
        `RealSteps | None`: `None` if a gradient on the way was not finite.
    """
    start = start or Origin.of(state, with_optimizer=True)
    try:
        real_steps = _repeat_and_step(state, one_pass, extrapolation, start)
    except BaseException:
        start.return_to(state, alone=True)
        raise
    start.return_to(state)
    return real_steps


def _repeat_and_step(
    state: TrainingState, one_pass: Callable[[], None], extrapolation: Extrapolation, start: Origin
) -> RealSteps | None:
    one_pass()
    noise = _noise(state, start, extrapolation)
    state.set_gradients([None if g is None else g.clone() for g in start.grad_0])
    for step in range(extrapolation.lookahead_steps):
        if step > 0:
            one_pass()
        norm, _ = state.clip_gradients()
        if not math.isfinite(norm):
            return None
        state.step()
    displacements = [p - theta_0 for p, theta_0 in zip(state.parameters(), start.theta_0, strict=True)]
    return RealSteps(displacements, noise)


def _noise(state: TrainingState, start: Origin, extrapolation: Extrapolation) -> dict[str, float]:
    totals = Totals(state)
    for i, (again, grad_0) in enumerate(zip(state.gradients(), start.grad_0, strict=True)):
        if again is None or grad_0 is None:
            continue
        again, grad_0 = (grad.to(at_least_fp32(grad.dtype)) for grad in (again, grad_0))
        totals.add(dot=(again * grad_0).sum(), again=again.square().sum(), first=grad_0.square().sum())
        if i < len(start.theta_0):  # it moves a parameter
            retention, _, active = retention_and_scale(grad_0, again, extrapolation)
            centered = retention - 1.0
            totals.add(active=active.sum(), centered=centered.sum(), centered_squared=centered.square().sum())
    sums = totals.reduce(("dot", "again", "first", "active", "centered", "centered_squared"))
    if not (sums["active"] and sums["again"] and sums["first"]):
        return {}
    spread = max(sums["centered_squared"] / sums["active"] - (sums["centered"] / sums["active"]) ** 2, 0.0)
    cosine = sums["dot"] / math.sqrt(sums["again"] * sums["first"])
    return {"noise_cos": cosine, "noise_retention_std": math.sqrt(spread)}
