"""The sections of a page, in their order. Each is made from runs and lists what is missing."""

from collections.abc import Sequence
from pathlib import Path

from ..runs import Run
from .comparison import comparison_section
from .cost import cost_section
from .diagnostics import diagnostics_section
from .evaluations import evaluation_section
from .extrapolations import next_section
from .one_run import run_section
from .pays import pays_section
from .section import Section
from .sweeps import sweep_section


def make_sections(
    runs: Sequence[Run], baseline: str | None = None, evaluations: Path = Path("out/eval")
) -> list[Section]:
    """All sections that have content.

    Args:
        runs (`Sequence[Run]`): The runs.
        baseline (`str`, *optional*): Label of the arm that others are compared with; the first of GRPO if unset.
        evaluations (`Path`): Output folder of `gxpo eval`, in addition to the runs' own folders.

    Raises:
        ValueError: If no arm has the baseline's label.
    """
    sections = [
        comparison_section(runs, baseline),
        *([run_section(runs[0])] if len(runs) == 1 else []),
        evaluation_section(runs, evaluations),
        sweep_section(runs),
        diagnostics_section(runs),
        next_section(runs),
        pays_section(runs, baseline),
        cost_section(runs),
    ]
    return [section for section in sections if not section.is_empty]
