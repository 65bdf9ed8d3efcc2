"""Whose a trainer's methods are: TRL's, this package's, or somebody else's."""

import functools
import types

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer
from trl.extras.profiling import profiling_decorator

from gxpo_trl import GXPOTrainer
from gxpo_trl.trainer.layout import LOSS
from gxpo_trl.trainer.methods import is_replaced


SCORES = "_get_per_token_logps_and_entropies"


class Own(GXPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


class Mixin:
    def _compute_loss(self, model, inputs):
        return 0.0


class Mixed(Mixin, GRPOTrainer):
    pass


def make(trainer_class):
    """One that nothing was done to."""
    return object.__new__(trainer_class)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, GXPOTrainer])
def test_methods_of_trl_and_of_this_package_are_no_replacements(trainer_class):
    assert not [name for name in (*LOSS, "_generate_single_turn") if is_replaced(make(trainer_class), name)]


def test_methods_of_rloo_are_its_own():
    trainer = make(RLOOTrainer)
    assert not is_replaced(trainer, SCORES) and not is_replaced(trainer, "_generate_single_turn")
    trainer._generate_single_turn = types.MethodType(GRPOTrainer._generate_single_turn, trainer)
    assert is_replaced(trainer, "_generate_single_turn")


@pytest.mark.parametrize("trainer_class", [Own, Mixed])
def test_a_subclass_and_a_mixin_replace(trainer_class):
    trainer = make(trainer_class)
    assert is_replaced(trainer, "_compute_loss") and not is_replaced(trainer, "compute_loss")


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, GXPOTrainer])
def test_what_is_set_on_a_trainer_replaces_also_if_it_looks_like_what_it_wraps(trainer_class):
    trainer = make(trainer_class)
    kept = getattr(trainer, SCORES)

    @functools.wraps(kept)
    def wrapper(*args, **kwargs):
        return kept(*args, **kwargs)

    for other in (wrapper, types.MethodType(wrapper, trainer), functools.partial(kept), lambda *args: None):
        setattr(trainer, SCORES, other)
        assert is_replaced(trainer, SCORES)
    setattr(trainer, SCORES, kept)  # the method of the class, put back
    assert not is_replaced(trainer, SCORES)


@pytest.mark.parametrize("decorator", [lambda function: function, torch.no_grad(), profiling_decorator])
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, GXPOTrainer])
def test_a_patch_of_trls_class_replaces(monkeypatch, trainer_class, decorator):
    stock = GRPOTrainer._compute_loss

    @decorator
    @functools.wraps(stock)
    def patched(self, *args, **kwargs):
        return 2 * stock(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", patched)
    assert is_replaced(make(trainer_class), "_compute_loss")
