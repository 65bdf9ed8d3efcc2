"""One rank of a two-process launch that runs many jobs, one after the other, on many engines.

torchrun --nproc_per_node 2 tests/engine_worker.py JOBS.json

Each job is saved as soon as it is done; what a launch is judged by are these files.
"""

import json
import logging
import math
import os
import sys
import traceback
from pathlib import Path

import conftest  # noqa: F401  offline, as the tests are
import cpu_engines


cpu_engines.install()

import torch  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from deepspeed.runtime.zero import GatheredParameters  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from helpers import (  # noqa: E402
    RisingGateTrainer,
    compute_in_float64,
    double_model,
    half_without_spread,
    make_trainer,
    odd_model,
    tiny_model,
)
from peft import LoraConfig  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadTrainer, SFPOConfig, SFPOTrainer  # noqa: E402
from gxpo_trl.update.algorithm import lookahead_step  # noqa: E402
from gxpo_trl.update.snapshot import Origin  # noqa: E402


class PoisonedOnOneRankTrainer(GXPOTrainer):
    """Rank 1 sees a loss that is not a number, in one pass of the second step."""

    poisoned_pass = 2
    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step != 1:
            return loss
        self.calls += 1
        poisoned = self.calls == 2 * self.poisoned_pass - 1 and self.accelerator.process_index == 1
        return loss * float("nan") if poisoned else loss


class PoisonedFromTheStartTrainer(PoisonedOnOneRankTrainer):
    poisoned_pass = 1


class PoisonedAtTheEndTrainer(PoisonedOnOneRankTrainer):
    poisoned_pass = 3


class Warnings(logging.Handler):
    """What the package has warned of since the last look."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        logging.getLogger("gxpo_trl").addHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        messages, self.messages = self.messages, []
        return messages


def state_of(trainer):
    """Where the parameters are; `None` of TRL's own trainer, and of a run that never was active."""
    lookahead = getattr(trainer, "lookahead", None)
    return None if lookahead is None or lookahead.engine is None else lookahead.engine.state


class Watching(TrainerCallback):
    """Notes how far each step moves the parameters of this rank."""

    def __init__(self):
        self.trainer, self.before, self.moved = None, None, []

    def on_step_end(self, *args, **kwargs):
        state = state_of(self.trainer)
        after = None if state is None else [p.clone() for p in state.parameters()]
        if self.before is not None:
            pairs = zip(after, self.before, strict=True)
            self.moved.append(max((a - b).abs().max().item() for a, b in pairs if a.numel()))
        self.before = after


class CountingEveryCollective:
    """Notes the collective operations of the ranks, and how many numbers each moves."""

    def __enter__(self):
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True).__enter__()
        return self

    def __exit__(self, *exception):
        self.profiler.__exit__(*exception)
        events = [event for event in self.profiler.events() if event.name.startswith("c10d::")]
        self.calls = [
            (event.name, max((math.prod(shape) for shape in event.input_shapes if shape), default=0))
            for event in events
        ]


TRAINERS = {
    "gxpo": (GXPOTrainer, GXPOConfig),
    "plain": (LookaheadTrainer, GXPOConfig),
    "sfpo": (SFPOTrainer, SFPOConfig),
    "trl": (GRPOTrainer, GRPOConfig),
    "rising gate": (RisingGateTrainer, GXPOConfig),
    "poisoned in pass 1": (PoisonedFromTheStartTrainer, GXPOConfig),
    "poisoned in pass 2": (PoisonedOnOneRankTrainer, GXPOConfig),
    "poisoned in pass 3": (PoisonedAtTheEndTrainer, GXPOConfig),
}
MODELS = {"tiny": tiny_model, "odd": odd_model, "double": double_model}


def full_parameters(trainer) -> dict[str, torch.Tensor]:
    """The trainable parameters, whole, as the next forward pass would read them; in fp32 those that are stepped."""
    in_bf16 = trainer.args.bf16 and trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    parameters = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
        if not p.requires_grad:
            continue
        if isinstance(p, DTensor):
            parameters[name] = p.detach().full_tensor().clone()
        elif in_bf16:
            parameters[name] = safe_get_full_fp32_param(p).detach().clone()
        elif hasattr(p, "ds_id"):
            with GatheredParameters([p]):
                parameters[name] = p.detach().clone()
        else:
            parameters[name] = p.detach().clone()
    return parameters


def build(job: dict, folder: Path, **overrides):
    settings = {**cpu_engines.choose(job["engine"]), "use_cpu": job["engine"].startswith("ddp"), "ddp_backend": "gloo"}
    trainer_class, config_class = TRAINERS[job.get("trainer", "gxpo")]
    lora = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False) if job.get("lora") else None
    torch.manual_seed(0)
    watching = Watching()
    watching.trainer = make_trainer(
        folder,
        trainer_class,
        config_class,
        model=MODELS[job.get("model", "odd")](),
        peft_config=lora,
        callbacks=[watching],
        reward=half_without_spread if job.get("prunes") else None,
        **{**settings, "ddp_timeout": 120, **job["settings"], **overrides},
    )
    watching.trainer.watching = watching
    return watching.trainer


def outcome(trainer) -> dict:
    result = {"parameters": full_parameters(trainer), "log": trainer.state.log_history}
    result["wrapped"] = type(trainer.model_wrapped).__name__
    result["optimizer"] = type(getattr(trainer.model_wrapped, "optimizer", None)).__name__
    if (state := state_of(trainer)) is None:  # a plain run
        return result
    return result | {
        "engine": type(state).__name__,
        "master_dtype": state.parameters()[0].dtype,
        "moved": trainer.watching.moved,  # from the first step on
        "passes": trainer.backward_passes,
        "gate": trainer.lookahead.gate.state_dict(),
    }


def close(trainer) -> None:
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.model_wrapped.destroy()


def train(job: dict, folder: Path) -> dict:
    trainer = build(job, folder)
    trainer.train()
    result = outcome(trainer)
    close(trainer)
    return result


def train_and_resume(job: dict, folder: Path) -> dict:
    """An uninterrupted run that saves half way, its model as it is saved at the end, and a run resumed half way."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = build(job, folder, **saving)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    result = {"uninterrupted": outcome(trainer)}
    close(trainer)
    trainer = build(job, folder, **saving)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    result["resumed"] = outcome(trainer)
    close(trainer)
    return result


def count_communication(job: dict, folder: Path) -> dict:
    """The collectives of an active update and of a plain one, on the engine that a run of one step leaves."""
    trainer = build(job, folder)
    trainer.train()
    engine, model, rule = trainer.lookahead.engine, trainer.model_wrapped, trainer.lookahead.rule
    state, passes = engine.state, engine.passes
    tokens = torch.arange(48).view(2, 2, 12)

    def one_pass():
        for i, micro_batch in enumerate(tokens):
            with passes.micro_batch(last=i == 1):
                passes.backward(model(input_ids=micro_batch, labels=micro_batch).loss / 2)

    def plain_update(active: bool = False):
        one_pass()
        if active:
            lookahead_step(state, one_pass, rule)
        passes.finish()
        if state.accelerator.distributed_type != DistributedType.DEEPSPEED:  # as the training loop does
            state.clip_gradients()
            state.step()
            state.clear_gradients()

    one_pass()
    origin = Origin.of(state)
    state.clear_gradients()
    counted = {"trainable": state.coordinates(), "bytes": sum(t.nbytes for t in origin.theta_0 + origin.grad_0)}
    for name, active in (("plain", False), ("active", True)):
        plain_update(active)  # what is lazily made is there
        with CountingEveryCollective() as counting:
            plain_update(active)
        counted[name] = counting.calls
    close(trainer)
    return counted


def sample(job: dict, folder: Path) -> dict:
    """Greedy completions after a step, of more and longer ones on rank 1; and the parameters they come from."""
    trainer = build(job, folder)
    trainer.train()
    rank = trainer.accelerator.process_index
    questions = [row["prompt"] for row in trainer.train_dataset.select(range(2 + 8 * rank)) for _ in range(2)]
    prompts = trainer._tokenize_prompts(questions)[0]
    completions, _ = trainer._generate_single_turn(prompts, None, {}, 2)
    result = {"prompts": prompts, "completions": completions, "parameters": full_parameters(trainer)}
    close(trainer)
    return result


KINDS = {"sample": sample, "communication": count_communication, "resume": train_and_resume, "train": train}


def main() -> None:
    compute_in_float64()
    warnings = Warnings()
    jobs_file = Path(sys.argv[1])
    for job in json.loads(jobs_file.read_text()):
        folder = jobs_file.parent / job["name"]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = KINDS[job.get("kind", "train")](job, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result | {"warnings": warnings.take()}, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
