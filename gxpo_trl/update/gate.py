"""When the active phase ends: a rolling z-score of one signal (arXiv 2605.06755, eq. (10); SFPO, section 3.3).

Three parts: what the history says of a value (`mean_and_deviation`, `median_and_deviation`), what counts as an
exceedance (`Trigger`), what follows one (`Fallback`). `Gate` holds them together and carries the state.
"""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


EPSILON = 1e-8
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
ROBUST_FLOOR = 0.01  # of the median: a history that hardly moves must not make every ripple an alarm


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """μ and the population standard deviation σ."""
    return statistics.fmean(values), statistics.pstdev(values)


def median_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the deviation that the median absolute deviation (MAD) of a normal distribution would mean.

    One spike in the history moves neither. The deviation is at least 1 % of the median.
    """
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return median, max(MAD_TO_DEVIATION * mad, ROBUST_FLOOR * abs(median))


@dataclass(frozen=True)
class Trigger:
    """What counts as an exceedance.

    Attributes:
        threshold (`float`): τ; inf never trips.
        window (`int`): w, how many values the baseline reaches back.
        warmup_steps (`int`): How many values pass before one may count.
        patience (`int`): How many consecutive exceedances trip the gate.
        two_sided (`bool`): Whether a fall counts like a rise (|Z| instead of Z).
        baseline (`Callable`): The history as a centre and a deviation.
    """

    threshold: float
    window: int = 30
    warmup_steps: int = 50
    patience: int = 1
    two_sided: bool = False
    baseline: Callable[[Sequence[float]], tuple[float, float]] = mean_and_deviation

    def z_score(self, value: float, history: Sequence[float]) -> float:
        """Z = (value - μ) / (σ + ε)."""
        center, deviation = self.baseline(history)
        return (value - center) / (deviation + EPSILON)

    def exceeds(self, z_score: float) -> bool:
        return (abs(z_score) if self.two_sided else z_score) >= self.threshold


@dataclass(frozen=True)
class Fallback:
    """What follows when the gate trips.

    Attributes:
        decay_steps (`int`): Active steps over which α goes linearly to 0 first; 0 ends the active phase at once.
        cooldown_steps (`float`): Single-pass steps before the gate arms again; inf = for good.
        max_active_steps (`float`): Active steps after which the phase ends for good, whatever the signal does.
    """

    decay_steps: int = 0
    cooldown_steps: float = math.inf
    max_active_steps: float = math.inf


@dataclass
class Gate:
    """Ends the active phase when the signal leaves its own recent history.

    Each value is compared with the baseline of the last `window` values, itself not yet among them. `patience`
    consecutive exceedances trip the gate, once `warmup_steps` values have been seen and at least two are in the
    window. Every value then enters the window, unless a streak of exceedances is open: what may be the alarm is no
    baseline.

    Attributes:
        values (`deque[float]`): The window.
        observed (`int`): Values seen.
        exceedances (`int`): Length of the open streak.
        active_steps (`int`): Active steps taken, decaying ones included.
        decaying (`int`): Decaying steps still to come, after a trip.
        resting (`float`): Single-pass steps still to come before the gate arms again; 0 while the phase lasts.
    """

    trigger: Trigger
    fallback: Fallback = Fallback()
    values: deque[float] = dataclasses.field(default_factory=deque)
    observed: int = 0
    exceedances: int = 0
    active_steps: int = 0
    decaying: int = 0
    resting: float = 0

    @property
    def active(self) -> bool:
        """Whether the next step is an active one."""
        return self.resting == 0

    @property
    def alpha_factor(self) -> float:
        """What α is multiplied with in the next active step: 1, or less while it decays."""
        return self.decaying / (self.fallback.decay_steps + 1) if self.decaying else 1.0

    def observe(self, value: float) -> float | None:
        """Takes the signal of one active step; a value that is not finite says nothing and is left out.

        Returns:
            `float | None`: Z, or `None` while fewer than two values are in the window.
        """
        z_score = None
        if math.isfinite(value):
            z_score = self._judge(value)
        self._end_active_step()
        return z_score

    def rest(self) -> None:
        """Counts one single-pass step towards the end of a cooldown."""
        if self.resting:
            self.resting = max(self.resting - 1, 0)

    def _judge(self, value: float) -> float | None:
        z_score = self.trigger.z_score(value, self.values) if len(self.values) >= 2 else None
        armed = self.observed >= self.trigger.warmup_steps and not self.decaying
        exceeds = z_score is not None and armed and self.trigger.exceeds(z_score)
        self.exceedances = self.exceedances + 1 if exceeds else 0
        self.observed += 1
        if not exceeds:
            self.values.append(value)
            while len(self.values) > self.trigger.window:
                self.values.popleft()
        return z_score

    def _end_active_step(self) -> None:
        self.active_steps += 1
        if self.active_steps >= self.fallback.max_active_steps:
            self.decaying, self.resting = 0, math.inf
        elif self.decaying:
            self.decaying -= 1
            if not self.decaying:
                self._shut()
        elif self.exceedances >= self.trigger.patience:
            self.exceedances = 0
            self.decaying = self.fallback.decay_steps
            if not self.decaying:
                self._shut()

    def _shut(self) -> None:
        self.resting = self.fallback.cooldown_steps

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON. The settings are not in it: they come from the recipe."""
        return {
            "values": list(self.values),
            "observed": self.observed,
            "exceedances": self.exceedances,
            "active_steps": self.active_steps,
            "decaying": self.decaying,
            "resting": "for good" if math.isinf(self.resting) else self.resting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off."""
        for name, value in state.items():
            setattr(self, name, value)
        self.values = deque(state["values"])
        self.resting = math.inf if state["resting"] == "for good" else state["resting"]
