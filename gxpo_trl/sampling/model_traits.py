"""What a model's forward pass allows for its batches, according to its configuration."""

import functools
import inspect
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


# Layers that read another layer's keys and values have a class of their own in later versions.
_READING_LAYERS = [cache_utils.DummyLayer] if hasattr(cache_utils, "DummyLayer") else []
STOCK_CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, *_READING_LAYERS)
FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary embeddings whose frequencies don't depend on the longest sequence of a batch."""


GROWING_ROPES = ("dynamic", "longrope")
"""Those whose frequencies do, beyond the length that the model was first trained with."""
HEADS = ("summary_", "classifier_")
"""Beginnings of the names of settings of heads that a model which generates doesn't have."""


def dropout_of(model: torch.nn.Module) -> str | None:
    """The module or setting that shows that a forward pass in training draws random numbers, with its value; `None` if
    none does. A pass may draw some all the same.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"`{name}` {module.p:g}"
    adapters = getattr(model, "peft_config", None) or {}
    for settings in (model.config.get_text_config().to_dict(), *(adapter.to_dict() for adapter in adapters.values())):
        for name, value in settings.items():
            draws = ("drop" in name or name.endswith("jitter_noise")) and not name.startswith(HEADS)
            if draws and isinstance(value, float) and value > 0:
                return f"`{name}` {value:g}"
    return None


def has_relative_positions(model: torch.nn.Module) -> bool:
    """Whether a sequence may start at any position: attention is not cut at absolute positions or scaled by them, the
    frequencies of rotary embeddings don't depend on the length, and no adapter puts virtual tokens before the padding.
    """
    config = model.config.get_text_config()
    scales = any(rope.get("llama_4_scaling_beta") for rope in _ropes(config))
    is_rotary = bool(_ropes(config)) and _has_fixed_ropes(config) and not scales
    return is_rotary and not _cuts_attention(config) and not _has_virtual_tokens(model)


def width_bound(model: torch.nn.Module) -> int | None:
    """The width, in columns of prompt and completion, below which the log-probabilities of a row don't depend on how
    wide its batch is; `None` if they never do.

    Frequencies of `dynamic` and `longrope` embeddings follow the longest sequence of a batch beyond the length that
    the model was first trained with.
    """
    config = model.config.get_text_config()
    bounds = []
    for rope in _ropes(config):
        if rope.get("rope_type") in FIXED_ROPES:
            continue
        lengths = (rope.get("original_max_position_embeddings"), getattr(config, "max_position_embeddings", None))
        is_known = rope.get("rope_type") in GROWING_ROPES and not _has_virtual_tokens(model)
        bounds.append(min((length for length in lengths if length), default=0) if is_known else 0)
    return min(bounds, default=None)


def why_not_fixed(model: torch.nn.Module) -> str:
    """Why the width of a batch may matter to its rotary embeddings, to stand after them."""
    types = {rope.get("rope_type") for rope in _ropes(model.config.get_text_config())} - {*FIXED_ROPES, *GROWING_ROPES}
    if types:
        return f"are of a type that is not known here, {', '.join(map(str, sorted(types, key=str)))}"
    return "depend on the longest sequence of the batch"


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model that generates: the one below the adapters, if there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def cache_argument(model_class: type) -> str | None:
    """The parameter of a model's forward pass for the KV cache; `None` if it has none.

    It is found by its type, because the name has changed: `past_key_values` until transformers 5.23, `cache` since
    then.
    """
    parameters = inspect.signature(model_class.forward).parameters.values()
    return next((p.name for p in parameters if "Cache" in str(p.annotation)), None)


@functools.cache
def why_not_known() -> str | None:
    """What this version of transformers lacks for decoding row by row.

    A Llama represents all plain decoders: what it lacks comes from the library, not from the model.

    Returns:
        `str`, *optional*: The reason, to stand after a colon; `None` if all is there.
    """
    forward = inspect.signature(LlamaForCausalLM.forward).parameters
    prepare = inspect.signature(LlamaForCausalLM.prepare_inputs_for_generation).parameters
    cache = cache_argument(LlamaForCausalLM)
    missing = [f"`forward({name})`" for name in ("attention_mask", "position_ids") if name not in forward]
    missing += [] if cache else ["`forward` with a KV cache"]
    needed = ("attention_mask", "next_sequence_length", "is_first_iteration", *([cache] if cache else []))
    missing += [f"`prepare_inputs_for_generation({name})`" for name in needed if name not in prepare]
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=LlamaConfig(num_hidden_layers=1)).layers):
        missing.append("`DynamicLayer` in a Llama's cache")
    if not missing:
        return None
    return (
        f"transformers {transformers.__version__} has no {', '.join(missing)}, which grouped sampling relies on. "
        "Install a version of transformers that this version of gxpo_trl allows"
    )


def why_not_row_by_row(model: torch.nn.Module, in_training: bool) -> str | None:
    """Why the rows of a batch can't be decoded independently, or the KV cache can't be cut and joined by rows.

    Args:
        model (`torch.nn.Module`): A transformers model, with or without adapters.
        in_training (`bool`): Whether it will be in training mode.

    Returns:
        `str`, *optional*: The reason, to stand after a colon; `None` if they can.
    """
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if _has_virtual_tokens(model) or any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return "the adapter changes the prompt"
    if reason := why_not_known():
        return reason
    model = decoder_of(model)
    config = model.config
    if config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if config.get_text_config(decoder=True) is not config:
        return "the model is multimodal"
    takes_positions = {"position_ids", "attention_mask"} <= inspect.signature(type(model).forward).parameters.keys()
    if not takes_positions or cache_argument(type(model)) is None:
        return f"{type(model).__name__} takes no KV cache, `position_ids` or `attention_mask`"
    if model.is_remote_code():
        return "the model's code is not transformers' own"
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    if not layers <= set(STOCK_CACHE_LAYERS):
        return "the model's cache holds more than keys and values"
    if _cuts_attention(config):
        return "the model's attention is cut at absolute positions"
    if not _has_fixed_ropes(config):
        return f"the model's rotary embeddings {why_not_fixed(model)}"
    if in_training and (dropout := dropout_of(model)):
        return f"the model has dropout ({dropout}), which copies of a prompt would share"
    return None


def _has_virtual_tokens(model: torch.nn.Module) -> bool:
    """Whether an adapter puts tokens of its own before the prompt, and before its padding."""
    return isinstance(model, PeftModel) and any(adapter.is_prompt_learning for adapter in model.peft_config.values())


def _cuts_attention(config: Any) -> bool:
    layers = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    return bool(layers) or bool(getattr(config, "attention_chunk_size", None))


def _ropes(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]


def _has_fixed_ropes(config: Any) -> bool:
    return all(rope.get("rope_type") in FIXED_ROPES for rope in _ropes(config))
