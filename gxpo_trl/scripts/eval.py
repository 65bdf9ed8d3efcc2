"""Scores models on benchmarks.

    gxpo eval --models out/tiny-gxpo --benchmarks arithmetic --samples 8
    accelerate launch -m gxpo_trl.scripts.eval --config recipes/eval/gxpo.yaml --models CHECKPOINT CHECKPOINT
    gxpo eval --verify-only out/eval/tiny-gxpo/arithmetic.jsonl     # judges recorded completions again
    gxpo eval --gold --benchmarks MATH-500                          # the right answers against themselves

Writes `table.md`, and for each model `results.json` and the samples of each benchmark, into `--output_dir`. Started
again with the same settings, it goes on where it was interrupted.
"""

import sys
from pathlib import Path

from accelerate import PartialState

from ..evaluation.results import results_table
from ..evaluation.scoring import evaluate, load_benchmarks, verify_again, verify_gold
from ..evaluation.settings import EvaluationArguments
from .keys import parse_keys


def run(settings: EvaluationArguments) -> str:
    """Does what the settings say, and returns what there is to print."""
    if settings.verify_only:
        path = Path(settings.verify_only)
        results, changed = verify_again(path, settings.ks)
        table = results_table({path.parent.name: {path.stem: results}})
        return f"{table}\n\n{changed} of {results['samples']} scores are others than recorded."
    if settings.gold:
        lines = []
        for benchmark in load_benchmarks(settings):
            refused = verify_gold(benchmark)
            lines.append(
                f"{benchmark.name}: {len(refused)} of {len(benchmark.problems)} right answers are not accepted"
            )
            lines += [f"  {row_id}: {gold!r} scores {score}" for row_id, gold, score in refused]
        return "\n".join(lines)
    results = evaluate(settings)
    return f"{results_table(results)}\n\nSamples and results are in {settings.output_dir}."


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    try:
        (settings,) = parse_keys(sys.argv[1:] if arguments is None else arguments, (EvaluationArguments,), prog)
        report = run(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        print(report)


if __name__ == "__main__":
    main()
