"""Straight lines through a trajectory: baselines for NExt, and how straight a trajectory is.

Each is a weighted sum of checkpoints. Except for RELEX the weights add up to 0, so that the base model cancels.
"""

import torch

from .lowrank import Factors, Triplets


def line_weights(points: int, at: float) -> torch.Tensor:
    """w such that the sum of w_i·x_i is the value at `at` of the least-squares line through x_0, …, x_{points - 1}.

    Args:
        points (`int`): At 0, 1, …; two at least.
        at (`float`): Where the line is read.
    """
    x = torch.arange(points, dtype=torch.float64)
    x = x - x.mean()
    return 1 / points + (at - (points - 1) / 2) * x / x.square().sum()


def least_squares(points: int, ahead: int) -> torch.Tensor:
    """Weights of how far the least-squares line moves in `ahead` checkpoints: every weight on a line of its own."""
    return line_weights(points, points - 1 + ahead) - line_weights(points, points - 1)


def secant(points: int, ahead: int) -> torch.Tensor:
    """Weights that repeat the movement of the last `ahead` checkpoints: the weight extrapolation of RL-Extra.

    Wang et al., arXiv 2601.04537. With fewer checkpoints, their movement is scaled.
    """
    back = min(ahead, points - 1)
    weights = torch.zeros(points, dtype=torch.float64)
    weights[-1], weights[-1 - back] = ahead / back, -ahead / back
    return weights


def rank_1_line(from_start: Triplets, ahead: int) -> Factors:
    """How far the least-squares line through σ_i·u_i·v_iᵀ of the global deltas moves in `ahead` checkpoints.

    AlphaRL (Cai et al., arXiv 2510.00553): linear in the rank-1 subspace. It regresses on accuracy where this does on
    the step, which needs no evaluations.

    Args:
        from_start (`Triplets`): Up to the last checkpoint, (T, N, ...).
        ahead (`int`): How many checkpoints.

    Returns:
        `Factors`: (N, m, T) and (N, T, n).
    """
    weights = least_squares(len(from_start), ahead).to(from_start.sigma.dtype)
    left = from_start.u[..., 0] * from_start.sigma[..., :1] * weights[:, None, None]  # (T, N, m)
    return Factors(left.permute(1, 2, 0), from_start.v[..., 0].permute(1, 0, 2))


def rank_1_path(products: torch.Tensor, ahead: int) -> torch.Tensor:
    """Weights of how far a matrix moves to where RELEX predicts it, `ahead` checkpoints after the last.

    Wei et al., arXiv 2605.21468. The global deltas G_1, …, G_T of a matrix, flattened, are the rows of a table, whose
    leading singular triplet is (σ, a, v). Their coordinates along v are σ·a. The prediction is the least-squares line
    through these coordinates, times v, from the start of the run:

        v = Σ a_i·G_i / σ      Ŵ = W_0 + line(σ·a)·v = W_0 + line(a)·Σ a_i·G_i

    What the last checkpoint has in other directions than v is left out of Ŵ. The matrix Ŵ - W_0 need not have rank 1:
    the table has.

    Args:
        products (`torch.Tensor`): Inner products of the global deltas, (N, T, T), float64; two of them at least.
        ahead (`int`): How many checkpoints.

    Returns:
        `torch.Tensor`: w, (N, T), such that the movement is Σ w_i·G_i.
    """
    points = products.size(-1)
    along = torch.linalg.eigh(products).eigenvectors[..., -1]  # a, (N, T); its sign cancels
    weights = (along @ line_weights(points, points - 1 + ahead))[:, None] * along
    weights[:, -1] -= 1.0
    return weights


def linearity(from_start: Triplets, seen: int, on: range) -> torch.Tensor:
    """R² of straight lines through the first `seen` rank-1 global deltas.

    Args:
        from_start (`Triplets`): (T, N, ...).
        seen (`int`): Two at least.
        on (`range`): Which deltas the lines are judged by; two at least.

    Returns:
        `torch.Tensor`: (N,), at most 1; below 0 where the mean of these deltas is nearer to them than the lines
            are, and 0 where they don't move.
    """
    sigma, u, v = (x.double() for x in (from_start.sigma[..., 0], from_start.u[..., 0], from_start.v[..., 0]))
    gram = torch.einsum("tnm,snm->nts", u, u) * torch.einsum("tnm,snm->nts", v, v)
    gram = gram * torch.einsum("tn,sn->nts", sigma, sigma)  # inner products of the rank-1 matrices of two checkpoints
    missed = torch.zeros(len(on), len(sigma), dtype=torch.float64)  # each one less the point of the line
    missed[range(len(on)), on] = 1.0
    spread = missed.clone()  # each one less their mean
    spread[:, on] -= 1 / len(on)
    for i, at in enumerate(on):
        missed[i, :seen] -= line_weights(seen, at)
    residual, total = (torch.einsum("it,nts,is->n", w, gram, w) for w in (missed, spread))
    return torch.where(total > 0, 1 - residual / total, 0.0)
