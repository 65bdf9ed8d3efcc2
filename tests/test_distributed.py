"""Two real processes (DDP over gloo) compute what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close_parameters, double_model, parameters, train
from peft import LoraConfig


WORKER = Path(__file__).with_name("ddp_worker.py")

# A large eps keeps AdamW well-conditioned where gradients are nearly 0, so that the order of a sum does not decide.
SETTINGS = {"learning_rate": 3e-4, "max_grad_norm": 0.5, "adam_epsilon": 1e-3, "epsilon": 0.05, "max_steps": 3}


def launch(output_dir: Path, **settings) -> list[dict]:
    """Runs two ranks; judged by what they save. Returns their results."""
    output_dir.mkdir(exist_ok=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
            *(str(WORKER), str(output_dir), json.dumps({**SETTINGS, **settings})),
        ],
        timeout=240,
        capture_output=True,
        text=True,
    )
    return [torch.load(output_dir / f"rank{rank}.pt") for rank in range(2)]


def our_metrics(rank: dict) -> list[dict]:
    return [
        {name: value for name, value in entry.items() if name.startswith("lookahead/") and "time" not in name}
        for entry in rank["log"]
    ]


def assert_ranks_agree(ranks: list[dict]) -> None:
    first, second = ranks
    assert all(torch.equal(first["parameters"][n], p) for n, p in second["parameters"].items())
    assert first["gate"] == second["gate"]
    assert first["passes"] == second["passes"]
    assert our_metrics(first) == our_metrics(second)


@pytest.mark.parametrize("probe_optimizer_state, lora", [("carry", False), ("rollback", True)])
def test_two_processes_equal_one(tmp_path, float64, probe_optimizer_state, lora):
    settings = {"probe_optimizer_state": probe_optimizer_state}
    ranks = launch(tmp_path / "two", lora=lora, **settings)
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    one = train(
        tmp_path / "one",
        model=double_model(),
        per_device_train_batch_size=16,
        peft_config=peft_config,
        **{**SETTINGS, **settings},
    )
    assert_ranks_agree(ranks)
    assert_close_parameters(ranks[0]["parameters"], parameters(one), atol=1e-6)  # the advantages are fp32 still
    for name in ("grad_norm_0", "grad_norm_slow", "retention_mean", "scale_mean", "cos_0_slow"):
        two = [entry[f"lookahead/{name}"] for entry in ranks[0]["log"] if f"lookahead/{name}" in entry]
        assert two == pytest.approx(
            [entry[f"lookahead/{name}"] for entry in one.state.log_history[:3]], rel=1e-4, abs=1e-6
        )


def test_gradients_are_reduced_once_a_pass(tmp_path):
    """Three passes of two micro-batches each: the first of a pass accumulates locally."""
    ranks = launch(tmp_path, trainer="counting")
    assert [rank["reductions"] for rank in ranks] == [3 * 3, 3 * 3]


def test_the_gate_trips_on_all_ranks_at_once(tmp_path):
    ranks = launch(tmp_path, trainer="rising gate", gate_warmup_steps=2, max_steps=5)
    assert_ranks_agree(ranks)
    assert ranks[0]["gate"]["resting"] == "for good"
    assert ranks[0]["passes"] == 3 * 3 + 2


def test_all_ranks_fall_back_when_one_sees_a_gradient_that_is_not_finite(tmp_path):
    ranks = launch(tmp_path, trainer="poisoned")
    assert_ranks_agree(ranks)
    assert ranks[0]["passes"] == 3 + 2 + 3
    assert ranks[0]["log"][1]["lookahead/fallbacks"] == 1
    assert all(p.isfinite().all() for p in ranks[0]["parameters"].values())
