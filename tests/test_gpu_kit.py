"""The benchmarks for a borrowed GPU: nothing is lost where something fails, and everything runs in small on a CPU."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_wheels  # noqa: E402
import pages  # noqa: E402
import waits  # noqa: E402
from helpers import METHOD, make_trainer  # noqa: E402


# ---- Wheels in pieces


def make_wheels(folder: Path) -> dict[str, bytes]:
    sizes = {"a-1-py3-none-any.whl": 250, "b-1-py3-none-any.whl": 60, "c-1-py3-none-any.whl": 50, "d-1.whl": 100}
    contents = {name: (name.encode() * size)[:size] for name, size in sizes.items()}
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def test_pieces_keep_the_limit_and_come_together_again(tmp_path):
    contents = make_wheels(tmp_path / "fetched")
    pieces = gpu_wheels.pack(tmp_path / "fetched", tmp_path / "out", limit=100)
    assert len(pieces) == 5  # 460 bytes, none of it copied twice
    assert all(sum(file.stat().st_size for file in piece.iterdir()) <= 100 for piece in pieces)
    wheels = gpu_wheels.join(tmp_path / "out")
    assert {file.name: file.read_bytes() for file in wheels.iterdir()} == contents


@pytest.mark.parametrize("damage", [lambda part: part.unlink(), lambda part: part.write_bytes(b"else")])
def test_a_piece_that_is_missing_or_damaged_is_named(tmp_path, damage):
    make_wheels(tmp_path / "fetched")
    gpu_wheels.pack(tmp_path / "fetched", tmp_path / "out", limit=100)
    damage(next((tmp_path / "out").glob("pieces/*/a-1-*.part-01")))
    with pytest.raises(SystemExit, match="a-1-py3-none-any.whl: a piece is missing or damaged"):
        gpu_wheels.join(tmp_path / "out")


def test_a_stand_in_is_a_wheel_of_that_version_without_needs(tmp_path):
    assert gpu_wheels.make_stand_in(tmp_path, "torch", "2.11.0") == "torch==2.11.0+there"
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--quiet", "--report", "-"]
    command += ["--no-index", "--find-links", str(tmp_path), "--ignore-installed", "torch>=2.11,<2.12"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = json.loads(run.stdout)["install"]
    assert found["metadata"]["version"] == "2.11.0+there" and "requires_dist" not in found["metadata"]


def test_what_is_not_carried_is_never_replaced():
    kept = ("torch", "transformers", "accelerate", "triton", "nvidia-cudnn-cu13", "cuda-bindings")
    assert all(gpu_wheels.KEPT.fullmatch(name) for name in kept)
    assert not any(gpu_wheels.KEPT.fullmatch(name) for name in ("torchvision", "trl", "fsspec", "numpy"))


# ---- Parts

SCRIPT = """
import json, sys, time
path = sys.argv[sys.argv.index("--result") + 1]
open(path, "w").write(json.dumps({"rows": [1]}))
what = sys.argv[1]
print("so far so good")
time.sleep(600 if what == "hang" else 0)
sys.exit("it broke" if what == "fail" else 0)
"""


@pytest.fixture
def parts(tmp_path, monkeypatch) -> tuple[gpu.Part, ...]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    found = [gpu.Part(what, what, (str(script), what), 2, (str(script), what)) for what in ("hang", "fail", "end")]
    return (*found, replace(found[2], name="lacks", needs="no_such_package"))


def test_a_part_that_is_killed_or_fails_loses_itself_alone(tmp_path, parts):
    results = tmp_path / "results"
    began = time.monotonic()
    gpu.run_parts(parts, results, minutes=1)
    assert time.monotonic() - began < 30
    left = {part.name: json.loads((results / f"{part.name}.json").read_text()) for part in parts}
    assert "killed" in left["hang"]["error"] and left["hang"]["rows"] == [1]
    assert "it broke" in left["fail"]["error"] and "exit status 1" in left["fail"]["error"]
    assert "error" not in left["end"] and left["end"]["rows"] == [1]
    assert left["lacks"]["skipped"] == "no_such_package is not installed"
    assert "so far so good" in (results / "end.log").read_text()


def test_only_what_is_missing_or_failed_is_run_again(tmp_path, parts):
    results = tmp_path / "results"
    _, fail, end, _ = parts
    gpu.run_parts((fail, end), results, minutes=1)
    before = {path.name: path.read_text() for path in results.glob("*.json")}
    gpu.run_parts((fail, end), results, minutes=1)
    assert {path.name for path in results.glob("*.json") if path.read_text() != before[path.name]} == {"fail.json"}
    gpu.run_parts((fail, end), results, minutes=1, again=True)
    assert (results / "end.json").read_text() != before["end.json"]


def test_no_part_is_begun_that_there_is_no_time_for(tmp_path, parts, capsys):
    gpu.run_parts(parts[2:3], tmp_path / "results", minutes=0.01)
    assert not list((tmp_path / "results").glob("*.json")) and "no time left" in capsys.readouterr().out


def test_the_limits_of_the_parts_fit_the_half_hour():
    assert sum(part.seconds for part in gpu.PARTS) <= 25 * 60
    for part in gpu.PARTS:
        assert (ROOT / "benchmarks" / part.command[0]).is_file()


# ---- Goals and pages


def row(update: str, layout: str, ratio: float, peak: float) -> dict:
    return {"update": update, "layout": layout, "ratio": ratio, "peak_ratio": peak, "peak_bytes": 2**30}


@pytest.fixture
def results() -> dict[str, dict]:
    about = {"about": "an update", "small": False, "machine": "a card"}
    rows = [row("gxpo K=5", "compact, pruned", 0.9, 1.01), row("gxpo K=5", "stock layout", 3.2, 1.0)]
    sampled = {"contender": "grouped", "completions": 256, "ratio": 0.6}
    return {
        "update_0.5b": {**about, "rows": [*rows, row("grpo", "compact, pruned", 0.5, 1.0)]},
        "sampling_0.5b": {**about, "rows": [sampled, {**sampled, "completions": 64}]},
    }


def test_goals_are_judged(results):
    judged = [(found.what.partition(": ")[2], found.met) for found in gpu.findings(results) if found.met is not None]
    assert judged == [
        ("gxpo K=5, compact, pruned, seconds over TRL's", True),
        ("gxpo K=5, compact, pruned, peak memory over TRL's", False),
        ("gxpo K=5, stock layout, seconds over three of TRL's passes", False),
        ("gxpo K=5, stock layout, peak memory over TRL's", True),
        ("256 completions, grouped, seconds over `generate`'s", False),
    ]
    assert gpu.table(results).count("**no**") == 3 and "Not run yet: update_1.5b_checkpointing" in gpu.table(results)
    assert "2 of 5 goals are met" in gpu.summary(results)


def test_text_between_the_markers_is_filled_in_and_the_rest_stays():
    page = "before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n"
    assert pages.fill(page, "gpu", r"new \1") == "before\n<!-- gpu -->\nnew \\1\n<!-- /gpu -->\nafter\n"
    for without in ("none", page + page):
        with pytest.raises(ValueError, match="one <!-- gpu -->"):
            pages.fill(without, "gpu", "new")


def test_the_pages_have_what_the_results_there_say():
    there = gpu.load(gpu.RESULTS)
    for name in gpu.PAGES:
        page = (ROOT / name).read_text()
        assert page == pages.fill(page, "gpu", gpu.text_for(name, there)), "run `python benchmarks/gpu.py --write`"


# ---- Waits


def test_an_active_step_reads_values_where_the_design_has_it_and_nowhere_else(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, gate_signal="never", max_steps=2, **METHOD)
    watching = waits.WatchingOneStep(1)
    trainer.add_callback(watching)
    trainer.train()
    assert waits.unexpected(watching.reads) == []
    assert watching.reads["gxpo_trl.engines.replicated:clip_gradients"] == 4  # two probes: norm and factor
    monkeypatch.delitem(waits.DESIGN, "gxpo_trl.update.measurements:reduce")
    (found,) = waits.unexpected(watching.reads)
    assert found.startswith("gxpo_trl.update.measurements:reduce (read 1 times, 0")
    assert waits.unexpected({}, {"gxpo_trl.update.algorithm:_reposition": 1})


# ---- All of it


@pytest.mark.slow
def test_everything_runs_in_small_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small", "--results", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    there = gpu.load(tmp_path)
    assert there.keys() == {part.name for part in gpu.PARTS if part.small is not None}
    assert not any("error" in result or "skipped" in result for result in there.values()), printed
    updates = there["update_1.5b_checkpointing"]["rows"]
    assert {(r["update"], r["layout"]) for r in updates} >= {
        ("gxpo K=5", "compact, pruned"),
        ("gxpo K=5, copies on the host", "compact, pruned"),
        ("grpo, 3 iterations", "stock layout"),
    }
    engines = there["engines"]["engines"]
    assert engines.keys() == {f"{e}/{what}" for e in ("ddp", "zero2") for what in ("fp32", "bf16", "waits")}
    assert all(r.get("exact", True) and not r.get("unexpected") for r in engines.values()), engines
    for task in ("addition", "reasoning"):
        runs = there[f"real_{task}"]["runs"]
        assert len(runs) == 3 and all(run["wall_seconds"]["update"] > 0 for run in runs)
    assert "| measured | result | goal | met |" in printed
