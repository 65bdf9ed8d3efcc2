"""The gate's arithmetic, worked by hand."""

import json
import math

import pytest

from gxpo_trl.update.gate import Gate


def observe_all(gate: Gate, values: list[float]) -> list[float | None]:
    return [gate.observe(value) for value in values]


def test_z_score_leaves_the_current_value_out():
    gate = Gate(threshold=math.inf, window=30, warmup_steps=0)
    z_scores = observe_all(gate, [1.0, 3.0, 5.0])
    assert z_scores[:2] == [None, None]
    assert z_scores[2] == pytest.approx((5.0 - 2.0) / 1.0)  # mean 2, population deviation 1


def test_window_forgets():
    gate = Gate(threshold=math.inf, window=2, warmup_steps=0)
    assert observe_all(gate, [100.0, 1.0, 3.0, 4.0])[-1] == pytest.approx(2.0)


def test_a_rise_trips_the_gate_for_good():
    gate = Gate(threshold=0.5, window=30, warmup_steps=0)
    observe_all(gate, [1.0, 3.0, 2.4])
    assert not gate.tripped  # z = 0.4
    gate.observe(9.0)
    assert gate.tripped
    gate.observe(0.0)
    assert gate.tripped


def test_the_threshold_itself_trips():
    gate = Gate(threshold=1.0, window=30, warmup_steps=0)
    observe_all(gate, [1.0, 3.0])
    gate.observe(3.0 + 1e-7)  # z = 1 with the guard against a zero deviation
    assert gate.tripped


def test_a_fall_does_not_trip():
    gate = Gate(threshold=0.5, window=30, warmup_steps=0)
    observe_all(gate, [5.0, 5.1, 0.1])
    assert not gate.tripped


@pytest.mark.parametrize("warmup_steps, trips_at", [(0, 3), (3, 4), (4, None)])
def test_warmup_only_fills_the_window(warmup_steps, trips_at):
    gate = Gate(threshold=0.5, window=30, warmup_steps=warmup_steps)
    tripped_at = None
    for step, value in enumerate([1.0, 3.0, 9.0, 20.0, 1.0], start=1):
        gate.observe(value)
        tripped_at = tripped_at or (step if gate.tripped else None)
    assert tripped_at == trips_at


def test_two_values_are_needed_even_without_warmup():
    gate = Gate(threshold=0.1, window=30, warmup_steps=0)
    observe_all(gate, [1.0, 1000.0])
    assert not gate.tripped


def test_patience_wants_consecutive_exceedances():
    gate = Gate(threshold=0.5, window=3, warmup_steps=0, patience=2)
    observe_all(gate, [1.0, 3.0, 9.0, 1.0, 20.0])
    assert not gate.tripped
    gate.observe(100.0)
    assert gate.tripped


def test_a_constant_signal_does_not_trip():
    gate = Gate(threshold=0.5, window=30, warmup_steps=0)
    assert observe_all(gate, [2.0] * 10)[2:] == [0.0] * 8
    assert not gate.tripped


def test_state_survives_json():
    values = [1.0, 3.0, 9.0, 2.0, 20.0, 1.0]
    straight = Gate(threshold=0.5, window=3, warmup_steps=1, patience=2)
    expected = observe_all(straight, values)
    first = Gate(threshold=0.5, window=3, warmup_steps=1, patience=2)
    observe_all(first, values[:3])
    second = Gate(threshold=0.5, window=3, warmup_steps=1, patience=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert observe_all(second, values[3:]) == expected[3:]
    assert second.state_dict() == straight.state_dict()
