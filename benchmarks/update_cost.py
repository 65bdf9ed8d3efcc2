"""What an update costs beside that of TRL's own `GRPOTrainer`: every rule, with and without compaction.

    python benchmarks/update_cost.py            # about 10 minutes on two cores
    python benchmarks/update_cost.py --bars     # what the bars below are about, over more blocks: 3 minutes

One run. Two trainers take turns, TRL's and ours, over blocks of rollouts with the same lengths; within a block ours
goes through all arms. An update is everything but generation and rewards: batching, all passes, clipping, optimizer
steps, extrapolation. Each arm's figure is the median over blocks of its seconds divided by TRL's in the same block.
Peak memory is that of one update above what is held between updates, every allocation counted.

Bars: an active GXPO update at most 0.65 × TRL's single-pass one on the log-normal profile when half of the groups
have no spread, at most 1.0 × when 30 % have none, and never above 3.1 ×; peak memory not above TRL's.

The C library's allocator is told to keep freed memory. Otherwise the page faults of activations decide: they made one
and the same pass 5 to 10 % slower or faster here.
"""

import argparse
import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from common import RESULTS, describe_machine, keep_freed_memory, save_result
from datasets import Dataset
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, GXPOTrainer, SFPOConfig
from gxpo_trl.rollout.compaction import Compaction
from gxpo_trl.tasks.tiny_model import build_tokenizer


GROUPS, GROUP_SIZE, CAP, PROMPT_LENGTH = 10, 8, 512, 16
ROWS_PER_MICRO_BATCH = 8
WARM_UP_ARMS = 3  # in the first block of each profile, which is not counted
FRACTIONS = (0.0, 0.3, 0.5, 0.7)


def short_uniform(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(8, 64) for _ in range(count)]


def log_normal(rng: random.Random, count: int) -> list[int]:
    return [min(CAP, 1 + int(rng.lognormvariate(math.log(90), 0.7))) for _ in range(count)]


def maths_like(rng: random.Random, count: int) -> list[int]:
    """5 % of the completions run into the cap."""
    at_cap = count // 20
    return [CAP] * at_cap + [min(CAP, 1 + int(rng.lognormvariate(math.log(200), 0.6))) for _ in range(count - at_cap)]


PROFILES = {"short-uniform": short_uniform, "log-normal": log_normal, "maths-like": maths_like}
LAYOUTS = {
    "stock layout": None,
    "compact": Compaction(trims_prompts=True),
    "compact, pruned": Compaction(trims_prompts=True, prunes=True),
    "compact, pruned, packed": Compaction(
        trims_prompts=True, prunes=True, max_tokens=ROWS_PER_MICRO_BATCH * (PROMPT_LENGTH + CAP)
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to make an update: a rule, K, a layout, and the fraction of groups without spread."""

    rule: str
    steps: int
    layout: str
    fraction: float

    @property
    def name(self) -> str:
        return self.rule if self.rule == "grpo" else f"{self.rule} K={self.steps}"


BARS = [
    Arm("grpo", 0, "compact", 0.5),
    Arm("gxpo", 5, "stock layout", 0.5),
    Arm("gxpo", 5, "compact, pruned", 0.3),
    Arm("gxpo", 5, "compact, pruned", 0.5),
]


def all_arms(profile_name: str) -> list[Arm]:
    """Fractions matter to pruning alone, and K to GXPO not at all: what cannot differ is measured once."""
    listed = [Arm("grpo", 0, layout, 0.5) for layout in ("stock layout", "compact")]
    for rule, steps in (("gxpo", 5), ("sfpo", 3)):
        listed += [Arm(rule, steps, layout, 0.5) for layout in ("stock layout", "compact")]
        listed += [Arm(rule, steps, "compact, pruned", fraction) for fraction in FRACTIONS]
    if profile_name == "log-normal":
        listed += [Arm("gxpo", 5, "compact, pruned, packed", 0.5)]
        for rule, steps in (("gxpo", 3), ("gxpo", 10), ("sfpo", 5), ("sfpo", 10)):
            listed += [Arm(rule, steps, layout, 0.5) for layout in ("stock layout", "compact, pruned")]
    return listed


class Plan:
    """Which profile and block a step belongs to, and whose turn it is."""

    def __init__(self, profiles: list[str], blocks: int, arms: Callable[[str], list[Arm]] = all_arms):
        self.blocks = [(profile, block) for block in range(blocks) for profile in profiles]
        self.steps = [
            (index, arm)
            for index, (name, block) in enumerate(self.blocks)
            for arm in (arms(name)[:WARM_UP_ARMS] if block == 0 else arms(name))
        ]
        self.turn, self.changed = ("trl", 0), threading.Condition()
        self.failed = False

    def block_of(self, who: str, step: int) -> int:
        return step if who == "trl" else self.steps[step][0]

    def wait_for(self, who: str, step: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == (who, self.block_of(who, step)) or self.failed)
        if self.failed:
            raise RuntimeError("the other trainer has failed")

    def hand_over(self, who: str, step: int) -> None:
        block = self.block_of(who, step)
        is_last = who == "trl" or step + 1 == len(self.steps) or self.steps[step + 1][0] != block
        if is_last:
            with self.changed:
                self.turn = ("ours", block) if who == "trl" else ("trl", block + 1)
                self.changed.notify_all()

    def lengths(self, who: str, step: int) -> list[int]:
        profile_name, block = self.blocks[self.block_of(who, step)]
        lengths = PROFILES[profile_name](random.Random(f"{profile_name} {block}"), GROUPS * GROUP_SIZE)
        random.Random(block).shuffle(lengths)
        return lengths

    def fraction(self, who: str, step: int) -> float:
        return 0.5 if who == "trl" else self.steps[step][1].fraction


class Timed:
    """Times updates: training steps without generation and rewards, and the optimizer step that follows."""

    who: str
    plan: Plan

    def _generate_and_score_completions(self, inputs):
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self.generating += time.perf_counter() - started
        return output

    def training_step(self, *args, **kwargs):
        self.generating, started = 0.0, time.perf_counter()
        output = super().training_step(*args, **kwargs)
        self.returned = time.perf_counter()
        self.updating += self.returned - started - self.generating
        return output


class TimedTRL(Timed, GRPOTrainer):
    who = "trl"


class TimedOurs(Timed, GXPOTrainer):
    who = "ours"


class TakeTurns(TrainerCallback):
    """Waits for the turn, sets up the arm, and takes the time."""

    def __init__(self, plan: Plan):
        self.plan, self.trainer, self.seconds = plan, None, []
        configs = {"gxpo": GXPOConfig, "sfpo": SFPOConfig}
        self.rules = {
            (arm.rule, arm.steps): configs[arm.rule](
                "out", lookahead_steps=arm.steps, use_cpu=True, bf16=False
            ).lookahead_rule()
            for _, arm in plan.steps
            if arm.rule != "grpo"
        }

    def on_step_begin(self, args, state, control, **kwargs):
        self.plan.wait_for(self.trainer.who, state.global_step)
        if self.trainer.who == "ours":
            self._set_up(self.plan.steps[state.global_step][1])
        self.trainer.updating = 0.0

    def _set_up(self, arm: Arm) -> None:
        lookahead = self.trainer.lookahead
        lookahead.layout.compaction = LAYOUTS[arm.layout]
        lookahead.gate.active = arm.rule != "grpo"
        if arm.rule != "grpo":
            lookahead.rule = self.rules[arm.rule, arm.steps]

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.trainer.updating + time.perf_counter() - self.trainer.returned)
        self.plan.hand_over(self.trainer.who, state.global_step - 1)


def build(trainer_class, config_class, plan: Plan, tokenizer, output: Path, steps: int):
    def rollouts(prompts, trainer) -> dict:
        lengths = plan.lengths(trainer.who, trainer.state.global_step)
        rng = random.Random(0)
        return {
            "prompt_ids": [[rng.randrange(3, 100) for _ in range(PROMPT_LENGTH)] for _ in prompts],
            "completion_ids": [[rng.randrange(3, 100) for _ in range(length)] for length in lengths],
            "logprobs": None,
        }

    def reward(completions, trainer_state, **kwargs) -> list[float]:
        worthless = round(GROUPS * plan.fraction(trainer_class.who, trainer_state.global_step))
        rng = random.Random(trainer_state.global_step)
        return [0.0 if i // GROUP_SIZE < worthless else rng.random() for i in range(len(completions))]

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    turns = TakeTurns(plan)
    trainer = trainer_class(
        model,
        reward,
        config_class(
            str(output / trainer_class.who),
            max_steps=steps,
            per_device_train_batch_size=ROWS_PER_MICRO_BATCH,
            gradient_accumulation_steps=GROUPS * GROUP_SIZE // ROWS_PER_MICRO_BATCH,
            num_generations=GROUP_SIZE,
            max_completion_length=CAP,
            loss_type="grpo",
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["none"] * GROUPS}),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    turns.trainer = trainer
    return trainer, turns


def take_turns(plan: Plan, output: Path) -> tuple[list[float], list[float]]:
    """Seconds of TRL's updates, one a block, and of ours, one an arm and block."""
    tokenizer = build_tokenizer()
    built = [
        build(TimedTRL, GRPOConfig, plan, tokenizer, output, len(plan.blocks)),
        build(TimedOurs, GXPOConfig, plan, tokenizer, output, len(plan.steps)),
    ]

    def train(trainer) -> None:
        try:
            trainer.train()
        except BaseException:
            with plan.changed:
                plan.failed = True
                plan.changed.notify_all()
            raise

    threads = [threading.Thread(target=train, args=(trainer,)) for trainer, _ in built]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return built[0][1].seconds, built[1][1].seconds


def peak_memory(output: Path, only: Arm | None) -> int:
    """The most that one update of an arm, or of TRL if there is none, holds above what it started with, in bytes."""
    plan = Plan(["log-normal"], 2)
    plan.wait_for = plan.hand_over = lambda *_: None
    plan.steps = [] if only is None else [(0, only)] * 2
    trainer_class, config_class = (TimedTRL, GRPOConfig) if only is None else (TimedOurs, GXPOConfig)
    trainer, turns = build(trainer_class, config_class, plan, build_tokenizer(), output, 2)
    peaks = []

    class Profiled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.profiler = profile(profile_memory=True).__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
            peaks.append(max(itertools.accumulate(sizes)))

    trainer.add_callback(Profiled())
    trainer.train()
    return peaks[1]


def summarize(plan: Plan, trl: list[float], ours: list[float]) -> list[dict]:
    ratios: dict[tuple[str, Arm], list[float]] = {}
    for (block, arm), seconds in zip(plan.steps, ours, strict=True):
        profile_name, number = plan.blocks[block]
        if number > 0:
            ratios.setdefault((profile_name, arm), []).append(seconds / trl[block])
    return [
        {
            "profile": profile_name,
            "update": arm.name,
            "layout": arm.layout,
            "zero_advantage_fraction": arm.fraction,
            "ratio": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "blocks": len(values),
        }
        for (profile_name, arm), values in ratios.items()
    ]


def draw(rows: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    profiles = [name for name in PROFILES if any(row["profile"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(profiles), figsize=(4.2 * len(profiles), 3.8), sharey=True, squeeze=False)
    colors = {"gxpo K=5": "#0072B2", "sfpo K=3": "#D55E00", "grpo": "#555555"}
    for axis, name in zip(axes[0], profiles, strict=True):
        for update, color in colors.items():
            mine = [row for row in rows if row["profile"] == name and row["update"] == update]
            for layout, style in (("stock layout", ":"), ("compact", "--")):
                (ratio,) = [row["ratio"] for row in mine if row["layout"] == layout]
                axis.axhline(ratio, color=color, linestyle=style, linewidth=1.4)
            pruned = [row for row in mine if row["layout"] == "compact, pruned"]
            if pruned:
                xs, ys = zip(*((row["zero_advantage_fraction"], row["ratio"]) for row in pruned), strict=True)
                axis.plot(xs, ys, color=color, marker="o", label=update)
            else:
                axis.plot([], [], color=color, label=update)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{name} completions")
        axis.set_xlabel("fraction of groups without spread")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("update time, TRL's GRPO = 1")
    for style, label in ((":", "TRL's layout"), ("--", "sorted, trimmed"), ("-", "and pruned")):
        axes[0][-1].plot([], [], color="black", linestyle=style, label=label)
    axes[0][-1].legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each profile; the first warms up")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)

    output = Path("out/benchmarks/update_cost")
    plan = Plan(list(PROFILES), options.blocks)
    if options.bars:
        plan = Plan(["log-normal"], 9, lambda profile_name: BARS)
    trl, ours = take_turns(plan, output)
    rows = summarize(plan, trl, ours)
    pruned = Arm("gxpo", 5, "compact, pruned", 0.5)
    peaks = {"trl": peak_memory(output, None), "gxpo": peak_memory(output, pruned)}
    for row in rows:
        row_name = f"{row['profile']:14} {row['update']:10} {row['layout']:24} {row['zero_advantage_fraction']:.1f}"
        print(f"{row_name}  {row['ratio']:.2f} × TRL  ({row['min']:.2f}-{row['max']:.2f})")
    print(f"peak memory of an update: TRL {peaks['trl'] / 2**20:.0f} MiB, GXPO {peaks['gxpo'] / 2**20:.0f} MiB")
    seconds = {
        name: statistics.median(s for (n, _), s in zip(plan.blocks, trl, strict=True) if n == name)
        for name, _ in plan.blocks
    }
    result = {"trl_seconds": seconds, "peak_bytes": peaks, "rows": rows, **describe_machine(options.threads)}
    name = "update_cost_bars" if options.bars else "update_cost"
    if not options.bars:
        draw(rows, RESULTS / f"{name}.png")
    print(f"written to {save_result(name, result)}")


if __name__ == "__main__":
    main()
