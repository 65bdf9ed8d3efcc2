"""A process with engines of vLLM of its own, one after the other.

python tests/vllm_worker.py next|evaluation|sampling FOLDER

Leaves what there is to judge in FOLDER/report.json.
"""

import json
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401  offline, as the tests are
import torch
import vllm
import vllm_engine
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from gxpo_trl.evaluation import sampling
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.scripts import cli


ENGINES: list[dict] = []


def watched_engine(*args, **settings):
    """Notes what is left of earlier engines when one is made, and what it was asked for."""
    left = [name for engine in ENGINES for name, thing in engine.pop("things").items() if thing() is not None]
    memory, group_was_there = resident_memory(), torch.distributed.is_initialized()
    engine = vllm_engine.EAGER(*args, **settings)
    runner = engine.llm_engine.model_executor.driver_worker.model_runner
    things = {"engine": engine, "weights": runner.model, "cache": runner.kv_caches[0]}
    things = {name: weakref.ref(thing) for name, thing in things.items()}
    note = {"settings": settings, "left": left, "memory_before": memory, "memory_after": resident_memory()}
    note |= {"dtype": str(engine.model_config.dtype), "context": engine.model_config.max_model_len}
    ENGINES.append({**note, "group_was_there": group_was_there, "things": things})
    return engine


def resident_memory() -> int:
    """In bytes."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def next_loop(folder: Path) -> None:
    model = vllm_engine.save_model(folder / "model")
    short = {
        "model_name_or_path": model,
        "output_dir": folder / "run",
        "use_vllm": True,
        "max_steps": 5,
        "extrapolate_after": 3,
        "trajectory_steps": 1,
        "extrapolate_steps_ahead": 1,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    words = [word for key, value in short.items() for word in (f"--{key}", str(value))]
    cli.main(["train", "--config", "recipes/tiny/next.yaml", *words])


def evaluation(folder: Path) -> None:
    """`gxpo eval` on a checkpoint in fp32 and on one in bf16, whose own generation settings are odd."""
    models = [vllm_engine.save_model(folder / name) for name in ("fp32", "bf16")]
    for model, dtype in zip(models, (torch.float32, torch.bfloat16), strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        loaded.generation_config.update(repetition_penalty=5.0, min_p=0.9, top_k=1, do_sample=True)
        loaded.save_pretrained(model)
    options = {"backend": "vllm", "benchmarks": "arithmetic", "limit": 2, "samples": 3, "max_new_tokens": 9}
    options |= {"vllm_gpu_memory_utilization": 0.4, "output_dir": folder / "out"}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    cli.main(["eval", "--models", *map(str, models), *words])


DISTRIBUTIONS = {
    "plain": {},
    "cooler": {"temperature": 0.7, "top_p": 0.8},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 3.0},
}
PROMPT, DRAWS = [5, 6, 103, 7, 104], 3000


def sample_by_both(folder: Path) -> dict:
    """How often each completion of two tokens is drawn by each backend; and what seeds do."""
    path = str(vllm_engine.save_model(folder / "model"))
    engine = vllm_engine.EAGER(path, max_model_len=64)
    vllm.LLM, sampling.shut_down_engine = lambda *args, **settings: engine, lambda engine: None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), sampling.load_tokenizer(path)
    with sampling.vllm_sampler(path, EvaluationArguments(backend="vllm", max_new_tokens=12), 5) as sampler:
        seeded = [sampler([PROMPT, PROMPT], 3, seed) for seed in (0, 0, 1)]
    sampling._seed_of = lambda *place: None  # so many requests with seeds are more than vLLM's sampler for CPUs takes
    torch.manual_seed(0)
    counts = {}
    for name, changes in DISTRIBUTIONS.items():
        settings = EvaluationArguments(backend="vllm", max_new_tokens=2, **changes)
        with sampling.vllm_sampler(path, settings, len(PROMPT)) as sampler:
            samples = {"vllm": sampler([PROMPT], DRAWS, 0)[0]}
        sampler = sampling.transformers_sampler(model, tokenizer, replace(settings, backend="transformers"))
        samples["transformers"] = sampler([PROMPT], DRAWS, 0)[0]
        counts[name] = {backend: Counter(sample.text for sample in of) for backend, of in samples.items()}
    texts = [[[sample.text for sample in of_prompt] for of_prompt in of_seed] for of_seed in seeded]
    return {"counts": counts, "seeded": texts}


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    vllm_engine.install()
    vllm_generation.LLM = vllm.LLM = watched_engine
    found = {"next": next_loop, "evaluation": evaluation, "sampling": sample_by_both}[kind](folder)
    for engine in ENGINES:
        engine.pop("things", None)
    report = {"engines": ENGINES, **(found or {})}
    (folder / "report.json").write_text(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
