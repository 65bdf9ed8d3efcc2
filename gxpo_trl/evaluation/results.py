"""Computes the results of a benchmark from its samples, and a table of results."""

import dataclasses
import itertools
import operator
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from ..run_folder import BenchmarkResults
from ..tasks.rewards import KINDS
from .benchmark import Record, slug
from .metrics import summarize


def benchmark_results(records: Sequence[Record], ks: Sequence[int]) -> BenchmarkResults:
    """The results of one benchmark on one model, for results.json.

    Args:
        records (`Sequence[Record]`): All samples, grouped by problem.
        ks (`Sequence[int]`): For pass@k and maj@k.

    Returns:
        `BenchmarkResults`: `metrics` (each with its value, 95 % interval and number of problems), the mean length in
            tokens, the fraction of truncated samples, the mean reward, and how many samples could not be decided.
    """
    by_problem = itertools.groupby(records, operator.attrgetter("id"))
    verdicts = [[record.verdict for record in of_problem] for _, of_problem in by_problem]
    metrics = summarize(verdicts, ks, majority=_reads_answers(records))
    return {
        "problems": len(verdicts),
        "samples": len(records),
        "metrics": {name: dataclasses.asdict(found) for name, found in metrics.items()},
        "mean_length": statistics.fmean(record.length for record in records),
        "truncated": statistics.fmean(record.truncated for record in records),
        "mean_reward": _mean([record.reward for record in records]),
        "verify_failures": sum(record.failed or record.score is None for record in records),
        "seconds": sum(record.seconds for record in records),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _reads_answers(records: Sequence[Record]) -> bool:
    """Whether answers are read from completions. A reward function may use only the whole text."""
    return any(record.answer is not None or record.kind in KINDS for record in records)


def why_doubtful(records: Sequence[Record]) -> str | None:
    """Why scores do not measure the model: no completion had a readable answer. `None` if one had."""
    truncated = statistics.fmean(record.truncated for record in records)
    if all(record.score is None for record in records):
        said = f"none of the {len(records)} completions could be scored"
    elif _reads_answers(records) and not any(record.answer for record in records):
        said = f"no answer could be read in any of the {len(records)} completions"
    elif not any(record.completion.strip() for record in records):
        said = f"all of the {len(records)} completions are empty"
    else:
        return None
    return (
        f"{said}, of which {truncated:.0%} ran into the longest length. Look at the samples: a longer "
        "`max_new_tokens`, or a `prompt` that says in what form the answer is wanted, may be missing."
    )


class ShownResults(TypedDict):
    """What a row of the table has in addition to what all results have."""

    mean_length: float
    truncated: float


COLUMNS = (
    "model",
    "benchmark",
    "problems",
    "scores (95 % interval over problems)",
    "tokens",
    "truncated",
    "undecided",
)


def results_table(results: dict[str, dict[str, BenchmarkResults]]) -> str:
    """A Markdown table, a row for each model and benchmark: avg@n, and pass@k and maj@k of the largest k."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    names = [Path(model).name for model in results]
    for model, benchmarks in results.items():
        name = Path(model).name if names.count(Path(model).name) == 1 else slug(model)
        rows += [(name, benchmark, *_cells(found)) for benchmark, found in benchmarks.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(found: BenchmarkResults) -> tuple[str, ...]:
    metrics = found["metrics"]
    shown = dict.fromkeys([*list(metrics)[:1], *list(metrics)[-2:]])
    scores = "; ".join(
        f"{name} {metrics[name]['value']:.1%} ({metrics[name]['low']:.1%} to {metrics[name]['high']:.1%})"
        for name in shown
    )
    rest = (f"{found['mean_length']:.0f}", f"{found['truncated']:.1%}", str(found["verify_failures"]))
    return (str(found["problems"]), scores, *rest)
