"""The engine recipes, as they are, under `accelerate launch`: the training command on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gxpo_trl.scripts.recipes import recipe_names, recipe_path


ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SCRIPT = "tests/launched_script.py"
SHORT = {"max_steps": 2, "eval_strategy": "no", "eval_on_start": False, "bf16": True}
ON_TWO = {"use_cpu": False, "ddp_backend": "gloo"}
ENGINES = {
    "fsdp2": "FSDP2State",
    "zero1": "BF16OptimizerState",
    "zero3": "Zero3State",
}


def command_line(report: Path, folder: Path, **settings) -> list[str]:
    settings = {"config": "recipes/tiny/gxpo.yaml", "output_dir": folder, **SHORT, **settings}
    return [SCRIPT, str(report), *(word for k, v in settings.items() for word in (f"--{k}", str(v)))]


def completions_of(name: str, processes: int) -> list[int]:
    """What a recipe says of its batch: completions of an optimizer step, and sampled at a time."""
    recipe = yaml.safe_load(recipe_path(f"gxpo:{name}").read_text())
    if "prompts_per_step" in recipe:
        step = recipe["prompts_per_step"] * recipe["num_generations"]
    else:
        step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * processes
    steps = recipe.get("steps_per_generation", 0) // recipe.get("gradient_accumulation_steps", 1)
    return [step, recipe.get("generation_batch_size", step * max(steps, 1))]


def run(command: list[str], **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True)


def read(report: Path, process: subprocess.CompletedProcess) -> dict:
    assert report.is_file(), process.stdout[-1000:] + process.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)  # DDP and ZeRO-2 have tests of their own below
def test_a_recipe_gives_the_engine_it_is_named_after(tmp_path, engine):
    """bf16, fp32 parameters and fp32 accumulation, and the recipe's clipping."""
    report = tmp_path / "report.json"
    options = ["--config_file", f"recipes/accelerate/{engine}.yaml", "--num_processes", "2"]
    process = run([*LAUNCH, *options, *command_line(report, tmp_path, **ON_TWO)])
    result = read(report, process)
    assert (result["engine"], result["processes"], result["bf16"]) == (ENGINES[engine], 2, True)
    assert (result["parameters"], result["accumulates"], result["clips_at"]) == ("torch.float32", "torch.float32", 1.0)
    assert result["passes"] == 6 and all(norm > 0 for norm in result["norms"])
    assert (tmp_path / "model.safetensors").is_file()
    assert result["steps"] == {name: completions_of(name, processes=2) for name in recipe_names()}


@pytest.mark.slow
def test_a_loop_with_an_extrapolation_goes_on_from_it(tmp_path):
    """Both runs in the same two processes; only one of these extrapolates."""
    options = ["--config_file", "recipes/accelerate/zero3.yaml", "--num_processes", "2"]
    settings = {"config": "recipes/tiny/next.yaml", "max_steps": 4, "extrapolate_after": 3, "trajectory_steps": 1}
    settings |= {"extrapolate_steps_ahead": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 16}
    process = run([*LAUNCH, *options, *command_line(tmp_path / "unused", tmp_path, **ON_TWO, **settings)])
    result = tmp_path / "extrapolated" / "alpha-1" / "adapter_model.safetensors"
    assert result.is_file(), process.stdout[-1000:] + process.stderr[-3000:]
    predicted, started, ended = (
        load_file(path)
        for path in (result, *(tmp_path / f"after/trajectory/step-00000{i}/adapter_model.safetensors" for i in (0, 1)))
    )
    assert all(torch.equal(predicted[name], started[name]) for name in predicted)
    assert any(not torch.equal(started[name], ended[name]) for name in started)
    assert json.loads((tmp_path / "after" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.slow
def test_a_recipe_is_rehearsed_on_the_engine_it_is_for(tmp_path):
    """The plan once, not once for each process; and nothing is left of the rehearsal."""
    options = ["--config_file", "recipes/accelerate/fsdp2.yaml", "--num_processes", "2"]
    settings = {
        "config": "gxpo:qwen2.5-1.5b-instruct/next.yaml",
        "output_dir": tmp_path / "run",
        **ON_TWO,
        "dry_run": True,
    }
    words = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    process = run([*LAUNCH, *options, SCRIPT, "unused", *words])
    assert process.stdout.count("An optimizer step") == 1, process.stdout[-1000:] + process.stderr[-3000:]
    assert process.stdout.count("on the embedded model and 2 process(es)") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_recipe_of_one_gpu_is_one_process(tmp_path):
    report = tmp_path / "report.json"
    options = ["--config_file", "recipes/accelerate/single.yaml"]
    process = run([*LAUNCH, *options, *command_line(report, tmp_path, use_cpu=True)])
    result = read(report, process)
    assert (result["engine"], result["processes"], result["bf16"]) == ("ReplicatedState", 1, True)


@pytest.mark.slow
def test_deepspeed_runs_on_one_process(tmp_path):
    """As people do who offload the optimizer of a single GPU."""
    report = tmp_path / "report.json"
    options = ["--config_file", "recipes/accelerate/zero2.yaml", "--num_processes", "1"]
    process = run([*LAUNCH, *options, *command_line(report, tmp_path, **ON_TWO)])
    result = read(report, process)
    assert (result["engine"], result["processes"], result["passes"]) == ("Zero12State", 1, 6)


def put_in_path(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.slow
def test_the_slurm_script_launches_one_part_on_each_node(tmp_path):
    """Two nodes of one process each, played by this machine: Slurm's commands are stand-ins, accelerate is not."""
    commands, report = tmp_path / "bin", tmp_path / "report.json"
    commands.mkdir()
    put_in_path(commands, "scontrol", "#!/bin/bash\nprintf '127.0.0.1\\nelsewhere\\n'\n")
    put_in_path(commands, "srun", '#!/bin/bash\nshift\nSLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@"\nwait\n')
    real = f"{sys.executable} -m accelerate.commands.launch"
    script = f'line=" ${{*:2}}"\nexec {real} ${{line/-m gxpo_trl.scripts.train/{SCRIPT} {report}}}\n'
    put_in_path(commands, "accelerate", f"#!/bin/bash\n{script}")
    slurm = {"SLURM_JOB_NODELIST": "two", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "4711"}
    arguments = [word for k, v in (SHORT | ON_TWO).items() for word in (f"--{k}", str(v))]
    process = run(
        [
            "bash",
            "recipes/slurm/train.slurm",
            "recipes/tiny/gxpo.yaml",
            "ddp",
            *arguments,
            "--output_dir",
            str(tmp_path),
        ],
        PATH=f"{commands}:{os.environ['PATH']}",
        **slurm,
    )
    result = read(report, process)
    assert (result["engine"], result["processes"], result["passes"]) == ("ReplicatedState", 2, 6)


def test_the_slurm_script_says_how_it_is_used():
    process = run(["bash", "recipes/slurm/train.slurm"])
    assert process.returncode != 0 and "usage: sbatch" in process.stderr
