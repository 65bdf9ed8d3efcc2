"""The equations against their definitions, in float64."""

import math

import pytest
import torch

from gxpo_trl.update.extrapolation import (
    NEARLY_ZERO,
    Extrapolation,
    geometric_sum,
    reposition,
    retention_and_scale,
)


UNBOUNDED = {"retention_min": -math.inf, "retention_max": math.inf, "scale_min": -math.inf, "scale_max": math.inf}


def measure(grad_0: torch.Tensor, grad_1: torch.Tensor, rule: Extrapolation):
    return retention_and_scale(grad_0, grad_1, rule)


def reference_scale(grad_0: float, grad_1: float, rule: Extrapolation) -> float:
    """One coordinate in Python floats, straight from the method's table."""
    if not abs(grad_0) > rule.active_threshold:
        return 1.0
    r = min(max(grad_1 / grad_0, rule.retention_min), rule.retention_max)
    if abs(1 + r) <= NEARLY_ZERO:
        return 1.0
    scale = math.fsum(r**n for n in range(rule.lookahead_steps)) / (1 + r)
    return min(max(scale, rule.scale_min), rule.scale_max) if math.isfinite(scale) else 1.0


@pytest.mark.parametrize("terms", [1, 2, 3, 10])
@pytest.mark.parametrize("ratio", [-1.0, 0.0, 0.5, 1.0, 1.0 + 1e-12, 2.0])
def test_geometric_sum_is_the_sum_of_powers(ratio, terms):
    total = geometric_sum(torch.tensor([ratio], dtype=torch.float64), terms)
    assert total.item() == pytest.approx(math.fsum(ratio**n for n in range(terms)), rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("lookahead_steps", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("bounds", [{}, {"scale_max": 3.5}, UNBOUNDED])
def test_scale_matches_the_float64_reference(lookahead_steps, bounds):
    rule = Extrapolation(lookahead_steps, **bounds)
    generator = torch.Generator().manual_seed(0)
    near = torch.cat([c + torch.linspace(-1e-2, 1e-2, 101, dtype=torch.float64) for c in (-1.0, 0.0, 1.0)])
    ratios = torch.cat([near, 4 * torch.randn(2000, dtype=torch.float64, generator=generator)])
    grad_0 = torch.randn(ratios.numel(), dtype=torch.float64, generator=generator)
    grad_1 = ratios * grad_0
    _, scale, _ = measure(grad_0, grad_1, rule)
    expected = [reference_scale(a, b, rule) for a, b in zip(grad_0.tolist(), grad_1.tolist(), strict=True)]
    torch.testing.assert_close(scale, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lookahead_steps", [3, 5, 10])
def test_scale_in_fp32_is_close_to_float64_around_one(lookahead_steps):
    """Most coordinates have r close to 1, where the closed form (1 - r^K) / (1 - r²) loses every digit."""
    rule = Extrapolation(lookahead_steps, **UNBOUNDED)
    grad_0 = torch.full((1001,), 0.37)
    grad_1 = grad_0 * (1 + torch.linspace(-1e-4, 1e-4, 1001))
    _, scale, _ = measure(grad_0, grad_1, rule)
    _, exact, _ = measure(grad_0.double(), grad_1.double(), rule)
    torch.testing.assert_close(scale.double(), exact, rtol=1e-5, atol=0)


def test_retention_is_clamped_to_its_bounds():
    grad_0, grad_1 = torch.ones(4), torch.tensor([-7.0, -2.0, 3.0, 9.0])
    retention, _, _ = measure(grad_0, grad_1, Extrapolation(5))
    assert retention.tolist() == [-2.0, -2.0, 3.0, 3.0]
    retention, _, _ = measure(grad_0, grad_1, Extrapolation(5, **UNBOUNDED))
    assert retention.tolist() == grad_1.tolist()


def test_scale_is_clamped_to_its_bounds():
    grad_0, grad_1 = torch.ones(3), torch.tensor([-0.5, 1.0, 3.0])
    _, scale, _ = measure(grad_0, grad_1, Extrapolation(5, scale_min=1.5, scale_max=2.0))
    assert scale.tolist() == [1.5, 2.0, 2.0]


def test_inactive_coordinates_keep_the_observed_displacement():
    rule = Extrapolation(5, active_threshold=1e-3, scale_min=2.0, scale_max=3.0)
    grad_0 = torch.tensor([0.0, 1e-3, -1e-3, 2e-3])
    retention, scale, active = measure(grad_0, grad_0.clone(), rule)
    assert active.tolist() == [False, False, False, True]
    assert scale.tolist() == [1.0, 1.0, 1.0, 2.5]
    assert retention.tolist() == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("lookahead_steps", [3, 4])
def test_scale_is_one_at_the_pole(lookahead_steps):
    _, scale, active = measure(torch.ones(2), -torch.ones(2), Extrapolation(lookahead_steps))
    assert active.all()
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "grad_0, grad_1",
    [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (math.inf, math.inf), (1e-3, 1e38)],
    ids=["nan g1", "inf g1", "nan g0", "inf both", "overflowing sum"],
)
def test_scale_is_one_where_anything_is_not_finite(grad_0, grad_1):
    rule = Extrapolation(10, **UNBOUNDED)
    _, scale, _ = measure(torch.tensor([grad_0]), torch.tensor([grad_1]), rule)
    assert scale.item() == 1.0


def test_reposition_goes_alpha_of_the_way():
    theta_0, displacement, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    assert reposition(theta_0, displacement, scale, 0.0).tolist() == [1.0, 2.0]
    assert reposition(theta_0, displacement, scale, 0.5).tolist() == [1.5, 0.5]
    assert reposition(theta_0, displacement, scale, 1.0).tolist() == [2.0, -1.0]
