"""Runs that must agree: the plain rule and TRL, the inert lookahead and TRL, a resumed and an uninterrupted run."""

import json
import re

import pytest
import torch
from helpers import (
    AS_TRL,
    RisingGateTrainer,
    assert_close_parameters,
    assert_equal_parameters,
    logged,
    make_trainer,
    parameters,
    text_reward,
    tiny_model,
    train,
)
from peft import LoraConfig
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, LookaheadConfig, LookaheadTrainer
from gxpo_trl.callbacks.hub import HubCallback


SLOW = pytest.mark.slow
TIMES = ("time", "runtime", "per_second")
SAMPLED = {"scripted": False, "learning_rate": 1e-3, "beta": 0.02, "eval_strategy": "steps", "eval_steps": 2}
SAMPLED |= {"per_device_eval_batch_size": 64}  # all at once
INERT = {"reposition_alpha": 0.0, "rule": {"rollback": True}}
"""The lookahead makes its three passes, and the corrective gradient is taken where it started."""


def trl_log(trainer) -> list[dict]:
    """The log without our own metrics and without times."""
    return [
        {k: v for k, v in entry.items() if not k.startswith("lookahead/") and not any(word in k for word in TIMES)}
        for entry in trainer.state.log_history
    ]


def train_trl(tmp_path, **settings):
    return train(tmp_path / "trl", GRPOTrainer, GRPOConfig, **settings)


@pytest.mark.parametrize("config_class", [GXPOConfig, LookaheadConfig])
def test_the_plain_rule_is_trl_bit_for_bit(tmp_path, config_class):
    settings = {"max_steps": 4, "model": None, **SAMPLED}
    plain = train(tmp_path / "ours", LookaheadTrainer, config_class, update_rule="grpo", **AS_TRL, **settings)
    trl = train_trl(tmp_path, **settings)
    assert_equal_parameters(plain, trl)
    assert trl_log(plain) == trl_log(trl)
    assert logged(plain, "lookahead/backward_passes") == [1, 2, 3, 4]


def test_after_shut_off_a_run_is_trl_bit_for_bit(tmp_path):
    """The gate trips in step 3; from the checkpoint of step 4, TRL's own trainer goes on the same way."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, **SAMPLED}
    ours = train(tmp_path, RisingGateTrainer, gate_warmup_steps=2, **AS_TRL, **settings)
    assert ours.lookahead.shutoff_step == 3
    trl = train(tmp_path, GRPOTrainer, GRPOConfig, resume_from_checkpoint=str(tmp_path / "checkpoint-4"), **settings)
    assert_equal_parameters(ours, trl)
    assert trl_log(ours)[-3:-1] == trl_log(trl)[-3:-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo"},
        *(
            pytest.param({"loss_type": t}, marks=SLOW)
            for t in ("dapo", "cispo", "dr_grpo", "bnpo", "sapo", "luspo", "vespo")
        ),
        {"num_iterations": 2},
        pytest.param({"steps_per_generation": 4}, marks=SLOW),
        pytest.param({"steps_per_generation": 1}, marks=SLOW),
        pytest.param({"num_iterations": 3, "steps_per_generation": 4, "loss_type": "dapo"}, marks=SLOW),
        pytest.param({"importance_sampling_level": "sequence"}, marks=SLOW),
        pytest.param({"entropy_coef": 0.01}, marks=SLOW),
        pytest.param(
            {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 0.5, "entropy_coef_delta": 0.01},
            marks=SLOW,
        ),
        pytest.param({"top_entropy_quantile": 0.5}, marks=SLOW),
        pytest.param({"off_policy_mask_threshold": 0.1}, marks=SLOW),
        pytest.param({"mask_truncated_completions": True}, marks=SLOW),
        pytest.param({"max_grad_norm": 0.0}, marks=SLOW),
        {"optim": "sgd"},
        pytest.param({"optim": "adafactor"}, marks=SLOW),
        pytest.param({"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2}, marks=SLOW),
        pytest.param({"gradient_accumulation_steps": 3}, marks=SLOW),
        pytest.param({"gradient_checkpointing": True}, marks=SLOW),
        {"bf16": True},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_an_inert_lookahead_is_trl_to_rounding(tmp_path, settings):
    """Whatever TRL is configured to do: its parameters, and its metrics, which stay those of pass 1."""
    settings = {"max_steps": 4, **SAMPLED, **settings}
    inert = train(tmp_path / "ours", **AS_TRL, **INERT, **settings)
    trl = train_trl(tmp_path, **settings)
    assert_close_parameters(parameters(inert), parameters(trl), atol=1e-6)
    for ours, theirs in zip(trl_log(inert), trl_log(trl), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert logged(inert, "lookahead/backward_passes")[-1] == 12


def test_an_inert_lookahead_is_trl_with_lora_and_dropout(tmp_path):
    settings = {"max_steps": 4, **SAMPLED}

    def lora():
        return LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")

    inert = train(tmp_path / "ours", peft_config=lora(), **AS_TRL, **INERT, **settings)
    trl = train_trl(tmp_path, peft_config=lora(), **settings)
    assert_close_parameters(parameters(inert), parameters(trl), atol=1e-6)


def experts() -> Qwen2MoeForCausalLM:
    """A random mixture of experts that reads the embedded model's tokens."""
    torch.manual_seed(0)
    like = tiny_model().config
    tokens = {name: getattr(like, name) for name in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**tokens, **sizes, num_experts=4, num_experts_per_tok=2))


@pytest.mark.slow
@pytest.mark.parametrize("router_aux_loss_coef", [0.0, 0.1])
def test_an_inert_lookahead_is_trl_with_experts(tmp_path, router_aux_loss_coef):
    """Also with the router's loss, which sees padding, so that nothing is compacted whatever the setting says."""
    settings = {**SAMPLED, "max_steps": 2, "reward": text_reward, "router_aux_loss_coef": router_aux_loss_coef}
    settings |= {"max_completion_length": 8, "beta": 0.0}  # TRL would load the reference from a folder
    off = {} if router_aux_loss_coef else AS_TRL
    inert = train(tmp_path / "ours", model=experts(), **off, **INERT, **settings)
    trl = train_trl(tmp_path, model=experts(), **settings)
    assert_close_parameters(parameters(inert), parameters(trl), atol=1e-6)
    moved = max((p - dict(experts().named_parameters())[n]).abs().max() for n, p in parameters(trl).items())
    assert moved > 1e-4 and logged(inert, "lookahead/backward_passes")[-1] == 6


def test_an_active_lookahead_is_not_trl(tmp_path):
    """The equivalences above would also hold if the update rule never ran."""
    settings = {"max_steps": 2, "learning_rate": 1e-3}
    active, trl = train(tmp_path / "ours", **settings), train_trl(tmp_path, **settings)
    with pytest.raises(AssertionError):
        assert_close_parameters(parameters(active), parameters(trl), atol=1e-6)


def test_only_the_adapter_moves_under_lora(tmp_path):
    trainer = train(tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"), learning_rate=1e-3)
    base = tiny_model().state_dict()
    trained = trainer.model.get_base_model().state_dict()
    for name, value in base.items():
        other = trained.get(name, trained.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(value, other), name
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in parameters(trainer).items())


@pytest.mark.parametrize("tripped", [False, True])
@pytest.mark.parametrize("rollback", [False, pytest.param(True, marks=SLOW)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, tripped, rollback):
    settings = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "rule": {"rollback": rollback},
        "gate_warmup_steps": 2 if tripped else 50,
        **SAMPLED,
    }
    trainer_class = RisingGateTrainer if tripped else LookaheadTrainer
    straight = train(tmp_path, trainer_class, **settings)
    resumed = train(tmp_path, trainer_class, resume_from_checkpoint=str(tmp_path / "checkpoint-4"), **settings)
    assert straight.lookahead.shutoff_step == (3 if tripped else None)
    assert_equal_parameters(straight, resumed)
    assert straight.lookahead.state_dict() == resumed.lookahead.state_dict()
    for ours, theirs in zip(straight.state.log_history, resumed.state.log_history, strict=True):
        if ours["step"] < 8 or "loss" in ours:
            timeless = {k: v for k, v in ours.items() if not any(word in k for word in TIMES)}
            assert timeless == {k: v for k, v in theirs.items() if not any(word in k for word in TIMES)}


def test_the_checkpoint_holds_committed_weights_and_a_small_json(tmp_path):
    trainer = train(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(saved[name], p) for name, p in parameters(trainer).items())
    state = json.loads((tmp_path / "checkpoint-2" / "lookahead_state.json").read_text())
    assert state["backward_passes"] == 6
    assert state["gate"]["values"] == pytest.approx(logged(trainer, "lookahead/grad_norm_slow"))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_checkpoint_of_another_trainer_is_resumed_with_a_warning(tmp_path, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, GRPOTrainer, GRPOConfig, **settings)
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **settings)
    assert "lookahead_state.json" in caplog.text
    assert logged(resumed, "lookahead/backward_passes") == [3, 6]


def test_the_model_card_names_method_paper_and_settings(tmp_path):
    trainer = make_trainer(tmp_path, lookahead_steps=7)
    HubCallback(trainer)  # completes it
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "2605.06755" in card
    assert "swapnil2026gxpo" in card
    assert re.search(r"\| `lookahead_steps` +\| 7 +\|", card)
    assert "gxpo" in card.split("---")[1]
