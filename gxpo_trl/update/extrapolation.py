"""The equations of GXPO (arXiv 2605.06755, section 2) as pure functions of tensors.

Everything here is coordinate-wise: a tensor may be a whole parameter, a flat shard, or any slice of one.
"""

import math
from dataclasses import dataclass

import torch


NEARLY_ZERO = 1e-6
"""|1 + r| at or below this counts as S_2 = 0, where S_K / S_2 has a pole (odd K) or is all rounding (even K)."""


@dataclass(frozen=True)
class Extrapolation:
    """How two steps become K.

    Attributes:
        lookahead_steps (`int`): K, the virtual depth.
        of_optimizer (`bool`): Whether the optimizer takes steps on predicted gradients (`phantom.py`), instead of the
            displacement being scaled. The other attributes are of the scale.
        active_threshold (`float`): δ, a coordinate is active where |g0| is above it.
        retention_min, retention_max (`float`): Bounds of the retention ratio; ±inf = unbounded.
        scale_min, scale_max (`float`): Bounds of the scale; inf = unbounded.
    """

    lookahead_steps: int
    of_optimizer: bool = False
    active_threshold: float = 1e-8
    retention_min: float = -2.0
    retention_max: float = 3.0
    scale_min: float = 1.0
    scale_max: float = math.inf


def geometric_sum(ratio: torch.Tensor, terms: int) -> torch.Tensor:
    """S_n(r) = 1 + r + … + r^(n-1), as in eq. (7), by Horner's rule.

    The closed form (1 - r^n) / (1 - r) has a pole at r = 1, where most coordinates are; this has none.
    """
    total = torch.ones_like(ratio)
    for _ in range(terms - 1):
        total.mul_(ratio).add_(1.0)
    return total


def retention_and_scale(
    grad_0: torch.Tensor, grad_1: torch.Tensor, rule: Extrapolation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The retention ratio, eq. (4), and the factor from two steps to K, eq. (7).

        r = clamp(g1 / g0)      scale = clamp(S_K(r) / S_2(r))

    The scale is 1, which keeps the observed two-step displacement, where the coordinate is not active, where 1 + r is
    nearly 0, and where anything is not finite.

    Args:
        grad_0, grad_1 (`torch.Tensor`): The gradients that the optimizer consumed at θ0 and θ1; same shape, fp32.
        rule (`Extrapolation`): K, δ and the bounds.

    Returns:
        `(retention, scale, active)`: two fp32 tensors and a bool tensor of that shape; `retention` is 1 where not
        active.
    """
    active = grad_0.abs() > rule.active_threshold
    ratio = grad_1 / grad_0
    usable = active & (ratio.abs() < math.inf)  # false for NaN too
    retention = torch.where(usable, ratio, 1.0).clamp_(rule.retention_min, rule.retention_max)
    two_steps = 1.0 + retention
    scale = geometric_sum(retention, rule.lookahead_steps) / two_steps
    usable &= (two_steps.abs() > NEARLY_ZERO) & (scale.abs() < math.inf)
    scale = torch.where(usable, scale.clamp_(rule.scale_min, rule.scale_max), 1.0)
    return retention, scale, active


def reposition(
    theta_0: torch.Tensor, displacement: torch.Tensor, scale: torch.Tensor | float, alpha: float
) -> torch.Tensor:
    """θ̃ = θ0 + α (θK - θ0) with θK = θ0 + scale ⊙ (θ2 - θ0), eqs. (8) and (9).

    Args:
        theta_0 (`torch.Tensor`): θ0.
        displacement (`torch.Tensor`): θ2 - θ0, same shape; of SFPO, θK - θ0.
        scale (`torch.Tensor` or `float`): S_K / S_2, same shape; of SFPO, 1.
        alpha (`float`): α.

    Returns:
        `torch.Tensor`: θ̃, of the shape and dtype of `theta_0`.
    """
    return theta_0 + alpha * (scale * displacement)
