"""vLLM itself, on a CPU: how its engine is had in the tests, and a model that it takes.

A process has one engine, which all its trainers share. Nothing here changes what vLLM computes but its matrix product:
that of its own for CPUs keeps a copy of each weight, which new weights do not reach.
"""

import functools
import os
from pathlib import Path


os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch  # noqa: E402
import vllm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402
from vllm.model_executor.layers import utils  # noqa: E402

from gxpo_trl.tasks import TINY_MODEL_PATH  # noqa: E402


EAGER = functools.partial(vllm.LLM, enforce_eager=True, dtype="float32")
"""Without compilation, and in fp32, so that weights can be compared bit for bit."""


def install() -> None:
    """To be called before an engine is made."""
    linear = torch.nn.functional.linear
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", linear)
    vllm_generation.LLM = EAGER


def share_engine() -> None:
    """The first trainer makes the engine, and the others find it, as if it had just been made."""
    made = []

    def engine(model, max_model_len=None, max_num_seqs=None, enable_sleep_mode=False, **settings):
        if not made:
            made.append(EAGER(model, max_model_len=128, max_num_seqs=64, **settings))
            made[0].sleep, made[0].wake_up = functools.partial(_forget, made[0]), lambda tags: None
        torch.manual_seed(0)
        return made[0]

    vllm_generation.LLM = engine


def _forget(llm, level: int) -> None:
    """What is left of the weights when vLLM sleeps, which it does on GPUs."""
    for weight in weights_of(llm).values():
        weight.fill_(float("nan"))


def weights_of(llm) -> dict[str, torch.Tensor]:
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {name: weight.data for name, weight in model.named_parameters()}


def as_vllm_has_them(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a Llama, some of which vLLM puts into one matrix."""
    weights = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}  # tied
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        fused = "qkv_proj" if len(parts) == 3 else "gate_up_proj"
        for name in [name for name in weights if parts[0] in name]:
            pieces = [weights.pop(name.replace(parts[0], part)) for part in parts]
            weights[name.replace(parts[0], fused)] = torch.cat(pieces)
    return weights


def save_model(folder: Path) -> Path:
    """The embedded model with 2 heads of 32 in place of 4 of 16, a size that vLLM refuses; of 90,624 parameters."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, **heads)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # its completions differ then
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(folder)
    return folder
