"""When the active phase ends: a rolling z-score of one signal (arXiv 2605.06755, eq. (10))."""

import statistics
from collections import deque
from collections.abc import Iterable


EPSILON = 1e-8


class Gate:
    """Ends the active phase, for good, when the signal rises above its own recent history.

    Each value is compared with the mean μ and the population standard deviation σ of the last `window` values, itself
    not yet among them:

        Z = (value - μ) / (σ + ε)

    `patience` consecutive values with Z ≥ `threshold` trip the gate, once `warmup_steps` values have been seen and at
    least two are in the window. Every value then enters the window, whatever it did.

    Args:
        threshold (`float`): τ; inf never trips.
        window (`int`): w, how many values the statistics reach back.
        warmup_steps (`int`): How many values pass before one may count.
        patience (`int`): How many consecutive exceedances trip the gate.
    """

    def __init__(self, threshold: float, window: int, warmup_steps: int, patience: int = 1):
        self.threshold = threshold
        self.warmup_steps = warmup_steps
        self.patience = patience
        self.values: deque[float] = deque(maxlen=window)
        self.observed = 0
        self.exceedances = 0
        self.tripped = False

    def observe(self, value: float) -> float | None:
        """Takes one finite value of the signal.

        Returns:
            `float | None`: Z of this value, or `None` while fewer than two values are in the window.
        """
        z_score = None
        if len(self.values) >= 2:
            z_score = (value - statistics.fmean(self.values)) / (statistics.pstdev(self.values) + EPSILON)
            exceeds = self.observed >= self.warmup_steps and z_score >= self.threshold
            self.exceedances = self.exceedances + 1 if exceeds else 0
            self.tripped = self.tripped or self.exceedances >= self.patience
        self.values.append(value)
        self.observed += 1
        return z_score

    def state_dict(self) -> dict[str, bool | int | list[float]]:
        """What a resumed run needs, ready for JSON. The settings are not in it: they come from the recipe."""
        return {
            "tripped": self.tripped,
            "observed": self.observed,
            "exceedances": self.exceedances,
            "values": list(self.values),
        }

    def load_state_dict(self, state: dict[str, bool | int | Iterable[float]]) -> None:
        """Takes up where `state_dict` left off."""
        self.tripped = state["tripped"]
        self.observed = state["observed"]
        self.exceedances = state["exceedances"]
        self.values = deque(state["values"], maxlen=self.values.maxlen)
