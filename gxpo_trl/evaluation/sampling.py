"""Completions of a batch of prompts, by transformers or by vLLM."""

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..run_folder import TOKENIZER_CONFIG, adapter_base, is_adapter
from ..sampling.grouped import SharedNoise, pad_left, sample_grouped, why_not_grouped
from ..sampling.model_traits import decoder_of
from .settings import EvaluationArguments


logger = get_logger(__name__)


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        text (`str`): Without special tokens.
        token_ids (`list[int]`): With the one that ended it.
        truncated (`bool`): Whether it reached the length limit without ending.
    """

    text: str
    token_ids: list[int]
    truncated: bool

    @property
    def length(self) -> int:
        return len(self.token_ids)


Sampler = Callable[[list[list[int]], int, int], list[list[Sample]]]
"""Samples n completions of each prompt, given as tokens: `(prompts, n, seed)` to one list of n for each prompt."""


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, set up for batches of prompts; for an adapter without one, its base's."""
    folder = Path(model)
    if is_adapter(folder) and not (folder / TOKENIZER_CONFIG).is_file():
        model = adapter_base(folder) or model
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, settings: EvaluationArguments, device: torch.device) -> torch.nn.Module:
    """Loads a checkpoint to sample from. An adapter is loaded on its base."""
    loader = AutoPeftModelForCausalLM if is_adapter(Path(model)) else AutoModelForCausalLM
    options = {"dtype": settings.dtype, "attn_implementation": settings.attn_implementation}
    return loader.from_pretrained(model, **options).to(device).eval()


def transformers_sampler(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: EvaluationArguments
) -> Sampler:
    """Samples with the grouped loop, or with `generate` and a warning if the model does not support grouping.

    Raises:
        ValueError: If there is a token budget, which `generate` can't keep.
    """
    distribution = settings.distribution()
    if settings.temperature == 0:
        del distribution["temperature"]
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        **distribution,
    )
    options = {"custom_generate": sample_grouped, "token_budget": settings.token_budget}

    def use_generate(reason: str) -> None:
        if settings.token_budget is not None:
            raise ValueError(f"`token_budget` needs grouped generation, which does not work: {reason}. Leave it out.")
        logger.warning(f"Completions are sampled by transformers' `generate`, which takes longer: {reason}.")
        options.clear()

    with own_settings_put_aside(model):
        reason = why_not_grouped(model, config)
    if reason:
        use_generate(reason)
    ends = _end_tokens(model, tokenizer)

    def sample(prompts: list[list[int]], n: int, seed: int) -> list[list[Sample]]:
        torch.manual_seed(seed)
        config.num_return_sequences = n
        rows = [torch.tensor(ids, device=model.device) for ids in prompts]
        input_ids, attention_mask = pad_left(rows, tokenizer.pad_token_id)
        request = {"input_ids": input_ids, "attention_mask": attention_mask, "generation_config": config}
        with own_settings_put_aside(model):
            try:
                sequences = model.generate(**request, **options)
            except SharedNoise:
                use_generate(SharedNoise.reason)
                sequences = model.generate(**request)
        completions = sequences[:, input_ids.size(1) :].tolist()
        samples = [read_sample(ids, tokenizer, ends) for ids in completions]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    return sample


@contextmanager
def own_settings_put_aside(model: torch.nn.Module) -> Iterator[None]:
    """A model's generation_config would set what an evaluation leaves unset, for one backend and not the other."""
    decoder = decoder_of(model)
    own = decoder.generation_config
    kept = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        decoder.generation_config = own


def _end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def read_sample(ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> Sample:
    """A completion, made from its tokens and the padding after them."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    kept = ids if length is None else ids[:length]
    return Sample(tokenizer.decode(kept, skip_special_tokens=True), kept, truncated=length is None)


@contextmanager
def vllm_sampler(model: str, settings: EvaluationArguments, longest_prompt: int) -> Iterator[Sampler]:
    """Samples with vLLM. Its engine exists until the context ends.

    Args:
        model (`str`): A folder or a name of the Hub.
        settings (`EvaluationArguments`): What to sample.
        longest_prompt (`int`): Tokens of the longest prompt: vLLM reserves memory for that and `max_new_tokens`, not
            for the model's whole context.

    Raises:
        ValueError: If vLLM is not installed, or the checkpoint is an adapter.
    """
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError as error:
        raise ValueError("`backend: vllm` needs vLLM. Install it: `pip install 'gxpo_trl[vllm]'`.") from error
    if is_adapter(Path(model)):
        raise ValueError(f"`backend: vllm` loads whole models, and {model} is an adapter. Merge it first.")
    config = AutoConfig.from_pretrained(model)
    engine = LLM(
        model,
        dtype=_dtype_for_vllm(model, config, settings),
        max_model_len=_context_for_vllm(config, longest_prompt + settings.max_new_tokens),
        gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
    )
    common = {"max_tokens": settings.max_new_tokens, **settings.distribution()}

    def sample(prompts: list[list[int]], n: int, seed: int) -> list[list[Sample]]:
        # One request for each sample: vLLM seeds the samples of a request for n by consecutive numbers.
        places = [(i, j) for i in range(len(prompts)) for j in range(n)]
        parameters = [SamplingParams(seed=_seed_of(seed, i, j), **common) for i, j in places]
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=prompts[i]) for i, _ in places], parameters, use_tqdm=False
        )
        samples = [
            Sample(o.text, [*o.token_ids], truncated=o.finish_reason == "length")
            for (o,) in (output.outputs for output in outputs)
        ]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    try:
        yield sample
    finally:
        shut_down_engine(engine)


def _seed_of(seed: int, prompt: int, sample: int) -> int:
    """A seed of 63 bits that differs between any two samples, whatever their seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()[:8]) >> 1


def _dtype_for_vllm(model: str, config: PretrainedConfig, settings: EvaluationArguments) -> Any:
    """For `auto` the checkpoint's own dtype. vLLM would use bf16 for a checkpoint in fp32."""
    if settings.dtype != "auto":
        return settings.dtype
    if config.dtype is not None:
        return config.dtype
    for file in sorted(Path(model).glob("*.safetensors")):  # a folder whose config has no dtype
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if (dtype := tensors.get_tensor(name).dtype).is_floating_point:
                    return dtype
    return settings.dtype


def _context_for_vllm(config: PretrainedConfig, needed: int) -> int | None:
    """The context that is needed, or the model's whole context if that is shorter; `None` lets vLLM find out what that
    is.
    """
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    return needed if known is not None and needed <= known else None


def shut_down_engine(engine) -> None:
    """Makes an engine of vLLM (`vllm.LLM`) free its memory once nothing refers to the engine any more.

    In this process the engine's own shut-down would also end `torch.distributed`, which a trainer still needs.
    """
    inside = engine.llm_engine
    if hasattr(inside, "model_executor"):  # in this process
        inside.model_executor.shutdown()
        gc.unfreeze()  # the engine froze all existing objects when it started
    else:
        inside.engine_core.shutdown()
