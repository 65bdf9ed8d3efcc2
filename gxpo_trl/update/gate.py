"""When the active phase ends: a rolling z-score of one signal (arXiv 2605.06755, eq. (10); SFPO, section 3.3).

What counts as an exceedance is a `Trigger`; the `Gate` carries the state and says what follows.
"""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .json_state import check_parts, is_count, is_truth


EPSILON = 1e-8


@dataclass(frozen=True)
class Trigger:
    """What counts as an exceedance.

    Attributes:
        threshold (`float`): τ; inf never trips.
        window (`int`): w, how many values the baseline reaches back.
        warmup_steps (`int`): How many values pass before one may count.
        patience (`int`): How many consecutive exceedances trip the gate.
        two_sided (`bool`): Whether a fall counts like a rise (|Z| instead of Z).
    """

    threshold: float
    window: int = 30
    warmup_steps: int = 50
    patience: int = 1
    two_sided: bool = False

    def z_score(self, value: float, history: Sequence[float]) -> float:
        """Z = (value - μ) / (σ + ε), with the mean and the population standard deviation of the history."""
        return (value - statistics.fmean(history)) / (statistics.pstdev(history) + EPSILON)

    def exceeds(self, z_score: float) -> bool:
        return (abs(z_score) if self.two_sided else z_score) >= self.threshold


@dataclass
class Gate:
    """Ends the active phase permanently when the signal leaves its own recent history.

    Each value is compared with the baseline of the last `window` values, itself not yet among them. `patience`
    consecutive exceedances trip the gate, once `warmup_steps` values have been seen and at least two are in the
    window. Every value then enters the window, exceedances too: a window without them would shrink with each, until
    any value exceeds it.

    Attributes:
        trigger (`Trigger`): What counts.
        decay_steps (`int`): Active steps over which α goes linearly to 0 after a trip; 0 ends the phase at once.
        max_active_steps (`float`): Active steps after which the phase ends, whatever the signal does.
        values (`deque[float]`): The window.
        observed (`int`): Values seen.
        exceedances (`int`): Length of the open streak.
        active_steps (`int`): Active steps taken, decaying ones included.
        decaying (`int`): Decaying steps still to come, after a trip.
        active (`bool`): Whether the next step is an active one.
    """

    trigger: Trigger
    decay_steps: int = 0
    max_active_steps: float = math.inf
    values: deque[float] = dataclasses.field(default_factory=deque)
    observed: int = 0
    exceedances: int = 0
    active_steps: int = 0
    decaying: int = 0
    active: bool = True

    @property
    def alpha_factor(self) -> float:
        """What α is multiplied with in the next active step: 1, or less while it decays."""
        return self.decaying / (self.decay_steps + 1) if self.decaying else 1.0

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

    def _judge(self, value: float) -> float | None:
        z_score = self.trigger.z_score(value, self.values) if len(self.values) >= 2 else None
        armed = self.observed >= self.trigger.warmup_steps and not self.decaying
        exceeds = z_score is not None and armed and self.trigger.exceeds(z_score)
        self.exceedances = self.exceedances + 1 if exceeds else 0
        self.observed += 1
        self.values.append(value)
        while len(self.values) > self.trigger.window:
            self.values.popleft()
        return z_score

    def _end_active_step(self) -> None:
        self.active_steps += 1
        if self.active_steps >= self.max_active_steps:
            self.decaying, self.active = 0, False
        elif self.decaying:
            self.decaying -= 1
            self.active = self.decaying > 0
        elif self.exceedances >= self.trigger.patience:
            self.exceedances = 0
            self.decaying = self.decay_steps
            self.active = self.decaying > 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON. The settings are not in it: they come from the recipe."""
        return {name: getattr(self, name) for name, _, _ in PARTS} | {"values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: If the state is not one of `state_dict`, or is of version 0.1 with a gate that was to arm
                again, which no gate does any more.
        """
        if isinstance(state, dict) and "resting" in state:  # version 0.1
            state = dict(state)
            resting = state.pop("resting")
            if resting != "for good" and not is_count(resting):
                raise ValueError(f"`resting` of the gate's state must be a count of steps, got {resting!r}.")
            if resting not in (0, "for good"):
                raise ValueError(
                    f"The gate of this checkpoint was to arm again after {resting} steps, and no gate does now "
                    "(`gate_fallback: temporary` is gone). Resume from an earlier checkpoint, or with version 0.1."
                )
            state["active"] = resting == 0
        check_parts(state, PARTS, "gate")
        for name, _, _ in PARTS:
            setattr(self, name, state[name])
        self.values = deque(state["values"])
        if self.decaying > self.decay_steps:  # which are fewer now
            self.decaying = self.decay_steps
            self.active = self.decaying > 0


def _are_finite(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)


PARTS = (
    ("values", "a list of finite numbers", _are_finite),
    *((name, "a count", is_count) for name in ("observed", "exceedances", "active_steps", "decaying")),
    ("active", "true or false", is_truth),
)
"""What a state consists of: name, what it must be, and whether it is."""
