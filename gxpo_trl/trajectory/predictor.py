"""Predicts low-rank trajectories: (global, local) -> target, vector by vector (NExt, equations 8 to 11).

All singular vectors of one length share a predictor, and all singular values share one. Inputs and targets are the
triplets of `Deltas`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from .deltas import Deltas
from .lowrank import Triplets


PATIENCE = 50
"""Epochs without a better held-out loss after which training stops."""


@dataclass(frozen=True)
class PredictorSettings:
    """
    Settings of the predictor. The paper does not give these numbers.

    Attributes:
        hidden_size (`int`): Of all hidden layers.
        epochs (`int`): At most, each over all transitions at once.
        learning_rate (`float`): AdamW's at the start of its cosine schedule.
        seed (`int`): Of the initial weights.
        without_global, without_local (`bool`): Zeros in place of that input: the paper's ablations.
        device (`str`): The device of its training.
    """

    hidden_size: int = 128
    epochs: int = 300
    learning_rate: float = 1e-3
    seed: int = 0
    without_global: bool = False
    without_local: bool = False
    device: str = "cpu"


class VectorPredictor(nn.Module):
    """An encoder each for the global and the local vector, a decoder for both (equation 8).

    Args:
        size (`int`): d, the vectors' length.
        settings (`PredictorSettings`): See there.
        is_odd (`bool`): Whether the output for -x is the negative of the output for x. Singular vectors have no sign.
    """

    def __init__(self, size: int, settings: PredictorSettings, is_odd: bool):
        super().__init__()
        self.is_odd = is_odd
        hidden = settings.hidden_size
        self.encode_global, self.encode_local = (
            nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()) for _ in range(2)
        )
        self.decode = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, size))
        self.weights = (0.0 if settings.without_global else 1.0, 0.0 if settings.without_local else 1.0)

    def forward(self, from_start: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """(..., d) and (..., d) to (..., d)."""
        if self.is_odd:
            return (self._answer(from_start, local) - self._answer(-from_start, -local)) / 2
        return self._answer(from_start, local)

    def _answer(self, from_start: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        hidden_global = self.encode_global(from_start * self.weights[0])
        hidden_local = self.encode_local(local * self.weights[1])
        return self.decode(torch.cat([hidden_global, hidden_local], dim=-1))


@dataclass(frozen=True)
class _Vectors:
    """The data of one predictor: vectors of one length over time, and the factor that scales their entries to order
    one.
    """

    from_start: torch.Tensor  # (T, M, d)
    local: torch.Tensor  # (T, M, d)
    target: torch.Tensor  # (T - k, M, d)
    scale: float
    is_direction: bool

    def transitions(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Global, local and target of some transitions, scaled, (len(indices) · M, d)."""
        index = list(indices)
        return [(x[index] * self.scale).flatten(0, 1) for x in (self.from_start, self.local, self.target)]


class TrajectoryPredictor:
    """Predicts the target triplets of `Deltas`.

    Args:
        deltas (`list[Deltas]`): Of one trajectory.
        settings (`PredictorSettings`): See there.
    """

    def __init__(self, deltas: list[Deltas], settings: PredictorSettings):
        self.deltas = deltas
        self.settings = settings
        self.vectors: dict[str, _Vectors] = {"sigma": _singular_values(deltas)}
        for size in sorted({side.size(-2) for d in deltas for side in (d.target.u, d.target.v)}):
            self.vectors[str(size)] = _singular_vectors(deltas, size)
        self.models: dict[str, VectorPredictor] = {}

    def fit(
        self, transitions: Sequence[int], held_out: int | None = None, epochs: dict[str, int] | None = None
    ) -> dict:
        """Trains from the start.

        Args:
            transitions (`Sequence[int]`): Indices of the training targets.
            held_out (`int`, *optional*): Index of a target for early stopping. The weights that predict it best are
                kept.
            epochs (`dict[str, int]`, *optional*): When to stop without a held-out target.

        Returns:
            `dict[str, int]`: The epochs after which each predictor was taken, by length of its vectors.
        """
        stopped, most = {}, dict.fromkeys(self.vectors, self.settings.epochs) if epochs is None else epochs
        with tqdm(desc="predictor", total=sum(most.values()), unit=" epochs") as bar:
            for name, vectors in self.vectors.items():
                fitted = self._fit_one(vectors, transitions, held_out, most[name], bar)
                self.models[name], stopped[name] = fitted
        return stopped

    def _fit_one(
        self, vectors: _Vectors, transitions: Sequence[int], held_out: int | None, most: int, bar: tqdm
    ) -> tuple[VectorPredictor, int]:
        settings = self.settings
        with torch.random.fork_rng([]):
            torch.manual_seed(settings.seed)
            model = VectorPredictor(vectors.target.size(-1), settings, vectors.is_direction).to(settings.device)
        from_start, local, target = (x.to(settings.device) for x in vectors.transitions(transitions))
        test = None if held_out is None else [x.to(settings.device) for x in vectors.transitions([held_out])]
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
        best, best_epoch, best_state = float("inf"), most, None
        for epoch in range(1, most + 1):
            loss = nn.functional.l1_loss(model(from_start, local), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if test is None:
                continue
            with torch.no_grad():
                loss = nn.functional.l1_loss(model(*test[:2]), test[2]).item()
            if loss < best:
                best, best_epoch = loss, epoch
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif epoch - best_epoch >= PATIENCE:
                bar.update(most - epoch)
                break
        if best_state is not None:
            model.load_state_dict(best_state)
        return model, best_epoch

    @torch.no_grad()
    def predict(self, index: int) -> list[Triplets]:
        """The target triplets at a checkpoint, one entry for each of `deltas`: σ (N, 1), u (N, m, 1), v (N, n, 1).

        Singular vectors have unit length (equation 11), and singular values are not negative.
        """
        found = {name: self._predict_one(name, index) for name in self.vectors}
        taken = dict.fromkeys(found, 0)

        def take(name: str, count: int) -> torch.Tensor:
            taken[name] += count
            return found[name][taken[name] - count : taken[name]]

        triplets = []
        for d in self.deltas:  # in the order in which the vectors were joined
            count, (m, n) = len(d.names), (d.target.u.size(-2), d.target.v.size(-2))
            sigma, u, v = take("sigma", count), take(str(m), count), take(str(n), count)
            triplets.append(Triplets(sigma, u[..., None], v[..., None], torch.ones(count)))
        return triplets

    def _predict_one(self, name: str, index: int) -> torch.Tensor:
        vectors, device = self.vectors[name], self.settings.device
        inputs = ((x[index] * vectors.scale).to(device) for x in (vectors.from_start, vectors.local))
        predicted = self.models[name](*inputs).cpu() / vectors.scale
        return nn.functional.normalize(predicted, dim=-1) if vectors.is_direction else predicted.clamp(min=0.0)


def _singular_vectors(deltas: list[Deltas], size: int) -> _Vectors:
    """All u and v of that length. Scaled by its root: a unit vector's entries are of order one then."""

    def gather(kind: str) -> torch.Tensor:
        sides = [side for d in deltas for side in (getattr(d, kind).u, getattr(d, kind).v) if side.size(-2) == size]
        return torch.cat([side[..., 0] for side in sides], dim=1)

    return _Vectors(gather("from_start"), gather("local"), gather("target"), size**0.5, is_direction=True)


def _singular_values(deltas: list[Deltas]) -> _Vectors:
    from_start, local, target = (
        torch.cat([getattr(d, kind).sigma for d in deltas], dim=1) for kind in ("from_start", "local", "target")
    )
    return _Vectors(from_start, local, target, 1 / from_start.mean().item(), is_direction=False)
