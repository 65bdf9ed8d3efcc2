"""SFPO computes its paper's algorithm, and is GXPO's machine with K probes and scale 1."""

import pytest
from helpers import (
    METHOD,
    Recording,
    RisingGate,
    assert_close_parameters,
    assert_equal_parameters,
    double_model,
    logged,
    parameters,
    train,
)
from reference import train_sfpo

from gxpo_trl import GXPOConfig, GXPOTrainer, SFPOConfig, SFPOTrainer


class RecordingTrainer(Recording, SFPOTrainer):
    pass


@pytest.mark.parametrize("fast_steps", [1, 3, 7])
def test_a_run_equals_the_reference(tmp_path, float64, fast_steps):
    trainer = train(
        tmp_path, RecordingTrainer, SFPOConfig, model=double_model(), lookahead_steps=fast_steps, max_steps=4, **METHOD
    )
    model = double_model()
    train_sfpo(model, trainer.windows(), lr=3e-4, K=fast_steps, alpha=0.8, max_norm=0.5, epsilon=0.05, eps=1e-3)
    assert_close_parameters(parameters(trainer), {n: p.detach() for n, p in model.named_parameters()}, atol=1e-9)
    assert trainer.backward_calls == 4 * (fast_steps + 1) * 2
    assert logged(trainer, "lookahead/backward_passes")[-1] == 4 * (fast_steps + 1)


def test_two_fast_steps_are_gxpo_with_its_scale_forced_to_one(tmp_path):
    settings = {"reposition_alpha": 0.8, "gate_signal": "never", "max_steps": 3, **METHOD}
    sfpo = train(tmp_path, SFPOTrainer, SFPOConfig, lookahead_steps=2, **settings)
    gxpo = train(tmp_path, GXPOTrainer, GXPOConfig, lookahead_steps=10, scale_max=1.0, **settings)
    assert_equal_parameters(sfpo, gxpo)


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_it_runs_on_every_loss(tmp_path, loss_type):
    trainer = train(tmp_path, SFPOTrainer, SFPOConfig, loss_type=loss_type, max_steps=2, learning_rate=1e-4)
    assert logged(trainer, "lookahead/grad_norm_slow")[-1] > 0
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_the_entropy_gate_sees_the_rollout_policys_entropy(tmp_path):
    trainer = train(tmp_path, SFPOTrainer, SFPOConfig, max_steps=3, learning_rate=1e-3)
    assert list(trainer.lookahead.gate.values) == pytest.approx(logged(trainer, "entropy"))


def test_what_sfpo_does_not_measure_is_not_logged(tmp_path):
    trainer = train(tmp_path, SFPOTrainer, SFPOConfig, max_steps=1)
    assert not any("retention" in name or "scale" in name for name in trainer.state.log_history[0])
    assert logged(trainer, "lookahead/effective_multiplier") == pytest.approx([0.8])


def test_alpha_decays_after_the_trigger(tmp_path):
    """The gate fires in step 3; α goes from 0.8 over 0.53 and 0.27 to 0, then each step is a single pass."""
    trainer = train(
        tmp_path,
        type("Trainer", (RisingGate, SFPOTrainer), {}),
        SFPOConfig,
        max_steps=7,
        gate_warmup_steps=2,
        alpha_decay_steps=2,
    )
    reach = logged(trainer, "lookahead/effective_multiplier")
    assert reach == pytest.approx([0.8, 0.8, 0.8, 0.8 * 2 / 3, 0.8 / 3])
    assert logged(trainer, "lookahead/backward_passes") == [4, 8, 12, 16, 20, 21, 22]
    assert logged(trainer, "lookahead/shutoff_step") == [5, 5, 5]
