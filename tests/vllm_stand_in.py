"""A stand-in for vLLM's engine below TRL's own class: it keeps the weights that it is sent, and answers by script."""

import os
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import Accelerator
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration


class StandInLLM:
    """In the place of `vllm.LLM`.

    Attributes:
        weights (`dict[str, torch.Tensor]`): What was sent last, as it was sent.
        synchronisations (`int`): How often.
        dtype (`torch.dtype`): What it says that it keeps weights in.
    """

    dtype = torch.bfloat16

    def __init__(self, model, **settings):
        self.weights, self.synchronisations, self.settings = {}, 0, settings
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self)))
        config = SimpleNamespace(dtype=self.dtype, max_model_len=128)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=config)

    def load_weights(self, weights) -> None:
        self.weights |= {name: weight.clone() for name, weight in weights}

    def reset_prefix_cache(self) -> None:
        self.synchronisations += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        """Completions of 2 to 9 tokens that depend on the prompt and on its place."""
        outputs = []
        for i, prompt in enumerate(prompts):
            ids = prompt["prompt_token_ids"]
            tokens = [3 + (sum(ids) + 7 * i + j) % 100 for j in range(1 + (sum(ids) + i) % 8)] + [1]
            logprobs = [{token: SimpleNamespace(rank=1, logprob=-1.0)} for token in tokens]
            completion = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=ids, outputs=[completion]))
        return outputs


@contextmanager
def standing_in():
    """TRL finds vLLM installed, and the stand-in where vLLM's engine is."""
    with (
        patch.dict(os.environ),  # TRL writes ranks there
        patch.object(vllm_generation, "LLM", StandInLLM, create=True),
        patch.object(vllm_generation, "SamplingParams", SimpleNamespace, create=True),
        patch.object(vllm_generation, "is_vllm_available", lambda *args: True),
    ):
        yield


def generation_for(model) -> VLLMGeneration:
    """TRL's class at work on a model."""
    with standing_in():
        return VLLMGeneration(model, Accelerator(cpu=True), None)
