"""Training with vLLM itself, on a CPU. All trainers share one engine, which gets their weights."""

import copy
import functools

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has an environment for it")
pytestmark = pytest.mark.vllm

import vllm_engine  # noqa: E402
from helpers import (  # noqa: E402
    Recording,
    assert_equal_parameters,
    logged,
    make_trainer,
    our_metrics,
    parameters,
    text_reward,
)
from peft import LoraConfig  # noqa: E402
from test_compaction import half_without_spread  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadConfig, LookaheadTrainer, SFPOConfig, SFPOTrainer  # noqa: E402
from gxpo_trl.rollout.compaction import ENTROPIES  # noqa: E402


METHODS = {
    "gxpo": (GXPOTrainer, GXPOConfig),
    "sfpo": (SFPOTrainer, SFPOConfig),
    "grpo": (LookaheadTrainer, LookaheadConfig),
    "trl": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vllm_engine.install()
    vllm_engine.share_engine()
    return vllm_engine.save_model(tmp_path_factory.mktemp("model") / "two-heads")


@pytest.fixture
def make(folder, tmp_path, monkeypatch):
    """Makes trainers that sample with vLLM; everything they sync and sample is watched."""

    def of(method: str = "gxpo", name: str = "run", **settings):
        trainer_class, config_class = METHODS[method]
        if settings.pop("recording", False):
            trainer_class = type("RecordingTrainer", (Recording, trainer_class), {})
        if method == "grpo":
            settings = {"update_rule": "grpo", "compact_batches": False, **settings}
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / name,
            *(trainer_class, config_class),
            model=settings.pop("model", None) or AutoModelForCausalLM.from_pretrained(folder),
            scripted=False,
            reward=text_reward,
            **{"use_vllm": True, "max_completion_length": 12, "learning_rate": 1e-3, **settings},
        )
        watch(trainer, monkeypatch)
        return trainer

    return of


def watch(trainer, monkeypatch) -> None:
    """Notes the step of each synchronisation, and at each generation how vLLM's weights differ from the trainer's."""
    generation = trainer.vllm_generation
    trainer.synced, trainer.differences = [], []
    llm, sync = generation.llm, generation.sync_weights
    sample = functools.partial(type(llm).generate, llm)

    def noted_sync():
        trainer.synced.append(trainer.state.global_step)
        sync()

    def noted_sample(*args, **kwargs):
        trainer.differences.append(differences(trainer))
        return sample(*args, **kwargs)

    monkeypatch.setattr(generation, "sync_weights", noted_sync)
    monkeypatch.setattr(llm, "generate", noted_sample)


def differences(trainer) -> list[str]:
    """The names of weights in which vLLM's model is not the trainer's, bit for bit."""
    model = trainer.model
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    expected = vllm_engine.as_vllm_has_them(dict(model.named_parameters()))
    found = vllm_engine.weights_of(trainer.vllm_generation.llm)
    assert found.keys() == expected.keys()
    return [name for name, p in expected.items() if not torch.equal(found[name][: len(p)], p)]


RUNS = {
    "full": ("gxpo", {}),
    "sfpo": ("sfpo", {}),
    "lora": ("gxpo", {"peft_config": LORA}),
    "grpo with lora": ("grpo", {"peft_config": LORA}),
    "rloo": ("rloo", {}),
    "rloo with lora": ("rloo", {"peft_config": LORA}),
    "sleep": ("gxpo", {"vllm_enable_sleep_mode": True}),
    "sleep with lora": ("gxpo", {"vllm_enable_sleep_mode": True, "peft_config": LORA}),
    "several steps a rollout": ("gxpo", {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}),
    "evaluation": (
        "gxpo",
        {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "num_generations_eval": 2},
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_vllm_samples_with_the_trainers_weights_which_it_gets_once_a_step(make, run):
    method, settings = RUNS[run]
    trainer = make(method, **settings)
    start = parameters(trainer)
    trainer.train()
    assert trainer.differences and not any(trainer.differences)
    assert trainer.synced == sorted(set(trainer.synced))
    if run != "several steps a rollout":
        assert trainer.synced == list(range(4 if run == "evaluation" else 3))
    assert any(not torch.equal(p, start[name]) for name, p in parameters(trainer).items())


def test_completions_without_advantage_are_left_out_since_scoring_has_their_entropies(make):
    trainer, rollouts = make("grpo", compact_batches=True, max_steps=2), []
    trainer.reward_funcs = [half_without_spread]
    generate = trainer._generate_and_score_completions

    def checked(inputs):
        batch = generate(inputs)
        ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        width = batch["completion_ids"].size(1)
        with torch.no_grad():
            scored = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, compute_entropy=True)
        rollouts.append((batch, scored))
        return batch

    trainer._generate_and_score_completions = checked
    trainer.train()
    assert logged(trainer, "lookahead/forward_only_token_fraction") == [0.0, 0.0]
    assert max(logged(trainer, "lookahead/token_fraction")) < 0.8
    for batch, (logps, entropies, _) in rollouts:
        mask = batch["completion_mask"]
        assert torch.allclose(batch["old_per_token_logps"] * mask, logps * mask, atol=1e-4)
        assert torch.allclose(batch[ENTROPIES] * mask, entropies * mask, rtol=1e-4, atol=1e-4)


def test_benchmarks_are_sampled_with_the_weights_of_their_step(make):
    """Those of the last step too, which no rollout is sampled with."""
    trainer = make(eval_benchmarks=["arithmetic"], eval_samples=2, eval_on_start=True, eval_steps=1, max_steps=2)
    trainer.train()
    assert not any(trainer.differences) and len(trainer.differences) > 4
    assert trainer.synced == [0, 1, 2]
    assert len(logged(trainer, "eval/arithmetic/avg@2")) == 3


def test_grpo_is_trls_bit_for_bit(make):
    trl, ours = make("trl", name="trl"), make("grpo")
    for trainer in (trl, ours):
        torch.manual_seed(0)
        trainer.train()
    assert_equal_parameters(ours, trl)
    assert logged(ours, "loss") == logged(trl, "loss") and logged(ours, "reward") == logged(trl, "reward")


@pytest.mark.parametrize("method", ["gxpo", "sfpo"])
def test_all_passes_see_the_same_ratios_and_old_log_probabilities(make, method):
    """Those between the sampler and the trainer: TRL computes them once, before pass 1."""
    trainer = make(method, recording=True, compact_batches=False, gradient_accumulation_steps=1, num_iterations=2)
    trainer.train()
    passes = trainer.lookahead.rule.passes
    assert passes > 2 and len(trainer.loss_inputs) == 3 * passes
    for step in range(3):
        first, *later = trainer.loss_inputs[step * passes : (step + 1) * passes]
        assert len(first["importance_sampling_ratio"]) == 8 and first["importance_sampling_ratio"].std() > 0
        for again in later:
            for name in ("importance_sampling_ratio", "old_per_token_logps", "advantages", "completion_ids"):
                assert torch.equal(again[name], first[name]), name


SETUPS = {
    "gxpo": ("gxpo", {}),
    "sfpo": ("sfpo", {}),
    "lora": ("gxpo", {"peft_config": LORA}),
    "dapo": ("gxpo", {"loss_type": "dapo"}),
    "kl": ("gxpo", {"beta": 0.1}),
    "uncorrected": ("gxpo", {"vllm_importance_sampling_correction": False}),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_compaction_changes_nothing_but_rounding(make, setup):
    """After one step: a second begins from rounded weights, and ratios of gradients amplify it (1.5e-6 with DAPO)."""
    method, settings = SETUPS[setup]
    ends = []
    for compaction in (False, True):
        smooth = {"max_steps": 1, "learning_rate": 1e-4, "adam_epsilon": 1e-3}
        trainer = make(method, name=str(compaction), compact_batches=compaction, **smooth, **settings)
        torch.manual_seed(0)
        trainer.train()
        ends.append(parameters(trainer))
    assert max((p - ends[1][name]).abs().max() for name, p in ends[0].items()) < 5e-7


@pytest.mark.parametrize(
    "settings", [{}, {"peft_config": LORA}, {"vllm_enable_sleep_mode": True}], ids=["full", "lora", "sleep"]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make, tmp_path, settings):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **settings}
    whole = make(name="whole", **settings)
    whole.train()
    resumed = make(name="whole", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.synced == [2, 3] and not any(resumed.differences)
    assert_equal_parameters(whole, resumed)
    assert our_metrics(whole.state.log_history) == our_metrics(resumed.state.log_history)


def test_a_base_in_bf16_keeps_its_bits(make, folder):
    """And vLLM's copy, which is in fp32 here, is the merge rounded once."""
    trainer = make(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), peft_config=LORA)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    assert all(0.9 < share < 1.1 for share in logged(trainer, "lookahead/vllm_adapter_share"))
