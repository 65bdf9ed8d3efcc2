"""The internals of transformers and huggingface_hub that we touch, each with the promise that we rely on."""

import inspect

import pytest
import torch
import transformers
from contracts import Name, check, parameter_names
from helpers import make_trainer, tiny_model
from packaging.version import Version
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoTokenizer,
    DynamicCache,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MaxTimeCriteria,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    Trainer,
    TrainerCallback,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import EosTokenCriteria
from transformers.utils.hub import PushInProgress
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl.sampling.grouped import SERVED_SETTINGS
from gxpo_trl.tasks import TINY_MODEL_PATH


FROM_5_23 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers has this from 5.23 on"
)

TRAINER, ARGUMENTS, STATE = "transformers.Trainer", "transformers.TrainingArguments", "transformers.TrainerState"
CALLBACK, MIXIN = "transformers.TrainerCallback", "transformers.generation.GenerationMixin"
CONFIG, CACHES = "transformers.GenerationConfig", "transformers.cache_utils"
UPDATE, REPLAYS, GROUPED, CONFIGURATION = (f"trainer/{name}.py" for name in ("update", "replays", "grouped", "config"))
BENCHMARKS, HUB, TRACKERS, RECORDS = (f"callbacks/{name}.py" for name in ("benchmarks", "hub", "trackers", "records"))
ITSELF, CHECKPOINTS = "trainer/trainer.py", "trainer/checkpoints.py"
FINGERPRINTS = "evaluation/fingerprints.py"
GENERATION, TRAITS, SUPPORT = "sampling/grouped.py", "sampling/model_traits.py", "engines/support.py"
SHIM, CARD, SCRIPTS, WRITING = "tests/cpu_engines.py", "reporting/card.py", "scripts/", "trajectory/writing.py"

NAMES = [
    # ---- The trainer
    Name(TRAINER, "accelerator", UPDATE, "makes the engine with it"),
    Name(TRAINER, "args", UPDATE, "reads the settings there"),
    Name(TRAINER, "model", UPDATE, "looks for random generators in it"),
    Name(TRAINER, "current_gradient_accumulation_steps", UPDATE, "gives replays the divisor of pass 1 by it"),
    Name(TRAINER, "add_callback", "trainer/trainer.py", "learns by a callback where the loop is", "callback"),
    Name(TRAINER, "model_wrapped", GROUPED, "unwraps it to sample"),
    Name(TRAINER, "optimizer", UPDATE, "makes the engine for it"),
    Name(TRAINER, "state", UPDATE, "names steps by it"),
    Name(TRAINER, "control", BENCHMARKS, "keeps the step's own log from being dropped there"),
    Name(TRAINER, "train_dataset", BENCHMARKS, "looks for benchmarks' problems there"),
    Name(TRAINER, "processing_class", BENCHMARKS, "asks in its chat template"),
    Name(TRAINER, "is_fsdp_enabled", BENCHMARKS, "knows by it that a model can't be sampled"),
    Name(TRAINER, "callback_handler", TRACKERS, "looks for TensorBoard's callback there"),
    Name("transformers.trainer_callback.CallbackHandler", "callbacks", TRACKERS, "puts itself first there"),
    Name(TRAINER, "remove_callback", SCRIPTS, "quietens a rehearsal with it", "callback"),
    Name(TRAINER, "compute_loss_context_manager", REPLAYS, "computes the losses of replays in it", ""),
    Name(TRAINER, "log", BENCHMARKS, "logs benchmarks past TRL's own", "logs"),
    Name(TRAINER, "evaluate", RECORDS, "takes the time of it off the clock"),
    Name(TRAINER, "is_world_process_zero", HUB, "writes the card once", ""),
    Name(TRAINER, "create_model_card", HUB, "completes the card that it writes"),
    Name(TRAINER, "push_in_progress", HUB, "finds pushes that failed in the background there"),
    Name(TRAINER, "_push_from_checkpoint", HUB, "goes on training where it fails"),
    Name(TRAINER, "_finish_current_push", HUB, "says what failed until then", ""),
    Name(TRAINER, "init_hf_repo", HUB, "knows by its name that an error is the Hub's"),
    Name(TRAINER, "train", SCRIPTS, "trains with it", "* resume_from_checkpoint"),
    Name(TRAINER, "hub_model_id", SCRIPTS, "says where a push was to go"),
    Name(TRAINER, "save_model", SCRIPTS, "saves without a push", "output_dir, * _internal_call"),
    Name(TRAINER, "save_state", SCRIPTS, "saves the trainer's state with it", ""),
    Name(TRAINER, "push_to_hub", SCRIPTS, "sends the finished run with it"),
    Name(ARGUMENTS, "to_dict", RECORDS, "writes the settings down with it", ""),
    Name(ARGUMENTS, "world_size", CONFIGURATION, "checks the number of processes by it"),
    Name(ARGUMENTS, "per_device_train_batch_size", CONFIGURATION, "computes accumulation from it"),
    Name(ARGUMENTS, "gradient_accumulation_steps", CONFIGURATION, "sets it by `prompts_per_step`"),
    Name(ARGUMENTS, "max_grad_norm", UPDATE, "has the engine clip by it"),
    Name(ARGUMENTS, "tf32", GROUPED, "knows by it that sampling and training round otherwise"),
    Name(ARGUMENTS, "fp16", SUPPORT, "refuses it"),
    Name(ARGUMENTS, "optim", SUPPORT, "refuses optimizers by it"),
    Name(ARGUMENTS, "eval_steps", BENCHMARKS, "refuses benchmarks without it"),
    Name(ARGUMENTS, "per_device_eval_batch_size", BENCHMARKS, "samples so many completions at once"),
    Name(ARGUMENTS, "run_name", TRACKERS, "resumes a run of trackio under this name"),
    Name(ARGUMENTS, "report_to", TRACKERS, "knows by it which trackers there are"),
    Name(ARGUMENTS, "should_save", "trainer/trainer.py", "writes the state of the update on one process"),
    Name(ARGUMENTS, "process_index", SCRIPTS, "prints the plan once"),
    Name(ARGUMENTS, "distributed_state", SCRIPTS, "has all processes wait with it"),
    Name(STATE, "global_step", BENCHMARKS, "knows by it when to score"),
    Name(STATE, "eval_steps", BENCHMARKS, "knows by it when to score"),
    Name(STATE, "max_steps", SCRIPTS, "draws the bar of the demo by it"),
    Name(STATE, "log_history", RECORDS, "copies its last entry to log.jsonl"),
    Name(STATE, "stateful_callbacks", RECORDS, "keeps there what was spent"),
    Name(STATE, "is_world_process_zero", RECORDS, "writes on one process"),
    Name("transformers.TrainerControl", "should_log", BENCHMARKS, "keeps the step's own log from being dropped"),
    Name(CALLBACK, "on_train_begin", BENCHMARKS, "scores the start", "args, state, control"),
    *(
        Name(
            CALLBACK,
            event,
            "trainer/step_callbacks.py",
            "knows by it where the training loop is",
            "args, state, control",
        )
        for event in ("on_step_begin", "on_optimizer_step", "on_step_end")
    ),
    Name(CALLBACK, "on_step_begin", TRACKERS, "knows by it that all trackers have begun", "args, state, control"),
    Name(CALLBACK, "on_step_end", BENCHMARKS, "scores every so many steps", "args, state, control"),
    Name(CALLBACK, "on_train_end", RECORDS, "stops the clock", "args, state, control"),
    Name(CALLBACK, "on_log", RECORDS, "writes log.jsonl", "args, state, control"),
    Name("transformers.integrations.TensorBoardCallback", "logging_dir", TRACKERS, "resumes a run in this folder"),
    Name("transformers", "PrinterCallback", SCRIPTS, "takes it out"),
    Name("transformers", "ProgressCallback", SCRIPTS, "takes it out of a rehearsal"),
    Name("transformers.trainer", "TRAINER_STATE_NAME", TRACKERS, "knows a checkpoint by that file"),
    Name("transformers.trainer", "TRAINER_STATE_NAME", SCRIPTS, "knows by that file that a run is over"),
    Name("transformers.hf_argparser", "string_to_bool", "values.py", "reads true and false by it", "v"),
    Name(TRAINER, "_get_output_dir", ITSELF, "finds the folder of a checkpoint by it", "trial"),
    Name(ARGUMENTS, "save_total_limit", ITSELF, "has older checkpoints go when every process has saved"),
    Name(ARGUMENTS, "save_only_model", CHECKPOINTS, "knows by it what a checkpoint is to hold"),
    Name(ARGUMENTS, "output_dir", ITSELF, "looks for checkpoints there"),
    Name(ARGUMENTS, "resume_from_checkpoint", SCRIPTS, "says there where a run begins"),
    Name(ARGUMENTS, "learning_rate", SCRIPTS, "compares it with the checkpoint's"),
    Name(ARGUMENTS, "lr_scheduler_type", SCRIPTS, "knows by it whether the length of a run matters"),
    Name(STATE, "best_model_checkpoint", ITSELF, "keeps that one"),
    Name(STATE, "max_steps", ITSELF, "knows by it that a run is over"),
    Name("transformers.TrainerControl", "should_training_stop", ITSELF, "takes no step beyond the last"),
    Name("transformers.trainer", "TRAINING_ARGS_NAME", CHECKPOINTS, "knows by that file who saved a checkpoint"),
    Name("transformers.trainer_utils", "PREFIX_CHECKPOINT_DIR", ITSELF, "finds the folder of a checkpoint by it"),
    Name(
        *("transformers.trainer_utils", "rotate_checkpoints", ITSELF, "has older checkpoints go"),
        "output_dir, save_total_limit, best_model_checkpoint, * use_mtime",
    ),
    Name("transformers.utils.hub.PushInProgress", "jobs", HUB, "finds pushes that failed there"),
    # ---- Generation
    Name(
        *(MIXIN, "generate", GROUPED, "samples through it"),
        "* generation_config, stopping_criteria, custom_generate",
    ),
    Name(
        *(MIXIN, "prepare_inputs_for_generation", GENERATION, "has a model's inputs prepared by it"),
        "input_ids, * next_sequence_length, attention_mask, is_first_iteration",
    ),
    Name(CONFIG, "_get_default_generation_params", GENERATION, "knows by it which settings are neutral", ""),
    Name(CONFIG, "_pad_token_tensor", GENERATION, "takes the padding from there, as `generate` prepared it"),
    Name(CONFIG, "update", GENERATION, "fills in what a request leaves open", "* defaults_only"),
    Name(CONFIG, "to_dict", GENERATION, "goes through all settings", ""),
    *(
        Name(CONFIG, name, GENERATION, "reads the setting of that name")
        for name in ("max_length", "do_sample", "temperature", "return_dict_in_generate", "cache_implementation")
    ),
    Name(CONFIG, "stop_strings", GROUPED, "makes a criterion of them"),
    Name(CONFIG, "num_return_sequences", "evaluation/sampling.py", "asks for n samples by it"),
    Name(CONFIG, "eos_token_id", "evaluation/sampling.py", "knows by it what ends a completion"),
    Name("transformers.generation", "MaxLengthCriteria", GENERATION, "leaves this criterion out"),
    Name("transformers.generation.GenerateDecoderOnlyOutput", "sequences", GENERATION, "returns completions there"),
    Name("transformers", "StopStringCriteria", GROUPED, "looks for stop strings with it", "tokenizer, stop_strings"),
    Name(
        *("transformers.PreTrainedModel", "_hf_peft_config_loaded", "callbacks/adapters.py"),
        "knows by it that transformers saves an adapter which it has added",
    ),
    Name("transformers.PreTrainedModel", "is_remote_code", TRAITS, "refuses code that it does not know by it", ""),
    Name("transformers.PreTrainedModel", "generation_config", GENERATION, "takes defaults from there"),
    Name("transformers.PreTrainedConfig", "get_text_config", TRAITS, "refuses multimodal models by it", "* decoder"),
    Name("transformers.PreTrainedConfig", "is_encoder_decoder", TRAITS, "refuses encoder-decoders by it"),
    Name(CACHES, "DynamicCache", GENERATION, "keeps keys and values in it", "* config"),
    Name(f"{CACHES}.DynamicCache", "layers", GENERATION, "cuts and joins the layers"),
    Name(f"{CACHES}.DynamicCache", "batch_select_indices", GENERATION, "repeats and drops rows with it", "indices"),
    Name(f"{CACHES}.DynamicCache", "get_seq_length", GENERATION, "knows by it whether a cache is filled", ""),
    Name(f"{CACHES}.DynamicLayer", "keys", GENERATION, "pads them"),
    Name(f"{CACHES}.DynamicLayer", "values", GENERATION, "pads them"),
    Name(f"{CACHES}.DynamicLayer", "is_initialized", GENERATION, "leaves layers without keys of their own alone"),
    Name(f"{CACHES}.DynamicSlidingWindowLayer", "sliding_window", GENERATION, "knows by it how much is kept"),
    Name(f"{CACHES}.DynamicSlidingWindowLayer", "cumulative_length", GENERATION, "sets it when it pads or cuts"),
    # ---- The Hub
    Name("huggingface_hub.HfApi", "create_repo", SCRIPTS, "makes a repository", "repo_id, * private, exist_ok"),
    Name(
        *("huggingface_hub.HfApi", "upload_folder", SCRIPTS, "sends a run in one commit"),
        "* repo_id, folder_path, commit_message",
    ),
    Name("huggingface_hub.RepoUrl", "repo_id", SCRIPTS, "names the repository in full by it"),
    Name("huggingface_hub.errors", "HfHubHTTPError", HUB, "goes on training when it is raised"),
    Name("huggingface_hub", "try_to_load_from_cache", FINGERPRINTS, "finds a revision by it", "repo_id, filename"),
    Name("huggingface_hub.ModelCard", "text", CARD, "appends sections to it"),
    Name("huggingface_hub.ModelCard", "data", CARD, "adds results to it"),
    Name("huggingface_hub.ModelCard", "save", WRITING, "writes a card with it", "filepath"),
    Name("huggingface_hub.ModelCardData", "to_yaml", CARD, "writes the head of a card with it", ""),
    Name("huggingface_hub.ModelCardData", "eval_results", CARD, "lists results there"),
    Name(
        *("huggingface_hub", "EvalResult", CARD, "says what was measured"),
        "* task_type, dataset_type, dataset_name, metric_type, metric_name, metric_value",
    ),
    # ---- The tests' own
    Name("transformers.integrations.deepspeed", "unset_hf_deepspeed_config", SHIM, "forgets a run's engine", ""),
    Name("transformers.training_args", "is_torch_bf16_gpu_available", SHIM, "claims bf16 for the CPU there", ""),
    Name(
        *(MIXIN, "_get_logits_processor", "tests/test_grouped_sampling.py", "compares processed scores with it"),
        "generation_config, * input_ids_seq_length, device",
    ),
]


@pytest.mark.parametrize("touched", NAMES, ids=str)
def test_the_names_that_we_touch_are_there(touched):
    check(touched)


# ---- The trainer

OVERRIDDEN = {
    "save_model": ["output_dir", "_internal_call"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["model", "trial"],
}
"""The methods of `Trainer` that ours overrides, with the arguments that they are called with."""


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_overridden_methods_keep_their_signatures(name):
    assert parameter_names(getattr(Trainer, name)) == OVERRIDDEN[name], (
        f"transformers' Trainer.{name} takes other arguments now: the method of that name in trainer/trainer.py "
        "overrides it and passes them on."
    )


def test_pushes_in_the_background_are_a_list():
    assert PushInProgress().jobs == [], (
        "transformers' PushInProgress does not begin with an empty list of jobs any more: callbacks/hub.py takes "
        "those that are done out of it."
    )


class LastEntry(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs, self.entry = logs, state.log_history[-1]


def test_an_entry_is_in_the_history_when_callbacks_hear_of_it(tmp_path):
    callback = LastEntry()
    trainer = make_trainer(tmp_path, GRPOTrainer, GRPOConfig, callbacks=[callback])
    trainer._metrics["train"]["probe"].append(1.0)
    trainer.control.should_log = True
    Trainer.log(trainer, {"eval/probe": 2.0})
    assert callback.entry["eval/probe"] == callback.logs["eval/probe"] == 2.0, (
        "transformers' Trainer.log calls `on_log` before the entry is in `state.log_history`: callbacks/records.py "
        "copies the last entry to log.jsonl."
    )
    assert not trainer.control.should_log, (
        "transformers' Trainer.log does not reset `control.should_log` any more: callbacks/benchmarks.py restores it."
    )
    assert trainer._metrics["train"]["probe"] == [1.0], (
        "transformers' Trainer.log touches TRL's `_metrics`: callbacks/benchmarks.py calls it so that the step's "
        "metrics stay."
    )


# ---- The KV cache


def cache_arguments(function) -> list[str]:
    """The arguments that are annotated as a cache. Their name is `past_key_values` until 5.23 and `cache` since."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if "Cache" in str(parameter.annotation)]


CACHE = cache_arguments(LlamaForCausalLM.forward)[0]


@pytest.mark.parametrize("function", [LlamaForCausalLM.forward, LlamaForCausalLM.prepare_inputs_for_generation])
def test_the_cache_is_the_one_argument_that_is_annotated_as_one(function):
    assert cache_arguments(function) == [CACHE], (
        f"transformers' LlamaForCausalLM.{function.__name__} has not exactly one argument that is annotated as a "
        "`Cache`, of one name in `forward` and `prepare_inputs_for_generation`: sampling/grouped.py hands the cache "
        "over under that name."
    )


def test_inputs_are_prepared_for_the_last_tokens_and_the_cache_goes_with_them():
    """A prompt first and one more token then give the logits of all at once, padding on the left included."""
    model = tiny_model().eval()
    ids, mask = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=model.config)
    for width, new in ((4, 4), (5, 1)):
        inputs = model.prepare_inputs_for_generation(
            ids[:, :width],
            next_sequence_length=new,
            attention_mask=mask[:, :width],
            position_ids=positions[:, width - new : width],
            is_first_iteration=new > 1,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
        with torch.no_grad():
            logits = model(**inputs, return_dict=True).logits
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert inputs["input_ids"].tolist() == [[9], [7]] and inputs[CACHE] is cache and logits.size(1) == 1, (
        "transformers' `prepare_inputs_for_generation` does not cut the inputs to the last `next_sequence_length` "
        "tokens, or does not pass on the cache and `logits_to_keep`: sampling/grouped.py relies on it."
    )
    assert torch.allclose(logits[:, -1], expected, atol=1e-5), (
        "transformers' models do not give the logits of a whole sequence from a cache and its last token any more: "
        "sampling/grouped.py decodes so."
    )


def test_a_cache_holds_rows_first_and_columns_last_but_one():
    model = tiny_model().eval()
    cache = DynamicCache(config=model.config)
    layer = cache.layers[0]
    assert type(layer) is DynamicLayer and not layer.is_initialized and cache.get_seq_length() == 0, (
        "transformers' DynamicCache of a Llama does not begin with empty `DynamicLayer`s any more: "
        "sampling/model_traits.py and grouped.py know the stock cache by them."
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), use_cache=True, **{CACHE: cache})
    before = layer.keys.clone()
    cache.batch_select_indices(torch.tensor([1, 0, 0]))
    shapes = {tuple(layer.keys.shape[i] for i in (0, -2)), tuple(layer.values.shape[i] for i in (0, -2))}
    assert layer.is_initialized and shapes == {(3, 3)} and cache.get_seq_length() == 3, (
        "transformers' DynamicLayer does not hold rows in the first and columns in the last dimension but one any "
        "more: sampling/grouped.py pads and joins `keys` and `values` so."
    )
    assert torch.equal(layer.keys, before[[1, 0, 0]]), (
        "transformers' `batch_select_indices` does not pick rows in the order of the indices, repeated ones included: "
        "sampling/grouped.py repeats a prompt's row by it."
    )


def test_a_sliding_window_keeps_one_column_less_than_it_is_wide_and_counts_all():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=20, num_key_value_heads=1, head_dim=4, sliding_window=4, **sizes)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        MistralForCausalLM(config)(input_ids=torch.arange(6)[None], use_cache=True, **{CACHE: cache})
    layer = cache.layers[0]
    found = (type(layer), layer.sliding_window, layer.keys.size(-2), layer.cumulative_length)
    assert found == (DynamicSlidingWindowLayer, 4, 3, 6), (
        "transformers' DynamicSlidingWindowLayer does not keep `sliding_window - 1` columns and count all of them in "
        "`cumulative_length` any more: `_pad` in sampling/grouped.py cuts it so."
    )


@FROM_5_23
def test_a_layer_that_keeps_nothing_has_a_class_of_its_own():
    check(Name(CACHES, "DummyLayer", TRAITS, "knows by it that a layer keeps nothing"))


# ---- Settings, processors and criteria


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
    assert output is ids and seen["token_budget"] == 7 and torch.equal(seen["attention_mask"], mask), (
        "transformers' `generate` does not return what `custom_generate` returns, or hands over other arguments than "
        "it names: `sample_grouped` in sampling/grouped.py is called so."
    )
    config = seen["generation_config"]
    assert (config.max_length, int(config._pad_token_tensor)) == (3 + 5, 0), (
        "transformers' `generate` does not prepare `max_length` and `_pad_token_tensor` for `custom_generate` any "
        "more: sampling/grouped.py reads both."
    )
    processors = {type(processor).__name__ for processor in seen["logits_processor"]}
    assert processors == {"RepetitionPenaltyLogitsProcessor", "TopKLogitsWarper"}, (
        "transformers' `generate` prepares other logits processors for `custom_generate` than the settings ask for: "
        "sampling/grouped.py applies them as they come."
    )
    criteria = {type(criterion).__name__ for criterion in seen["stopping_criteria"]}
    assert criteria == {"MaxLengthCriteria", "EosTokenCriteria", "MaxTimeCriteria"}, (
        "transformers' `generate` prepares other stopping criteria for `custom_generate` than the settings ask for: "
        "sampling/grouped.py leaves out MaxLengthCriteria alone."
    )
    known = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE}
    others = (seen.keys() - {"generation_config", "logits_processor", "stopping_criteria", "token_budget"}) ^ known
    assert not others, (
        f"transformers' `generate` hands `{', '.join(sorted(others))}` to `custom_generate` now, or does so no more: "
        "`sample_grouped` in sampling/grouped.py knows which model inputs there are, and refuses others."
    )


def test_the_neutral_values_of_generations_settings_are_known():
    neutral = GenerationConfig._get_default_generation_params()
    assert neutral["num_beams"] == 1 and neutral["use_cache"] is True, (
        "transformers' GenerationConfig._get_default_generation_params does not name neutral values any more: "
        "sampling/grouped.py takes a setting with another value for one that it can't serve."
    )
    gone = (set(neutral) | SERVED_SETTINGS) - GenerationConfig().to_dict().keys()
    assert not gone, (
        f"transformers' GenerationConfig has no setting {', '.join(sorted(gone))} any more: SERVED_SETTINGS in "
        "sampling/grouped.py lists it."
    )


def test_defaults_fill_in_what_is_left_open_alone():
    config = GenerationConfig(top_k=3)
    config.update(top_k=5, top_p=0.5, defaults_only=True)
    assert (config.top_k, config.top_p) == (3, 0.5), (
        "transformers' GenerationConfig.update overwrites settings although `defaults_only` is set: "
        "sampling/grouped.py fills in a model's defaults with it."
    )


@FROM_5_23
def test_the_repetition_penalty_leaves_out_each_rows_own_padding():
    ids, scores = torch.tensor([[0, 0, 2], [0, 1, 2]]), torch.ones(2, 4)
    processor = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([2, 1]))
    penalized = processor(ids, scores)
    assert processor.penalty == 2.0 and penalized.tolist() == [[1.0, 1.0, 0.5, 1.0], [1.0, 0.5, 0.5, 1.0]], (
        "transformers' RepetitionPenaltyLogitsProcessor does not leave out as many tokens of each row as the tensor "
        "`prompt_ignore_length` says: sampling/grouped.py tells it the padding so."
    )


def test_criteria_look_at_tokens_alone_and_none_of_them_end_nothing():
    ids = torch.tensor([[3, 1], [3, 4]])
    ended = StoppingCriteriaList([EosTokenCriteria(torch.tensor([1]))])(ids, None)
    assert ended.tolist() == [True, False] and StoppingCriteriaList()(ids, None).tolist() == [False, False], (
        "transformers' StoppingCriteriaList does not answer for each row without scores any more: "
        "sampling/grouped.py asks it so."
    )


def test_a_criterion_finds_stop_strings_or_says_that_it_cannot():
    letters = Tokenizer(WordLevel({letter: i for i, letter in enumerate("abcdef}")}, unk_token="a"))
    letters.pre_tokenizer, letters.decoder = Split(Regex("."), behavior="isolated"), Fuse()
    criterion = StopStringCriteria(PreTrainedTokenizerFast(tokenizer_object=letters), ["c}"])
    assert criterion(torch.tensor([[2, 6], [6, 2]]), None).tolist() == [True, False], (
        "transformers' StopStringCriteria does not find a stop string at the end of a row any more: "
        "trainer/grouped.py hands it to `generate` in place of `stop_strings`."
    )
    with pytest.raises(ValueError):  # no letters there; said by trainer/grouped.py in other words
        StopStringCriteria(AutoTokenizer.from_pretrained(TINY_MODEL_PATH), ["c}"])


# ---- What a model's configuration says


def test_a_models_own_code_is_told_from_transformers():
    remote = type("Remote", (LlamaForCausalLM,), {"_auto_class": "AutoModelForCausalLM"})
    assert remote.is_remote_code() and not LlamaForCausalLM.is_remote_code(), (
        "transformers' `is_remote_code` does not tell a model's own code from the library's any more: "
        "sampling/model_traits.py refuses it by that."
    )


def test_rotary_embeddings_name_their_type_once_or_for_each_kind_of_layer():
    single, layered = LlamaConfig().rope_parameters, Gemma3TextConfig().rope_parameters
    assert single["rope_type"] == "default" and {rope["rope_type"] for rope in layered.values()} == {"default"}, (
        "transformers' configurations do not name the type of rotary embeddings in `rope_parameters` any more, once "
        "or for each kind of layer: sampling/model_traits.py reads it there."
    )


def test_the_kinds_of_attention_have_these_names():
    kinds = set(Gemma3TextConfig().layer_types)
    assert kinds == {"full_attention", "sliding_attention"} and Llama4TextConfig().attention_chunk_size, (
        "transformers' configurations do not name kinds of attention in `layer_types`, or chunks in "
        "`attention_chunk_size`, any more: sampling/model_traits.py refuses attention that is cut by them."
    )


def test_a_plain_decoders_text_configuration_is_its_own():
    config = LlamaConfig()
    assert config.get_text_config(decoder=True) is config and config.get_text_config() is config, (
        "transformers' `get_text_config` of a plain decoder is not its own configuration any more: "
        "sampling/model_traits.py takes such a model for a multimodal one."
    )


def test_dropout_goes_by_these_names():
    names = LlamaConfig().to_dict().keys() & {"attention_dropout"} | GPT2Config().to_dict().keys() & {"attn_pdrop"}
    assert names == {"attention_dropout", "attn_pdrop"}, (
        "transformers' configurations do not call dropout `…dropout` and `…pdrop` any more: `dropout_of` in "
        "sampling/model_traits.py looks for these names."
    )
