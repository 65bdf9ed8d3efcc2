"""Completions of a batch of prompts, by transformers or by vLLM."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.logging import get_logger
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..run_folder import ADAPTER_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG, is_adapter
from ..sampling.grouped import pad_left, sample_grouped, why_not_grouped
from .settings import EvaluationArguments


logger = get_logger(__name__)


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        text (`str`): Without special tokens.
        length (`int`): In tokens, with the one that ended it.
        truncated (`bool`): Whether it ran into the longest length without an end.
    """

    text: str
    length: int
    truncated: bool


Sampler = Callable[[list[list[int]], int, int], list[list[Sample]]]
"""Samples n completions of each prompt, given as tokens: `(prompts, n, seed)` to as many lists of n."""


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with what batches of prompts need; its base model's, of an adapter without one.

    Raises:
        ValueError: If it has no chat template.
    """
    folder = Path(model)
    if is_adapter(folder) and not (folder / TOKENIZER_CONFIG).is_file():
        model = PeftConfig.from_pretrained(model).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {model} has no chat template. Give it the one it was trained with.")
    return tokenizer


def load_model(model: str, settings: EvaluationArguments, device: torch.device) -> torch.nn.Module:
    """A checkpoint to sample from; an adapter is loaded on its base.

    Raises:
        ValueError: If it is a folder without a model or an adapter in it.
    """
    folder = Path(model)
    if folder.is_dir() and not is_adapter(folder) and not (folder / MODEL_CONFIG).is_file():
        raise ValueError(f"{model} is no checkpoint: it holds neither a {MODEL_CONFIG} nor an {ADAPTER_CONFIG}.")
    loader = AutoPeftModelForCausalLM if is_adapter(folder) else AutoModelForCausalLM
    options = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
    return loader.from_pretrained(model, **options).to(device).eval()


def transformers_sampler(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: EvaluationArguments
) -> Sampler:
    """Samples with the grouped loop, or where a model can't have it with `generate`, which is said.

    Raises:
        ValueError: If there is a token budget, which `generate` can't keep.
    """
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or None,
        top_p=settings.top_p,
        top_k=settings.top_k,
        pad_token_id=tokenizer.pad_token_id,
    )
    options = {"custom_generate": sample_grouped, "token_budget": settings.token_budget}
    if reason := why_not_grouped(model, config):
        if settings.token_budget is not None:
            raise ValueError(f"`token_budget` needs grouped generation, which can't be had: {reason}. Leave it out.")
        logger.warning(f"Completions are sampled by transformers' `generate`, which takes longer: {reason}.")
        options = {}
    ends = _end_tokens(model, tokenizer)

    def sample(prompts: list[list[int]], n: int, seed: int) -> list[list[Sample]]:
        torch.manual_seed(seed)
        config.num_return_sequences = n
        rows = [torch.tensor(ids, device=model.device) for ids in prompts]
        input_ids, attention_mask = pad_left(rows, tokenizer.pad_token_id)
        sequences = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **options
        )
        completions = sequences[:, input_ids.size(1) :].tolist()
        samples = [read_sample(ids, tokenizer, ends) for ids in completions]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    return sample


def _end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def read_sample(ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> Sample:
    """A completion from its tokens and the padding after it."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    kept = ids if length is None else ids[:length]
    return Sample(tokenizer.decode(kept, skip_special_tokens=True), len(kept), truncated=length is None)


def vllm_sampler(model: str, settings: EvaluationArguments) -> Sampler:
    """Samples with vLLM.

    Raises:
        ValueError: If vLLM is not installed, or the checkpoint is an adapter.
    """
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError as error:
        raise ValueError("`backend: vllm` needs vLLM. Install it: `pip install 'gxpo_trl[vllm]'`.") from error
    if is_adapter(Path(model)):
        raise ValueError(f"`backend: vllm` loads whole models, and {model} is an adapter. Merge it first.")
    engine = LLM(model, dtype=settings.dtype)

    def sample(prompts: list[list[int]], n: int, seed: int) -> list[list[Sample]]:
        parameters = SamplingParams(
            n=n,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or -1,
            max_tokens=settings.max_new_tokens,
            seed=seed,
        )
        outputs = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
        return [
            [Sample(o.text, len(o.token_ids), truncated=o.finish_reason == "length") for o in output.outputs]
            for output in outputs
        ]

    return sample
