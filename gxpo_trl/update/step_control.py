"""How long steps are: one multiplier of the learning rate, from the agreement of two gradients on one batch.

The cosine c of the first and the corrective gradient is 1 after a step of no length, about 0 where the batch's loss is
least along the path, and negative beyond: the curvature condition of Wolfe's line search as one number, which the
corrective pass gives away. A step that is too short raises the multiplier M, one that is too long lowers it:

    start:      M = 1; on the first two batches the step is tried at one M after the other, from the same θ0, until
                arccos(c) is near arccos(c*)
    control:    M_{t+1} = M_t · exp(κ (c - c*))
    take back:  c < -0.1, or the gradient is not finite, or zero where g0 is not: M ← M / 2, and the step again from θ0
    again:      where the scheduled rate has more than doubled since the last step, the start on one batch
    check:      after the start, M grows by arccos(c*) / arccos(c), at most twofold, until c < c*
    no change where g0 is zero

The angle between the two gradients is proportional to the length of a short step, so that the start follows secants.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .json_state import check_parts, is_amount, is_count
from .measurements import StepReport


LEAST, MOST = 1 / 4096, 4096.0
"""Bounds of M."""
TAKE_BACK_BELOW = -0.1
"""The cosine below which a step went too far, and is taken back."""
SEARCHES = 2
"""Batches on which M is searched for. In the first step of an adaptive optimizer each coordinate moves by the whole
rate; once gradients of several passes are averaged, the same rate makes steps two to three times as short."""
MOST_TRIES = 8
"""Steps that are tried on a batch, at most."""
NEAR = 1.25
"""The factor by which the angle of a step that is found may differ from the one that is aimed at."""
CLOSE = 2.0
"""Where a multiplier that is too long is at most so many times one that is too short, the latter is taken."""
TAKE_BACK_FACTOR = 1 / 2
MOST_GROWTH = 2.0
"""What M is multiplied by at most after a check, while no step has been longer than is aimed at."""
RISEN = 2.0
"""The factor by which the scheduled rate may rise from one step to the next, as in a warm-up, before M is searched for
again."""
SEARCH_FACTOR = 8.0
"""What M changes by at most from one try to the next. Rounding hides the angle of a very short step, and the angle of
a very long one says nothing."""


def default_target(passes: float, completions: int) -> float:
    """c* where none is set: 1 - (1 - 1.2 / passes) · √(completions / 128), and at least 0.1.

    Measured on the embedded task. The rows that chose a step also judge it. The fewer they are, the more of c is their
    own noise, which the step fits, and the larger c is after the step that is best for other rows.

    Args:
        passes (`float`): Passes over a batch, the last included, and 0.6 for each phantom step.
        completions (`int`): Of an optimizer step, on all devices.
    """
    return max(0.1, 1 - (1 - 1.2 / passes) * math.sqrt(completions / 128))


LEAST_OF_CHECK = 0.6
"""The least c* of *check*, which is otherwise the target of two passes: a micro-batch is a small part of what chose
the step."""


class Verdict(Enum):
    """What becomes of a step."""

    KEEP = "keep"
    PLAIN = "plain"
    """It went too far, as others did before it: the plain step is taken in its place."""
    TRY_AGAIN = "try again"
    """The step is made again from the same θ0, at another M."""


def agreement(report: StepReport) -> float | None:
    """The cosine by which a step is judged: -inf for one that led to where it can't be judged any more, and `None`
    where g0 says nothing."""
    if report.fell_back:
        return None if report.passes == 1 else -math.inf  # after one pass: g0 itself is not finite
    if not report.grad_norm_0:
        return None
    return -math.inf if report.cos_0_slow is None else report.cos_0_slow


@dataclass
class Search:
    """Finds, on one batch, the multiplier of the step after which the gradients are at a given angle.

    Attributes:
        angle (`float`): The angle, in radians.
        tries (`int`): Multipliers judged.
        short (`tuple[float, float]`, *optional*): The last multiplier that was too short, and its angle.
        long (`float`, *optional*): The last one that was too long.
        settled (`bool`): Whether the next try is the last one.
    """

    angle: float
    tries: int = 0
    short: tuple[float, float] | None = None
    long: float | None = None
    settled: bool = False

    def next(self, multiplier: float, cosine: float) -> float | None:
        """The multiplier to try after this one had this cosine; `None` if it is the one."""
        self.tries += 1
        angle = math.acos(min(max(cosine, -1.0), 1.0))
        is_near = self.angle / NEAR <= angle <= self.longest
        if self.settled or (is_near and (self.long is None or self.short is not None)):
            return None  # but not on the way down from far: there, angles are what they are by chance
        if angle < self.angle / NEAR:
            self.short = multiplier, angle
        else:
            self.long = multiplier
        if self.short is None:  # however far it is: gradients there may have nothing to do with each other
            return multiplier / SEARCH_FACTOR
        short, angle = self.short
        if self.long is not None and self.long <= CLOSE * short:  # clipping makes the angle jump
            self.settled = True
            return None if short == multiplier else short
        found = short * (min(SEARCH_FACTOR, self.angle / angle) if angle else SEARCH_FACTOR)
        return found if self.long is None or found < self.long else math.sqrt(short * self.long)

    @property
    def longest(self) -> float:
        """The largest angle of a step that is found: nearer to the one that is aimed at than to that of steps that are
        much too long, a right one."""
        return max(self.angle, min(self.angle * NEAR, (self.angle + math.pi / 2) / 2))


@dataclass
class StepControl:
    """Chooses the multiplier M of the learning rate, by which every optimizer step of a run is taken.

    Attributes:
        target (`float`): c*, the cosine that is aimed at.
        gain (`float`): κ; with 0 nothing is controlled, and M stays where it is.
        multiplier (`float`): M of the current step.
        searches_left (`int`): Batches on which M is still to be searched for.
        steps_taken_back (`int`): How many went too far, and of a search at most its last one.
        steps_tried (`int`): How many searches undid.
        search_target (`float`, *optional*): The cosine that searches aim at, if another.
        rate (`float`, *optional*): The scheduled learning rate of the last step, which M multiplied.
        settled (`bool`): Whether a step since the last search was longer than is aimed at, by a check. Until then each
            step is checked, and M may double.
        growth (`float`): The factor of M once the current step has been taken.
        search (`Search`): Of M on the current batch.
    """

    target: float
    gain: float = 0.5
    multiplier: float = 1.0
    searches_left: int = 0
    steps_taken_back: int = 0
    steps_tried: int = 0
    search_target: float | None = None
    rate: float | None = None
    settled: bool = False
    growth: float = 1.0
    search: Search = field(init=False)

    def __post_init__(self):
        self.forget_step()

    @classmethod
    def from_start(cls, target: float, gain: float, search_target: float | None = None) -> "StepControl":
        """One that searches for M first, if it controls at all."""
        return cls(target, gain, searches_left=SEARCHES if gain > 0 else 0, search_target=search_target)

    @property
    def searching(self) -> bool:
        """Whether M is not known."""
        return self.gain > 0 and self.searches_left > 0

    @property
    def is_at_bound(self) -> bool:
        return not LEAST < self.multiplier < MOST

    def see_rate(self, rate: float) -> None:
        """Takes the scheduled rate of a step. Where it has risen far above the last one's, as at the restart of a
        cosine, M is not that of the step any more."""
        if self.rate and rate > RISEN * self.rate * (1 + 1e-6) and not self.searching:
            self.searches_left, self.settled = 1, False
        self.rate = rate or self.rate  # a step at 0 is not judged

    def judge(self, cosine: float | None, repeatable: bool = True) -> Verdict:
        """Takes the `agreement` of a step. Where it is not kept, M is another at once; where it is, with `advance`.

        A step that is not repeatable is not tried again.
        """
        if self.gain == 0 or cosine is None:
            return Verdict.KEEP
        if self.searching and repeatable:
            return self._search(cosine)
        is_settling = not (repeatable or self.settled or self.search.tries)  # a search saw more than a check does
        self.settled = self.settled or is_settling and cosine < self.target
        if cosine < TAKE_BACK_BELOW:
            return self._take_back(repeatable)
        self.growth = math.exp(self.gain * (cosine - self.target))
        if is_settling and cosine > self.target:
            missing = math.acos(self.target) / max(math.acos(min(cosine, 1.0)), 1e-6)
            self.growth = max(self.growth, min(missing, MOST_GROWTH))
        return Verdict.KEEP

    def _search(self, cosine: float) -> Verdict:
        before, found = self.multiplier, self.search.next(self.multiplier, cosine)
        if found is None:
            self.searches_left -= 1
            return Verdict.KEEP
        if self.search.tries < MOST_TRIES:
            self._multiply(found / before)
            if self.multiplier != before:  # not at a bound
                self.steps_tried += 1
                return Verdict.TRY_AGAIN
            self.searches_left -= 1
        return self._take_back(repeatable=False) if self.search.long == before else Verdict.KEEP

    def _take_back(self, repeatable: bool) -> Verdict:
        self.search.tries += 1
        self.steps_taken_back += 1
        self._multiply(TAKE_BACK_FACTOR)
        if repeatable and self.search.tries < MOST_TRIES:
            return Verdict.TRY_AGAIN
        return Verdict.PLAIN

    def advance(self) -> None:
        """Ends a step that has been taken."""
        self._multiply(self.growth)
        self.forget_step()

    def forget_step(self) -> None:
        """Ends a step that was not taken."""
        self.growth = 1.0
        self.search = Search(math.acos(self.target if self.search_target is None else self.search_target))

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
        if isinstance(state, dict):
            state = {"rate": None, "settled": True, **state}  # which 0.2.0 does not have
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
    ("rate", "a number of at least 0, or none", lambda value: value is None or is_amount(value)),
    ("settled", "true or false", lambda value: isinstance(value, bool)),
    ("searches_left", "a count", is_count),
    ("steps_taken_back", "a count", is_count),
    ("steps_tried", "a count", is_count),
)
"""What a state consists of: name, what it must be, and whether it is."""
