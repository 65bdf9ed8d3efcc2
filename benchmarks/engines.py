"""Engines on the GPUs of this machine, over NCCL: exact compared with a plain reference, and where they wait.

    python benchmarks/engines.py               # as many ranks as there are GPUs; one is enough
    python benchmarks/engines.py --small       # two engines on a CPU, over gloo

DDP, FSDP2 and, with DeepSpeed, ZeRO-1, 2 and 3 train for three steps, each with the jobs and the bounds of
`tests/test_engines.py`. In fp32 the parameters are compared with those of `tests/reference.py`, an own loss, clipping
and AdamW, computed in float64 on the CPU from the same rollouts: 99.9 % of the coordinates within 1e-6, fewer than
0.1 % beyond 1e-5. In bf16 the displacement is compared with the reference's: its cosine above 0.94, its length 0.75 to
1.35 times as large.

A third step is watched: where Python reads a tensor's values, and, with CUDA, where torch warns of a wait, and what
the profiler counts. `tests/waits.py` lists the places of the package that wait by design; any other is reported.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import describe_machine, save_result


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import Recording, compute_in_float64, make_trainer, odd_model, tiny_model  # noqa: E402
from reference import run_reference  # noqa: E402
from test_engines import BF16_METHODS, METHODS  # noqa: E402
from waits import unexpected  # noqa: E402

from gxpo_trl import GXPOConfig, GXPOTrainer  # noqa: E402


ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SMALL = ("ddp", "zero2")
EXACT, (ROUNDED, ALIGNMENT) = METHODS["gxpo-rollback-full"], BF16_METHODS["bf16-gxpo"]
COMPARED = {"fp32": EXACT, "bf16": ROUNDED}
LENGTH = (0.75, 1.35)
CALLBACKS = "transformers.trainer_callback:"
OF_TRL = ("gate_signal", "rule")  # settings that its trainer has not


class RecordingTrainer(Recording, GXPOTrainer):
    pass


def jobs_of(engine: str) -> list[dict]:
    stock = {name: value for name, value in EXACT["settings"].items() if name not in OF_TRL}
    return [
        {**EXACT, "engine": engine, "name": f"{engine}/fp32"},
        {**EXACT, "engine": engine, "name": f"{engine}/waits", "kind": "waits"},
        {**ROUNDED, "engine": f"{engine}-bf16", "name": f"{engine}/bf16"},
        {"engine": engine, "name": f"{engine}/waits-trl", "kind": "waits", "trainer": "trl", "settings": stock},
    ]


def reference_of(job: dict, ranks: int, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Where the parameters begin, and where the reference takes them, on the rollouts of all ranks; in float64."""

    def model():
        torch.manual_seed(0)
        return tiny_model() if job.get("model") == "tiny" else odd_model()

    settings = {"per_device_train_batch_size": 8 * ranks, **job["settings"], "compact_batches": False}
    trainer = make_trainer(folder, RecordingTrainer, GXPOConfig, model=model(), **settings)
    start = {name: p.detach().double().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    expected, *_ = run_reference(trainer, model().double())
    return {name: (start[name], p) for name, p in expected.items()}


def compare(found: dict[str, torch.Tensor], reference: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """In fp32: the bounds of the tests."""
    errors = torch.cat([(found[name].cpu().double() - p).abs().flatten() for name, (_, p) in reference.items()])
    moved = max((p - start).abs().max().item() for start, p in reference.values())
    within, beyond = (errors <= 1e-6).double().mean().item(), (errors > 1e-5).double().mean().item()
    exact = within >= 0.999 and beyond < 0.001
    return {
        "share_within": within,
        "share_beyond": beyond,
        "largest": errors.max().item(),
        "moved": moved,
        "exact": exact,
    }


def compare_displacement(found: dict[str, torch.Tensor], reference: dict, rounds_start: bool) -> dict:
    """In bf16; DeepSpeed starts from the model rounded to it."""
    names = list(reference)
    start, expected = (torch.cat([reference[name][i].flatten() for name in names]) for i in (0, 1))
    mine = torch.cat([found[name].cpu().double().flatten() for name in names])
    mine = mine - (start.bfloat16().double() if rounds_start else start)
    cosine = torch.cosine_similarity(mine, expected - start, 0).item()
    length = (mine.norm() / (expected - start).norm()).item()
    goal = f"cosine > {ALIGNMENT}, length {LENGTH[0]} to {LENGTH[1]}"
    return {
        "cosine": cosine,
        "length": length,
        "goal": goal,
        "exact": cosine > ALIGNMENT and LENGTH[0] < length < LENGTH[1],
    }


def launch(engine: str, ranks: int, folder: Path) -> subprocess.Popen:
    """Starts the jobs of one engine: what hangs or breaks there is no other's."""
    (folder / f"{engine}.json").write_text(json.dumps(jobs_of(engine)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    return subprocess.Popen([*command, str(ROOT / "tests" / "engine_worker.py"), str(folder / f"{engine}.json")])


def finish(process: subprocess.Popen, seconds: float) -> None:
    """Waits for a launch, for so many seconds at most."""
    try:
        process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        print(f"The launch took over {seconds:.0f} s: what it has left is judged.", flush=True)
        process.terminate()  # torchrun then ends its ranks
        process.wait()


def count(waits: dict) -> tuple[int, int]:
    """How often the package, and the rest, waited; without callbacks, of which one watches the run."""
    reads = {site: n for site, n in waits.get("reads", {}).items() if not site.startswith(CALLBACKS)}
    ours = sum(times for site, times in reads.items() if site.startswith("gxpo_trl."))
    return ours, sum(reads.values()) - ours


def judge(engine: str, folder: Path, references: dict[str, dict]) -> dict[str, dict]:
    """What the jobs of an engine have left, by name."""
    left = {job["name"]: folder / job["name"] / "rank0.pt" for job in jobs_of(engine)}
    left = {name: torch.load(path, map_location="cpu") if path.is_file() else {} for name, path in left.items()}
    rows = {}
    for name, reference in ((f"{engine}/fp32", references["fp32"]), (f"{engine}/bf16", references["bf16"])):
        result = left[name]
        if "parameters" not in result:
            rows[name] = {"error": result.get("error", "It left no result; the log is next to this file.")}
        elif name.endswith("fp32"):
            rows[name] = compare(result["parameters"], reference) | {"engine": result["engine"]}
        else:
            compared = compare_displacement(result["parameters"], reference, engine.startswith("zero"))
            rows[name] = compared | {"engine": result["engine"]}
    watched, stock = left[f"{engine}/waits"], left[f"{engine}/waits-trl"]
    if "reads" not in watched:
        rows[f"{engine}/waits"] = {"error": watched.get("error", "It left no result.")}
    else:
        new = unexpected(watched["reads"], watched["warned"])
        ours, others = count(watched)
        rows[f"{engine}/waits"] = {
            **{"ours": ours, "others": others, "trl": count(stock)[1], "unexpected": new},
            **{"sites": watched["reads"], "warned": watched["warned"], "runtime": watched["runtime"]},
            "runtime_trl": stock.get("runtime", {}),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two engines, on a CPU")
    parser.add_argument("--ranks", type=int, help="as many as there are GPUs if unset")
    parser.add_argument("--seconds", type=float, default=600, help="for all launches")
    parser.add_argument("--result", type=Path, help="the file that is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compute_in_float64()
    ranks = options.ranks or max(torch.cuda.device_count(), 1)
    result = {"ranks": ranks, "backend": "nccl" if torch.cuda.is_available() else "gloo", "engines": {}}
    result |= describe_machine(threads=1)
    path = options.result or ROOT / "out" / "benchmarks" / "engines.json"
    deadline = time.monotonic() + options.seconds
    engines = SMALL if options.small else ENGINES
    with tempfile.TemporaryDirectory() as folder:
        references = None
        for i, engine in enumerate(engines):
            if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                result["engines"][engine] = {"skipped": "DeepSpeed is not installed"}
                continue
            process = launch(engine, ranks, Path(folder))
            if references is None:  # the CPU computes them meanwhile
                references = {name: reference_of(job, ranks, Path(folder) / name) for name, job in COMPARED.items()}
            finish(process, (deadline - time.monotonic()) / (len(engines) - i))
            result["engines"] |= judge(engine, Path(folder), references)
            save_result("engines", result, path)
    for row_name, row in result["engines"].items():
        print(row_name, {key: value for key, value in row.items() if key not in ("sites", "warned", "runtime")})


if __name__ == "__main__":
    main()
