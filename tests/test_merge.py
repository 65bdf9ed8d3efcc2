"""`gxpo merge`: what it writes is what the adapter computes, in the base's precision; and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gxpo_trl.scripts.merge import main, merge
from gxpo_trl.tasks import TINY_MODEL_PATH


IDS = torch.arange(4, 40)[None]


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    tiny_model(dtype=dtype).save_pretrained(folder)
    path = folder / "generation_config.json"  # as on the Hub: settings of sampling, and no `do_sample`
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 7}))
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(folder)
    return str(folder)


def adapter(folder: Path, base: str, config=None, spread: float = 0.05) -> PeftModel:
    """Of weights that are no nothing."""
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data += spread * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, use_rslora=True),
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["linear", "dora", "head of tied embeddings", "tied embeddings", "a head of its own"],
)
def test_the_merged_model_computes_what_the_adapter_does(tmp_path, config):
    base = base_model(tmp_path / "base")
    expected = logits(adapter(tmp_path / "adapter", base, config))
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)


def test_weights_are_added_in_fp32_and_rounded_once(tmp_path):
    base = base_model(tmp_path / "base", torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    lora = dict(adapter(tmp_path / "adapter", base, config, spread=0.01).named_modules())[f"base_model.model.{name}"]
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto").get_submodule(name).weight
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    assert merged.dtype == torch.bfloat16 and a.dtype == torch.float32
    assert torch.equal(merged.get_submodule(name).weight, (before.float() + 2 * (b @ a)).bfloat16())
    untouched = "model.layers.1.mlp.up_proj"
    was = AutoModelForCausalLM.from_pretrained(base, dtype="auto").get_submodule(untouched).weight
    assert torch.equal(merged.get_submodule(untouched).weight, was)


def test_nothing_untrue_is_said_of_tied_embeddings(tmp_path, recwarn):
    adapter(tmp_path / "adapter", base_model(tmp_path / "base"))
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert not [warning for warning in recwarn if "no longer tied" in str(warning.message)]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_it_stands_alone(tmp_path):
    """With its tokenizer and generation settings, when neither the adapter nor the base is there any more."""
    base = base_model(tmp_path / "base")
    expected = logits(adapter(tmp_path / "adapter", base))
    main([str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "new" / "merged")])
    (tmp_path / "base").rename(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-4) and merged.generation_config.top_k == 7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(TINY_MODEL_PATH).chat_template
    assert merged.config.tie_word_embeddings and not list((tmp_path / "new").glob("*.partial"))


def test_a_base_model_that_has_moved_is_named(tmp_path):
    expected = logits(adapter(tmp_path / "adapter", base_model(tmp_path / "base")))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="/base, can't be loaded. Say where it is: `--base_model`"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "elsewhere"))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4)


def test_what_cannot_be_merged_is_refused_in_one_sentence(tmp_path):
    base = base_model(tmp_path / "base")
    for folder in (base, str(tmp_path / "nowhere")):
        with pytest.raises(SystemExit, match="holds no adapter_config.json. Name the folder of an adapter"):
            main([folder, "--output_dir", str(tmp_path / "merged")])
    adapter(tmp_path / "broken", base)
    (tmp_path / "broken" / "adapter_config.json").write_text('{"base_model_name_or_path": ')
    with pytest.raises(SystemExit, match="broken/adapter_config.json is not complete JSON"):
        main([str(tmp_path / "broken"), "--output_dir", str(tmp_path / "merged")])
    model = AutoModelForCausalLM.from_pretrained(base)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ValueError, match="holds a PROMPT_TUNING adapter"):
        merge(tmp_path / "prompts", tmp_path / "merged")
    adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match="base exists already"):
        merge(tmp_path / "adapter", tmp_path / "base")
    other = str(tmp_path / "other")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_MODEL_PATH, hidden_size=8)).save_pretrained(other)
    with pytest.raises(SystemExit, match="RuntimeError: .*size mismatch"):
        main([str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged"), "--base_model", other])
    assert not (tmp_path / "merged").exists() and json.loads((tmp_path / "base" / "config.json").read_text())
