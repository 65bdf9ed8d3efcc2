"""The gate's arithmetic, worked by hand, and its behaviour on recorded series."""

import json
import math
import random
import statistics

import pytest

from gxpo_trl.update.gate import Gate, Trigger


def gate(decay_steps: int = 0, max_active_steps: float = math.inf, **trigger) -> Gate:
    trigger = Trigger(**{"threshold": 0.5, "window": 30, "warmup_steps": 0, **trigger})
    return Gate(trigger, decay_steps, max_active_steps)


def observe_all(watched: Gate, values: list[float]) -> list[float | None]:
    return [watched.observe(value) for value in values]


def phases(watched: Gate, values: list[float]) -> str:
    """One letter a step: a while active, d while α decays, - in single-pass steps, which show the gate nothing."""
    letters = ""
    for value in values:
        if not watched.active:
            letters += "-"
        else:
            letters += "d" if watched.decaying else "a"
            watched.observe(value)
    return letters


def test_z_score_leaves_the_current_value_out():
    z_scores = observe_all(gate(threshold=math.inf), [1.0, 3.0, 5.0])
    assert z_scores[:2] == [None, None]
    assert z_scores[2] == pytest.approx((5.0 - 2.0) / 1.0)  # mean 2, population deviation 1


def test_window_forgets():
    assert observe_all(gate(threshold=math.inf, window=2), [100.0, 1.0, 3.0, 4.0])[-1] == pytest.approx(2.0)


def test_a_rise_ends_the_phase_for_good():
    watched = gate()
    observe_all(watched, [1.0, 3.0, 2.4])
    assert watched.active  # z = 0.4
    watched.observe(9.0)
    assert not watched.active
    assert phases(watched, [0.0] * 1000) == "-" * 1000


def test_the_threshold_itself_trips():
    watched = gate(threshold=1.0)
    observe_all(watched, [1.0, 3.0])
    watched.observe(3.0 + 1e-7)  # z = 1 with the guard against a zero deviation
    assert not watched.active


@pytest.mark.parametrize("two_sided, active", [(False, True), (True, False)])
def test_a_fall_trips_only_a_two_sided_gate(two_sided, active):
    watched = gate(two_sided=two_sided)
    observe_all(watched, [5.0, 5.1, 0.1])
    assert watched.active == active


@pytest.mark.parametrize("warmup_steps, trips_at", [(0, 3), (3, 4), (4, None)])
def test_warmup_only_fills_the_window(warmup_steps, trips_at):
    watched = gate(warmup_steps=warmup_steps)
    tripped_at = None
    for step, value in enumerate([1.0, 3.0, 9.0, 20.0, 1.0], start=1):
        watched.observe(value)
        tripped_at = tripped_at or (None if watched.active else step)
    assert tripped_at == trips_at


def test_two_values_are_needed_even_without_warmup():
    watched = gate(threshold=0.1)
    observe_all(watched, [1.0, 1000.0])
    assert watched.active


def test_patience_wants_consecutive_exceedances():
    watched = gate(patience=2)
    observe_all(watched, [1.0, 3.0, 9.0, 1.0, 20.0])
    assert watched.active
    watched.observe(21.0)
    assert not watched.active


def test_exceedances_enter_the_window():
    watched = gate(patience=3)
    z_scores = observe_all(watched, [1.0, 3.0, 8.0, 8.0])
    assert list(watched.values) == [1.0, 3.0, 8.0, 8.0]
    assert z_scores[2:] == pytest.approx([6.0, 4.0 / statistics.pstdev([1.0, 3.0, 8.0])])


def test_patience_outlasts_a_steady_signal():
    """A window without exceedances would lose its spread, until every value is one."""
    steady = random.Random(0)
    watched = gate(warmup_steps=50, patience=10)
    observe_all(watched, [steady.gauss(2.0, 0.1) for _ in range(1000)])
    assert watched.active
    observe_all(watched, [4.0] * 10)  # it still sees a rise
    assert not watched.active


def test_a_value_that_is_not_finite_says_nothing():
    watched = gate()
    observe_all(watched, [1.0, 3.0, math.nan, math.inf])
    assert watched.active
    assert list(watched.values) == [1.0, 3.0]
    assert watched.active_steps == 4 and watched.observed == 2


RECORDED = {
    "constant": [2.0] * 40,
    "falling": [4.0 * 0.9**i for i in range(40)],
    "noise": [2.0 + 0.1 * math.sin(7.0 * i) for i in range(40)],
    "spike": [2.0 + 0.1 * math.sin(7.0 * i) + 3.0 * (i == 25) for i in range(40)],
    "drift": [2.0 + 0.1 * math.sin(7.0 * i) + 0.1 * max(i - 20, 0) for i in range(40)],
    "wild first steps": [50.0, 0.1, 30.0] + [2.0 + 0.1 * math.sin(7.0 * i) for i in range(37)],
}


@pytest.mark.parametrize(
    "series, settings, shutoff",
    [
        ("constant", {}, None),
        ("falling", {}, None),
        ("falling", {"two_sided": True}, 11),
        ("noise", {"threshold": 3.0}, None),
        ("spike", {"threshold": 3.0}, 26),
        ("spike", {"threshold": 3.0, "patience": 2}, None),
        ("drift", {"threshold": 3.0, "patience": 2}, 27),
        ("wild first steps", {"threshold": 3.0}, None),
    ],
)
def test_recorded_series(series, settings, shutoff):
    letters = phases(gate(**{"warmup_steps": 10, **settings}), RECORDED[series])
    assert letters == ("a" * 40 if shutoff is None else "a" * shutoff + "-" * (40 - shutoff))


def test_a_budget_ends_the_phase_whatever_the_signal_does():
    assert phases(gate(max_active_steps=4), [2.0] * 8) == "aaaa----"


def test_alpha_decays_linearly_after_the_trip():
    watched = gate(decay_steps=3)
    factors = []
    for value in [1.0, 3.0, 9.0, 50.0, 0.0, 7.0]:
        factors.append(watched.alpha_factor)
        watched.observe(value)
    assert factors == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert not watched.active


def test_decaying_steps_count_against_the_budget():
    assert phases(gate(decay_steps=3, max_active_steps=4), [1.0, 3.0, 9.0] + [2.0] * 4) == "aaad---"


@pytest.mark.parametrize("decay_steps", [0, 2])
@pytest.mark.parametrize("interrupted_at", range(1, 12))
def test_state_survives_json_wherever_it_is_cut(decay_steps, interrupted_at):
    values = [1.0, 3.0, 9.0, 2.0, 20.0, 1.0, 2.0, 30.0, 1.0, 40.0, 50.0, 2.0]
    settings = {"window": 3, "warmup_steps": 1, "patience": 1}
    straight, first, second = (gate(decay_steps, **settings) for _ in range(3))
    expected = phases(straight, values)
    letters = phases(first, values[:interrupted_at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert letters + phases(second, values[interrupted_at:]) == expected
    assert second.state_dict() == straight.state_dict()


@pytest.mark.parametrize("resting, active", [(0, True), ("for good", False)])
def test_a_state_of_version_0_1_is_taken_up(resting, active):
    state = {"values": [1.0, 3.0], "observed": 2, "exceedances": 0, "active_steps": 2, "decaying": 0}
    watched = gate()
    watched.load_state_dict({**state, "resting": resting})
    assert watched.active == active and watched.observed == 2
    with pytest.raises(ValueError, match="gate_fallback"):
        gate().load_state_dict({**state, "resting": 7})


@pytest.mark.parametrize("decay_steps, decaying, active", [(20, 19, True), (5, 5, True), (0, 0, False)])
def test_fewer_decaying_steps_after_a_resume_do_not_raise_alpha(decay_steps, decaying, active):
    before = gate(decay_steps=20, threshold=1.0)
    observe_all(before, [1.0, 3.0, 9.0, 9.0])
    assert before.decaying == 19
    after = gate(decay_steps=decay_steps, threshold=1.0)
    after.load_state_dict(before.state_dict())
    assert (after.decaying, after.active) == (decaying, active) and after.alpha_factor <= 1
