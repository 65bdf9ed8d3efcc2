"""Random models with the sizes of real ones: nothing is loaded, and what a step costs is the same."""

import importlib.util

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config


SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "tiny": (64, 128, 2, 4, 2),
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
}
"""Of Qwen2.5, and one for a look on a CPU."""
VOCABULARY, TINY_VOCABULARY = 151_936, 2048


def best_attention() -> str:
    """Flash attention where it is installed; on a CPU, and without it, torch's own."""
    has_flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else "sdpa"


def random_model(shape: str, attention: str = "sdpa", **config) -> PreTrainedModel:
    """A randomly initialised Qwen2, in bf16 on the accelerator, or in fp32 on a CPU; `config` has further settings."""
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=TINY_VOCABULARY if shape == "tiny" else VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
        **{"pad_token_id": 0, **config},
    )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention)
