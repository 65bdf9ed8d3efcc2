"""The retention ratio of updates, the relative threshold, and where the copies are kept."""

import pytest
import torch
from helpers import (
    METHOD,
    Recording,
    assert_close_parameters,
    assert_equal_parameters,
    double_model,
    logged,
    parameters,
    tiny_model,
    train,
)
from reference import run_reference
from test_step import gxpo, prepare, quadratic, take_step

from gxpo_trl import GXPOTrainer
from gxpo_trl.update.snapshot import Storage
from gxpo_trl.update.step import LookaheadRule, lookahead_step


class RecordingTrainer(Recording, GXPOTrainer):
    pass


class PoisonedTrainer(Recording, GXPOTrainer):
    """The last pass of the second step has a loss that is not a number."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if len(self.loss_inputs) == 2 * 3 + 2 * 3 else loss


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_run_with_update_retention_equals_the_reference(tmp_path, float64, weight_decay):
    """The reference takes its directions from its own moments; the trainer reads them from the parameters."""
    settings = {**METHOD, "weight_decay": weight_decay}
    trainer = train(tmp_path, RecordingTrainer, model=double_model(), retention="update", max_steps=4, **settings)
    decays = {
        p: d for group in trainer.optimizer.param_groups for p in group["params"] for d in [group["weight_decay"]]
    }
    assert set(decays.values()) == ({0.0, weight_decay})
    expected, _, _ = run_reference(trainer, double_model())
    assert_close_parameters(parameters(trainer), expected, atol=1e-9)


@pytest.mark.parametrize("rollback", [False, True])
def test_for_sgd_updates_and_gradients_have_the_same_retention(rollback):
    by_gradient, by_update = quadratic(), quadratic()
    reports = []
    for model, retention in ((by_gradient, "gradient"), (by_update, "update")):
        engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.05), max_grad_norm=3.0)
        reports.append([take_step(engine, gxpo(5, 0.5, rollback, retention=retention)) for _ in range(3)])
    torch.testing.assert_close(by_gradient.theta, by_update.theta, rtol=1e-9, atol=1e-9)
    for gradient, update in zip(*reports, strict=True):
        assert gradient.retention_mean == pytest.approx(update.retention_mean, rel=1e-5)
        assert gradient.scale_mean == pytest.approx(update.scale_mean, rel=1e-5)
        assert update.cos_0_slow is None


def test_for_adam_they_differ():
    """Its direction turns more slowly than the gradient: the first moment is an average."""
    retention = {}
    for name in ("gradient", "update"):
        model = quadratic()
        engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        retention[name] = [take_step(engine, gxpo(5, 0.5, retention=name)) for _ in range(3)][-1].retention_mean
    assert retention["update"] > retention["gradient"] + 0.05


def test_param_groups_have_their_own_learning_rates():
    fast, slow = quadratic(0), quadratic(1)
    both = torch.nn.ModuleList([fast, slow])
    both.forward = lambda: fast() + slow()
    groups = [{"params": fast.parameters(), "lr": 0.05}, {"params": slow.parameters(), "lr": 0.01}]
    engine = prepare(both, torch.optim.SGD(groups))
    take_step(engine, gxpo(5, 0.5, retention="update"))
    for seed, learning_rate, model in ((0, 0.05, fast), (1, 0.01, slow)):
        alone = quadratic(seed)
        take_step(prepare(alone, torch.optim.SGD(alone.parameters(), lr=learning_rate)), gxpo(5, 0.5))
        torch.testing.assert_close(model.theta, alone.theta, rtol=1e-9, atol=1e-9)


def test_falling_back_computes_the_first_gradient_again(tmp_path):
    """It is not kept beside θ0 and θ1; the same pass at the same point gives it, bit for bit."""
    runs = [
        train(tmp_path, PoisonedTrainer, max_steps=2, retention=retention, probe_optimizer_state="rollback", **METHOD)
        for retention in ("gradient", "update")
    ]
    assert [logged(run, "lookahead/fallbacks")[-1] for run in runs] == [1, 1]
    assert [logged(run, "lookahead/backward_passes")[-1] for run in runs] == [6, 7]
    steps = [run.state.log_history[1]["grad_norm"] for run in runs]
    assert steps[0] > 0 and steps[1] > 0


def test_a_fall_back_of_update_retention_is_the_plain_step():
    plain, fallen = quadratic(), quadratic()
    for model in (plain, fallen):
        engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        engine.backward(model())
        if model is fallen:
            passes = iter([1.0, float("nan"), 1.0])
            replay = lambda: engine.backward(model() * next(passes))  # noqa: B023, E731
            report = lookahead_step(engine, replay, gxpo(5, 0.5, retention="update"))
            assert report.fell_back and report.passes == 4
        engine.step()
    assert torch.equal(plain.theta, fallen.theta)


def test_near_the_threshold_a_relative_bound_tames_the_ratio(tmp_path):
    settings = {"max_steps": 2, "retention_min": float("-inf"), "retention_max": float("inf")}
    wild = train(tmp_path, **settings)
    tamed = train(tmp_path, active_threshold_relative=0.1, **settings)
    assert logged(tamed, "lookahead/retention_std")[0] < 0.2 * logged(wild, "lookahead/retention_std")[0]
    assert logged(tamed, "lookahead/inactive_fraction")[0] > logged(wild, "lookahead/inactive_fraction")[0]


def test_copies_in_host_memory_change_nothing(tmp_path):
    settings = {"max_steps": 3, **METHOD}
    assert_equal_parameters(train(tmp_path, **settings), train(tmp_path, snapshot_device="cpu", **settings))


def test_a_first_gradient_in_bf16_changes_little(tmp_path):
    settings = {"max_steps": 3, **METHOD}
    whole, half = train(tmp_path, **settings), train(tmp_path, snapshot_dtype="bfloat16", **settings)
    whole, half, start = parameters(whole), parameters(half), dict(tiny_model().named_parameters())
    moved = torch.cat([(whole[n] - start[n]).flatten() for n in whole])
    difference = torch.cat([(whole[n] - half[n]).flatten() for n in whole])
    assert 0 < difference.norm() < 0.05 * moved.norm()


def test_storage_keeps_copies():
    tensor = torch.arange(4.0)
    kept = Storage(on_host=True, grad_dtype=torch.bfloat16).keep(tensor, torch.bfloat16)
    tensor += 1
    assert kept.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert kept.dtype == torch.bfloat16
    assert LookaheadRule(2, 0.5).storage.keep(tensor).dtype == torch.float32
