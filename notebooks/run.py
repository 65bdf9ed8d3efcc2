"""Executes notebooks in place and stores what they showed: `make notebooks`, or some of them.

python notebooks/run.py quickstart next_extrapolation
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


HERE = Path(__file__).parent
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def run(path: Path) -> None:
    """Runs every cell, in the folder of the notebook, and writes the outputs; an error leaves the file as it was."""
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    notebook.metadata = nbformat.from_dict(KEPT)  # neither widgets' state nor the version of whoever ran it
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # what is stored is read, not watched
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, says that it found no other
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb")):
        run(HERE / f"{name}.ipynb")
