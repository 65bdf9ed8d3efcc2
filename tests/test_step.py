"""One active step on losses whose answer is known."""

import math

import pytest
import torch
from accelerate import Accelerator

from gxpo_trl.engines.replicated import ReplicatedState
from gxpo_trl.update.algorithm import LookaheadRule, lookahead_step, one_pass
from gxpo_trl.update.extrapolation import Extrapolation
from gxpo_trl.update.measurements import Measurements, take_real_steps
from gxpo_trl.update.slices import SLICE_SIZE, aligned_slices


UNBOUNDED = {
    "active_threshold": 0.0,
    "retention_min": -math.inf,
    "retention_max": math.inf,
    "scale_min": -math.inf,
    "scale_max": math.inf,
}


class Quadratic(torch.nn.Module):
    """L(θ) = ½ Σ h_i θ_i², in float64."""

    def __init__(self, curvature: torch.Tensor, start: torch.Tensor):
        super().__init__()
        self.curvature = curvature
        self.theta = torch.nn.Parameter(start.clone())

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.curvature * self.theta.square()).sum()


def quadratic(seed: int = 0) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.rand(50, dtype=torch.float64, generator=generator) * 9.9 + 0.1
    return Quadratic(curvature, torch.randn(50, dtype=torch.float64, generator=generator))


class State(ReplicatedState):
    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)


def prepare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float = 0.0) -> State:
    accelerator = Accelerator(cpu=True)
    accelerator.gradient_state._set_sync_gradients(True)  # training that was broken off has left it
    return State(accelerator, model, accelerator.prepare(optimizer), max_grad_norm)


def diagnosed_step(engine: State, replay, rule: LookaheadRule):
    """A step that is compared with real ones first."""
    real_steps = take_real_steps(
        engine, lambda: one_pass(engine, replay), rule.extrapolation or Extrapolation(rule.probes)
    )
    return lookahead_step(engine, replay, rule, Measurements(engine, rule, real_steps))


def take_step(engine: State, rule: LookaheadRule):
    """Pass 1, the programme, and the slow correction that the training loop would make."""

    def replay():
        engine.backward(engine.model())

    engine.clear_gradients()
    replay()
    report = lookahead_step(engine, replay, rule)
    engine.clip_gradients()
    engine.step()
    return report


def gxpo(lookahead_steps: int, alpha: float, rollback: bool = False, **settings) -> LookaheadRule:
    return LookaheadRule(2, alpha, Extrapolation(lookahead_steps, **settings), rollback)


@pytest.mark.parametrize("lookahead_steps", [2, 3, 5, 10])
def test_corollary_2_one_active_step_is_k_plus_one_plain_steps(lookahead_steps):
    model, plain = quadratic(), quadratic()
    learning_rate = 0.1  # η h_i ≤ 1 for every curvature below 10
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=learning_rate))
    for _ in range(3):
        take_step(engine, gxpo(lookahead_steps, 1.0, **UNBOUNDED))
    optimizer = torch.optim.SGD(plain.parameters(), lr=learning_rate)
    for _ in range(3 * (lookahead_steps + 1)):
        optimizer.zero_grad()
        plain().backward()
        optimizer.step()
    torch.testing.assert_close(model.theta, plain.theta, rtol=1e-10, atol=1e-12)


def test_probes_land_where_the_optimizer_takes_them():
    """With scale 1 and α = 1 the reposition is θ2 itself: three plain AdamW steps."""
    model, plain = quadratic(), quadratic()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    take_step(engine, gxpo(2, 1.0))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        plain().backward()
        optimizer.step()
    torch.testing.assert_close(model.theta, plain.theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rollback, steps", [(False, 3), (True, 1)])
def test_rollback_advances_the_optimizer_once(rollback, steps):
    model = quadratic()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    for step in range(1, 4):
        take_step(engine, gxpo(5, 0.5, rollback))
        assert engine.optimizer.state[model.theta]["step"].item() == step * steps


def test_alpha_zero_with_rollback_is_the_plain_step():
    model, plain = quadratic(), quadratic()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05), max_grad_norm=1.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05)
    for _ in range(4):
        take_step(engine, gxpo(5, 0.0, rollback=True))
        optimizer.zero_grad()
        plain().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(model.theta, plain.theta)


def test_the_ratio_is_of_the_clipped_gradients():
    """Both gradients clipped to the same norm: on an isotropic quadratic nothing seems lost, so r = 1 everywhere."""
    model = Quadratic(torch.full((20,), 2.0).double(), torch.full((20,), 3.0).double())
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=0.5)
    report = take_step(engine, gxpo(4, 0.5))
    assert report.retention_mean == pytest.approx(1.0, abs=1e-6)
    assert report.scale_mean == pytest.approx(2.0, abs=1e-5)
    assert report.grad_norm_0 > report.grad_norm_1 > 0.5  # reported before clipping


def test_report_on_a_step_worked_by_hand():
    """h = (1, 0), lr = 0.5: g0 = (1, 0), θ1 = .5, g1 = .5, θ2 = .25; r = .5, S_3 / S_2 = 1.75 / 1.5."""
    model = Quadratic(torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double())
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    report = take_step(engine, gxpo(3, 0.5))
    scale = 1.75 / 1.5
    theta_tilde = 1 - 0.5 * scale * 0.75
    assert report.passes == 3 and not report.fell_back
    assert report.grad_norm_0 == pytest.approx(1.0)
    assert report.grad_norm_1 == pytest.approx(0.5)
    assert report.grad_norm_slow == pytest.approx(theta_tilde)
    assert report.cos_0_slow == pytest.approx(1.0)
    assert report.retention_mean == pytest.approx(0.5)
    assert report.retention_std == pytest.approx(0.0, abs=1e-6)
    assert report.scale_mean == pytest.approx((scale + 1.0) / 2)
    assert report.scale_max == pytest.approx(scale)
    assert report.inactive_fraction == pytest.approx(0.5)
    assert report.displacement_ratio == pytest.approx(scale)
    assert report.effective_multiplier == pytest.approx(0.5 * scale)
    assert model.theta[0].item() == pytest.approx(theta_tilde * 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("probes", [1, 2])
def test_where_nothing_moves_the_cosine_is_1_in_each_precision(dtype, probes):
    generator = torch.Generator().manual_seed(0)
    curvature, start = torch.rand(2, 1000, generator=generator, dtype=torch.float64).to(dtype)
    model = Quadratic(curvature, start)
    report = take_step(prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), 0.5), LookaheadRule(probes, 1.0))
    assert report.cos_0_slow == pytest.approx(1.0, abs=1e-6)


def test_a_parameter_without_a_gradient_stays_where_it_is():
    model = quadratic()
    model.unused = torch.nn.Parameter(torch.ones(3))
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    report = take_step(engine, gxpo(5, 0.5))
    assert model.unused.tolist() == [1.0, 1.0, 1.0]
    assert model.unused.grad is None
    assert report.inactive_fraction == pytest.approx(3 / 53)


def test_a_zero_learning_rate_moves_nothing_and_reports_no_displacement():
    model = quadratic()
    start = model.theta.clone()
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    report = take_step(engine, gxpo(5, 0.5))
    assert torch.equal(model.theta, start)
    assert report.displacement_ratio is None and report.effective_multiplier is None
    assert report.retention_mean == 1.0


@pytest.mark.parametrize("rollback", [False, True])
def test_a_repositioned_point_that_is_not_finite_falls_back(rollback):
    """fp32 overflows on the way to θ̃: the step becomes the plain one with g0, from θ0."""
    model = Quadratic(torch.full((4,), 1e-30), torch.full((4,), 1e30))
    start = model.theta.detach().clone()
    engine = prepare(model, torch.optim.SGD(model.parameters(), lr=1e38))
    engine.backward(model())
    grad_0 = model.theta.grad.clone()
    report = lookahead_step(engine, lambda: engine.backward(model()), gxpo(5, 1.0, rollback))
    assert report.fell_back
    assert torch.equal(model.theta, start)
    assert torch.equal(model.theta.grad, grad_0)


@pytest.mark.parametrize("interrupted_pass", [2, 3])
def test_an_interrupted_step_leaves_committed_weights(interrupted_pass):
    model = quadratic()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    take_step(engine, gxpo(5, 0.5))
    committed = model.theta.detach().clone()
    engine.clear_gradients()
    engine.backward(model())
    passes = iter(range(2, 4))

    def replay():
        if next(passes) == interrupted_pass:
            raise KeyboardInterrupt
        engine.backward(model())

    with pytest.raises(KeyboardInterrupt):
        lookahead_step(engine, replay, gxpo(5, 0.5, rollback=True))
    assert torch.equal(model.theta, committed)
    assert engine.optimizer.state[model.theta]["step"].item() == 3  # one step, its probes included


def test_large_parameters_are_extrapolated_slice_by_slice():
    """Slices cover every coordinate once, whatever the shape."""
    for shape in [(7,), (), (3, SLICE_SIZE // 2 + 1), (SLICE_SIZE + 5,), (5, 3, SLICE_SIZE // 4)]:
        tensor, other = torch.zeros(shape), torch.zeros(shape)
        for part, (slice_, none) in aligned_slices([tensor], [None]):
            slice_ += 1
            part.of([other]).add_(1)
            assert none.shape == slice_.shape and not none.any()
        assert tensor.eq(1).all() and other.eq(1).all()
    assert list(aligned_slices([torch.zeros(0, 3)])) == []


def test_slices_do_not_change_the_result(monkeypatch):
    whole, sliced = quadratic(), quadratic()
    for model, size in ((whole, 2**20), (sliced, 7)):
        monkeypatch.setattr("gxpo_trl.update.slices.SLICE_SIZE", size)
        take_step(prepare(model, torch.optim.SGD(model.parameters(), lr=0.1)), gxpo(5, 0.5))
    assert torch.equal(whole.theta, sliced.theta)


class CountingInGroups(torch.optim.SGD):
    """Keeps its step count in the param groups, from its first step on."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def test_a_step_that_is_undone_leaves_nothing_in_the_param_groups():
    model = quadratic()
    engine = prepare(model, CountingInGroups(model.parameters(), lr=torch.tensor(0.1)))
    (group,) = engine.base_optimizer.param_groups
    before, parameters, rate = engine.snapshot_optimizer(), group["params"], group["lr"]
    one_pass(engine, lambda: engine.backward(engine.model()))
    engine.step()
    group["lr"].mul_(2)
    engine.restore_optimizer(before)
    assert "step" not in group and group["params"] is parameters
    assert group["lr"] is rate and rate == pytest.approx(0.1)  # in place, as a captured graph reads it
    engine.step()
    engine.restore_optimizer(engine.snapshot_optimizer())
    assert group["step"] == 1
