"""The multiplier of the learning rate: how it is chosen, that every step is one at M times the rate, and that nobody
else sees it."""

import itertools
import json
import logging
import math

import pytest
import torch
from helpers import (
    AS_TRL,
    METHOD,
    ON_CPU,
    RisingGate,
    assert_equal_parameters,
    half_without_spread,
    logged,
    make_trainer,
    our_metrics,
    parameters,
    tiny_model,
    train,
)
from test_broken_off import saved_weights
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadConfig, LookaheadTrainer, SFPOConfig
from gxpo_trl.engines.rates import ScaledRates
from gxpo_trl.rollout.window import RolloutWindow
from gxpo_trl.run_folder import LOOKAHEAD_STATE_NAME
from gxpo_trl.trainer.checkpoints import find_fault
from gxpo_trl.update.measurements import StepReport
from gxpo_trl.update.step_control import (
    LEAST,
    MOST,
    MOST_TRIES,
    NEAR,
    TAKE_BACK_BELOW,
    StepControl,
    Verdict,
    agreement,
)


TWO_PASSES = {"lookahead_steps": 1, "gate_signal": "never"}
COSINE = {"step_control": "cosine"}
FIXED = COSINE | {"step_control_gain": 0.0}
M = 0.3


def taken(control: StepControl, *cosines: float | None) -> float:
    """M after steps with these cosines."""
    for cosine in cosines:
        control.judge(cosine)
        control.advance()
    return control.multiplier


def test_training_again_searches_again(tmp_path):
    trainer = make_trainer(tmp_path, **TWO_PASSES, **COSINE, max_steps=2, learning_rate=1e-7)
    trainer.train()
    assert trainer.lookahead.control.steps_tried > 0
    first = trainer.lookahead.control
    trainer.train()
    assert trainer.lookahead.control is not first and not trainer.lookahead.control.searching
    assert logged(trainer, "lookahead/steps_tried")[0] > 0


# ---- How it is chosen


def angle_of_a_step(multiplier: float, straight: float) -> float:
    """In radians: proportional to the step at first, and about a right angle for one that is much too long."""
    return math.pi / 2 * math.tanh(multiplier / straight)


@pytest.mark.parametrize("straight", [1e-3, 0.02, 0.3, 1.0, 20.0, 1e3])
@pytest.mark.parametrize("target", [0.25, 0.6, 0.7])
def test_the_start_finds_the_step_on_one_batch(straight, target):
    """From any rate, a step that is a thousand times too long included, whose cosine is 0 and not negative."""
    control = StepControl.from_start(target, 0.5)
    assert (control.multiplier, control.searches_left) == (1.0, 2)
    while control.judge(math.cos(angle_of_a_step(control.multiplier, straight))) is Verdict.TRY_AGAIN:
        pass
    found = angle_of_a_step(control.multiplier, straight)
    assert math.acos(target) / NEAR <= found <= math.acos(target) * NEAR and math.cos(found) > 0.1
    assert (control.searches_left, control.steps_taken_back) == (1, 0) and control.steps_tried < MOST_TRIES
    multiplier = control.multiplier
    assert taken(control, target) == multiplier


def test_a_step_of_the_right_length_is_not_tried_again():
    control = StepControl.from_start(0.6, 0.5)
    assert control.judge(0.6) is Verdict.KEEP
    assert (control.multiplier, control.searches_left, control.steps_tried) == (1.0, 1, 0)


def test_what_is_near_by_chance_is_not_taken_on_the_way_down():
    """Where every step is far too long, angles are what they are by chance."""
    control = StepControl.from_start(0.6, 0.5)
    assert [control.judge(cosine) for cosine in (0.0, 0.65, 0.5, 1.0, 0.6)] == [Verdict.TRY_AGAIN] * 4 + [Verdict.KEEP]
    assert control.multiplier == pytest.approx(8.0**-2.5)


def test_a_step_between_one_too_short_and_one_too_long_is_found():
    control = StepControl.from_start(0.6, 0.5)
    assert control.judge(0.0) is Verdict.TRY_AGAIN and control.multiplier == 1 / 8
    assert control.judge(math.cos(0.2)) is Verdict.TRY_AGAIN
    assert control.multiplier == pytest.approx(1 / 8 * math.acos(0.6) / 0.2)  # a secant
    assert control.judge(0.0) is Verdict.TRY_AGAIN
    assert control.multiplier == pytest.approx(1 / 8 * math.sqrt(math.acos(0.6) / 0.2))
    assert control.judge(0.5) is Verdict.KEEP and control.steps_tried == 3


@pytest.mark.parametrize("last", [0.0, 0.99])
def test_where_the_angle_jumps_the_longest_step_that_is_too_short_is_taken(last):
    """No step has the angle then; whether the last try was too long or too short."""
    control = StepControl.from_start(0.8, 0.5)
    for cosine, multiplier in [(0.998, 8.0), (-0.1, 2.8), (0.3, 1.7)]:
        assert control.judge(cosine) is Verdict.TRY_AGAIN
        assert control.multiplier == pytest.approx(multiplier, rel=0.02)
    between = control.multiplier
    if last == 0.0:
        assert control.judge(last) is Verdict.TRY_AGAIN and control.multiplier == 1.0
    assert control.judge(0.998) is Verdict.KEEP
    assert (control.multiplier, control.searches_left) == (1.0 if last == 0.0 else between, 1)


def test_the_start_does_not_try_for_ever():
    """What says nothing about lengths: always too short, always too long, and both in turn."""
    short, far, neither = (StepControl.from_start(0.6, 0.5) for _ in range(3))
    for tries in range(4):
        assert short.judge(1.0000001) is Verdict.TRY_AGAIN and short.multiplier == 8.0 ** (tries + 1)
        assert far.judge(-math.inf) is Verdict.TRY_AGAIN and far.multiplier == 8.0 ** -(tries + 1)
    assert short.judge(1.0) is Verdict.KEEP and short.is_at_bound and short.searching
    assert far.judge(-math.inf) is Verdict.PLAIN and far.is_at_bound and far.searching
    verdicts = [neither.judge(cosine) for cosine in [0.0, 1.0] * MOST_TRIES]
    assert verdicts.index(Verdict.KEEP) < MOST_TRIES


def test_a_start_that_was_broken_off_begins_again():
    control = StepControl.from_start(0.6, 0.5)
    control.judge(1.0)
    control.forget_step()
    assert control.searching and control.search.short is None and control.multiplier == 8.0


@pytest.mark.parametrize("cosine", [-0.1, 0.0, 0.4, 0.6, 1.0])
def test_it_follows_the_distance_to_the_target(cosine):
    assert taken(StepControl(0.4, 0.5, 2.0), cosine) == pytest.approx(2.0 * math.exp(0.5 * (cosine - 0.4)))


def test_the_step_under_way_is_taken_with_the_multiplier_it_began_with():
    control = StepControl(0.4, 0.5, 2.0)
    assert control.judge(1.0) is Verdict.KEEP
    assert control.multiplier == 2.0
    control.forget_step()  # it was broken off
    control.advance()
    assert control.multiplier == 2.0


@pytest.mark.parametrize("cosine", [-0.11, -1.0, -math.inf])
def test_a_step_that_went_too_far_is_made_again_at_half_the_length(cosine):
    control = StepControl(0.6, 0.5, 2.0)
    assert control.judge(cosine) is Verdict.TRY_AGAIN and control.multiplier == 1.0
    assert control.judge(-0.2) is Verdict.TRY_AGAIN and control.multiplier == 0.5
    assert control.judge(0.0) is Verdict.KEEP and control.multiplier == 0.5
    assert (control.steps_taken_back, control.steps_tried) == (2, 0)
    control.advance()
    assert control.multiplier == pytest.approx(0.5 * math.exp(-0.5 * 0.6))


def test_where_every_step_goes_too_far_the_plain_one_is_taken():
    control = StepControl(0.6, 0.5, 1024.0)
    verdicts = [control.judge(-0.2) for _ in range(MOST_TRIES)]
    assert verdicts == [Verdict.TRY_AGAIN] * (MOST_TRIES - 1) + [Verdict.PLAIN]
    assert taken(control) == 1024 / 2**MOST_TRIES and control.steps_taken_back == MOST_TRIES


def test_after_a_step_that_cannot_be_made_again_the_next_is_half_as_long():
    control = StepControl(0.6, 0.5, 2.0)
    assert control.judge(-0.2, repeatable=False) is Verdict.PLAIN
    assert taken(control) == 1.0 and control.steps_taken_back == 1


def test_a_step_that_says_nothing_changes_nothing():
    control = StepControl.from_start(0.6, 0.5)
    assert control.judge(None) is Verdict.KEEP
    assert taken(control, None) == 1.0 and control.searching


def test_without_gain_nothing_changes():
    control = StepControl.from_start(0.6, 0.0)
    assert [control.judge(cosine) for cosine in (1.0, 0.0, -1.0, -math.inf)] == [Verdict.KEEP] * 4
    assert (control.multiplier, control.searching, control.steps_taken_back) == (1.0, False, 0)


@pytest.mark.parametrize("rate, searches", [(1e-4, 0), (0.0, 0), (2e-3, 0), (2.1e-3, 1), (1.0, 1)])
def test_where_the_scheduled_rate_has_more_than_doubled_it_searches_again(rate, searches):
    control = StepControl(0.6)
    control.see_rate(1e-3)
    assert not control.searching
    control.see_rate(rate)
    assert control.searches_left == searches


def test_a_rate_of_0_is_not_one_to_compare_with():
    control = StepControl(0.6)
    for rate in (1e-3, 0.0, 1e-3):
        control.see_rate(rate)
    assert not control.searching


def test_a_search_that_ends_at_a_bound_is_over():
    control = StepControl.from_start(0.6, 0.5)
    for searches in (1, 0):
        while control.judge(1.0) is Verdict.TRY_AGAIN:
            pass
        control.advance()
        assert control.searches_left == searches and control.multiplier == MOST


def test_without_gain_nothing_is_searched_for():
    control = StepControl.from_start(0.6, 0.5)
    state = control.state_dict()
    without = StepControl.from_start(0.6, 0.0)
    without.load_state_dict(state)
    assert control.searching and not without.searching


def test_it_stays_within_its_bounds():
    assert taken(StepControl(0.6, 0.5, 4000.0), *[1.0] * 9) == MOST
    control = StepControl(0.6, 0.5, 1 / 4000)
    assert control.judge(-1.0) is Verdict.TRY_AGAIN and control.multiplier == LEAST and control.is_at_bound


@pytest.mark.parametrize(
    "report, expected",
    [
        (StepReport(2, grad_norm_0=1.0, grad_norm_slow=2.0, cos_0_slow=0.3), 0.3),
        (StepReport(2, grad_norm_0=1.0, grad_norm_slow=0.0), -math.inf),  # every token is clipped, say
        (StepReport(2, grad_norm_0=0.0, grad_norm_slow=1.0), None),
        (StepReport(2, grad_norm_0=0.0, grad_norm_slow=0.0), None),
        (StepReport(2, fell_back=True), -math.inf),
        (StepReport(1, fell_back=True), None),  # g0 itself was not finite: no fault of the step's length
    ],
)
def test_what_a_step_is_judged_by(report, expected):
    assert agreement(report) == expected


def test_its_state_goes_through_json():
    control = StepControl.from_start(0.6, 0.5)
    taken(control, 1.0, 0.7, -0.5, 0.2)
    other = StepControl.from_start(0.6, 0.5)
    other.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert other == control


@pytest.mark.parametrize(
    "change",
    [
        {"multiplier": 0.0},
        {"multiplier": math.nan},
        {"multiplier": "1"},
        {"multiplier": 5000.0},
        {"searches_left": True},
        {"steps_taken_back": -1},
        {"steps_taken_back": 0.5},
        {"steps_tried": None},
    ],
    ids=str,
)
def test_a_state_that_is_none_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        StepControl(0.6).load_state_dict(StepControl(0.6).state_dict() | change)
    with pytest.raises(ValueError, match=name):
        StepControl(0.6).load_state_dict({k: v for k, v in StepControl(0.6).state_dict().items() if k != name})


# ---- Settings


def config(folder, config_class=GXPOConfig, **settings):
    return config_class(str(folder), **ON_CPU, **COSINE, **settings)


@pytest.mark.parametrize(
    "config_class, settings, target",
    [
        (GXPOConfig, {"lookahead_steps": 1}, 0.6),
        (GXPOConfig, {"lookahead_steps": 5}, 0.4),
        (GXPOConfig, {"lookahead_steps": 5, "extrapolation": "optimizer"}, 0.25),
        (GXPOConfig, {"lookahead_steps": 3, "extrapolation": "optimizer"}, 1 / 3),
        (SFPOConfig, {"lookahead_steps": 3}, 0.3),
        (GXPOConfig, {"step_control_target": 0.2}, 0.2),
        (GXPOConfig, {"lookahead_steps": 1, "per_device_train_batch_size": 32}, 0.8),
        (GXPOConfig, {"lookahead_steps": 1, "gradient_accumulation_steps": 4}, 0.2),
        (GXPOConfig, {"lookahead_steps": 5, "gradient_accumulation_steps": 4}, 0.1),
        (LookaheadConfig, {"update_rule": "check", "gradient_accumulation_steps": 4}, 0.6),
    ],
)
def test_the_target_is_by_passes_and_completions(tmp_path, config_class, settings, target):
    control = config(tmp_path, config_class, **{"per_device_train_batch_size": 128, **settings}).control()
    assert (control.target, control.gain, control.multiplier) == (pytest.approx(target), 0.5, 1.0)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"update_rule": "grpo"}, "`update_rule: check`"),
        ({"update_rule": "grpo"}, "`lookahead_steps: 1`"),
        ({"update_rule": "check", "gradient_accumulation_steps": 1}, "`gradient_accumulation_steps`"),
        ({"step_control": "kl"}, "`step_control`"),
        ({"step_control_target": 1.0}, "`step_control_target`"),
        ({"step_control_target": -0.1}, "`step_control_target`"),
        ({"step_control_target": math.nan}, "`step_control_target`"),
        ({"step_control_gain": -0.1}, "`step_control_gain`"),
        ({"step_control_gain": math.inf}, "`step_control_gain`"),
        ({"update_rule": "gxpo", "reposition_alpha": 0.0}, "`reposition_alpha` above 0"),
        ({"update_rule": "sfpo", "lookahead_steps": 1, "reposition_alpha": 0.0}, "`reposition_alpha` above 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        LookaheadConfig(str(tmp_path), **{**ON_CPU, **COSINE, **settings})


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda parameters: Adafactor(parameters, relative_step=True, lr=None), "relative_step"),
        (torch.optim.Rprop, "Rprop steps by lengths of its own"),
        (torch.optim.ASGD, "ASGD steps by lengths of its own"),
    ],
    ids=["adafactor", "rprop", "asgd"],
)
@pytest.mark.parametrize("rule", [TWO_PASSES | COSINE, {"update_rule": "check"}], ids=["two passes", "check"])
def test_an_optimizer_that_makes_its_own_rate_is_refused(tmp_path, rule, make, said):
    model = tiny_model()
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, model=model, optimizers=(make(model.parameters()), None), **rule)
    make_trainer(tmp_path, model=model, optimizers=(make(model.parameters()), None))


def test_two_passes_are_one_probe_and_a_correction(tmp_path):
    """The same as SFPO with one fast step and no way back."""
    settings = {**METHOD, "gate_signal": "never", "lookahead_steps": 1}
    gxpo = train(tmp_path, GXPOTrainer, **settings)
    sfpo = train(tmp_path, config_class=SFPOConfig, reposition_alpha=1.0, **settings)
    assert_equal_parameters(gxpo, sfpo)
    assert gxpo.backward_passes == 2 * 3
    assert not any("retention" in name or "scale" in name for entry in gxpo.state.log_history for name in entry)


# ---- Every step is one at M times the rate


class Fixed(TrainerCallback):
    """Sets M before the first step, and after the steps whose numbers are given."""

    def __init__(self, multiplier: float | None = None, **after: float):
        self.multiplier, self.after = multiplier, {int(name.strip("step")): value for name, value in after.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.multiplier is not None:
            self.trainer.lookahead.control.multiplier = self.multiplier
            self.trainer.lookahead.control.searches_left = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.after:
            self.trainer.lookahead.control.multiplier = self.after[state.global_step]
            self.trainer.lookahead.control.searches_left = 0


def train_fixed(folder, *args, fixed: Fixed, **settings):
    fixed.trainer = make_trainer(folder, *args, callbacks=[fixed], **settings)
    fixed.trainer.train()
    return fixed.trainer


class PoisonedTrainer(LookaheadTrainer):
    """The last pass of the second step is not finite."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls += self.state.global_step == 1
        return loss * math.nan if self.calls == 3 else loss


class RisingGateTrainer(RisingGate, LookaheadTrainer):
    pass


def worthless(completions, **kwargs) -> list[float]:
    return [1.0] * len(completions)


class WorthlessInTheMiddle:
    """The second batch has no advantage."""

    def __init__(self):
        self.batches, self.__name__ = 0, "worthless_in_the_middle"

    def __call__(self, completions, **kwargs):
        self.batches += 1
        return worthless(completions) if self.batches == 2 else [float(len(c[0]["content"])) for c in completions]


KINDS = {
    "two passes": (LookaheadTrainer, TWO_PASSES),
    "gxpo": (LookaheadTrainer, {"gate_signal": "never"}),
    "sfpo": (LookaheadTrainer, {"update_rule": "sfpo", "lookahead_steps": 3, "gate_signal": "never"}),
    "phantom steps": (LookaheadTrainer, {"extrapolation": "optimizer", "gate_signal": "never"}),
    "rollback": (LookaheadTrainer, {"rule": {"rollback": True}, "gate_signal": "never"}),
    "no advantage": (LookaheadTrainer, {**TWO_PASSES, "reward": WorthlessInTheMiddle}),
    "a fall-back": (PoisonedTrainer, {**TWO_PASSES, **AS_TRL}),
    "after the gate": (RisingGateTrainer, {"lookahead_steps": 1, "gate_warmup_steps": 0}),
    "a budget": (LookaheadTrainer, {"lookahead_steps": 1, "max_active_steps": 1}),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "phantom steps" else []) for kind in KINDS]
)
def test_every_step_is_one_at_m_times_the_rate(tmp_path, kind):
    """Bit for bit, decay and momentum included; two param groups, and a rate that changes."""
    trainer_class, settings = KINDS[kind]
    common = {**METHOD, "weight_decay": 0.1, "max_steps": 4, "lr_scheduler_type": "constant"} | settings

    def run(fixed=None, **more):
        reward = common["reward"]() if "reward" in common else None
        arguments = {**common, **more, "reward": reward}
        if fixed is None:
            return train(tmp_path, trainer_class, **arguments)
        return train_fixed(tmp_path, trainer_class, fixed=fixed, **arguments)

    controlled = run(Fixed(M), **FIXED)
    plain = run(learning_rate=M * METHOD["learning_rate"])
    assert_equal_parameters(controlled, plain)
    assert logged(controlled, "lookahead/step_multiplier") == [M] * 4
    assert logged(controlled, "lookahead/active") == logged(plain, "lookahead/active")
    if kind in ("no advantage", "after the gate", "a budget"):
        assert 0.0 in logged(controlled, "lookahead/active")
    if kind == "a fall-back":
        assert controlled.lookahead.fallbacks == 1
    different = run(learning_rate=METHOD["learning_rate"])
    with pytest.raises(AssertionError):
        assert_equal_parameters(controlled, different)


def test_without_gain_nothing_changes_in_training(tmp_path):
    settings = {**METHOD, **TWO_PASSES}
    assert_equal_parameters(train(tmp_path, **settings, **FIXED), train(tmp_path, **settings))


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused"])
def test_with_other_optimizers_too(tmp_path, optim):
    settings = {**METHOD, **TWO_PASSES, "optim": optim}
    controlled = train_fixed(tmp_path, fixed=Fixed(M), **settings, **FIXED)
    assert_equal_parameters(controlled, train(tmp_path, **{**settings, "learning_rate": M * METHOD["learning_rate"]}))


def test_the_schedule_is_multiplied(tmp_path):
    """M is 1, 0.3, 1: at 1 as the schedule says."""
    settings = {**METHOD, **TWO_PASSES, "lr_scheduler_type": "linear", "max_steps": 3}
    controlled = train_fixed(tmp_path, fixed=Fixed(step1=M, step2=1.0), **settings, **FIXED)
    plain = train(tmp_path, **settings)
    assert logged(controlled, "learning_rate") == logged(plain, "learning_rate")
    assert logged(controlled, "lookahead/step_multiplier") == [1.0, M, 1.0]
    with pytest.raises(AssertionError):
        assert_equal_parameters(controlled, plain)


@pytest.mark.parametrize("rule", [TWO_PASSES | COSINE, {"update_rule": "check"}], ids=["two passes", "check"])
def test_a_step_without_length_is_not_judged(tmp_path, rule):
    """The schedule's rate is 0 in the first step of a warm-up."""
    settings = {**METHOD, **rule, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_steps": 3}
    trainer = train(tmp_path, LookaheadTrainer, **settings)
    assert logged(trainer, "learning_rate")[0] == 0 < logged(trainer, "learning_rate")[1]
    assert logged(trainer, "lookahead/step_multiplier")[0] == 1 != logged(trainer, "lookahead/step_multiplier")[1]
    assert logged(trainer, "lookahead/steps_tried")[0] == 0 < logged(trainer, "lookahead/steps_tried")[1]


# ---- Nobody else sees it


class Watching(TrainerCallback):
    """Looks at the rates whenever the training loop calls."""

    def __init__(self):
        self.seen = []

    def look(self, args, state, control, optimizer=None, **kwargs):
        self.seen += [group["lr"] for group in optimizer.param_groups]

    on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_save = look


class Stepping(torch.optim.AdamW):
    """Notes the rates that it steps with, and may fail."""

    fails_at = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stepped_with = []

    def step(self, closure=None):
        self.stepped_with.append(float(self.param_groups[0]["lr"]))
        if len(self.stepped_with) == self.fails_at:
            raise ZeroDivisionError
        return super().step(closure)  # whose hooks are the same as this one's


def test_rates_are_the_schedules_between_steps(tmp_path):
    watching = Watching()
    trainer = make_trainer(
        tmp_path, callbacks=[watching], save_strategy="steps", save_steps=1, **METHOD, **TWO_PASSES, **COSINE
    )
    trainer.train()
    assert set(watching.seen) == {METHOD["learning_rate"]}
    assert set(logged(trainer, "learning_rate")) == {METHOD["learning_rate"]}
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert {group["lr"] for group in saved["param_groups"]} == {METHOD["learning_rate"]}
    assert logged(trainer, "lookahead/steps_tried")[0] > 0
    assert 1.0 not in logged(trainer, "lookahead/step_multiplier")


@pytest.mark.parametrize("fails_at", [None, 3, 4])  # a probe, and the training loop's own step
def test_rates_are_put_back_when_a_step_fails(tmp_path, fails_at):
    model = make_trainer(tmp_path).model
    optimizer = Stepping(model.parameters(), lr=1e-3)
    optimizer.fails_at = fails_at
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None), max_steps=2, **TWO_PASSES, **FIXED)
    trainer.lookahead.control.multiplier = M
    if fails_at is not None:
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert optimizer.param_groups[0]["lr"] == 1e-3
        optimizer.fails_at = None
        optimizer.stepped_with.clear()
        trainer._has_trained = False  # which would begin a new run
    trainer.train()
    assert optimizer.stepped_with == [M * 1e-3] * len(optimizer.stepped_with) and len(optimizer.stepped_with) == 4
    optimizer.step()  # the training loop is over
    assert optimizer.stepped_with[-1] == 1e-3


def test_a_rate_that_is_a_tensor_is_scaled_in_place():
    weight = torch.nn.Parameter(torch.ones(3))
    rate = torch.tensor(0.1)
    optimizer = Stepping([weight], lr=rate, foreach=False)
    rates = ScaledRates(optimizer, lambda: 0.5)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.stepped_with == [pytest.approx(0.05)]
    assert optimizer.param_groups[0]["lr"] is rate and rate == torch.tensor(0.1)
    rates.release()


def test_a_tensor_that_is_the_rate_of_several_groups_is_scaled_once():
    """As torch shares the default rate."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    rate, other = torch.tensor(0.1), torch.tensor(0.2)
    groups = [{"params": [weights[0]]}, {"params": [weights[1]]}, {"params": [weights[2]], "lr": other}]
    optimizer = torch.optim.AdamW(groups, lr=rate, foreach=False)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    seen = []
    rates = ScaledRates(optimizer, lambda: 0.5)
    optimizer.register_step_pre_hook(lambda *_: seen.append([float(group["lr"]) for group in optimizer.param_groups]))
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones(3)
        optimizer.step()
        assert (rate, other) == (torch.tensor(0.1), torch.tensor(0.2))
    assert seen == [[pytest.approx(0.05), pytest.approx(0.05), pytest.approx(0.1)]] * 2
    rates.release()


def test_a_restart_of_the_schedule_is_searched_again(tmp_path, monkeypatch):
    searched, search = [], StepControl._search
    monkeypatch.setattr(StepControl, "_search", lambda *args: (searched.append(trainer._step), search(*args))[1])
    cycles = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 6}
    trainer = make_trainer(tmp_path, **METHOD, **TWO_PASSES, **COSINE, **cycles)
    trainer.train()
    rates = logged(trainer, "learning_rate")
    (jump,) = (i for i in range(1, 6) if rates[i] > 2 * rates[i - 1])
    steps = trainer.args.gradient_accumulation_steps
    assert {(batch - 1) // steps for batch in searched} == {0, 1, jump}
    assert not trainer.lookahead.control.searching


def test_while_alpha_decays_the_multiplier_stays(tmp_path):
    """The nearer the second gradient is taken to θ0, the nearer their cosine is to 1."""
    settings = {"update_rule": "sfpo", "lookahead_steps": 2, "gate_signal": "grad_norm", "gate_window": 2}
    settings |= {"gate_warmup_steps": 2, "gate_threshold": 0.1, "alpha_decay_steps": 3, "max_steps": 8}
    trainer = train(tmp_path, RisingGateTrainer, **METHOD, **COSINE, **settings)
    factors = logged(trainer, "lookahead/effective_multiplier")
    multipliers = logged(trainer, "lookahead/step_multiplier")
    assert len(factors) == 6 and factors[5] < factors[4] < factors[3] < factors[2]
    assert len(set(multipliers[:4])) > 1 and len(set(multipliers[3:])) == 1


# ---- Taking back


FAR = 1.0  # at a learning rate of 1e-3; much farther, and gradients have nothing to do with each other


def optimizer_state(trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [value for key in sorted(state) for value in state[key].values()]


CONTROLLED = {**METHOD, **COSINE, "max_steps": 2, "learning_rate": 1e-3}
ON_THE_HOST = {"snapshot_device": "cpu", **TWO_PASSES}
THREE_PASSES = {"gate_signal": "never", "step_control_target": 0.9}


@pytest.mark.parametrize(
    "settings", [TWO_PASSES, ON_THE_HOST, THREE_PASSES], ids=["two passes", "copies on the host", "three passes"]
)
def test_a_step_taken_back_is_one_of_the_length_that_is_found(tmp_path, monkeypatch, settings):
    """Bit for bit, the optimizer's state included, as if no other had been tried; so is the first step."""
    if settings is THREE_PASSES:
        monkeypatch.setattr("gxpo_trl.update.step_control.TAKE_BACK_BELOW", 0.8)
    back = train_fixed(tmp_path, fixed=Fixed(step1=FAR), **CONTROLLED, **settings)
    first, second = logged(back, "lookahead/step_multiplier")
    tried, halved = logged(back, "lookahead/steps_tried")[-1], logged(back, "lookahead/steps_taken_back")
    assert tried > 0 and halved[0] == 0 and second == FAR / 2 ** halved[1] < FAR and first != 1
    further = 1 if "lookahead_steps" in settings else 2  # passes after the first
    assert back.backward_passes == 2 + further * (2 + tried + halved[1])
    at_once = train_fixed(tmp_path, fixed=Fixed(first, step1=second), **CONTROLLED, **settings)
    assert at_once.lookahead.control.steps_tried == 0 and at_once.backward_passes < back.backward_passes
    assert_equal_parameters(back, at_once)
    assert all(torch.equal(a, b) for a, b in zip(optimizer_state(back), optimizer_state(at_once), strict=True))


@pytest.mark.parametrize("settings", [TWO_PASSES, ON_THE_HOST], ids=["two passes", "copies on the host"])
def test_a_step_that_went_too_far_is_the_plain_one_where_it_is_not_made_again(tmp_path, monkeypatch, settings):
    """From θ0 and the optimizer's state there."""
    monkeypatch.setattr("gxpo_trl.update.step_control.MOST_TRIES", 1)
    back = train_fixed(tmp_path, fixed=Fixed(1 / 16, step1=FAR), **CONTROLLED, **settings)
    plain = train_fixed(tmp_path, fixed=Fixed(1 / 16, step1=FAR / 2), max_active_steps=1, **CONTROLLED, **settings)
    assert logged(back, "lookahead/steps_taken_back") == [0, 1]
    assert logged(back, "lookahead/cos_0_slow")[1] < TAKE_BACK_BELOW
    for name in ("effective_multiplier", "grad_norm_slow", "clip_ratio_slow"):  # of the step that was undone
        assert len(logged(back, f"lookahead/{name}")) == 1
    assert logged(back, "lookahead/active") == [1.0, 1.0] and logged(plain, "lookahead/active") == [1.0, 0.0]
    assert_equal_parameters(back, plain)
    assert all(torch.equal(a, b) for a, b in zip(optimizer_state(back), optimizer_state(plain), strict=True))
    assert back.lookahead.control.multiplier == FAR / 2 == logged(back, "lookahead/step_multiplier")[1]


def test_a_step_that_is_not_finite_is_tried_again(tmp_path):
    """Its last pass is not finite the first time."""
    settings = {**METHOD, **TWO_PASSES, **AS_TRL, **COSINE, "max_steps": 2}
    trainer = train_fixed(tmp_path, PoisonedTrainer, fixed=Fixed(0.1, step1=0.2), **settings)
    assert (trainer.lookahead.fallbacks, trainer.lookahead.control.steps_taken_back) == (0, 1)
    assert logged(trainer, "lookahead/step_multiplier")[1] == 0.1
    assert_equal_parameters(trainer, train_fixed(tmp_path, fixed=Fixed(0.1, step1=0.1), **settings))


class EndlesslyPoisonedTrainer(LookaheadTrainer):
    """In the second step, what each pass after the first has for a gradient is multiplied by this."""

    factor = math.nan

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.factor if self.state.global_step == 1 and self.lookahead.window is None else loss


class EndlesslyFlatTrainer(EndlesslyPoisonedTrainer):
    factor = 0.0


@pytest.mark.parametrize("trainer_class", [EndlesslyPoisonedTrainer, EndlesslyFlatTrainer])
@pytest.mark.parametrize("settings", [TWO_PASSES, {"gate_signal": "never"}], ids=["two passes", "three passes"])
def test_a_step_that_never_has_a_cosine_is_the_plain_one(tmp_path, trainer_class, settings):
    """There is none to log, either."""
    common = {**METHOD, **AS_TRL, **COSINE, "max_steps": 2, **settings}
    back = train_fixed(tmp_path, trainer_class, fixed=Fixed(0.5, step1=0.5), **common)
    assert logged(back, "lookahead/steps_taken_back") == [0, MOST_TRIES]
    first, second = logged(back, "lookahead/step_multiplier")
    assert second == first / 2**MOST_TRIES
    assert len(logged(back, "lookahead/cos_0_slow")) == 1
    plain = train_fixed(tmp_path, fixed=Fixed(0.5, step1=second), max_active_steps=1, **common)
    assert_equal_parameters(back, plain)


def test_the_gate_does_not_see_a_step_taken_back_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr("gxpo_trl.update.step_control.MOST_TRIES", 1)
    settings = {**METHOD, **COSINE, "lookahead_steps": 1, "learning_rate": 1e-3, "max_steps": 3}
    trainer = train_fixed(tmp_path, fixed=Fixed(1 / 16, step1=FAR, step2=1 / 16), **settings)
    assert logged(trainer, "lookahead/steps_taken_back") == [0, 1, 1]
    assert (trainer.lookahead.gate.observed, trainer.lookahead.gate.active_steps) == (2, 3)


def test_a_bound_is_warned_of_each_time_it_is_come_to(tmp_path, caplog):
    settings = {**METHOD, **COSINE, **TWO_PASSES, "learning_rate": 1e-9, "max_steps": 5}
    with caplog.at_level(logging.WARNING, logger="gxpo_trl"):
        train_fixed(tmp_path, fixed=Fixed(1.0, step1=4000.0, step3=4000.0), **settings)
    said = [record.getMessage() for record in caplog.records if "multiplier" in record.getMessage()]
    assert len(said) == 2 and "Step 2: " in said[0] and "Step 4: " in said[1]


# ---- check


CHECK = {"update_rule": "check", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}
OF_SIXTEEN = 1 - 0.4 * math.sqrt(16 / 128)
"""The target for so many completions."""


def test_it_has_a_target_of_its_own(tmp_path):
    config = LookaheadConfig(str(tmp_path), **ON_CPU, update_rule="check", gradient_accumulation_steps=2)
    control = config.control()
    assert (control.target, control.multiplier, control.searches_left) == (OF_SIXTEEN, 1.0, 2)
    assert config.step_control == "cosine" and config.lookahead_rule() is None


@pytest.mark.parametrize("settings", [{}, AS_TRL, {"beta": 0.1}], ids=str)
def test_without_gain_it_is_the_plain_rule(tmp_path, settings):
    """Bit for bit, rollouts that are sampled too; two micro-batches of four more are computed in a step."""
    common = {**METHOD, **CHECK, **settings, "scripted": False, "reward": half_without_spread}
    checked = train(tmp_path, **common, step_control_gain=0.0)
    plain = train(tmp_path, **{**common, "update_rule": "grpo"})
    assert_equal_parameters(checked, plain)
    assert 3 < checked.backward_passes <= 3 * 1.5
    ours, theirs = (
        [{k: v for k, v in e.items() if "time" not in k and not k.startswith(("lookahead/", "train_"))} for e in log]
        for log in (checked.state.log_history, plain.state.log_history)
    )
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_nothing_moves_its_cosine_is_1_in_each_precision(tmp_path, dtype):
    settings = {"update_rule": "check", "learning_rate": 0.0, "allow_low_precision_parameters": True}
    trainer = train(tmp_path, model=tiny_model(dtype=dtype), **settings)
    assert logged(trainer, "lookahead/cos_check") == pytest.approx([1.0] * 3, abs=2e-6)


def test_each_step_is_checked_by_the_cosine_of_a_micro_batch(tmp_path):
    """Against the gradients of one micro-batch at the weights before and after the step, computed by hand."""

    class Keeping(LookaheadTrainer):
        inputs, ends = None, ()

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.inputs = inputs
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(tmp_path, Keeping, max_steps=1, step_control_gain=0.0, **METHOD, **CHECK, **AS_TRL)
    before = parameters(trainer)
    trainer.train()
    after, gradients = parameters(trainer), []
    for end in (before, after):
        trainer.model.load_state_dict(end, strict=False)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer.inputs, num_items_in_batch=None).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    assert logged(trainer, "lookahead/cos_check") == [pytest.approx(cosine, rel=1e-4)] and cosine < 0.999


def test_its_multiplier_follows_the_cosine_and_is_in_every_step(tmp_path):
    trainer = train(tmp_path, **METHOD, **CHECK, max_steps=5, step_control_target=0.6)
    multipliers, cosines = logged(trainer, "lookahead/step_multiplier"), logged(trainer, "lookahead/cos_check")
    control = StepControl(0.6, 0.5, multipliers[1])
    control.search.tries = 1  # the second step's length was searched for: its check doesn't settle
    expected = []
    for cosine in cosines[1:4]:
        control.judge(cosine, repeatable=False)
        control.advance()
        expected.append(control.multiplier)
    assert multipliers[2:] == pytest.approx(expected)
    tries = trainer.lookahead.control.steps_tried + 2
    assert trainer.backward_passes == 5 * 1.5 + tries and 2 < tries <= 2 * MOST_TRIES


def test_a_step_that_went_too_far_is_counted_in_its_own_entry(tmp_path):
    fixed = Fixed(1.0, step1=30.0, step2=30.0, step3=30.0)
    trainer = train_fixed(tmp_path, fixed=fixed, **{**METHOD, **CHECK, "learning_rate": 1e-3}, max_steps=4)
    counts = logged(trainer, "lookahead/steps_taken_back")
    too_far = [cosine < TAKE_BACK_BELOW for cosine in logged(trainer, "lookahead/cos_check")]
    assert any(too_far) and counts == [sum(too_far[: i + 1]) for i in range(4)]


def test_its_first_step_is_as_long_as_both_of_two_passes(tmp_path):
    """Found by the gradients of the whole batch."""
    common = {**METHOD, **CHECK, "max_steps": 1}
    checked = train(tmp_path, **common)
    two = train(
        tmp_path,
        **common | COSINE | TWO_PASSES | {"update_rule": "gxpo", "learning_rate": METHOD["learning_rate"] / 2},
    )
    assert logged(checked, "lookahead/step_multiplier") == logged(two, "lookahead/step_multiplier") != [1.0]
    assert checked.backward_passes == two.backward_passes + 0.5


def test_every_step_of_it_is_multiplied(tmp_path):
    fixed = train_fixed(tmp_path, fixed=Fixed(M), **METHOD, **CHECK, step_control_gain=0.0)
    grpo = {**METHOD, **CHECK, "update_rule": "grpo", "learning_rate": M * METHOD["learning_rate"]}
    assert_equal_parameters(fixed, train(tmp_path, **grpo))


def test_each_micro_batch_has_its_turn(tmp_path, monkeypatch):
    """Rows are sorted by length: one place among them would be checked on long completions only."""
    replay_one, indices = RolloutWindow.replay_one, []

    def recorded(window, index):
        indices.append(index)
        return replay_one(window, index)

    monkeypatch.setattr(RolloutWindow, "replay_one", recorded)
    train(tmp_path / "each", **CHECK, max_steps=5, step_control_gain=0.0)
    assert indices == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]  # of four, at both ends of each step
    indices.clear()
    train(tmp_path / "third", **CHECK, max_steps=7, step_control_gain=0.0, num_iterations=3)
    assert indices == [0, 0, 1, 1, 2, 2]


def steps_checked(trainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "lookahead/cos_check" in entry]


@pytest.mark.parametrize(
    "shared, checked",
    [
        ({"steps_per_generation": 8}, [1, 3, 5]),
        ({"num_iterations": 3}, [1, 4]),
        ({"steps_per_generation": 2}, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_of_the_steps_on_a_batch_the_first_is_checked(tmp_path, monkeypatch, shared, checked):
    """Its rollouts are of the policy that it steps. The length changes after these steps only."""
    monkeypatch.setattr(StepControl, "settled", property(lambda control: True, lambda control, value: None))
    trainer = train(tmp_path, **METHOD, **CHECK, **shared, max_steps=5, step_control_target=0.6)
    multipliers, cosines = logged(trainer, "lookahead/step_multiplier"), logged(trainer, "lookahead/cos_check")
    assert steps_checked(trainer) == checked
    control = StepControl(0.6, 0.5, multipliers[2])
    for step in (3, 4):
        cosine = cosines[checked.index(step)] if step in checked else None
        assert multipliers[step] == pytest.approx(taken(control, cosine))
    assert trainer.backward_passes == 5 + len(checked) * 0.5 + trainer.lookahead.control.steps_tried + 2


LONG = 0.3
"""The cosine of a step that is longer than is aimed at."""


@pytest.mark.parametrize(
    "cosines, checked",
    [
        ([0.9, 0.9, 0.9, 0.9, LONG, 0.9], [1, 2, 3, 4, 5, 7]),
        ([LONG, LONG, LONG], [1, 2, 3, 4, 7]),  # those of the first two, on which M was searched for, don't count
        ([0.9], range(1, 9)),
    ],
    ids=str,
)
def test_each_step_is_checked_until_one_is_longer_than_is_aimed_at(tmp_path, monkeypatch, cosines, checked):
    """Of three on a batch: one batch after the other would be long where the length was found much too short."""
    found = itertools.chain(cosines, itertools.repeat(0.9))
    monkeypatch.setattr(
        "gxpo_trl.trainer.update.check_step",
        lambda *args: StepReport(passes=1, grad_norm_0=1.0, grad_norm_slow=1.0, cos_0_slow=next(found)),
    )
    trainer = train(tmp_path, **METHOD, **CHECK, num_iterations=3, max_steps=8, step_control_target=0.6)
    assert steps_checked(trainer) == [*checked]
    assert trainer.lookahead.control.settled == (LONG in cosines)
    multipliers = logged(trainer, "lookahead/step_multiplier")
    growth = math.exp(0.5 * (LONG - 0.6)) if cosines[2:3] == [LONG] else 2.0
    assert multipliers[3] / multipliers[2] == pytest.approx(growth)  # arccos(0.6) / arccos(0.9) is 2.06
    assert multipliers[7] / multipliers[6] == pytest.approx(math.exp(0.5 * 0.3) if LONG in cosines else 2.0)


@pytest.mark.parametrize("cosine, growth", [(1.0, 2.0), (0.9, 2.0), (0.7, 0.9273 / 0.7954), (0.6, 1.0), (0.5, None)])
def test_until_then_it_grows_by_the_angle(cosine, growth):
    """As the angle is proportional to the length of a short step: at most twofold, since a check is noisy."""
    control = StepControl(0.6, 0.5)
    assert control.judge(cosine, repeatable=False) is Verdict.KEEP
    assert control.growth == pytest.approx(growth or math.exp(0.5 * (cosine - 0.6)), rel=1e-4)
    assert control.settled == (cosine < 0.6)
    control.settled = True
    control.judge(cosine, repeatable=False)
    assert control.growth == pytest.approx(math.exp(0.5 * (cosine - 0.6)))


def test_checks_that_are_far_apart_go_on_where_a_checkpoint_was(tmp_path):
    settings = {**METHOD, **CHECK, "save_strategy": "steps", "save_steps": 1, "max_steps": 6, "num_iterations": 2}
    whole = train(tmp_path / "whole", **settings)
    for step in (2, 4):
        resumed = make_trainer(tmp_path / "whole", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_equal_parameters(whole, resumed)
        assert resumed.backward_passes == whole.backward_passes


def test_a_step_without_advantage_is_not_checked(tmp_path):
    trainer = train(tmp_path, **METHOD, **CHECK, reward=worthless)
    assert trainer.backward_passes == 3 and not logged(trainer, "lookahead/cos_check")
    assert logged(trainer, "lookahead/step_multiplier") == [1.0] * 3


class Failing(LookaheadTrainer):
    """Saves its weights in one call of the loss, which fails then."""

    fails_at, calls, saved = None, 0, None

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.fails_at:
            self.saved = saved_weights(self, f"{self.args.output_dir}/saved")
            raise ZeroDivisionError
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("call", [5, 6])  # the replay at the end of the first step, and at its beginning
def test_a_check_that_fails_leaves_the_step_taken(tmp_path, call):
    """Saved in the middle or afterwards, the weights are those that the step led to."""
    trainer = make_trainer(tmp_path, Failing, step_control_gain=0.0, **METHOD, **CHECK, **AS_TRL)
    trainer.fails_at = call
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    one = train(tmp_path, **{**METHOD, **CHECK, **AS_TRL, "update_rule": "grpo", "max_steps": 1})
    assert_equal_parameters(trainer, one)
    assert all(torch.equal(trainer.saved[name], p) for name, p in parameters(one).items())


@pytest.mark.parametrize(
    "settings", [CHECK, TWO_PASSES | COSINE | CHECK | {"update_rule": "gxpo"}], ids=["check", "gxpo"]
)
@pytest.mark.parametrize("call", [5, 10])
def test_a_search_that_fails_leaves_nothing(tmp_path, settings, call):
    """Whichever replay of whichever try it is: saved in the middle or afterwards, the weights are those before it."""
    trainer = make_trainer(tmp_path, Failing, **METHOD, **settings, **AS_TRL)
    trainer.fails_at = call
    before = parameters(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in parameters(trainer).items())
    assert all(torch.equal(trainer.saved[name], p) for name, p in before.items())
    assert all(not value.any() for value in optimizer_state(trainer) if value.dim())
    trainer.train()
    assert trainer.state.global_step == 3


def test_its_passes_go_through_a_checkpoint(tmp_path):
    settings = {
        **METHOD,
        **CHECK,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "step_control_target": 0.6,
    }
    whole = train(tmp_path, **settings)
    resumed = train(tmp_path, **settings, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tries = whole.lookahead.control.steps_tried + 2
    assert resumed.backward_passes == whole.backward_passes == 4.5 + tries
    assert resumed.lookahead.control == whole.lookahead.control
    assert_equal_parameters(resumed, whole)


# ---- Checkpoints


@pytest.mark.parametrize(
    "tries, step", [(MOST_TRIES, 1), (MOST_TRIES, 6), (1, 2)], ids=["searching", "controlled", "nothing found"]
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, tries, step):
    monkeypatch.setattr("gxpo_trl.update.step_control.MOST_TRIES", tries)
    settings = {**METHOD, **TWO_PASSES, **COSINE, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}
    fixed = Fixed(step3=3.0)
    whole = train_fixed(tmp_path / "whole", fixed=fixed, **settings)
    assert logged(whole, "lookahead/steps_taken_back")[-1] > 0
    saved = json.loads((tmp_path / "whole" / f"checkpoint-{step}" / LOOKAHEAD_STATE_NAME).read_text())
    assert (saved["step_control"]["searches_left"] > 0) == (step != 6)
    fixed.trainer = resumed = make_trainer(tmp_path / "resumed", callbacks=[fixed], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_equal_parameters(resumed, whole)
    assert our_metrics(resumed.state.log_history) == our_metrics(whole.state.log_history)
    assert resumed.lookahead.control == whole.lookahead.control


def test_a_checkpoint_whose_control_makes_no_sense_is_not_whole(tmp_path):
    train(tmp_path, **TWO_PASSES, **COSINE, max_steps=1, save_strategy="steps", save_steps=1)
    path = tmp_path / "checkpoint-1" / LOOKAHEAD_STATE_NAME
    assert find_fault(path.parent) is None
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"step_control": state["step_control"] | {"multiplier": -1}}))
    assert "multiplier" in find_fault(path.parent)


def test_a_control_that_the_checkpoint_does_not_know_starts_afresh(tmp_path, caplog):
    settings = {**TWO_PASSES, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path, **settings, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="gxpo_trl"):
        resumed = train(tmp_path, **settings, **COSINE, max_steps=2, resume_from_checkpoint=True)
    assert resumed.lookahead.control.steps_tried > 0
    assert any("step_control" in record.getMessage() for record in caplog.records)


def test_a_checkpoint_of_version_0_2_has_no_rate():
    state = {name: value for name, value in StepControl(0.6, multiplier=3.0).state_dict().items() if name != "rate"}
    control = StepControl(0.6)
    control.load_state_dict(state)
    assert (control.multiplier, control.rate) == (3.0, None)


def test_a_multiplier_that_is_lost_is_said(tmp_path, caplog):
    settings = {**TWO_PASSES, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path, **settings, **COSINE, max_steps=1)
    saved = json.loads((tmp_path / "checkpoint-1" / LOOKAHEAD_STATE_NAME).read_text())
    multiplier = saved["step_control"]["multiplier"]
    with caplog.at_level(logging.WARNING, logger="gxpo_trl"):
        train(tmp_path, **settings, max_steps=2, resume_from_checkpoint=True)
    assert any(f"{multiplier}, is lost" in record.getMessage() for record in caplog.records)
