"""Results of `gxpo eval` for the runs' models."""

import os
from collections.abc import Sequence
from pathlib import Path

from ...run_folder import RESULTS_NAME, EvaluationResults, read_json
from ..runs import Run
from ..tables import MISSING, Table
from .section import Section


def evaluation_section(runs: Sequence[Run], folder: Path) -> Section:
    """Results of `gxpo eval` for the runs' models, from the runs' folders or from its own output folder."""
    rows, notes = [], {}
    for run in runs:
        root = run.folder.resolve()
        own = set(run.folder.glob(f"*/**/{RESULTS_NAME}"))
        for path in sorted({*own, *folder.glob(f"*/{RESULTS_NAME}")}):
            try:
                found: EvaluationResults = read_json(path, EvaluationResults)
            except ValueError as error:
                notes[path] = str(error)
                continue
            model = Path(os.path.realpath(found["model"]))
            if root not in (model, *model.parents):
                if path in own:
                    notes[path] = f"{path} is of {found['model']}, which is not in this run's folder: it is left out."
                continue
            place = "the end" if model == root else str(model.relative_to(root))
            for benchmark, results in found["benchmarks"].items():
                scores = [
                    f"{name} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                    for name, score in results["metrics"].items()
                ]
                counts = str(results["problems"]), str(results["verify_failures"])
                rows.append(
                    [
                        run.label,
                        MISSING if run.seed is None else str(run.seed),
                        place,
                        benchmark,
                        counts[0],
                        "; ".join(scores),
                        counts[1],
                    ]
                )
    columns = ["arm", "seed", "model", "benchmark", "problems", "scores", "undecided"]
    note = "Each score with its 95 % bootstrap interval over problems, of one model. It does not include other seeds."
    tables = [Table("evaluations", "What `gxpo eval` measured", columns, rows, note)] if rows else []
    return Section("Evaluations", [*notes.values()], tables)
