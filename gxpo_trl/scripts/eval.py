"""Scores models on benchmarks.

    gxpo eval --models out/tiny-gxpo --benchmarks arithmetic --samples 8
    accelerate launch -m gxpo_trl.scripts.eval --config recipes/eval/gxpo.yaml --models CHECKPOINT CHECKPOINT
    gxpo eval --verify-only out/eval/tiny-gxpo/arithmetic.jsonl     # judges saved completions again
    gxpo eval --gold --benchmarks MATH-500                          # the right answers against themselves

Writes `table.md`, and for each model `results.json` and the samples of each benchmark, into `--output_dir`. Started
again with the same settings, it continues where it was interrupted.
"""

import sys
from pathlib import Path

from accelerate import PartialState

from ..evaluation.results import results_table
from ..evaluation.scoring import evaluate, load_tasks, verify_again, verify_gold
from ..evaluation.settings import EvaluationArguments
from .failing import one_sentence
from .keys import parse_keys


def run(settings: EvaluationArguments) -> str:
    """Runs the evaluation, and returns the text to print."""
    if settings.verify_only:
        path, tasks = Path(settings.verify_only), load_tasks(settings) if settings.benchmarks else ()
        results, changed = verify_again(path, settings.ks, tasks, None if tasks else settings.kind)
        table = results_table({path.parent.name: {path.stem: results}})
        return f"{table}\n\n{changed} of {results['samples']} scores differ from the recorded ones."
    if settings.gold:
        lines = []
        for task in load_tasks(settings):
            refused = verify_gold(task)
            lines.append(f"{task.name}: {len(refused)} of {len(task.problems)} right answers are not accepted")
            lines += [f"  {row_id}: {gold!r} scores {score}" for row_id, gold, score in refused]
        return "\n".join(lines)
    results = evaluate(settings)
    distribution = ", ".join(f"{name} {value}" for name, value in settings.distribution().items())
    return (
        f"{results_table(results)}\n\nSampled with {distribution}, whatever a model's generation_config.json says. "
        f"Samples and results are in {settings.output_dir}."
    )


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    try:
        (settings,) = parse_keys(sys.argv[1:] if arguments is None else arguments, (EvaluationArguments,), prog)
        report = run(settings)
    except Exception as error:  # a model's files may raise anything
        sys.exit(f"error: {one_sentence(error)}")
    if PartialState().is_main_process:
        print(report)


if __name__ == "__main__":
    main()
