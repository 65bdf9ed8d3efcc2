"""What evaluating a model costs compared with a plain loop over `generate`.

    python benchmarks/evaluation.py            # about 2 minutes on one core

One run, interleaved: `gxpo eval`'s benchmark run, sampling, judging and saving, next to a loop that calls `generate`
on batches of as many problems and judges with the same function. The embedded model on its own task, 16 samples of
each of 200 problems. A figure is the median over blocks of samples per second.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import describe_machine, keep_freed_memory, save_result

from gxpo_trl.evaluation.benchmark import run_benchmark
from gxpo_trl.evaluation.sampling import load_model, load_tokenizer, transformers_sampler
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.tasks.rewards import judge
from gxpo_trl.tasks.task import Task, load_task


def plain_loop(model, tokenizer, benchmark: Task, settings: EvaluationArguments) -> None:
    """What one would write without us."""
    texts, golds = [], []
    for start in range(0, len(benchmark.problems), settings.problems_per_batch):
        rows = benchmark.problems[start : start + settings.problems_per_batch]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        inputs = tokenizer.apply_chat_template(rows["prompt"], **options)
        sequences = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            top_k=0,
            num_return_sequences=settings.samples,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(sequences[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        golds += [gold for gold in rows["solution"] for _ in range(settings.samples)]
    judge(benchmark.kind, texts, golds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)

    settings = EvaluationArguments(max_new_tokens=28, dtype="float32")
    benchmark = load_task("arithmetic")
    tokenizer = load_tokenizer(str(TINY_MODEL_PATH))
    model = load_model(str(TINY_MODEL_PATH), settings, torch.device("cpu"))
    sampler = transformers_sampler(model, tokenizer, settings)
    count = len(benchmark.problems) * settings.samples
    rates = {"gxpo eval": [], "plain loop": []}
    for _ in range(options.blocks + 1):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run_benchmark(benchmark, sampler, tokenizer, Path(folder), settings)
            rates["gxpo eval"].append(count / (time.perf_counter() - started))
        started = time.perf_counter()
        plain_loop(model, tokenizer, benchmark, settings)
        rates["plain loop"].append(count / (time.perf_counter() - started))
    medians = {name: statistics.median(rate[1:]) for name, rate in rates.items()}
    ratio = statistics.median(ours / loop for ours, loop in list(zip(*rates.values(), strict=True))[1:])
    for name, rate in medians.items():
        print(f"{name:12s} {rate:8.0f} samples/s")
    print(f"gxpo eval samples {ratio:.2f} times as fast")
    result = {"samples_per_second": medians, "ratio": ratio, "samples": count, **describe_machine(threads=1)}
    print(f"written to {save_result('evaluation', result)}")


if __name__ == "__main__":
    main()
