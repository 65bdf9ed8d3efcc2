"""Commands that start engines of vLLM, on a CPU: each test in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.tasks.task import load_task


pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has an environment for it")
pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[1]
CACHE = 2**30  # bytes; what the engine takes on a CPU, see vllm_engine.py


def run(kind: str, folder: Path) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/vllm_worker.py", kind, str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=environment, timeout=600, capture_output=True, text=True)
    report = folder / "report.json"
    assert report.is_file(), process.stdout[-1000:] + process.stderr[-3000:]
    return json.loads(report.read_text()) | {"printed": process.stdout}


def test_the_first_engine_of_a_loop_is_gone_when_the_second_starts(tmp_path):
    """Its memory too. Where ranks talk to each other, `torch.distributed`, they go on doing so."""
    report = run("next", tmp_path)
    first, second = report["engines"]
    assert second["left"] == []
    assert first["memory_after"] - first["memory_before"] > CACHE
    assert second["memory_before"] - first["memory_before"] < 0.5 * CACHE
    assert second["group_was_there"]
    run_folder = tmp_path / "run"
    assert (run_folder / "extrapolated" / "alpha-1" / "adapter_model.safetensors").is_file()
    assert json.loads((run_folder / "after" / "trainer_state.json").read_text())["global_step"] == 2


def test_an_evaluation_samples_by_vllm_in_the_dtype_of_the_checkpoint_and_with_room_for_what_it_asks(tmp_path):
    report = run("evaluation", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    prompts = load_task("arithmetic", limit=2).problems["prompt"][:]
    tokens = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert [engine["dtype"] for engine in report["engines"]] == ["torch.float32", "torch.bfloat16"]
    for engine in report["engines"]:
        assert engine["left"] == []
        assert engine["context"] == max(map(len, tokens)) + 9
        assert engine["settings"]["gpu_memory_utilization"] == 0.4
    for model in ("fp32", "bf16"):
        (path,) = (tmp_path / "out").glob(f"*{model}/arithmetic.jsonl")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["sample"] for record in records] == [0, 1, 2] * 2
        assert all(0 < record["length"] <= 9 for record in records)
        assert len({record["completion"] for record in records}) > 2
    assert "temperature 1.0, top_p 1.0, top_k 0, min_p 0.0, repetition_penalty 1.0" in report["printed"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return run("sampling", tmp_path_factory.mktemp("sampling"))


def test_each_prompt_and_each_sample_has_a_seed_of_its_own(sampled):
    first, again, next_seed = sampled["seeded"]
    assert first == again != next_seed
    (one, other), (of_next_seed, _) = first, next_seed
    assert one != other  # the same prompt twice
    assert of_next_seed[:-1] != one[1:]  # sample j of seed s + 1, and sample j + 1 of seed s


def frequencies(counts: dict[str, int]) -> dict[str, float]:
    return {text: n / sum(counts.values()) for text, n in counts.items()}


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    return max(abs(one.get(text, 0) - other.get(text, 0)) for text in one | other)


@pytest.mark.parametrize("name", ["plain", "cooler", "top_k", "min_p", "repetition_penalty"])
def test_both_backends_sample_the_same_distribution(sampled, name):
    """Of 3000 draws, in which a frequency has a standard deviation of at most .009."""
    by_vllm, by_transformers = (frequencies(sampled["counts"][name][of]) for of in ("vllm", "transformers"))
    assert distance(by_vllm, by_transformers) < 4 * 2**0.5 * 0.0091
    if name != "plain":
        assert distance(by_vllm, frequencies(sampled["counts"]["plain"]["vllm"])) > 0.08
