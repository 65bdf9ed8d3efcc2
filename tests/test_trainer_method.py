"""The trainer computes the method: against an independent reference, and what the reference can't show."""

import copy
import gc
from types import MethodType
from typing import ClassVar

import pytest
import torch
from datasets import IterableDataset
from helpers import (
    AS_TRL,
    METHOD,
    ON_CPU,
    Recording,
    RisingGateTrainer,
    assert_close_parameters,
    assert_equal_parameters,
    double_model,
    half_without_spread,
    logged,
    make_trainer,
    parameters,
    scripted_rollouts,
    tiny_model,
    train,
)
from peft import LoraConfig
from reference import run_reference
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadConfig, LookaheadTrainer
from gxpo_trl.rollout.window import MicroBatch, RolloutWindow
from gxpo_trl.tasks import TINY_MODEL_PATH, arithmetic_reward, load_arithmetic
from gxpo_trl.update.extrapolation import Extrapolation
from gxpo_trl.update.snapshot import Origin


class RecordingTrainer(Recording, LookaheadTrainer):
    pass


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("rollback", [False, True])
def test_a_run_equals_the_reference(tmp_path, float64, accumulation, rollback):
    trainer = train(
        tmp_path,
        RecordingTrainer,
        model=double_model(),
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=16 // accumulation,
        rule={"rollback": rollback},
        max_steps=8,
        gate_window=3,
        gate_warmup_steps=2,
        gate_threshold=0.3,
        **METHOD,
    )
    expected, norms, shutoff = run_reference(trainer, double_model())
    assert min(norms) > trainer.args.max_grad_norm  # gradient clipping binds
    assert max(logged(trainer, "lookahead/clip_ratio_slow")) > 0.01  # ratio clipping binds
    assert_close_parameters(parameters(trainer), expected, atol=1e-9)
    moved = max((expected[n] - p).abs().max().item() for n, p in double_model().named_parameters())
    assert moved > 1e-3
    assert shutoff is not None and shutoff < 8  # the gate fires of its own accord
    assert trainer.lookahead.shutoff_step == shutoff
    slow = norms[2 : 3 * shutoff : 3]
    assert logged(trainer, "lookahead/grad_norm_slow") == pytest.approx(slow, rel=1e-4)


def test_a_run_with_tool_results_in_its_completions_equals_the_reference(tmp_path, float64):
    """Tokens that a tool or an environment wrote are masked out of the loss in every pass."""

    def rollouts_with_tool_results(prompts, trainer):
        rollouts = scripted_rollouts(prompts, trainer)
        env_mask = [[int(i % 3 != 1) for i in range(len(ids))] for ids in rollouts["completion_ids"]]
        return {**rollouts, "env_mask": env_mask}

    trainer = train(
        tmp_path, RecordingTrainer, model=double_model(), rollout_func=rollouts_with_tool_results, **METHOD
    )
    assert "tool_mask" in trainer.slices[0]
    expected, _, _ = run_reference(trainer, double_model())
    assert_close_parameters(parameters(trainer), expected, atol=1e-9)


def test_the_reference_with_a_recomputed_anchor_ends_elsewhere(tmp_path, float64):
    """What the run above would equal if passes 2 and 3 recomputed π_old, and what `ratio_anchor: current` computes."""
    settings = {"gate_signal": "never", **METHOD}
    frozen = train(tmp_path, RecordingTrainer, model=double_model(), **settings)
    current = train(tmp_path, RecordingTrainer, model=double_model(), ratio_anchor="current", **settings)
    recomputed, _, _ = run_reference(frozen, double_model(), anchor="current")
    assert_close_parameters(parameters(current), recomputed, atol=1e-9)
    with pytest.raises(AssertionError):
        assert_close_parameters(parameters(frozen), recomputed, atol=1e-9)
    assert max(logged(current, "lookahead/clip_ratio_slow")) == 0.0  # every ratio is 1


def test_without_extrapolation_a_step_is_three_iterations_of_grpo(tmp_path, float64):
    """Two probes and a correction from where they led, on the optimizer's own state, are three steps on one batch."""
    # Rotary angles are in fp32: where the old log-probabilities trim other padding, it shows in the 8th digit.
    settings = {"model": double_model(), "compact_batches": False, **METHOD}
    probes = train(tmp_path, max_steps=2, gate_signal="never", scale_max=1.0, reposition_alpha=1.0, **settings)
    settings["model"] = double_model()
    rule = {"update_rule": "grpo", "num_iterations": 3}
    grpo = train(tmp_path, LookaheadTrainer, LookaheadConfig, max_steps=6, **rule, **settings)
    assert_close_parameters(parameters(probes), parameters(grpo), atol=1e-9)


def test_one_scale_for_all_is_another_alpha(tmp_path, float64):
    """K/2 for every coordinate: what is left of the extrapolation is how far it goes."""
    linear = {"reposition_alpha": 0.4, "rule": {"extrapolation": Extrapolation(5, scale_min=2.5, scale_max=2.5)}}
    scaled, probes = (
        train(tmp_path, model=double_model(), gate_signal="never", **settings, **METHOD)
        for settings in (linear, {"scale_max": 1.0, "reposition_alpha": 1.0})
    )
    assert_close_parameters(parameters(scaled), parameters(probes), atol=1e-9)


def test_passes_two_and_three_use_the_log_probabilities_of_pass_one(tmp_path):
    trainer = train(tmp_path, RecordingTrainer, max_steps=1, gradient_accumulation_steps=2, **METHOD)
    first, second, third = (trainer.loss_inputs[i : i + 2] for i in (0, 2, 4))
    for micro_batch in range(2):
        assert first[micro_batch].get("old_per_token_logps") is None  # TRL's own inputs are left as they are
        anchor = second[micro_batch]["old_per_token_logps"]
        assert anchor is third[micro_batch]["old_per_token_logps"]
        assert not anchor.requires_grad
        assert second[micro_batch]["completion_ids"] is first[micro_batch]["completion_ids"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_passes_are_counted_and_keep_to_the_budget(tmp_path, accumulation):
    steps = 8
    trainer = train(
        tmp_path,
        type("Trainer", (RecordingTrainer, RisingGateTrainer), {}),
        max_steps=steps,
        gradient_accumulation_steps=accumulation,
        gate_warmup_steps=3,
    )
    shutoff = 4  # the first step after the warm-up, whose slow correction is still taken
    assert trainer.lookahead.shutoff_step == shutoff
    budget = 3 * shutoff + (steps - shutoff)
    assert trainer.backward_calls == budget * accumulation
    assert logged(trainer, "lookahead/backward_passes")[-1] == budget
    assert logged(trainer, "lookahead/active") == [1.0] * shutoff + [0.0] * (steps - shutoff)
    assert logged(trainer, "lookahead/shutoff_step") == [shutoff] * (steps - shutoff + 1)


@pytest.mark.parametrize("lookahead_steps", [2, 3, 10])
def test_an_active_step_is_three_passes_whatever_k(tmp_path, lookahead_steps):
    trainer = train(tmp_path, RecordingTrainer, lookahead_steps=lookahead_steps, max_steps=2)
    assert trainer.backward_calls == 2 * 3 * 2


def test_nothing_is_held_after_shut_off(tmp_path):
    trainer = train(tmp_path, RisingGateTrainer, max_steps=4, gate_warmup_steps=2)
    assert not trainer.lookahead.gate.active
    gc.collect()
    assert not [held for held in gc.get_objects() if type(held) in (Origin, MicroBatch)]


@pytest.mark.parametrize("dropout", ["attention", "lora"])
def test_passes_draw_the_same_dropout_masks(tmp_path, dropout):
    """With a learning rate of 0 the three passes are at one point: their gradients can differ by their masks alone."""
    settings = {"learning_rate": 0.0, "max_steps": 2}
    if dropout == "attention":
        trainer = train(tmp_path, model=tiny_model(attention_dropout=0.5), **settings)
    else:
        trainer = train(
            tmp_path, peft_config=LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"), **settings
        )
    norms = [logged(trainer, f"lookahead/grad_norm_{name}") for name in ("0", "1", "slow")]
    assert min(norms[0]) > 0
    assert norms[0] == norms[1] == pytest.approx(norms[2], rel=1e-6)  # the last is added up in float64
    assert logged(trainer, "lookahead/retention_std") == [0.0, 0.0]
    assert logged(trainer, "lookahead/retention_mean") == [1.0, 1.0]


def test_dropout_is_really_drawn(tmp_path):
    """The test above would hold without dropout too."""
    with_dropout = train(tmp_path, model=tiny_model(attention_dropout=0.5), learning_rate=0.0, max_steps=1)
    without = train(tmp_path, learning_rate=0.0, max_steps=1)
    assert logged(with_dropout, "lookahead/grad_norm_0") != logged(without, "lookahead/grad_norm_0")


class PoisonedTrainer(LookaheadTrainer):
    """Makes the loss of one pass of the second step not a number."""

    poisoned_pass = 1

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._calls = 0 if self._calls_step != self.state.global_step else self._calls + 1
        self._calls_step = self.state.global_step
        poisoned = self.state.global_step == 1 and self._calls == 2 * (self.poisoned_pass - 1)
        return loss * float("nan") if poisoned else loss

    _calls, _calls_step = 0, -1


@pytest.mark.parametrize(
    "poisoned_pass, rollback",
    [(3, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, False), (2, True), (3, False)))],
)
def test_a_gradient_that_is_not_finite_makes_the_step_a_plain_one(tmp_path, poisoned_pass, rollback):
    poisoned_class = type("Poisoned", (PoisonedTrainer,), {"poisoned_pass": poisoned_pass})
    before = train(tmp_path, max_steps=1, rule={"rollback": rollback})
    optimizer_state = copy.deepcopy(before.optimizer.optimizer.state_dict())
    trainer = train(tmp_path, poisoned_class, max_steps=2, rule={"rollback": rollback})
    assert logged(trainer, "lookahead/fallbacks") == [0, 1]
    assert logged(trainer, "lookahead/backward_passes") == [3, 3 + poisoned_pass]
    assert len(trainer.lookahead.gate.values) == 1  # the gate saw the first step alone
    if rollback:
        # From where the first step ended, TRL's own trainer takes the same second step.
        plain = make_trainer(
            tmp_path, max_steps=2, update_rule="grpo", model=before.accelerator.unwrap_model(before.model)
        )
        plain.create_optimizer()
        plain.optimizer.load_state_dict(optimizer_state)
        slices = iter(second_window(tmp_path))
        plain._prepare_inputs = lambda batch: next(slices)
        plain.args.max_steps = 1
        plain.train()
        assert_close_parameters(parameters(trainer), parameters(plain), atol=1e-7)


def second_window(tmp_path) -> list[dict]:
    """The rollouts of the second step: scripted, so the same in every run."""
    recorder = train(tmp_path, RecordingTrainer, max_steps=2, update_rule="grpo")
    return recorder.windows()[1]


def test_a_first_gradient_that_is_not_finite_moves_nothing(tmp_path):
    before = train(tmp_path, max_steps=1, **AS_TRL)
    trainer = train(tmp_path, PoisonedTrainer, max_steps=2)
    assert logged(trainer, "lookahead/fallbacks") == [0, 1]
    assert logged(trainer, "lookahead/backward_passes") == [3, 4]
    assert all(torch.equal(p, parameters(before)[n]) for n, p in parameters(trainer).items())


def test_training_goes_on_after_a_fall_back(tmp_path):
    trainer = train(tmp_path, PoisonedTrainer, max_steps=4)
    assert logged(trainer, "lookahead/fallbacks") == [0, 1, 1, 1]
    assert len(logged(trainer, "lookahead/grad_norm_slow")) == 3
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_trl_itself_would_have_lost_the_parameters(tmp_path):
    """Why the fall-back is there: the plain step writes NaN everywhere."""
    trainer = train(tmp_path, PoisonedTrainer, max_steps=2, update_rule="grpo")
    assert not all(p.isfinite().all() for p in parameters(trainer).values())


def test_the_metrics_of_the_issue_are_logged(tmp_path):
    trainer = train(tmp_path, RisingGateTrainer, max_steps=4, gate_warmup_steps=2, beta=0.01)
    names = {name.removeprefix("lookahead/") for entry in trainer.state.log_history for name in entry if "/" in name}
    assert names >= {
        *("active", "backward_passes", "grad_norm_0", "grad_norm_1", "grad_norm_slow", "cos_0_slow"),
        *("retention_mean", "retention_std", "scale_mean", "scale_max", "inactive_fraction", "displacement_ratio"),
        *("effective_multiplier", "gate_z", "shutoff_step", "update_time", "fallbacks", "clip_ratio_slow", "kl_slow"),
    }


def test_running_totals_are_logged_as_they_stand(tmp_path):
    """TRL logs means over the logging interval; a mean of a running total is nobody's number."""
    trainer = train(tmp_path, max_steps=4, logging_steps=4)
    assert logged(trainer, "lookahead/backward_passes") == [12]


def test_the_start_up_line_multiplies_out(tmp_path, capsys):
    make_trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=3, num_generations=4)
    assert (
        "GXPO: 6 prompts × 4 generations = 24 completions an optimizer step, "
        "as 1 device(s) × 3 accumulation steps × 8; 3 passes while active and 1 after"
    ) in capsys.readouterr().out


def test_training_can_start_again_after_an_interruption(tmp_path):
    """An interrupted notebook cell, run again: what was recorded of the broken step is gone."""
    trainer = make_trainer(tmp_path, RecordingTrainer, max_steps=1)
    loss, calls = trainer.compute_loss, iter(range(1, 100))

    def interrupted_loss(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    trainer.compute_loss = interrupted_loss
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.backward_calls = 0
    trainer.train()
    assert trainer.backward_calls == 3 * 2


def test_training_again_begins_a_new_run(tmp_path):
    """Its gate is open, and its counts start at 0."""
    trainer = make_trainer(tmp_path, max_active_steps=1, max_steps=2)
    names = ("lookahead/active", "lookahead/backward_passes", "lookahead/shutoff_step")
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append([logged(trainer, name) for name in names])
    assert runs[0] == runs[1] and runs[0][0] == [1.0, 0.0]


def test_it_is_a_grpo_trainer_and_takes_its_arguments_in_their_order(tmp_path):
    assert issubclass(GXPOTrainer, GRPOTrainer)
    args, dataset = GXPOConfig(str(tmp_path), **ON_CPU), load_arithmetic(8, 8)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    trainer = GXPOTrainer(tiny_model(), arithmetic_reward, args, dataset["train"], dataset["test"], tokenizer)
    assert trainer.args is args
    assert trainer.eval_dataset is dataset["test"]
    assert trainer.processing_class is tokenizer


def test_copies_in_host_memory_change_nothing(tmp_path):
    settings = {"max_steps": 3, **METHOD}
    assert_equal_parameters(train(tmp_path, **settings), train(tmp_path, snapshot_device="cpu", **settings))


# ---- What a subclass, or the user, puts around TRL's loss


class WeighsAdvantages(LookaheadTrainer):
    """Changes what the loss is given."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {**inputs, "advantages": inputs["advantages"] * 3.0}
        return super().compute_loss(model, inputs, *args, **kwargs)


class ChangesInputsInPlace(LookaheadTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["advantages"] = inputs["advantages"] * 3.0
        return super().compute_loss(model, inputs, *args, **kwargs)


class Regularized(LookaheadTrainer):
    """Adds to the loss, and looks at the policy once more."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, ids.size(1) - 1)
        return loss - 0.1 * logps.mean() + 0.1 * sum(p.square().sum() for p in model.parameters())


class Tempered(LookaheadTrainer):
    """Has log-probabilities of its own, which the ratio is measured against."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return logps / 1.5, entropies, aux_loss


class NotDivided(LookaheadTrainer):
    """Leaves dividing by the accumulation steps to `training_step`, as transformers allows."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) * self.current_gradient_accumulation_steps


class NoisyLoss(LookaheadTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) * torch.rand(())


class SharperMask(LookaheadTrainer):
    """Sees more than one row at a time."""

    def get_high_entropy_mask(self, entropies, mask, threshold):
        return super().get_high_entropy_mask(entropies, mask, threshold) * (entropies > entropies.mean())


class TemperedGRPO(GRPOTrainer):
    """A trainer of TRL's family, which does not know of lookaheads."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return logps / 1.5, entropies, aux_loss


class BelowOurs(LookaheadTrainer, TemperedGRPO):
    """Its log-probabilities are those of a class that comes after this package's."""


def with_another_loss(trainer):
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * 2.0


def with_other_logps(trainer):
    compute_logps = trainer._get_per_token_logps_and_entropies

    def logps(*args, **kwargs):
        found, *others = compute_logps(*args, **kwargs)
        return found / 1.5, *others

    trainer._get_per_token_logps_and_entropies = logps


def with_a_patched_mask(trainer):
    trainer.get_off_policy_mask = lambda **kwargs: GRPOTrainer.get_off_policy_mask(**kwargs)


def with_a_bound_method(trainer):
    compute_loss = trainer._compute_loss
    trainer._compute_loss = MethodType(lambda self, model, inputs: compute_loss(model, inputs) * 2.0, trainer)


SUBCLASSES = (WeighsAdvantages, ChangesInputsInPlace, Regularized, Tempered, NotDivided, NoisyLoss, SharperMask)
SUBCLASSES = (*SUBCLASSES, BelowOurs)
PATCHES = (with_another_loss, with_other_logps, with_a_patched_mask, with_a_bound_method)


@pytest.mark.parametrize("own", [*SUBCLASSES, *PATCHES], ids=lambda own: own.__name__)
def test_a_loss_of_ones_own_is_replayed_as_it_is_and_not_compacted(tmp_path, caplog, own):
    """At a learning rate of 0 all passes are at one point."""
    trainer_class = own if own in SUBCLASSES else LookaheadTrainer
    settings = {"learning_rate": 0.0, "max_steps": 2, "reward": half_without_spread, "off_policy_mask_threshold": 0.5}
    settings |= {"top_entropy_quantile": 0.8} if own is SharperMask else {}
    trainer = make_trainer(tmp_path, trainer_class, **settings)
    if own in PATCHES:
        own(trainer)
    trainer.train()
    assert logged(trainer, "lookahead/cos_0_slow") == pytest.approx([1.0] * 2, abs=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx(logged(trainer, "lookahead/grad_norm_0"), rel=1e-6)
    assert min(logged(trainer, "grad_norm")) > 0
    assert logged(trainer, "lookahead/token_fraction") == []
    said = [record.getMessage() for record in caplog.records if "not compacted" in record.getMessage()]
    assert len(said) == 1 and "of its own" in said[0]


def test_a_loss_of_ones_own_takes_the_step_that_it_takes_in_trls_trainer(tmp_path):
    """What is put around the loss works in pass 1 and in replays, which here start where pass 1 did."""

    class Weighing:
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {**inputs, "advantages": inputs["advantages"] * 3.0}
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"max_steps": 2, **METHOD}
    inert = {"reposition_alpha": 0.0, "rule": {"rollback": True}}
    ours = train(tmp_path, type("Ours", (Weighing, LookaheadTrainer), {}), **inert, **settings)
    trl = train(tmp_path, type("Plain", (Weighing, GRPOTrainer), {}), GRPOConfig, **settings)
    assert_close_parameters(parameters(ours), parameters(trl), atol=1e-6)


class Remembering(LookaheadTrainer):
    """Chooses the tokens of a micro-batch once: in replays its mask is the same tensor."""

    masks: dict[int, torch.Tensor]

    def get_high_entropy_mask(self, entropies, mask, threshold):
        chosen = super().get_high_entropy_mask(entropies, mask, threshold)
        return self.masks.setdefault(mask.data_ptr(), chosen)


def test_the_tokens_of_high_entropy_are_those_of_pass_1(tmp_path, monkeypatch):
    settings = {"max_steps": 1, "learning_rate": 5e-3, "top_entropy_quantile": 0.3, "compact_batches": False}
    ours = train(tmp_path, **settings)
    monkeypatch.setattr(RolloutWindow, "keep_entropy_mask", lambda *_: None)
    monkeypatch.setattr(Remembering, "masks", {}, raising=False)
    assert_equal_parameters(ours, train(tmp_path, Remembering, **settings))
    with pytest.raises(AssertionError):  # else all of this says nothing
        assert_equal_parameters(ours, train(tmp_path, **settings))


def test_a_loss_that_asks_for_the_tokens_more_often_in_a_replay_is_refused(tmp_path):
    class AskingTwice(LookaheadTrainer):
        seen: ClassVar[set[int]] = set()

        def compute_loss(self, model, inputs, *args, **kwargs):
            mask = inputs["completion_mask"]
            if mask.data_ptr() in self.seen:
                self.get_high_entropy_mask(mask.float(), mask, 0.7)
            self.seen.add(mask.data_ptr())
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(RuntimeError, match="more often in a later pass.*top_entropy_quantile"):
        train(tmp_path, AskingTwice, max_steps=1, top_entropy_quantile=0.3, compact_batches=False)


def test_a_patched_loss_with_a_token_budget_is_refused_when_training_begins(tmp_path):
    trainer = make_trainer(tmp_path, max_tokens_per_micro_batch=150)
    with_another_loss(trainer)
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch.*loss of TRL's"):
        trainer.train()


# ---- Steps of unlike micro-batches


def stream(rows: int) -> IterableDataset:
    prompts = [{"prompt": row["prompt"]} for row in load_arithmetic(train_size=rows, test_size=1)["train"]]
    return IterableDataset.from_generator(lambda: iter(prompts))


UNLIKE = {
    "spread over epochs": ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, 6),
    "twice as long": ({"steps_per_generation": 1, "gradient_accumulation_steps": 4}, 7),
    "iterations": ({"steps_per_generation": 2, "gradient_accumulation_steps": 3, "num_iterations": 2}, 4),
}


def train_on_a_stream(tmp_path, trainer_class, config_class, kind: str, **settings):
    accumulation, rows = UNLIKE[kind]
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "reward": half_without_spread} | settings
    trainer = make_trainer(tmp_path, trainer_class, config_class, **accumulation, **settings)
    trainer.train_dataset = stream(rows)
    trainer.accelerator.dataloader_config.dispatch_batches = False  # as TRL has it of a stream
    trainer.train()
    return trainer


EVERY_KIND = ["iterations", *(pytest.param(kind, marks=pytest.mark.slow) for kind in UNLIKE if kind != "iterations")]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_epoch_that_ends_inside_a_step_leaves_micro_batches_with_divisors_of_their_own(tmp_path, kind, loss_type):
    steps = []

    class Watching(LookaheadTrainer):
        def training_step(self, *args, **kwargs):
            steps.append((self.state.global_step, self.current_gradient_accumulation_steps))
            return super().training_step(*args, **kwargs)

    settings = {"learning_rate": 0.0, "loss_type": loss_type}
    trainer = train_on_a_stream(tmp_path, Watching, GXPOConfig, kind, **settings)
    assert any(len({divisor for step, divisor in steps if step == number}) > 1 for number in range(4))
    active = [entry for entry in trainer.state.log_history if entry.get("lookahead/active")]
    assert len(active) >= 3
    for entry in active:
        assert entry["lookahead/cos_0_slow"] == pytest.approx(1.0, abs=1e-5)
        assert entry["grad_norm"] == pytest.approx(entry["lookahead/grad_norm_0"], rel=1e-5)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("compacts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_on_a_stream_the_plain_rule_is_trl(tmp_path, float64, kind, compacts):
    settings = {**METHOD, "model": double_model()}
    ours = train_on_a_stream(
        tmp_path, LookaheadTrainer, GXPOConfig, kind, update_rule="grpo", compact_batches=compacts, **settings
    )
    settings["model"] = double_model()
    trl = train_on_a_stream(tmp_path, GRPOTrainer, GRPOConfig, kind, **settings)
    assert_close_parameters(parameters(ours), parameters(trl), atol=1e-7)
