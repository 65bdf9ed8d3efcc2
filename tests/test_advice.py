"""One warning each, with the remedy, and none where all is well."""

import dataclasses

import pytest
from helpers import ON_CPU, train

from gxpo_trl import GXPOConfig, SFPOConfig
from gxpo_trl.trainer.advice import SHORT_REACH_STEPS, Advisor
from gxpo_trl.update.measurements import StepReport


GOOD = StepReport(passes=3, grad_norm_slow=1.0, retention_std=0.5, effective_multiplier=1.2)


def advice(config, reports: list[StepReport], signal=None) -> list[str]:
    advisor, gate, said = Advisor(config), config.gate(), []
    for i, report in enumerate(reports):
        gate.observe(signal[i] if signal else 1.0)
        said += advisor.advise(report, gate)
    return said


@pytest.fixture
def config(tmp_path) -> GXPOConfig:
    return GXPOConfig(str(tmp_path), **ON_CPU, gate_warmup_steps=2)


def test_nothing_is_said_of_a_good_run(config):
    assert advice(config, [GOOD] * 100) == []


def test_a_lookahead_that_reaches_less_than_its_probes(config):
    short = dataclasses.replace(GOOD, effective_multiplier=0.7)
    assert advice(config, [short] * (SHORT_REACH_STEPS - 1)) == []
    said = advice(config, [short] * 100)
    assert len(said) == 1
    assert "0.70" in said[0] and "reposition_alpha" in said[0]


def test_sfpo_is_meant_to_reach_less(tmp_path):
    short = dataclasses.replace(GOOD, effective_multiplier=0.8)
    assert advice(SFPOConfig(str(tmp_path), **ON_CPU), [short] * 100) == []


def test_a_retention_ratio_inside_its_noise(config):
    noisy = dataclasses.replace(GOOD, diagnostics={"noise_retention_std": 0.5})
    quiet = dataclasses.replace(GOOD, diagnostics={"noise_retention_std": 0.4})
    assert advice(config, [quiet] * 3) == []
    said = advice(config, [quiet, noisy, noisy])
    assert len(said) == 1
    assert "0.5" in said[0] and "learning rate" in said[0]


def test_a_learning_rate_of_zero_is_no_noise(config):
    """In the first step of a warm-up nothing moves: every ratio is 1, and so is that of the repeated gradient."""
    assert (
        advice(config, [dataclasses.replace(GOOD, retention_std=0.0, diagnostics={"noise_retention_std": 0.0})]) == []
    )


def test_a_gate_that_fires_in_its_first_armed_step(config):
    said = advice(config, [GOOD] * 3, signal=[1.0, 2.0, 9.0])
    assert len(said) == 1
    assert "step 3" in said[0] and "gate_threshold" in said[0]
    assert advice(config, [GOOD] * 4, signal=[1.0, 2.0, 1.5, 9.0]) == []


def test_a_budget_is_no_alarm(tmp_path):
    config = GXPOConfig(str(tmp_path), **ON_CPU, gate_warmup_steps=2, max_active_steps=3)
    assert advice(config, [GOOD] * 3, signal=[1.0, 1.0, 1.0]) == []


def test_the_trainer_passes_it_on(tmp_path, caplog):
    train(tmp_path, max_steps=25, reposition_alpha=0.1, learning_rate=1e-5)
    warned = [record for record in caplog.records if "reposition_alpha" in record.message]
    assert len(warned) == 1
    assert warned[0].levelname == "WARNING"


@pytest.mark.parametrize("interval", [1, 7])
def test_a_run_whose_groups_are_mostly_flat_says_so_once(tmp_path, caplog, interval):
    train(
        tmp_path,
        update_rule="grpo",
        max_steps=42,
        logging_steps=interval,
        reward=lambda prompts, **_: [1.0] * len(prompts),
    )
    said = [r.getMessage() for r in caplog.records if "frac_reward_zero_std" in r.getMessage()]
    assert len(said) == 1 and "100%" in said[0] and "`temperature`" in said[0]


def test_a_resumed_run_counts_its_own_steps_only(tmp_path, caplog):
    options = {"update_rule": "grpo", "save_strategy": "steps", "save_steps": 19}
    options |= {"reward": lambda prompts, **_: [1.0] * len(prompts)}
    train(tmp_path, max_steps=19, **options)
    train(tmp_path, max_steps=24, resume_from_checkpoint=str(tmp_path / "checkpoint-19"), **options)
    assert not [r for r in caplog.records if "frac_reward_zero_std" in r.getMessage()]


def test_groups_with_spread_are_not_warned_of(tmp_path, caplog):
    train(tmp_path, update_rule="grpo", max_steps=21)
    assert not [r for r in caplog.records if "frac_reward_zero_std" in r.getMessage()]
