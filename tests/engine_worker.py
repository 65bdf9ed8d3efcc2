"""One rank of a two-process launch that runs many jobs, one after the other, on many engines.

torchrun --nproc_per_node 2 tests/engine_worker.py JOBS.json

Each job is saved as soon as it is done; what a launch is judged by are these files. With GPUs it runs on these, over
NCCL, with any number of processes; `benchmarks/engines.py` starts it there. DeepSpeed may then be missing.
"""

import importlib.util
import itertools
import json
import logging
import math
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import conftest  # offline, as the tests are
import cpu_engines


cpu_engines.install()

import torch  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
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
from vllm_stand_in import standing_in  # noqa: E402
from waits import WatchingOneStep  # noqa: E402

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadTrainer, SFPOConfig, SFPOTrainer  # noqa: E402
from gxpo_trl.engines.bf16_optimizer import BF16OptimizerState  # noqa: E402
from gxpo_trl.update.algorithm import lookahead_step  # noqa: E402
from gxpo_trl.update.snapshot import Origin  # noqa: E402
from gxpo_trl.update.step_control import StepControl, Verdict  # noqa: E402


if importlib.util.find_spec("deepspeed") is not None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param
ON_GPUS = torch.cuda.is_available()


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


def poison(state) -> None:
    """Puts what is not a number where a pass has left its reduced gradient, on this rank."""
    zero = getattr(state, "zero", None)
    if zero is None:
        gradient = next(g for g in state.gradients() if g is not None and g.numel())
    elif isinstance(state, BF16OptimizerState):
        gradient = zero.fp32_groups_gradients_flat[0]  # its beginning is the partition of rank 0
    elif getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        gradient = state.optimized()[0].grad
    else:
        gradient = zero.averaged_gradients[0][0]
    gradient[(0,) * gradient.dim()] = math.nan


class PoisonedAfterReductionTrainer(GXPOTrainer):
    """Rank 1 alone has a gradient that is not a number, after one pass of the second step."""

    poisoned_pass = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        take_step = self.lookahead._take_step

        def take_poisoned_step(replay):
            passes = itertools.count(1)

            def after(one_pass):
                one_pass()
                if (self.state.global_step, next(passes), self.accelerator.process_index) == (
                    1,
                    self.poisoned_pass,
                    1,
                ):
                    poison(self.lookahead.engine.state)

            after(lambda: None)  # pass 1 has been made
            return take_step(lambda: after(replay))

        self.lookahead._take_step = take_poisoned_step


class PoisonedAfterReductionFromTheStartTrainer(PoisonedAfterReductionTrainer):
    poisoned_pass = 1


class PoisonedAfterReductionAtTheEndTrainer(PoisonedAfterReductionTrainer):
    poisoned_pass = 3


class MatricesOnlyTrainer(GXPOTrainer):
    """The optimizer holds the matrices, as Muon does. Norms and biases get gradients that are clipped too."""

    def create_optimizer(self, *args, **kwargs):
        matrices = [p for p in self.model.parameters() if getattr(p, "ds_shape", p.shape).numel() > 131]
        self.optimizer = torch.optim.AdamW(matrices, lr=self.args.learning_rate, eps=self.args.adam_epsilon)
        return self.optimizer


class ClosedGateTrainer(GXPOTrainer):
    """Plain steps from the first on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lookahead.gate.active = False


class BrokenTrainer(GXPOTrainer):
    """Raises on every rank in the second step: at the end of its last pass, or when TRL is to clip and step."""

    place = "_clip_grad_norm"

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls = getattr(self, "calls", 0) + (self.state.global_step == 1)
        return self._break_off(loss) if self.place == "compute_loss" and self.calls == 6 else loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        return self._break_off(norm) if self.place == "_clip_grad_norm" and self.state.global_step == 1 else norm

    def _break_off(self, result):
        raise KeyboardInterrupt


class BrokenInAReplayTrainer(BrokenTrainer):
    place = "compute_loss"


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
    "matrices only": (MatricesOnlyTrainer, GXPOConfig),
    "plain": (LookaheadTrainer, GXPOConfig),
    "sfpo": (SFPOTrainer, SFPOConfig),
    "trl": (GRPOTrainer, GRPOConfig),
    "rising gate": (RisingGateTrainer, GXPOConfig),
    "closed gate": (ClosedGateTrainer, GXPOConfig),
    "broken before the step": (BrokenTrainer, GXPOConfig),
    "broken in pass 3": (BrokenInAReplayTrainer, GXPOConfig),
    "poisoned in pass 1": (PoisonedFromTheStartTrainer, GXPOConfig),
    "poisoned in pass 2": (PoisonedOnOneRankTrainer, GXPOConfig),
    "poisoned in pass 3": (PoisonedAtTheEndTrainer, GXPOConfig),
    "poisoned after pass 1": (PoisonedAfterReductionFromTheStartTrainer, GXPOConfig),
    "poisoned after pass 2": (PoisonedAfterReductionTrainer, GXPOConfig),
    "poisoned after pass 3": (PoisonedAfterReductionAtTheEndTrainer, GXPOConfig),
}
MODELS = {
    "tiny": tiny_model,
    "odd": odd_model,
    "double": double_model,
    "odd in bf16": lambda: odd_model().to(torch.bfloat16),
}


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
    settings = {**cpu_engines.choose(job["engine"]), "use_cpu": job["engine"].startswith("ddp") and not ON_GPUS}
    settings["ddp_backend"] = "nccl" if ON_GPUS else "gloo"
    trainer_class, config_class = TRAINERS[job.get("trainer", "gxpo")]
    lora = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False) if job.get("lora") else None
    settings |= {"ddp_timeout": 120, **job["settings"], **overrides}
    torch.manual_seed(0)
    model = MODELS[job.get("model", "odd")]()
    if ends := (settings.get("generation_kwargs") or {}).get("eos_token_id"):
        model.generation_config.eos_token_id = ends  # from where TRL knows them
    watching = Watching()
    watching.trainer = make_trainer(
        folder,
        trainer_class,
        config_class,
        model=model,
        peft_config=lora,
        callbacks=[watching],
        reward=half_without_spread if job.get("prunes") else None,
        **settings,
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
        "stepped": state.coordinates(),
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


class Multiplier(TrainerCallback):
    """Sets the multiplier of the learning rate before the first step, which searches for none then, or after some."""

    def __init__(self, trainer, at_first: float, after: dict[int, float]):
        self.trainer, self.values = trainer, {0: at_first, **after}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.values:
            control = self.trainer.lookahead.control
            control.multiplier, control.searches_left = self.values[state.global_step], 0


def train_multiplied(job: dict, folder: Path, at_first: float, after=None, **settings) -> dict:
    trainer = build(job, folder, step_control="cosine", **settings)
    trainer.add_callback(Multiplier(trainer, at_first, after or {}))
    trainer.train()
    optimizer = trainer.lookahead.engine.state.base_optimizer
    result = outcome(trainer) | {"rates": [float(group["lr"]) for group in optimizer.param_groups]}
    close(trainer)
    return result | {"control": trainer.lookahead.control.state_dict()}


def scale_rates(job: dict, folder: Path) -> dict:
    """A run whose multiplier is 0.3 throughout, its gate closing on the way, and one at 0.3 times its rate."""
    result = {"multiplied": train_multiplied(job, folder, 0.3, step_control_gain=0.0)}
    settings = {**job["settings"], "learning_rate": 0.3 * job["settings"]["learning_rate"]}
    return result | {"plain": train({**job, "settings": settings}, folder)}


def take_back(job: dict, folder: Path) -> dict:
    """A run whose steps are all taken back, whatever their cosines, and one that makes plain steps instead."""

    def judge(control, cosine, repeatable=True):
        control.steps_taken_back += 1
        control.multiplier /= 4
        return Verdict.PLAIN

    with patch.object(StepControl, "judge", judge):
        result = {"taken back": train_multiplied(job, folder, 1.0, {1: 1.0})}
    settings = {**job["settings"], "learning_rate": job["settings"]["learning_rate"] / 4}
    return result | {"plain": train({**job, "trainer": "closed gate", "settings": settings}, folder)}


def find_length(job: dict, folder: Path) -> dict:
    """A step whose length was found by trying others first, and one at that multiplier from the beginning, by rule."""
    two_passes = {"update_rule": "gxpo", "lookahead_steps": 1}
    checked = {"update_rule": "check", "gradient_accumulation_steps": 2}
    result = {}
    for rule, settings in {"two passes": two_passes, "check": checked}.items():
        trainer = build(job, folder, step_control="cosine", **settings)
        trainer.train()
        found = outcome(trainer)
        control = trainer.lookahead.control.state_dict()
        close(trainer)
        at_once = train_multiplied(
            job, folder, found["log"][0]["lookahead/step_multiplier"], step_control_gain=0.0, **settings
        )
        result[rule] = {"found": found, "control": control, "at once": at_once}
    return result


def check_steps(job: dict, folder: Path) -> dict:
    """Runs of *check*, with gain and without, and of the plain rule."""
    settings = job["settings"]
    return {
        "checked": train(job, folder),
        "without gain": train({**job, "settings": {**settings, "step_control_gain": 0.0}}, folder),
        "plain": train({**job, "settings": {**settings, "update_rule": "grpo"}}, folder),
    }


def break_off(job: dict, folder: Path) -> dict:
    """A run that fails in its second step: its weights, as they are saved too, and those after one step and two."""
    result = {}
    for name, steps in (("after one step", 1), ("after two steps", 2)):
        trainer = build({**job, "trainer": "gxpo"}, folder, max_steps=steps)
        trainer.train()
        result[name] = full_parameters(trainer)
        close(trainer)
    trainer = build(job, folder)
    try:
        trainer.train()
    except KeyboardInterrupt:
        trainer.save_model(str(folder / "saved"))
    result |= {"steps": trainer.state.global_step, "parameters": full_parameters(trainer)}
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
            norm = state.accelerator.clip_grad_norm_(model.parameters(), state.max_grad_norm)
            (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # which is logged
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


def watch_waits(job: dict, folder: Path) -> dict:
    """Where the third step of a run waits for the accelerator."""
    trainer = build(job, folder)
    watching = WatchingOneStep(2)
    trainer.add_callback(watching)
    trainer.train()
    close(trainer)
    return {"reads": watching.reads, "warned": watching.warned, "runtime": watching.runtime}


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


def synchronise(job: dict, folder: Path) -> dict:
    """What a stand-in for vLLM is sent after a run and 30 synchronisations more, and all parameters before these."""
    with standing_in():
        trainer = build(job, folder, use_vllm=True, vllm_importance_sampling_correction=False)
        trainer.train()
        result = {"before": every_parameter(trainer)}
        for _ in range(30):
            trainer.vllm_generation.sync_weights()
    result |= {"after": every_parameter(trainer), "sent": trainer.vllm_generation.llm.weights}
    result["synchronisations"] = trainer.vllm_generation.llm.synchronisations
    close(trainer)
    return result


def every_parameter(trainer) -> dict[str, torch.Tensor]:
    """Frozen ones too, whole, as the next forward pass would read them."""
    parameters = {}
    for name, p in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
        with GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            parameters[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return parameters


KINDS = {
    "waits": watch_waits,
    "synchronise": synchronise,
    "scale": scale_rates,
    "take back": take_back,
    "find": find_length,
    "check": check_steps,
    "break off": break_off,
    "sample": sample,
    "communication": count_communication,
    "resume": train_and_resume,
    "train": train,
}


def main() -> None:
    compute_in_float64()
    conftest.set_modules_aside()
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
