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
    """How the two-step displacement becomes one of K steps.

    Attributes:
        lookahead_steps (`int`): K, the virtual depth.
        retention (`str`): What the ratio is formed of: `"gradient"`, r = g1 / g0, or `"update"`, r = d1 / d0.
        active_threshold (`float`): δ, a coordinate is active where the denominator of r is above it.
        active_threshold_relative (`float`): The same as a fraction of the denominators' RMS; the larger bound counts.
        retention_min, retention_max (`float`): Bounds of the retention ratio; ±inf = unbounded.
        scale_min, scale_max (`float`): Bounds of the scale; inf = unbounded.
    """

    lookahead_steps: int
    retention: str = "gradient"
    active_threshold: float = 1e-8
    active_threshold_relative: float = 0.0
    retention_min: float = -2.0
    retention_max: float = 3.0
    scale_min: float = 1.0
    scale_max: float = math.inf

    def threshold(self, rms: float) -> float:
        """What |g0| (or |d0|) must be above, given its root mean square over the model."""
        return max(self.active_threshold, self.active_threshold_relative * rms)


def geometric_sum(ratio: torch.Tensor, terms: int) -> torch.Tensor:
    """S_n(r) = 1 + r + … + r^(n-1), as in eq. (7), by Horner's rule.

    The closed form (1 - r^n) / (1 - r) has a pole at r = 1, where most coordinates are; this has none.
    """
    total = torch.ones_like(ratio)
    for _ in range(terms - 1):
        total.mul_(ratio).add_(1.0)
    return total


def optimizer_direction(
    before: torch.Tensor, after: torch.Tensor, learning_rate: float, weight_decay: float
) -> torch.Tensor:
    """d_k = ((1 - lr·wd) θ_k - θ_{k+1}) / lr: the direction that an optimizer with decoupled decay moved in.

    Args:
        before, after (`torch.Tensor`): θ_k and θ_{k+1}, same shape.
        learning_rate, weight_decay (`float`): Of the parameter's group. A learning rate of 0 moved nowhere: zeros.
    """
    if learning_rate == 0:
        return torch.zeros_like(before)
    return ((before - after) - learning_rate * weight_decay * before) / learning_rate


def retention_and_scale(
    first: torch.Tensor, second: torch.Tensor, rule: Extrapolation, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The retention ratio, eq. (4), and the factor from two steps to K, eq. (7).

        r = clamp(g1 / g0)      scale = clamp(S_K(r) / S_2(r))

    The scale is 1, which keeps the observed two-step displacement, where the coordinate is not active, where 1 + r is
    nearly 0, and where anything is not finite.

    Args:
        first, second (`torch.Tensor`): The gradients that the optimizer consumed at θ0 and θ1, or the directions it
            moved in; same shape, fp32.
        rule (`Extrapolation`): K and the bounds.
        threshold (`float`): A coordinate is active where |first| is above it.

    Returns:
        `(retention, scale, active)`: two fp32 tensors and a bool tensor of that shape; `retention` is 1 where not
        active.
    """
    active = first.abs() > threshold
    ratio = second / first
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
