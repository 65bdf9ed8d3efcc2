"""What the tests of the trainer share: small trainers, scripted rollouts, and a look at what happened."""

import dataclasses
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer, RLOOTrainer

from gxpo_trl import GXPOConfig, LookaheadTrainer, sample_in_groups
from gxpo_trl.callbacks.benchmarks import BenchmarkCallback
from gxpo_trl.callbacks.hub import HubCallback
from gxpo_trl.callbacks.records import RunRecordCallback
from gxpo_trl.callbacks.trackers import TrackerCallback
from gxpo_trl.callbacks.trajectories import TrajectoryCallback
from gxpo_trl.tasks import TINY_MODEL_PATH, arithmetic_reward, load_arithmetic
from gxpo_trl.trainer import methods


torch.set_num_threads(1)

TINY_BATCH = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 3,
}
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "loss_type": "grpo",
}

# Large steps and a tight clip: the gradient and the ratio are both clipped. A large eps keeps AdamW well-conditioned
# where gradients are nearly 0, so that rounding does not decide.
METHOD = {"learning_rate": 3e-4, "max_grad_norm": 0.5, "epsilon": 0.05, "adam_epsilon": 1e-3, "weight_decay": 0.0}


AS_TRL = {"compact_batches": False}
"""Rollouts are laid out by TRL alone, which samples them too: what is left to compare is the update."""


class Recording:
    """Keeps the rollouts that the loss was computed on, pass by pass."""

    def __init__(self, *args, **kwargs):
        self.slices, self.loss_inputs, self.backward_calls = [], [], 0
        super().__init__(*args, **kwargs)
        backward = self.accelerator.backward

        def counting_backward(*args, **kwargs):
            self.backward_calls += 1
            return backward(*args, **kwargs)

        self.accelerator.backward = counting_backward

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            self.slices.append(inputs)
        return inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.loss_inputs.append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def windows(self) -> list[list[dict]]:
        size = self.args.gradient_accumulation_steps
        return [self.slices[i : i + size] for i in range(0, len(self.slices), size)]


class RisingGate:
    """The gate is shown a signal that rises at every step: it trips as soon as the warm-up lets it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        gate = self.lookahead.gate
        observe = gate.observe
        gate.observe = lambda value: observe(float(gate.observed))


class RisingGateTrainer(RisingGate, LookaheadTrainer):
    pass


def compute_in_float64(setattr=setattr) -> None:
    """Replaces TRL's fused fp32 head: a float64 model is then computed in float64 throughout.

    Comparisons of two computations need it. In fp32 some token's ratio lies so close to its bound that rounding
    decides on which side it falls, and with it the gradient.
    """

    def logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
        logps = logits.log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1) if compute_entropy else None
        return logps.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0], entropies, None

    for trainer_class in (GRPOTrainer, RLOOTrainer):
        patch_trl(trainer_class, "_get_per_token_logps_and_entropies", logps_and_entropies, setattr)


def patch_trl(trainer_class, name: str, function, setattr=setattr) -> None:
    """Replaces a method in a class of TRL's, and lets it count as TRL's: what is patched is not compacted else."""
    setattr(trainer_class, name, function)
    setattr(methods, "LIBRARIES", methods.LIBRARIES | {function.__globals__["__name__"].partition(".")[0]})


def double_model() -> AutoModelForCausalLM:
    return tiny_model(dtype=torch.float64)


def odd_model() -> LlamaForCausalLM:
    """Parameters that no two ranks can share evenly, with biases, so that there are two param groups."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 66, "intermediate_size": 131, "num_hidden_layers": 2, "num_attention_heads": 3}
    tokens = len(AutoTokenizer.from_pretrained(TINY_MODEL_PATH))
    config = LlamaConfig(vocab_size=tokens, num_key_value_heads=1, mlp_bias=True, initializer_range=0.1, **sizes)
    return LlamaForCausalLM(config)


def tiny_model(**overrides) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, **overrides)


def scripted_rollouts(prompts, trainer) -> dict:
    """Completions that depend on the prompt alone, not on the policy: runs with other updates then see the same."""
    tokenizer = trainer.processing_class
    completions = []
    for i, prompt in enumerate(prompts):
        rng = random.Random(f"{prompt[-1]['content']} {i % trainer.num_generations}")
        tokens = [rng.randrange(3, len(tokenizer)) for _ in range(rng.randint(2, trainer.max_completion_length - 1))]
        completions.append([*tokens, tokenizer.eos_token_id])
    prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}


def text_reward(completions, **kwargs) -> list[float]:
    """A reward in [0, 1) that depends on the completion's text alone."""
    return [random.Random(completion[0]["content"]).random() for completion in completions]


def half_without_spread(prompts, completions, **kwargs) -> list[float]:
    """The same, but for about half of the prompts, whose completions all get one reward."""
    worthless = [random.Random(prompt[-1]["content"]).random() < 0.5 for prompt in prompts]
    return [1.0 if w else reward for w, reward in zip(worthless, text_reward(completions), strict=True)]


def make_trainer(
    output_dir: Path,
    trainer_class=LookaheadTrainer,
    config_class=GXPOConfig,
    model=None,
    scripted: bool = True,
    reward=None,
    rollout_func=scripted_rollouts,
    peft_config=None,
    callbacks=None,
    optimizers=(None, None),
    rule=None,
    generation_backend: str | None = None,
    generation_token_budget: int | None = None,
    records: bool = False,
    eval_benchmarks: list[str] | None = None,
    eval_samples: int = 4,
    eval_prompt: str | None = None,
    trajectory_steps: int | None = None,
    **settings,
):
    """A trainer on the embedded model; with scripted rollouts, or sampled ones and the task's own reward.

    `rule` changes the update rule beyond what settings can. It samples in groups where `generation_backend` or a
    budget asks for it.
    """
    dataset = load_arithmetic(train_size=64, test_size=16)
    if not scripted:
        settings.setdefault("max_completion_length", 28)  # room for a worked answer, so that some are right
    settings = {**ON_CPU, **TINY_BATCH, **settings}
    if "loss_type" not in config_class.__dataclass_fields__:
        del settings["loss_type"]
    trainer = trainer_class(
        model=model or tiny_model(),
        reward_funcs=reward or (text_reward if scripted else arithmetic_reward),
        args=config_class(str(output_dir), **settings),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL_PATH),
        peft_config=peft_config,
        callbacks=callbacks,
        optimizers=optimizers,
        **({"rollout_func": rollout_func} if scripted else {}),  # RLOO has none
    )
    if rule is not None:
        trainer.lookahead.rule = dataclasses.replace(trainer.lookahead.rule, **rule)
    if generation_backend is not None or generation_token_budget is not None:
        sample_in_groups(trainer, generation_backend or "auto", generation_token_budget)
    attach(
        trainer,
        records=records or eval_benchmarks is not None,
        eval_benchmarks=eval_benchmarks,
        eval_samples=eval_samples,
        eval_prompt=eval_prompt,
        trajectory_steps=trajectory_steps,
    )
    return trainer


def attach(
    trainer,
    *,
    records: bool = True,
    eval_benchmarks: list[str] | None = None,
    eval_samples: int = 4,
    eval_prompt: str | None = None,
    trajectory_steps: int | None = None,
) -> None:
    """The callbacks that `gxpo train` attaches for these keys; `records` are those that it always does."""
    if records:
        TrackerCallback.attach(trainer)
        trainer.add_callback(RunRecordCallback(trainer, {"trajectory_steps": trajectory_steps}))
        trainer.add_callback(HubCallback(trainer))
    if eval_benchmarks is not None:
        at_start = trainer.args.eval_on_start
        trainer.add_callback(BenchmarkCallback(trainer, eval_benchmarks, eval_samples, eval_prompt, at_start=at_start))
    if trajectory_steps is not None:
        trainer.add_callback(TrajectoryCallback(trainer, trajectory_steps))


def train(*args, resume_from_checkpoint=None, **kwargs):
    """Makes a trainer, trains it, returns it."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer, name: str) -> list[float]:
    """One metric over the steps of a run."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def our_metrics(log: list[dict]) -> list[dict]:
    """What the update logged, without times and memory."""
    return [
        {
            name: value
            for name, value in entry.items()
            if name.startswith("lookahead/") and "time" not in name and "memory" not in name
        }
        for entry in log
    ]


def assert_equal_parameters(left, right) -> None:
    left, right = parameters(left), parameters(right)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"parameters differ: {different}"


def assert_close_parameters(left: dict, right: dict, atol: float) -> None:
    """99.9 % of the coordinates within `atol`, and fewer than 0.1 % beyond ten times that.

    The scale is ill-conditioned in the few coordinates whose gradient is close to the activity threshold.
    """
    assert left.keys() == right.keys()
    difference = torch.cat([(left[name] - right[name]).abs().flatten() for name in left])
    assert (difference <= atol).double().mean() >= 0.999, difference.max()
    assert (difference > 10 * atol).double().mean() < 0.001, difference.max()
