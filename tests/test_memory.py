"""What an active step holds beside a plain one, counted allocation by allocation."""

import gc
import itertools

import pytest
import torch
from test_step import Quadratic, State, gxpo, prepare, take_step
from torch.profiler import profile


COORDINATES = 2_000_000
MODEL_BYTES = 4 * COORDINATES


class Layers(torch.nn.Module):
    """Eight quadratics of equal size, fp32."""

    def __init__(self):
        super().__init__()
        size = COORDINATES // 8
        self.layers = torch.nn.ModuleList(Quadratic(torch.ones(size), torch.ones(size)) for _ in range(8))

    def forward(self):
        return sum(layer() for layer in self.layers)


def peak_bytes(function) -> int:
    """The most that is allocated at once while `function` runs, above what was there before."""
    return max(itertools.accumulate(allocations(function)))


def allocations(function) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) while `function` runs, in order."""
    gc.collect()  # else what earlier tests left in cycles may be released meanwhile, and count as negative
    with profile(profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def plain_step(engine: State) -> None:
    engine.backward(engine.model())
    engine.clip_gradients()
    engine.step()
    engine.clear_gradients()


def active_step(engine: State, rollback: bool = False, **settings) -> None:
    take_step(engine, gxpo(5, 0.5, rollback, **settings))
    engine.clear_gradients()


@pytest.fixture
def engine(monkeypatch) -> State:
    monkeypatch.setattr(
        "gxpo_trl.update.slices.SLICE_SIZE", 2**12
    )  # temporaries of the extrapolation count for nothing
    model = Layers()
    engine = prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False), max_grad_norm=1.0)
    plain_step(engine)  # the moments exist
    return engine


@pytest.mark.parametrize("of_optimizer", [False, True])
def test_an_active_step_holds_two_copies_of_the_trainable_parameters(engine, of_optimizer):
    plain = peak_bytes(lambda: plain_step(engine))
    active = peak_bytes(lambda: active_step(engine, of_optimizer=of_optimizer))
    assert 1.9 < (active - plain) / MODEL_BYTES < 2.05


def test_rollback_holds_the_moments_too(engine):
    plain = peak_bytes(lambda: plain_step(engine))
    active = peak_bytes(lambda: active_step(engine, rollback=True))
    assert 3.9 < (active - plain) / MODEL_BYTES < 4.05


def test_nothing_stays_behind(engine):
    assert abs(sum(allocations(lambda: active_step(engine)))) < 0.01 * MODEL_BYTES


def test_what_earlier_tests_left_in_cycles_counts_for_nothing():
    def in_a_cycle():
        cycle = [torch.ones(COORDINATES)]
        cycle.append(cycle)

    allocations(in_a_cycle)  # a release is only seen of what was allocated while something was profiled
    assert peak_bytes(lambda: (gc.collect(), torch.ones(COORDINATES))) == MODEL_BYTES
