"""TRL's scoring passes on fewer tokens, and completions without advantage whose entropy is known beforehand."""

import copy

import pytest
import torch
from helpers import assert_close_parameters, double_model, logged, make_trainer, parameters, patch_trl, train
from test_compaction import OFF, SAMPLED, half_without_spread
from trl import GRPOTrainer

from gxpo_trl import GXPOConfig, GXPOTrainer
from gxpo_trl.rollout.compaction import ENTROPIES, Compaction, compact, count_rows


METRICS = ("entropy", "clip_ratio/region_mean", "clip_ratio/low_min", "clip_ratio/high_max")
ONE_MICRO_BATCH = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
SLOW = pytest.mark.slow
FORWARD_ONLY = "lookahead/forward_only_token_fraction"


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """Tokens, with padding, of each forward pass without a gradient of TRL's."""
    tokens, stock = [], GRPOTrainer._get_per_token_logps_and_entropies

    def counting(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs):
        if not torch.is_grad_enabled():
            rows = batch_size or len(input_ids)
            tokens.extend(part.numel() for part in input_ids.split(rows))
        return stock(self, model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs)

    patch_trl(GRPOTrainer, "_get_per_token_logps_and_entropies", counting, monkeypatch.setattr)
    return tokens


# ---- Scoring


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2, "beta": 0.05},
        {"num_iterations": 2, "mask_truncated_completions": True, "per_device_train_batch_size": 3},
        pytest.param({"num_iterations": 2, "loss_type": "bnpo"}, marks=SLOW),
    ],
    ids=str,
)
def test_completions_are_scored_as_by_trl_on_fewer_tokens(tmp_path, float64, scored, options):
    rows = options.get("per_device_train_batch_size", 4)
    options = {"per_device_train_batch_size": rows, "num_generations": rows, "max_completion_length": 12, **options}

    def rollouts(**more) -> tuple[dict, int, int]:
        trainer = make_trainer(tmp_path, model=double_model(), **{**SAMPLED, **options, **more})
        trainer.model.train()
        scored.clear()
        count = trainer.args.steps_per_generation * rows
        torch.manual_seed(0)
        return (
            trainer._generate_and_score_completions([trainer.train_dataset[i // rows] for i in range(count)]),
            len(scored),
            sum(scored),
        )

    (ours, passes, tokens), (stock, stock_passes, stock_tokens) = rollouts(), rollouts(**OFF)
    assert passes == stock_passes > 1 and tokens < stock_tokens
    mask = stock["completion_mask"].bool()
    names = ["old_per_token_logps", *(["ref_per_token_logps"] if "beta" in options else [])]
    for name in names:
        assert torch.allclose(ours[name][mask], stock[name][mask], atol=1e-12)
        assert stock[name][mask].abs().max() > 0.1


# ---- Completions without advantage


def window(entropies: bool) -> list[dict]:
    """Two micro-batches of three rows, of which three have an advantage."""
    batches = []
    for start in (0, 3):
        lengths = torch.tensor([[2, 5, 3], [4, 1, 6]][start // 3])
        batch = {
            "prompt_ids": torch.ones(3, 2, dtype=torch.long),
            "prompt_mask": torch.ones(3, 2, dtype=torch.long),
            "completion_ids": torch.arange(start, start + 3)[:, None].expand(3, 6),
            "completion_mask": (torch.arange(6) < lengths[:, None]).long(),
            "advantages": torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 2.0]][start // 3]),
            "num_items_in_batch": COUNT,
        }
        batches.append(batch | ({ENTROPIES: torch.full((3, 6), 0.5)} if entropies else {}))
    return batches


COUNT = torch.tensor(21)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("hold", [True, False])
def test_rows_are_left_out_where_their_entropies_are_those_of_the_policy(known, hold):
    result = compact(window(known), Compaction(prunes=True), entropies_hold=hold)
    kept = [row for batch in result.batches for row in batch["completion_ids"][:, 0].tolist()]
    assert sorted(kept) == [1, 3, 5] and len(result.batches) == 2
    if known and hold:
        assert not result.forward_only and result.left_out["completion_ids"][:, 0].tolist() == [2, 0, 4]
        assert result.left_out[ENTROPIES].tolist() == [[0.5] * 3] * 3
    else:
        assert result.left_out is None and sum(map(count_rows, result.forward_only)) == 3
    assert compact(window(True), Compaction(prunes=False), entropies_hold=True).left_out is None


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "vespo"},
        {"temperature": 0.7, "mask_truncated_completions": True},
        {"update_rule": "gxpo", "gate_signal": "entropy", "gate_threshold": 100.0},
    ],
    ids=str,
)
def test_sampled_completions_without_advantage_are_not_computed_and_metrics_count_them(tmp_path, options):
    """The measure is TRL's mean over one large micro-batch."""
    options = {"update_rule": "grpo", **SAMPLED, "scripted": False, "max_steps": 3, **options}
    options |= {"reward": half_without_spread, "generation_backend": "grouped", **ONE_MICRO_BATCH}
    ours, stock = train(tmp_path, **options), train(tmp_path, **OFF, **options)
    assert logged(ours, FORWARD_ONLY) == [0.0] * 3 and max(logged(ours, "lookahead/token_fraction")) < 0.7
    assert_close_parameters(parameters(ours), parameters(stock), atol=1e-5)
    names = METRICS if "loss_type" not in options else ("entropy", "vespo/phi_seq_mean")
    for name in names:
        assert logged(ours, name) == pytest.approx(logged(stock, name), rel=1e-3)
    assert min(logged(ours, "entropy")) > 0.1


def test_scored_completions_without_advantage_are_not_computed_until_the_policy_has_moved(tmp_path, float64):
    """With vLLM TRL scores every batch, as here for two iterations."""
    options = {**SAMPLED, "epsilon": 0.01, "max_steps": 4, "num_iterations": 2, "reward": half_without_spread}
    options |= {"update_rule": "grpo", **ONE_MICRO_BATCH}
    ours = train(tmp_path, model=double_model(), **options)
    stock = train(tmp_path, model=double_model(), **OFF, **options)
    computed = logged(ours, FORWARD_ONLY)
    assert computed[0] == computed[2] == 0 and min(computed[1], computed[3]) > 0.3
    for name in METRICS:
        assert logged(ours, name) == pytest.approx(logged(stock, name), rel=1e-5, abs=1e-6)
    assert logged(ours, "clip_ratio/high_max")[1] > 0.1


def test_of_a_batch_for_several_steps_only_the_first_leaves_them_out(tmp_path, float64):
    options = {**SAMPLED, "reward": half_without_spread, "update_rule": "grpo", "steps_per_generation": 8}
    options |= {"gradient_accumulation_steps": 4, "max_steps": 4}
    ours = train(tmp_path, model=double_model(), **options)
    stock = train(tmp_path, model=double_model(), **OFF, **options)
    computed = logged(ours, FORWARD_ONLY)
    assert computed[0] == computed[2] == 0 and min(computed[1], computed[3]) > 0.1
    assert_close_parameters(parameters(ours), parameters(stock), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"generation_backend": "transformers"},
        pytest.param({"generation_backend": "grouped", "generation_kwargs": {"temperature": 0.5}}, marks=SLOW),
        {"generation_backend": "grouped", "generation_kwargs": {"do_sample": False}},
    ],
    ids=str,
)
def test_where_sampling_does_not_tell_the_entropy_a_forward_pass_does(tmp_path, options):
    options = {"reward": half_without_spread, **SAMPLED, "scripted": False, "max_steps": 1, **options}
    trainer = train(tmp_path, GXPOTrainer, GXPOConfig, **options)
    assert logged(trainer, FORWARD_ONLY)[0] > 0.1


@pytest.mark.parametrize("scored", ["some of them", "others", "by a teacher"])
def test_what_a_reward_scores_says_nothing_of_the_completions(tmp_path, scored):
    """The trainer has no entropies then, so that a forward pass finds them."""

    def reward(completions, completion_ids, **kwargs):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in completion_ids], batch_first=True)
        ids = {"some of them": ids[:1], "others": ids.flip(0), "by a teacher": ids}[scored]
        model = copy.deepcopy(trainer.model) if scored == "by a teacher" else trainer.model
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(
                model, torch.cat([ids, ids], 1), torch.ones(len(ids), 2 * ids.size(1)), ids.size(1), batch_size=4
            )
        return half_without_spread(completions)

    trainer = make_trainer(tmp_path, reward=reward, **{**SAMPLED, "max_steps": 1})
    trainer.train()
    assert logged(trainer, FORWARD_ONLY)[0] > 0.1 and logged(trainer, "entropy")[0] > 0.1


def test_entropies_that_another_rank_does_not_know_are_not_used(tmp_path, monkeypatch):
    options = {**SAMPLED, "max_steps": 1, "num_iterations": 2, "reward": half_without_spread}
    trainer = make_trainer(tmp_path, **options)
    asked = []
    monkeypatch.setattr(trainer.lookahead.layout, "agree", lambda here: asked.append(here))
    trainer.train()
    assert asked[0] and logged(trainer, FORWARD_ONLY)[0] > 0.1
