"""Singular triplets of matrices given by thin factors, without forming the matrices.

An adapter changes a weight by ΔW = s·B·A, with B (m, r) and A (r, n). So do differences of adapters: from checkpoint i
to j it is [s·B_j, -s·B_i]·[A_j; A_i]. With B = Q_B·R_B and Aᵀ = Q_A·R_A the singular values of B·A are those of the
small core R_B·R_Aᵀ = W·Σ·Zᵀ, and its singular vectors Q_B·W and Q_A·Z: O((m + n) r²), to rounding. The large Q are
never made: Q_B·W·Σ is B·R_Aᵀ·Z, and Q_A·Z·Σ is Aᵀ·R_Bᵀ·W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """Matrices `left @ right`, a single one or a batch.

    Attributes:
        left (`torch.Tensor`): (..., m, r).
        right (`torch.Tensor`): (..., r, n).
    """

    left: torch.Tensor
    right: torch.Tensor

    def minus(self, other: "Factors") -> "Factors":
        """The difference, of rank r + r' at most."""
        return concatenate([self, other.times(-1.0)])

    def times(self, factor: float) -> "Factors":
        return Factors(self.left * factor, self.right)

    def inner(self, other: "Factors") -> torch.Tensor:
        """The sum of the products of all entries, (...), in float64."""
        left, right = self.left.double().mT @ other.left.double(), self.right.double() @ other.right.double().mT
        return (left * right).sum((-2, -1))

    def to(self, device: torch.device | str) -> "Factors":
        return Factors(self.left.to(device), self.right.to(device))


def concatenate(parts: Sequence[Factors]) -> Factors:
    """The sum of matrices, of the sum of their ranks at most."""
    return Factors(torch.cat([part.left for part in parts], dim=-1), torch.cat([part.right for part in parts], dim=-2))


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets.

    Attributes:
        sigma (`torch.Tensor`): Singular values, largest first, (..., k).
        u (`torch.Tensor`): Left singular vectors, (..., m, k); zeros for singular values that are 0.
        v (`torch.Tensor`): Right singular vectors, (..., n, k); likewise.
        energy (`torch.Tensor`): The first singular value divided by the sum of all, (...); 0 for a zero matrix.
    """

    sigma: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    energy: torch.Tensor

    def __getitem__(self, index: slice) -> "Triplets":
        return Triplets(self.sigma[index], self.u[index], self.v[index], self.energy[index])

    def __len__(self) -> int:
        return len(self.sigma)

    def as_factors(self) -> Factors:
        """The sum of σ·u·vᵀ."""
        return Factors(self.u * self.sigma[..., None, :], self.v.mT)

    def turned(self, signs: torch.Tensor) -> "Triplets":
        """With u and v multiplied by signs, (..., k)."""
        return Triplets(self.sigma, self.u * signs[..., None, :], self.v * signs[..., None, :], self.energy)


def leading_triplets(matrix: Factors, k: int = 1) -> Triplets:
    """The leading singular triplets of a matrix from its factors.

    Args:
        matrix (`Factors`): One, or a batch of one shape. Computed in float32 at least.
        k (`int`): How many.

    Raises:
        ValueError: If the matrix can't have so many.
    """
    left, right = (
        factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (matrix.left, matrix.right)
    )
    most = min(left.size(-2), right.size(-1), left.size(-1))
    if not 1 <= k <= most:
        raise ValueError(f"A matrix of this shape and rank has 1 to {most} singular triplets, not {k}.")
    core_left, core_right = (torch.linalg.qr(factor, mode="r").R for factor in (left, right.mT))
    w, sigma, zt = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
    total = sigma.sum(-1)
    energy = torch.where(total > 0, sigma[..., 0] / total, 0.0)
    u = left @ (core_right.mT @ zt[..., :k, :].mT)
    v = right.mT @ (core_left.mT @ w[..., :k])
    return Triplets(sigma[..., :k], _normalize(u), _normalize(v), energy)


def _normalize(columns: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(columns, dim=-2, eps=torch.finfo(columns.dtype).tiny)


def align_signs(triplets: Triplets) -> Triplets:
    """Chooses between (u, v) and (-u, -v), which are the same triplet, so that a sequence does not jump.

    Each checkpoint's pair is turned towards its predecessor's: the sum of the cosines of u and of v is not negative.

    Args:
        triplets (`Triplets`): With time as the first dimension, (T, ..., m, k).
    """
    turns = torch.where(_agreement(triplets[1:], triplets[:-1]) < 0, -1.0, 1.0).to(triplets.u.dtype)
    signs = torch.cat([torch.ones_like(turns[:1]), turns]).cumprod(0)
    return triplets.turned(signs)


def turn_towards(triplets: Triplets, other: Triplets) -> Triplets:
    """Turns whole sequences, all (u, v) of a matrix or none, so that they agree with those of another sequence.

    Args:
        triplets (`Triplets`): With time as the first dimension, (T, ..., m, k).
        other (`Triplets`): Of as many checkpoints or more; those that come first are compared.
    """
    total = _agreement(triplets, other[: len(triplets)]).sum(0, keepdim=True)
    return triplets.turned(torch.where(total < 0, -1.0, 1.0).to(triplets.u.dtype))


def _agreement(first: Triplets, second: Triplets) -> torch.Tensor:
    """The sum of the cosines of u and of v, (..., k)."""
    return (first.u * second.u).sum(-2) + (first.v * second.v).sum(-2)
