"""What sampling a batch of completions costs compared with transformers' `generate`.

    python benchmarks/generation.py                        # about 6 minutes on one core
    python benchmarks/generation.py --shape 0.5b --batches 64 256 512 --new_tokens 512   # on a GPU, bf16
    python benchmarks/generation.py --shape 0.5b --batches 256 --vllm                    # next to vLLM, if installed

One run. Within a block every contender samples from the same prompts, one after the other; a figure is the median over
blocks of a contender's seconds divided by those of `generate` with its dynamic cache in the same block. Peak memory is
what one call holds above the model. Prompts come in groups of equal ones, as TRL repeats them.

Length profiles: `own`, what the embedded model writes; `geometric`, every token ends a completion with the same
probability, so that they come to a sixth of the longest on average; `equal`, all are as long as they may be. A random
model (`--shape`, sizes of Qwen2.5) has no `own`.

With `--vllm` its engine samples from the same model, with weights of its own making, in the same process. Caches and
graphs are of what it does by itself. Peak memory is then not compared: vLLM takes a share of the device at its start.

Bars, on the embedded model with its own lengths and groups of 8: grouped at most 0.55 × `generate` at 128 completions
and 0.30 × at 512.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Deadline, describe_machine, keep_freed_memory, peak_bytes, save_result, synchronize
from shapes import SHAPES, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from gxpo_trl.sampling.grouped import pad_left, sample_grouped
from gxpo_trl.tasks import TINY_MODEL_PATH, load_arithmetic


RANDOM_PROMPT = 128
BASELINE = "generate, dynamic cache"


def make_model(shape: str | None) -> PreTrainedModel:
    if shape is None:
        return AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32).eval()
    return random_model(shape).eval()


def make_prompts(model: PreTrainedModel, count: int) -> list[list[int]]:
    """Distinct prompts: of the embedded task, or random ones of one length."""
    if model.config.model_type == "qwen2":  # a random one
        return torch.randint(1, model.config.vocab_size, (count, RANDOM_PROMPT)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    prompts = load_arithmetic(train_size=count, test_size=1)["train"]["prompt"][:]
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]


def make_settings(model: PreTrainedModel, profile: str, new_tokens: int) -> GenerationConfig:
    vocabulary, temperature = model.config.vocab_size, 1.0
    if profile == "own":
        ends = model.config.eos_token_id
    elif profile == "geometric":
        ends, temperature = list(range(1, 1 + round(6 * vocabulary / new_tokens))), 1e4  # all tokens alike
    else:
        ends = None
    model.generation_config.eos_token_id = ends
    settings = {"max_new_tokens": new_tokens, "do_sample": True, "temperature": temperature, "top_k": 0}
    return GenerationConfig(**settings, pad_token_id=0, eos_token_id=ends, disable_compile=True)


def pad(prompts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    ids, mask = pad_left([torch.tensor(prompt, device=device) for prompt in prompts], pad_token=0)
    return {"input_ids": ids, "attention_mask": mask}


def make_contenders(model, prompts: list[list[int]], settings: GenerationConfig) -> dict[str, Callable[[], None]]:
    inputs = pad(prompts, model.device)
    longest = inputs["input_ids"].size(1) + settings.max_new_tokens
    generate = partial(model.generate, **inputs, generation_config=settings)
    contenders = {
        BASELINE: generate,
        "generate, static cache": partial(generate, cache_implementation="static"),
        "grouped": partial(generate, custom_generate=sample_grouped),
        "grouped, with log-probabilities": partial(
            generate, custom_generate=sample_grouped, return_dict_in_generate=True
        ),
        "grouped, a quarter at a time": partial(
            generate, custom_generate=sample_grouped, token_budget=len(prompts) * longest // 4
        ),
    }
    return contenders


def make_vllm(model: PreTrainedModel) -> Callable[[list[list[int]], GenerationConfig], None]:
    """An engine of vLLM with a model of the same sizes and random weights, as a function that samples."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        settings = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
        engine = LLM(folder, gpu_memory_utilization=0.3, max_model_len=2048, **settings)

    def sample(prompts: list[list[int]], settings: GenerationConfig) -> None:
        ends = settings.eos_token_id
        parameters = SamplingParams(
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=ends if isinstance(ends, list) else None,
            detokenize=False,
        )
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)

    return sample


def seconds(function: Callable[[], None]) -> float:
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def measure(contenders: dict[str, Callable[[], None]], blocks: int, deadline: Deadline) -> dict[str, dict]:
    """Over so many blocks, or as many as there is time for, but one at least; the first, not counted, warms up."""
    times = {name: [] for name in contenders}
    for block in range(blocks + 1):
        began = time.perf_counter()
        for name, function in contenders.items():
            torch.manual_seed(block)
            times[name].append(seconds(function))
        if block > 0 and deadline.is_over(needed=2 * (time.perf_counter() - began)):
            break
    memory = {name: peak_bytes(function) for name, function in contenders.items()}
    return {
        name: {
            "ratio": statistics.median(t / base for t, base in list(zip(took, times[BASELINE], strict=True))[1:]),
            "seconds": statistics.median(took[1:]),
            "blocks": len(took) - 1,
            "peak_bytes": memory[name],
        }
        for name, took in times.items()
    }


def measure_continuous_batching(model, prompts: list[list[int]], settings: GenerationConfig, blocks: int) -> dict:
    """transformers' continuous batching compared with `generate`, with its own kind of attention."""
    inputs, times = pad(prompts, model.device), []
    attention = model.config._attn_implementation
    for block in range(blocks + 1):
        torch.manual_seed(block)
        base = seconds(partial(model.generate, **inputs, generation_config=settings))
        batched = partial(model.generate_batch, prompts, generation_config=settings, progress_bar=False)
        times.append((seconds(batched), base))
    model.set_attn_implementation(attention)
    return {
        "ratio": statistics.median(t / base for t, base in times[1:]),
        "seconds": statistics.median(t for t, _ in times[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="a random model of this size instead of the embedded one")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512], help="completions")
    parser.add_argument("--group_sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--profiles", nargs="+", default=None, choices=["own", "geometric", "equal"])
    parser.add_argument("--new_tokens", type=int, default=None, help="at most; unset for 28, or 96 if geometric")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--continuous_batching", type=int, default=32, help="completions to try it with, 0 for none")
    parser.add_argument("--vllm", action="store_true", help="compare with vLLM too, with --shape")
    parser.add_argument("--seconds", type=float, help="begin no case later than this")
    parser.add_argument("--result", type=Path, help="the file that is written, after each case")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)

    deadline = Deadline(options.seconds)
    model = make_model(options.shape)
    sample_by_vllm = make_vllm(model) if options.vllm else None
    machine = describe_machine(threads=1)

    def write() -> Path:
        result = {"shape": options.shape or "embedded", "rows": rows, **machine}
        return save_result("generation" if options.shape is None else "generation_gpu", result, options.result)

    profiles = options.profiles or (["own", "geometric", "equal"] if options.shape is None else ["geometric", "equal"])
    rows = []
    for profile in profiles:
        settings = make_settings(model, profile, options.new_tokens or (96 if profile == "geometric" else 28))
        for batch in options.batches:
            for group_size in options.group_sizes:
                if rows and deadline.is_over():
                    continue
                prompts = [p for p in make_prompts(model, batch // group_size) for _ in range(group_size)]
                case = {"profile": profile, "completions": batch, "group_size": group_size}
                contenders = make_contenders(model, prompts, settings)
                if sample_by_vllm is not None:
                    contenders["vLLM"] = partial(sample_by_vllm, prompts, settings)
                figures = measure(contenders, options.blocks, deadline)
                rows += [{**case, "contender": name, **figure} for name, figure in figures.items()]
                write()
                print(f"{profile}, {batch} completions in groups of {group_size}")
                for name, figure in figures.items():
                    mebibytes = figure["peak_bytes"] / 2**20
                    print(f"  {name:32s} {figure['ratio']:5.2f} ×  {figure['seconds']:7.3f} s  {mebibytes:8.1f} MiB")
    if options.continuous_batching:
        settings = make_settings(model, profiles[0], options.new_tokens or 28)
        prompts = [p for p in make_prompts(model, options.continuous_batching // 8) for _ in range(8)]
        figure = measure_continuous_batching(model, prompts, settings, blocks=2)
        case = {"profile": profiles[0], "completions": len(prompts), "group_size": 8}
        rows.append({**case, "contender": "continuous batching", **figure})
        print(f"{profiles[0]}, {len(prompts)} completions: continuous batching {figure['ratio']:.1f} ×")
    print(f"written to {write()}")


if __name__ == "__main__":
    main()
