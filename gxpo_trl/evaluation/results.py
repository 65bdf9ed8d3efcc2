"""From the samples of a benchmark to its results, and to a table."""

import dataclasses
import itertools
import operator
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..run_folder import BenchmarkResults
from .benchmark import Record
from .metrics import summarize


def benchmark_results(records: Sequence[Record], ks: Sequence[int]) -> BenchmarkResults:
    """What results.json says of one benchmark on one model.

    Args:
        records (`Sequence[Record]`): All samples, those of a problem next to each other.
        ks (`Sequence[int]`): For pass@k and maj@k.

    Returns:
        `BenchmarkResults`: `metrics` (each with its value, 95 % interval and number of problems), the mean length in
            tokens, the fraction of truncated samples, and how many samples could not be decided.
    """
    by_problem = itertools.groupby(records, operator.attrgetter("id"))
    verdicts = [[record.verdict for record in of_problem] for _, of_problem in by_problem]
    return {
        "problems": len(verdicts),
        "samples": len(records),
        "metrics": {name: dataclasses.asdict(found) for name, found in summarize(verdicts, ks).items()},
        "mean_length": statistics.fmean(record.length for record in records),
        "truncated": statistics.fmean(record.truncated for record in records),
        "verify_failures": sum(record.score is None for record in records),
        "seconds": sum(record.seconds for record in records),
    }


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
    for model, benchmarks in results.items():
        rows += [(Path(model).name, benchmark, *_cells(found)) for benchmark, found in benchmarks.items()]
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
