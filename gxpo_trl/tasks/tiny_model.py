"""The embedded model: a 90k-parameter Llama that solves some of the embedded task, and the script that made it.

    python -m gxpo_trl.tasks.tiny_model --output gxpo_trl/tasks/tiny      # about 90 s on one core

The warm start imitates a mixed demonstrator. 70 % of the steps show clean worked answers. The last 30 % show mostly
bare answers (right, but the model can't compute them in its head) and worked answers that sometimes slip. The result
solves about a quarter of the problems when sampled, and nearly all of them within 16 samples: that gap is what RL can
close.
"""

import argparse
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .arithmetic import LARGEST_VALUE, OPERATIONS, Problem, apply_operation, sample_problem


TINY_MODEL_PATH = Path(__file__).parent / "tiny"

TOKEN_PATTERN = r" ?\\boxed\{| ?[A-Za-z]+| ?\d+|."
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}Q: {{ message['content'] }} A:"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}<eos>{% endif %}"
    "{% endfor %}"
)

CLEAN_FRACTION = 0.7  # of the steps: worked answers only
BARE_FRACTION = 0.65  # of the mixed demonstrations: the answer without its steps
SLIP_FRACTION = 0.35  # of the worked ones among them: one step goes wrong


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: whole numbers and words (with their leading space) are single tokens."""
    numbers = [f"{space}{n}" for n in range(2 * LARGEST_VALUE + 1) for space in ("", " ")]
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *numbers])
    rng = random.Random(0)
    for _ in range(3000):
        vocabulary.update(dict.fromkeys(re.findall(TOKEN_PATTERN, prompt_text(problem := sample_problem(rng)))))
        vocabulary.update(dict.fromkeys(re.findall(TOKEN_PATTERN, worked_answer(problem.steps, problem.answer))))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised Llama: 2 layers, hidden size 64, 4 heads, tied embeddings, fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def prompt_text(problem: Problem) -> str:
    """The prompt as the chat template renders it."""
    return f"Q: {problem.question} A:"


def worked_answer(steps: tuple[str, ...], answer: int) -> str:
    """The steps, then the boxed answer."""
    return f" {' '.join(steps)} \\boxed{{{answer}}}"


def mixed_demonstration(problem: Problem, rng: random.Random, bare_fraction: float = BARE_FRACTION) -> str:
    """A mixed demonstration: often the bare answer, sometimes a chain with one error carried through."""
    if rng.random() < bare_fraction:
        return f" \\boxed{{{problem.answer}}}"
    if rng.random() >= SLIP_FRACTION:
        return worked_answer(problem.steps, problem.answer)
    slip, steps, value = rng.randrange(len(problem.steps)), [], None
    for i, step in enumerate(problem.steps):
        left, operator, right = re.match(r"(\d+)([+\-*])(\d+)", step).groups()
        value = int(left) if value is None else value
        result = apply_operation(value, operator, int(right))
        if i == slip:
            result += rng.choice((-10, -2, -1, 1, 2, 10))
        result = max(result, 0)
        steps.append(f"{value}{operator}{right}={result}")
        value = result
    return worked_answer(tuple(steps), value)


def collate(prompts: list[list[int]], completions: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each (B, T) int64; prompts carry the label -100."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    for label, prompt in zip(labels, prompts, strict=True):
        label[: len(prompt)] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 1000,
    seed: int = 0,
    operations: Sequence[int] = OPERATIONS,
    bare_fraction: float = BARE_FRACTION,
) -> None:
    """Trains the model on demonstrations, in place: batch 64, fresh data, AdamW with warm-up and cosine decay.

    More operations, or a larger part of mixed demonstrations that show the bare answer, make a harder task.
    """
    rng = random.Random(seed)
    peak_learning_rate, warmup = 4e-3, max(1, steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for step in range(steps):
        problems = []
        while len(problems) < 64:
            if not (problem := sample_problem(rng, operations)).held_out:
                problems.append(problem)
        if step < CLEAN_FRACTION * steps:
            answers = [worked_answer(problem.steps, problem.answer) for problem in problems]
        else:
            answers = [mixed_demonstration(problem, rng, bare_fraction) for problem in problems]
        batch = collate(
            tokenizer([prompt_text(problem) for problem in problems])["input_ids"],
            tokenizer([answer + tokenizer.eos_token for answer in answers])["input_ids"],
            tokenizer.pad_token_id,
        )
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TINY_MODEL_PATH, help="folder that the model is written to")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.seed)
    warm_start(model, tokenizer, arguments.steps, arguments.seed)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}, saved to {arguments.output}")


if __name__ == "__main__":
    main()
