"""The measurements that could refute the method: right where the answer is known, and without a trace."""

import pytest
import torch
from helpers import Recording, assert_equal_parameters, logged, train
from test_step import UNBOUNDED, Quadratic, diagnosed_step, gxpo, prepare, quadratic

from gxpo_trl import GXPOTrainer, SFPOConfig, SFPOTrainer
from gxpo_trl.update.algorithm import LookaheadRule, lookahead_step


class RecordingTrainer(Recording, GXPOTrainer):
    pass


def diagnose(model, optimizer, rule: LookaheadRule, noise: float = 0.0) -> dict[str, float]:
    engine = prepare(model, optimizer)

    def one_pass():
        engine.backward(model())
        model.theta.grad += noise * torch.randn_like(model.theta)

    one_pass()
    return diagnosed_step(engine, one_pass, rule).diagnostics


def test_on_a_diagonal_quadratic_the_extrapolation_is_the_truth():
    """Corollary 2: the predicted point is where K real steps lead. The linear and the two-step point are not."""
    model = quadratic()
    errors = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.1), gxpo(5, 0.5, **UNBOUNDED))
    assert errors["true_error"] < 1e-6
    assert errors["true_abs_error"] < 1e-6
    assert errors["true_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert errors["true_cosine_reposition"] == pytest.approx(1.0, abs=1e-6)
    assert errors["true_error_reposition"] == pytest.approx(0.5, abs=1e-6)  # half the way
    assert errors["true_error_linear"] > 0.1
    assert errors["true_error_two_step"] > 0.1


def test_errors_worked_by_hand():
    """h = 1, lr = 0.5, from 1: two steps to 1/4, four to 1/16. The bound of the scale stops the prediction short."""
    model = Quadratic(torch.ones(1).double(), torch.ones(1).double())
    rule = gxpo(4, 0.5, scale_max=1.2)  # S_4 / S_2 = 1.25
    errors = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.5), rule)
    true = 15 / 16
    assert errors["true_abs_error"] == pytest.approx(true - 1.2 * 0.75)
    assert errors["true_abs_error_reposition"] == pytest.approx(0.5 * (true - 1.2 * 0.75))
    assert errors["true_error"] == pytest.approx((true - 1.2 * 0.75) / true)
    assert errors["true_error_reposition"] == pytest.approx((true - 0.5 * 1.2 * 0.75) / true)
    assert errors["true_error_linear"] == pytest.approx((2 * 0.75 - true) / true)
    assert errors["true_error_two_step"] == pytest.approx((true - 0.75) / true)


def test_the_fast_steps_of_sfpo_are_the_truth_itself():
    model = quadratic()
    errors = diagnose(model, torch.optim.AdamW(model.parameters(), lr=0.1), LookaheadRule(probes=4, alpha=0.8))
    assert errors["true_error"] < 1e-6


@pytest.mark.parametrize("rollback", [False, True])
def test_a_measured_step_ends_where_an_unmeasured_one_does(rollback):
    ends, states = [], []
    for take in (lookahead_step, diagnosed_step):
        model = quadratic()
        engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05), max_grad_norm=1.0)
        for _ in range(3):
            engine.clear_gradients()
            engine.backward(model())
            take(engine, lambda e=engine, m=model: e.backward(m()), gxpo(5, 0.5, rollback))
            engine.step()
        ends.append(model.theta.detach())
        states.append(engine.optimizer.state[model.theta])
    assert torch.equal(*ends)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("trainer_class", [GXPOTrainer, SFPOTrainer])
def test_a_run_with_diagnostics_ends_with_the_same_weights(tmp_path, trainer_class):
    settings = {"max_steps": 4, "scripted": False, "learning_rate": 1e-3}
    config_class = SFPOConfig if trainer_class is SFPOTrainer else trainer_class._config_class
    without = train(tmp_path, trainer_class, config_class, **settings)
    with_them = train(tmp_path, trainer_class, config_class, lookahead_diagnostics_steps=2, **settings)
    assert_equal_parameters(without, with_them)
    for plain, measured in zip(without.state.log_history, with_them.state.log_history, strict=True):
        shared = {k: v for k, v in measured.items() if "true_" not in k and "noise_" not in k and "time" not in k}
        assert (
            shared == {k: v for k, v in plain.items() if "time" not in k and "per_second" not in k}
            or "loss" not in plain
        )


def test_they_come_every_n_active_steps_at_the_stated_cost(tmp_path):
    """K further passes each time: one for the noise floor, K - 1 for the real steps."""
    trainer = train(tmp_path, RecordingTrainer, lookahead_diagnostics_steps=3, lookahead_steps=5, max_steps=7)
    measured = ["lookahead/true_error" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert measured == [True, False, False, True, False, False, True]
    assert trainer.backward_calls == 2 * (7 * 3 + 3 * 5)
    assert logged(trainer, "lookahead/backward_passes")[-1] == 7 * 3


def test_the_columns_of_the_papers_tables_are_in_the_log(tmp_path):
    trainer = train(tmp_path, lookahead_diagnostics_steps=1, max_steps=2, learning_rate=1e-5)
    table_6 = ("true_abs_error", "true_abs_error_reposition", "true_cosine", "cos_0_slow")
    table_7 = ("grad_norm_0", "grad_norm_1", "grad_norm_slow", "retention_mean", "retention_std", "displacement_ratio")
    for name in (*table_6, *table_7, "scale_mean", "inactive_fraction", "true_error_linear", "true_error_two_step"):
        assert len(logged(trainer, f"lookahead/{name}")) == 2, name
    assert logged(trainer, "lookahead/true_cosine")[0] > 0.5


def test_the_noise_floor_of_a_repeatable_gradient_is_zero():
    model = quadratic()
    measured = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.1), gxpo(5, 0.5))
    assert measured["noise_cos"] == pytest.approx(1.0)
    assert measured["noise_retention_std"] == pytest.approx(0.0, abs=1e-6)


def test_the_noise_floor_of_a_noisy_gradient_shows():
    torch.manual_seed(0)
    model = Quadratic(torch.ones(20000).double(), torch.ones(20000).double())
    measured = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.1), gxpo(5, 0.5), noise=0.1)
    assert measured["noise_retention_std"] == pytest.approx(0.1 * 2**0.5, rel=0.1)
    assert measured["noise_cos"] == pytest.approx(1 / 1.01, rel=1e-2)


def test_a_real_step_that_is_not_finite_is_not_measured():
    """The run goes on; the step itself falls back or not as it would without."""
    model = quadratic()
    start = model.theta.detach().clone()
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    engine.backward(model())
    passes = iter([1.0, float("nan"), 1.0, 1.0])
    report = diagnosed_step(engine, lambda: engine.backward(model() * next(passes)), gxpo(5, 0.5))
    assert not report.fell_back and report.diagnostics == {}
    assert not torch.equal(model.theta, start)


def test_an_interrupted_measurement_leaves_committed_weights_and_state():
    model = quadratic()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    engine.backward(model())
    engine.step()
    committed, moment = model.theta.detach().clone(), engine.optimizer.state[model.theta]["exp_avg"].clone()
    engine.clear_gradients()
    engine.backward(model())
    passes = iter([None, None, KeyboardInterrupt])

    def replay():
        if error := next(passes):
            raise error
        engine.backward(model())

    with pytest.raises(KeyboardInterrupt):
        diagnosed_step(engine, replay, gxpo(5, 0.5))
    assert torch.equal(model.theta, committed)
    assert torch.equal(engine.optimizer.state[model.theta]["exp_avg"], moment)
