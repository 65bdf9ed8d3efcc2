"""From the rollouts of one optimizer step to its update: window, rule and gate."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from trl import GRPOTrainer

from ..engines import Engine, make_engine
from ..rollout.generators import Generators
from ..rollout.window import RolloutWindow
from ..update.algorithm import Replay, lookahead_step, one_pass
from ..update.check import check_step
from ..update.extrapolation import Extrapolation
from ..update.json_state import is_amount, is_count
from ..update.measurements import Measurements, RealSteps, StepReport, take_real_steps
from ..update.rule import LookaheadRule, two_passes
from ..update.snapshot import Origin, keep
from ..update.step_control import StepControl, Verdict
from .advice import Advisor
from .layout import BatchLayout, Shares
from .replays import Replays, methods_set
from .scoring import Scoring
from .step_length import StepLength
from .step_log import StepLog


logger = get_logger(__name__)


class ToCheck(NamedTuple):
    """What is needed to check a step after it was taken: its rollouts, and where it began."""

    model: torch.nn.Module
    window: RolloutWindow
    origin: Origin


class LookaheadUpdate:
    """The update of a trainer: what it holds between steps, and what it does with the rollouts of each.

    Args:
        trainer (`GRPOTrainer`): Whose loss is computed again. Its arguments are a `LookaheadConfig`.

    Attributes:
        rule (`LookaheadRule`, *optional*): The update rule; `None` for TRL's own single pass.
        checks (`bool`): Whether a micro-batch is replayed after a batch's first step (`update_rule: check`).
        gate (`Gate`): Whether the active phase lasts.
        length (`StepLength`): The length of the steps.
        layout (`BatchLayout`): The layout of the rollouts.
        replays (`Replays`): Computes TRL's loss again.
        log (`StepLog`): Logs each step.
        engine (`Engine`, *optional*): Chosen at the first active step, when the model is wrapped.
        window (`RolloutWindow`, *optional*): The current step's, while pass 1 is being recorded.
        in_step (`bool`): Whether a step has begun and not ended: optimizer, gate and counts are then between two
            steps.
        backward_passes (`int`): Passes of the run so far.
        fallbacks (`int`): Active steps that became plain ones.
        shutoff_step (`int`, *optional*): The step after which the active phase ended.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.rule = trainer.args.lookahead_rule()
        self.checks = trainer.args.update_rule == "check"
        self.layout = BatchLayout(trainer)
        self.scoring = Scoring(trainer, self.layout)
        self.replays = Replays(trainer)
        self.log = StepLog(trainer, self.layout)
        self.advisor = Advisor(trainer.args)
        self.engine: Engine | None = None
        self.window: RolloutWindow | None = None
        self.in_step = False
        self.begin_run()
        self._origin: Origin | None = None  # where the current step began, until the training loop has taken it
        self._to_check: ToCheck | None = None  # of a step that the training loop is about to take
        self._is_published = True  # whether forward passes and checkpoints read the parameters that are stepped
        self._seconds = 0.0  # of the current step, without generation
        self._forward_started = 0.0

    @property
    def active(self) -> bool:
        """Whether the next optimizer step is a lookahead step."""
        return self.rule is not None and self.gate.active

    @property
    def control(self) -> StepControl | None:
        """The control of the multiplier of the learning rate; `None` if there is none."""
        return self.length.control

    @property
    def _step(self) -> int:
        """The number of the current step."""
        return self.trainer.state.global_step + 1

    # ---- The life of a step

    def begin_run(self) -> None:
        """Sets the gate, the step length and the counts to those of a new run: `train` may be called again."""
        self.gate = self.trainer.args.gate()
        self.length = StepLength(self.trainer.args.control())
        self.backward_passes = 0
        self.fallbacks = 0
        self.shutoff_step: int | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Context for a training loop. No step outlives it, and an interrupted step leaves committed weights."""
        self._publish()
        self.layout.check_loss()
        self._forget_step()
        try:
            yield
        except BaseException:
            self._break_off()
            raise
        finally:
            self.in_step = False
            self._forget_step()
            self.length.release()

    def step_taken(self) -> None:
        """The training loop has taken the step: its weights are the committed ones now."""
        if self._to_check is not None:
            self._check(self._to_check)
        self.length.step_taken(self._step)
        self._forget_step()

    def step_ended(self) -> None:
        """The training loop has counted the step."""
        self.in_step = False
        self.trainer._save_postponed_checkpoint()

    @contextlib.contextmanager
    def committed(self) -> Iterator[None]:
        """Context for saving the model: between the first probe and the end of the step it saves the weights before
        it.
        """
        self._publish()
        if self._origin is None:
            yield
            return
        self._origin.exchange(self.engine.state)
        try:
            yield
        finally:
            try:
                self._origin.exchange(self.engine.state)
            except BaseException:
                self._origin.theta_0 = []  # they are in the model, and stay there
                raise

    def _break_off(self) -> None:
        """Returns an unfinished step to where it began. Other ranks may be anywhere."""
        if self._origin is not None:
            self._origin.restore(self.engine.state, alone=True)
        self._is_published = self.engine is None or self.engine.state.publishes_alone
        self._forget_step()

    def _publish(self) -> None:
        """Publishes what an interrupted step could not publish without the other ranks."""
        if not self._is_published:
            self.engine.state.publish()
            self._is_published = True

    def _forget_step(self) -> None:
        self.window = self._origin = self._to_check = None
        self.length.forget_step()
        self.layout.forget_step()
        self._seconds = 0.0

    # ---- Pass 1, which is TRL's own

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Context for work that counts as the update's time."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def micro_batch(self, model: torch.nn.Module) -> Iterator[None]:
        """Around TRL's `training_step`. The last one of an optimizer step is followed by the rest of the update."""
        self.in_step = True
        if self.control is not None:
            self._find_engine(model)
            self.length.follow(self.engine)
        if (self.active or self.checks) and self.window is None:
            self._open_window(model)
        try:
            with (
                self._recorded(),
                contextlib.nullcontext() if self.window is None else self.engine.passes.without_step(),
            ):
                yield
            self._seconds += time.perf_counter() - self._forward_started
            if self.window is not None:
                self.window.close_micro_batch()
            if self.trainer.accelerator.sync_gradients:
                with self.timed():
                    metrics = self._finish(model)
                self._log(metrics)
        except BaseException:
            self._break_off()
            raise

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """Replaces the trainer's loss by recorders, inside of what subclasses and users put around TRL's."""
        trainer = self.trainer
        compute_loss, compute_logps = trainer.compute_loss, trainer._get_per_token_logps_and_entropies
        mask_entropies = trainer.get_high_entropy_mask

        def recorded_loss(model, inputs, *args, **kwargs):
            self._forward_started = time.perf_counter()  # generation lies before
            if self.layout.forward_only is not None:
                with torch.no_grad(), self.layout.measuring():
                    compute_loss(model, self.layout.forward_only, *args, **kwargs)
            if self.window is not None:
                self.window.open_micro_batch(inputs, trainer.current_gradient_accumulation_steps)
            with self.layout.measuring():
                return compute_loss(model, inputs, *args, **kwargs)

        def recorded_logps(*args, **kwargs):
            outputs = compute_logps(*args, **kwargs)
            if self.window is not None and torch.is_grad_enabled():
                self.window.keep_logps(outputs[0])
            return outputs

        def recorded_mask(*args, **kwargs):
            mask = mask_entropies(*args, **kwargs)
            if self.window is not None and torch.is_grad_enabled():
                self.window.keep_entropy_mask(mask)
            return mask

        recorders = {"compute_loss": recorded_loss, "_get_per_token_logps_and_entropies": recorded_logps}
        with methods_set(trainer, {**recorders, "get_high_entropy_mask": recorded_mask}):
            yield

    def _find_engine(self, model: torch.nn.Module) -> None:
        trainer = self.trainer
        if self.engine is None or not self.engine.serves(model, trainer.optimizer):
            self.engine = make_engine(trainer.accelerator, model, trainer.optimizer, trainer.args.max_grad_norm)

    def _open_window(self, model: torch.nn.Module) -> None:
        trainer = self.trainer
        self._find_engine(model)
        self.engine.state.begin_step()
        self.window = RolloutWindow(
            generators=Generators.of(trainer.model, trainer.accelerator.device),
            freeze_old_logps=trainer.args.ratio_anchor == "rollout",
        )
        self.replays.begin()

    # ---- The passes after it

    def _finish(self, model: torch.nn.Module) -> dict[str, float | None]:
        """Runs the rest of the update rule after pass 1, and the gate. Returns the metrics of the step."""
        window, self.window = self.window, None
        self.length.see_rate()
        replayed = [] if window is None else self.layout.pack(window)
        shares = self.layout.weigh_first_pass([] if self.checks else replayed)
        if not replayed or self.checks:  # the active phase is over, or no completion of this step has an advantage
            self.backward_passes += 1
            metrics = {"active": 0.0}
            if replayed:
                self._find_length(model, window)
                if self._is_due:
                    self._to_check = ToCheck(model, window, self._copy_of_parameters())
            if window is not None:
                self.engine.passes.finish()
        else:
            with self.replays.private_metrics() as slow_metrics:
                report = self._take_step(lambda: self.replays.run(self.engine, model, window.replay()))
            if self.engine.passes.finish():
                self._origin = None
            self.backward_passes += report.passes
            metrics = self._judge(report, slow_metrics, shares, len(window.micro_batches))
        return metrics if shares is None else metrics | shares.token_fractions

    def _take_step(self, replay: Replay) -> StepReport:
        state = self.engine.state
        rule = dataclasses.replace(self.rule, alpha=self.rule.alpha * self.gate.alpha_factor)
        every, real_steps = self.trainer.args.lookahead_diagnostics_steps, None
        passes, tried_again = 1, True
        while tried_again:
            if every > 0 and self.gate.active_steps % every == 0 and not self.length.searching:
                real_steps = self._take_real_steps(replay, rule)
            if self._origin is None:
                self._origin = Origin.of(state, rule.copies_on_host, rule.rollback or self.length.takes_back)
            report = lookahead_step(state, replay, rule, Measurements(state, rule, real_steps), self._origin)
            passes += report.passes - 1
            if self.gate.decaying:  # less and less of the step lies between the two gradients
                break
            tried_again = self.length.judge(report, self.engine, self._origin, self._step)
        report.passes = passes
        self._origin.grad_0 = []  # the way back from here on is θ0's
        return report

    def _take_real_steps(self, replay: Replay, rule: LookaheadRule) -> RealSteps | None:
        """The diagnostics of a step. What is saved meanwhile are the weights before it."""
        state, kept = self.engine.state, self._origin
        start = Origin.of(state, with_optimizer=True)
        self._origin = kept or start
        extrapolation = rule.extrapolation or Extrapolation(rule.probes)
        real_steps = take_real_steps(state, lambda: one_pass(state, replay), extrapolation, start)
        self._origin = kept
        return real_steps

    # ---- The check after a step

    def _find_length(self, model: torch.nn.Module, window: RolloutWindow) -> None:
        """Where M is not known: probes halfway, on the whole batch, find the length of the step, and are undone."""
        if not self.length.searching:
            return
        state, rule = self.engine.state, two_passes(self.trainer.args.snapshot_device == "cpu")
        self._origin = Origin.of(state, rule.copies_on_host, with_optimizer=True)
        tried_again = True
        with self.replays.private_metrics(), self.length.half():
            while tried_again:
                report = lookahead_step(
                    state, lambda: self.replays.run(self.engine, model, window.replay()), rule, origin=self._origin
                )
                self._origin.return_to(state)
                self.backward_passes += report.passes - 1
                tried_again = self.length.judge_only(report, self._step) is Verdict.TRY_AGAIN
        self._origin = None

    @property
    def _is_due(self) -> bool:
        """Whether the step is the first one on its batch of rollouts, or steps are still as short as a search left
        them.
        """
        is_first = self.trainer.state.global_step % self.trainer.args.steps_of_batch == 0
        return is_first or (self.length.takes_back and not self.control.settled)

    def _replay_one(self, model: torch.nn.Module, window: RolloutWindow) -> Replay:
        """A pass over one micro-batch; each in its turn, since they are sorted by length."""
        batch, step_on_it = divmod(self.trainer.state.global_step, self.trainer.args.steps_of_batch)
        index = (batch + step_on_it) % window.replayed_micro_batches
        return lambda: self.replays.run(self.engine, model, window.replay_one(index))

    def _copy_of_parameters(self) -> Origin:
        on_host = self.trainer.args.snapshot_device == "cpu"
        return Origin([keep(shard, on_host) for shard in self.engine.state.parameters()], grad_0=[], optimizer=None)

    def _check(self, step: ToCheck) -> None:
        """Replays a micro-batch at both ends of the step taken."""
        started = time.perf_counter()
        with self.replays.private_metrics():
            replay = self._replay_one(step.model, step.window)
            report = check_step(self.engine.state, replay, lambda: self._back_at(step.origin))
        self.length.judge_only(report, self._step, repeatable=False)
        self.backward_passes += 2 / len(step.window.micro_batches)
        totals = {"backward_passes": self.backward_passes} | self.length.totals()
        self.log.add_check(report, totals, time.perf_counter() - started)

    @contextlib.contextmanager
    def _back_at(self, origin: Origin) -> Iterator[None]:
        """Where the step taken began. What is saved meanwhile, or left by a failure, is where it led."""
        origin.exchange(self.engine.state)
        self._origin = origin
        yield
        origin.exchange(self.engine.state)
        self._origin = None

    # ---- The gate, and the log

    def _judge(
        self,
        report: StepReport,
        slow_metrics: dict[str, list[float]],
        shares: Shares | None,
        micro_batches: int,
    ) -> dict[str, float | None]:
        """Passes the step's signal to the gate, and returns the metrics for the log."""
        metrics: dict[str, float | None] = {"active": 1.0}
        if report.taken_back:  # the step that was measured was undone, and the plain one taken
            metrics["cos_0_slow"] = report.cos_0_slow
        elif report.fell_back:
            self.fallbacks += 1
            logger.warning(
                f"Step {self._step}: a gradient or the repositioned point was not finite; the parameters were "
                "restored and the step is a plain one."
            )
        else:
            metrics |= report.metrics() | self.log.of_last_pass(slow_metrics, shares)
        z_score = self.gate.observe(self.log.gate_signal(report, micro_batches))
        if z_score is not None:
            metrics["gate_z"] = z_score
        if not self.gate.active:
            self.shutoff_step = self._step
        for advice in self.advisor.advise(report, self.gate):
            logger.warning(advice)
        return metrics

    def _log(self, metrics: dict[str, float | None]) -> None:
        metrics = metrics | self.length.metrics() | {"update_time": self._seconds}
        self.log.write(metrics, {name: getattr(self, name) for name in COUNTS} | self.length.totals())
        self._seconds = 0.0

    # ---- Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        state = {"gate": self.gate.state_dict(), **{name: getattr(self, name) for name in COUNTS}}
        return state if self.control is None else state | {STEP_CONTROL: self.control.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: As `check_state`, `Gate.load_state_dict` and `StepControl.load_state_dict`.
        """
        check_state(state)
        self.gate.load_state_dict(state["gate"])
        for name in COUNTS:
            setattr(self, name, state[name])
        if self.control is None:
            if STEP_CONTROL in state:
                logger.warning(
                    "The checkpoint was saved with `step_control`, whose multiplier of the learning rate, "
                    f"{state[STEP_CONTROL].get('multiplier')}, is lost: steps have the schedule's rate from here on."
                )
            return
        if STEP_CONTROL in state:
            self.control.load_state_dict(state[STEP_CONTROL])
        else:
            logger.warning("The checkpoint was saved without `step_control`, which starts from the beginning.")


STEP_CONTROL = "step_control"
"""Its key in the state of an update."""
COUNTS = ("backward_passes", "fallbacks", "shutoff_step")
"""What a run counts, in addition to its gate."""


def check_state(state: Any) -> None:
    """Refuses an invalid state of an update, without the gate's part of it.

    Raises:
        ValueError: Names the part, and what it must be.
    """
    missing = {"gate", *COUNTS} - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise ValueError(f"The state of the update has no `{'`, `'.join(sorted(missing))}`.")
    for name in COUNTS:
        fits = is_amount if name == "backward_passes" else is_count
        if not fits(state[name]) and not (name == "shutoff_step" and state[name] is None):
            raise ValueError(f"`{name}` of the state of the update must be a count, got {state[name]!r}.")
