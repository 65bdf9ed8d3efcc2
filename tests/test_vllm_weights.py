"""What vLLM is sent of a PEFT model: base plus adapter, rounded once, while no bit of the base changes."""

import copy

import pytest
import torch
from helpers import logged, make_trainer, text_reward, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from vllm_stand_in import StandInLLM, generation_for, standing_in

from gxpo_trl.trainer.vllm import merge_out_of_place


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(**settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **{"tie_word_embeddings": False, **settings}))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))


class Convolutions(nn.Module):
    name_or_path = "no language model"

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3)


TIED = "tied embeddings"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VARIANTS = {
    "plain": (llama, {"target_modules": "all-linear"}),
    "of bf16": (llama, {"target_modules": "all-linear"}),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "ranks and alphas": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 7}, "lora_alpha": 5},
    ),
    "rslora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "mica": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "pissa": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    TIED: (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "modules to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "tied modules to save": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "tied tokens": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    ),
    "trained biases": (lambda: llama(mlp_bias=True), {"target_modules": ["up_proj"], "bias": "all"}),
    "biases of LoRA": (lambda: llama(mlp_bias=True), {"target_modules": ["up_proj"], "lora_bias": True}),
    "fan in, fan out": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "convolutions": (Convolutions, {"target_modules": ["one", "two"]}),
}


def with_adapter(variant: str, base_dtype=torch.bfloat16, size: float = 0.3):
    """A model with a base in `base_dtype` and an adapter that is not 0; and the base model's own names."""
    torch.manual_seed(0)
    make, settings = VARIANTS[variant]
    base = make().to(base_dtype)
    names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    model = get_peft_model(base, LoraConfig(r=4, **settings), autocast_adapter_dtype=variant != "of bf16")
    move(model, size)
    return model, names


def move(model, size: float) -> None:
    """As training would: each trainable parameter, by a little."""
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p) * (p.float().std().nan_to_num().clamp(min=0.1)).to(p.dtype)


def merged_in_fp32(model) -> dict[str, torch.Tensor]:
    """By PEFT itself, in a copy whose base is in fp32, and rounded once."""
    merged = copy.deepcopy(model).float().merge_and_unload()
    return {name: p.detach().bfloat16() for name, p in merged.named_parameters(remove_duplicate=False)}


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before) -> None:
    after = model.state_dict()
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and not different, f"changed: {different}"
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != TIED])  # PEFT adds to both, which are one
def test_vllm_gets_the_merge_in_fp32_rounded_once_and_the_base_keeps_its_bits(variant):
    model, names = with_adapter(variant)
    before, expected = bits(model), merged_in_fp32(model)
    generation = generation_for(model)
    merge_out_of_place(generation)
    for _ in range(30):
        generation.sync_weights()
    assert_same_bits(model, before)
    sent = generation.llm.weights
    tied = {"lm_head.weight"} if is_tied(model) else set()  # sent or not: vLLM does not load it
    assert expected.keys() - tied <= sent.keys() <= set(names)
    for name, weight in sent.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name


def is_tied(model) -> bool:
    return getattr(getattr(model, "config", None), "tie_word_embeddings", False)


def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits


def loaded(model, weights: dict[str, torch.Tensor]):
    """A model without an adapter, with the weights that vLLM has, as vLLM loads them: a tied head is not loaded."""
    fresh = type(model.get_base_model())(model.config).to(model.dtype)
    tied = {"lm_head.weight"} if is_tied(model) else set()
    missing, unexpected = fresh.load_state_dict({n: w for n, w in weights.items() if n not in tied}, strict=False)
    assert set(missing) <= tied and not unexpected
    return fresh.eval()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "convolutions"])
def test_vllms_model_computes_what_the_trainers_does(variant):
    """In fp64, where it can be had, so that rounding hides nothing."""
    dtype = torch.float32 if variant in ("mica", "pissa", "experts") else torch.float64
    model, _ = with_adapter(variant, dtype)
    generation = generation_for(model.eval())
    merge_out_of_place(generation)
    generation.sync_weights()
    ours = logits(model)
    difference = (logits(loaded(model, generation.llm.weights)) - ours).abs().max()
    with model.disable_adapter():
        assert difference < 1e-3 * (logits(model) - ours).abs().max()
    assert difference < (1e-9 if dtype == torch.float64 else 1e-6)


def test_all_active_adapters_are_merged_and_the_others_are_not():
    model, _ = with_adapter("plain", torch.float64)
    for name in ("second", "idle"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    generation = generation_for(model.eval())
    merge_out_of_place(generation)
    generation.sync_weights()
    torch.testing.assert_close(logits(loaded(model, generation.llm.weights)), logits(model), rtol=0, atol=1e-9)


def test_a_second_copy_of_a_module_that_is_trained_whole_stays_at_home():
    """TRL adds an adapter "ref" when it trains an adapter further with a KL penalty."""
    model, names = with_adapter("modules to save", torch.float64)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("default")
    generation = generation_for(model.eval())
    merge_out_of_place(generation)
    generation.sync_weights()
    assert generation.llm.weights.keys() == set(names)
    torch.testing.assert_close(logits(loaded(model, generation.llm.weights)), logits(model), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_the_share_is_what_the_rounded_weights_show_of_the_move(size):
    torch.manual_seed(0)
    model = get_peft_model(llama().bfloat16(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    move(model, 0.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = size * torch.randn_like(p)
    generation, shares = generation_for(model), []
    merge_out_of_place(generation, shares.append)
    generation.sync_weights()
    seen = moved = 0.0
    for name, layer in model.get_base_model().named_modules():
        if name.endswith(("q_proj", "v_proj")):
            delta = layer.get_delta_weight("default").double()
            sent = generation.llm.weights[f"{name}.weight"].double() - layer.base_layer.weight.double()
            seen, moved = seen + (sent * delta).sum(), moved + (delta * delta).sum()
    assert shares == [pytest.approx((seen / moved).item(), rel=1e-2)]
    assert abs(shares[0] - 1) < {1e-1: 0.01, 1e-3: 0.1, 1e-5: 3}[size]


def test_the_share_counts_what_vllm_rounds_further(monkeypatch):
    """A base in fp32, of which vLLM keeps a copy in bf16."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(StandInLLM, "dtype", dtype)
        model, _ = with_adapter("plain", torch.float32, size=1e-5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data *= 1e-2
        generation = generation_for(model)
        merge_out_of_place(generation, lambda share, dtype=dtype: shares.update({dtype: share}))
        generation.sync_weights()
    assert shares[torch.float32] == pytest.approx(1.0, abs=1e-6) and abs(shares[torch.bfloat16] - 1) > 1e-3


REFUSED = {
    "prompts": (llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING can't be"),
    "aLoRA": (
        llama,
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3]),
        "PEFT can't merge `model.layers.1.self_attn.q_proj`",
    ),
    "a bias that is nowhere": (
        llama,
        LoraConfig(target_modules=["q_proj"], lora_bias=True),
        "PEFT can't merge `model.layers.1.self_attn.q_proj`",
    ),
}
for use in ("embed_tokens", "lm_head"):
    message = "`model.embed_tokens.*` and `lm_head.*`, which are tied"
    for setting in ("target_modules", "modules_to_save"):
        settings = {"target_modules": ["q_proj"], setting: ["q_proj", use] if setting == "target_modules" else [use]}
        REFUSED[f"{setting}: {use}"] = (lambda: llama(tie_word_embeddings=True), LoraConfig(**settings), message)


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_has_no_weights_for_is_refused_in_one_sentence(case):
    make, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        merge_out_of_place(generation_for(get_peft_model(make(), settings)))


def test_a_quantized_base_is_left_to_trl_and_that_is_said(caplog):
    model, _ = with_adapter("plain")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    generation = generation_for(model)
    merge_out_of_place(generation)
    assert "_iter_named_params" not in vars(generation)
    assert "the frozen weights drift" in caplog.text and "q_proj.base_layer.weight` is quantized" in caplog.text


def test_a_lora_run_leaves_its_base_alone_and_logs_what_vllm_sees(tmp_path):
    """Its own adapter moves; each step's weights go to vLLM once."""
    with standing_in():
        trainer = make_trainer(
            tmp_path,
            model=tiny_model(dtype=torch.bfloat16),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            scripted=False,
            reward=text_reward,
            use_vllm=True,
            max_steps=4,
            learning_rate=1e-3,
            vllm_importance_sampling_correction=False,
        )
        frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
    llm = trainer.vllm_generation.llm
    assert llm.synchronisations == 4
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    shares = logged(trainer, "lookahead/vllm_adapter_share")  # none of the first step, whose adapter adds nothing
    assert len(shares) == 3 and all(0 < share < 2 for share in shares)
