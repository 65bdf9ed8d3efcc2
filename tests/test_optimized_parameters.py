"""An optimizer that holds some of the trainable parameters, others besides, or none."""

import math

import pytest
import torch
from helpers import assert_close_parameters, double_model, logged, make_trainer, parameters, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import SGD, AdamW, Muon
from transformers import TrainerCallback

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadTrainer, SFPOConfig, SFPOTrainer


CLIPPED = {"max_grad_norm": 0.5, "compact_batches": False, "gate_signal": "never"}


def is_matrix(name: str, p: torch.nn.Parameter) -> bool:
    return p.dim() == 2 and "embed" not in name


def chosen(model, choose) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if choose(name, p)]


def muon(model, lr):
    return Muon(chosen(model, is_matrix), lr=lr)


def one_layer(model, lr):
    return AdamW(chosen(model, lambda name, p: "layers.0" in name), lr=lr)


def two_groups(model, lr):
    matrices, norms = chosen(model, is_matrix), chosen(model, lambda name, p: p.dim() == 1)
    return AdamW([{"params": norms, "lr": 3 * lr}, {"params": matrices}], lr=lr)


def with_others(model, lr):
    """What is no part of the model, and what is frozen."""
    model.get_input_embeddings().weight.requires_grad_(False)
    return SGD([torch.nn.Parameter(torch.ones(3)), *chosen(model, lambda name, p: "layers" in name)], lr=lr)


def backwards(model, lr):
    return SGD(list(model.parameters())[::-1], lr=lr)


OPTIMIZERS = (
    muon,
    with_others,
    *(pytest.param(of, marks=pytest.mark.slow) for of in (one_layer, two_groups, backwards)),
)
RULES = {"gxpo": (GXPOTrainer, GXPOConfig), "sfpo": (SFPOTrainer, SFPOConfig)}


def build(folder, make_optimizer, lr=1e-4, trainer=LookaheadTrainer, config=GXPOConfig, model=None, **settings):
    model = model or double_model()
    settings = {**CLIPPED, **settings}
    return make_trainer(folder, trainer, config, model=model, optimizers=(make_optimizer(model, lr), None), **settings)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_at_a_learning_rate_of_0_all_passes_are_equal(tmp_path, float64, make_optimizer, rule):
    trainer = build(tmp_path, make_optimizer, 0.0, *RULES[rule], lookahead_diagnostics_steps=1)
    trainer.train()
    norms = logged(trainer, "grad_norm")
    assert logged(trainer, "lookahead/grad_norm_0") == pytest.approx(norms, rel=1e-9)
    assert logged(trainer, "lookahead/grad_norm_slow") == pytest.approx(norms, rel=1e-9)
    assert logged(trainer, "lookahead/cos_0_slow") == pytest.approx([1.0] * 3, abs=1e-9)
    assert logged(trainer, "lookahead/noise_cos") == pytest.approx([1.0] * 3, abs=1e-9)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_no_reposition_and_a_rollback_make_the_plain_step(tmp_path, float64, make_optimizer):
    """All that has a gradient is clipped together, in each pass as in the plain step, and after real steps too."""
    settings = {"reposition_alpha": 0.0, "rule": {"rollback": True}, "lookahead_diagnostics_steps": 1}
    ours = build(tmp_path, make_optimizer, **settings)
    plain = build(tmp_path, make_optimizer, update_rule="grpo")
    start = parameters(plain)
    for trainer in (ours, plain):
        trainer.train()
    assert_close_parameters(parameters(ours), parameters(plain), atol=1e-10)
    held = {id(p) for group in ours.optimizer.param_groups for p in group["params"]}
    stepped = {name: p for name, p in ours.model.named_parameters() if p.requires_grad and id(p) in held}
    assert ours.lookahead.engine.state.coordinates() == sum(p.numel() for p in stepped.values())
    assert all(torch.equal(p, start[name]) == (name not in stepped) for name, p in parameters(ours).items())


class Poisoned(LookaheadTrainer):
    """A loss that is not a number in the second pass of the second step."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls += self.state.global_step == 1
        return loss * math.nan if (self.state.global_step, self.calls) == (1, 3) else loss


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_a_step_that_falls_back_is_clipped_as_the_plain_one(tmp_path, float64, make_optimizer):
    """By the norm of all gradients of pass 1, whether the optimizer holds their parameters or not."""
    settings = {"reposition_alpha": 0.0, "rule": {"rollback": True}}
    fell_back = build(tmp_path, make_optimizer, trainer=Poisoned, **settings)
    plain = build(tmp_path, make_optimizer, update_rule="grpo")
    for trainer in (fell_back, plain):
        trainer.train()
    assert fell_back.lookahead.fallbacks == 1
    assert logged(fell_back, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-8)
    assert_close_parameters(parameters(fell_back), parameters(plain), atol=1e-10)


def test_what_is_extrapolated_is_what_the_optimizer_holds(tmp_path, float64):
    """Without clipping, parameters that it does not hold might as well be frozen."""
    runs = []
    for freezes in (False, True):
        model = double_model()
        for name, p in model.named_parameters():
            p.requires_grad_(not freezes or is_matrix(name, p))
        runs.append(build(tmp_path, muon, 1e-3, model=model, max_grad_norm=0.0))
        runs[-1].train()
    partial, frozen = runs
    for name in ("retention_mean", "retention_std", "scale_mean", "inactive_fraction", "displacement_ratio"):
        assert logged(partial, f"lookahead/{name}") == pytest.approx(logged(frozen, f"lookahead/{name}"), rel=1e-9)
    after = dict(partial.model.named_parameters())
    assert all(torch.allclose(p, after[name], atol=1e-12) for name, p in frozen.model.named_parameters())


class Freezing(TrainerCallback):
    """Freezes a layer after the first step, and thaws it after the second."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].requires_grad_(state.global_step != 1)


def test_parameters_may_be_frozen_on_the_way(tmp_path, float64):
    trainer = build(tmp_path, lambda model, lr: AdamW(model.parameters(), lr), 0.0)
    trainer.add_callback(Freezing())
    trainer.train()
    norms = logged(trainer, "grad_norm")
    assert logged(trainer, "lookahead/grad_norm_0") == pytest.approx(norms, rel=1e-9)
    assert logged(trainer, "lookahead/cos_0_slow") == pytest.approx([1.0] * 3, abs=1e-9)


# ---- Nothing to train


def frozen_model():
    return tiny_model().requires_grad_(False)


def frozen_adapter(folder) -> PeftModel:
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


@pytest.mark.parametrize("update_rule", ["gxpo", "sfpo", "grpo"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path, update_rule, adapter):
    model = frozen_adapter(tmp_path) if adapter else frozen_model()
    with pytest.raises(ValueError, match="No parameter of the model .*is_trainable=True.*`resume_adapter`"):
        make_trainer(tmp_path, model=model, update_rule=update_rule)


def test_an_optimizer_that_holds_nothing_of_the_model_is_refused(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for other in (tiny_model().parameters(), model.get_input_embeddings().parameters()):
        with pytest.raises(ValueError, match="The optimizer holds no parameter of the model .*leave `optimizers` out"):
            make_trainer(tmp_path, model=model, optimizers=(AdamW(other), None))


@pytest.mark.parametrize("how", ["zero", "none"])
@pytest.mark.parametrize("settings", [{}, {"extrapolation": "optimizer"}, {"update_rule": "sfpo"}], ids=str)
def test_a_hook_of_the_optimizers_step_acts_on_all_passes(tmp_path, how, settings):
    model = tiny_model()
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    before = [p.detach().clone() for p in norms]

    def hold(*_):
        for p in norms:
            p.grad = None if how == "none" else torch.zeros_like(p)

    optimizer.register_step_pre_hook(hold)
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None), max_steps=2, **settings)
    trainer.train()
    assert all(map(torch.equal, before, norms)) and logged(trainer, "lookahead/active") == [1.0, 1.0]


def test_a_model_that_is_frozen_before_the_first_step_is_refused_then(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=1)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing would be trained"):
        trainer.train()
