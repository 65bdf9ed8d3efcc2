"""The log of a step: its measurements, TRL's metrics of the last pass, and running totals."""

import math
import statistics

import torch
from trl import GRPOTrainer

from ..update.measurements import StepReport
from .layout import BatchLayout, Shares


SLOW_METRICS = {
    "clip_ratio/region_mean": "clip_ratio_slow",
    "cispo_clip_ratio": "clip_ratio_slow",
    "kl": "kl_slow",
}
"""TRL's names of the metrics of the last pass, and ours."""


class StepLog:
    """Writes the measurements of steps into TRL's log.

    Args:
        trainer (`GRPOTrainer`): The trainer of the log. Its arguments are a `LookaheadConfig`.
        layout (`BatchLayout`): Gives the weights of micro-batches.
    """

    def __init__(self, trainer: GRPOTrainer, layout: BatchLayout):
        self.trainer, self.layout = trainer, layout

    def of_last_pass(self, measured: dict[str, list[float]], shares: Shares | None) -> dict[str, float]:
        """TRL's metrics of the last pass, one value for each micro-batch, as means under our names."""
        averages = {}
        for trl_name, name in SLOW_METRICS.items():
            if values := measured.get(trl_name):
                weights = [1 / len(values)] * len(values)
                if shares is not None:
                    by_tokens = self.layout.weighs_tokens(trl_name)
                    weights = shares.replayed_tokens if by_tokens else shares.replayed_rows
                averages[name] = sum(v * weight for v, weight in zip(values, weights, strict=True))
        return averages

    def gate_signal(self, report: StepReport, micro_batches: int) -> float:
        """The value of a step that the gate watches, equal on every rank; NaN if there is none."""
        signal = self.trainer.args.gate_signal
        if report.fell_back or report.taken_back:
            return math.nan
        if signal == "entropy":
            return statistics.fmean(self.trainer._metrics["train"]["entropy"][-micro_batches:])
        if signal == "cosine":
            return math.nan if report.cos_0_slow is None else 1.0 - report.cos_0_slow
        return report.grad_norm_slow

    def add_check(self, report: StepReport, totals: dict[str, float], seconds: float) -> None:
        """Adds the result of a check, and totals that it changes: it comes after the rest of the step was written."""
        log = self.trainer._metrics["train"]
        if report.cos_0_slow is not None:
            log["lookahead/cos_check"].append(report.cos_0_slow)
        times = log["lookahead/update_time"]
        times[-1:] = [seconds + (times[-1] if times else 0.0)]  # a callback may have logged what was there
        for name, value in totals.items():
            log[f"lookahead/{name}"] = [value]

    def write(self, metrics: dict[str, float | None], totals: dict[str, float | None]) -> None:
        """Adds a step's metrics to those that TRL logs next, without those that are `None`: not measured.

        Args:
            metrics (`dict[str, float | None]`): The metrics of the step.
            totals (`dict[str, float | None]`): Running totals. TRL logs the mean of each list over the logging
                interval, so a total has only its last value in the list.
        """
        log = self.trainer._metrics["train"]
        for name, value in metrics.items():
            if value is not None:
                log[f"lookahead/{name}"].append(value)
        if torch.cuda.is_available():
            totals = totals | {"peak_memory": torch.cuda.max_memory_allocated() / 2**30}
        for name, value in totals.items():
            if value is not None:
                log[f"lookahead/{name}"] = [value]
