"""Step control in the training loop: multiplies the learning rates in every step, and takes steps back."""

from accelerate.logging import get_logger

from ..engines import Engine
from ..engines.rates import ScaledRates
from ..update.measurements import StepReport
from ..update.snapshot import Origin
from ..update.step_control import StepControl, agreement


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

    @property
    def takes_back(self) -> bool:
        """Whether a step may be taken back, so that the optimizer's state before it must be kept."""
        return self.control is not None and self.control.gain > 0

    def follow(self, engine: Engine) -> None:
        """From now on each optimizer step uses M times its rates."""
        if self.rates is None:
            self.rates = ScaledRates(engine.state.base_optimizer, lambda: self.control.multiplier)

    def release(self) -> None:
        """Called when the training loop has ended."""
        if self.rates is not None:
            self.rates.release()
            self.rates = None

    def judge(self, report: StepReport, engine: Engine, origin: Origin, step: int) -> None:
        """A step that went too far becomes the plain one, from θ0 and the optimizer's state there, at a smaller M."""
        if self.control is None:
            return
        was_at_bound = self.control.is_at_bound
        report.taken_back = self.control.judge(agreement(report))
        self._warn(was_at_bound, step)
        if report.taken_back and not report.fell_back:
            origin.return_to(engine.state)

    def judge_taken(self, report: StepReport, step: int) -> None:
        """For a step that has been taken and is kept: only M is made smaller at once."""
        was_at_bound = self.control.is_at_bound
        self.control.judge(agreement(report))
        self._warn(was_at_bound, step)

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
        return {"step_multiplier": self.control.multiplier, "step_control_start": float(self.control.starting)}

    def totals(self) -> dict[str, float]:
        return {} if self.control is None else {"steps_taken_back": self.control.steps_taken_back}
