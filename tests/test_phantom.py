"""Phantom steps: the optimizer stepped on g1·ρ, g1·ρ², …, after two probes and before the correction."""

import copy
import functools
import math

import pytest
import torch
from helpers import METHOD, Recording, assert_equal_parameters, logged, train
from test_diagnostics import diagnose
from test_step import Quadratic, gxpo, prepare, quadratic, take_step
from transformers.optimization import Adafactor

from gxpo_trl import GXPOConfig, GXPOTrainer
from gxpo_trl.update.algorithm import lookahead_step


PHANTOM = {"extrapolation": "optimizer", "gate_signal": "never"}
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0.1),
    "Adafactor": lambda p: Adafactor(p, lr=0.05, relative_step=False, scale_parameter=False),
}


class Matrices(torch.nn.Module):
    """A loss of two matrices that is not quadratic, in float32."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (torch.nn.Parameter(torch.randn(6, 6, generator=generator)) for _ in range(2))

    def forward(self) -> torch.Tensor:
        return (torch.tanh(self.first @ self.second) - 0.5).square().sum()


def phantom(lookahead_steps: int, alpha: float = 1.0, **settings):
    return gxpo(lookahead_steps, alpha, of_optimizer=True, **settings)


def by_hand(model, optimizer, rho: float | None = None) -> float:
    """One update in plain torch, K 5, α 1: two probes, three steps on scaled gradients, a correction. Returns ρ."""
    parameters, seen = list(model.parameters()), []
    for step in range(6):
        if step in (0, 1, 5):
            optimizer.zero_grad()
            model().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            seen.append(torch.cat([p.grad.double().flatten() for p in parameters]))
        if step == 2 and rho is None:
            rho = (seen[0] @ seen[1] / (seen[0] @ seen[0])).clamp(0, 1).item()
        if 2 <= step < 5:
            for p in parameters:
                p.grad.mul_(rho)
        optimizer.step()
    return rho


@pytest.mark.parametrize("lookahead_steps", [3, 5, 10])
def test_plain_sgd_on_a_quadratic_in_closed_form(lookahead_steps):
    """θK = θ2 - η (ρ + … + ρ^(K-2)) g1, with ρ = Σ h²θ0·hθ1 / Σ h²θ0²."""
    model, rate = quadratic(), 0.05
    curvature, theta_0 = model.curvature, model.theta.detach().clone()
    theta_1 = theta_0 - rate * curvature * theta_0
    theta_2 = theta_1 - rate * curvature * theta_1
    grad_0, grad_1 = curvature * theta_0, curvature * theta_1
    rho = (grad_0 @ grad_1 / (grad_0 @ grad_0)).item()
    assert 0.1 < rho < 0.9
    theta_k = theta_2 - rate * sum(rho**n for n in range(1, lookahead_steps - 1)) * grad_1
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=rate))
    engine.backward(model())
    report = lookahead_step(engine, lambda: engine.backward(model()), phantom(lookahead_steps))
    torch.testing.assert_close(model.theta.detach(), theta_k, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(model.theta.grad, curvature * theta_k, rtol=1e-12, atol=1e-13)
    assert report.retention == pytest.approx(rho)
    reach = (theta_k - theta_0).norm() / (theta_2 - theta_0).norm()
    assert report.displacement_ratio == pytest.approx(reach.item())
    assert report.effective_multiplier == pytest.approx(reach.item())
    assert report.retention_mean is None and report.scale_mean is None and report.inactive_fraction is None


def test_on_an_isotropic_quadratic_it_is_k_plus_one_plain_steps():
    """Where every coordinate keeps the same share of its gradient, one ratio for the model is exact."""
    model, plain = (Quadratic(torch.full((20,), 3.0).double(), torch.randn(20).double()) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    take_step(prepare(model, torch.optim.SGD(model.parameters(), lr=0.1)), phantom(5))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        plain().backward()
        optimizer.step()
    torch.testing.assert_close(model.theta, plain.theta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_optimizer_stepped_by_hand_on_scaled_gradients(monkeypatch, name):
    """Bit for bit, whatever the optimizer makes of a gradient, and its state is that of K + 1 steps.

    The last bits of ρ depend on the order of a sum, so that it is given here.
    """
    monkeypatch.setattr("gxpo_trl.update.algorithm.retention_of_model", lambda *_: 0.625)
    model = Matrices()
    plain = copy.deepcopy(model)
    engine = prepare(model, OPTIMIZERS[name](model.parameters()), max_grad_norm=0.5)
    optimizer = OPTIMIZERS[name](plain.parameters())
    for _ in range(2):
        take_step(engine, phantom(5))
        by_hand(plain, optimizer, 0.625)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        ours, theirs = engine.base_optimizer.state[ours], optimizer.state[theirs]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in theirs)
        assert theirs.get("step", 12) == 2 * 6


class Overwriting(torch.optim.SGD):
    """Leaves something else in the gradients that it has stepped."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = self.left(p.grad)

    def left(self, gradient):
        return gradient.mul_(-3.0)


class Dropping(Overwriting):
    def left(self, gradient):
        return None


def nesterov(parameters, foreach=True):
    """Adds the momentum to the gradients in place, where it steps all at once, as on a GPU."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, foreach=foreach)


@pytest.mark.parametrize("rule", [gxpo(5, 0.5), phantom(5), gxpo(2, 1.0)], ids=["scale", "phantom", "two steps"])
@pytest.mark.parametrize(
    "overwrites, twin",
    [
        (nesterov, functools.partial(nesterov, foreach=False)),
        (
            functools.partial(Overwriting, lr=0.02, momentum=0.9),
            functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        ),
        (functools.partial(Dropping, lr=0.02), functools.partial(torch.optim.SGD, lr=0.02)),
    ],
    ids=["nesterov", "overwriting", "dropping"],
)
def test_an_optimizer_may_write_into_the_gradients(overwrites, twin, rule):
    ends = []
    for make in (overwrites, twin):
        model = Matrices()
        engine = prepare(model, make(model.parameters()), max_grad_norm=0.5)
        reports = [take_step(engine, rule) for _ in range(3)]
        ends.append((*model.parameters(), torch.tensor([r.displacement_ratio for r in reports])))
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_the_ratio_is_that_of_all_gradients_together():
    model = Matrices()
    plain = copy.deepcopy(model)
    engine = prepare(model, OPTIMIZERS["AdamW"](model.parameters()), max_grad_norm=0.5)
    optimizer = OPTIMIZERS["AdamW"](plain.parameters())
    for _ in range(3):
        report = take_step(engine, phantom(5))
        expected = by_hand(plain, optimizer)
        assert report.passes == 3 and report.retention == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1


def test_alpha_is_of_the_way_to_where_they_lead():
    ends = {}
    for alpha in (0.0, 0.5, 1.0):
        model = quadratic()
        start = model.theta.detach().clone()
        engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        engine.backward(model())
        lookahead_step(engine, lambda e=engine, m=model: e.backward(m()), phantom(5, alpha))
        ends[alpha] = model.theta.detach() - start
        assert engine.base_optimizer.state[model.theta]["step"] == 5  # the correction is the training loop's
    assert not ends[0.0].any()
    torch.testing.assert_close(ends[0.5], 0.5 * ends[1.0], rtol=1e-12, atol=1e-13)


def test_gradients_that_turn_round_are_followed_by_steps_on_none():
    """ρ is 0 where the probe overshot, and SGD without momentum then stays where two steps led."""
    model = Quadratic(torch.full((4,), 3.0).double(), torch.ones(4).double())
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))  # θ is multiplied by -1/2
    engine.backward(model())
    report = lookahead_step(engine, lambda: engine.backward(model()), phantom(5))
    assert report.retention == 0.0 and model.theta.tolist() == [0.25] * 4
    assert report.displacement_ratio == pytest.approx(1.0)


def test_gradients_that_grow_are_not_made_larger():
    """ρ is at most 1: on a hill the gradient of a step is that of the last probe."""
    model = Quadratic(torch.full((4,), -1.0).double(), torch.ones(4).double())
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    engine.backward(model())
    report = lookahead_step(engine, lambda: engine.backward(model()), phantom(4))
    assert report.retention == 1.0
    assert model.theta.tolist() == [pytest.approx(2.25 + 2 * 0.5 * 1.5)] * 4


def test_no_gradient_at_all_is_none_to_extrapolate():
    model = Quadratic(torch.zeros(4).double(), torch.ones(4).double())
    report = take_step(prepare(model, torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)), phantom(5))
    assert not report.fell_back and report.retention == 0.0
    assert model.theta.tolist() == [1.0] * 4


def test_the_ratio_is_of_the_gradients_that_were_stepped():
    """Both clipped to one norm: nothing seems lost."""
    model = Quadratic(torch.full((20,), 2.0).double(), torch.full((20,), 3.0).double())
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=0.5)
    assert take_step(engine, phantom(4)).retention == pytest.approx(1.0, abs=1e-6)


def test_gradients_that_move_nothing_have_no_part_in_it():
    """The optimizer holds one parameter of two. The other's gradient is clipped with it, and says nothing of steps."""
    model = torch.nn.ModuleList([quadratic(0), quadratic(1)])
    model.forward = lambda: model[0]() + 100 * model[1]()
    alone = quadratic(0)
    both = prepare(model, torch.optim.SGD(model[0].parameters(), lr=0.05))
    report = take_step(both, phantom(5))
    assert report.retention == pytest.approx(
        take_step(prepare(alone, torch.optim.SGD(alone.parameters(), lr=0.05)), phantom(5)).retention
    )
    assert torch.equal(model[0].theta, alone.theta)


def test_a_parameter_without_a_gradient_stays_where_it_is():
    model = quadratic()
    model.unused = torch.nn.Parameter(torch.ones(3))
    take_step(prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05)), phantom(5))
    assert model.unused.tolist() == [1.0, 1.0, 1.0] and model.unused.grad is None


@pytest.mark.parametrize("broken_pass", [2, 3])
def test_what_is_not_finite_falls_back(broken_pass):
    model = quadratic()
    start = model.theta.detach().clone()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    engine.backward(model())
    grad_0 = model.theta.grad.clone()
    passes = iter(range(2, 4))
    report = lookahead_step(
        engine,
        lambda: engine.backward(model() * (math.nan if next(passes) == broken_pass else 1.0)),
        phantom(5),
    )
    assert report.fell_back and report.passes == broken_pass
    assert torch.equal(model.theta, start) and torch.equal(model.theta.grad, grad_0)


@pytest.mark.parametrize("rollback", [False, True])
def test_a_point_that_is_not_finite_falls_back(rollback):
    """fp32 overflows in the phantom steps, two of which lead to -4e38."""
    model = Quadratic(torch.zeros(4), torch.zeros(4))
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=1e38))

    def one():
        engine.set_gradients([torch.ones(4)])

    one()
    report = lookahead_step(engine, one, phantom(4, rollback=rollback))
    assert report.fell_back and report.passes == 3
    assert model.theta.tolist() == [0.0] * 4 and model.theta.grad.tolist() == [1.0] * 4


def test_an_interrupted_step_leaves_committed_weights():
    model = quadratic()
    start = model.theta.detach().clone()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    engine.backward(model())
    steps = iter(range(5))
    step = engine.step

    def interrupted():
        if next(steps) == 3:
            raise KeyboardInterrupt
        step()

    engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        lookahead_step(engine, lambda: engine.backward(model()), phantom(5, rollback=True))
    assert torch.equal(model.theta, start)
    assert "step" not in engine.base_optimizer.state[model.theta]


def test_slices_do_not_change_the_result(monkeypatch):
    whole, sliced = quadratic(), quadratic()
    for model, size in ((whole, 2**20), (sliced, 7)):
        monkeypatch.setattr("gxpo_trl.update.slices.SLICE_SIZE", size)
        take_step(prepare(model, torch.optim.SGD(model.parameters(), lr=0.1)), phantom(5, 0.5))
    torch.testing.assert_close(whole.theta, sliced.theta, rtol=1e-14, atol=1e-15)


def test_the_prediction_is_compared_with_real_steps_beside_the_papers():
    """Isotropic: exact for both. Else the paper's is exact under plain SGD, and one ratio is not."""
    bounds = {"active_threshold": 0.0, "retention_min": -math.inf, "retention_max": math.inf, "scale_min": -math.inf}
    model = Quadratic(torch.full((9,), 2.0).double(), torch.randn(9).double())
    errors = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.1), phantom(5, 0.5, **bounds))
    assert errors["true_error"] < 1e-6 and errors["true_error_scaled"] < 1e-6
    assert errors["true_error_reposition"] == pytest.approx(0.5, abs=1e-6)
    assert errors["true_error_linear"] > 0.1
    model = quadratic()
    errors = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.1), phantom(5, 0.5, **bounds))
    assert errors["true_error_scaled"] < 1e-6 < 1e-2 < errors["true_error"] < errors["true_error_two_step"]
    assert errors["true_cosine"] > 0.9
    model = quadratic()
    plain = diagnose(model, torch.optim.SGD(model.parameters(), lr=0.1), gxpo(5, 0.5, **bounds))
    assert not any("scaled" in name for name in plain)
    assert plain["true_error_two_step"] == pytest.approx(errors["true_error_two_step"])


class RecordingTrainer(Recording, GXPOTrainer):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("lookahead_steps", [3, 10])
def test_an_active_step_is_three_passes_whatever_k(tmp_path, lookahead_steps):
    settings = {**METHOD, **PHANTOM, "reposition_alpha": 1.0, "max_steps": 2, "learning_rate": 3e-5}
    trainer = train(tmp_path, RecordingTrainer, lookahead_steps=lookahead_steps, **settings)
    assert trainer.backward_calls == 2 * 2 * 3  # micro-batches, steps, passes
    assert logged(trainer, "lookahead/backward_passes") == [3, 6]
    assert all(0 < value < 1 for value in logged(trainer, "lookahead/retention"))
    assert not logged(trainer, "lookahead/retention_mean") and not logged(trainer, "lookahead/scale_mean")
    state = trainer.lookahead.engine.state.base_optimizer.state
    assert {entry["step"].item() for entry in state.values()} == {2 * (lookahead_steps + 1)}


@pytest.mark.slow
def test_a_learning_rate_of_zero_moves_nothing(tmp_path):
    trainer = train(tmp_path, GXPOTrainer, **{**METHOD, **PHANTOM, "learning_rate": 0.0, "max_steps": 1})
    assert logged(trainer, "lookahead/cos_0_slow") == [pytest.approx(1.0, abs=1e-6)]
    assert logged(trainer, "lookahead/retention") == [pytest.approx(1.0, abs=1e-6)]
    assert not logged(trainer, "lookahead/effective_multiplier")


@pytest.mark.slow
def test_a_run_with_diagnostics_ends_with_the_same_weights(tmp_path):
    settings = {**PHANTOM, "max_steps": 3, "scripted": False, "learning_rate": 1e-3}
    without = train(tmp_path, GXPOTrainer, **settings)
    with_them = train(tmp_path, GXPOTrainer, lookahead_diagnostics_steps=2, **settings)
    assert_equal_parameters(without, with_them)
    assert len(logged(with_them, "lookahead/true_error_scaled")) == 2


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"lookahead_steps": 2}, "`lookahead_steps` is 2. Set it to 3 or more"),
        ({"lookahead_steps": 1}, "`lookahead_steps` is 1. Set it to 3 or more"),
        ({"retention_min": 0.0, "scale_max": 2.0}, "`retention_min`, `scale_max`.*`extrapolation: displacement`"),
        ({"active_threshold": 0.0}, "`active_threshold`"),
        ({"extrapolation": "momentum"}, "`extrapolation` must be one of 'displacement', 'optimizer'"),
    ],
)
def test_settings_that_make_no_phantom_step_are_refused(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        GXPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{"extrapolation": "optimizer", **settings})


@pytest.mark.parametrize("rule", ["grpo", "sfpo"])
def test_other_rules_leave_it_alone(tmp_path, rule):
    """As they do all settings of the extrapolation, so that one recipe serves a comparison."""
    config = GXPOConfig(str(tmp_path), use_cpu=True, bf16=False, update_rule=rule, lookahead_steps=2, **PHANTOM)
    assert config.lookahead_rule() is None or config.lookahead_rule().extrapolation is None
