"""How long steps are: one multiplier of the learning rate, from the agreement of two gradients on one batch.

The cosine c of the first and the corrective gradient is 1 after a step of no length, about 0 where the batch's loss is
least along the path, and negative beyond: the curvature condition of Wolfe's line search as one number, which the
corrective pass gives away. A step that is too short raises the multiplier M, one that is too long lowers it:

    start:      M_0 = 1/16; until c has once been below c*:  M_{t+1} = M_t · min(8, arccos(c*) / arccos(c))
    control:    M_{t+1} = M_t · exp(κ (c - c*))
    take back:  c < -0.1, or the gradient is not finite, or zero where g0 is not: M ← M / 4, and another step
    no change where g0 is zero

The angle between the two gradients is proportional to the length of a short step, so that the start is a secant step
towards the angle that is aimed at.
"""

import math
from dataclasses import dataclass
from typing import Any

from .json_state import check_parts, is_count, is_truth
from .measurements import StepReport


FIRST, LEAST, MOST = 1 / 16, 1 / 4096, 4096.0
"""M where a run starts low, and its bounds."""
START_GROWTH = 8.0
"""What M is multiplied with in a step at most, while it starts: rounding hides the angle of a very short one."""
TAKE_BACK_BELOW = -0.1
"""The cosine below which a step went too far."""
TAKE_BACK_FACTOR = 1 / 4


def agreement(report: StepReport) -> float | None:
    """The cosine by which a step is judged: -inf for one that led to where it can't be judged any more, and `None`
    where g0 says nothing."""
    if report.fell_back:
        return None if report.passes == 1 else -math.inf  # after one pass: g0 itself is not finite
    if not report.grad_norm_0:
        return None
    return -math.inf if report.cos_0_slow is None else report.cos_0_slow


@dataclass
class StepControl:
    """Chooses the multiplier M of the learning rate, by which every optimizer step of a run is taken.

    Attributes:
        target (`float`): c*, the cosine that is aimed at.
        gain (`float`): κ; with 0 nothing is controlled, and M stays where it is.
        multiplier (`float`): M of the current step.
        starting (`bool`): Whether c has not been below c* yet.
        steps_taken_back (`int`): How many went too far.
        growth (`float`): The factor of M once the current step has been taken.
    """

    target: float
    gain: float = 0.5
    multiplier: float = 1.0
    starting: bool = False
    steps_taken_back: int = 0
    growth: float = 1.0

    @classmethod
    def from_low(cls, target: float, gain: float) -> "StepControl":
        """One that starts low, if it controls at all."""
        return cls(target, gain, FIRST, starting=True) if gain > 0 else cls(target, gain)

    @property
    def is_at_bound(self) -> bool:
        return not LEAST < self.multiplier < MOST

    def judge(self, cosine: float | None) -> bool:
        """Takes the `agreement` of a step.

        Returns:
            `bool`: Whether the step went too far. M is smaller at once then; otherwise it changes with `advance`.
        """
        if self.gain == 0 or cosine is None:
            return False
        if cosine < self.target:
            self.starting = False
        if cosine < TAKE_BACK_BELOW:
            self.steps_taken_back += 1
            self._multiply(TAKE_BACK_FACTOR)
            return True
        if self.starting:
            angle = math.acos(min(cosine, 1.0))
            self.growth = min(START_GROWTH, math.acos(self.target) / angle) if angle else START_GROWTH
        else:
            self.growth = math.exp(self.gain * (cosine - self.target))
        return False

    def advance(self) -> None:
        """Ends a step that has been taken."""
        self._multiply(self.growth)
        self.forget_step()

    def forget_step(self) -> None:
        """Ends a step that was not taken."""
        self.growth = 1.0

    def _multiply(self, factor: float) -> None:
        self.multiplier = min(max(self.multiplier * factor, LEAST), MOST)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON. The settings are not in it: they come from the recipe."""
        return {name: getattr(self, name) for name, _, _ in PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: If the state is not one of `state_dict`.
        """
        check_parts(state, PARTS, "step control")
        for name, _, _ in PARTS:
            setattr(self, name, state[name])
        self.forget_step()


PARTS = (
    (
        "multiplier",
        f"a number from 1/4096 to {MOST:g}",
        lambda value: type(value) in (int, float) and LEAST <= value <= MOST,
    ),
    ("starting", "true or false", is_truth),
    ("steps_taken_back", "a count", is_count),
)
"""What a state consists of: name, what it must be, and whether it is."""
