"""Makes the papers' tables and figures from run folders.

    gxpo report out/gxpo-* out/grpo-* --out report
    gxpo report "GRPO=trl/seed-*" "GXPO, K 5=out/gxpo-*"        # arms with your own labels; plain TRL too
    gxpo report out/tiny-gxpo                                   # the page of one run

Writes one `report.html` that needs no network, each figure as PNG and SVG, each table as CSV and Markdown. Runs that
differ only in their seed are one arm.
"""

import argparse
import sys
from pathlib import Path

from ..reporting.arms import load_runs
from ..reporting.page import write_report
from ..reporting.sections import make_sections
from ..run_folder import check_output_dir


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, pattern, or LABEL=folder")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--evaluations", type=Path, default=Path("out/eval"), help="output folder of `gxpo eval`")
    parser.add_argument(
        "--baseline", help="label of the arm that others are compared with; the first of GRPO if unset"
    )
    options = parser.parse_args(arguments)
    try:
        check_output_dir(options.out, "out")
        runs = load_runs(options.runs)
        page = write_report(runs, make_sections(runs, options.baseline, options.evaluations), options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(page.resolve())


if __name__ == "__main__":
    main()
