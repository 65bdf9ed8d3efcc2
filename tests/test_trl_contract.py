"""The internals of TRL that the trainer touches, each with the promise it relies on.

When an upgrade breaks one of these tests, `gxpo_trl/trainer` has to be looked at before the range in pyproject.toml
moves. The other libraries have files of their own, `test_*_contract.py`.
"""

from dataclasses import dataclass

import pytest
import torch
from contracts import Name, check, parameter_names
from helpers import logged, make_trainer, text_reward
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TrlParser

from gxpo_trl.rollout.compaction import KNOWN
from gxpo_trl.trainer.layout import RATIO_MEANS
from gxpo_trl.trainer.update import MOVED_BY_LOSS


BOTH = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
LOOKAHEAD, COMPACTING, EVALUATING, GENERATING = (
    f"trainer/{name}.py" for name in ("lookahead_trainer", "compacting", "evaluating", "generating")
)
RECIPE, TRAIN, PLAN = "scripts/keys.py", "scripts/building.py", "scripts/plan.py"

NAMES = [
    *(
        Name(owner, *touched)
        for owner in ("trl.GRPOTrainer", "trl.RLOOTrainer")
        for touched in (
            ("_buffered_inputs", COMPACTING, "lays the micro-batches there out anew"),
            ("_step", COMPACTING, "knows by it which micro-batch is under way"),
            ("_metrics", LOOKAHEAD, "logs through it"),
            ("_compute_loss", LOOKAHEAD, "knows by it whether the loss is TRL's own", "model, inputs"),
            ("aux_loss_enabled", LOOKAHEAD, "knows by it that the loss sees padding"),
            ("loss_is_scaled_for_ga", LOOKAHEAD, "knows by it whether replays divide the loss"),
            ("_tokenize_prompts", EVALUATING, "tokenizes the prompts of benchmarks with it", "prompts"),
            ("eos_token_ids", EVALUATING, "knows by them that a completion was not cut"),
            ("_tokenizer", EVALUATING, "decodes completions with it"),
            ("_dist", GENERATING, "asks it whether forward passes communicate"),
            ("generation_config", GENERATING, "samples by it"),
            ("use_transformers_continuous_batching", GENERATING, "leaves sampling to TRL by it"),
            ("_calculate_rewards", "callbacks/records.py", "measures the time of it"),
            ("_generate", "callbacks/records.py", "measures the time of it"),
            ("reward_func_names", "callbacks/records.py", "writes them into run.json"),
            ("_tag_names", "trainer/rloo.py", "has the card tagged by it"),
            ("_name", "trainer/rloo.py", "has the card name the method by it"),
            ("_paper", "trainer/rloo.py", "has the card cite the paper by it"),
        )
    ),
    *(
        Name("trl.GRPOTrainer", *touched)
        for touched in (
            ("loss_type", LOOKAHEAD, "knows by it whether the loss is additive"),
            ("beta", LOOKAHEAD, "knows by it whether there is a KL term"),
            ("importance_sampling_level", LOOKAHEAD, "knows by it whether each token has a ratio"),
            ("_entropy_bonus_enabled", LOOKAHEAD, "knows by it whether the loss is additive"),
            ("top_entropy_quantile", LOOKAHEAD, "knows by it whether the loss is additive"),
            ("num_iterations", LOOKAHEAD, "knows by it whether TRL computes the old log-probabilities"),
            ("rollout_func", LOOKAHEAD, "leaves sampling to it"),
            ("tools", LOOKAHEAD, "leaves sampling to TRL by it"),
            ("entropy_coef", LOOKAHEAD, "restores it after replays"),
            ("_last_world_entropy", LOOKAHEAD, "restores it after replays"),
            ("_entropy_window_stats", LOOKAHEAD, "restores it after replays"),
        )
    ),
    Name("trl.distributed.DistributedBackend", "is_zero3", GENERATING, "keeps ranks in step by it"),
    Name("trl.distributed.DistributedBackend", "is_fsdp", GENERATING, "keeps ranks in step by it"),
    Name("trl.distributed.DistributedBackend", "summon_full_params", GENERATING, "samples within it", "module"),
    Name(
        *("trl.models", "unwrap_model_for_generation", GENERATING, "samples from the model that it yields"),
        "model, accelerator, * gather_deepspeed3_params, gradient_checkpointing_kwargs",
    ),
    Name("trl.extras.profiling", "profiling_context", GENERATING, "is profiled as TRL is", "trainer, name"),
    Name("trl.GRPOConfig", "ds3_gather_for_generation", GENERATING, "gathers parameters by it"),
    Name("trl.GRPOConfig", "steps_per_generation", COMPACTING, "knows by it how long a buffer is"),
    Name("trl.GRPOConfig", "num_generations", "trainer/config.py", "computes accumulation from it"),
    Name("trl.GRPOConfig", "max_completion_length", PLAN, "says by it how long completions may get"),
    Name(
        *("trl.TrlParser", "parse_args_and_config", RECIPE, "reads recipes with it"),
        "args, * return_remaining_strings, separate_remaining_strings",
    ),
    Name("trl.TrlParser", "_actions", RECIPE, "names the key that is nearest to an unknown one"),
    *(
        Name("trl.scripts.grpo.GRPOScriptArguments", name, TRAIN, "reads that key of a recipe")
        for name in (
            *("dataset_name", "dataset_config", "dataset_streaming", "dataset_train_split", "dataset_test_split"),
            *("reward_funcs", "reward_model_name_or_path"),
        )
    ),
    *(
        Name("trl.ModelConfig", name, TRAIN, "reads that key of a recipe")
        for name in ("model_name_or_path", "model_revision", "attn_implementation", "dtype")
    ),
    *(
        Name("trl.ModelConfig", name, "scripts/dry_run.py", "changes that key for a rehearsal")
        for name in ("use_peft", "lora_target_modules", "load_in_4bit", "load_in_8bit")
    ),
    Name("trl.DatasetMixtureConfig", "datasets", TRAIN, "mixes these"),
    Name("trl", "get_dataset", TRAIN, "mixes datasets with it", "mixture_config"),
    Name("trl", "get_peft_config", TRAIN, "makes an adapter's settings with it", "model_args"),
    Name("trl", "get_quantization_config", TRAIN, "makes a quantization's settings with it", "model_args"),
    Name("trl.trainer.utils", "create_model_from_path", TRAIN, "loads the base of an adapter with it", "model_id"),
    Name("trl.trainer.utils", "get_config_model_id", LOOKAHEAD, "names a run by it", "config"),
    *(
        Name("trl.rewards", name, "tasks/names.py", "offers it by its name")
        for name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
    ),
    Name(
        *("trl.rewards", "get_soft_overlong_punishment", "tasks/names.py", "offers it by its name"),
        "max_completion_len, soft_punish_cache",
    ),
]


@pytest.mark.parametrize("touched", NAMES, ids=str)
def test_the_names_that_we_touch_are_there(touched):
    check(touched)


OVERRIDDEN = {
    "__init__": ["model", "reward_funcs", "args", ...],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "_prepare_inputs": ["generation_batch"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", ...],
    "_generate_and_score_completions": ["inputs"],
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep", ...],
}
"""The methods of TRL's trainers that ours override, with the arguments that they are called with."""


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("method", OVERRIDDEN)
def test_the_overridden_methods_keep_their_signatures(trainer_class, method):
    expected = OVERRIDDEN[method]
    found = parameter_names(getattr(trainer_class, method))
    assert found == expected or [*found[: len(expected) - 1], ...] == expected, (
        f"TRL's {trainer_class.__name__}.{method} takes the arguments {', '.join(found)} now: the method of that name "
        "in trainer/*.py overrides it and passes them on."
    )


def trl_trainer(tmp_path, trainer_class=GRPOTrainer, **settings):
    return make_trainer(tmp_path, trainer_class, GRPOConfig, **settings)


# ---- Rollouts


def test_rollouts_wait_in_a_buffer_of_micro_batches_with_entries_that_compaction_knows(tmp_path):
    """An entry that is not known turns compaction off without a word."""
    trainer = trl_trainer(tmp_path, max_steps=1, beta=0.01, num_iterations=2, steps_per_generation=4)
    trainer.train()
    assert len(trainer._buffered_inputs) == 4, (
        "TRL's `_buffered_inputs` is no list of `steps_per_generation` micro-batches any more: trainer/layout.py "
        "lays them out anew."
    )
    new = set(trainer._buffered_inputs[0]) - KNOWN
    assert not new, (
        f"TRL's micro-batches hold {', '.join(sorted(new))} now: rollout/compaction.py leaves a batch alone that "
        "holds what is not in KNOWN."
    )
    normalizers = {id(batch["num_items_in_batch"]) for batch in trainer._buffered_inputs}
    assert len(normalizers) == 1, (
        "TRL's micro-batches of one buffer have several `num_items_in_batch` now: rollout/compaction.py deals their "
        "rows out anew only where they share one."
    )
    assert trainer._prepare_inputs(None) is trainer._buffered_inputs[trainer._step % 4], (
        "TRL's `_prepare_inputs` does not return the micro-batch of `_step` from the buffer any more: "
        "trainer/layout.py returns its own from there."
    )


@pytest.mark.parametrize("trainer_class, config_class", BOTH)
def test_what_the_loss_depends_on_is_said_by_these_attributes(tmp_path, trainer_class, config_class):
    trainer = make_trainer(tmp_path, trainer_class, config_class, scripted=False)
    names = ["loss_type", "beta", "importance_sampling_level", "_entropy_bonus_enabled", "top_entropy_quantile"]
    names = ["aux_loss_enabled", *(names if trainer_class is GRPOTrainer else [])]
    found = {name: getattr(trainer, name) for name in names}
    neutral = dict(zip(names, [False, "grpo", 0.0, "token", False, 1.0], strict=False))
    assert found == neutral, (
        f"TRL's {trainer_class.__name__} says {found} of a plain loss and not {neutral} any more: `_loss_allows` in "
        "trainer/trainer.py and rloo.py reads these."
    )


@pytest.mark.parametrize("trainer_class, config_class", BOTH)
def test_completions_come_from_one_method_that_grouped_generation_stands_in_for(tmp_path, trainer_class, config_class):
    trainer = make_trainer(tmp_path, trainer_class, config_class, scripted=False)
    more = (2,) if trainer_class is GRPOTrainer else ()
    output = trainer._generate_single_turn([[5, 6, 7], [5, 6, 7], [8], [8]], None, {}, *more)
    completions, logprobs = output if trainer_class is GRPOTrainer else (output, None)
    assert len(completions) == 4 and all(isinstance(ids, list) for ids in completions) and logprobs is None, (
        f"TRL's {trainer_class.__name__}._generate_single_turn does not return a list of tokens for each prompt any "
        "more, GRPO's with log-probabilities beside them: trainer/grouped.py stands in for it."
    )
    elsewhere = [trainer.use_vllm, trainer.use_transformers_continuous_batching]
    if trainer_class is GRPOTrainer:
        elsewhere += [trainer.tools, trainer.rollout_func]
    assert isinstance(trainer.generation_config, GenerationConfig) and not any(elsewhere), (
        f"TRL's {trainer_class.__name__} does not say of a plain run that `generate` samples it by "
        "`generation_config` any more: `_why_not_sampled_here` in trainer/grouped.py and lookahead_trainer.py asks "
        "it."
    )


@pytest.mark.parametrize("trainer_class, config_class", BOTH)
def test_one_process_holds_whole_parameters_and_gathers_nothing(tmp_path, trainer_class, config_class):
    trainer = make_trainer(tmp_path, trainer_class, config_class, scripted=False)
    with trainer._dist.summon_full_params(trainer.model, recurse=False) as yielded:
        assert yielded is None and not trainer._dist.is_zero3 and not trainer._dist.is_fsdp, (
            f"TRL's {trainer_class.__name__}._dist takes a single process for a sharded one: trainer/grouped.py "
            "keeps ranks in step and gathers parameters by what it says."
        )


@pytest.mark.parametrize("trainer_class, config_class", BOTH)
def test_prompts_are_tokenized_as_the_chat_template_has_it(tmp_path, trainer_class, config_class):
    trainer = make_trainer(tmp_path, trainer_class, config_class, scripted=False)
    prompts = [row["prompt"] for row in trainer.train_dataset.select(range(2))]
    tokenizer = trainer._tokenizer
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expected = tokenizer.apply_chat_template(prompts, **template)["input_ids"]
    assert trainer._tokenize_prompts(prompts)[0] == expected, (
        f"TRL's {trainer_class.__name__}._tokenize_prompts does not return the tokens of prompts in first place any "
        "more: callbacks/benchmarks.py tokenizes the prompts of benchmarks with it."
    )
    assert tokenizer is trainer.processing_class and tokenizer.eos_token_id in trainer.eos_token_ids, (
        f"TRL's {trainer_class.__name__} does not keep its tokenizer in `_tokenizer`, or what ends a completion in "
        "`eos_token_ids`, any more: callbacks/benchmarks.py reads completions by them."
    )


# ---- One optimizer step


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


class SpyingRLOOTrainer(SpyingMixin, RLOOTrainer):
    pass


GIVEN_TO_REWARDS = {}


def spying_reward(completions, **kwargs):
    GIVEN_TO_REWARDS.update(kwargs)
    kwargs["log_metric"]("probe", 3.0)
    return text_reward(completions)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A plain trainer of TRL after one step."""
    trainer = trl_trainer(tmp_path_factory.mktemp("trained"), SpyingTrainer, max_steps=1, reward=spying_reward)
    trainer.train()
    return trainer


STEP = ["prepare", "loss", "logps", "backward"]


def test_a_training_step_prepares_computes_one_loss_and_goes_backward(tmp_path):
    """Recording between `_prepare_inputs` and the forward pass, once a micro-batch, sees all there is."""
    trainer = trl_trainer(tmp_path, SpyingTrainer, max_steps=2, beta=0.01)
    trainer.train()
    calls = [call for call in trainer.calls if call != "logps without grad"]
    assert calls == STEP * 4, (
        "TRL's GRPOTrainer.training_step does not prepare inputs, compute one loss with one forward pass and go "
        "backward any more: trainer/trainer.py records micro-batches and replays them so."
    )
    assert trainer.synchronises == [False, True] * 2, (
        "TRL's GRPOTrainer computes losses with other `sync_gradients` than False up to the last micro-batch: "
        "trainer/trainer.py knows by it that pass 1 is over."
    )


def test_log_probabilities_come_first_and_are_those_of_the_completion(trained):
    logps = trained.logps[0]
    assert logps.shape == trained.prepared["completion_ids"].shape and logps.requires_grad, (
        "TRL's `_get_per_token_logps_and_entropies` does not return the completions' log-probabilities in first place "
        "any more: trainer/trainer.py keeps them for replays."
    )


def test_the_step_counter_moves_in_training_step_alone(trained):
    """It selects the slice and triggers generation."""
    before = trained._step
    trained.compute_loss(trained.model, trained.prepared)
    assert before == trained._step == trained.args.gradient_accumulation_steps, (
        "TRL's `compute_loss` advances `_step`, or `training_step` does so no more: replays in "
        "trainer/trainer.py call `compute_loss` and must leave it alone."
    )


def test_the_loss_measures_its_ratio_against_old_per_token_logps(trained):
    """`None` stands for the current policy; what is given is used."""
    inputs = trained.prepared
    assert inputs.get("old_per_token_logps") is None, (
        "TRL keeps `old_per_token_logps` of rollouts that are used once now: rollout/window.py freezes those of pass "
        "1 in their place."
    )
    shifted = trained.logps[-1].detach() - 1.0  # every ratio is e
    trained._metrics["train"].clear()
    trained.compute_loss(trained.model, {**inputs, "old_per_token_logps": shifted})
    positive = (inputs["advantages"][:, None] > 0) * inputs["completion_mask"]
    expected = positive.sum() / inputs["completion_mask"].sum()
    found = trained._metrics["train"]["clip_ratio/region_mean"]
    assert found == [pytest.approx(expected.item(), abs=1e-2)], (
        "TRL's loss does not measure its ratio against `old_per_token_logps` any more: rollout/window.py anchors "
        "replays by it."
    )


def test_the_loss_is_scaled_for_accumulation_by_compute_loss_in_grpo_and_by_the_step_in_rloo():
    """Replays go backward with what `compute_loss` returns, as `training_step` does."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True and RLOOTrainer.loss_is_scaled_for_ga is False, (
        "TRL's `loss_is_scaled_for_ga` has changed: `_replay` in trainer/trainer.py divides the loss of "
        "RLOO by the accumulation steps, and GRPO's not."
    )


def test_rloo_goes_through_the_same_step_and_keeps_its_own_old_log_probabilities(tmp_path):
    trainer = make_trainer(tmp_path, SpyingRLOOTrainer, RLOOConfig, scripted=False, max_steps=1)
    trainer.train()
    calls = [call for call in trainer.calls if call != "logps without grad"]
    assert calls == STEP * 2, (
        "TRL's RLOOTrainer.training_step does not prepare inputs, compute one loss with one forward pass and go "
        "backward any more: trainer/trainer.py records micro-batches and replays them so."
    )
    assert trainer.prepared["old_logps"].shape == trainer.prepared["advantages"].shape, (
        "TRL's RLOOTrainer does not keep one old log-probability a completion in `old_logps` any more: "
        "rollout/compaction.py deals rows out with it, and trainer/rloo.py freezes none."
    )


def test_rewards_are_given_what_they_log_through(trained):
    assert callable(GIVEN_TO_REWARDS.get("log_extra")) and logged(trained, "probe") == [3.0], (
        "TRL does not hand `log_metric` and `log_extra` to reward functions any more: tasks/rewards.py logs through "
        "them."
    )


# ---- Metrics


def test_metrics_are_lists_by_name_that_log_averages_and_clears(tmp_path):
    trainer = trl_trainer(tmp_path, max_steps=1)
    trainer._metrics["train"]["lookahead/probe"].extend([1.0, 3.0])
    trainer.train()
    assert logged(trainer, "lookahead/probe") == [2.0] and not trainer._metrics["train"], (
        "TRL's `log` does not average the lists in `_metrics['train']` and clear them any more: "
        "trainer/trainer.py logs through them."
    )


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"beta": 0.01}, ["kl", "entropy", *(name for name in RATIO_MEANS if "cispo" not in name)]),
        ({"loss_type": "cispo"}, ["cispo_clip_ratio"]),
    ],
)
def test_what_a_pass_measures_goes_by_these_names(tmp_path, settings, names):
    trainer = trl_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    gone = [name for name in names if len(logged(trainer, name)) != 1]
    assert not gone, (
        f"TRL does not log {', '.join(gone)} any more: SLOW_METRICS in trainer/trainer.py and RATIO_MEANS "
        "in compacting.py name it."
    )


def test_the_entropy_controller_is_these_three_attributes(tmp_path):
    settings = {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.01,
        "entropy_target": 100.0,
        "entropy_coef_delta": 0.01,
    }
    trainer = trl_trainer(tmp_path, max_steps=1, **settings)
    moving = MOVED_BY_LOSS
    before = {name: value for name, value in vars(trainer).items() if "entropy" in name}
    trainer.train()
    moved = {name for name, value in before.items() if getattr(trainer, name) is not value}
    assert moved <= set(moving) <= before.keys(), (
        f"TRL's entropy controller moves {', '.join(sorted(moved))} now: `MOVED_BY_LOSS` in "
        "trainer/update.py names what replays must not move."
    )
    found = [getattr(trainer, name) for name in moving]
    assert found[0] == pytest.approx(0.02) and found[1] > 0 and found[2] is None, (
        "TRL's entropy controller does not take a step of `entropy_coef_delta` after an optimizer step any more: "
        "trainer/trainer.py restores it after replays."
    )


# ---- Cards and recipes


def test_a_paper_is_cited_by_title_number_and_entry():
    assert GRPOTrainer._paper.keys() == RLOOTrainer._paper.keys() == {"title", "id", "citation"}, (
        "TRL's trainers describe their paper in `_paper` by other keys now: trainer/gxpo.py and sfpo.py describe ours "
        "so."
    )


@dataclass
class Keys:
    known: int = 0


def test_unknown_keys_of_a_recipe_come_in_pairs_and_apart_from_those_of_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("known: 1\nnot_known: 2\n")
    parser = TrlParser((Keys,), prog="gxpo", allow_abbrev=False)
    keys, *rest = parser.parse_args_and_config(
        ["--config", str(path), "--neither", "3"], return_remaining_strings=True, separate_remaining_strings=True
    )
    assert keys.known == 1 and rest == [["--not_known", "2"], ["--neither", "3"]], (
        "TRL's TrlParser does not return unknown keys of the file, in pairs, and then those of the command line any "
        "more: scripts/keys.py names them."
    )
