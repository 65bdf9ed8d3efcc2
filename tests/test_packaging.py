"""The package as it is installed: what the wheel holds, and that one version is meant everywhere."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from gxpo_trl import __version__
from gxpo_trl.scripts.recipes import recipe_names


ROOT = Path(__file__).parents[1]
NAMES = recipe_names()


def test_the_wheel_holds_them_and_the_embedded_model(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"gxpo_trl/recipes/{name}" for name in NAMES} <= names
    assert {"gxpo_trl/tasks/tiny/model.safetensors", "gxpo_trl/reporting/report.html.jinja"} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "recipes"))}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "from gxpo_trl.scripts.cli import main; main(['recipes'])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True, timeout=120
    )
    assert run.stdout.splitlines()[0].startswith(f"gxpo:{NAMES[0]}"), run.stderr


def inline_metadata(script: Path) -> dict:
    """What `uv run` reads at the head of a script (PEP 723)."""
    block = re.search(r"^# /// script$\n(.*?)^# ///$", script.read_text(), re.MULTILINE | re.DOTALL)[1]
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(True)))


@pytest.mark.slow
def test_the_training_script_runs_by_itself(tmp_path):
    """As `uv run` starts it: a file, in a folder of no package, with what its head names installed."""
    script = ROOT / "gxpo_trl" / "scripts" / "train.py"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = inline_metadata(script)
    assert head["requires-python"] == project["requires-python"] and head["dependencies"] == [project["name"]]
    copy = tmp_path / "train.py"
    copy.write_text(script.read_text())
    command = [sys.executable, str(copy), "--config", "gxpo:tiny/grpo.yaml", "--dry-run", "--output_dir", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert "Rehearsed" in run.stdout, run.stderr[-2000:]


def test_one_version_is_meant_everywhere():
    head = inline_metadata(ROOT / "gxpo_trl" / "scripts" / "train.py")
    assert head["tool"]["uv"]["sources"]["gxpo_trl"]["tag"] == f"v{__version__}"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert citation["repository-code"] == head["tool"]["uv"]["sources"]["gxpo_trl"]["git"] == repository


def test_listing_recipes_loads_no_torch():
    code = "import sys; from gxpo_trl.scripts.cli import main; main(['recipes']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-1] == "False", run.stderr
