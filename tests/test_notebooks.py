"""The notebooks: stored as they ran, made for this version, and running still (`make test-notebooks`)."""

import dataclasses
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gxpo_trl import __version__
from gxpo_trl.scripts.arguments import PARTS


PROJECT = Path(__file__).parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
REPOSITORY = "gxpo-trl/gxpo_trl"
LARGEST = 600_000  # bytes, pictures and all
KEYS = {"config"} | {field.name for part in PARTS.values() for field in dataclasses.fields(part)}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


@each_notebook
def test_the_first_cell_opens_this_notebook_in_colab(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "https://colab.research.google.com/assets/colab-badge.svg" in first.source
    assert f"(https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name})" in first.source


@each_notebook
def test_the_second_cell_installs_this_version_and_a_torch_that_it_supports(path):
    second = read(path).cells[1]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    (torch,) = (line for line in project["dependencies"] if re.match(r"torch\b", line))
    package = f'"gxpo_trl @ git+https://github.com/{REPOSITORY}@v{__version__}"'
    assert f'%pip install --quiet {package} "{torch}" torchvision' in second.source
    assert not second.outputs, "it does nothing where the package is there"


@each_notebook
def test_is_stored_as_it_ran_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_is_small_and_without_widgets(path):
    assert path.stat().st_size < LARGEST
    assert read(path).metadata.keys() <= {"kernelspec", "language_info"}
    assert read(path).metadata.kernelspec.name == "python3"


@each_notebook
def test_names_only_keys_that_recipes_have(path):
    named = {key for cell in code_cells(path) for key in re.findall(r'"--([a-z_0-9]+)"', cell.source)}
    assert named <= KEYS


@pytest.mark.notebooks
@each_notebook
def test_runs(path, tmp_path):
    notebook = read(path)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
