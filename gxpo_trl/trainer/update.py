"""From the rollouts of one optimizer step to its update: window, rule and gate, and what is logged of them."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.logging import get_logger
from trl import GRPOTrainer

from ..engines import Engine, make_engine
from ..rollout.window import RolloutWindow
from ..update.algorithm import lookahead_step, one_pass
from ..update.extrapolation import Extrapolation
from ..update.measurements import Measurements, StepReport, take_real_steps
from .advice import Advisor
from .layout import BatchLayout, Shares


logger = get_logger(__name__)

SLOW_METRICS = {
    "clip_ratio/region_mean": "clip_ratio_slow",
    "cispo_clip_ratio": "clip_ratio_slow",
    "kl": "kl_slow",
}
"""TRL's names of what the last pass measures, and ours."""

MOVED_BY_LOSS = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
"""TRL's adaptive entropy bonus: `compute_loss` moves it, and replays must not."""


class LookaheadUpdate:
    """The update of a trainer: what it holds between steps, and what it does with the rollouts of each.

    Args:
        trainer (`GRPOTrainer`): Whose loss is computed again. Its arguments are a `LookaheadConfig`.

    Attributes:
        rule (`LookaheadRule`, *optional*): The update rule; `None` for TRL's own single pass.
        gate (`Gate`): Whether the active phase lasts.
        layout (`BatchLayout`): How the rollouts are laid out.
        engine (`Engine`, *optional*): Chosen at the first active step, when the model is wrapped.
        window (`RolloutWindow`, *optional*): Of the step under way, while pass 1 is being recorded.
        backward_passes (`int`): Passes of the run so far.
        fallbacks (`int`): Active steps that became plain ones.
        shutoff_step (`int`, *optional*): The step after which the active phase was over.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.rule = trainer.args.lookahead_rule()
        self.gate = trainer.args.gate()
        self.layout = BatchLayout(trainer)
        self.advisor = Advisor(trainer.args)
        self.engine: Engine | None = None
        self.window: RolloutWindow | None = None
        self.backward_passes = 0
        self.fallbacks = 0
        self.shutoff_step: int | None = None
        self._moved_at_window_start: dict[str, Any] = {}
        self._seconds = 0.0  # of the step under way, without generation
        self._forward_started = 0.0

    @property
    def active(self) -> bool:
        """Whether the next optimizer step is a lookahead step."""
        return self.rule is not None and self.gate.active

    # ---- Pass 1, which is TRL's own

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what belongs to the update's time."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def micro_batch(self, model: torch.nn.Module) -> Iterator[None]:
        """Around TRL's `training_step`. The last one of an optimizer step is followed by the rest of the update."""
        if self.active and self.window is None:
            self._open_window(model)
        try:
            with contextlib.nullcontext() if self.window is None else self.engine.passes.without_step():
                yield
            self._seconds += time.perf_counter() - self._forward_started
            if self.trainer.accelerator.sync_gradients:
                with self.timed():
                    metrics = self._finish(model)
                self._log(metrics)
        except BaseException:
            self.window, self.layout.first_pass = None, []  # `train()` may be called again, with a step of its own
            raise

    def open_micro_batch(self, inputs: dict[str, Any]) -> None:
        """A forward pass is about to begin: in training, or in an evaluation, which is none of ours."""
        self._forward_started = time.perf_counter()  # generation lies before
        if self.window is not None and self.trainer.model.training:
            self.window.open_micro_batch(inputs)

    def keep_logps(self, per_token_logps: torch.Tensor) -> None:
        """Log-probabilities (B, T) have been computed: those of pass 1 if gradients are."""
        if self.window is not None and torch.is_grad_enabled():
            self.window.keep_logps(per_token_logps)

    def _open_window(self, model: torch.nn.Module) -> None:
        trainer = self.trainer
        if self.engine is None or not self.engine.serves(model, trainer.optimizer):
            self.engine = make_engine(trainer.accelerator, model, trainer.optimizer, trainer.args.max_grad_norm)
        self.window = RolloutWindow(
            devices={parameter.device for parameter in trainer.model.parameters()},
            freeze_old_logps=trainer.args.ratio_anchor == "rollout",
        )
        self._moved_at_window_start = self._moved_by_loss()

    # ---- The passes after it

    def _finish(self, model: torch.nn.Module) -> dict[str, float]:
        """What follows pass 1: the rest of the update rule, and the gate. Returns the metrics of the step."""
        window, self.window = self.window, None
        replayed = [] if window is None else self.layout.pack(window)
        shares = self.layout.weigh_first_pass(replayed)
        if not replayed:  # the active phase is over, or no completion of this step has an advantage
            self.backward_passes += 1
            metrics = {"active": 0.0}
            if window is not None:
                self.engine.passes.finish()
        else:
            with self._private_metrics() as slow_metrics:
                report = self._take_step(lambda: self._replay(model, window))
            self.engine.passes.finish()
            self.backward_passes += report.passes
            metrics = self._judge(report, slow_metrics, shares, len(window.micro_batches))
        return metrics if shares is None else metrics | shares.token_fractions

    def _take_step(self, replay) -> StepReport:
        state = self.engine.state
        rule = dataclasses.replace(self.rule, alpha=self.rule.alpha * self.gate.alpha_factor)
        every, real_steps = self.trainer.args.lookahead_diagnostics_steps, None
        if every > 0 and self.gate.active_steps % every == 0:
            extrapolation = rule.extrapolation or Extrapolation(rule.probes)
            real_steps = take_real_steps(state, lambda: one_pass(state, replay), extrapolation)
        return lookahead_step(state, replay, rule, Measurements(state, rule, real_steps))

    def _replay(self, model: torch.nn.Module, window: RolloutWindow) -> None:
        """One pass over the window at the present parameters, as TRL's own `training_step` would make it."""
        trainer, passes = self.trainer, self.engine.passes
        trainer._metrics["train"].clear()
        self._set_moved_by_loss(self._moved_at_window_start)
        for inputs, is_last in window.replay():
            with passes.micro_batch(is_last):
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, inputs)
                passes.backward(loss)

    @contextlib.contextmanager
    def _private_metrics(self) -> Iterator[dict[str, list[float]]]:
        """Around replays: TRL's metrics, and what its loss moves, stay those of pass 1. Yields what a pass wrote."""
        trainer = self.trainer
        metrics, moved = trainer._metrics, self._moved_by_loss()
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield trainer._metrics["train"]
        finally:
            trainer._metrics = metrics
            self._set_moved_by_loss(moved)

    def _moved_by_loss(self) -> dict[str, Any]:
        return {name: getattr(self.trainer, name) for name in MOVED_BY_LOSS}

    def _set_moved_by_loss(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.trainer, name, value)

    # ---- Gate and metrics

    def _judge(
        self,
        report: StepReport,
        slow_metrics: dict[str, list[float]],
        shares: Shares | None,
        micro_batches: int,
    ) -> dict[str, float]:
        """Shows the gate what the step measured, and names it for the log."""
        step = self.trainer.state.global_step + 1
        metrics = {"active": 1.0, **report.metrics()}
        if report.fell_back:
            self.fallbacks += 1
            logger.warning(
                f"Step {step}: a gradient or the repositioned point was not finite; the parameters were restored and "
                "the step is a plain one."
            )
        else:
            metrics |= self._average_slow_metrics(slow_metrics, shares)
        z_score = self.gate.observe(self._gate_signal(report, micro_batches))
        if z_score is not None:
            metrics["gate_z"] = z_score
        if not self.gate.active:
            self.shutoff_step = step
        for advice in self.advisor.advise(report, self.gate):
            logger.warning(advice)
        return metrics

    def _average_slow_metrics(self, slow_metrics: dict[str, list[float]], shares: Shares | None) -> dict[str, float]:
        averages = {}
        for trl_name, name in SLOW_METRICS.items():
            if values := slow_metrics.get(trl_name):
                weights = [1 / len(values)] * len(values)
                if shares is not None:
                    by_tokens = self.layout.weighs_tokens(trl_name)
                    weights = shares.replayed_tokens if by_tokens else shares.replayed_rows
                averages[name] = sum(v * weight for v, weight in zip(values, weights, strict=True))
        return averages

    def _gate_signal(self, report: StepReport, micro_batches: int) -> float:
        """The value of this step that the gate watches, equal on every rank; NaN where there is none."""
        signal = self.trainer.args.gate_signal
        if report.fell_back:
            return math.nan
        if signal == "entropy":
            return statistics.fmean(self.trainer._metrics["train"]["entropy"][-micro_batches:])
        if signal == "cosine":
            return math.nan if report.cos_0_slow is None else 1.0 - report.cos_0_slow
        return report.grad_norm_slow

    def _log(self, metrics: dict[str, float]) -> None:
        log = self.trainer._metrics["train"]
        for name, value in metrics.items():
            log[f"lookahead/{name}"].append(value)
        log["lookahead/update_time"].append(self._seconds)
        self._seconds = 0.0
        # Running totals: TRL logs the mean of each list over the logging interval, and of these only the last counts.
        log["lookahead/backward_passes"] = [self.backward_passes]
        log["lookahead/fallbacks"] = [self.fallbacks]
        if torch.cuda.is_available():
            log["lookahead/peak_memory"] = [torch.cuda.max_memory_allocated() / 2**30]
        if self.shutoff_step is not None:
            log["lookahead/shutoff_step"] = [self.shutoff_step]

    # ---- Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        names = ("backward_passes", "fallbacks", "shutoff_step")
        return {"gate": self.gate.state_dict(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off.

        Raises:
            ValueError: As `Gate.load_state_dict`.
        """
        self.gate.load_state_dict(state["gate"])
        for name in ("backward_passes", "fallbacks", "shutoff_step"):
            setattr(self, name, state[name])
