"""Compaction leaves the gradient what it is, and computes on fewer tokens."""

import itertools
import threading
from unittest import mock

import pytest
import torch
from helpers import (
    TINY_BATCH,
    assert_close_parameters,
    compute_in_float64,
    double_model,
    logged,
    make_trainer,
    parameters,
    text_reward,
    tiny_model,
    train,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadTrainer, SFPOConfig, SFPOTrainer
from gxpo_trl.rollout.compaction import (
    LOSS_WEIGHT,
    Compaction,
    compact,
    count_rows,
    count_tokens,
    pack,
    partition,
    prune,
    scored_tokens,
)
from gxpo_trl.rollout.generators import Generators
from gxpo_trl.rollout.window import RolloutWindow
from gxpo_trl.sampling.model_traits import dropout_of, has_relative_positions, width_bound


VOCABULARY, PROMPT, COMPLETION = 30, 5, 9


def half_without_spread(completions, **kwargs) -> list[float]:
    """The same, but every other group gets one reward."""
    group = TINY_BATCH["num_generations"]
    return [1.0 if i // group % 2 else reward for i, reward in enumerate(text_reward(completions))]


def no_spread(completions, **kwargs) -> list[float]:
    return [1.0] * len(completions)


# ---- The gradient, for any rollouts


def make_window(rows: int, lengths, prompts, advantages, seed: int = 0, tools: bool = False) -> list[dict]:
    """The micro-batches of one optimizer step as TRL makes them, all padded to one width."""
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)
    batch = {
        "prompt_ids": torch.randint(3, VOCABULARY, (count, PROMPT), generator=generator),
        "prompt_mask": (torch.arange(PROMPT) >= PROMPT - torch.tensor(prompts)[:, None]).long(),
        "completion_ids": torch.randint(3, VOCABULARY, (count, COMPLETION), generator=generator),
        "completion_mask": (torch.arange(COMPLETION) < torch.tensor(lengths)[:, None]).long(),
        "advantages": torch.tensor(advantages),
    }
    noise = torch.randn(count, COMPLETION, generator=generator, dtype=torch.float64)
    batch["old_per_token_logps"] = noise * 0.3 - 3.4
    if tools:
        batch["tool_mask"] = torch.randint(0, 2, (count, COMPLETION), generator=generator)
    normalizer = batch["completion_mask"].sum()
    parts = [{k: v[i : i + rows] for k, v in batch.items()} for i in range(0, count, rows)]
    return [part | {"num_items_in_batch": normalizer} for part in parts]


EXAMPLE = {"rows": 3, "lengths": [9, 1, 4, 0, 7, 2], "prompts": [5, 2, 3, 1, 4, 4]}
EXAMPLE["advantages"] = [0.0, 1.0, -1.5, 0.3, 0.0, 1.0]


@st.composite
def windows(draw, micro_batches: int | None = None, rows: int | None = None) -> list[dict]:
    """Any lengths, truncated (fully masked) rows among them; half of the rows without advantage."""
    micro_batches, rows = micro_batches or draw(st.integers(1, 4)), rows or draw(st.integers(1, 3))

    def each(values):
        return draw(st.lists(values, min_size=micro_batches * rows, max_size=micro_batches * rows))

    lengths, prompts = each(st.integers(0, COMPLETION)), each(st.integers(1, PROMPT))
    advantages = each(st.sampled_from([0.0, 0.0, 0.0, 1.0, -1.5, 0.3]))
    return make_window(rows, lengths, prompts, advantages, draw(st.integers(0, 2**32)), draw(st.booleans()))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A float64 trainer whose loss can be asked for the gradient of any window."""
    with pytest.MonkeyPatch.context() as patch:
        compute_in_float64(patch.setattr)
        yield make_trainer(tmp_path_factory.mktemp("trainer"), model=double_model(), compact_batches=False)


def gradient(trainer, micro_batches: list[dict], nominal: int) -> torch.Tensor:
    """Of one optimizer step, `nominal` micro-batches long."""
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = nominal
    trainer.model.train()
    trainer.model.zero_grad()
    for batch in micro_batches:
        trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None] or [torch.zeros(1)])


def tokens(micro_batches: list[dict]) -> int:
    return sum(map(count_tokens, micro_batches))


LOSSES = ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
MANY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    "loss_type, level",
    [
        *((loss_type, "token") for loss_type in LOSSES[:4]),
        ("grpo", "sequence"),
        *(pytest.param(loss_type, "token", marks=pytest.mark.slow) for loss_type in LOSSES[4:]),
        *(pytest.param(loss_type, "sequence", marks=pytest.mark.slow) for loss_type in LOSSES[1:]),
    ],
)
@MANY
@given(window=windows(), max_tokens=st.sampled_from([None, 15, 40, 1000]))
def test_the_gradient_stays_what_it_is(trainer, loss_type, level, window, max_tokens):
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    how = Compaction(averages_rows=loss_type not in ("cispo", "dapo", "vespo"), prunes=True, max_tokens=max_tokens)
    expected = gradient(trainer, window, len(window))
    result = compact(window, how)
    compacted = result.batches
    assert len(compacted) == len(window) >= len(result.forward_only)
    rows = [row for batch in (*compacted, *result.forward_only) for row in batch["old_per_token_logps"][:, 0].tolist()]
    assert sorted(rows) == sorted(row for batch in window for row in batch["old_per_token_logps"][:, 0].tolist())
    assert not any(batch["advantages"].any() for batch in result.forward_only)
    torch.testing.assert_close(gradient(trainer, compacted, len(window)), expected, rtol=1e-9, atol=1e-12)
    if pruned := prune(compacted, count_rows(window[0]), how):
        torch.testing.assert_close(gradient(trainer, pruned, len(window)), expected, rtol=1e-9, atol=1e-12)
    else:
        assert not expected.any()
    if max_tokens is None:
        assert max(tokens(pruned), tokens(compacted) + tokens(result.forward_only)) <= tokens(window)


@MANY
@given(window=windows())
def test_prompts_are_trimmed_where_positions_are_relative(trainer, window):
    """Rotary angles, which shift with the prompt, are computed in float64 here: transformers' own are fp32."""
    trainer.loss_type, trainer.importance_sampling_level = "grpo", "token"
    trimmed = compact(window, Compaction(trims_prompts=True)).batches
    assert all(batch["prompt_mask"][:, 0].any() for batch in trimmed)
    rotary = trainer.model.model.rotary_emb

    def angles(hidden_states, position_ids):
        frequencies = position_ids[..., None] * rotary.inv_freq.double()
        frequencies = torch.cat([frequencies, frequencies], dim=-1)
        return frequencies.cos(), frequencies.sin()

    with mock.patch.object(rotary, "forward", angles):
        expected = gradient(trainer, window, len(window))
        torch.testing.assert_close(gradient(trainer, trimmed, len(window)), expected, rtol=1e-9, atol=1e-12)


@MANY
@given(window=windows())
def test_a_loss_that_depends_on_the_micro_batch_is_trimmed_alone(trainer, window):
    trainer.loss_type, trainer.importance_sampling_level = "bnpo", "token"
    trimmed = compact(window, Compaction(regroup=False, prunes=True)).batches
    assert [count_rows(batch) for batch in trimmed] == [count_rows(batch) for batch in window]
    expected = gradient(trainer, window, len(window))
    torch.testing.assert_close(gradient(trainer, trimmed, len(window)), expected, rtol=1e-9, atol=1e-12)
    assert prune(trimmed, count_rows(window[0]), Compaction(regroup=False, prunes=True)) is trimmed


@MANY
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
    max_tokens=st.sampled_from([None, 20, 60]),
)
def test_ranks_agree_on_the_rows_of_every_micro_batch(trainer, shape, data, max_tokens):
    trainer.loss_type, trainer.importance_sampling_level = "grpo", "token"
    ranks = [data.draw(windows(*shape)) for _ in range(2)]
    how = Compaction(prunes=True, max_tokens=max_tokens)
    compacted = on_two_ranks(ranks, lambda window, widest: compact(window, how, widest).batches)
    pruned = on_two_ranks(compacted, lambda window, widest: prune(window, shape[1], how, widest))
    for first, second in (compacted, pruned):
        assert [count_rows(batch) for batch in first] == [count_rows(batch) for batch in second]
    for window, kept in zip(ranks, pruned, strict=True):
        expected = gradient(trainer, window, len(window))
        result = gradient(trainer, kept, len(window)) if kept else torch.zeros_like(expected)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def on_two_ranks(windows: list, function) -> list:
    """Runs a function as two ranks do, each waiting for the other's numbers."""
    barrier, shown, results = threading.Barrier(2, timeout=10), [None, None], [None, None]

    def run(rank: int) -> None:
        def widest(values):
            shown[rank] = values
            barrier.wait()
            result = torch.maximum(*shown)
            barrier.wait()
            return result

        results[rank] = function(windows[rank], widest)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---- Packing


def test_rows_are_packed_by_tokens_the_longest_by_themselves():
    assert pack([100, 40, 30, 30, 10, 10, 10], max_tokens=90) == [1, 2, 3, 1]
    assert pack([7], max_tokens=1) == [1]


def test_a_partition_computes_the_fewest_tokens():
    assert partition([100, 40, 30, 30, 10, 10, 10], count=3, max_tokens=120) == [1, 3, 3]
    assert partition([10, 10, 10, 10], count=4, max_tokens=1000) == [1, 1, 1, 1]
    assert partition([50, 50, 5, 5, 5, 5, 5, 5], count=2, max_tokens=100) == [2, 6]
    assert partition([8, 3, 2, 2, 1, 1], count=3, max_tokens=1) == [1, 1, 4]  # no wider than the widest row has to be


def test_a_bound_that_so_few_micro_batches_cannot_keep_is_exceeded_as_little_as_possible():
    assert sorted(partition([10, 10, 10, 10, 10], count=2, max_tokens=1)) == [2, 3]


def test_many_rows_are_partitioned_within_the_bound_without_a_search(monkeypatch):
    monkeypatch.setattr("gxpo_trl.rollout.compaction.MOST_ROWS", 4)
    assert partition([100, 40, 30, 30, 10, 10, 10], count=5, max_tokens=120) == [1, 2, 1, 2, 1]


@MANY
@given(
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=8).map(lambda widths: sorted(widths, reverse=True)),
    count=st.integers(1, 8),
    max_tokens=st.integers(1, 300),
)
def test_no_other_partition_computes_fewer(widths, count, max_tokens):
    count = min(count, len(widths))

    def tokens(sizes):
        starts = itertools.accumulate([0, *sizes[:-1]])
        return [size * widths[start] for size, start in zip(sizes, starts, strict=True)]

    cuts = itertools.combinations(range(1, len(widths)), count - 1)
    others = [[b - a for a, b in itertools.pairwise((0, *cut, len(widths)))] for cut in cuts]
    bound = max(max_tokens, widths[0], min(max(tokens(sizes)) for sizes in others))
    ours = partition(widths, count, max_tokens)
    assert max(tokens(ours)) <= bound
    assert sum(tokens(ours)) == min(sum(tokens(sizes)) for sizes in others if max(tokens(sizes)) <= bound)


def test_weights_follow_the_number_of_rows():
    window = make_window(**EXAMPLE)
    packed = compact(window, Compaction(max_tokens=20)).batches
    for batch in packed:
        assert batch.get(LOSS_WEIGHT, 1.0) == pytest.approx(count_rows(batch) / 3)


@pytest.mark.parametrize("key", ["pixel_values", "an unknown entry"])
def test_what_is_not_known_is_left_as_it_is(key):
    window = [batch | {key: torch.ones(3)} for batch in make_window(**EXAMPLE)]
    assert compact(window, Compaction()).batches is window
    assert prune(window, count_rows(window[0]), Compaction(prunes=True)) is window
    with pytest.raises(ValueError, match=f"max_tokens_per_micro_batch.*{key}"):
        compact(window, Compaction(max_tokens=10))


def test_generation_batches_with_normalizers_of_their_own_are_not_mixed():
    window = make_window(**EXAMPLE)
    window[1]["num_items_in_batch"] = window[1]["num_items_in_batch"].clone()
    assert prune(window, count_rows(window[0]), Compaction(prunes=True)) is window


def test_positions_and_dropout_are_read_off_the_model():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    assert has_relative_positions(tiny_model()) and not has_relative_positions(gpt2)
    assert dropout_of(gpt2) and not dropout_of(tiny_model())
    assert dropout_of(tiny_model(attention_dropout=0.1)) == "`attention_dropout` 0.1"


# ---- Whole runs

SAMPLED = {"learning_rate": 1e-3, "epsilon": 0.2, "max_steps": 4, "adam_epsilon": 1e-3}
OFF = {"compact_batches": False}


@pytest.mark.parametrize(
    "trainer_class, config_class, options",
    [
        (GXPOTrainer, GXPOConfig, {"loss_type": "grpo"}),
        (GXPOTrainer, GXPOConfig, {"loss_type": "dapo", "steps_per_generation": 1}),
        (GXPOTrainer, GXPOConfig, {"beta": 0.05}),
        (SFPOTrainer, SFPOConfig, {}),
        (LookaheadTrainer, GXPOConfig, {"update_rule": "grpo", "max_tokens_per_micro_batch": 200}),
        *(
            pytest.param(GXPOTrainer, GXPOConfig, options, marks=pytest.mark.slow)
            for options in (
                *({"loss_type": loss_type} for loss_type in (*LOSSES[1:], "bnpo")),
                {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
                {"num_iterations": 2},
                {"steps_per_generation": 4},
                {"entropy_coef": 0.01},
                {"top_entropy_quantile": 0.5},
                {"mask_truncated_completions": True},
                {"max_tokens_per_micro_batch": 200},
                {"ratio_anchor": "current"},
            )
        ),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value.__name__,
)
def test_a_run_ends_where_it_does_without_compaction(tmp_path, float64, trainer_class, config_class, options):
    classes, options = (trainer_class, config_class), {**SAMPLED, **options}
    budget = options.pop("max_tokens_per_micro_batch", None)

    def run(**more):
        return train(tmp_path, *classes, model=double_model(), reward=half_without_spread, **options, **more)

    stock, compacted = run(**OFF, max_tokens_per_micro_batch=None), run(max_tokens_per_micro_batch=budget)
    assert_close_parameters(parameters(compacted), parameters(stock), atol=1e-6)
    assert logged(compacted, "lookahead/backward_passes") == logged(stock, "lookahead/backward_passes")
    assert max(logged(compacted, "lookahead/token_fraction")) <= 1.0
    assert logged(compacted, "reward") == logged(stock, "reward")
    assert logged(compacted, "loss") == pytest.approx(logged(stock, "loss"), abs=1e-4)


def test_the_plain_rule_with_compaction_is_trl_to_rounding(tmp_path):
    options = {**SAMPLED, "scripted": False, "reward": text_reward, "max_completion_length": 12}
    ours = train(tmp_path, update_rule="grpo", **options)
    trl = train(tmp_path, GRPOTrainer, GRPOConfig, **options)
    assert_close_parameters(parameters(ours), parameters(trl), atol=1e-6)


def test_token_means_are_those_of_the_whole_step(tmp_path, float64):
    """Sorted micro-batches hold different numbers of tokens: TRL's mean over one large micro-batch is the measure."""
    options = {**SAMPLED, "learning_rate": 1e-3, "epsilon": 0.01, "max_steps": 2, "num_iterations": 2}
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    one = train(tmp_path, update_rule="grpo", **OFF, model=double_model(), **options, **large)
    ours = train(tmp_path, update_rule="grpo", model=double_model(), **options)
    for name in ("entropy", "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert logged(ours, name) == pytest.approx(logged(one, name), rel=1e-5)
    assert logged(ours, "clip_ratio/region_mean")[1] > 0.1


def test_vespos_row_means_are_those_of_the_whole_step(tmp_path, float64):
    options = {**SAMPLED, "max_steps": 2, "num_iterations": 2, "loss_type": "vespo", "reward": half_without_spread}
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    one = train(tmp_path, update_rule="grpo", **OFF, model=double_model(), **options, **large)
    ours = train(tmp_path, update_rule="grpo", model=double_model(), **options)
    assert logged(ours, "vespo/phi_seq_mean") == pytest.approx(logged(one, "vespo/phi_seq_mean"), rel=1e-4)
    assert len(set(logged(ours, "vespo/phi_seq_mean"))) == 2


def test_what_the_last_pass_measures_counts_all_rows(tmp_path, float64):
    options = {**SAMPLED, "max_steps": 2, "epsilon": 0.01, "reward": half_without_spread}
    stock = train(tmp_path, model=double_model(), **OFF, **options, gradient_accumulation_steps=1)
    ours = train(tmp_path, model=double_model(), **options, gradient_accumulation_steps=1)
    assert logged(ours, "lookahead/replay_token_fraction")[0] < 0.7
    slow = logged(ours, "lookahead/clip_ratio_slow")
    assert slow == pytest.approx(logged(stock, "lookahead/clip_ratio_slow"), rel=1e-5)
    assert min(slow) > 0.05


@pytest.mark.parametrize("rule", ["gxpo", "grpo"])
def test_completions_without_advantage_take_no_part_in_a_backward_pass(tmp_path, rule):
    trainer = train(tmp_path, reward=half_without_spread, update_rule=rule, **SAMPLED)
    for first, others in zip(
        logged(trainer, "lookahead/token_fraction"),
        logged(trainer, "lookahead/forward_only_token_fraction"),
        strict=True,
    ):
        assert 0.3 < first < 0.7 and 0.3 < others < 0.7
    for replay in logged(trainer, "lookahead/replay_token_fraction"):
        assert 0.3 < replay < 0.7


def test_in_bf16_the_forward_pass_without_a_gradient_does_not_change_the_gradient(tmp_path):
    """Autocast keeps casts of weights."""
    options = {**SAMPLED, "reward": half_without_spread, "max_steps": 1, "bf16": True}
    stock, ours = train(tmp_path, **OFF, **options), train(tmp_path, **options)
    assert logged(ours, "lookahead/forward_only_token_fraction")[0] > 0.3
    assert logged(ours, "lookahead/grad_norm_0") == pytest.approx(logged(stock, "lookahead/grad_norm_0"), rel=0.05)


def test_trls_metrics_count_the_completions_without_advantage(tmp_path, float64):
    options = {**SAMPLED, "epsilon": 0.01, "max_steps": 2, "num_iterations": 2, "reward": half_without_spread}
    one_batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    stock = train(tmp_path, update_rule="grpo", **OFF, model=double_model(), **options, **one_batch)
    ours = train(tmp_path, update_rule="grpo", model=double_model(), **options, **one_batch)
    assert logged(ours, "lookahead/token_fraction")[1] < 0.7
    names = ("entropy", "loss", "clip_ratio/region_mean", "clip_ratio/low_min", "clip_ratio/high_max")
    for name in names:
        assert logged(ours, name) == pytest.approx(logged(stock, name), rel=1e-5, abs=1e-6)
    assert logged(ours, "clip_ratio/high_max")[1] > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.05},
        {"entropy_coef": 0.01},
        {"top_entropy_quantile": 0.5},
        {"loss_type": "bnpo"},
        {"peft_config": LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")},
    ],
    ids=str,
)
def test_nothing_is_pruned_where_the_loss_sees_more_than_the_advantage(tmp_path, options):
    trainer = train(tmp_path, reward=half_without_spread, **{**SAMPLED, "max_steps": 2, **options})
    assert logged(trainer, "lookahead/replay_token_fraction") == logged(trainer, "lookahead/token_fraction")


@pytest.mark.parametrize("trainer_class, config_class", [(GXPOTrainer, GXPOConfig), (SFPOTrainer, SFPOConfig)])
def test_a_step_without_any_advantage_is_the_plain_one(tmp_path, trainer_class, config_class):
    trainer = train(tmp_path, trainer_class, config_class, reward=no_spread, **SAMPLED)
    assert logged(trainer, "lookahead/active") == [0.0] * 4
    assert logged(trainer, "lookahead/backward_passes") == [1, 2, 3, 4]
    assert trainer.lookahead_active  # the gate has seen nothing


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    options = {**SAMPLED, "reward": half_without_spread, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, **options)
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **options)
    assert all(torch.equal(p, parameters(resumed)[name]) for name, p in parameters(whole).items())


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens_per_micro_batch": 100, "compact_batches": False},
        {"max_tokens_per_micro_batch": 0},
        {"max_tokens_per_micro_batch": 100, "loss_type": "bnpo"},
        {"max_tokens_per_micro_batch": 100, "gradient_accumulation_steps": 3, "steps_per_generation": 2},
    ],
    ids=str,
)
def test_a_token_budget_that_cannot_be_kept_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch"):
        make_trainer(tmp_path, **options)


class OtherLossTrainer(GXPOTrainer):
    """As a trainer of TRL's that is GRPO with a loss of its own."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


def test_a_loss_that_is_not_trls_is_left_alone(tmp_path):
    trainer = train(tmp_path, OtherLossTrainer, max_steps=1)
    assert trainer.lookahead.layout.compaction is None
    assert logged(trainer, "lookahead/token_fraction") == []
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch.*loss of TRL's"):
        make_trainer(tmp_path, OtherLossTrainer, max_tokens_per_micro_batch=100)


def scaled_by_position(tokens: int) -> Ministral3ForCausalLM:
    """A model that scales queries by their absolute position, from 16 tokens on."""
    rope = {**Ministral3Config().rope_parameters, "original_max_position_embeddings": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 256}
    return Ministral3ForCausalLM(Ministral3Config(vocab_size=tokens, rope_parameters=rope, **sizes, pad_token_id=0))


def test_attention_that_is_scaled_by_absolute_positions_keeps_its_padding(tmp_path, float64):
    tokens = tiny_model().config.vocab_size
    norms = []
    for compacts in (False, True):
        torch.manual_seed(0)
        model = scaled_by_position(tokens).double()
        assert not has_relative_positions(model) and width_bound(model) is None
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "compact_batches": compacts}
        trainer = train(tmp_path, LookaheadTrainer, model=model, update_rule="grpo", max_steps=1, **settings)
        norms += logged(trainer, "grad_norm")
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-9)


def test_proportional_rotary_embeddings_do_not_depend_on_the_width(tmp_path):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert has_relative_positions(model) and width_bound(model) is None


def test_rotary_embeddings_of_an_unknown_type_are_said_to_be(tmp_path):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "spiral"}
    with pytest.raises(ValueError, match="those of the model are of a type that is not known here, spiral. Leave it"):
        make_trainer(tmp_path, model=model, max_tokens_per_micro_batch=500)


@pytest.mark.parametrize("rule, iterations", [("grpo", 1), ("grpo", 2), ("gxpo", 1)])
def test_columns_stay_a_multiple_where_trl_pads_to_one(tmp_path, rule, iterations):
    """With hardware that multiplies in blocks, as FP8 needs."""
    settings = {"pad_to_multiple_of": 8, "max_completion_length": 13, "num_iterations": iterations, "max_steps": 1}
    trainer = make_trainer(tmp_path, LookaheadTrainer, scripted=False, update_rule=rule, **settings)
    widths = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].size(1)) if trainer.model.training else None,
        with_kwargs=True,
    )
    generate = trainer._generate
    trainer._generate = lambda *args: [generate(*args), widths.clear()][0]  # it decodes token by token
    trainer.train()
    assert len(widths) > 1 and all(width % 8 == 0 for width in widths)


def test_columns_are_cut_at_multiples():
    window = make_window(**EXAMPLE)
    how = Compaction(max_tokens=20, multiple=4)
    assert all(batch["completion_ids"].size(1) in (4, 8, 9) for batch in compact(window, how).batches)


@pytest.mark.parametrize("name", ["kl", "clip_ratio/high_max", "entropy"])
def test_a_reward_may_log_under_a_name_of_trls_loss(tmp_path, name):
    """TRL appends to one list; the mean of all entries is logged."""

    def reward(completions, log_metric=None, **kwargs):
        log_metric(name, 100.0)
        return text_reward(completions)

    settings = {"max_steps": 2, "reward": reward, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    stock = train(tmp_path, GRPOTrainer, GRPOConfig, **settings)
    ours = train(tmp_path, LookaheadTrainer, GXPOConfig, update_rule="grpo", **settings)
    expected, found = logged(stock, name), logged(ours, name)
    assert len(found) == 2 and min(found) > 30
    assert found == pytest.approx(expected, rel=0.1)


def test_a_loss_that_a_callback_replaces_as_training_begins_is_not_compacted(tmp_path, caplog):
    class Patch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            compute = trainer._compute_loss
            trainer._compute_loss = lambda model, inputs: compute(model, inputs) * 2

    norms = []
    for compacts in (True, False):
        settings = {"update_rule": "grpo", "max_steps": 1, "compact_batches": compacts, "max_grad_norm": 1e9}
        trainer = make_trainer(tmp_path, LookaheadTrainer, **settings)
        trainer.add_callback(Patch())
        trainer.train()
        norms += logged(trainer, "grad_norm")
    assert norms[0] == norms[1] and "the trainer has a `_compute_loss` of its own" in caplog.text


def test_scored_tokens_are_those_of_the_loss():
    assert [scored_tokens(batch).item() for batch in make_window(**EXAMPLE)] == [14, 9]
    with_tools = make_window(**EXAMPLE, tools=True)[0]
    assert scored_tokens(with_tools) == (with_tools["completion_mask"] * with_tools["tool_mask"]).sum() < 14


def test_attention_that_is_cut_at_absolute_positions_is_not_relative():
    model = tiny_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert not has_relative_positions(model)


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 48},
    "dynamic": {"factor": 4.0},
}


def model_with(rope: str) -> LlamaForCausalLM:
    """A random model whose frequencies change from 48 columns on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": tiny_model().config.vocab_size, "initializer_range": 0.5}
    rope = {"rope_type": rope, "rope_theta": 10.0, **ROPES[rope]}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, max_position_embeddings=48)).double()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("longest, compacts", [(6, True), (40, False)])
def test_batches_are_not_compacted_where_frequencies_depend_on_their_width(
    tmp_path, caplog, float64, rope, longest, compacts
):
    """TRL has one width for all micro-batches of a generation batch; old log-probabilities are scored too."""
    options = {**SAMPLED, "max_completion_length": longest, "num_iterations": 2, "max_steps": 4}
    options |= {"update_rule": "grpo", "reward": half_without_spread}
    trainer = train(tmp_path, model=model_with(rope), **options)
    stock = train(tmp_path, model=model_with(rope), **OFF, **options)
    assert (min(logged(trainer, "lookahead/token_fraction")) < 0.9) == compacts
    said = [r.getMessage() for r in caplog.records if "rotary embeddings depend" in r.getMessage()]
    assert len(said) == (not compacts)
    assert_close_parameters(parameters(trainer), parameters(stock), atol=1e-7)
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch.*fixed frequencies"):
        make_trainer(tmp_path, model=model_with(rope), max_tokens_per_micro_batch=100)


def test_prompts_with_virtual_tokens_before_their_padding_are_not_trimmed():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not has_relative_positions(get_peft_model(tiny_model(), settings))
    assert width_bound(get_peft_model(tiny_model(), settings)) is None
    assert width_bound(get_peft_model(model_with("dynamic"), settings)) == 0
    assert has_relative_positions(get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")))


def test_a_micro_batch_keeps_two_columns_that_trl_takes_for_tokens():
    """With one, TRL's means would count its rows, not its tokens."""
    window = make_window(rows=2, lengths=[3, 1, 1, 0], prompts=[1] * 4, advantages=[1.0] * 4)
    assert [batch["completion_ids"].size(1) for batch in compact(window, Compaction()).batches] == [3, 2]
    one_token = [{key: value[:, :1] if value.dim() == 2 else value for key, value in b.items()} for b in window]
    assert [batch["completion_ids"].size(1) for batch in compact(one_token, Compaction()).batches] == [1, 1]


def test_an_entry_that_is_not_known_is_warned_of_once(tmp_path, caplog):
    """Images, say: how they belong to rows is not known here, and compaction is off."""

    class WithImages(LookaheadTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return {**output, "pixel_values": torch.zeros(len(inputs), 2)}

    trainer = train(tmp_path, WithImages, reward=half_without_spread, **SAMPLED)
    said = [r for r in caplog.records if "not compacted" in r.getMessage() and r.levelname == "WARNING"]
    assert len(said) == 1 and "pixel_values" in said[0].getMessage()
    assert set(logged(trainer, "lookahead/token_fraction")) == {1.0}


# ---- What keeps replays on the micro-batches of pass 1


def window_of(divisors: list[int], drew: list[bool]) -> RolloutWindow:
    window = RolloutWindow(Generators((), ()), freeze_old_logps=False)
    for batch, divisor, draws in zip(make_window(**EXAMPLE), divisors, drew, strict=True):
        window.open_micro_batch(batch, divisor)
        if draws:
            torch.rand(())
        window.close_micro_batch()
    return window


@pytest.mark.parametrize(
    "divisors, drew, packs",
    [([2, 2], [False, False], True), ([2, 1], [False, False], False), ([2, 2], [False, True], False)],
)
def test_rows_change_micro_batches_only_where_all_have_one_divisor_and_none_drew(tmp_path, divisors, drew, packs):
    layout = make_trainer(tmp_path).lookahead.layout
    layout.nominal_rows = EXAMPLE["rows"]
    window = window_of(divisors, drew)
    replayed = layout.pack(window)
    assert (sum(map(count_rows, replayed)) < 6) == packs == (window.packed is not None)
    assert [part.accumulation_steps for part in window.replay()] == divisors[: len(replayed)]


def test_a_rank_that_drew_keeps_the_others_from_packing(tmp_path, monkeypatch):
    """Ranks have to agree on the micro-batches of a replay."""
    trainer = make_trainer(tmp_path, reward=half_without_spread, **{**SAMPLED, "max_steps": 2})
    monkeypatch.setattr(trainer.lookahead.layout, "agree", lambda here: False)
    trainer.train()
    assert logged(trainer, "lookahead/replay_token_fraction") == logged(trainer, "lookahead/token_fraction")
    assert len(logged(trainer, "lookahead/token_fraction")) == 2
