"""The internals of TRL that the trainer touches, each with the promise it relies on.

When an upgrade breaks one of these tests, `gxpo_trl/trainer` has to be looked at before the range in pyproject.toml
moves. The other libraries have files of their own, `test_*_contract.py`.
"""

from dataclasses import dataclass

import pytest
import torch
from contracts import Name, check, parameter_names
from helpers import TINY_BATCH, logged, make_trainer, text_reward
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TrlParser

from gxpo_trl.rollout.compaction import KNOWN
from gxpo_trl.trainer.layout import LOSS, RATIO_MEANS
from gxpo_trl.trainer.replays import MOVED_BY_LOSS


BOTH = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
UPDATE, REPLAYS, LOG = (f"trainer/{name}.py" for name in ("update", "replays", "step_log"))
LAYOUT, GROUPED, RULES = (f"trainer/{name}.py" for name in ("layout", "grouped", "rules"))
BENCHMARKS, RECORDS, SCRIPTS = "callbacks/benchmarks.py", "callbacks/records.py", "scripts/"

NAMES = [
    *(
        Name(owner, *touched)
        for owner in ("trl.GRPOTrainer", "trl.RLOOTrainer")
        for touched in (
            ("_metrics", RECORDS, "logs times through it"),
            ("_tokenize_prompts", BENCHMARKS, "tokenizes the prompts of benchmarks with it", "prompts"),
            ("eos_token_ids", BENCHMARKS, "knows by them that a completion was not cut"),
            ("_tokenizer", GROUPED, "pads prompts as it does"),
            ("_dist", GROUPED, "asks it whether forward passes communicate"),
            ("generation_config", GROUPED, "samples by it"),
            ("temperature", GROUPED, "knows by it whether sampling has the old log-probabilities"),
            ("eos_token_ids", GROUPED, "leaves to `generate` what ends completions otherwise"),
            ("mask_truncated_completions", GROUPED, "refuses stop strings with it"),
            ("num_iterations", GROUPED, "knows by it whether TRL computes the old log-probabilities"),
            ("use_transformers_continuous_batching", GROUPED, "leaves sampling to TRL by it"),
            ("_generate_and_score_completions", RECORDS, "counts rollouts by it"),
            ("_calculate_rewards", RECORDS, "measures the time of it"),
            ("_generate", RECORDS, "measures the time of it"),
            ("reward_func_names", RECORDS, "writes them into run.json"),
        )
    ),
    *(
        Name("trl.GRPOTrainer", *touched)
        for touched in (
            ("_buffered_inputs", LAYOUT, "lays the micro-batches there out anew"),
            ("_step", LAYOUT, "knows by it which micro-batch is under way"),
            ("num_iterations", LAYOUT, "knows by it whether the policy has moved since generation"),
            *((name, LAYOUT, "knows by it whether the loss is TRL's own") for name in LOSS if name != "_compute_loss"),
            ("get_high_entropy_mask", UPDATE, "keeps what it returns in pass 1, and replays use that"),
            ("loss_is_scaled_for_ga", REPLAYS, "divides losses by the accumulation steps where it is false"),
            ("_metrics", LOG, "logs through it"),
            ("_compute_loss", LAYOUT, "knows by it whether the loss is TRL's own", "model, inputs"),
            ("aux_loss_enabled", LAYOUT, "knows by it that the loss sees padding"),
            ("_is_vlm", LAYOUT, "knows by it whether one rank alone may have images"),
            ("loss_type", LAYOUT, "knows by it whether the loss is additive"),
            ("beta", LAYOUT, "knows by it whether there is a KL term"),
            ("importance_sampling_level", LAYOUT, "knows by it whether each token has a ratio"),
            ("_entropy_bonus_enabled", LAYOUT, "knows by it whether the loss is additive"),
            ("top_entropy_quantile", LAYOUT, "knows by it whether the loss is additive"),
            ("rollout_func", GROUPED, "leaves sampling to it"),
            ("tools", GROUPED, "leaves sampling to TRL by it"),
            ("rollout_func", BENCHMARKS, "refuses it"),
            ("tools", BENCHMARKS, "refuses them"),
            ("reward_funcs", BENCHMARKS, "scores data of the user's own with them"),
            ("reward_weights", BENCHMARKS, "weighs them so"),
            ("entropy_coef", REPLAYS, "restores it after replays"),
            ("_last_world_entropy", REPLAYS, "restores it after replays"),
            ("_entropy_window_stats", REPLAYS, "restores it after replays"),
            ("_tag_names", RULES, "tags cards as TRL does, and trainer/trainer.py has them tagged by it"),
            ("_name", RULES, "names the method as TRL does, and trainer/trainer.py has cards name it by that"),
            ("_paper", RULES, "cites the paper that TRL does, and trainer/trainer.py has cards cite it by that"),
            ("create_model_card", SCRIPTS, "leaves a card with the run", "model_name, dataset_name"),
        )
    ),
    Name("trl.distributed.DistributedBackend", "is_zero3", GROUPED, "keeps ranks in step by it"),
    Name("trl.distributed.DistributedBackend", "is_fsdp", GROUPED, "keeps ranks in step by it"),
    Name("trl.distributed.DistributedBackend", "summon_full_params", GROUPED, "samples within it", "module"),
    *(
        Name("trl.models", "unwrap_model_for_generation", file, "samples from the model that it yields", takes)
        for file, takes in (
            (GROUPED, "model, accelerator, * gather_deepspeed3_params, gradient_checkpointing_kwargs"),
            (BENCHMARKS, "model, accelerator, * gradient_checkpointing_kwargs"),
        )
    ),
    Name("trl.extras.profiling", "profiling_context", GROUPED, "is profiled as TRL is", "trainer, name"),
    Name("trl.GRPOConfig", "ds3_gather_for_generation", GROUPED, "gathers parameters by it"),
    Name("trl.GRPOConfig", "steps_per_generation", LAYOUT, "knows by it how long a buffer is"),
    Name(
        "trl.GRPOConfig", "use_adaptive_entropy", "trainer/checkpoints.py", "knows by it that TRL saves its own state"
    ),
    Name("trl.GRPOConfig", "num_generations", "trainer/config.py", "computes accumulation from it"),
    Name("trl.GRPOConfig", "generation_batch_size", "trainer/config.py", "knows by it how many prompts a batch takes"),
    Name("trl.GRPOConfig", "max_completion_length", SCRIPTS, "says by it how long completions may get"),
    Name(
        *("trl.TrlParser", "parse_args_and_config", SCRIPTS, "reads recipes with it"),
        "args, * return_remaining_strings, separate_remaining_strings",
    ),
    Name("trl.TrlParser", "_actions", SCRIPTS, "names the key that is nearest to an unknown one"),
    *(
        Name("trl.scripts.grpo.GRPOScriptArguments", name, SCRIPTS, "reads that key of a recipe")
        for name in (
            *("dataset_name", "dataset_config", "dataset_streaming", "dataset_train_split", "dataset_test_split"),
            *("reward_funcs", "reward_model_name_or_path"),
        )
    ),
    *(
        Name("trl.ModelConfig", name, SCRIPTS, "reads that key of a recipe")
        for name in ("model_name_or_path", "model_revision", "attn_implementation", "dtype")
    ),
    *(
        Name("trl.ModelConfig", name, SCRIPTS, "changes that key for a rehearsal")
        for name in ("use_peft", "lora_target_modules", "load_in_4bit", "load_in_8bit")
    ),
    Name("trl.DatasetMixtureConfig", "datasets", SCRIPTS, "mixes these"),
    Name("trl", "get_dataset", SCRIPTS, "mixes datasets with it", "mixture_config"),
    Name("trl", "get_peft_config", SCRIPTS, "makes an adapter's settings with it", "model_args"),
    Name("trl", "get_quantization_config", SCRIPTS, "makes a quantization's settings with it", "model_args"),
    Name("trl.trainer.utils", "create_model_from_path", SCRIPTS, "loads the base of an adapter with it", "model_id"),
    Name("trl.trainer.utils", "get_config_model_id", "trainer/trainer.py", "names a run by it", "config"),
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
    "_prepare_inputs": ["generation_batch"],
    "_generate_and_score_completions": ["inputs"],
    "_get_per_token_logps_and_entropies": [
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", ...)
    ],
}
"""The methods of TRL's trainer that ours overrides, with the arguments that they are called with."""

STOOD_IN_FOR = {
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", ...],
    "_generate_and_score_completions": ["inputs"],
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep", ...],
}
"""The methods that grouped sampling stands in for on a trainer of TRL's, with the same."""


def takes(trainer_class: type, method: str, expected: list) -> bool:
    found = parameter_names(getattr(trainer_class, method))
    return found == expected or [*found[: len(expected) - 1], ...] == expected


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_the_overridden_methods_keep_their_signatures(method):
    assert takes(GRPOTrainer, method, OVERRIDDEN[method]), (
        f"TRL's GRPOTrainer.{method} takes other arguments now: the method of that name in trainer/trainer.py "
        "overrides it and passes them on."
    )


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("method", STOOD_IN_FOR)
def test_the_methods_that_grouped_sampling_stands_in_for_keep_their_signatures(trainer_class, method):
    assert takes(trainer_class, method, STOOD_IN_FOR[method]), (
        f"TRL's {trainer_class.__name__}.{method} takes other arguments now: trainer/grouped.py stands in for it."
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


def test_what_the_loss_depends_on_is_said_by_these_attributes(tmp_path):
    trainer = trl_trainer(tmp_path)
    neutral = {"aux_loss_enabled": False, "loss_type": "grpo", "beta": 0.0, "importance_sampling_level": "token"}
    neutral |= {"_entropy_bonus_enabled": False, "top_entropy_quantile": 1.0}
    found = {name: getattr(trainer, name) for name in neutral}
    assert found == neutral, (
        f"TRL's GRPOTrainer says {found} of a plain loss and not {neutral} any more: `_loss_allows` in "
        "trainer/layout.py reads these."
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
        "`generation_config` any more: `_why_not_by_generate` in trainer/grouped.py asks it."
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
        "`eos_token_ids`, any more: trainer/grouped.py pads by the one, callbacks/benchmarks.py reads completions by "
        "the other."
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
        "backward any more: trainer/update.py records micro-batches and replays them so."
    )
    assert trainer.synchronises == [False, True] * 2, (
        "TRL's GRPOTrainer computes losses with other `sync_gradients` than False up to the last micro-batch: "
        "trainer/update.py knows by it that pass 1 is over."
    )


def test_log_probabilities_come_first_and_are_those_of_the_completion(trained):
    logps = trained.logps[0]
    assert logps.shape == trained.prepared["completion_ids"].shape and logps.requires_grad, (
        "TRL's `_get_per_token_logps_and_entropies` does not return the completions' log-probabilities in first place "
        "any more: trainer/trainer.py has them kept for replays."
    )


def test_the_step_counter_moves_in_training_step_alone(trained):
    """It selects the slice and triggers generation."""
    before = trained._step
    trained.compute_loss(trained.model, trained.prepared)
    assert before == trained._step == trained.args.gradient_accumulation_steps, (
        "TRL's `compute_loss` advances `_step`, or `training_step` does so no more: replays in "
        "trainer/update.py call `compute_loss` and must leave it alone."
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


def test_compute_loss_returns_a_loss_that_is_divided_for_accumulation():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, (
        "TRL's GRPOTrainer leaves dividing the loss by the accumulation steps to `training_step` now, as its "
        "`loss_is_scaled_for_ga` says: `Replays.run` in trainer/replays.py goes backward with what `compute_loss` "
        "returns."
    )


def test_scoring_alone_gives_a_batch_size_and_asks_for_no_entropies(tmp_path):
    asked = []

    class Asking(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, batch_size=None, compute_entropy=False, **kwargs):
            asked.append((torch.is_grad_enabled(), batch_size, compute_entropy))
            return super()._get_per_token_logps_and_entropies(
                *args, batch_size=batch_size, compute_entropy=compute_entropy, **kwargs
            )

    trl_trainer(tmp_path, Asking, max_steps=1, num_iterations=2, beta=0.01).train()
    rows = TINY_BATCH["per_device_train_batch_size"]
    assert set(asked) == {(False, rows, False), (True, None, True)}, (
        "TRL tells its scoring passes from its loss in another way now: trainer/scoring.py knows them by their "
        "`batch_size` and scores them in a layout of its own."
    )


@pytest.mark.parametrize("trainer_class, config_class", BOTH)
def test_the_old_log_probabilities_are_the_first_that_scoring_asks_for(tmp_path, trainer_class, config_class):
    spying = type("Spying", (SpyingMixin, trainer_class), {})
    trainer = make_trainer(tmp_path, spying, config_class, scripted=False, beta=0.01, steps_per_generation=4)
    scored = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    first = trainer.logps[0]
    if trainer_class is RLOOTrainer:
        first = (first * scored["completion_mask"]).sum(1)
    key = "old_per_token_logps" if trainer_class is GRPOTrainer else "old_logps"
    assert len(trainer.logps) == 2 and torch.equal(scored[key], first), (
        f"TRL's {trainer_class.__name__} does not ask for the policy's log-probabilities first when it scores "
        f"completions, or does not keep them in `{key}`: trainer/grouped.py answers the first question with those of "
        "sampling, and trainer/scoring.py keeps its entropies."
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
        "trainer/step_log.py logs through them."
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
        f"TRL does not log {', '.join(gone)} any more: SLOW_METRICS in trainer/step_log.py and RATIO_MEANS "
        "in trainer/layout.py name it."
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
        "trainer/replays.py names what replays must not move."
    )
    found = [getattr(trainer, name) for name in moving]
    assert found[0] == pytest.approx(0.02) and found[1] > 0 and found[2] is None, (
        "TRL's entropy controller does not take a step of `entropy_coef_delta` after an optimizer step any more: "
        "trainer/replays.py restores it after replays."
    )


# ---- Cards and recipes


def test_a_paper_is_cited_by_title_number_and_entry():
    assert GRPOTrainer._paper.keys() == {"title", "id", "citation"}, (
        "TRL's GRPOTrainer describes its paper in `_paper` by other keys now: trainer/rules.py describes ours so."
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
        "more: what reads recipes in scripts/ names them."
    )
