"""Runs for comparisons, of the embedded task unless another recipe is named, one after the other on one thread."""

import contextlib
import itertools
import os
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from rivals import RIVALS, other_optimizer
from transformers import PrinterCallback
from trl import GRPOTrainer

from gxpo_trl.callbacks import records
from gxpo_trl.rollout.compaction import completion_lengths, merge, prune, take
from gxpo_trl.rollout.window import RolloutWindow
from gxpo_trl.run_folder import TRAINER_STATE_NAME
from gxpo_trl.scripts import building
from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.demo import quieten
from gxpo_trl.scripts.next_loop import train_around_extrapolation
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks.datasets import PROBLEM_SETS, ProblemSet
from gxpo_trl.trainer import config, update
from gxpo_trl.trainer.layout import BatchLayout
from gxpo_trl.trainer.rules import make_rule
from gxpo_trl.update import algorithm
from gxpo_trl.update.algorithm import LookaheadRule, one_pass
from gxpo_trl.update.extrapolation import retention_and_scale
from gxpo_trl.update.measurements import StepReport, take_real_steps
from gxpo_trl.update.snapshot import Origin
from gxpo_trl.update.state import TrainingState


Settings = dict[str, Any]
"""Where a run differs from its recipe, by name."""
RECIPE = "gxpo:tiny/grpo.yaml"
HELD_OUT = "held-out"
"""The benchmark of these runs: the file `held-out.json` next to their data."""


def start_worker(cpu_time: bool = True) -> None:
    """Prepares a process for runs. Their clocks count CPU time, so that a busy machine matters less, or the wall's."""
    warnings.simplefilter("ignore")
    quieten()
    torch.set_num_threads(1)  # the model is too small to share
    if cpu_time:
        records.time = SimpleNamespace(perf_counter=time.process_time)


def train_run(
    folder: Path, settings: Settings, hooks: Sequence[str] = (), keeps_model: bool = False, recipe: str = RECIPE
) -> Path:
    """Trains one run, with some of `HOOKS`, unless its folder holds it whole. Its model is left there if asked for."""
    if not (folder / TRAINER_STATE_NAME).is_file():
        with _silence(), contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(HOOKS[hook]())
            trainer = build_trainer(parse_recipe(_command_line(folder, settings, recipe)))
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            if keeps_model:
                trainer.save_model()
            trainer.save_state()
    return folder


def train_loop(folder: Path, settings: Settings, alphas: Sequence[float]) -> dict[float, Path]:
    """A run that is extrapolated during training, once for each α, from one run up to that step.

    Returns:
        `dict[float, Path]`: By α, a folder with `before` and `after`.
    """
    before = {name: value for name, value in settings.items() if not name.startswith("extrapolate_")}
    train_run(folder / "common" / "before", before | {"max_steps": settings["extrapolate_after"]}, keeps_model=True)
    found = {}
    for alpha in alphas:
        found[alpha] = place = folder / f"alpha-{alpha:g}"
        if not (place / "after" / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / "common", place)
            goes_on = {"extrapolate_alpha": alpha, "resume_from_checkpoint": "last"}
            with _silence():
                train_around_extrapolation(parse_recipe(_command_line(place, settings | goes_on)))
    return found


def _command_line(folder: Path, settings: Settings, recipe: str = RECIPE) -> list[str]:
    if recipe == RECIPE:
        problems = str(settings["dataset_name"].with_name("held-out.json"))
        PROBLEM_SETS[HELD_OUT] = ProblemSet("json", split="train", kind="arithmetic", data_files=problems)
    words = ["--config", recipe, "--disable_tqdm", "true", "--log_level", "error"]
    for name, value in {**settings, "output_dir": folder}.items():
        words += [f"--{name}", *(value if isinstance(value, list) else ["null" if value is None else str(value)])]
    return words


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ---- Options that the package has no setting for


@contextlib.contextmanager
def one_ratio_per_matrix() -> Iterator[None]:
    """GXPO with ⟨g0, g1⟩ / ‖g0‖² of each parameter in place of the ratios of its coordinates."""

    def of_matrix(grad_0, grad_1, rule):
        ratio = torch.sum(grad_0 * grad_1) / grad_0.square().sum()
        everywhere = replace(rule, active_threshold=0.0)
        retention, scale, _ = retention_and_scale(torch.ones_like(grad_0), ratio.expand_as(grad_0), everywhere)
        return retention, scale, grad_0.abs() > rule.active_threshold

    with patch.object(algorithm, "retention_and_scale", of_matrix):
        yield


@contextlib.contextmanager
def passes_on_a_part(fraction: float) -> Iterator[None]:
    """Passes after the first are on a part of the rows that have an advantage, the same in all of them.

    A row is drawn with a probability p proportional to |advantage| · √length, and weighs 1 / p, so that the gradient
    is right on average.
    """
    pack, generator = BatchLayout.pack, torch.Generator().manual_seed(0)

    def pack_a_part(layout, window):
        rollouts = pack(layout, window)
        if not rollouts:
            return rollouts
        rows = merge(rollouts)
        advantages = rows["advantages"]
        weights = advantages.abs() * completion_lengths(rows).sqrt()
        chances = _chances(weights, fraction * weights.count_nonzero())
        drawn = torch.rand(len(chances), generator=generator) < chances
        if not drawn.any():
            drawn = chances == chances.max()
        rows["advantages"] = torch.where(drawn, advantages / chances, 0.0)
        window.packed = prune([rows], layout.nominal_rows, layout.compaction)
        return window.packed

    with patch.object(BatchLayout, "pack", pack_a_part):
        yield


@contextlib.contextmanager
def passes_on_earlier_batches(batches: int) -> Iterator[None]:
    """Passes after the first are on as many rows of the last batches as the present one has with an advantage, drawn
    with a probability proportional to |advantage|. Their ratios are to the policy that sampled them.
    """
    pack, generator, kept = BatchLayout.pack, torch.Generator().manual_seed(0), deque(maxlen=batches)

    def pack_earlier(layout, window):
        rollouts = pack(layout, window)
        if not rollouts:
            return rollouts
        earlier, rows = list(kept), merge(rollouts)
        kept.append(rows)
        if earlier:
            pool = merge(earlier)
            count = min(len(rows["advantages"]), len(pool["advantages"]))
            drawn = torch.multinomial(pool["advantages"].abs(), count, generator=generator)
            window.packed = prune([take(pool, drawn, layout.compaction)], layout.nominal_rows, layout.compaction)
        return window.packed or rollouts

    with patch.object(BatchLayout, "pack", pack_earlier):
        yield


@contextlib.contextmanager
def passes_until(is_last: Callable[[TrainingState, Origin], bool]) -> Iterator[None]:
    """Fast steps, at most as many as the rule has probes, until a gradient is the last one, which corrects."""

    def step(state, replay, rule, measure, origin):
        passes, first = 1, state.gradient_norm()
        with torch.no_grad():
            while passes <= rule.probes:
                state.clip_gradients()
                state.step()
                one_pass(state, replay)
                passes += 1
                if is_last(state, origin):
                    break
            dot = _dot(state.gradients(), origin.grad_0)
        norm = state.gradient_norm()
        cosine = dot / (first * norm) if first * norm else None
        return StepReport(passes=passes, grad_norm_0=first, grad_norm_slow=norm, cos_0_slow=cosine)

    with patch.object(update, "lookahead_step", step):
        yield


def _dot(these: Sequence[torch.Tensor | None], those: Sequence[torch.Tensor | None]) -> float:
    return sum(torch.sum(a * b).item() for a, b in zip(these, those, strict=True) if a is not None)


def _projection_below(bound: float, state: TrainingState, origin: Origin) -> bool:
    """Whether ⟨g_k, g0⟩ / ‖g0‖² is."""
    return _dot(state.gradients(), origin.grad_0) < bound * _dot(origin.grad_0, origin.grad_0)


def _head_surges(factor: float, state: TrainingState, origin: Origin) -> bool:
    """Whether the gradient norm of the output head is so many times that of the first pass (2605.19425)."""
    head = state.model.get_output_embeddings().weight
    index = next(i for i, p in enumerate(state.with_gradients()) if p is head)
    return head.grad.norm() > factor * origin.grad_0[index].norm()


def _chances(weights: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Probabilities proportional to weights, at most 1, that add up to a number."""
    low, high = 0.0, 1e6
    for _ in range(60):
        factor = (low + high) / 2
        low, high = (factor, high) if (factor * weights).clamp(max=1.0).sum() < expected else (low, factor)
    return (high * weights).clamp(max=1.0)


@contextlib.contextmanager
def noise_of_rounding() -> Iterator[None]:
    """The diagnostics compute g0 again with the rows of each micro-batch in reverse.

    A CPU repeats itself bit for bit, and the noise under the retention ratio is then none.
    """

    def measure(state, one_pass, *rest):
        passes = itertools.count()

        def pass_in_reverse_at_first():
            with _rows_in_reverse() if next(passes) == 0 else contextlib.nullcontext():
                one_pass()

        return take_real_steps(state, pass_in_reverse_at_first, *rest)

    with patch.object(update, "take_real_steps", measure):
        yield


@contextlib.contextmanager
def changed_rule(change: Callable[[LookaheadRule], LookaheadRule]) -> Iterator[None]:
    """Every rule that settings become is changed further."""
    with patch.object(config, "make_rule", lambda args: change(make_rule(args))):
        yield


def _half_the_steps(rule: LookaheadRule) -> LookaheadRule:
    scale = rule.lookahead_steps / 2
    return replace(rule, extrapolation=replace(rule.extrapolation, scale_min=scale, scale_max=scale))


@contextlib.contextmanager
def _rows_in_reverse() -> Iterator[None]:
    in_order = RolloutWindow.replay

    def replay(window):
        for replayed in in_order(window):
            inputs = replayed.inputs
            rows = len(inputs["completion_ids"])
            reverse = {n: v.flip(0) for n, v in inputs.items() if torch.is_tensor(v) and v.dim() and len(v) == rows}
            yield replayed._replace(inputs={**inputs, **reverse})

    with patch.object(RolloutWindow, "replay", replay):
        yield


@contextlib.contextmanager
def trainer_of_trl() -> Iterator[None]:
    """TRL's own `GRPOTrainer` in place of the package's: its update, its layout of a batch, `generate`."""
    with (
        patch.object(building, "trainer_class", lambda rule: GRPOTrainer),
        patch.object(building, "sample_in_groups", lambda *args: None),
    ):
        yield


HOOKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "ratio per matrix": one_ratio_per_matrix,
    "noise of rounding": noise_of_rounding,
    "scale K/2": partial(changed_rule, _half_the_steps),  # one scale for all: the probes, as often as it takes to K
    "rollback": partial(changed_rule, partial(replace, rollback=True)),  # of the optimizer's state, after the probes
    "half of the rows": partial(passes_on_a_part, 0.5),
    "a quarter of the rows": partial(passes_on_a_part, 0.25),
    "earlier batches": partial(passes_on_earlier_batches, 4),
    "until the projection falls": partial(passes_until, partial(_projection_below, 0.1)),
    "until the head surges": partial(passes_until, partial(_head_surges, 1.5)),
    "trainer of TRL": trainer_of_trl,
    "nadamw": partial(other_optimizer, partial(torch.optim.NAdam, decoupled_weight_decay=True)),
    "sgd with momentum": partial(other_optimizer, partial(torch.optim.SGD, momentum=0.9)),
    **RIVALS,
}
