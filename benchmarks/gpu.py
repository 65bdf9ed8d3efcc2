"""All that a GPU has to show, in one command: half an hour on a machine without internet.

    python benchmarks/gpu.py                 # what is missing of the parts, in the order of their worth
    python benchmarks/gpu.py --small         # all of it in small, on a CPU, in minutes: to see that it runs
    python benchmarks/gpu.py --show          # runs nothing: goals and results from the JSON there
    python benchmarks/gpu.py --write         # runs nothing: fills README.md, docs/results.md and docs/gpu.md from it

Each part is a process of its own, with a time limit, a log, `NAME.log`, and a result, `NAME.json`, which it writes
again with every figure. What is killed or fails loses no other part: its error is in its JSON, with what it had. A
part that is there is not run again, one that failed is; `--again` runs all. docs/gpu.md says what to carry to such a
machine, and how to read what comes of it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from pages import fill


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
PAGES = ("README.md", "docs/results.md", "docs/gpu.md")
COMMAND = "python benchmarks/gpu.py"
GRACE = 45.0  # seconds over its limit after which a part is killed
SMALL_LIMIT = 1800.0  # seconds of a part in small: the machine may be busy


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name (`str`): Of its files.
        about (`str`): What it measures.
        command (`tuple[str, ...]`): A script of this folder with its options. It takes `--result FILE` and
            `--seconds N`, when to stop by itself.
        seconds (`float`): Its limit.
        small (`tuple[str, ...]`, *optional*): The options in small, on a CPU; unset where another part's are the same.
        needs (`str`, *optional*): A package without which it is skipped.
        on_all_gpus (`bool`): Whether it uses all GPUs. The others see one.
    """

    name: str
    about: str
    command: tuple[str, ...]
    seconds: float
    small: tuple[str, ...] | None = None
    needs: str | None = None
    on_all_gpus: bool = False


UPDATE = ("update_cost.py", "--blocks", "7")
SMALL_UPDATE = ("update_cost.py", "--shape", "tiny", "--blocks", "2", "--threads", "1", "--gradient_checkpointing")
SAMPLING = ("generation.py", "--group_sizes", "8", "--profiles", "geometric", "--blocks", "3", "--new_tokens", "256")
SAMPLING += ("--continuous_batching", "0")
SMALL_SAMPLING = ("generation.py", "--shape", "tiny", "--batches", "16", "--group_sizes", "8", "--blocks", "1")
SMALL_SAMPLING += ("--profiles", "geometric", "--new_tokens", "12", "--continuous_batching", "0")
REAL, SMALL_REAL = ("real_gpu.py", "--steps", "100"), ("real_gpu.py", "--small")
PARTS = (
    Part(
        "update_1.5b_checkpointing",
        "an update of 1.5B, activations recomputed",
        (*UPDATE, "--shape", "1.5b", "--gradient_checkpointing"),
        150,
        SMALL_UPDATE,
    ),
    Part("update_0.5b", "an update of 0.5B", (*UPDATE, "--shape", "0.5b"), 90),
    Part(
        "sampling_0.5b",
        "sampling in groups",
        (*SAMPLING, "--shape", "0.5b", "--batches", "256", "64", "512", "128"),
        170,
        SMALL_SAMPLING,
    ),
    Part(
        "engines",
        "engines: exactness, waits and copies",
        ("engines.py",),
        150,
        ("engines.py", "--small"),
        on_all_gpus=True,
    ),
    Part(
        "real_addition",
        "a real model on sums",
        (*REAL, "--task", "addition"),
        220,
        (*SMALL_REAL, "--task", "addition"),
    ),
    Part("update_1.5b", "an update of 1.5B", (*UPDATE, "--shape", "1.5b"), 90),
    Part(
        "update_0.5b_checkpointing",
        "an update of 0.5B, activations recomputed",
        (*UPDATE, "--shape", "0.5b", "--gradient_checkpointing"),
        60,
    ),
    Part(
        "sampling_vllm",
        "sampling in groups, with vLLM",
        (*SAMPLING, "--shape", "0.5b", "--batches", "256", "--vllm"),
        120,
        needs="vllm",
    ),
    Part(
        "real_reasoning",
        "a real model on a task of reasoning-gym",
        (*REAL, "--task", "reasoning"),
        450,
        (*SMALL_REAL, "--task", "reasoning"),
        needs="reasoning_gym",
    ),
)
"""In the order of their worth: what there is no time for is at the end."""


# ---- Running


def run_parts(
    parts: tuple[Part, ...], results: Path, minutes: float, again: bool = False, small: bool = False
) -> None:
    """Runs what is not in `results`, one part after the other, for so many minutes in all."""
    results.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes
    for part in parts:
        if small and part.small is None:
            continue
        path = results / f"{part.name}.json"
        if not again and is_there(path):
            print(f"{part.name}: is there", flush=True)
            continue
        left = ends - time.monotonic() - GRACE
        if left < min(30, part.seconds):
            print(f"{part.name}: no time left for it", flush=True)
            continue
        if again:
            path.unlink(missing_ok=True)
        run_part(part, path, min(SMALL_LIMIT if small else part.seconds, left), small)
        print(f"{part.name}: {outcome(json.loads(path.read_text()))}", flush=True)


def is_there(path: Path) -> bool:
    """Whether a part has run to its end, or to that of its time. What was not installed is looked for again."""
    return path.is_file() and not json.loads(path.read_text()).keys() & {"error", "skipped"}


def outcome(result: dict) -> str:
    said = result.get("skipped") or (f"FAILED: {result['error'].splitlines()[-1]}" if "error" in result else "done")
    return f"{said} ({result['part_seconds']:.0f} s)"


def run_part(part: Part, path: Path, limit: float, small: bool = False) -> None:
    """Runs one part, and leaves its result, its error, or why it was skipped, in `path`.

    What is there of a try before is left to the part: runs of a real model are not made twice.
    """
    began = time.monotonic()
    if part.needs is not None and importlib.util.find_spec(part.needs) is None:
        error = {"skipped": f"{part.needs} is not installed"}
    else:
        script, *options = part.small if small else part.command
        options += ["--result", str(path), "--seconds", f"{limit:.0f}"]
        log = path.with_suffix(".log")
        command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        gpus = {"CUDA_VISIBLE_DEVICES": "" if small else first} if small or not part.on_all_gpus else {}
        error = launch(command, log, limit + GRACE, gpus)
    result = json.loads(path.read_text()) if path.is_file() else {}
    if not error and not result:
        error = {"error": "It left no result."}
    result = {name: value for name, value in result.items() if name not in ("error", "skipped")}
    result |= error | {
        "part": part.name,
        "about": part.about,
        "part_seconds": time.monotonic() - began,
        "small": small,
    }
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def launch(command: list[str], log: Path, limit: float, variables: dict[str, str]) -> dict:
    """Runs a command with all that it starts, for so many seconds. Returns what went wrong, by `"error"`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)  # the package need not be installed
    environment |= variables
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
        except BaseException as error:
            end_all(process.pid)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"error": f"It was killed after {limit:.0f} s."}
    end = log.read_text(errors="replace")[-2000:].strip()
    return {} if code == 0 else {"error": f"{end}\nIt ended with exit status {code}; the log is {log.name}."}


def end_all(pid: int) -> None:
    """Ends a process and all that it has started, in sessions of their own too, as torchrun's ranks are."""
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(processes, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


# ---- Reading


@dataclass(frozen=True)
class Finding:
    """One figure and its goal.

    Attributes:
        what (`str`): What was measured.
        value (`str`): What came of it.
        goal (`str`): What it should be; empty for no goal.
        met (`bool`, *optional*): Whether it is; unset without a goal.
    """

    what: str
    value: str
    goal: str = ""
    met: bool | None = None


def load(results: Path) -> dict[str, dict]:
    """The results that are there, by part, in the order of the parts."""
    paths = {part.name: results / f"{part.name}.json" for part in PARTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def findings(results: dict[str, dict]) -> Iterator[Finding]:
    for name, result in results.items():
        kind = name.partition("_")[0]
        yield from {"update": of_update, "sampling": of_sampling, "engines": of_engines, "real": of_real}[kind](result)
        if trouble := result.get("skipped") or result.get("error"):
            yield Finding(result["about"], trouble.splitlines()[-1])


def at_most(what: str, value: float, goal: float, unit: str = " ×") -> Finding:
    return Finding(what, f"{value:.2f}{unit}", f"≤ {goal:g}{unit}", value <= goal)


def of_update(result: dict) -> Iterator[Finding]:
    """Seconds over those of TRL's update in the same block, and the peak over its peak."""
    rows = {(row["update"], row["layout"]): row for row in result.get("rows", [])}
    for (update, layout), row in rows.items():
        what = f"{result['about']}: {update}, {layout}"
        is_gxpo = update == "gxpo K=5"
        if is_gxpo and layout != "stock layout":
            yield at_most(f"{what}, seconds over TRL's", row["ratio"], 1.0)
        elif is_gxpo:
            yield at_most(f"{what}, seconds over three of TRL's passes", row["ratio"] / 3, 1.05)
        else:
            yield Finding(f"{what}, seconds over TRL's", f"{row['ratio']:.2f} ×")
        if "peak_ratio" in row:
            peak, gib = f"{what}, peak memory over TRL's", row["peak_bytes"] / 2**30
            yield (
                at_most(peak, row["peak_ratio"], 1.0)
                if is_gxpo
                else Finding(peak, f"{row['peak_ratio']:.2f} × ({gib:.1f} GiB)")
            )
    if "peak_bytes" in result:
        ratio = result["peak_bytes"]["gxpo"] / result["peak_bytes"]["trl"]
        yield at_most(f"{result['about']}: GXPO, compact, pruned, peak memory over TRL's", ratio, 1.0)


def of_sampling(result: dict) -> Iterator[Finding]:
    for row in result.get("rows", []):
        if row["contender"] == "generate, dynamic cache":
            continue
        what = f"{result['about']}: {row['completions']} completions, {row['contender']}, seconds over `generate`'s"
        if row["contender"] == "grouped" and row["completions"] == 256:
            yield at_most(what, row["ratio"], 0.5)
        else:
            yield Finding(what, f"{row['ratio']:.2f} ×")


def of_engines(result: dict) -> Iterator[Finding]:
    for name, row in result.get("engines", {}).items():
        if trouble := row.get("skipped") or row.get("error"):
            yield Finding(name, trouble.splitlines()[-1], met=False if "error" in row else None)
        elif "share_within" in row:
            value = f"{row['share_within']:.2%} of the coordinates within 1e-6, all within {row['largest']:.0e}"
            yield Finding(
                f"{name}: parameters after 3 steps, compared with the reference", value, "≥ 99.9 %", row["exact"]
            )
        elif "cosine" in row:
            value = f"cosine {row['cosine']:.3f}, length {row['length']:.2f} ×"
            yield Finding(f"{name}: displacement, compared with the reference", value, row["goal"], row["exact"])
        else:
            value = f"{row['ours']} by the package, {row['others']} by others; TRL's trainer {row['trl']}"
            if row["unexpected"]:
                value += f"; not in the design: {', '.join(row['unexpected'])}"
            yield Finding(f"{name} in an active step", value, "none but the design's", not row["unexpected"])


def of_real(result: dict) -> Iterator[Finding]:
    arms: dict[tuple[str, float], list[dict]] = {}
    for run in result.get("runs", []):
        arms.setdefault((run["arm"], run["learning_rate"]), []).append(run)
    for (arm, rate), runs in arms.items():
        mean = {name: sum(run["wall_seconds"][name] for run in runs) / len(runs) for name in runs[0]["wall_seconds"]}
        accuracy = sum(run["curve"][-1][1] for run in runs) / len(runs)
        auc = sum(run["mean_accuracy"] for run in runs) / len(runs)
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in mean.items())
        batches = ", ".join(str(run["batches"]) for run in runs)
        value = f"at the end {accuracy:.3f}, mean {auc:.3f}; seconds: {parts}; batches of each seed: {batches}"
        yield Finding(f"{result['about']}: {arm}, lr {rate:g}", value)


def table(results: dict[str, dict]) -> str:
    """Markdown: where it was measured, then each figure and its goal."""
    if not results:
        return f"Not run yet. On a machine with a GPU: `{COMMAND}`."
    first = next((result for result in results.values() if "machine" in result), {})
    where = [first.get("machine", "?"), f"driver {first.get('driver') or '?'}", f"CUDA {first.get('cuda') or '?'}"]
    where += [f"{name} {first.get(name, '?')}" for name in ("python", "torch", "transformers", "trl")]
    small = (
        " In small, to see that it runs: these figures say nothing."
        if any(r["small"] for r in results.values())
        else ""
    )
    lines = [f"{', '.join(where)}; revision {first.get('revision') or '?'}; `{COMMAND}`.{small}", ""]
    lines += ["| measured | result | goal | met |", "|---|---|---|---|"]
    for found in findings(results):
        met = "" if found.met is None else "yes" if found.met else "**no**"
        cells = [found.what, found.value, found.goal, met]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    missing = [part.name for part in PARTS if part.name not in results]
    return "\n".join(lines + (["", f"Not run yet: {', '.join(missing)}."] if missing else []))


def summary(results: dict[str, dict]) -> str:
    """Only the figures that have a goal."""
    if not results:
        return table(results)
    judged = [found for found in findings(results) if found.met is not None]
    met = sum(found.met for found in judged)
    lines = [f"{met} of {len(judged)} goals are met; all figures are in docs/gpu.md."]
    return "\n".join(
        lines + [f"- {found.what}: {found.value} (goal {found.goal})" for found in judged if not found.met]
    )


def text_for(page: str, results: dict[str, dict]) -> str:
    """All figures, the goals that are not met, or how many they are."""
    if page == "docs/gpu.md":
        return table(results)
    return summary(results) if page == "docs/results.md" else summary(results).partition("\n")[0]


def write_pages(results: dict[str, dict], root: Path = ROOT) -> None:
    for name in PAGES:
        path = root / name
        path.write_text(fill(path.read_text(), "gpu", text_for(name, results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together")
    parser.add_argument("--again", action="store_true", help="run what is there, too")
    parser.add_argument("--small", action="store_true", help="everything in small, on a CPU")
    parser.add_argument("--show", action="store_true", help="run nothing: print goals and results")
    parser.add_argument("--write", action="store_true", help="run nothing: fill the pages")
    parser.add_argument("--results", type=Path, help="where results go; benchmarks/results/gpu if unset")
    options = parser.parse_args()
    results = (options.results or (ROOT / "out" / "gpu-small" if options.small else RESULTS)).resolve()
    if options.write:
        write_pages(load(results))
        return
    if not options.show:
        if not options.small and shutil.which("nvidia-smi") is None:
            parser.exit(2, "error: there is no GPU here. `--small` shows on a CPU that everything runs.\n")
        parts = tuple(part for part in PARTS if part.name in options.parts)
        run_parts(parts, results, options.minutes, options.again, options.small)
    print(table(load(results)))


if __name__ == "__main__":
    main()
