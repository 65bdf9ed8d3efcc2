"""Merges a LoRA adapter into its base model: added in fp32, and rounded once to the precision of each weight."""

import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base, is_adapter


def merge_adapter(folder: Path) -> None:
    """Replaces an adapter by a whole model."""
    load_merged(folder).save_pretrained(folder)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        (folder / name).unlink()


def load_merged(folder: Path, base: str | None = None) -> PreTrainedModel:
    """An adapter's model with the adapter merged into its weights.

    Args:
        folder (`Path`): The folder of the adapter.
        base (`str`, *optional*): Its base model, if that has moved since training.

    Raises:
        ValueError: If there is no adapter, its settings can't be read, its base model is not available, or its kind
            can't be merged.
    """
    if not is_adapter(folder):
        raise ValueError(f"{folder} holds no {ADAPTER_CONFIG}. Name the folder of an adapter, a checkpoint or a run.")
    named = adapter_base(folder)
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{folder} holds a {config.peft_type.value} adapter, which can't be merged into weights.")
    model, dtypes = _load_base(base or named, folder)
    was_tied = _untie(model)
    with warnings.catch_warnings():  # that the embeddings are no longer tied: they are tied again below
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
    for name, weight in merged.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    if was_tied:
        _tie_again(merged)
    try:
        merged.generation_config.validate(strict=True)
    except ValueError:  # as where there is a temperature without `do_sample`: it loads, but is not saved
        merged.generation_config.do_sample = True
    return merged


def _load_base(name: str, folder: Path) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """The base model in fp32 at least, and the dtype of its saved weights."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base model of {folder}, {name}, can't be loaded. Say where it is: `--base_model`."
        ) from error
    dtypes = {name: weight.dtype for name, weight in model.named_parameters(remove_duplicate=False)}
    for weight in model.parameters():
        if weight.is_floating_point() and weight.dtype.itemsize < 4:
            weight.data = weight.data.float()
    return model, dtypes


def _untie(model: PreTrainedModel) -> bool:
    """Unties the output embeddings, so that an adapter of one is not added to both."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or outputs.weight is not inputs.weight:
        return False
    outputs.weight = torch.nn.Parameter(inputs.weight.detach().clone())
    return True


def _tie_again(model: PreTrainedModel) -> None:
    """Ties them again if both are still equal; else the model is saved with two."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    are_equal = torch.equal(inputs.weight, outputs.weight)
    if are_equal:
        outputs.weight = inputs.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = are_equal
