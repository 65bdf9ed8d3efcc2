"""Models on benchmarks: what `gxpo eval` does."""

import dataclasses
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..run_folder import RESULTS_NAME, SETTINGS_NAME, TABLE_NAME, BenchmarkResults, samples_file, write_whole
from ..tasks.datasets import load_problems, problem_set, to_prompts
from ..tasks.names import resolve_model
from ..tasks.rewards import judge
from .benchmark import Benchmark, Record, read_samples, run_benchmark, slug, write_samples
from .results import benchmark_results, results_table
from .sampling import Sampler, load_model, load_tokenizer, transformers_sampler, vllm_sampler
from .settings import EvaluationArguments


Results = dict[str, BenchmarkResults]
"""By benchmark."""


def evaluate(settings: EvaluationArguments) -> dict[str, Results]:
    """Samples and judges every benchmark with every model, and writes what came out.

    Writes, in `output_dir`, `table.md` and a folder for each model with `results.json`, `settings.json` and the
    samples of each benchmark, `BENCHMARK.jsonl`. What is there already is not sampled again.

    Returns:
        `dict[str, Results]`: Results by model and benchmark.

    Raises:
        ValueError: If models or benchmarks are missing or not what they should be, or the output folder holds an
            evaluation with other settings. Before anything is sampled.
    """
    # Without an accelerator, accelerate takes each process for the only one unless it is told that the CPU is meant.
    PartialState(cpu=not torch.accelerator.is_available())
    if not settings.models:
        raise ValueError("There is nothing to evaluate. Set `models`.")
    benchmarks = load_benchmarks(settings)
    folders = {model: Path(settings.output_dir) / slug(model) for model in settings.models}
    tokenizers = {model: load_tokenizer(resolve_model(model)) for model in settings.models}
    for model, folder in folders.items():
        if list(folders.values()).count(folder) > 1:
            raise ValueError(f"Two of the models would share the folder {folder}. Evaluate them one at a time.")
        _check_settings(folder, model, settings)
    results = {}
    for model, folder in folders.items():
        _write_json(folder / SETTINGS_NAME, {"model": model, **settings.determining()})
        PartialState().wait_for_everyone()
        missing = [benchmark for benchmark in benchmarks if not samples_file(folder, benchmark.slug).is_file()]
        sampler = _make_sampler(model, tokenizers[model], settings) if missing else None
        for benchmark in missing:
            run_benchmark(benchmark, sampler, tokenizers[model], folder, settings)
        results[model] = {
            benchmark.name: benchmark_results(_read_own_samples(folder, benchmark), settings.ks)
            for benchmark in benchmarks
        }
        _add_results(folder / RESULTS_NAME, model, results[model])
        del sampler
        gc.collect()
    if PartialState().is_main_process:
        write_whole(Path(settings.output_dir) / TABLE_NAME, results_table(results) + "\n")
    return results


def load_benchmarks(settings: EvaluationArguments) -> list[Benchmark]:
    """The benchmarks that the settings name.

    Raises:
        ValueError: If there is none, or one is not to be had.
    """
    if not settings.benchmarks:
        raise ValueError("There is nothing to evaluate on. Set `benchmarks`.")
    names = ("prompt", "system_prompt", "problem_column", "answer_column", "kind", "limit")
    options = {name: getattr(settings, name) for name in names}
    benchmarks = [load_benchmark(name, **options) for name in settings.benchmarks]
    slugs = [benchmark.slug for benchmark in benchmarks]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"Two of the benchmarks would share a file: {', '.join(slugs)}. Evaluate one at a time.")
    return benchmarks


def load_benchmark(
    name: str,
    prompt: str | None = None,
    system_prompt: str | None = None,
    kind: str | None = None,
    **columns_and_limit,
) -> Benchmark:
    """A problem set with prompts; the arguments are those of `load_problems` and `to_prompts`."""
    problems = load_problems(name, kind=kind, **columns_and_limit)
    return Benchmark(name, kind or problem_set(name).kind, to_prompts(problems, prompt, system_prompt))


def _make_sampler(model: str, tokenizer, settings: EvaluationArguments) -> Sampler:
    if settings.backend == "vllm":
        return vllm_sampler(resolve_model(model), settings)
    return transformers_sampler(load_model(resolve_model(model), settings, PartialState().device), tokenizer, settings)


def _read_own_samples(folder: Path, benchmark: Benchmark) -> list[Record]:
    path = samples_file(folder, benchmark.slug)
    records, problems = read_samples(path), benchmark.problems
    asked = list(zip(problems["id"][:], problems["solution"][:], strict=True))
    if list(dict.fromkeys((record.id, record.gold) for record in records)) != asked:
        raise ValueError(f"{path} holds samples of other problems than {benchmark.name}. Use another `output_dir`.")
    return records


def _add_results(path: Path, model: str, results: Results) -> None:
    """Beside those of other benchmarks, evaluated before."""
    before = json.loads(path.read_text())["benchmarks"] if path.is_file() else {}
    PartialState().wait_for_everyone()  # all have read it before it is written again
    _write_json(path, {"model": model, "benchmarks": before | results})


def _check_settings(folder: Path, model: str, settings: EvaluationArguments) -> None:
    claimed = folder / SETTINGS_NAME
    if not claimed.is_file():
        return
    before, now = json.loads(claimed.read_text()), {"model": model, **settings.determining()}
    different = [f"`{name}: {before.get(name)}`" for name in now if before.get(name) != now[name]]
    if different:
        raise ValueError(
            f"{folder} holds an evaluation with {', '.join(different)}. Use these settings, or another `output_dir`."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")


def verify_again(path: Path, ks: Sequence[int]) -> tuple[BenchmarkResults, int]:
    """Judges the recorded completions of a samples file again, and writes them to `NAME.verified.jsonl` beside it.

    Returns:
        `tuple[BenchmarkResults, int]`: The results, and how many scores are others than recorded.
    """
    records = read_samples(path)
    if not records:
        raise ValueError(f"{path} holds no samples.")
    verdicts = {}
    for kind in {record.kind for record in records}:
        chosen = [i for i, record in enumerate(records) if record.kind == kind]
        judged = judge(kind, [records[i].completion for i in chosen], [records[i].gold for i in chosen])
        verdicts |= dict(zip(chosen, judged, strict=True))
    again = [
        dataclasses.replace(record, score=verdicts[i].score, answer=verdicts[i].answer)
        for i, record in enumerate(records)
    ]
    write_samples(path.with_suffix(".verified.jsonl"), again)
    changed = sum(new.score != old.score for new, old in zip(again, records, strict=True))
    return benchmark_results(again, ks), changed


def verify_gold(benchmark: Benchmark) -> list[tuple[str, str, float | None]]:
    """Judges the right answers against themselves: the verifier's own error rate.

    Returns:
        `list[tuple[str, str, float | None]]`: Id, answer and score of those that are not accepted.
    """
    golds = benchmark.problems["solution"][:]
    completions = [gold if "\\boxed{" in gold else f"The answer is \\boxed{{{gold}}}." for gold in golds]
    verdicts = judge(benchmark.kind, completions, golds)
    rows = zip(benchmark.problems["id"][:], golds, verdicts, strict=True)
    return [(row_id, gold, verdict.score) for row_id, gold, verdict in rows if verdict.score != 1.0]
