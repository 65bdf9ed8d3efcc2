"""What of PEFT the low-rank trajectories and grouped sampling rely on."""

import dataclasses
import json
import typing

import pytest
import torch
from contracts import Name, check
from helpers import tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from gxpo_trl.trajectory.checkpoints import (
    ADAPTER_WEIGHTS,
    OTHER_VARIANTS,
    PLAIN_STARTS,
    STARTS_THAT_MOVE,
    AdapterTrajectory,
    check_adapter_settings,
    factor_keys,
)


MODEL, LORA, LAYER = "peft.PeftModel", "peft.LoraConfig", "peft.tuners.tuners_utils.BaseTunerLayer"
ADAPTERS = "callbacks/adapters.py"
WEIGHTS = "trainer/vllm.py"
TRAITS, RECORDER, CHECKPOINTS, MERGING = (
    *("sampling/model_traits.py", "callbacks/trajectories.py"),
    *("trajectory/checkpoints.py", "trajectory/merging.py"),
)

NAMES = [
    Name(MODEL, "get_base_model", TRAITS, "finds the model that generates below the adapters with it", ""),
    Name(MODEL, "peft_config", TRAITS, "reads the adapters' settings there"),
    Name("peft.PeftConfig", "is_prompt_learning", TRAITS, "knows by it that an adapter changes the prompt"),
    Name(LORA, "alora_invocation_tokens", TRAITS, "knows by it that an adapter changes the prompt"),
    Name(MODEL, "base_model", WEIGHTS, "knows by its class whether an adapter can be merged"),
    Name(MODEL, "get_base_model", WEIGHTS, "names parameters as the base model does", ""),
    Name(MODEL, "active_peft_config", WEIGHTS, "reads the adapter's settings there"),
    Name(MODEL, "active_adapters", WEIGHTS, "sends what these have trained"),
    Name("peft.PeftConfig", "peft_type", WEIGHTS, "names what can't be merged"),
    Name(LORA, "ensure_weight_tying", WEIGHTS, "knows by it that tied weights are changed alike"),
    Name("peft.tuners.tuners_utils", "BaseTuner", WEIGHTS, "knows by it that an adapter has layers to merge"),
    Name("peft.tuners.tuners_utils", "BaseTunerLayer", WEIGHTS, "finds layers to merge by it"),
    Name("peft.tuners.tuners_utils.BaseTunerLayer", "get_base_layer", WEIGHTS, "finds what is sent with it", ""),
    Name("peft.tuners.tuners_utils.BaseTunerLayer", "merged_adapters", WEIGHTS, "forgets that it has merged"),
    Name("peft.tuners.lora.Linear", "merge", WEIGHTS, "merges into other parameters with it", ""),
    Name("peft.tuners.lora.LoraLayer", "lora_variant", WEIGHTS, "tries one layer of each kind by it"),
    Name("peft.tuners.trainable_tokens", "TrainableTokensLayer", WEIGHTS, "knows by it that tied tokens are alike"),
    Name("peft.utils.other", "ModulesToSaveWrapper", WEIGHTS, "knows by it which copy of a module is in use"),
    Name("peft.utils.other.ModulesToSaveWrapper", "active_adapters", WEIGHTS, "knows by it which copy is in use"),
    Name(MODEL, "active_adapter", RECORDER, "saves the adapter of that name"),
    Name(MODEL, "active_peft_config", RECORDER, "saves these settings with it"),
    Name(LORA, "inference_mode", RECORDER, "sets it as PEFT does when it saves"),
    Name(LORA, "save_pretrained", RECORDER, "writes the settings with it", "save_directory"),
    Name(
        *("peft", "get_peft_model_state_dict", RECORDER, "picks an adapter's tensors"),
        "model, state_dict, adapter_name, * save_embedding_layers",
    ),
    Name(LAYER, "active_adapters", ADAPTERS, "knows by it which adapters are in use"),
    Name(MODEL, "active_adapter", ADAPTERS, "knows by it which learned prompt is in use"),
    Name(MODEL, "peft_config", ADAPTERS, "reads the adapters' settings there"),
    Name(
        "peft.utils.other", "get_pattern_key", CHECKPOINTS, "finds a module's rank by it", "pattern_keys, key_to_match"
    ),
    *(
        Name(LORA, name, CHECKPOINTS, use)
        for name, use in (
            ("r", "takes the rank from it"),
            ("lora_alpha", "computes a module's scaling by it"),
            ("use_rslora", "computes a module's scaling by it"),
            ("rank_pattern", "takes the rank of single modules from it"),
            ("alpha_pattern", "computes the scaling of single modules by it"),
            ("init_lora_weights", "knows by it where a run began"),
            ("base_model_name_or_path", "knows by it whether checkpoints belong together"),
            ("peft_type", "refuses what is no LoRA by it"),
        )
    ),
    *(Name(LORA, name, CHECKPOINTS, "refuses by it an adapter that is no plain LoRA") for name in OTHER_VARIANTS),
    Name("peft.LoraModel", "merge_and_unload", MERGING, "merges an adapter with it", "* safe_merge"),
    Name("peft.PeftConfig", "is_prompt_learning", MERGING, "refuses what can't be merged by it"),
    Name("peft", "AutoPeftModelForCausalLM", "evaluation/sampling.py", "loads an adapter on its base with it"),
    Name(
        *(MODEL, "from_pretrained", "scripts/", "loads an adapter that is trained further"),
        "model, model_id, * is_trainable",
    ),
    Name("peft", "get_peft_model", "scripts/", "counts the parameters of an adapter", "model, peft_config"),
    Name("peft.PeftConfig", "from_pretrained", "evaluation/sampling.py", "finds the base model of an adapter"),
    Name("peft.tuners.lora.LoraLayer", "scaling", "tests/test_peft_contract.py", "compares ours with it"),
]


@pytest.mark.parametrize("touched", NAMES, ids=str)
def test_the_names_that_we_touch_are_there(touched):
    check(touched)


def adapted(**settings):
    """The embedded model with an adapter whose B and A are not zero."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False, **settings})
    return get_peft_model(tiny_model(), config)


def test_adapters_are_saved_under_these_names(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    with safe_open(tmp_path / ADAPTER_WEIGHTS, "pt") as tensors:
        keys = set(tensors.keys())
        assert set(factor_keys(name)) <= keys, (
            f"PEFT does not save B and A as {' and '.join(factor_keys(name))} in {ADAPTER_WEIGHTS} any more: "
            "trajectory/checkpoints.py reads them there."
        )
        a, b = (tensors.get_tensor(key) for key in factor_keys(name))
    layer = model.get_base_model().get_submodule(name)
    assert torch.equal(a, layer.lora_A["default"].weight) and torch.equal(b, layer.lora_B["default"].weight), (
        "PEFT does not save `lora_A` (r, n) and `lora_B` (m, r) as they are any more: trajectory/checkpoints.py "
        "multiplies them."
    )
    picked = get_peft_model_state_dict(model, dict(model.named_parameters()), "default", save_embedding_layers=False)
    assert picked.keys() == keys, (
        "PEFT's `get_peft_model_state_dict` picks other tensors from those it is given than `save_pretrained` writes: "
        "callbacks/trajectories.py saves an adapter with it."
    )
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["inference_mode"] is True, (
        "PEFT does not write `peft_type: LORA` and `inference_mode: true` into adapter_config.json any more: "
        "trajectory/checkpoints.py reads it, and callbacks/trajectories.py writes it."
    )
    check_adapter_settings(settings, "this one")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_of_a_module_is_what_we_compute(tmp_path, use_rslora):
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.o_proj": 7}}
    model = adapted(use_rslora=use_rslora, lora_alpha=6, **patterns)
    model.save_pretrained(tmp_path)
    trajectory = AdapterTrajectory(tmp_path, (1,), (tmp_path,), 1, None)
    theirs = {
        name: layer.scaling["default"]
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    ours = {name: trajectory.scaling(name) for name in theirs}
    assert len(set(theirs.values())) == 3 and ours == pytest.approx(theirs), (
        "PEFT scales B·A otherwise than `AdapterTrajectory.scaling` in trajectory/checkpoints.py does."
    )


@pytest.mark.parametrize("start", PLAIN_STARTS + STARTS_THAT_MOVE)
def test_an_adapter_starts_where_we_take_it_to_start(start):
    model, plain = adapted(init_lora_weights=start, r=4), tiny_model()
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    is_zero = not layer.lora_B["default"].weight.any()
    assert is_zero == (start in PLAIN_STARTS), (
        f"PEFT's `init_lora_weights: {start}` starts with a B that is {'' if is_zero else 'not '}zero: PLAIN_STARTS "
        "and STARTS_THAT_MOVE in trajectory/checkpoints.py say otherwise."
    )
    assert torch.equal(layer.base_layer.weight, plain.get_submodule(name).weight), (
        f"PEFT's `init_lora_weights: {start}` changes the base model's weights now: trajectory/checkpoints.py has to "
        "refuse it."
    )


def test_every_variant_of_lora_is_refused():
    """PEFT marks the settings that make something else of an adapter."""
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert {"use_dora", "arrow_config"} <= variants, (
        "PEFT's LoraConfig does not mark variants with `is_lora_variant` any more: this test knows by it what "
        "trajectory/checkpoints.py has to refuse."
    )
    passed = {name for name in variants if not name.startswith("use_")} - set(OTHER_VARIANTS)
    assert not passed, (
        f"PEFT's LoraConfig has the variant `{', '.join(sorted(passed))}`, which OTHER_VARIANTS in "
        "trajectory/checkpoints.py does not refuse."
    )


HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # which modules are adapted
    *("bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),  # what is trained beside them
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # where it starts
    *("fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings of LoRA that leave an adapter s·B·A, or that others of them turn on."""


def test_every_setting_of_lora_is_known():
    known = {*HARMLESS, *OTHER_VARIANTS}
    new = {f.name for f in dataclasses.fields(LoraConfig) if not f.name.startswith("use_")} - known
    assert not new, (
        f"PEFT's LoraConfig has the setting `{', '.join(sorted(new))}` now: if it makes an adapter something else "
        "than s·B·A it belongs to OTHER_VARIANTS in trajectory/checkpoints.py, else to HARMLESS here."
    )


def test_the_ways_to_start_an_adapter_have_these_names():
    named = str(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    assert all(f"'{start}'" in named for start in PLAIN_STARTS + STARTS_THAT_MOVE if isinstance(start, str)), (
        "PEFT's `init_lora_weights` does not know `gaussian` and `orthogonal` any more: PLAIN_STARTS and "
        "STARTS_THAT_MOVE in trajectory/checkpoints.py name them."
    )


def test_prompt_learning_is_told_from_lora():
    prompt, lora = PromptTuningConfig(num_virtual_tokens=2), LoraConfig()
    assert prompt.is_prompt_learning and not lora.is_prompt_learning and not lora.alora_invocation_tokens, (
        "PEFT's `is_prompt_learning` or `alora_invocation_tokens` does not tell adapters that change the prompt from "
        "plain LoRA any more: sampling/model_traits.py refuses them by it."
    )
