"""Steps that are broken off: nothing of them outlives `train()`, and the weights are committed ones, bit for bit."""

import pytest
import torch
from helpers import (
    AS_TRL,
    METHOD,
    Recording,
    assert_close_parameters,
    assert_equal_parameters,
    double_model,
    half_without_spread,
    logged,
    make_trainer,
    parameters,
    tiny_model,
    train,
)
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, LookaheadTrainer, SFPOConfig
from gxpo_trl.update import snapshot
from gxpo_trl.update.snapshot import Origin


SLOW = pytest.mark.slow
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


class BreakOff(TrainerCallback):
    """Breaks off a run once, at an event of the trainer."""

    def __init__(self, event: str, how: str = "interrupt", after: int = 1):
        self.how, self.left = how, after
        setattr(self, event, self.at_event)

    def at_event(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            if self.how == "interrupt":
                raise KeyboardInterrupt
            setattr(control, self.how, True)


def train_until_broken_off(trainer, how: str) -> None:
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()


# ---- Between micro-batches


class RecordingTrainer(Recording, LookaheadTrainer):
    pass


@pytest.mark.parametrize(
    "how, after",
    [
        ("interrupt", 2),
        *(pytest.param("interrupt", after, marks=SLOW) for after in (1, 3, 4)),
        *(pytest.param("should_training_stop", after, marks=SLOW) for after in (1, 4)),
    ],
)
def test_training_that_starts_again_has_no_micro_batch_of_the_step_before(tmp_path, how, after):
    """The fourth time that a micro-batch is not the last of its step is in the second step."""
    callbacks = [BreakOff("on_substep_end", how, after)]
    trainer = make_trainer(tmp_path, RecordingTrainer, callbacks=callbacks, max_steps=2, **FOUR, **METHOD)
    train_until_broken_off(trainer, how)
    trainer.backward_calls = 0
    trainer.train()
    assert trainer.backward_calls == 2 * 3 * 4
    assert [entry["lookahead/active"] for entry in trainer.state.log_history if "loss" in entry] == [1.0] * 2


@pytest.mark.parametrize(
    "how, layout",
    [
        pytest.param(how, layout, marks=[] if how == "interrupt" and not layout else [SLOW], id=f"{how}-{layout}")
        for how in ("interrupt", "should_training_stop", "should_epoch_stop")
        for layout in ({}, AS_TRL, {"steps_per_generation": 8}, {"steps_per_generation": 2})
    ],
)
def test_training_that_starts_again_is_trls(tmp_path, float64, how, layout):
    """With TRL's layout bit for bit: it goes on in the middle of its buffer, so that steps mix two of them."""

    def run(trainer_class, config_class, **more):
        trainer = make_trainer(
            tmp_path,
            trainer_class,
            config_class,
            model=double_model(),
            callbacks=[BreakOff("on_substep_end", how, after=2)],
            **{"max_steps": 3, "reward": half_without_spread, **FOUR, **METHOD, **more},
        )
        train_until_broken_off(trainer, how)
        if how != "should_epoch_stop":
            trainer.train()
        return trainer

    ours = run(LookaheadTrainer, GXPOConfig, update_rule="grpo", **layout)
    trl = run(GRPOTrainer, GRPOConfig, **{k: v for k, v in layout.items() if k not in AS_TRL})
    assert logged(ours, "grad_norm") == pytest.approx(logged(trl, "grad_norm"), rel=1e-6)
    assert_close_parameters(
        parameters(ours), parameters(trl), atol=1e-7
    )  # rotary angles are fp32, and prompts trimmed
    if layout == AS_TRL:
        assert_equal_parameters(ours, trl)


@pytest.mark.parametrize(
    "how, layout",
    [
        pytest.param(how, layout, marks=[] if how == "interrupt" and layout else [SLOW], id=f"{how}-{layout}")
        for how in ("interrupt", "should_training_stop", "should_epoch_stop")
        for layout in ({}, {"steps_per_generation": 8})
    ],
)
def test_after_it_all_passes_see_one_batch(tmp_path, how, layout):
    settings = {"learning_rate": 0.0, "max_steps": 3, "reward": half_without_spread, **FOUR, **layout}
    trainer = make_trainer(tmp_path, callbacks=[BreakOff("on_substep_end", how, after=2)], **settings)
    train_until_broken_off(trainer, how)
    trainer.train()
    assert logged(trainer, "lookahead/cos_0_slow")[-3:] == pytest.approx([1.0] * 3, abs=1e-5)
    assert logged(trainer, "lookahead/grad_norm_0")[-3:] == pytest.approx(logged(trainer, "grad_norm")[-3:], rel=1e-5)


# ---- Between the first probe and the end of the step


class Broken(Exception):
    pass


class BrokenTrainer(LookaheadTrainer):
    """Raises in the second step where it is told to, and keeps the weights before it."""

    place = None

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1 and not hasattr(self, "before"):
            self.before = parameters(self)
            self.install()
        return super().training_step(*args, **kwargs)

    def install(self) -> None:
        owner, name, calls = self.place
        owner = owner(self)
        original, left = getattr(owner, name), iter(range(1, 100))

        def raising(*args, **kwargs):
            if next(left) == calls:
                setattr(owner, name, original)
                raise Broken
            return original(*args, **kwargs)

        setattr(owner, name, raising)


def base_optimizer(trainer):
    return trainer.optimizer.optimizer


PLACES = {
    "the second pass": (lambda trainer: trainer, "compute_loss", 3),
    "the middle of the third pass": (lambda trainer: trainer, "compute_loss", 6),
    "the backward pass of a replay": (lambda trainer: trainer.accelerator, "backward", 5),
    "the second probe": (base_optimizer, "step", 2),
    "the gate": (lambda trainer: trainer.lookahead.gate, "observe", 1),
    "the metrics": (lambda trainer: trainer.lookahead, "_log", 1),
    "TRL's own bookkeeping": (lambda trainer: trainer, "floating_point_ops", 2),
    "clipping": (lambda trainer: trainer, "_clip_grad_norm", 1),
    "the slow correction": (base_optimizer, "step", 3),
}
SOONEST = ("the middle of the third pass", "the gate", "the slow correction")
"""Those of `make test`."""
RULES = {
    "gxpo": (GXPOConfig, {}),
    "sfpo": (SFPOConfig, {"lookahead_steps": 2}),
    "rollback": (GXPOConfig, {"rule": {"rollback": True}}),
    "LoRA": (GXPOConfig, {"peft_config": LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")}),
    "copies on the host": (GXPOConfig, {"snapshot_device": "cpu"}),
}


def saved_weights(trainer, folder) -> dict[str, torch.Tensor]:
    """What `save_model` writes, by the names of the trainable parameters."""
    trainer.save_model(str(folder))
    if hasattr(trainer.model, "peft_config"):
        loaded = type(trainer.model).from_pretrained(tiny_model(), folder, is_trainable=True)
    else:
        loaded = type(trainer.model).from_pretrained(folder)
    return {name: p.detach() for name, p in loaded.named_parameters() if p.requires_grad}


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "place, rule",
    [
        pytest.param(place, rule, marks=[] if rule == "gxpo" and place in SOONEST else [SLOW])
        for place in PLACES
        for rule in RULES
    ],
)
def test_a_step_that_fails_leaves_the_weights_before_it(tmp_path, place, rule):
    config_class, settings = RULES[rule]
    trainer_class = type("Broken", (BrokenTrainer,), {"place": PLACES[place]})
    trainer = make_trainer(tmp_path, trainer_class, config_class, max_steps=3, **settings, **METHOD)
    with pytest.raises(Broken):
        trainer.train()
    assert trainer.state.global_step == 1
    assert_same(parameters(trainer), trainer.before)
    assert_same(saved_weights(trainer, tmp_path / "saved"), trainer.before)
    trainer.train()  # and it can be trained on
    assert logged(trainer, "lookahead/active")[-3:] == [1.0] * 3


def test_a_callback_that_fails_leaves_committed_weights(tmp_path):
    settings = {"max_steps": 3, **METHOD}
    before = train(tmp_path, **{**settings, "max_steps": 1, "lr_scheduler_type": "constant"})
    trainer = make_trainer(tmp_path, callbacks=[BreakOff("on_pre_optimizer_step", after=2)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_equal_parameters(trainer, before)


@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end"])
def test_a_failure_after_the_step_leaves_the_step_taken(tmp_path, event):
    settings = {"max_steps": 3, **METHOD}
    after = train(tmp_path, **{**settings, "max_steps": 2})
    trainer = make_trainer(tmp_path, callbacks=[BreakOff(event, after=2)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_equal_parameters(trainer, after)


# ---- Whoever saves in between


class SavingInBetween(LookaheadTrainer):
    """Saves in each pass of the second step, as what answers a signal may."""

    saved = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 1:
            folder = f"{self.args.output_dir}/{len(self.saved)}"
            self.saved = (*self.saved, saved_weights(self, folder))
        return super().compute_loss(model, inputs, *args, **kwargs)


class SavingCallback(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.saved = saved_weights(self.trainer, f"{args.output_dir}/callback")


def test_what_is_saved_in_the_middle_of_a_step_are_committed_weights(tmp_path):
    before, undisturbed = (train(tmp_path, max_steps=steps, **AS_TRL, **METHOD) for steps in (1, 2))
    callback = SavingCallback()
    trainer = make_trainer(tmp_path, SavingInBetween, callbacks=[callback], max_steps=2, **AS_TRL, **METHOD)
    callback.trainer = trainer
    trainer.train()
    assert len(trainer.saved) == 3 * 2
    for saved in (*trainer.saved, callback.saved):
        assert_same(saved, parameters(before))
    assert_equal_parameters(trainer, undisturbed)


class SavesAfterTheStep(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):
        self.saved, self.after = saved_weights(self.trainer, f"{args.output_dir}/callback"), parameters(self.trainer)


@pytest.mark.parametrize("rule", ["gxpo", "grpo", "check"])
def test_what_is_saved_when_the_step_is_taken_are_the_weights_after_it(tmp_path, rule):
    callback = SavesAfterTheStep()
    trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=2, update_rule=rule)
    callback.trainer = trainer
    trainer.train()
    assert_same(callback.saved, callback.after)
    assert_same(callback.saved, parameters(trainer))


class LogsInBetween(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.log({"mine": 1.0})


@pytest.mark.parametrize("rule", ["gxpo", "check"])
def test_a_callback_may_log_in_the_middle_of_a_step(tmp_path, rule):
    callback = LogsInBetween()
    trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=2, update_rule=rule)
    callback.trainer = trainer
    trainer.train()
    assert logged(trainer, "mine") == [1.0, 1.0]


class AsksForACheckpoint(TrainerCallback):
    """As a SIGTERM in the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (jit,) = (c for c in self.trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
            jit.jit_manager.is_checkpoint_requested = True


@pytest.mark.parametrize(
    "settings",
    [
        {"update_rule": "gxpo"},
        {"update_rule": "gxpo", "max_active_steps": 4},
        {"update_rule": "gxpo", "lookahead_steps": 1, "gate_signal": "never", "step_control": "cosine"},
        {"update_rule": "check"},
        {"update_rule": "grpo"},
    ],
    ids=str,
)
def test_a_checkpoint_that_is_asked_for_inside_a_step_is_that_of_its_end(tmp_path, settings):
    settings = {"max_steps": 5, "scripted": False, **settings}
    whole = train(tmp_path / "whole", **settings)
    callback = AsksForACheckpoint()
    asked = make_trainer(tmp_path / "asked", callbacks=[callback], enable_jit_checkpoint=True, **settings)
    callback.trainer = asked
    asked.train()
    assert asked.state.global_step == 3
    assert [path.name for path in (tmp_path / "asked").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = make_trainer(tmp_path / "asked", **settings)
    resumed.train(resume_from_checkpoint="last")
    assert_equal_parameters(resumed, whole)
    for name in ("lookahead/backward_passes", "lookahead/active"):
        assert logged(resumed, name)[-2:] == logged(whole, name)[-2:]


def test_what_is_saved_in_real_steps_are_committed_weights(tmp_path):
    before = train(tmp_path, max_steps=1, **AS_TRL, **METHOD)
    trainer = make_trainer(tmp_path, SavingInBetween, max_steps=2, lookahead_diagnostics_steps=1, **AS_TRL, **METHOD)
    trainer.train()
    assert len(trainer.saved) > 3 * 2
    for saved in trainer.saved:
        assert_same(saved, parameters(before))


def test_a_save_that_cannot_return_to_the_step_leaves_committed_weights(tmp_path, monkeypatch):
    before, calls, exchange = train(tmp_path, max_steps=1, **AS_TRL, **METHOD), [], Origin.exchange

    def failing(origin, state):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        exchange(origin, state)

    monkeypatch.setattr(Origin, "exchange", failing)
    trainer = make_trainer(tmp_path, SavingInBetween, max_steps=2, **AS_TRL, **METHOD)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert_equal_parameters(trainer, before)


@pytest.mark.parametrize("place", ["between tensors", "between two sides", "published", "nowhere"])
def test_an_exchange_is_whole_or_none(monkeypatch, place):
    class State:
        publishes_alone = True

        def __init__(self):
            self.shards, self.published = [torch.full((n,), float(n)) for n in (2, 3, 4)], 0

        def parameters(self):
            return self.shards

        def publish(self):
            self.published += 1
            if place == "published" and self.published == 1:
                raise KeyboardInterrupt

    write, slices, written = snapshot._write, snapshot.aligned_slices, []

    def failing_slices(*shards):
        for i, found in enumerate(slices(*shards)):
            if place == "between tensors" and i == 2:
                raise torch.OutOfMemoryError
            yield found

    def failing_write(one, values, other, other_values):
        written.append(1)
        if place == "between two sides" and len(written) == 2:
            one.copy_(values)
            raise KeyboardInterrupt
        write(one, values, other, other_values)

    monkeypatch.setattr(snapshot, "aligned_slices", failing_slices)
    monkeypatch.setattr(snapshot, "_write", failing_write)
    state, origin = State(), Origin([-torch.ones(n) for n in (2, 3, 4)], [], None)
    sides = state.shards, origin.theta_0
    if place == "nowhere":
        origin.exchange(state)
        sides = sides[::-1]
    else:
        with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt)):
            origin.exchange(state)
    assert [shard.tolist() for shard in sides[0]] == [[float(n)] * n for n in (2, 3, 4)]
    assert [theta.tolist() for theta in sides[1]] == [[-1.0] * n for n in (2, 3, 4)]
