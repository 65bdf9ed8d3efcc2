"""The same lookahead over TRL's RLOO."""

import re

import pytest
from helpers import (
    AS_TRL,
    METHOD,
    TINY_BATCH,
    Recording,
    assert_close_parameters,
    assert_equal_parameters,
    double_model,
    logged,
    parameters,
    text_reward,
    train,
)
from reference import rloo_loss, run_reference
from trl import RLOOConfig, RLOOTrainer

from gxpo_trl import GXPORLOOConfig, GXPORLOOTrainer


SAMPLED = {"scripted": False, "reward": text_reward, "max_completion_length": TINY_BATCH["max_completion_length"]}


class RecordingTrainer(Recording, GXPORLOOTrainer):
    pass


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_equals_the_reference(tmp_path, float64, accumulation):
    trainer = train(
        tmp_path,
        RecordingTrainer,
        GXPORLOOConfig,
        model=double_model(),
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=16 // accumulation,
        beta=0.0,
        **AS_TRL,
        **SAMPLED,
        **METHOD,
    )
    expected, _, _ = run_reference(trainer, double_model(), loss_function=rloo_loss)
    assert_close_parameters(parameters(trainer), expected, atol=1e-9)
    assert max(logged(trainer, "lookahead/clip_ratio_slow")) > 0.01
    assert trainer.backward_calls == 3 * 3 * accumulation


def test_its_plain_rule_is_trl_bit_for_bit(tmp_path):
    settings = {"learning_rate": 1e-3, **SAMPLED}
    plain = train(tmp_path, GXPORLOOTrainer, GXPORLOOConfig, update_rule="grpo", **AS_TRL, **settings)
    assert_equal_parameters(plain, train(tmp_path, RLOOTrainer, RLOOConfig, **settings))


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_an_inert_lookahead_is_trl_to_rounding(tmp_path, num_iterations):
    settings = {"learning_rate": 1e-3, "max_steps": 4, "num_iterations": num_iterations, **SAMPLED}
    inert = train(
        tmp_path,
        GXPORLOOTrainer,
        GXPORLOOConfig,
        reposition_alpha=0.0,
        probe_optimizer_state="rollback",
        **AS_TRL,
        **settings,
    )
    trl = train(tmp_path, RLOOTrainer, RLOOConfig, **settings)
    assert_close_parameters(parameters(inert), parameters(trl), atol=1e-6)
    for ours, theirs in zip(inert.state.log_history, trl.state.log_history, strict=True):
        timeless = {k: v for k, v in theirs.items() if "time" not in k and "per_second" not in k}
        assert {k: ours[k] for k in timeless} == pytest.approx(timeless, rel=1e-4, abs=1e-6)


def test_sfpo_runs_over_it_and_its_card_says_so(tmp_path):
    settings = {"update_rule": "sfpo", "lookahead_steps": 1, "gate_signal": "entropy", **SAMPLED}
    trainer = train(tmp_path, GXPORLOOTrainer, GXPORLOOConfig, **settings)
    assert logged(trainer, "lookahead/backward_passes") == [2, 4, 6]
    trainer.create_model_card(model_name="mine")
    assert re.search(r"\| `update_rule` +\| sfpo +\|", (tmp_path / "README.md").read_text())
