"""What extrapolating a run costs: triplets from factors compared with dense SVDs, and all of `gxpo extrapolate`.

    python benchmarks/next.py                        # about two minutes; writes 1 GB to out/benchmarks/next

The trajectory has the shapes of Qwen2.5-1.5B (28 layers; q, k, v, o), r = 64 and 15 checkpoints, and random numbers
in it. The peer merges each delta and takes `torch.linalg.svd` of it, as the public code of the paper does with all
weights. It is measured on a few deltas of each shape, and scaled to all of them.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import describe_machine, save_result
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from gxpo_trl.run_folder import ADAPTER_WEIGHTS, EXTRAPOLATED_FOLDER, EXTRAPOLATION_NAME, alpha_folder
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.trajectory.checkpoints import factor_keys, load_trajectory
from gxpo_trl.trajectory.deltas import low_rank_deltas
from gxpo_trl.trajectory.lowrank import leading_triplets


LAYERS, HIDDEN, KEY_VALUE, RANK, CHECKPOINTS, AHEAD = 28, 1536, 256, 64, 15, 5
MODULES = {"q_proj": HIDDEN, "k_proj": KEY_VALUE, "v_proj": KEY_VALUE, "o_proj": HIDDEN}  # and how many outputs


def make_trajectory(run: Path) -> None:
    """Factors that drift, the faster the fewer steps there have been, with noise."""
    shutil.rmtree(run, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.self_attn.{module}" for layer in range(LAYERS) for module in MODULES]
    drifts = {
        name: [torch.randn(*shape, generator=generator) for shape in shapes_of(name) for _ in range(2)]
        for name in names
    }
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=list(MODULES), task_type="CAUSAL_LM")
    config.base_model_name_or_path = "Qwen/Qwen2.5-1.5B-Instruct"
    for i in range(1, CHECKPOINTS + 1):
        tensors = {}
        for name in names:
            (start, drift_a, drift_b, noise), progress = drifts[name], 1 - 0.9**i
            key_a, key_b = factor_keys(name)
            tensors[key_a] = (start + 0.1 * progress * drift_a) * 0.02
            tensors[key_b] = (progress * drift_b + 0.1 * i**0.5 * noise) * 0.002
        folder = run / f"checkpoint-{10 * i}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(run)  # no Hub here; it takes no part


def shapes_of(name: str) -> list[tuple[int, int]]:
    """Of A and B."""
    return [(RANK, HIDDEN), (MODULES[name.split(".")[-1]], RANK)]


def compare_triplets(run: Path, samples: int) -> dict:
    """Seconds for all deltas: ours measured, dense SVDs scaled from a few of each shape."""
    trajectory = load_trajectory(run)
    started = time.perf_counter()
    deltas = low_rank_deltas(trajectory, AHEAD)
    ours = time.perf_counter() - started
    dense, worst, rows = 0.0, 0.0, {}
    for (m, n), names in trajectory.groups():
        per_matrix = sum(len(getattr(deltas[0], kind)) for kind in ("from_start", "local", "target"))
        factored, merged = [], []
        for i in range(samples):
            name, pair = names[i], (CHECKPOINTS - 1 - i, None if i % 2 else CHECKPOINTS - 2 - i)
            started = time.perf_counter()
            factors = trajectory.difference([name], *pair)
            found = leading_triplets(factors)
            factored.append(time.perf_counter() - started)
            matrix = (factors.left @ factors.right)[0]
            started = time.perf_counter()
            sigma = torch.linalg.svd(matrix, full_matrices=False).S
            merged.append(time.perf_counter() - started)
            worst = max(worst, abs(found.sigma.item() / sigma[0].item() - 1))
        dense += statistics.median(merged) * len(names) * per_matrix
        rows[f"{m}x{n}"] = {
            "deltas": len(names) * per_matrix,
            "seconds_a_dense_svd": statistics.median(merged),
            "seconds_one_from_factors": statistics.median(factored),
        }
    return {
        "seconds_from_factors": ours,
        "seconds_dense_scaled": dense,
        "ratio": dense / ours,
        "largest_relative_difference_of_sigma": worst,
        "shapes": rows,
    }


def extrapolate(run: Path, threads: int) -> dict:
    """`gxpo extrapolate` in a process of its own."""
    command = [sys.executable, "-m", "gxpo_trl.scripts.cli", "extrapolate", str(run), "--steps-ahead", "50"]
    shutil.rmtree(run / EXTRAPOLATED_FOLDER, ignore_errors=True)
    environment = {"OMP_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    seconds = time.perf_counter() - started
    report = json.loads((alpha_folder(run / EXTRAPOLATED_FOLDER / "next", 1) / EXTRAPOLATION_NAME).read_text())
    return {
        "seconds": seconds,
        "seconds_of": report["seconds"],
        "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "epochs_taken": report["predictor"]["epochs_taken"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5, help="dense SVDs of each shape")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Path("out/benchmarks/next")
    make_trajectory(run)
    whole = extrapolate(run, options.threads)  # first: the peak memory is the largest child's so far
    triplets = compare_triplets(run, options.samples)
    print(
        f"triplets: {triplets['seconds_from_factors']:.1f} s from factors; dense SVDs "
        f"{triplets['seconds_dense_scaled']:.0f} s, scaled from {options.samples} of each shape: "
        f"{triplets['ratio']:.0f} times as long"
    )
    print(f"gxpo extrapolate: {whole['seconds']:.0f} s, {whole['peak_gb']:.2f} GiB at its peak")
    result = {"triplets": triplets, "extrapolate": whole, **describe_machine(options.threads)}
    print(f"written to {save_result('next', result)}")


if __name__ == "__main__":
    main()
