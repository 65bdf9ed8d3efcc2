"""What the package shows, and what it costs to ask for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from trl import GRPOTrainer

import gxpo_trl
from gxpo_trl import GXPOTrainer, LookaheadTrainer, SFPOTrainer


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", gxpo_trl.__all__)
def test_every_public_name_is_there(name):
    assert getattr(gxpo_trl, name) is not None
    assert name == "__version__" or name in gxpo_trl.HOMES


def test_a_trainer_loads_what_trl_loads_and_nothing_else():
    """No plots, no verifier: someone who trains waits for neither."""
    code = (
        "import sys; from trl import GRPOConfig, GRPOTrainer; before = set(sys.modules); "
        "from gxpo_trl import GXPOConfig, GXPOTrainer, sample_in_groups; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    added = set(run.stdout.split())
    assert "gxpo_trl" in added, run.stderr
    assert not added & {"matplotlib", "scipy", "sympy", "pyarrow", "math_verify", "deepspeed", "vllm"}
    assert added <= {"gxpo_trl", "trl", "transformers", "torch", "accelerate", "peft"}  # whose modules may be lazy


def test_the_trainer_overrides_at_most_ten_methods_and_each_once():
    def overridden(trainer_class) -> set[str]:
        return {name for name, value in vars(trainer_class).items() if callable(value) and hasattr(GRPOTrainer, name)}

    assert len(overridden(LookaheadTrainer)) <= 10
    assert LookaheadTrainer.__bases__ == (GRPOTrainer,)
    for trainer_class in (GXPOTrainer, SFPOTrainer):
        assert trainer_class.__bases__ == (LookaheadTrainer,) and not overridden(trainer_class)


def test_the_algorithm_is_short():
    """To be read from top to bottom."""
    assert len((ROOT / "gxpo_trl" / "update" / "algorithm.py").read_text().splitlines()) < 150
