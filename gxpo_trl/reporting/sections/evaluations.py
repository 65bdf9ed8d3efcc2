"""What `gxpo eval` found out about the runs' models."""

import json
from collections.abc import Sequence
from pathlib import Path

from ...run_folder import RESULTS_NAME, EvaluationResults
from ..runs import Run
from ..tables import MISSING, Table
from .section import Section


def evaluation_section(runs: Sequence[Run], folder: Path) -> Section:
    """What `gxpo eval` found out about the runs' models: its results lie in the runs' folders, or in its own."""
    rows = []
    for run in runs:
        root = run.folder.resolve()
        own = run.folder.glob(f"*/**/{RESULTS_NAME}")
        for path in sorted({*own, *folder.glob(f"*/{RESULTS_NAME}")}):
            found: EvaluationResults = json.loads(path.read_text())
            model = Path(found["model"]).resolve()
            if root not in (model, *model.parents):
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
    note = "Each score with its 95 % bootstrap interval over problems, of one model: it knows nothing of other seeds."
    return Section(
        "Evaluations", [], [Table("evaluations", "What `gxpo eval` measured", columns, rows, note)] if rows else []
    )
