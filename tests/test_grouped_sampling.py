"""Grouped sampling gives what `generate` gives, with fewer passes over fewer rows, in any trainer that asks for it."""

import copy
import functools
import math
import re

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import (
    AS_TRL,
    ON_CPU,
    TINY_BATCH,
    assert_equal_parameters,
    half_without_spread,
    logged,
    make_trainer,
    patch_trl,
    tiny_model,
    train,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    StoppingCriteriaList,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from gxpo_trl import GroupedSamplingArguments, GXPOConfig, GXPOTrainer, LookaheadTrainer, sample_in_groups
from gxpo_trl.sampling.grouped import KEEP_ROWS, _Sampler, penalizes_by_row, sample_grouped, why_not_grouped
from gxpo_trl.sampling.model_traits import cache_argument, why_not_known, why_not_row_by_row
from gxpo_trl.tasks import TINY_MODEL_PATH


INSTALLED_NAME = cache_argument(LlamaForCausalLM)

VOCABULARY = 40
NEW_TOKENS = 14
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,  # so that the most likely token is not the same everywhere
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": list(range(1, 9)),
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "qwen2 moe": Qwen2MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "mistral, window": MistralConfig(**SIZES, sliding_window=4),
    "gemma": GemmaConfig(**SIZES),
    "gemma2, half windows": Gemma2Config(**SIZES, **WINDOW),
    "gemma3, half windows": Gemma3TextConfig(**SIZES, **WINDOW),
    "gpt-oss, sinks": GptOssConfig(**SIZES, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "gpt2, learned positions": GPT2Config(
        **{name: SIZES[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id")},
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
}


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    if config.tie_word_embeddings:  # else the most likely token is the last one again
        model.get_input_embeddings().weight.data.mul_(0.1)
    return model


def make_request(lengths: list[int], copies: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left, each `copies` times."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(9, VOCABULARY, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids.repeat_interleave(copies, 0), "attention_mask": mask.repeat_interleave(copies, 0)}


REQUEST = make_request([7, 3, 9, 2, 5, 6], copies=3)
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
SAMPLED = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "top_k": 0}


def grouped(model, request, **settings):
    return model.generate(**request, **settings, custom_generate=sample_grouped)


class SpySampler(_Sampler):
    """Writes down the shape of each forward pass: rows, cached columns after it, new columns."""

    passes: list[tuple[int, int, int]]

    def _forward(self, ids, mask, positions, cache, **kwargs):
        type(self).passes.append((ids.size(0), ids.size(1), positions.size(1)))
        return super()._forward(ids, mask, positions, cache, **kwargs)


@pytest.fixture
def passes(monkeypatch):
    SpySampler.passes = []
    monkeypatch.setattr("gxpo_trl.sampling.grouped._Sampler", SpySampler)
    return SpySampler.passes


PENALIZES = pytest.mark.skipif(not penalizes_by_row(), reason="this transformers penalizes padding")


def test_a_penalty_is_refused_where_transformers_penalizes_padding(monkeypatch):
    settings = GenerationConfig(**GREEDY, repetition_penalty=1.7)
    assert (why_not_grouped(build(MODELS["llama"]), settings) is None) == penalizes_by_row()
    monkeypatch.setattr("gxpo_trl.sampling.grouped.penalizes_by_row", lambda: False)
    assert "penalizes padding" in why_not_grouped(build(MODELS["llama"]), settings)
    assert why_not_grouped(build(MODELS["llama"]), GenerationConfig(**GREEDY)) is None


# ---- The same completions


@pytest.mark.parametrize("token_budget", [None, 1, 100, 300])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_completions_are_those_of_generate(name, token_budget):
    for seed in range(10):  # until a random model ends its rows at different times
        model = build(MODELS[name], seed)
        expected = model.generate(**REQUEST, **GREEDY)
        if len({int((row == 0).sum()) for row in expected[:, 9:]}) > 3:
            break
    else:
        pytest.fail("rows should end at different times")
    assert torch.equal(grouped(model, REQUEST, **GREEDY, token_budget=token_budget), expected)


def test_the_embedded_model_answers_the_same():
    model, tokenizer = tiny_model().eval(), AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    questions = ["Q: Mia has 6 pens. How many pens does Mia have? A:", "Q: Tom has 2 eggs. Tom finds 3 more. A:"]
    request = dict(tokenizer(questions, return_tensors="pt", padding=True, return_token_type_ids=False))
    assert torch.equal(grouped(model, request, **GREEDY), model.generate(**request, **GREEDY))


@pytest.mark.parametrize("lengths, copies", [([5], 1), ([5], 6), ([5, 5, 5], 2), ([1, 12], 1), ([12, 1], 4)])
def test_whatever_the_shape_of_the_request(lengths, copies):
    model, request = build(MODELS["mistral, window"]), make_request(lengths, copies, seed=1)
    assert torch.equal(grouped(model, request, **GREEDY, token_budget=60), model.generate(**request, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": list(range(VOCABULARY))},  # every row ends at once
        {"eos_token_id": None},  # every row is as long as it may be
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 12},  # which counts the padded prompt
        pytest.param({"repetition_penalty": 1.7}, marks=PENALIZES),
        {"suppress_tokens": [5, 6, 7, 8]},
    ],
    ids=str,
)
@pytest.mark.parametrize("token_budget", [None, 100])
def test_greedy_completions_are_those_of_generate_with(settings, token_budget):
    model = build(MODELS["llama"])
    if settings.get("eos_token_id", 0) is None:
        model.generation_config.eos_token_id = None
    settings = {**GREEDY, **settings}
    expected = model.generate(**REQUEST, **settings)
    assert torch.equal(grouped(model, REQUEST, **settings, token_budget=token_budget), expected)


@PENALIZES
def test_each_row_has_its_own_prompt_penalized():
    """The penalty must follow the rows as others are dropped and admitted."""
    model, request = build(MODELS["qwen2"]), make_request([2, 9, 4, 7], copies=2, seed=3)
    settings = {**GREEDY, "repetition_penalty": 3.0}
    expected = model.generate(**request, **settings)
    assert not torch.equal(expected[:, 9:], model.generate(**request, **GREEDY)[:, 9:])
    for token_budget in (None, 50, 100):
        assert torch.equal(grouped(model, request, **settings, token_budget=token_budget), expected)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, as many as the models here have."""
    names = ["<pad>", *(f"<{i}>" for i in range(1, 14)), *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<13>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<1>", padding_side="left")


@PENALIZES
def test_padding_is_not_penalized():
    """With a factor below 1 what has occurred is favoured, and so would the padding be."""
    model, request = build(MODELS["llama"]), make_request([2, 9, 4, 7], copies=2, seed=3)
    request["input_ids"][request["attention_mask"] == 0] = 25
    settings = {**GREEDY, "repetition_penalty": 0.2, "pad_token_id": 25}
    expected = model.generate(**request, **settings)
    for token_budget in (None, 100):
        assert torch.equal(grouped(model, request, **settings, token_budget=token_budget), expected)


def test_prompts_that_differ_in_their_padding_alone_are_not_copies():
    model, request = build(MODELS["llama"]), make_request([4], copies=4)
    request["input_ids"][:, 0] = 0  # a token of the prompt in the first two rows, padding in the others
    request["attention_mask"][2:, 0] = 0
    expected = model.generate(**request, **GREEDY)
    assert not torch.equal(expected[1], expected[2])
    assert torch.equal(grouped(model, request, **GREEDY), expected)


@pytest.mark.parametrize("token_budget", [None, 100])
def test_stop_strings_end_a_completion(token_budget):
    model, tokenizer = build(MODELS["llama"]), letters_tokenizer()
    texts = tokenizer.batch_decode(model.generate(**REQUEST, **GREEDY)[:, 9:])
    pairs = sorted({pair for text in texts for pair in re.findall("[a-z]{2}", text)})[:2]  # of two tokens each
    stop = [*pairs, "q"]
    expected = model.generate(**REQUEST, **GREEDY, stop_strings=stop, tokenizer=tokenizer)
    ended = tokenizer.batch_decode(expected[:, 9:])
    assert all(any(text.replace("<pad>", "").endswith(pair) for text in ended) for pair in pairs)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stop)])
    settings = {**GREEDY, "stopping_criteria": criteria, "token_budget": token_budget}
    assert torch.equal(grouped(model, REQUEST, **settings), expected)


def test_adapters_are_applied():
    base = build(MODELS["llama"])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    with model.disable_adapter():
        without = model.generate(**REQUEST, **GREEDY)
    expected = model.generate(**REQUEST, **GREEDY)
    assert expected.shape != without.shape or not torch.equal(expected, without)
    assert torch.equal(grouped(model, REQUEST, **GREEDY), expected)


@pytest.mark.parametrize(
    "attention, dtype", [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
)
def test_log_probabilities_and_entropies_are_those_of_the_model_at_the_sampling_temperature(attention, dtype):
    model = build(MODELS["gemma3, half windows"]).to(dtype)
    model.set_attn_implementation(attention)
    settings = {**SAMPLED, "temperature": 1.3, "top_p": 0.8, "return_dict_in_generate": True, "token_budget": 200}
    output = grouped(model, REQUEST, **settings, output_entropies=True)
    prompts, width = REQUEST["input_ids"].size(1), output.logps.size(1)
    ids, real = output.sequences, torch.arange(width) < output.lengths[:, None]
    mask = torch.cat([REQUEST["attention_mask"], real.long()], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, prompts - 1 : -1].float()
    distributions = torch.distributions.Categorical(logits=logits / 1.3)
    logps, entropies = distributions.log_prob(ids[:, prompts:]) * real, distributions.entropy() * real
    atol = 1e-4 if dtype is torch.float32 else 0.5
    assert output.logps.dtype == output.entropies.dtype == torch.float32
    assert torch.allclose(output.logps, logps, atol=atol) and torch.allclose(output.entropies, entropies, atol=atol)
    assert (output.logps[real] < 0).all() and (output.logps[~real] == 0).all()
    assert entropies[real].mean() > 0.1 and (output.entropies[~real] == 0).all()
    assert (ids[:, prompts:][~real] == 0).all()


def test_no_temperature_is_one_of_1():
    model, outputs = build(MODELS["llama"]), []
    for temperature in (None, 1.0):
        torch.manual_seed(0)
        settings = {**SAMPLED, "temperature": temperature, "return_dict_in_generate": True}
        outputs.append(grouped(model, REQUEST, **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences) and torch.equal(outputs[0].logps, outputs[1].logps)


def test_a_fixed_seed_gives_a_fixed_result():
    model = build(MODELS["llama"])

    def sample(seed):
        torch.manual_seed(seed)
        return grouped(model, REQUEST, **SAMPLED, token_budget=200)

    assert torch.equal(sample(1), sample(1))
    assert sample(1).shape != sample(2).shape or not torch.equal(sample(1), sample(2))


# ---- The same distribution


@torch.no_grad()
def exact_pairs(model, prompt: torch.Tensor, settings: dict) -> torch.Tensor:
    """The probability of each pair of first tokens, (V, V), by transformers' own processors; one token at a time."""
    config = GenerationConfig(**settings)

    def distribution(rows):
        processors = model._get_logits_processor(config, input_ids_seq_length=rows.size(1), device=rows.device)
        return processors(rows, model(rows).logits[:, -1].float()).softmax(-1)

    first = distribution(prompt[None])[0]
    followed = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
    return first[:, None] * distribution(followed)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 10},
        {"temperature": 1.2, "top_p": 0.7},
        {"min_p": 0.1},
        pytest.param({"temperature": 1.4, "top_p": 0.9, "repetition_penalty": 1.3}, marks=PENALIZES),
    ],
    ids=str,
)
def test_token_pairs_are_as_frequent_as_they_are_probable(settings):
    """Pearson's χ² over pairs of tokens; pairs expected fewer than 5 times are counted as one."""
    model = build(LlamaConfig(**{**SIZES, "initializer_range": 0.15, "eos_token_id": None}))
    settings = {**SAMPLED, **settings, "max_new_tokens": 2, "return_dict_in_generate": False}
    request, draws = make_request([6], copies=1), 20_000
    probabilities = exact_pairs(model, request["input_ids"][0], settings).flatten()
    torch.manual_seed(0)
    rows = grouped(model, request, **settings, num_return_sequences=draws, token_budget=8 * 3000)[:, 6:]
    counts = torch.bincount(rows[:, 0] * VOCABULARY + rows[:, 1], minlength=VOCABULARY**2).double()
    expected = probabilities.double() * draws
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 5
    counts, expected = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 15
    statistic = ((counts - expected) ** 2 / expected).sum()
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))  # Wilson-Hilferty
    assert abs(z) < 3.5, f"z = {z:.2f}, χ² = {statistic:.0f} with {freedom} degrees of freedom"


def test_logits_that_are_not_finite_are_an_error():
    model = build(MODELS["llama"])
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(RuntimeError, match="finite"):
        grouped(model, REQUEST, **SAMPLED)


# ---- Fewer passes over fewer rows


def test_each_prompt_is_prefilled_once_and_finished_rows_are_dropped(passes):
    model = build(MODELS["llama"])
    completions = grouped(model, REQUEST, **GREEDY)[:, 9:]
    tokens = (completions != 0).sum(1)
    prefilled = [rows for rows, _, new in passes if new > 1]
    decoded = [rows for rows, _, new in passes if new == 1]
    assert prefilled == [6]
    assert len(decoded) == tokens.max() - 1
    needed = [int((tokens > step + 1).sum()) for step in range(len(decoded))]
    assert all(rows <= math.ceil(need / KEEP_ROWS) + 1 for rows, need in zip(decoded, needed, strict=True))
    assert sum(decoded) < 0.8 * len(tokens) * len(decoded)


@pytest.mark.parametrize("token_budget", [100, 150, 300])
def test_the_cache_stays_within_its_budget(passes, token_budget):
    grouped(build(MODELS["llama"]), REQUEST, **GREEDY, token_budget=token_budget)
    assert max(rows * columns for rows, columns, _ in passes) <= token_budget
    assert sum(new > 1 for _, _, new in passes) > 1, "prompts should come in waves"
    wave = [index for index, (_, _, new) in enumerate(passes) if new > 1][1]
    if token_budget == 300:
        assert passes[wave + 1][0] > passes[wave][0] * 3, "rows under way should meet the wave"


@pytest.mark.parametrize("seed", range(5))
def test_the_cache_stays_within_its_budget_as_a_longer_prompt_joins_shorter_ones(passes, seed):
    request = make_request([2] * 6 + [20] + [2] * 6, copies=1, seed=seed)
    budget = 3 * (20 + NEW_TOKENS)
    grouped(build(MODELS["llama"]), request, **GREEDY, token_budget=budget)
    assert max(rows * columns for rows, columns, _ in passes) <= budget


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_fit_are_not_split(passes, seed):
    request = make_request([7, 3, 9, 2, 5, 6], copies=4, seed=seed)
    grouped(build(MODELS["llama"]), request, **GREEDY, token_budget=8 * (9 + NEW_TOKENS))
    assert sum(rows for rows, _, new in passes if new > 1) == 6


def test_a_group_larger_than_the_budget_comes_in_parts(passes):
    model, request = build(MODELS["llama"]), make_request([5], copies=8)
    budget = 4 * (5 + NEW_TOKENS)
    assert torch.equal(grouped(model, request, **GREEDY, token_budget=budget), model.generate(**request, **GREEDY))
    assert max(rows * columns for rows, columns, _ in passes) <= budget


def test_one_row_always_runs(passes):
    grouped(build(MODELS["llama"]), REQUEST, **GREEDY, token_budget=1)
    assert {rows for rows, _, _ in passes} == {1}


# ---- What it can't serve


def config_of(**settings) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **settings})


@pytest.mark.parametrize(
    "config, reason",
    [
        (MambaConfig(vocab_size=9, hidden_size=8, state_size=4, num_hidden_layers=1), "takes no"),
        (config_of(attention_dropout=0.1), "dropout"),
        (
            config_of(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "longest sequence of the batch",
        ),
    ],
    ids=["state space", "dropout", "dynamic rope"],
)
def test_models_that_it_cannot_serve_are_named(config, reason):
    assert reason in why_not_grouped(build(config), GenerationConfig(**GREEDY), in_training=True)


def test_encoder_decoders_are_not_served():
    sizes = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    assert "encoder-decoder" in why_not_grouped(model, GenerationConfig(**GREEDY))


def test_attention_cut_at_absolute_positions_is_not_served():
    model = build(MODELS["llama"])
    assert why_not_grouped(model, GenerationConfig(**GREEDY)) is None
    model.config.layer_types = ["chunked_attention", "full_attention"]
    model.config.attention_chunk_size = 8
    assert "absolute" in why_not_grouped(model, GenerationConfig(**GREEDY))


def test_prompt_tuning_is_not_served():
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "prompt" in why_not_grouped(get_peft_model(build(MODELS["llama"]), tuning), GenerationConfig(**GREEDY))


@pytest.mark.parametrize(
    "setting",
    [
        *({"num_beams": 2}, {"use_cache": False}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 3}),
        *({"max_time": 1.0}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}),
        *({"output_scores": True}, {"guidance_scale": 2.0}),
    ],
    ids=str,
)
def test_settings_that_it_cannot_serve_are_named(setting):
    model = build(MODELS["llama"])
    assert next(iter(setting)) in why_not_grouped(model, GenerationConfig(**GREEDY, **setting))
    model.generation_config.update(**setting)  # the model's own settings count where none are given
    assert next(iter(setting)) in why_not_grouped(model, GenerationConfig(**GREEDY))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2}, "num_beams"),
        ({"token_budget": 0}, "token_budget"),
        ({"inputs_embeds": torch.zeros(18, 9, 32)}, "inputs_embeds"),
        (
            {"eos_token_id": None, "pad_token_id": None, "stopping_criteria": [lambda ids, _: ids[:, 0] > 0]},
            "pad_token",
        ),
    ],
    ids=["beams", "budget", "embeddings", "no padding token"],
)
def test_a_call_that_it_cannot_serve_is_an_error(settings, message):
    model = build(MODELS["llama"])
    if message == "pad_token":
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    with pytest.raises(ValueError, match=message):
        grouped(model, REQUEST, **{**GREEDY, **settings})


class Forgetful(LlamaForCausalLM):
    """Keeps no KV cache, as transformers' layers do under gradient checkpointing."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, store: Cache | None = None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False)

    def prepare_inputs_for_generation(self, input_ids, store: Cache | None = None, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def test_a_model_that_keeps_no_cache_is_an_error():
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        grouped(Forgetful(MODELS["llama"]).eval(), REQUEST, **GREEDY)


def test_under_gradient_checkpointing_a_model_says_so_or_answers_the_same():
    """Until transformers 5.23 its layers drop the cache in training; since then only where gradients are computed."""
    model = build(MODELS["llama"])
    expected = model.generate(**REQUEST, **GREEDY)
    model.train().gradient_checkpointing_enable()
    try:
        completions = grouped(model, REQUEST, **GREEDY)
    except ValueError as error:
        assert "gradient_checkpointing_disable" in str(error)
    else:
        assert torch.equal(completions, expected)


# ---- In a trainer


def text_length(completions, **kwargs) -> list[float]:
    return [float(len(text)) for text in completions]


class Rollouts:
    """Keeps the completions that were scored."""

    def __init__(self, *args, **kwargs):
        self.scored = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.scored.append(output)
        return output


class GXPORollout(Rollouts, GXPOTrainer):
    pass


class GRPORollout(Rollouts, GRPOTrainer):
    pass


class RLOORollout(Rollouts, RLOOTrainer):
    pass


each_trainer = pytest.mark.parametrize(
    "trainer_class, config_class",
    [(GRPORollout, GRPOConfig), (RLOORollout, RLOOConfig), (GXPORollout, GXPOConfig)],
    ids=["grpo", "rloo", "gxpo"],
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"generation_token_budget": 300}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@each_trainer
def test_the_trainer_scores_the_completions_that_generate_gives(tmp_path, trainer_class, config_class, settings):
    greedy = {"scripted": False, "generation_kwargs": {"do_sample": False}, "temperature": 0.7}
    trainers, evaluated = {}, {}
    for backend in ("grouped", "transformers"):
        allowed = greedy | (settings if backend == "grouped" else {})
        trainer = make_trainer(tmp_path, trainer_class, config_class, generation_backend=backend, **allowed)
        evaluated[backend] = trainer.evaluate()["eval_reward"]
        trainer.train()
        trainers[backend] = trainer
    ours, theirs = (trainers[backend].scored for backend in ("grouped", "transformers"))
    assert len(ours) == len(theirs) > 0
    for name in ("prompt_ids", "completion_ids", "completion_mask"):
        assert all(torch.equal(left[name], right[name]) for left, right in zip(ours, theirs, strict=True))
    assert evaluated["grouped"] == evaluated["transformers"] > 0


def test_sampled_runs_are_repeatable(tmp_path):
    first, second = (train(tmp_path, scripted=False, generation_backend="auto", max_steps=2) for _ in range(2))
    assert_equal_parameters(first, second)


def trl_trainer(tmp_path, trainer_class=GRPOTrainer, config_class=GRPOConfig, **settings):
    return make_trainer(tmp_path, trainer_class, config_class, scripted=False, **settings)


REPLACED = {"_generate_single_turn", "_generate_and_score_completions", "_get_per_token_logps_and_entropies"}


def replaced(trainer) -> set[str]:
    return REPLACED & vars(trainer).keys()


def test_nothing_else_of_a_trainer_is_touched(tmp_path):
    trainer = trl_trainer(tmp_path, num_iterations=2)
    before = dict(vars(trainer))
    assert not sample_in_groups(trainer, "transformers") and vars(trainer) == before
    assert sample_in_groups(trainer)
    assert {name: value for name, value in vars(trainer).items() if name not in REPLACED} == before
    assert replaced(trainer) == REPLACED


def test_without_the_opt_in_generate_samples(tmp_path):
    plain = train(tmp_path, scripted=False, update_rule="grpo", **AS_TRL)
    grouped_run = train(tmp_path, scripted=False, update_rule="grpo", generation_backend="grouped", **AS_TRL)
    assert_equal_parameters(plain, train(tmp_path, GRPOTrainer, GRPOConfig, scripted=False))
    assert logged(grouped_run, "reward") != logged(plain, "reward")


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_auto_leaves_to_generate_what_it_serves_alone_and_warns(tmp_path, caplog):
    assert not sample_in_groups(trl_trainer(tmp_path, generation_kwargs={"no_repeat_ngram_size": 2}))
    (warning,) = [text for text in warnings_of(caplog) if "sampled by" in text]
    assert "takes longer: the setting `no_repeat_ngram_size: 2` is not served." in warning
    caplog.clear()
    assert sample_in_groups(trl_trainer(tmp_path))
    assert not sample_in_groups(trl_trainer(tmp_path), "transformers")
    assert not any("sampled by" in text for text in warnings_of(caplog))


ELSEWHERE = {"use_vllm": True, "use_transformers_continuous_batching": True, "rollout_func": print, "tools": [print]}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_something_else_samples_auto_says_nothing(tmp_path, caplog, name):
    trainer = trl_trainer(tmp_path)
    setattr(trainer, name, ELSEWHERE[name])
    assert not sample_in_groups(trainer)
    assert not replaced(trainer) and not any("sampled by" in text for text in warnings_of(caplog))
    for asked in ({"backend": "grouped"}, {"token_budget": 300}, {"backend": "transformers", "token_budget": 300}):
        with pytest.raises(ValueError, match="can't have grouped generation"):
            sample_in_groups(trainer, **asked)


class OwnTrainer(GRPOTrainer):
    def _generate_single_turn(self, *args, **kwargs):
        return super()._generate_single_turn(*args, **kwargs)


def test_a_trainer_that_samples_in_its_own_way_goes_on_so(tmp_path, caplog):
    trainer = trl_trainer(tmp_path, OwnTrainer)
    assert not sample_in_groups(trainer) and not replaced(trainer)
    (warning,) = [text for text in warnings_of(caplog) if "sampled by" in text]
    assert "this OwnTrainer has a `_generate_single_turn` of its own" in warning


def test_a_budget_needs_it(tmp_path):
    with pytest.raises(
        ValueError, match="`generation_backend` is `transformers`. Leave out `generation_token_budget`"
    ):
        sample_in_groups(trl_trainer(tmp_path), "transformers", token_budget=300)


def test_it_is_asked_for_once(tmp_path):
    trainer = trl_trainer(tmp_path, generation_backend="auto")
    with pytest.raises(ValueError, match="already"):
        sample_in_groups(trainer)


def test_another_trainer_is_refused(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    dataset = Dataset.from_dict({"text": ["A: 1"]})
    trainer = SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)
    with pytest.raises(ValueError, match="GRPOTrainer or RLOOTrainer of TRL, got a SFTTrainer"):
        sample_in_groups(trainer)


@pytest.mark.parametrize("setting, value", [("generation_backend", "vllm"), ("generation_token_budget", 0)])
def test_a_setting_out_of_bounds_is_named(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` must be .*got {value!r}"):
        GroupedSamplingArguments(**{setting: value})


def test_every_setting_has_help_and_a_documented_default():
    for field in GroupedSamplingArguments.__dataclass_fields__.values():
        assert field.metadata["help"].endswith(".")
        assert f"{field.name} (`" in GroupedSamplingArguments.__doc__


def take_mask(self, input_ids, attention_mask=None, cache: Cache | None = None): ...


def take_positions(self, input_ids, attention_mask=None, position_ids=None): ...


def take_all(self, input_ids, attention_mask=None, position_ids=None, store: Cache | None = None): ...


def prepare(self, input_ids, next_sequence_length=None, store=None, attention_mask=None, is_first_iteration=False): ...


@pytest.mark.parametrize(
    "forward, prepare_inputs, missing",
    [
        (take_mask, LlamaForCausalLM.prepare_inputs_for_generation, "forward(position_ids)"),
        (take_positions, LlamaForCausalLM.prepare_inputs_for_generation, "`forward` with a KV cache"),
        (take_all, LlamaForCausalLM.prepare_inputs_for_generation, "prepare_inputs_for_generation(store)"),
        (take_all, take_all, "prepare_inputs_for_generation(next_sequence_length)"),
        (take_all, prepare, None),  # another name alone is no matter
    ],
)
def test_what_no_decoder_has_any_more_is_said_to_be_the_librarys_doing(
    tmp_path, monkeypatch, caplog, forward, prepare_inputs, missing
):
    """It would be every model of every user: a warning, and an error where grouped generation is asked for."""
    decoder = type("Decoder", (), {"forward": forward, "prepare_inputs_for_generation": prepare_inputs})
    monkeypatch.setattr("gxpo_trl.sampling.model_traits.LlamaForCausalLM", decoder)
    monkeypatch.setattr("gxpo_trl.sampling.model_traits.why_not_known", why_not_known.__wrapped__)
    samples_grouped = sample_in_groups(trl_trainer(tmp_path))
    said = [text for text in warnings_of(caplog) if f"transformers {transformers.__version__} has no" in text]
    assert samples_grouped == (missing is None) == (not said)
    if missing is not None:
        assert len(said) == 1 and missing in said[0]
        with pytest.raises(ValueError, match=re.escape(missing)):
            sample_in_groups(trl_trainer(tmp_path), "grouped")


class Renamed(LlamaForCausalLM):
    """A model of a version of transformers to come, whose KV cache goes by yet another name."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, store: Cache | None = None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, store, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, store: Cache | None = None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **{INSTALLED_NAME: store}, **kwargs)
        return {"store" if name == INSTALLED_NAME else name: value for name, value in inputs.items()}


def test_the_cache_is_found_by_its_type_whatever_its_name():
    model = build(MODELS["llama"])
    assert INSTALLED_NAME in ("past_key_values", "cache") and cache_argument(Renamed) == "store"
    renamed = Renamed(model.config).eval()
    renamed.load_state_dict(model.state_dict())
    assert why_not_grouped(renamed, GenerationConfig(**GREEDY)) is None
    expected = model.generate(**REQUEST, **GREEDY)
    assert torch.equal(grouped(renamed, REQUEST, **GREEDY, token_budget=300), expected)


@pytest.mark.parametrize("setting", [{"generation_backend": "grouped"}, {"generation_token_budget": 300}], ids=str)
@pytest.mark.parametrize(
    "obstacle, reason",
    [
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"model": "dropout"}, "dropout"),
        ({"use_transformers_continuous_batching": True}, "continuous batching"),
        ({"scripted": True}, "rollout_func"),
    ],
    ids=["beams", "dropout", "continuous batching", "rollout function"],
)
def test_what_needs_grouped_generation_is_refused_without_it(tmp_path, setting, obstacle, reason):
    obstacle = {"scripted": False, **obstacle}
    if obstacle.get("model") == "dropout":
        obstacle["model"] = tiny_model(attention_dropout=0.1)
    with pytest.raises(ValueError, match=f"{reason}.*Leave out `{next(iter(setting))}"):
        make_trainer(tmp_path, **obstacle, **setting)


def test_stop_strings_work_in_the_trainer(tmp_path):
    tokenizer, letters = letters_tokenizer(), "abcdef"
    settings = {**ON_CPU, **TINY_BATCH, "max_steps": 1, "generation_kwargs": {"stop_strings": list(letters)}}
    dataset = Dataset.from_dict({"prompt": ["xyz", "zy", "yxzx", "zx"]})
    args = GRPOConfig(str(tmp_path), **settings)
    trainer = GRPORollout(build(MODELS["llama"]), text_length, args, dataset, processing_class=tokenizer)
    sample_in_groups(trainer, "grouped")
    trainer.train()
    texts = tokenizer.batch_decode(trainer.scored[0]["completion_ids"], skip_special_tokens=True)
    assert any(text[-1:] in letters for text in texts if text)
    assert not any(set(text[:-1]) & set(letters) for text in texts)


def test_stop_strings_that_the_tokenizer_cannot_spell_are_an_error_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="stop_strings"):
        sample_in_groups(trl_trainer(tmp_path, generation_kwargs={"stop_strings": ["="]}))


# ---- Log-probabilities of the sampled tokens as the old ones


class OldLogpsMixin(Rollouts):
    """Computes the old log-probabilities as TRL does, beside those that the trainer has."""

    def __init__(self, *args, **kwargs):
        self.pairs = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        ids, mask = (torch.cat([output[f"prompt_{k}"], output[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
        width, completion_mask = output["completion_ids"].size(1), output["completion_mask"]
        with torch.no_grad():
            logps = self._get_per_token_logps_and_entropies(self.model, ids, mask, width)[0] * completion_mask
        if "old_per_token_logps" in output:
            self.pairs.append((output["old_per_token_logps"] * completion_mask, logps))
        elif "old_logps" in output:
            self.pairs.append((output["old_logps"], logps.sum(1)))
        return output


class GXPOOldLogps(OldLogpsMixin, GXPOTrainer):
    pass


class GRPOOldLogps(OldLogpsMixin, GRPOTrainer):
    pass


class RLOOOldLogps(OldLogpsMixin, RLOOTrainer):
    pass


@pytest.mark.parametrize(
    "trainer_class, config_class, settings, saved",
    [
        (GRPOOldLogps, GRPOConfig, {}, 0),
        (GRPOOldLogps, GRPOConfig, {"num_iterations": 2}, 1),
        (GRPOOldLogps, GRPOConfig, {"steps_per_generation": 4}, 1),
        (GRPOOldLogps, GRPOConfig, {"beta": 0.1}, 0),
        (GRPOOldLogps, GRPOConfig, {"beta": 0.1, "num_iterations": 2}, 1),
        (GXPOOldLogps, GXPOConfig, {"num_iterations": 2}, 1),
        (RLOOOldLogps, RLOOConfig, {}, 1),
        (RLOOOldLogps, RLOOConfig, {"beta": 0.1}, 1),
    ],
    ids=str,
)
def test_sampling_gives_the_old_log_probabilities(tmp_path, monkeypatch, trainer_class, config_class, settings, saved):
    """The same numbers, without the pass that TRL makes for them."""
    scored = []
    for stock in (GRPOTrainer, RLOOTrainer):
        compute = stock._get_per_token_logps_and_entropies

        @functools.wraps(compute)
        def counting(self, model, ids, mask, width, batch_size=None, *args, compute=compute, **kwargs):
            scored.append(0 if batch_size is None else len(ids))  # TRL gives it where it scores
            return compute(self, model, ids, mask, width, batch_size, *args, **kwargs)

        patch_trl(stock, "_get_per_token_logps_and_entropies", counting, monkeypatch.setattr)

    def run(**more) -> tuple[float, OldLogpsMixin]:
        scored.clear()
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        given = {"max_steps": 1, "temperature": 0.8, "pad_to_multiple_of": 8, **settings, **more}
        trainer = train(tmp_path, trainer_class, config_class, scripted=False, peft_config=adapter, **given)
        rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        return sum(scored) / rows, trainer

    passes, trainer = run(generation_backend="grouped")
    assert run()[0] - passes == saved
    assert replaced(trainer) == (REPLACED if saved else {"_generate_single_turn"})
    assert bool(trainer.pairs) == bool(saved)
    for kept, computed in trainer.pairs:
        assert kept.abs().max() > 0
        assert torch.allclose(kept, computed, atol=1e-4)


def absolute_positions(**settings):
    """A model that numbers positions from the padding on where it is not told otherwise."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.2}
    settings = {**dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), **settings}
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **tokens, **settings))


class EndsAllMixin:
    """Ends what the length limit has cut."""

    def _generate(self, prompts):
        prompt_ids, completion_ids, *rest = super()._generate(prompts)
        end = self.eos_token_ids[0]
        return prompt_ids, [ids if ids[-1] == end else [*ids, end] for ids in completion_ids], *rest


class EndsAll(EndsAllMixin, GRPOOldLogps):
    pass


class SwapsRows(GRPOOldLogps):
    """Trains on completions in another order."""

    def _generate(self, prompts):
        prompt_ids, completion_ids, *rest = super()._generate(prompts)
        return prompt_ids, completion_ids[::-1], *rest


class OwnLogps(GRPOOldLogps):
    """Scores by a method of its own."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return found / 1.5, *others


@pytest.mark.parametrize(
    "trainer_class, model",
    [(EndsAll, None), (SwapsRows, None), (OwnLogps, None), (GRPOOldLogps, absolute_positions)],
)
def test_other_completions_and_other_numbers_are_scored_by_trl(tmp_path, trainer_class, model):
    more = {} if model is None else {"model": model()}
    lengths = {"temperature": 0.6, "max_completion_length": 6, "num_iterations": 2, "max_steps": 1}
    settings = {"generation_backend": "grouped", "scripted": False, **lengths, **more}
    trainer = train(tmp_path, trainer_class, GRPOConfig, **settings)
    ((kept, computed),) = trainer.pairs
    assert kept.abs().max() > 0 and torch.allclose(kept, computed, atol=1e-4)
    assert logged(trainer, "clip_ratio/region_mean") == [0.0]


def test_a_scoring_method_that_is_set_on_a_trainer_is_used(tmp_path):
    trainer = make_trainer(tmp_path, GRPOTrainer, GRPOConfig, scripted=False, num_iterations=2)
    compute = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: compute(*args, **kwargs)
    own = trainer._get_per_token_logps_and_entropies
    assert sample_in_groups(trainer, "grouped")
    assert trainer._get_per_token_logps_and_entropies is own
    assert "_generate_and_score_completions" not in vars(trainer)


def test_entropies_are_those_of_the_completions_that_are_trained_on(tmp_path):
    """A token that a subclass adds has the entropy that the policy had there, not 0."""

    class Ours(EndsAllMixin, LookaheadTrainer):
        pass

    logs = {}
    for compacts in (True, False):
        settings = {"update_rule": "grpo", "max_steps": 1, "max_completion_length": 6, "compact_batches": compacts}
        settings |= {"generation_backend": "grouped", "reward": half_without_spread}
        settings |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}  # one mean for both
        logs[compacts] = logged(train(tmp_path, Ours, GXPOConfig, scripted=False, **settings), "entropy")[0]
    assert logs[True] == pytest.approx(logs[False], rel=1e-4)


def test_a_callback_may_change_how_completions_are_sampled(tmp_path):
    class Anneal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.generation_config.temperature = 0.01 if state.global_step else args.temperature

    trainer = make_trainer(
        tmp_path, GRPOOldLogps, GRPOConfig, scripted=False, generation_backend="grouped", num_iterations=2, max_steps=3
    )
    trainer.add_callback(Anneal())
    trainer.train()
    assert trainer._generate_single_turn.__self__.config.temperature == 0.01
    for kept, computed in trainer.pairs:
        assert torch.allclose(kept, computed, atol=1e-4)


def test_with_reduced_precision_of_products_trls_own_pass_stays(tmp_path):
    settings = {"scripted": False, "num_iterations": 2, "generation_backend": "grouped"}
    torch.set_float32_matmul_precision("high")
    try:
        assert replaced(make_trainer(tmp_path, GRPOTrainer, GRPOConfig, **settings)) == {"_generate_single_turn"}
    finally:
        torch.set_float32_matmul_precision("highest")
    assert replaced(make_trainer(tmp_path, GRPOTrainer, GRPOConfig, **settings)) == REPLACED


def test_ends_that_trl_does_not_know_are_left_to_generate(tmp_path, caplog):
    trainer = trl_trainer(tmp_path, generation_kwargs={"eos_token_id": [1, 7, 9]})
    unknown = sorted({1, 7, 9} - set(trainer.eos_token_ids))
    assert unknown and not sample_in_groups(trainer)
    assert f"ends completions with the tokens {', '.join(map(str, unknown))}, which TRL doesn't count" in caplog.text
    with pytest.raises(ValueError, match="can't have grouped generation: `generation_kwargs` ends completions"):
        sample_in_groups(trainer, "grouped")
    known = trl_trainer(tmp_path, generation_kwargs={"eos_token_id": trainer.eos_token_ids})
    assert sample_in_groups(known, "grouped")


def test_stop_strings_that_would_lose_rows_or_fail_later_are_refused(tmp_path):
    stops = {"generation_kwargs": {"stop_strings": ["a"]}}
    with pytest.raises(ValueError, match="`mask_truncated_completions` leaves out every completion that ends with"):
        sample_in_groups(trl_trainer(tmp_path, **stops, mask_truncated_completions=True))
    with pytest.raises(ValueError, match="`generation_kwargs: stop_strings` needs grouped generation"):
        sample_in_groups(trl_trainer(tmp_path, **stops), "transformers")


def test_dropout_is_named_and_that_of_other_heads_does_not_count():
    model = absolute_positions(summary_first_dropout=0.1)
    assert why_not_row_by_row(model, in_training=True) is None
    with_attention = absolute_positions(attn_pdrop=0.3)
    assert "dropout (`transformer.h.0.attn.attn_dropout` 0.3)" in why_not_row_by_row(with_attention, in_training=True)
    model.transformer.drop = torch.nn.Dropout(0.2)
    assert "dropout (`transformer.drop` 0.2)" in why_not_row_by_row(model, in_training=True)
    assert "dropout (`attention_dropout` 0.1)" in why_not_row_by_row(tiny_model(attention_dropout=0.1), True)


@pytest.mark.parametrize(
    "trainer_class, config_class, settings",
    [
        (RLOOTrainer, RLOOConfig, {"bf16": True}),
        (RLOOTrainer, RLOOConfig, {"dtype": torch.bfloat16}),
        (RLOOTrainer, RLOOConfig, {"generation_kwargs": {"do_sample": False}}),
        (RLOOTrainer, RLOOConfig, {"generation_kwargs": {"temperature": 0.5}}),
        (GXPOTrainer, GXPOConfig, {"num_iterations": 2, "ratio_anchor": "current"}),
    ],
    ids=str,
)
def test_where_sampling_computes_otherwise_trls_own_pass_stays(tmp_path, trainer_class, config_class, settings):
    """By rounding, at another temperature, or where the anchor is to move."""
    model = tiny_model(dtype=settings.get("dtype", torch.float32))
    settings = {name: value for name, value in settings.items() if name != "dtype"}
    trainer = trl_trainer(tmp_path, trainer_class, config_class, model=model, **settings)
    assert sample_in_groups(trainer)
    assert replaced(trainer) == {"_generate_single_turn"}
