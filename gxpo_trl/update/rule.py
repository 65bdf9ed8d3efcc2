"""The update rules of `lookahead_step`, as data."""

from dataclasses import dataclass

from .extrapolation import Extrapolation


@dataclass(frozen=True)
class LookaheadRule:
    """An update rule as data.

    Attributes:
        probes (`int`): Fast optimizer steps before the reposition.
        alpha (`float`): α, the fraction of the way to the lookahead point that is taken.
        extrapolation (`Extrapolation`, *optional*): How K steps are predicted from the probes. `None` takes the
            probes' displacement as it is (SFPO).
        rollback (`bool`): Whether the optimizer's state returns to θ0's before the slow correction, instead of going
            on from the probes' (the papers).
        copies_on_host (`bool`): Whether θ0 and g0 are kept in pinned host memory, not next to the parameters.
    """

    probes: int
    alpha: float
    extrapolation: Extrapolation | None = None
    rollback: bool = False
    copies_on_host: bool = False

    @property
    def passes(self) -> int:
        """Passes over the rollouts in an active step."""
        return self.probes + 1

    @property
    def lookahead_steps(self) -> int:
        """K: the steps that the lookahead stands for."""
        return self.probes if self.extrapolation is None else self.extrapolation.lookahead_steps

    @property
    def scales(self) -> bool:
        """Whether the probes' displacement is scaled."""
        return self.extrapolation is not None and not self.extrapolation.of_optimizer

    @property
    def phantom_steps(self) -> int:
        """Optimizer steps on predicted gradients, after the probes."""
        return 0 if self.scales else self.lookahead_steps - self.probes


def two_passes(copies_on_host: bool = False) -> LookaheadRule:
    """One probe and a correction from where it led: nothing is extrapolated, and no way is gone back."""
    return LookaheadRule(probes=1, alpha=1.0, copies_on_host=copies_on_host)
