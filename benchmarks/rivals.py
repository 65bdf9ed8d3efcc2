"""Other ways to go without a tuned learning rate, as a user would try them first, as patches of TRL's GRPO.

Each is a context manager around the making and training of a trainer. Prodigy and schedule-free are the packages
`prodigyopt` and `schedulefree`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from unittest.mock import patch

import torch
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

from gxpo_trl.callbacks.benchmarks import BenchmarkCallback


TARGET_KL, KL_FACTOR = 0.01, 1.5
"""As rsl_rl has them: the rate is divided by the factor above twice the target, and multiplied below half of it."""
HYPERGRADIENT = 0.1
"""β of hypergradient descent (1703.04782), in its multiplicative form."""


class Rates(TrainerCallback):
    """Multiplies the learning rate, and lets the schedule continue from there.

    Args:
        trainer (`GRPOTrainer`): Whose rate it is.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def multiply(self, factor: float) -> None:
        scheduler = self.trainer.lr_scheduler
        for scheduled in (scheduler, getattr(scheduler, "scheduler", scheduler)):
            if hasattr(scheduled, "base_lrs"):
                scheduled.base_lrs = [rate * factor for rate in scheduled.base_lrs]
                break
        for group in self.trainer.optimizer.param_groups:
            group["lr"] *= factor


class AdaptiveKL(Rates):
    """The rate follows the KL divergence that the second iteration over a batch finds, as in PPO's adaptive KL."""

    def __init__(self, trainer: GRPOTrainer):
        super().__init__(trainer)
        self.logps, self.sums = None, [0.0, 0.0]

    def on_step_end(self, args, state, control, **kwargs):
        total, tokens = self.sums
        self.sums = [0.0, 0.0]
        if state.global_step % args.num_iterations == 0 and tokens:  # after the second iteration
            if total / tokens > 2 * TARGET_KL:
                self.multiply(1 / KL_FACTOR)
            elif total / tokens < TARGET_KL / 2:
                self.multiply(KL_FACTOR)


@contextlib.contextmanager
def adaptive_kl() -> Iterator[None]:
    """GRPO of two iterations whose rate holds a target KL."""
    compute_logps, compute_loss = GRPOTrainer._get_per_token_logps_and_entropies, GRPOTrainer._compute_loss

    def logps_kept(trainer, *args, **kwargs):
        outputs = compute_logps(trainer, *args, **kwargs)
        if torch.is_grad_enabled():
            watch_of(trainer).logps = outputs[0].detach()
        return outputs

    def loss_watched(trainer, model, inputs):
        loss, watch = compute_loss(trainer, model, inputs), watch_of(trainer)
        if not torch.is_grad_enabled():
            return loss
        log_ratio = watch.logps - inputs["old_per_token_logps"]
        mask = inputs["completion_mask"]
        watch.sums[0] += ((log_ratio.exp() - 1 - log_ratio) * mask).sum().item()
        watch.sums[1] += mask.sum().item()
        return loss

    with (
        _with_callback(AdaptiveKL),
        patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", logps_kept),
        patch.object(GRPOTrainer, "_compute_loss", loss_watched),
    ):
        yield


def watch_of(trainer: GRPOTrainer) -> AdaptiveKL:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, AdaptiveKL))


class Hypergradient(Rates):
    """The rate grows where a gradient agrees with the step before it."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.before, self.step = None, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        self.before = torch.cat([p.detach().flatten() for p in parameters])
        if self.step is not None and self.step.norm() > 0 and gradient.norm() > 0:
            cosine = torch.nn.functional.cosine_similarity(gradient, -self.step, dim=0).item()
            if math.isfinite(cosine):
                self.multiply(1 + HYPERGRADIENT * cosine)

    def on_optimizer_step(self, args, state, control, **kwargs):
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        self.step = torch.cat([p.detach().flatten() for p in parameters]) - self.before


@contextlib.contextmanager
def other_optimizer(make: Callable[..., torch.optim.Optimizer]) -> Iterator[None]:
    """Every trainer has this optimizer, of its learning rate."""

    def create_optimizer(trainer, *args, **kwargs):
        if trainer.optimizer is None:
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            trainer.optimizer = make(parameters, lr=trainer.args.learning_rate)
        return trainer.optimizer

    with patch.object(Trainer, "create_optimizer", create_optimizer):
        yield


def prodigy() -> AbstractContextManager[None]:
    """GRPO with Prodigy (2306.06101), whose rate is 1 as its authors advise."""
    from prodigyopt import Prodigy

    return other_optimizer(partial(Prodigy, weight_decay=0.0))


@contextlib.contextmanager
def schedule_free() -> Iterator[None]:
    """GRPO with schedule-free AdamW (2405.15682); benchmarks are scored at its average, as its authors advise."""
    from schedulefree import AdamWScheduleFree

    def make(parameters, lr):
        optimizer = AdamWScheduleFree(parameters, lr=lr)
        optimizer.train()
        return optimizer

    score = BenchmarkCallback.score

    def score_at_average(callback):
        optimizer = callback.trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if optimizer is None:
            return score(callback)
        optimizer.eval()
        try:
            return score(callback)
        finally:
            optimizer.train()

    with (
        other_optimizer(make),
        patch.object(BenchmarkCallback, "score", score_at_average),
    ):
        yield


@contextlib.contextmanager
def _with_callback(make: Callable[[GRPOTrainer], TrainerCallback]) -> Iterator[None]:
    """Every trainer made meanwhile has one more callback."""
    initialize = GRPOTrainer.__init__

    def with_it(trainer, *args, **kwargs):
        initialize(trainer, *args, **kwargs)
        trainer.add_callback(make(trainer))

    with patch.object(GRPOTrainer, "__init__", with_it):
        yield


RIVALS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "adaptive KL": adaptive_kl,
    "hypergradient": lambda: _with_callback(Hypergradient),
    "prodigy": prodigy,
    "schedule-free": schedule_free,
}
