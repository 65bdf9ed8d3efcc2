"""What an update costs compared with TRL's own `GRPOTrainer`: every rule, with and without compaction.

    python benchmarks/update_cost.py            # about 10 minutes on two cores
    python benchmarks/update_cost.py --bars     # what the bars below are about, over more blocks: 3 minutes
    python benchmarks/update_cost.py --shape 1.5b --gradient_checkpointing   # on a GPU, see benchmarks/gpu.py

One run. Two trainers take turns, TRL's and ours, over blocks of rollouts with the same lengths; within a block ours
goes through all arms. An update is everything but generation and rewards: batching, all passes, clipping, optimizer
steps, extrapolation. Each arm's figure is the median over blocks of its seconds divided by TRL's in the same block.
Peak memory is counted for one update, above what is held between updates, with every allocation.

Bars: an active GXPO update at most 0.50 × TRL's single-pass one on the log-normal profile when half of the groups
have no spread and the entropies of their completions are known, at most 0.65 × when 30 % have none, and never above
3.1 ×; a GRPO update at most 0.15 ×; peak memory not above TRL's. With `--bars`, also the forward pass in which TRL
scores completions, for vLLM and reference models.

With `--shape`, a random model of the sizes of Qwen2.5 in bf16 has a LoRA adapter of rank 128 in fp32, and 64
completions of at most 1,024 tokens. A third trainer then makes three iterations of GRPO; and the peak is the
allocator's, of every update, as a median over blocks. With `--seconds` no block is begun that would not be finished.

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import RESULTS, Deadline, describe_machine, keep_freed_memory, save_result, synchronize
from datasets import Dataset
from peft import LoraConfig
from shapes import SHAPES, best_attention, random_model
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadConfig, LookaheadTrainer, SFPOConfig
from gxpo_trl.rollout.compaction import ENTROPIES, Compaction
from gxpo_trl.tasks.tiny_model import build_tokenizer


WARM_UP_ARMS = 3  # in the first block of each profile, which is not counted
FRACTIONS = (0.0, 0.3, 0.5, 0.7)
ITERATIONS = 3  # of GRPO, in as many optimizer steps


@dataclass(frozen=True)
class Batch:
    """The rollouts of an update.

    Attributes:
        groups (`int`): Prompts.
        group_size (`int`): Completions of each.
        cap (`int`): Tokens of a completion, at most.
        prompt_length (`int`): Tokens of each prompt.
        rows (`int`): Completions of a micro-batch.
    """

    groups: int = 10
    group_size: int = 8
    cap: int = 512
    prompt_length: int = 16
    rows: int = 8

    @property
    def completions(self) -> int:
        return self.groups * self.group_size


@dataclass(frozen=True)
class Trained:
    """The model that is updated.

    Attributes:
        shape (`str`, *optional*): Of `SHAPES`, in bf16 with LoRA; unset for a small Llama in fp32.
        gradient_checkpointing (`bool`): Whether activations are computed again.
    """

    shape: str | None = None
    gradient_checkpointing: bool = False


BATCH = Batch()
AS_TRAINED = Batch(groups=8, cap=1024, prompt_length=128)
"""Of the sizes that users train."""


def short_uniform(rng: random.Random, count: int, cap: int) -> list[int]:
    return [rng.randint(8, 64) for _ in range(count)]


def log_normal(rng: random.Random, count: int, cap: int) -> list[int]:
    """Scaled with the cap, as the others are not: a median of 90 of 512 tokens."""
    return [min(cap, 1 + int(rng.lognormvariate(math.log(90 * cap / 512), 0.7))) for _ in range(count)]


def maths_like(rng: random.Random, count: int, cap: int) -> list[int]:
    """5 % of the completions run into the cap."""
    at_cap = count // 20
    return [cap] * at_cap + [min(cap, 1 + int(rng.lognormvariate(math.log(200), 0.6))) for _ in range(count - at_cap)]


PROFILES = {"short-uniform": short_uniform, "log-normal": log_normal, "maths-like": maths_like}


def make_layouts(batch: Batch) -> dict[str, Compaction | None]:
    most = batch.rows * (batch.prompt_length + batch.cap)
    return {
        "stock layout": None,
        "compact": Compaction(trims_prompts=True),
        "compact, pruned": Compaction(trims_prompts=True, prunes=True),
        "compact, pruned, packed": Compaction(trims_prompts=True, prunes=True, max_tokens=most),
    }


@dataclass(frozen=True)
class Arm:
    """One way to make an update.

    Attributes:
        rule (`str`): The update rule, or `"iterations"` for several iterations of GRPO.
        steps (`int`): K.
        layout (`str`): Of `make_layouts`.
        fraction (`float`): Of the groups, those whose rewards are equal.
        copies_on_host (`bool`): Whether the copies of an active step are in host memory (`snapshot_device: cpu`).
        knows_entropies (`bool`): Whether the rollouts have entropies, as from grouped sampling, and from TRL's scoring
            where vLLM samples; not from `generate` or a `rollout_func`.
    """

    rule: str
    steps: int
    layout: str
    fraction: float
    copies_on_host: bool = False
    knows_entropies: bool = True

    @property
    def name(self) -> str:
        if self.rule in ("grpo", "iterations"):
            return self.rule if self.rule == "grpo" else f"grpo, {ITERATIONS} iterations"
        return f"{self.rule} K={self.steps}" + (", copies on the host" if self.copies_on_host else "")

    @property
    def full_layout(self) -> str:
        return self.layout + ("" if self.knows_entropies else ", entropies unknown")


BARS = [
    Arm("grpo", 0, "compact, pruned", 0.5),
    Arm("gxpo", 5, "stock layout", 0.5),
    Arm("gxpo", 5, "compact, pruned", 0.3),
    Arm("gxpo", 5, "compact, pruned", 0.5),
    Arm("grpo", 0, "compact, pruned", 0.5, knows_entropies=False),
    Arm("gxpo", 5, "compact, pruned", 0.5, knows_entropies=False),
]
ON_A_GPU = [
    Arm("gxpo", 5, "compact, pruned", 0.5),
    Arm("gxpo", 5, "stock layout", 0.5),
    Arm("gxpo", 5, "compact, pruned", 0.5, copies_on_host=True),
    Arm("grpo", 0, "compact, pruned", 0.5),
    Arm("grpo", 0, "stock layout", 0.5),
]
SEVERAL_ITERATIONS = [Arm("iterations", 0, layout, 0.5) for layout in ("stock layout", "compact, pruned")]
STOCK = Arm("grpo", 0, "stock layout", 0.5)


def all_arms(profile_name: str) -> list[Arm]:
    """Fractions matter only to pruning, and K does not matter to GXPO: equal cases are measured once."""
    listed = [Arm("grpo", 0, layout, 0.5) for layout in ("stock layout", "compact", "compact, pruned")]
    for rule, steps in (("gxpo", 5), ("sfpo", 3)):
        listed += [Arm(rule, steps, layout, 0.5) for layout in ("stock layout", "compact")]
        listed += [Arm(rule, steps, "compact, pruned", fraction) for fraction in FRACTIONS]
    if profile_name == "log-normal":
        listed += [Arm("gxpo", 5, "compact, pruned, packed", 0.5)]
        for rule, steps in (("gxpo", 3), ("gxpo", 10), ("sfpo", 5), ("sfpo", 10)):
            listed += [Arm(rule, steps, layout, 0.5) for layout in ("stock layout", "compact, pruned")]
    return listed


class PlanIsOver(Exception):
    """There is no time for another block."""


class Plan:
    """Which profile and block a step of a trainer belongs to, and whose turn it is.

    Args:
        profiles (`list[str]`): Of completion lengths.
        blocks (`int`): Of each profile. The first warms up.
        arms (`Callable`): Those of our trainer, by profile.
        iterated (`list[Arm]`): Those of a third trainer, which makes several iterations.
        batch (`Batch`): The rollouts.
        deadline (`Deadline`, *optional*): When no further block may be begun.
        on_block (`Callable`, *optional*): Called after each block.
    """

    def __init__(
        self,
        profiles: list[str],
        blocks: int,
        arms: Callable[[str], list[Arm]] = all_arms,
        iterated: list[Arm] | None = None,
        batch: Batch = BATCH,
        deadline: Deadline | None = None,
        on_block: Callable[[], None] | None = None,
    ):
        self.batch, self.deadline, self.on_block = batch, deadline or Deadline(), on_block
        self.blocks = [(profile, block) for block in range(blocks) for profile in profiles]
        ours = [
            (index, arm)
            for index, (name, block) in enumerate(self.blocks)
            for arm in (arms(name)[:WARM_UP_ARMS] if block == 0 else arms(name))
        ]
        self.steps = {"trl": [(index, STOCK) for index in range(len(self.blocks))], "ours": ours}
        if iterated:
            of_block = [arm for arm in iterated for _ in range(ITERATIONS)]
            self.steps["iterated"] = [(index, arm) for index in range(len(self.blocks)) for arm in of_block]
        self.turn, self.changed = ("trl", 0), threading.Condition()
        self.failed = self.is_over = False
        self._block_began = time.perf_counter()

    def block_of(self, who: str, step: int) -> int:
        return self.steps[who][step][0]

    def wait_for(self, who: str, step: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == (who, self.block_of(who, step)) or self.failed or self.is_over)
        if self.failed:
            raise RuntimeError("the other trainer has failed")
        if self.is_over:
            raise PlanIsOver

    def hand_over(self, who: str, step: int) -> None:
        block, steps = self.block_of(who, step), self.steps[who]
        if step + 1 < len(steps) and steps[step + 1][0] == block:
            return
        order = list(self.steps)
        following = order[order.index(who) + 1 :]
        with self.changed:
            self.turn = (following[0], block) if following else (order[0], block + 1)
            if not following:
                self._end_block()
            self.changed.notify_all()

    def _end_block(self) -> None:
        if self.on_block is not None:
            self.on_block()
        took = time.perf_counter() - self._block_began
        self._block_began = time.perf_counter()
        self.is_over = self.deadline.is_over(needed=took)

    def lengths(self, who: str, step: int) -> list[int]:
        profile_name, block = self.blocks[self.block_of(who, step)]
        rng = random.Random(f"{profile_name} {block}")
        lengths = PROFILES[profile_name](rng, self.batch.completions, self.batch.cap)
        random.Random(block).shuffle(lengths)
        return lengths

    def fraction(self, who: str, step: int) -> float:
        return self.steps[who][step][1].fraction


class Timed:
    """Times updates: optimizer steps without generation and rewards."""

    who: str
    plan: Plan

    def _generate_and_score_completions(self, inputs):
        synchronize()
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        synchronize()
        self.generating += time.perf_counter() - started
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return output


class TimedTRL(Timed, GRPOTrainer):
    who = "trl"


class WithEntropies:
    """Adds entropies to the rollouts of arms that know them."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.plan.steps[self.who][self.state.global_step][1].knows_entropies:
            output[ENTROPIES] = output["completion_mask"].float()
        return output


class TimedOurs(Timed, WithEntropies, GXPOTrainer):
    who = "ours"


class TimedIterations(Timed, WithEntropies, LookaheadTrainer):
    who = "iterated"


TRAINERS = {
    "trl": (TimedTRL, GRPOConfig, {}),
    "ours": (TimedOurs, GXPOConfig, {}),
    "iterated": (TimedIterations, LookaheadConfig, {"update_rule": "grpo", "num_iterations": ITERATIONS}),
}


class TakeTurns(TrainerCallback):
    """Waits for the turn, sets up the arm, and takes the time and the peak."""

    def __init__(self, plan: Plan):
        self.plan, self.trainer, self.seconds, self.peaks = plan, None, [], []
        self.layouts = make_layouts(plan.batch)
        configs = {"gxpo": GXPOConfig, "sfpo": SFPOConfig}
        self.rules = {
            arm: configs[arm.rule](
                "out",
                lookahead_steps=arm.steps,
                snapshot_device="cpu" if arm.copies_on_host else "model",
                use_cpu=True,
                bf16=False,
            ).lookahead_rule()
            for _, arm in plan.steps.get("ours", [])
            if arm.rule in configs
        }

    def on_step_begin(self, args, state, control, **kwargs):
        gradient_state = self.trainer.accelerator.gradient_state  # one for all trainers of a process
        syncs = gradient_state.sync_gradients
        self.plan.wait_for(self.trainer.who, state.global_step)
        gradient_state._set_sync_gradients(syncs)  # the others have left their last micro-batch's
        if self.trainer.who != "trl":
            self._set_up(self.plan.steps[self.trainer.who][state.global_step][1])
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        self.trainer.generating, self.began = 0.0, time.perf_counter()

    def _set_up(self, arm: Arm) -> None:
        lookahead = self.trainer.lookahead
        lookahead.layout.compaction = self.layouts[arm.layout]
        lookahead.gate.active = arm in self.rules
        if arm in self.rules:
            lookahead.rule = self.rules[arm]

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.began - self.trainer.generating)
        if torch.cuda.is_available():
            self.peaks.append(torch.cuda.max_memory_allocated() - self.held)
        self.plan.hand_over(self.trainer.who, state.global_step - 1)


def make_model(trained: Trained, tokenizer):
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if trained.shape is not None:
        return random_model(trained.shape, best_attention(), **tokens)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=True,
            **tokens,
        )
    )


def build(who: str, plan: Plan, trained: Trained, tokenizer, output: Path):
    batch = plan.batch
    trainer_class, config_class, settings = TRAINERS[who]

    def rollouts(prompts, trainer) -> dict:
        lengths = plan.lengths(trainer.who, trainer.state.global_step)
        rng = random.Random(0)
        return {
            "prompt_ids": [[rng.randrange(3, 100) for _ in range(batch.prompt_length)] for _ in prompts],
            "completion_ids": [[rng.randrange(3, 100) for _ in range(length)] for length in lengths],
            "logprobs": None,
        }

    def reward(completions, trainer_state, **kwargs) -> list[float]:
        worthless = round(batch.groups * plan.fraction(who, trainer_state.global_step))
        rng = random.Random(trainer_state.global_step)
        return [0.0 if i // batch.group_size < worthless else rng.random() for i in range(len(completions))]

    lora = LoraConfig(
        r=128, lora_alpha=256, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    turns = TakeTurns(plan)
    trainer = trainer_class(
        make_model(trained, tokenizer),
        reward,
        config_class(
            str(output / who),
            max_steps=len(plan.steps[who]),
            per_device_train_batch_size=batch.rows,
            gradient_accumulation_steps=batch.completions // batch.rows,
            num_generations=batch.group_size,
            max_completion_length=batch.cap,
            loss_type="grpo",
            learning_rate=1e-6,
            use_cpu=not torch.cuda.is_available(),
            bf16=trained.shape is not None and torch.cuda.is_available(),
            gradient_checkpointing=trained.gradient_checkpointing,
            report_to="none",
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["none"] * batch.groups}),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[turns],
        peft_config=None if trained.shape is None else lora,
    )
    trainer.remove_callback(PrinterCallback)
    turns.trainer, trainer.plan = trainer, plan
    return trainer, turns


def take_turns(plan: Plan, trained: Trained, output: Path) -> dict[str, TakeTurns]:
    """What each trainer's updates took, by trainer."""
    tokenizer = build_tokenizer()
    built = {who: build(who, plan, trained, tokenizer, output) for who in plan.steps}
    turns = {who: of_trainer for who, (_, of_trainer) in built.items()}
    if plan.on_block is not None:
        plan.on_block = lambda on_block=plan.on_block: on_block(turns)
    errors = []

    def train(trainer) -> None:
        try:
            trainer.train()
        except PlanIsOver:
            pass
        except BaseException as error:
            errors.append(error)
            with plan.changed:
                plan.failed = True
                plan.changed.notify_all()

    threads = [threading.Thread(target=train, args=(trainer,)) for trainer, _ in built.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return turns


def peak_memory(output: Path, only: Arm, who: str, trained: Trained, batch: Batch) -> int:
    """The most that one update of an arm holds above what it started with, in bytes, on a CPU."""
    plan = Plan(["log-normal"], 2, batch=batch)
    plan.wait_for = plan.hand_over = lambda *_: None
    plan.steps = {who: [(0, only)] * 2}
    trainer, turns = build(who, plan, trained, build_tokenizer(), output)
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


def scoring_ratios(output: Path, blocks: int) -> list[float]:
    """Seconds of scoring the completions of a block, without a gradient, over those that TRL takes for it."""
    plan = Plan(["log-normal"], blocks)
    trainers = {who: build(who, plan, Trained(), build_tokenizer(), output)[0] for who in ("trl", "ours")}
    ratios = []
    for block in range(blocks):
        seconds = {}
        for who, trainer in trainers.items():
            trainer.generating = 0.0
            trainer.state.global_step = plan.steps[who].index(next(s for s in plan.steps[who] if s[0] == block))
            batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * plan.batch.completions)
            ids, mask = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], 1) for n in ("ids", "mask"))
            started = time.perf_counter()
            with torch.no_grad():
                trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, batch["completion_ids"].size(1), batch_size=plan.batch.rows
                )
            seconds[who] = time.perf_counter() - started
        ratios.append(seconds["ours"] / seconds["trl"])
    return ratios[1:]


def by_block(plan: Plan, turns: dict[str, TakeTurns]) -> dict[tuple[str, int, Arm], tuple[float, int | None]]:
    """Seconds and peak bytes of each trainer's arms, by trainer, block and arm; over the optimizer steps of each."""
    found: dict[tuple[str, int, Arm], tuple[float, int | None]] = {}
    for who, of_trainer in turns.items():
        peaks = of_trainer.peaks or [None] * len(of_trainer.seconds)
        for (block, arm), seconds, peak in zip(plan.steps[who], of_trainer.seconds, peaks, strict=False):
            before, highest = found.get((who, block, arm), (0.0, None))
            found[who, block, arm] = (before + seconds, peak if highest is None else max(peak, highest))
    return found


def summarize(plan: Plan, turns: dict[str, TakeTurns]) -> list[dict]:
    """One row an arm, over the blocks in which it and TRL's have been measured; the first of a profile warms up."""
    measured, rows = by_block(plan, turns), {}
    for (who, block, arm), (seconds, peak) in measured.items():
        profile_name, number = plan.blocks[block]
        if who != "trl" and number > 0:
            base, base_peak = measured["trl", block, STOCK]
            rows.setdefault((profile_name, arm), []).append((seconds / base, seconds, peak, base_peak))
    return [
        {
            "profile": profile_name,
            "update": arm.name,
            "layout": arm.full_layout,
            "zero_advantage_fraction": arm.fraction,
            "ratio": statistics.median(ratio for ratio, *_ in values),
            "min": min(ratio for ratio, *_ in values),
            "max": max(ratio for ratio, *_ in values),
            "blocks": len(values),
            "seconds": statistics.median(seconds for _, seconds, *_ in values),
            **(
                {}
                if values[0][2] is None
                else {
                    "peak_bytes": statistics.median(peak for *_, peak, _ in values),
                    "peak_ratio": statistics.median(peak / base for *_, peak, base in values),
                }
            ),
        }
        for (profile_name, arm), values in rows.items()
    ]


def seconds_of_trl(plan: Plan, turns: dict[str, TakeTurns]) -> dict[str, float]:
    """TRL's own updates, by profile; the first block of each is left out unless it is the only one."""
    measured: dict[str, list[float]] = {}
    for (name, _), seconds in zip(plan.blocks, turns["trl"].seconds, strict=False):
        measured.setdefault(name, []).append(seconds)
    return {name: statistics.median(values[1:] or values) for name, values in measured.items()}


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

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
        axis.set_xlabel("fraction of groups with equal rewards")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("update time, TRL's GRPO = 1")
    for style, label in ((":", "TRL's layout"), ("--", "sorted, trimmed"), ("-", "and pruned")):
        axes[0][-1].plot([], [], color="black", linestyle=style, label=label)
    axes[0][-1].legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def show(rows: list[dict]) -> None:
    for row in rows:
        row_name = f"{row['profile']:14} {row['update']:28} {row['layout']:24} {row['zero_advantage_fraction']:.1f}"
        peak = f", peak {row['peak_ratio']:.2f} × TRL's" if "peak_ratio" in row else ""
        print(f"{row_name}  {row['ratio']:.2f} × TRL  ({row['min']:.2f}-{row['max']:.2f}){peak}")


def rows_that_fit() -> int:
    """Completions of a micro-batch: 8 on a GPU of 70 GiB, which holds the logits of their tokens several times."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
    return 8 if memory >= 70 else 4 if memory >= 38 else 2


def measure_shape(options: argparse.Namespace, output: Path) -> None:
    """A random model of a real size. Each block is written as soon as it is there."""
    batch = replace(AS_TRAINED, rows=options.rows or rows_that_fit())
    if options.shape == "tiny":
        batch = Batch(groups=4, group_size=4, cap=48, prompt_length=16, rows=4)
    trained = Trained(options.shape, options.gradient_checkpointing)
    about = {"shape": options.shape, "gradient_checkpointing": options.gradient_checkpointing}
    about |= {"batch": vars(batch), "attention": best_attention(), **describe_machine(options.threads)}
    peaks = {}

    def write(turns) -> None:
        result = {"trl_seconds": seconds_of_trl(plan, turns), "rows": summarize(plan, turns), **peaks, **about}
        save_result(f"update_cost_{options.shape}", result, options.result)

    deadline = Deadline(options.seconds)
    plan = Plan(["log-normal"], options.blocks, lambda _: ON_A_GPU, SEVERAL_ITERATIONS, batch, deadline, write)
    turns = take_turns(plan, trained, output)
    if not torch.cuda.is_available():
        pruned = ON_A_GPU[0]
        found = {"trl": peak_memory(output, STOCK, "trl", trained, batch)}
        found["gxpo"] = peak_memory(output, pruned, "ours", trained, batch)
        peaks["peak_bytes"] = found
        write(turns)
    show(summarize(plan, turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each profile; the first warms up")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, help="a random model of this size with LoRA")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--rows", type=int, help="completions of a micro-batch, with --shape; unset for what fits")
    parser.add_argument("--seconds", type=float, help="begin no block that would end later, with --shape")
    parser.add_argument("--result", type=Path, help="the file that is written, with --shape")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)

    output = Path("out/benchmarks/update_cost")
    if options.shape is not None:
        measure_shape(options, output)
        return
    plan = Plan(list(PROFILES), options.blocks)
    if options.bars:
        plan = Plan(["log-normal"], 9, lambda profile_name: BARS)
    trained = Trained()
    turns = take_turns(plan, trained, output)
    rows = summarize(plan, turns)
    pruned = Arm("gxpo", 5, "compact, pruned", 0.5)
    peaks = {"trl": peak_memory(output, STOCK, "trl", trained, BATCH)}
    peaks["gxpo"] = peak_memory(output, pruned, "ours", trained, BATCH)
    show(rows)
    print(f"peak memory of an update: TRL {peaks['trl'] / 2**20:.0f} MiB, GXPO {peaks['gxpo'] / 2**20:.0f} MiB")
    result = {"trl_seconds": seconds_of_trl(plan, turns), "peak_bytes": peaks, "rows": rows}
    if options.bars:
        ratios = sorted(scoring_ratios(output, 9))
        result["scoring"] = {"ratio": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
        print(
            f"scoring {BATCH.completions} completions: {{ratio:.2f}} × TRL ({{min:.2f}}-{{max:.2f}})".format(
                **result["scoring"]
            )
        )
    result |= describe_machine(options.threads)
    name = "update_cost_bars" if options.bars else "update_cost"
    if not options.bars:
        draw(rows, RESULTS / f"{name}.png")
    print(f"written to {save_result(name, result)}")


if __name__ == "__main__":
    main()
