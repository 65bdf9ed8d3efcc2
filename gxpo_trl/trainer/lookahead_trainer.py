"""The trainer: collects one optimizer step's rollouts, runs the update rule on them, logs and checkpoints."""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import get_config_model_id

from ..rollout.compaction import LOSS_WEIGHT, Compaction
from ..rollout.window import RolloutWindow
from ..update.engines import (
    Engine,
    check_decoupled_decay,
    check_engine,
    keeps_fp32_parameters,
    make_engine,
    reduce_in_fp32,
)
from ..update.step import LookaheadReport, lookahead_step
from .advice import Advisor
from .compacting import CompactingMixin, Shares
from .evaluating import BenchmarkMixin
from .lookahead_config import LookaheadArguments, LookaheadConfig
from .publishing import PublishingMixin
from .recording import RecordingMixin
from .tracking import TrackingMixin
from .trajectory import TrajectoryMixin


logger = get_logger(__name__)

STATE_NAME = "lookahead_state.json"
SLOW_METRICS = {
    "clip_ratio/region_mean": "clip_ratio_slow",
    "cispo_clip_ratio": "clip_ratio_slow",
    "kl": "kl_slow",
}
"""TRL's names of what the last pass measures, and ours."""


class LookaheadMixin(
    CompactingMixin,
    RecordingMixin,
    BenchmarkMixin,
    TrajectoryMixin,
    PublishingMixin,
    TrackingMixin,
):
    """
    The lookahead policy updates, over a TRL trainer whose loss can be computed again on the rollouts of a step.

    The first pass over the rollouts is TRL's own. When its last micro-batch is done and the active phase lasts,
    `training_step` runs the rest of the update rule of `args.update_rule` on the same rollouts and leaves the
    corrective gradient to the training loop, which clips and steps as always. Schedule, callbacks, logging, saving,
    evaluation and vLLM see committed weights only, once per step.
    """

    _config_class: type[LookaheadArguments]
    _moved_by_loss: tuple[str, ...] = ()  # attributes that `compute_loss` moves, and replays must not
    _freezes_old_logps = True  # whether the old log-probabilities are to be kept from pass 1 where TRL keeps none

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        if not isinstance(self, (GRPOTrainer, RLOOTrainer)):
            raise ValueError(
                f"{type(self).__name__} is no GRPOTrainer or RLOOTrainer of TRL, and lookahead updates know no other "
                "training step. Asynchronous GRPO has no window of rollouts to replay: use GRPOTrainer with vLLM."
            )
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self._config_class(f"{model_name.split('/')[-1]}-{self._name}")
        if not isinstance(args, LookaheadArguments):
            raise ValueError(
                f"`args` must be a {self._config_class.__name__}, got a {type(args).__name__}. It takes every "
                f"argument of the {type(args).__name__}: change the name."
            )
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

        self._uses_lookahead = args.update_rule != "grpo"
        self._rule = args.lookahead_rule()
        if self._uses_lookahead:
            check_engine(self.accelerator, self.model)
            reduce_in_fp32(self.accelerator)
            self._check_parameter_precision()
            if self._rule.uses_updates and self.optimizer is not None:
                check_decoupled_decay(self.optimizer)
        self._gate = args.gate()
        self._advisor = Advisor(args)
        self._engine: Engine | None = None  # chosen at the first active step, when the model is wrapped
        self._set_up_compaction()
        self._set_up_recording()
        self._set_up_tracking()
        self._set_up_benchmarks()
        self._set_up_trajectory()
        self._window: RolloutWindow | None = None  # of the step under way, while pass 1 is being recorded
        self._moved_at_window_start: dict[str, Any] = {}
        self._backward_passes = 0
        self._fallbacks = 0
        self._shutoff_step: int | None = None
        self._update_time = 0.0
        self._update_started = 0.0
        self.accelerator.print(self._describe_batch())

    @property
    def lookahead_active(self) -> bool:
        """Whether the next optimizer step is a lookahead step."""
        return self._uses_lookahead and self._gate.active

    # ---- One optimizer step

    def training_step(self, model, inputs, num_items_in_batch):
        if self.lookahead_active and self._window is None:
            self._open_window(model)
        try:
            with contextlib.nullcontext() if self._window is None else self._engine.without_step():
                output = super().training_step(model, inputs, num_items_in_batch)
            self._update_time += time.perf_counter() - self._update_started
            if self.accelerator.sync_gradients:
                self._finish_update(model)
        except BaseException:
            self._window, self._first_pass = None, []  # `train()` may be called again, with a step of its own
            raise
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._update_started = time.perf_counter()  # generation lies before; it is no part of the update
        if self._window is not None and self.model.training:
            self._window.open_micro_batch(inputs)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * inputs[LOSS_WEIGHT] if LOSS_WEIGHT in inputs else loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._window is not None and torch.is_grad_enabled():
            self._window.keep_logps(outputs[0])
        return outputs

    def _open_window(self, model) -> None:
        engine = self._engine
        if engine is None or engine.model is not model or engine.optimizer is not self.optimizer:
            self._engine = make_engine(self.accelerator, model, self.optimizer, self.args.max_grad_norm)
        self._window = RolloutWindow(
            devices={parameter.device for parameter in self.model.parameters()},
            freeze_old_logps=self._freezes_old_logps and self.args.ratio_anchor == "rollout",
        )
        self._moved_at_window_start = self._moved_state()

    def _finish_update(self, model) -> None:
        """What follows pass 1: the rest of the update rule, the gate, the metrics."""
        started = time.perf_counter()
        window, self._window = self._window, None
        first, self._first_pass = self._first_pass, []
        replayed = [] if window is None else self._pack(window)
        shares = self._weigh_first_pass(first, replayed)
        if not replayed:  # the active phase is over, or no completion of this step has an advantage
            self._backward_passes += 1
            self._gate.rest()
            metrics = {"active": 0.0}
            if window is not None:
                self._engine.finish()
        else:
            rule = dataclasses.replace(self._rule, alpha=self._rule.alpha * self._gate.alpha_factor)
            every = self.args.lookahead_diagnostics_steps
            diagnose = every > 0 and self._gate.active_steps % every == 0
            with self._private_metrics() as slow_metrics:
                report = lookahead_step(self._engine, lambda: self._replay(model, window), rule, diagnose)
            self._engine.finish()
            self._backward_passes += report.passes
            metrics = self._judge(report, slow_metrics, shares, len(window.micro_batches))
        if shares is not None:
            metrics |= shares.token_fractions
        self._update_time += time.perf_counter() - started
        self._log_update(metrics)

    def _replay(self, model, window: RolloutWindow) -> None:
        """One pass over the window at the present parameters, as TRL's own `training_step` would make it."""
        self._metrics["train"].clear()
        self._set_moved_state(self._moved_at_window_start)
        for inputs, is_last in window.replay():
            with self._engine.micro_batch(is_last):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, inputs)
                if not self.loss_is_scaled_for_ga:
                    loss = loss / self.current_gradient_accumulation_steps
                self._engine.backward(loss)

    @contextlib.contextmanager
    def _private_metrics(self) -> Iterator[dict[str, list[float]]]:
        """Around replays: TRL's metrics, and what its loss moves, stay those of pass 1. Yields what a pass wrote."""
        metrics, moved = self._metrics, self._moved_state()
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield self._metrics["train"]
        finally:
            self._metrics = metrics
            self._set_moved_state(moved)

    def _moved_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._moved_by_loss}

    def _set_moved_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    # ---- Gate and metrics

    def _judge(
        self,
        report: LookaheadReport,
        slow_metrics: dict[str, list[float]],
        shares: Shares | None,
        micro_batches: int,
    ) -> dict[str, float]:
        """Shows the gate what the step measured, and names it for the log."""
        metrics = {"active": 1.0, **report.metrics()}
        if report.fell_back:
            self._fallbacks += 1
            logger.warning(
                f"Step {self.state.global_step + 1}: a gradient or the repositioned point was not finite; "
                "the parameters were restored and the step is a plain one."
            )
        else:
            for trl_name, name in SLOW_METRICS.items():
                if values := slow_metrics.get(trl_name):
                    weights = [1 / len(values)] * len(values)
                    if shares is not None:
                        weights = shares.replayed_tokens if self._weighs_tokens(trl_name) else shares.replayed_rows
                    metrics[name] = sum(v * weight for v, weight in zip(values, weights, strict=True))
        z_score = self._gate.observe(self._gate_signal(report, micro_batches))
        if z_score is not None:
            metrics["gate_z"] = z_score
        if not self._gate.active:
            self._shutoff_step = self.state.global_step + 1
        for advice in self._advisor.hear(report, self._gate):
            logger.warning(advice)
        return metrics

    def _gate_signal(self, report: LookaheadReport, micro_batches: int) -> float:
        """The value of this step that the gate watches, equal on every rank; NaN where there is none."""
        if report.fell_back:
            return math.nan
        if self.args.gate_signal == "entropy":
            return statistics.fmean(self._metrics["train"]["entropy"][-micro_batches:])
        if self.args.gate_signal == "cosine":
            return math.nan if report.cos_0_slow is None else 1.0 - report.cos_0_slow
        return report.grad_norm_slow

    def _log_update(self, metrics: dict[str, float]) -> None:
        log = self._metrics["train"]
        for name, value in metrics.items():
            log[f"lookahead/{name}"].append(value)
        for name, seconds in self._take_times().items():
            log[f"lookahead/{name}"].append(seconds)
        # Running totals: TRL logs the mean of each list over the logging interval, and of these only the last counts.
        log["lookahead/backward_passes"] = [self._backward_passes]
        log["lookahead/fallbacks"] = [self._fallbacks]
        log["lookahead/elapsed_time"] = [self._seconds_spent()]
        if torch.cuda.is_available():
            log["lookahead/peak_memory"] = [torch.cuda.max_memory_allocated() / 2**30]
        if self._shutoff_step is not None:
            log["lookahead/shutoff_step"] = [self._shutoff_step]

    def _describe_batch(self) -> str:
        """The start-up line: prompts × generations × devices × accumulation × passes."""
        args = self.args
        completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        passes = "1 pass"
        if self._uses_lookahead:
            passes = f"{self._rule.passes} passes while active and 1 after"
        return (
            f"{args.update_rule.upper()}: {completions / args.num_generations:g} prompts × {args.num_generations} "
            f"generations = {completions} completions an optimizer step, as {args.world_size} device(s) × "
            f"{args.gradient_accumulation_steps} accumulation steps × {args.per_device_train_batch_size}; "
            f"{passes} over them."
        )

    def _check_parameter_precision(self) -> None:
        if keeps_fp32_parameters(self.accelerator, self.model):
            return
        low = {p.dtype for p in self.model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
        if low and not self.args.allow_low_precision_parameters:
            raise ValueError(
                f"Trainable parameters are stored in {', '.join(sorted(map(str, low)))}: a step of a small learning "
                "rate vanishes in its rounding, and with it the retention ratio. Load the model in fp32 (`dtype: "
                "float32`; `bf16: true` still computes in bf16), or set `allow_low_precision_parameters: true`."
            )

    # ---- Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            path = Path(output_dir) / STATE_NAME
            state = {
                "gate": self._gate.state_dict(),
                "backward_passes": self._backward_passes,
                "fallbacks": self._fallbacks,
                "shutoff_step": self._shutoff_step,
                "rollouts": self._rollouts,
                "seconds": self._seconds_spent(),
            }
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(state, indent=2))
            os.replace(partial, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_NAME
        if not path.is_file():
            logger.warning(
                f"{checkpoint} holds no {STATE_NAME}: it was not saved by a LookaheadTrainer. The gate and the count "
                "of backward passes start afresh."
            )
            return
        state = json.loads(path.read_text())
        self._gate.load_state_dict(state["gate"])
        self._backward_passes = state["backward_passes"]
        self._fallbacks = state["fallbacks"]
        self._shutoff_step = state["shutoff_step"]
        self._rollouts, self._seconds = state["rollouts"], state["seconds"]


class LookaheadTrainer(LookaheadMixin, GRPOTrainer):
    """
    Trainer for lookahead policy updates: [`~trl.GRPOTrainer`] that moves the policy further on each batch of rollouts.

    Args:
        model, reward_funcs:
            As for [`~trl.GRPOTrainer`].
        args ([`LookaheadConfig`], *optional*):
            Configuration. If `None`, a default one.
        *positional, **kwargs:
            The other arguments of [`~trl.GRPOTrainer`], in its order.

    Raises:
        `ValueError`: If the set-up is not supported: the engine, the precision of the trainable parameters, or `args`
            that are no [`LookaheadConfig`].
    """

    _config_class = LookaheadConfig
    _moved_by_loss = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")  # the entropy controller

    @property
    def _ratio_per_token(self) -> bool:
        return self.importance_sampling_level == "token"

    def _why_no_benchmarks(self) -> str | None:
        if self.rollout_func is not None:
            return "`rollout_func` generates"
        return "tools are called between turns" if self.tools else None

    def _loss_allows(self) -> Compaction | None:
        corrects_by_sequence = self.loss_type == "vespo" and self.use_vllm and self.vllm_importance_sampling_correction
        if type(self)._compute_loss is not GRPOTrainer._compute_loss or self.aux_loss_enabled or corrects_by_sequence:
            return None  # not TRL's loss; or one that sees padding: the router's load, VESPO's unmasked sum
        additive = self.loss_type != "bnpo" and not self._entropy_bonus_enabled and self.top_entropy_quantile >= 1.0
        return Compaction(
            regroup=additive,
            averages_rows=self.loss_type not in ("cispo", "dapo", "vespo"),
            prunes=additive and self.beta == 0.0,
        )
