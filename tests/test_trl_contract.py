"""The internals of TRL, transformers and accelerate that the trainer touches, each with the promise it relies on.

When an upgrade breaks one of these tests, `gxpo_trl/trainer` has to be looked at before the range in pyproject.toml
moves.
"""

import inspect

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers import logged, make_trainer, tiny_model
from transformers import GenerationConfig, MaxTimeCriteria, Trainer
from transformers.utils.hub import PushInProgress
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from gxpo_trl.rollout.compaction import KNOWN


def trl_trainer(tmp_path, trainer_class=GRPOTrainer, **settings):
    return make_trainer(tmp_path, trainer_class, GRPOConfig, **settings)


def parameter_names(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_overridden_methods_keep_their_signatures():
    assert parameter_names(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert parameter_names(GRPOTrainer.compute_loss) == [
        *("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    ]
    assert parameter_names(GRPOTrainer.create_model_card) == ["self", "model_name", "dataset_name", "tags"]
    assert parameter_names(Trainer._save_optimizer_and_scheduler) == ["self", "output_dir"]
    assert parameter_names(GRPOTrainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert parameter_names(Trainer.init_hf_repo) == ["self", "token", "private"]
    assert parameter_names(Trainer._push_from_checkpoint) == ["self", "checkpoint_folder"]
    assert parameter_names(Trainer._finish_current_push) == ["self"]
    assert PushInProgress().jobs == []
    assert parameter_names(GRPOTrainer.__init__)[:4] == ["self", "model", "reward_funcs", "args"]
    for trainer_class in (GRPOTrainer, RLOOTrainer):  # timed, and passed through
        assert callable(trainer_class._generate) and callable(trainer_class._calculate_rewards)


def test_rollouts_wait_in_a_buffer_of_micro_batches_with_entries_that_compaction_knows(tmp_path):
    """An entry that is not known turns compaction off without a word."""
    trainer = trl_trainer(tmp_path, max_steps=1, beta=0.01, num_iterations=2, steps_per_generation=4)
    trainer.train()
    assert len(trainer._buffered_inputs) == 4
    assert set(trainer._buffered_inputs[0]) <= KNOWN
    normalizers = {id(batch["num_items_in_batch"]) for batch in trainer._buffered_inputs}
    assert len(normalizers) == 1
    assert trainer._prepare_inputs(None) is trainer._buffered_inputs[trainer._step % 4]


@pytest.mark.parametrize("trainer_class, config_class", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_what_the_loss_depends_on_is_said_by_these_attributes(tmp_path, trainer_class, config_class):
    trainer = make_trainer(tmp_path, trainer_class, config_class, scripted=False)
    assert not trainer.aux_loss_enabled
    assert parameter_names(trainer_class._compute_loss) == ["self", "model", "inputs"]
    if trainer_class is GRPOTrainer:
        assert (trainer.loss_type, trainer.beta, trainer.importance_sampling_level) == ("grpo", 0.0, "token")
        assert (trainer._entropy_bonus_enabled, trainer.top_entropy_quantile) == (False, 1.0)


class SpyingMixin:
    """Writes down, in order, what one optimizer step calls."""

    def __init__(self, *args, **kwargs):
        self.calls, self.logps, self.synchronises = [], [], []
        super().__init__(*args, **kwargs)
        backward = self.accelerator.backward
        self.accelerator.backward = lambda *args, **kwargs: (self.calls.append("backward"), backward(*args, **kwargs))

    def _prepare_inputs(self, generation_batch):
        self.calls.append("prepare")
        self.prepared = super()._prepare_inputs(generation_batch)
        return self.prepared

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls.append("loss")
        self.synchronises.append(self.accelerator.sync_gradients)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.calls.append("logps" if torch.is_grad_enabled() else "logps without grad")
        self.logps.append(outputs[0])
        return outputs


class SpyingTrainer(SpyingMixin, GRPOTrainer):
    pass


def test_a_training_step_prepares_computes_one_loss_and_goes_backward(tmp_path):
    """Recording between `_prepare_inputs` and the forward pass, once a micro-batch, sees all there is."""
    trainer = trl_trainer(tmp_path, SpyingTrainer, max_steps=2, beta=0.01)
    trainer.train()
    micro_batch = ["prepare", "loss", "logps", "backward"]
    calls = [call for call in trainer.calls if call != "logps without grad"]
    assert calls == micro_batch * 4
    assert trainer.synchronises == [False, True] * 2


def test_log_probabilities_come_first_and_are_those_of_the_completion(tmp_path):
    trainer = trl_trainer(tmp_path, SpyingTrainer, max_steps=1)
    trainer.train()
    assert trainer.logps[-1].shape == trainer.prepared["completion_ids"].shape
    assert trainer.logps[-1].requires_grad


def test_the_step_counter_moves_in_training_step_alone(tmp_path):
    """Replays call `compute_loss`; it must not advance `_step`, which selects the slice and triggers generation."""
    trainer = trl_trainer(tmp_path, SpyingTrainer, max_steps=1)
    trainer.train()
    before = trainer._step
    assert before == trainer.args.gradient_accumulation_steps
    trainer.compute_loss(trainer.model, trainer.prepared)
    assert trainer._step == before


def test_the_loss_measures_its_ratio_against_old_per_token_logps(tmp_path):
    """`None` stands for the current policy; what is given is used."""
    trainer = trl_trainer(tmp_path, SpyingTrainer, max_steps=1)
    trainer.train()
    inputs = trainer.prepared
    assert inputs.get("old_per_token_logps") is None
    trainer._metrics["train"].clear()
    shifted = trainer.logps[-1].detach() - 1.0  # every ratio is e
    trainer.compute_loss(trainer.model, {**inputs, "old_per_token_logps": shifted})
    positive = (inputs["advantages"][:, None] > 0) * inputs["completion_mask"]
    expected = positive.sum() / inputs["completion_mask"].sum()
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [pytest.approx(expected.item(), abs=1e-2)]


def test_the_loss_is_scaled_for_accumulation_by_compute_loss():
    """Replays go backward with what `compute_loss` returns, as `training_step` does."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_rloo_is_scaled_by_the_training_step_and_keeps_its_own_old_log_probabilities(tmp_path):
    assert RLOOTrainer.loss_is_scaled_for_ga is False
    assert parameter_names(RLOOTrainer.compute_loss) == parameter_names(GRPOTrainer.compute_loss)
    assert parameter_names(RLOOTrainer.training_step) == parameter_names(GRPOTrainer.training_step)
    spying_class = type("SpyingRLOOTrainer", (SpyingMixin, RLOOTrainer), {})
    trainer = make_trainer(tmp_path, spying_class, RLOOConfig, scripted=False, max_steps=1)
    trainer.train()
    calls = [call for call in trainer.calls if call != "logps without grad"]
    assert calls == ["prepare", "loss", "logps", "backward"] * 2
    assert trainer.prepared["old_logps"].shape == trainer.prepared["advantages"].shape


def test_metrics_are_lists_by_name_that_log_averages_and_clears(tmp_path):
    trainer = trl_trainer(tmp_path, max_steps=1)
    trainer._metrics["train"]["lookahead/probe"].extend([1.0, 3.0])
    trainer.train()
    assert logged(trainer, "lookahead/probe") == [2.0]
    assert not trainer._metrics["train"]


@pytest.mark.parametrize(
    "settings, name",
    [({}, "clip_ratio/region_mean"), ({"loss_type": "cispo"}, "cispo_clip_ratio"), ({"beta": 0.01}, "kl")],
)
def test_the_metrics_of_pass_three_go_by_these_names(tmp_path, settings, name):
    trainer = trl_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    assert len(logged(trainer, name)) == 1


def test_the_entropy_controller_is_these_three_attributes(tmp_path):
    settings = {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.01,
        "entropy_target": 100.0,
        "entropy_coef_delta": 0.01,
    }
    trainer = trl_trainer(tmp_path, max_steps=1, **settings)
    before = {name for name, value in vars(trainer).items() if "entropy" in name and not callable(value)}
    assert {"entropy_coef", "_last_world_entropy", "_entropy_window_stats"} <= before
    trainer.train()
    assert trainer.entropy_coef == pytest.approx(0.02)
    assert trainer._last_world_entropy > 0
    assert trainer._entropy_window_stats is None


def test_accelerate_lets_gradients_synchronise_by_hand(tmp_path):
    trainer = trl_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert isinstance(trainer.optimizer, AcceleratedOptimizer)
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    assert not trainer.accelerator.sync_gradients
    parameter = trainer.optimizer.param_groups[0]["params"][0]
    assert parameter in trainer.optimizer.state
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    assert torch.equal(parameter, before)  # a step acts only when gradients synchronise
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.optimizer.step()
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("trainer_class, config_class", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_completions_come_from_one_method_that_grouped_generation_stands_in_for(tmp_path, trainer_class, config_class):
    expected = ["self", "prompt_ids", "images", "multimodal_fields"]
    assert parameter_names(trainer_class._generate_single_turn)[:4] == expected
    assert parameter_names(trainer_class._generate_and_score_completions) == ["self", "inputs"]
    names = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert parameter_names(trainer_class._get_per_token_logps_and_entropies)[:5] == names
    trainer = make_trainer(tmp_path, trainer_class, config_class, scripted=False)
    assert trainer._generate_single_turn.__func__ is trainer_class._generate_single_turn  # by which it is known
    more = (2,) if trainer_class is GRPOTrainer else ()
    prompts = [[5, 6, 7], [5, 6, 7], [8], [8]]
    output = trainer._generate_single_turn(prompts, None, {}, *more)
    completions, logprobs = output if trainer_class is GRPOTrainer else (output, None)
    assert len(completions) == 4 and all(isinstance(ids, list) for ids in completions) and logprobs is None
    assert isinstance(trainer.generation_config, GenerationConfig)
    assert not trainer.use_vllm and not trainer.use_transformers_continuous_batching
    assert not trainer._dist.is_zero3 and not trainer._dist.is_fsdp
    assert trainer._tokenizer is trainer.processing_class
    assert trainer.generation_config.do_sample and trainer.generation_config.temperature == trainer.temperature
    assert (trainer.num_iterations, trainer.args.steps_per_generation, trainer.args.tf32) == (1, 2, None)
    if trainer_class is GRPOTrainer:
        assert not trainer.tools and trainer.rollout_func is None


def test_a_decoding_method_of_ones_own_gets_what_generate_has_prepared():
    """And of the further arguments of `generate` those that it names."""
    seen = {}

    def decode(model, input_ids, token_budget=None, **prepared):
        seen.update(prepared, token_budget=token_budget)
        return input_ids

    ids, mask = torch.tensor([[0, 4, 5], [6, 7, 8]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    settings = {"do_sample": True, "repetition_penalty": 1.2, "top_k": 3, "max_new_tokens": 5}
    settings |= {"pad_token_id": 0, "eos_token_id": 1, "stopping_criteria": [MaxTimeCriteria(1.0)]}
    output = tiny_model().generate(
        input_ids=ids, attention_mask=mask, **settings, custom_generate=decode, token_budget=7
    )
    assert output is ids and seen["token_budget"] == 7
    assert torch.equal(seen["attention_mask"], mask)
    assert seen["generation_config"].max_length == 3 + 5
    assert seen["generation_config"]._pad_token_tensor == 0
    assert {type(p).__name__ for p in seen["logits_processor"]} == {
        "RepetitionPenaltyLogitsProcessor",
        "TopKLogitsWarper",
    }
    criteria = {type(c).__name__ for c in seen["stopping_criteria"]}
    assert criteria == {"MaxLengthCriteria", "EosTokenCriteria", "MaxTimeCriteria"}
    assert {"position_ids", "past_key_values", "use_cache", "logits_to_keep"} <= seen.keys()


def test_the_neutral_values_of_generations_settings_are_known():
    neutral = GenerationConfig._get_default_generation_params()
    assert neutral["num_beams"] == 1 and neutral["use_cache"] is True
    assert set(neutral) <= GenerationConfig().to_dict().keys()
