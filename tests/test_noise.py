"""Noise of any kind is the same in every pass: at a learning rate of 0 all passes are at one point, and must agree."""

import random

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers import assert_equal_parameters, half_without_spread, logged, make_trainer, tiny_model, train
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig
from trl import RLOOConfig, RLOOTrainer

from gxpo_trl import GXPOConfig, GXPOTrainer, sample_grouped
from gxpo_trl.evaluation.sampling import load_tokenizer, transformers_sampler
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.tasks import TINY_MODEL_PATH


SLOW = pytest.mark.slow


class Noisy(torch.nn.Module):
    """Around a block of the model: adds to what comes in."""

    def __init__(self, block: torch.nn.Module, noise):
        super().__init__()
        self.block, self.noise = block, noise
        self.own = torch.Generator().manual_seed(1)

    def forward(self, hidden, *args, **kwargs):
        return self.block(self.noise(self, hidden), *args, **kwargs)


class RoughGradient(torch.autograd.Function):
    """Draws in the backward pass only, as stochastic rounding does."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0.5 * torch.randn_like(gradient))


def own_generator(module, hidden):
    return hidden + 0.3 * torch.randn(hidden.shape, generator=module.own, dtype=hidden.dtype)


def layerdrop_by(draw):
    return lambda module, hidden: hidden if draw() < 0.5 else hidden * 0.5


NOISE = {
    "randn_like": lambda module, hidden: hidden + 0.3 * torch.randn_like(hidden),
    "rand": lambda module, hidden: hidden * torch.rand(hidden.shape),
    "bernoulli": lambda module, hidden: hidden * torch.empty_like(hidden).bernoulli_(0.7),
    "functional dropout": lambda module, hidden: torch.nn.functional.dropout(hidden, 0.3),
    "by row": lambda module, hidden: hidden * torch.rand(len(hidden), 1, 1),
    "a generator of its own": own_generator,
    "in the backward pass": lambda module, hidden: RoughGradient.apply(hidden),
    "layers dropped by torch": layerdrop_by(lambda: torch.rand(())),
    "layers dropped by random": layerdrop_by(random.random),
    "layers dropped by numpy": layerdrop_by(np.random.random),
}
DROPOUTS = (torch.nn.Dropout, torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout)
EVERYWHERE = {"target_modules": "all-linear"}
ADAPTERS = {
    "LoRA": lambda: LoraConfig(r=4, lora_dropout=0.5, **EVERYWHERE),
    "LoKr": lambda: LoKrConfig(r=4, module_dropout=0.5, init_weights=False, **EVERYWHERE),
    "LoHa": lambda: LoHaConfig(r=4, rank_dropout=0.5, init_weights=False, **EVERYWHERE),
    "BOFT": lambda: BOFTConfig(boft_block_size=4, boft_dropout=0.3, init_weights=False, target_modules=["q_proj"]),
}


def noisy_model(noise) -> torch.nn.Module:
    model = tiny_model()
    model.model.layers[-1].mlp = Noisy(model.model.layers[-1].mlp, noise)
    return model


def noisy(kind: str) -> dict:
    """What makes a trainer with noise of this kind."""
    if kind in NOISE:
        return {"model": noisy_model(NOISE[kind])}
    if kind in ADAPTERS:
        return {"peft_config": ADAPTERS[kind]()}
    if kind == "NEFTune":
        return {"neftune_noise_alpha": 5.0}
    if kind == "attention dropout":
        return {"model": tiny_model(attention_dropout=0.5)}
    (dropout,) = (dropout for dropout in DROPOUTS if dropout.__name__ == kind)
    module = dropout(0.3)
    return {"model": noisy_model(lambda _, hidden: module(hidden))}


KINDS = [*NOISE, *ADAPTERS, *(dropout.__name__ for dropout in DROPOUTS), "NEFTune", "attention dropout"]
LAYOUTS = {
    "compacted": {},
    "packed": {"max_tokens_per_micro_batch": 150},
    "as TRL's": {"compact_batches": False},
}
AT_ONE_POINT = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 2, "reward": half_without_spread}


def assert_all_passes_agree(trainer, passes=("0", "1", "slow")) -> None:
    assert logged(trainer, "lookahead/cos_0_slow") == pytest.approx([1.0] * 2, abs=1e-5)
    norms = [logged(trainer, f"lookahead/grad_norm_{name}") for name in passes]
    assert len(norms[0]) == 2 and min(norms[0]) > 0
    for norm in norms[1:]:
        assert norm == pytest.approx(norms[0], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize(
    "kind, layout",
    [
        pytest.param(kind, layout, marks=[] if layout == "compacted" or kind in ("LoRA", "NEFTune") else [SLOW])
        for kind in KINDS
        for layout in LAYOUTS
    ],
)
def test_every_pass_sees_the_same_noise(tmp_path, kind, layout):
    assert_all_passes_agree(train(tmp_path, **AT_ONE_POINT, **LAYOUTS[layout], **noisy(kind)))


# ---- Sampling


SAMPLING = {"scripted": False, "max_completion_length": 6, "max_steps": 1, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    "kind", ["by row", "a generator of its own", "layers dropped by random", "layers dropped by numpy"]
)
@pytest.mark.parametrize("trainer_class, config_class", [(GXPOTrainer, GXPOConfig), (RLOOTrainer, RLOOConfig)])
def test_copies_of_a_prompt_do_not_share_noise_that_nothing_announces(
    tmp_path, caplog, kind, trainer_class, config_class
):
    """The run is the one by `generate`, from the first token on."""
    grouped, plain = (
        train(tmp_path, trainer_class, config_class, generation_backend=backend, **SAMPLING, **noisy(kind))
        for backend in ("auto", None)
    )
    assert_equal_parameters(grouped, plain)
    said = [record.getMessage() for record in caplog.records if "draws random numbers" in record.getMessage()]
    assert len(said) == 1 and "takes longer" in said[0]


@pytest.mark.parametrize("needs", [{"generation_backend": "grouped"}, {"generation_token_budget": 500}])
def test_grouped_sampling_that_is_asked_for_is_refused_with_such_noise(tmp_path, needs):
    with pytest.raises(ValueError, match=f"draws random numbers.*Leave out `{next(iter(needs))}"):
        train(tmp_path, **SAMPLING, **needs, **noisy("randn_like"))


@pytest.mark.parametrize("kind", ["NEFTune", "LoKr", "LoHa", "BOFT", "AlphaDropout"])
def test_noise_that_settings_or_modules_announce_is_refused_at_construction(tmp_path, kind):
    settings = noisy(kind)
    if kind == "AlphaDropout":
        settings["model"].model.layers[0].mlp.dropout = torch.nn.AlphaDropout(0.1)
    with pytest.raises(ValueError, match="would share.*Leave out `generation_backend"):
        make_trainer(tmp_path, scripted=False, generation_backend="grouped", **settings)


def test_the_decoding_method_refuses_noise_and_leaves_the_generators_as_they_were():
    model, tokens = noisy_model(NOISE["randn_like"]).eval(), torch.arange(3, 9).repeat(4, 1)
    request = {"input_ids": tokens, "max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="draws random numbers.*Leave out `custom_generate`"):
        model.generate(**request, custom_generate=sample_grouped)
    found = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(3))


def test_evaluation_samples_a_model_with_noise_by_generate(caplog):
    PartialState()  # its logger asks for it
    model, tokenizer = noisy_model(NOISE["randn_like"]).eval(), load_tokenizer(str(TINY_MODEL_PATH))
    settings = EvaluationArguments(models=[str(TINY_MODEL_PATH)], benchmarks=["x"], max_new_tokens=4)
    sample = transformers_sampler(model, tokenizer, settings)
    assert [len(samples) for samples in (*sample([[5, 6, 7]], 3, 0), *sample([[5, 6]], 2, 0))] == [3, 2]
    assert sum("draws random numbers" in record.getMessage() for record in caplog.records) == 1
