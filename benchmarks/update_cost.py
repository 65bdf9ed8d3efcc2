"""What an active GXPO step costs beside the same trainer's single-pass step.

    python benchmarks/update_cost.py

One run, one trainer, one model, full fine-tuning: active and single-pass steps alternate, so that both see the same
machine. An update is everything after the rollouts: all passes, clipping, optimizer steps and the extrapolation.
Rollouts are scripted and not timed. The bar is 3.1: three passes, and a little for the probes' optimizer steps and the
extrapolation. That little is paid per parameter, the passes per parameter and token: the more tokens a step has, the
closer the ratio comes to 3 (`--micro_batches`).

The C library's allocator is told to keep freed memory, as the caching allocator of a GPU does. Otherwise the page
faults of activations decide: they made one and the same pass 5 to 10 % slower or faster here.
"""

import argparse
import os
import random
import statistics
import sys
import time

import torch
from common import describe_machine, save_result
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from gxpo_trl import GXPOConfig, GXPOTrainer
from gxpo_trl.tasks.tiny_model import build_tokenizer


PROMPT_LENGTH, COMPLETION_LENGTH = 32, 96
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_MMAP_THRESHOLD_": "10000000000"}  # glibc


def scripted_rollouts(prompts, trainer) -> dict:
    """Random completions of one length: every step computes on the same number of tokens."""
    rng = random.Random(0)
    return {
        "prompt_ids": [[rng.randrange(3, 100) for _ in range(PROMPT_LENGTH)] for _ in prompts],
        "completion_ids": [[rng.randrange(3, 100) for _ in range(COMPLETION_LENGTH)] for _ in prompts],
        "logprobs": None,
    }


def random_reward(completions, **kwargs) -> list[float]:
    return [random.random() for _ in completions]


class TimedTrainer(GXPOTrainer):
    """Times updates from the first forward pass to the end of the optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.returned = 0.0

    def training_step(self, *args, **kwargs):
        output = super().training_step(*args, **kwargs)
        self.returned = time.perf_counter()
        return output


class Alternate(TrainerCallback):
    """Switches the lookahead off for every second step, and takes the times."""

    def __init__(self):
        self.trainer: TimedTrainer | None = None
        self.seconds = {"active": [], "single": []}

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._gate.resting = state.global_step % 2

    def on_step_end(self, args, state, control, **kwargs):
        update = (
            self.trainer._metrics["train"]["lookahead/update_time"][-1] + time.perf_counter() - self.trainer.returned
        )
        self.seconds["single" if (state.global_step - 1) % 2 else "active"].append(update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11, help="active and single-pass steps, each")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro_batches", type=int, default=4, help="of 16 completions, accumulated for a step")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    torch.set_num_threads(options.threads)

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden_size // 64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    alternate = Alternate()
    trainer = TimedTrainer(
        model,
        random_reward,
        GXPOConfig(
            "out/benchmarks/update_cost",
            max_steps=2 * options.pairs + 2,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=options.micro_batches,
            num_generations=8,
            max_completion_length=COMPLETION_LENGTH,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["none"] * 64}),
        processing_class=tokenizer,
        rollout_func=scripted_rollouts,
        callbacks=[alternate],
    )
    trainer.remove_callback(PrinterCallback)
    alternate.trainer = trainer
    trainer.train()

    active, single = (values[1:] for values in alternate.seconds.values())  # the first of each warms up
    ratio = statistics.median(active) / statistics.median(single)
    pairwise = sorted(a / s for a, s in zip(active, single, strict=True))
    result = {
        "parameters": model.num_parameters(),
        "tokens_per_step": 16 * options.micro_batches * (PROMPT_LENGTH + COMPLETION_LENGTH),
        "single_pass_seconds": statistics.median(single),
        "active_seconds": statistics.median(active),
        "ratio": ratio,
        "ratio_of_pairs_min_median_max": [pairwise[0], statistics.median(pairwise), pairwise[-1]],
        "bar": 3.1,
        **describe_machine(options.threads),
    }
    print(f"{model.num_parameters():,} parameters, {options.pairs} pairs of steps, medians:")
    print(
        f"  single-pass update {result['single_pass_seconds']:.3f} s, active update {result['active_seconds']:.3f} s"
    )
    print(f"  ratio {ratio:.3f} (bar: 3.1)")
    print(f"written to {save_result('update_cost', result)}")


if __name__ == "__main__":
    main()
