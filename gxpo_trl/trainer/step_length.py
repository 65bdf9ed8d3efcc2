"""Step control in the training loop: multiplies the learning rates in every step, and takes steps back."""

import contextlib
from collections.abc import Iterator

from accelerate.logging import get_logger

from ..engines import Engine
from ..engines.rates import ScaledRates
from ..update.measurements import StepReport
from ..update.snapshot import Origin
from ..update.step_control import StepControl, Verdict, agreement


logger = get_logger(__name__)


class StepLength:
    """The length of a run's steps. Without a control, the schedule sets it.

    Args:
        control (`StepControl`, *optional*): Chooses the multiplier.

    Attributes:
        rates (`ScaledRates`, *optional*): Of the optimizer, while there is a control and the training loop runs.
    """

    def __init__(self, control: StepControl | None):
        self.control = control
        self.rates: ScaledRates | None = None
        self._fraction = 1.0  # of M, in a probe

    @property
    def takes_back(self) -> bool:
        """Whether a step may be taken back, so that the optimizer's state before it must be kept."""
        return self.control is not None and self.control.gain > 0

    def follow(self, engine: Engine) -> None:
        """From now on each optimizer step uses M times its rates."""
        if self.rates is None:
            self.rates = ScaledRates(engine.state.base_optimizer, lambda: self._fraction * self.control.multiplier)

    def release(self) -> None:
        """Called when the training loop has ended."""
        if self.rates is not None:
            self.rates.release()
            self.rates = None

    @property
    def searching(self) -> bool:
        """Whether M has to be found, on a batch that says something."""
        return self.control is not None and self.control.searching

    @contextlib.contextmanager
    def half(self) -> Iterator[None]:
        """Steps are half as long: two passes are judged halfway, and a plain step is as long as their two together."""
        self._fraction = 0.5
        try:
            yield
        finally:
            self._fraction = 1.0

    def see_rate(self) -> None:
        """Tells the control the schedule's rate at the end of a step's first pass."""
        if self.rates is not None:
            self.control.see_rate(self.rates.largest)

    def judge(self, report: StepReport, engine: Engine, origin: Origin, step: int) -> bool:
        """Where the step does not stay, undoes it: θ0, g0 and the optimizer's state are what they were before it.

        Returns:
            `bool`: Whether it must be made again, at the M that is set now; otherwise the plain step is taken.
        """
        if self.control is None:
            return False
        verdict = self.judge_only(report, step)
        report.taken_back = verdict is Verdict.PLAIN
        if verdict is not Verdict.KEEP and not report.fell_back:
            origin.return_to(engine.state)
        return verdict is Verdict.TRY_AGAIN

    def judge_only(self, report: StepReport, step: int, repeatable: bool = True) -> Verdict:
        """What the control says of a step, whose parameters stay where they are."""
        if self.rates is not None and self.rates.largest == 0:
            return Verdict.KEEP  # its cosine says nothing about lengths
        was_at_bound = self.control.is_at_bound
        verdict = self.control.judge(agreement(report), repeatable)
        self._warn(was_at_bound, step)
        return verdict

    def step_taken(self, step: int) -> None:
        """M is the next step's from now on."""
        if self.control is not None:
            was_at_bound = self.control.is_at_bound
            self.control.advance()
            self._warn(was_at_bound, step)

    def forget_step(self) -> None:
        """Ends the current step; one that failed has left the rates multiplied."""
        if self.rates is not None:
            self.rates.put_back()
        if self.control is not None:
            self.control.forget_step()

    def _warn(self, was_at_bound: bool, step: int) -> None:
        if self.control.is_at_bound and not was_at_bound:
            logger.warning(
                f"Step {step}: the multiplier of the learning rate has reached its bound, "
                f"{self.control.multiplier:g}. Set a `learning_rate` that is nearer to the one that is needed."
            )

    def metrics(self) -> dict[str, float]:
        """Metrics of the current step."""
        if self.control is None:
            return {}
        return {"step_multiplier": self.control.multiplier}

    def totals(self) -> dict[str, float]:
        if self.control is None:
            return {}
        return {"steps_taken_back": self.control.steps_taken_back, "steps_tried": self.control.steps_tried}
