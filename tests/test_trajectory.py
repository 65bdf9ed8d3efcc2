"""What is read from a run's checkpoints, predicted from them, and written."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import odd_model, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gxpo_trl.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_INDEX, read_extrapolation, step_folder
from gxpo_trl.scripts.extrapolate import main
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.trajectory import deltas as deltas_module
from gxpo_trl.trajectory.checkpoints import load_trajectory, weight_files
from gxpo_trl.trajectory.deltas import low_rank_deltas
from gxpo_trl.trajectory.forecast import checkpoints_ahead, extrapolate
from gxpo_trl.trajectory.linear import least_squares, line_weights, linearity, rank_1_line, secant
from gxpo_trl.trajectory.lowrank import Triplets
from gxpo_trl.trajectory.predictor import PredictorSettings, TrajectoryPredictor, VectorPredictor


MODULES = ["q_proj", "k_proj", "o_proj", "up_proj"]  # 64 x 64, and 128 x 64
TOKENS = torch.arange(24).view(2, 12)


def lora(**overrides) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": MODULES, "task_type": "CAUSAL_LM", **overrides})


def save_run(run: Path, motion, config: LoraConfig | None = None, steps=range(10, 80, 10), seed: int = 0) -> Path:
    """Checkpoints of an adapter that moves: `motion(name, layer, step)` sets its B and A."""
    torch.manual_seed(seed)
    base = tiny_model()
    base.name_or_path = base.config._name_or_path = str(TINY_MODEL_PATH)
    model = get_peft_model(base, config or lora())
    for step in steps:
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
                motion(name, layer, step)
        model.save_pretrained(run / f"checkpoint-{step}")
    return run


def at_random(name: str, layer: LoraLayer, step: int) -> None:
    """Steps that have nothing to do with each other."""
    for factor in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(factor["default"].weight, std=0.1)


def drifting(name: str, layer: LoraLayer, step: int) -> None:
    """Most of the movement goes on in one direction, and A hardly moves."""
    torch.manual_seed(sum(map(ord, name)))
    for factor, std in ((layer.lora_A, 0.1), (layer.lora_B, 0.0)):
        weight = torch.empty_like(factor["default"].weight).normal_(std=0.1)
        drift = torch.empty_like(weight).normal_(std=0.1) * (step / 50 if std == 0.0 else step / 500)
        if std == 0.0:
            drift = drift * torch.tensor([1.0, 0.3, 0.1, 0.1, 0.1])[: drift.size(1)]
        factor["default"].weight.data = (std > 0) * weight + drift


def saturating(name: str, layer: LoraLayer, step: int) -> None:
    """Along one direction for each matrix, ever more slowly: σ goes as 1 - exp(-step / 40)."""
    torch.manual_seed(sum(map(ord, name)))
    layer.lora_A["default"].weight.data.normal_(std=0.1)
    layer.lora_B["default"].weight.data.zero_()
    size = torch.rand(()) + 0.5
    layer.lora_B["default"].weight.data[:, 0].normal_(std=0.1).mul_(size * (1 - np.exp(-step / 40)))


def dense_delta(folder: Path, name: str) -> torch.Tensor:
    """What PEFT adds to a weight when it merges."""
    merged = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).merge_and_unload()
    with torch.no_grad():
        return merged.get_submodule(name).weight - tiny_model().get_submodule(name).weight


def all_names(trajectory) -> list[str]:
    return [name for _, names in trajectory.groups() for name in names]


def dense(factors) -> torch.Tensor:
    return factors.left @ factors.right


# ---- Reading


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_rslora=True),
        lora(rank_pattern={"q_proj": 5}, alpha_pattern={"layers.0.self_attn.o_proj": 7}),
    ],
    ids=["alpha / r", "rslora", "patterns"],
)
def test_differences_are_those_of_the_merged_weights(tmp_path, config):
    trajectory = load_trajectory(save_run(tmp_path, at_random, config, steps=(10, 20)))
    assert trajectory.steps == (10, 20) and trajectory.spacing == 10
    assert len(all_names(trajectory)) == 8
    for _, names in trajectory.groups():
        first, step, second = (trajectory.difference(names, *pair) for pair in ((0, None), (1, 0), (1, None)))
        for i, name in enumerate(names):
            expected = [dense_delta(folder, name) for folder in trajectory.folders]
            for found, delta in ((first, expected[0]), (step, expected[1] - expected[0]), (second, expected[1])):
                assert torch.allclose(dense(found)[i], delta, atol=1e-6)


def test_what_a_run_started_from_is_taken_off(tmp_path):
    run = save_run(tmp_path, at_random, steps=(0, 10, 20))
    trajectory = load_trajectory(run)
    assert trajectory.steps == (10, 20)
    (name,) = (names := all_names(trajectory))[:1]
    expected = dense_delta(run / "checkpoint-10", name) - dense_delta(run / "checkpoint-0", name)
    assert len(names) == 8
    assert torch.allclose(dense(trajectory.difference([name], 0, None))[0], expected, atol=1e-6)


def test_a_combination_is_exact(tmp_path):
    trajectory = load_trajectory(save_run(tmp_path, at_random, steps=(10, 20, 30)))
    name = all_names(trajectory)[0]
    first, _, last = (dense_delta(folder, name) for folder in trajectory.folders)
    found = trajectory.combination([name], [0.5, 0.0, -0.5])
    assert found.left.size(-1) == 6  # what has no weight has no columns
    assert torch.allclose(dense(found)[0], (first - last) / 2, atol=1e-6)


def save_full_run(run: Path, rank: int, steps=(10, 20, 30, 40), shards: str = "1GB") -> Path:
    """Full fine-tuning whose maps move by matrices of some rank; embeddings and norms move too."""
    model = tiny_model()
    torch.manual_seed(0)
    for step in steps:
        for name, p in model.named_parameters():
            with torch.no_grad():
                if p.ndim == 2 and "embed" not in name:
                    p += 0.02 * torch.randn(len(p), rank) @ torch.randn(rank, p.size(1))
                else:
                    p += 0.01
        model.save_pretrained(run / f"checkpoint-{step}", max_shard_size=shards)
    return run


@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_full_fine_tuning_is_read_tensor_by_tensor(tmp_path, shards):
    trajectory = load_trajectory(save_full_run(tmp_path, rank=4, shards=shards), base_model=str(TINY_MODEL_PATH))
    states = [tiny_model().state_dict()]
    states += [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in trajectory.folders]
    assert len(all_names(trajectory)) == 14
    assert len(trajectory.left_alone) == 6 and "model.embed_tokens.weight" in trajectory.left_alone
    for _, names in trajectory.groups():
        found = trajectory.difference(names, 2, 0), trajectory.difference(names, 0, None)
        combined = trajectory.combination(names, [-1.0, 0.0, 1.0, 0.0])
        for i, name in enumerate(names):
            assert torch.allclose(dense(found[0])[i], states[3][name] - states[1][name], atol=1e-5)
            assert torch.allclose(dense(found[1])[i], states[1][name] - states[0][name], atol=1e-5)
            assert torch.allclose(dense(combined)[i], states[3][name] - states[1][name], atol=1e-6)


def test_the_leading_part_of_a_full_delta_is_that_of_the_dense_svd(tmp_path):
    trajectory = load_trajectory(save_full_run(tmp_path, rank=60), base_model=str(TINY_MODEL_PATH))
    found = deltas_module.leading_triplets(trajectory.difference(["model.layers.0.mlp.up_proj.weight"], 3, 2))
    before, after = (trajectory.get("model.layers.0.mlp.up_proj.weight", i) for i in (2, 3))
    u, sigma, vt = torch.linalg.svd(after - before)
    assert found.sigma.item() == pytest.approx(sigma[0].item(), rel=1e-4)
    assert abs((found.u[0, :, 0] @ u[:, 0]).item()) > 0.999 and abs((found.v[0, :, 0] @ vt[0]).item()) > 0.999


def test_a_recorded_trajectory_goes_before_checkpoints(tmp_path):
    save_run(tmp_path, at_random, steps=(7, 14))
    for step in (5, 10, 15):
        target = tmp_path / "trajectory" / f"step-{step:06d}"
        target.mkdir(parents=True)
        for file in (ADAPTER_WEIGHTS, "adapter_config.json"):
            (target / file).write_bytes((tmp_path / "checkpoint-7" / file).read_bytes())
    assert load_trajectory(tmp_path).steps == (5, 10, 15)
    assert load_trajectory(tmp_path, last_step=12).steps == (5, 10)


# ---- Refusing


def change(run: Path, step: int, **settings) -> None:
    path = run / f"checkpoint-{step}" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def poison(run: Path) -> None:
    path = run / "checkpoint-20" / ADAPTER_WEIGHTS
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, path)


def replace_by_model(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model().save_pretrained(folder)


def move_into(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    for file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        (folder / file).rename(folder / name / file)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


BAD_RUNS = {
    "no checkpoints": (lambda run: run.rename(run.parent / "elsewhere"), "holds no checkpoints"),
    "uneven": (lambda run: (run / "checkpoint-30").rename(run / "checkpoint-35"), "`last_step: 20`"),
    "one": (lambda run: [(run / f"checkpoint-{s}").rename(run / f"x{s}") for s in range(20, 80, 10)], "a single"),
    "not finite": (poison, "checkpoint-20 holds numbers that are not finite"),
    "another rank": (lambda run: change(run, 30, r=4), "checkpoint-30 has `r: 4`"),
    "another base": (lambda run: change(run, 70, base_model_name_or_path="x"), "`base_model_name_or_path"),
    "dora": (lambda run: change(run, 70, use_dora=True), "`use_dora`"),
    "pissa": (lambda run: change(run, 70, init_lora_weights="pissa"), "`init_lora_weights: pissa`"),
    "another start": (lambda run: change(run, 70, init_lora_weights=False), "Train with `trajectory_steps`"),
    "no lora": (lambda run: change(run, 70, peft_type="IA3"), "needs plain LoRA"),
    "no weights": (
        lambda run: (run / "checkpoint-20" / ADAPTER_WEIGHTS).unlink(),
        "checkpoint-20 holds an adapter without adapter_model.safetensors. Save adapters in safetensors",
    ),
    "not an adapter": (
        lambda run: replace_by_model(run / "checkpoint-20"),
        "are adapters and some are not",
    ),
    "weights of another format": (
        lambda run: [p.rename(p.with_name("adapter_model.bin")) for p in run.glob(f"checkpoint-*/{ADAPTER_WEIGHTS}")],
        "holds an adapter without adapter_model.safetensors. Save adapters in safetensors",
    ),
    "a named adapter": (
        lambda run: [move_into(path, "mine") for path in run.glob("checkpoint-*")],
        "checkpoint-10 holds its adapter in the folder mine",
    ),
    "cut weights": (
        lambda run: cut(run / "checkpoint-30" / ADAPTER_WEIGHTS),
        "checkpoint-30/adapter_model.safetensors can't be read",
    ),
    "cut settings": (
        lambda run: (run / "checkpoint-70" / ADAPTER_CONFIG).write_text('{"peft'),
        "checkpoint-70/adapter_config.json is not complete JSON",
    ),
    "only the start": (
        lambda run: [step_folder(run, 0).mkdir(parents=True)],
        "holds no checkpoint after the start of the run",
    ),
    "a start that is gone": (
        lambda run: (run / "run.json").write_text('{"settings": {"resume_adapter": "out/elsewhere"}}'),
        "started from the adapter out/elsewhere, which is not there",
    ),
}


@pytest.mark.parametrize("damage, message", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_run_that_is_no_trajectory_is_refused(tmp_path, damage, message):
    run = save_run(tmp_path / "run", at_random)
    damage(run)
    with pytest.raises(ValueError, match=message):
        load_trajectory(run)


def test_a_checkpoint_that_is_still_being_saved_is_left_out(tmp_path, caplog):
    run = save_run(tmp_path, at_random)
    for file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        (run / "checkpoint-70" / file).unlink()
    assert load_trajectory(run).steps == (10, 20, 30, 40, 50, 60)
    assert "checkpoint-70 holds no weights yet: it is left out" in caplog.text


def test_settings_that_older_versions_of_peft_do_not_have(tmp_path):
    run = save_run(tmp_path, drifting, steps=(10, 20))
    name = all_names(load_trajectory(run))[0]
    expected = dense_delta(run / "checkpoint-20", name)
    for path in run.glob(f"*/{ADAPTER_CONFIG}"):
        settings = json.loads(path.read_text())
        for gone in ("use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"):
            del settings[gone]
        path.write_text(json.dumps(settings))
    trajectory = load_trajectory(run)
    assert torch.allclose(dense(trajectory.difference([name], 1, None))[0], expected, atol=1e-6)


def test_an_adapted_convolution_is_left_alone(tmp_path):
    model = torch.nn.Module()
    model.linear, model.conv = torch.nn.Linear(8, 8), torch.nn.Conv1d(8, 8, 3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["linear", "conv"]))
    for step in (10, 20):
        adapted.save_pretrained(tmp_path / f"checkpoint-{step}")
    trajectory = load_trajectory(tmp_path)
    assert all_names(trajectory) == ["linear"]
    assert [name.split(".")[2] for name in trajectory.left_alone] == ["conv", "conv"]


def test_the_adapter_that_a_run_started_from_is_taken_off(tmp_path):
    """It is recorded in `run.json`; otherwise the start counts as zero."""
    whole = save_run(tmp_path / "whole", at_random, steps=(0, 10, 20))
    later = save_run(tmp_path / "later", at_random, steps=(10, 20))
    for step in (10, 20):
        shutil.copytree(whole / f"checkpoint-{step}", later / f"checkpoint-{step}", dirs_exist_ok=True)
    start = (whole / "checkpoint-0").rename(tmp_path / "start")
    (later / "run.json").write_text(json.dumps({"settings": {"resume_adapter": str(start)}}))
    trajectory = load_trajectory(later)
    name = all_names(trajectory)[0]
    expected = dense_delta(later / "checkpoint-10", name) - dense_delta(start, name)
    assert torch.allclose(dense(trajectory.difference([name], 0, None))[0], expected, atol=1e-6)


def test_checkpoints_that_adapt_other_modules_are_refused(tmp_path):
    save_run(tmp_path, at_random, steps=(10, 20))
    save_run(tmp_path, at_random, lora(target_modules=["q_proj"]), steps=(30,))
    with pytest.raises(ValueError, match="checkpoint-10 adapts other modules than"):
        load_trajectory(tmp_path)


@pytest.mark.parametrize("content", ["", '{"weight_map": {"a"', "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_a_broken_index_of_weights_is_named(tmp_path, content):
    (tmp_path / MODEL_INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path / MODEL_INDEX}"):
        weight_files(tmp_path)


def test_full_fine_tuning_without_its_start_is_refused(tmp_path):
    run = save_full_run(tmp_path, rank=1)
    with pytest.raises(ValueError, match="Set `base_model`"):
        load_trajectory(run)
    with pytest.raises(ValueError, match="no weights in safetensors"):
        load_trajectory(run, base_model=str(tmp_path))
    odd_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has other tensors than"):
        load_trajectory(run, base_model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "steps, ahead, message",
    [
        (range(10, 80, 10), 25, "multiple of 10"),
        (range(10, 80, 10), 60, "takes 8"),  # seven checkpoints, and k is 6
        (range(10, 70, 10), None, "takes 7"),  # k is the paper's 5
        (range(20, 90, 10), 50, "takes 8"),  # the first has no predecessor
    ],
)
def test_too_far_ahead_is_an_error(tmp_path, steps, ahead, message):
    trajectory = load_trajectory(save_run(tmp_path, at_random, steps=steps))
    with pytest.raises(ValueError, match=message):
        extrapolate(trajectory, "next", ahead)


def test_a_run_that_stands_still_is_refused(tmp_path):
    still = load_trajectory(save_run(tmp_path, lambda name, layer, step: layer.lora_B["default"].weight.data.zero_()))
    with pytest.raises(ValueError, match="nowhere to go"):
        extrapolate(still, "linear", 10)


def test_a_run_that_comes_to_a_stop_has_no_error_to_speak_of(tmp_path, capsys):
    def stopping(name, layer, step):
        drifting(name, layer, min(step, 40))

    run = save_run(tmp_path, stopping)
    write(run, "--method", "linear")
    assert "  linear        \n" in capsys.readouterr().out
    (path,) = run.glob("extrapolated/linear/*/extrapolation.json")
    assert read_extrapolation(path)["held_out"]["errors"]["linear"]["error"] is None


@pytest.mark.parametrize("ahead, k", [(None, 5), (10, 1), (40, 4)])
def test_steps_are_counted_in_checkpoints(ahead, k):
    assert checkpoints_ahead(ahead, 10) == k


# ---- Straight lines


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.floats(-3, 12), st.integers(0, 50))
def test_line_weights_are_those_of_a_least_squares_fit(points, at, seed):
    y = np.random.default_rng(seed).normal(size=points)
    slope, intercept = np.polyfit(np.arange(points), y, 1)
    assert (line_weights(points, at).numpy() @ y) == pytest.approx(slope * at + intercept, abs=1e-9)
    ahead = least_squares(points, 3).numpy()
    assert ahead @ y == pytest.approx(3 * slope, abs=1e-9) and ahead.sum() == pytest.approx(0.0, abs=1e-12)


def test_a_secant_repeats_what_was_last():
    y = np.array([0.0, 5.0, 7.0, 10.0])
    assert secant(4, 2).numpy() @ y == pytest.approx(10.0 - 5.0)
    assert secant(4, 6).numpy() @ y == pytest.approx(2 * (10.0 - 0.0))  # three checkpoints are all there is


def random_triplets(count: int, n: int = 4) -> Triplets:
    torch.manual_seed(count)
    u, v = (torch.nn.functional.normalize(torch.randn(count, n, size, 1), dim=-2).double() for size in (6, 5))
    return Triplets(torch.rand(count, n, 1).double() + 1, u, v, torch.ones(count, n))


def test_linearity_is_r2_over_all_entries_of_the_rank_1_matrices():
    triplets = random_triplets(9)
    entries = dense(triplets.as_factors()).flatten(2).numpy()  # (T, N, m·n)
    for on in (range(5, 9), range(5)):
        found = linearity(triplets, 5, on)
        for j in range(4):
            slope, intercept = np.polyfit(np.arange(5), entries[:5, j], 1)
            truth = entries[list(on), j]
            missed = truth - (np.array(on)[:, None] * slope + intercept)
            expected = 1 - (missed**2).sum() / ((truth - truth.mean(0)) ** 2).sum()
            assert found[j].item() == pytest.approx(expected, abs=1e-6)


def test_a_rank_1_line_is_the_line_of_every_entry():
    triplets = random_triplets(6)
    entries = dense(triplets.as_factors()).numpy()
    slope = np.polyfit(np.arange(6), entries.reshape(6, -1), 1)[0].reshape(entries.shape[1:])
    assert np.allclose(dense(rank_1_line(triplets, 3)).numpy(), 3 * slope, atol=1e-9)


def relex_by_hand(deltas: np.ndarray, ahead: int) -> np.ndarray:
    """W - W_0 that RELEX predicts of one matrix from (T, m, n), by a full SVD of the table of all entries."""
    table = deltas.reshape(len(deltas), -1).astype(np.float64)
    u, sigma, vt = np.linalg.svd(table, full_matrices=False)
    slope, intercept = np.polyfit(np.arange(len(table)), u[:, 0] * sigma[0], 1)
    return ((slope * (len(table) - 1 + ahead) + intercept) * vt[0]).reshape(deltas.shape[1:])


@pytest.mark.parametrize("kind", ["adapter", "adapter that goes on", "full"])
def test_relex_is_its_definition(tmp_path, kind):
    """Of whole matrices, from the start of the run: also where the adapter that was trained on was not zero there."""
    if kind == "full":
        trajectory = load_trajectory(save_full_run(tmp_path, rank=2), base_model=str(TINY_MODEL_PATH))
    else:
        motion, first = (drifting, 10) if kind == "adapter" else (at_random, 0)
        trajectory = load_trajectory(save_run(tmp_path, motion, steps=range(first, 80, 10)))
        assert (trajectory.start is None) == (kind == "adapter")
    ahead, count = 2, len(trajectory)
    found = extrapolate(trajectory, "relex", ahead * trajectory.spacing)
    for i, d in enumerate(found.deltas):
        of_start = [dense(trajectory.difference(d.names, t, None)).numpy() for t in range(count)]
        moved = dense(found.predict(i, slice(None))).numpy()
        for n in range(len(d.names)):
            deltas = np.stack([delta[n] for delta in of_start])
            expected = relex_by_hand(deltas, ahead) - deltas[-1]
            assert np.allclose(moved[n], expected, atol=1e-5 * np.abs(deltas).max()), d.names[n]


@pytest.mark.parametrize("method", ["linear", "rl-extra", "alpharl", "relex"])
def test_straight_motion_is_extrapolated_exactly(tmp_path, method):
    """B grows in proportion to the step, in one direction: each matrix is on a line, and of rank 1."""

    def straight(name, layer, step):
        torch.manual_seed(sum(map(ord, name)))
        layer.lora_A["default"].weight.data.normal_(std=0.1)
        layer.lora_B["default"].weight.data.zero_()
        layer.lora_B["default"].weight.data[:, 0].normal_(std=0.1).mul_(step / 50)

    trajectory = load_trajectory(save_run(tmp_path, straight))
    found = extrapolate(trajectory, method, 20)
    assert found.report["held_out"]["errors"][method]["error"] < 1e-3
    assert found.report["held_out"]["errors"][method]["cosine"] == pytest.approx(1.0, abs=1e-5)
    for i, d in enumerate(found.deltas):
        truth = dense(trajectory.difference(d.names, 6, 4))
        assert torch.allclose(dense(found.predict(i, slice(None))), truth, atol=1e-6)


# ---- The predictor

QUICK = PredictorSettings(hidden_size=16, epochs=100, learning_rate=1e-2)


def predicted(trajectory, settings: PredictorSettings = QUICK) -> torch.Tensor:
    found = extrapolate(trajectory, "next", 20, settings)
    entries = torch.cat([dense(found.predict(i, slice(None))).flatten() for i in range(len(found.deltas))])
    assert entries.abs().max() > 1e-3
    return entries


def test_it_learns_a_motion_that_is_not_straight(tmp_path):
    """Which every straight line misses by more than twice as much."""
    trajectory = load_trajectory(save_run(tmp_path, saturating, steps=range(10, 160, 10)))
    errors = extrapolate(trajectory, "next", 30).report["held_out"]["errors"]
    assert errors["next"]["error"] < 0.35
    for name in ("zero", "repeat_local", "linear", "rl-extra", "alpharl", "relex"):
        assert errors[name]["error"] > 2 * errors["next"]["error"]


def assert_are_the_same(deltas, others) -> None:
    """But for a sign that all triplets of a matrix share."""
    for d, other in zip(deltas, others, strict=True):
        sign = (d.from_start.u[:1] * other.from_start.u[:1]).sum(-2, keepdim=True).sign()
        for kind in ("from_start", "local", "target"):
            one, two = getattr(d, kind), getattr(other, kind)
            assert torch.allclose(one.sigma, two.sigma, atol=1e-5)
            assert torch.allclose(one.u, sign * two.u, atol=1e-3) and torch.allclose(one.v, sign * two.v, atol=1e-3)


def test_the_factors_gauge_does_not_matter(tmp_path):
    """B·A is (B·R)·(R⁻¹·A), at each checkpoint with another R."""

    def turned(name, layer, step):
        drifting(name, layer, step)
        torch.manual_seed(step)
        gauge = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.data, a.data = (b.double() @ gauge).float(), torch.linalg.solve(gauge, a.double()).float().contiguous()

    plain, other = (
        low_rank_deltas(load_trajectory(save_run(tmp_path / name, motion)), 2)
        for name, motion in (("plain", drifting), ("turned", turned))
    )
    assert_are_the_same(plain, other)


def test_the_signs_that_an_svd_chooses_do_not_matter(tmp_path, monkeypatch):
    trajectory = load_trajectory(save_run(tmp_path, drifting))
    plain, prediction = low_rank_deltas(trajectory, 2), predicted(trajectory)
    leading, generator, flips = deltas_module.leading_triplets, torch.Generator().manual_seed(0), []

    def flipping(matrix):
        found = leading(matrix)
        flips.append(torch.randint(0, 2, found.sigma.shape, generator=generator) * 2.0 - 1)
        return found.turned(flips[-1])

    monkeypatch.setattr(deltas_module, "leading_triplets", flipping)
    assert_are_the_same(plain, low_rank_deltas(trajectory, 2))
    assert (torch.cat(flips) < 0).any()
    assert (prediction - predicted(trajectory)).norm() < 0.1 * prediction.norm()  # training amplifies rounding


def test_a_predictor_of_directions_is_odd():
    for is_odd in (True, False):
        model = VectorPredictor(7, QUICK, is_odd)
        from_start, local = torch.randn(2, 5, 7)
        assert torch.equal(model(-from_start, -local), -model(from_start, local)) == is_odd


def test_local_and_target_deltas_point_where_the_global_ones_do(tmp_path):
    for d in low_rank_deltas(load_trajectory(save_run(tmp_path, drifting)), 2):
        for other in (d.local, d.target):
            start = d.from_start[: len(other)]
            cosines = (other.u * start.u).sum(-2) + (other.v * start.v).sum(-2)
            assert (cosines.sum(0) > 0).all()


def test_the_held_out_steps_are_predicted_by_what_was_known_before(tmp_path):
    """What comes after step 50 moves the truth that is held out, and not what was foreseen."""

    def jumping(name, layer, step):
        drifting(name, layer, step)
        if step > 50:
            layer.lora_B["default"].weight.data.normal_()

    steps = range(10, 80, 10)
    errors = []
    for name, motion in (("drifting", drifting), ("jumping", jumping)):
        trajectory = load_trajectory(save_run(tmp_path / name, motion, steps=steps))
        found = extrapolate(trajectory, "next", 20, QUICK)
        assert found.report["held_out"]["from_step"] == 50 and not found.report["held_out_was_seen_in_part"]
        errors.append(found.report["held_out"]["errors"])
    assert all(errors[1][name]["error"] > 0.9 for name in ("next", "linear", "rl-extra", "alpharl", "relex"))
    assert errors[0]["linear"]["error"] < 0.5


def test_a_short_trajectory_says_that_the_held_out_steps_were_seen_in_part(tmp_path, capsys):
    run = save_run(tmp_path, drifting, steps=range(10, 50, 10))
    main([str(run), "--steps-ahead", "20", "--epochs", "3"])
    assert "`next` was trained on a part" in capsys.readouterr().out
    report = json.loads((run / "extrapolated" / "next" / "alpha-1" / "extrapolation.json").read_text())
    assert report["held_out_was_seen_in_part"] is True


@pytest.mark.slow
def test_seeds_and_ablations(tmp_path):
    trajectory = load_trajectory(save_run(tmp_path, drifting))
    plain = predicted(trajectory)
    assert torch.equal(plain, predicted(trajectory))
    for change in ({"seed": 1}, {"without_global": True}, {"without_local": True}):
        assert not torch.allclose(plain, predicted(trajectory, dataclasses.replace(QUICK, **change)))


def test_predicted_triplets_are_triplets(tmp_path):
    """Unit vectors, and no singular value below 0, however little was learnt."""
    deltas = low_rank_deltas(load_trajectory(save_run(tmp_path, drifting)), 2)
    predictor = TrajectoryPredictor(deltas, QUICK)
    predictor.fit(range(1), epochs=dict.fromkeys(predictor.vectors, 1))
    sigmas = []
    for triplets in predictor.predict(-1):
        for vectors in (triplets.u, triplets.v):
            assert torch.allclose(vectors.norm(dim=-2), torch.ones(len(vectors), 1))
        sigmas.append(triplets.sigma)
    assert (torch.cat(sigmas) >= 0).all()


def test_what_is_held_out_chooses_the_epoch(tmp_path, monkeypatch):
    """The weights are those of that epoch, and training stops when it has waited long enough for a better one."""
    deltas = low_rank_deltas(load_trajectory(save_run(tmp_path, drifting)), 2)
    predictor = TrajectoryPredictor(deltas, QUICK)

    def predictions():
        return torch.cat([dense(t.as_factors()).flatten() for t in predictor.predict(4)])

    taken = predictor.fit(range(3), held_out=4)
    chosen = predictions()
    assert taken == predictor.fit(range(3), epochs=taken) and min(taken.values()) < QUICK.epochs
    assert torch.equal(chosen, predictions())

    monkeypatch.setattr("gxpo_trl.trajectory.predictor.PATIENCE", 1)
    impatient = predictor.fit(range(3), held_out=4)
    assert impatient != taken and all(impatient[name] <= epoch for name, epoch in taken.items())


def test_the_command_shows_how_far_the_predictor_is(tmp_path, capsys):
    """Twice, without and with what was held out; an epoch that training stops before counts as done."""
    write(save_run(tmp_path, drifting))
    ends = [line.split("\r")[-1] for line in capsys.readouterr().err.split("\n") if "predictor" in line]
    assert len(ends) == 2 and all(re.match(r"predictor: 100%.* (\d+)/\1 ", end) for end in ends)


def test_what_is_predicted_from_has_learnt_from_all_transitions(tmp_path, monkeypatch):
    calls = []
    for name in ("fit", "predict"):
        method = getattr(TrajectoryPredictor, name)

        def spy(self, *args, name=name, method=method, **kwargs):
            calls.append((name, *args))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(TrajectoryPredictor, name, spy)
    extrapolate(load_trajectory(save_run(tmp_path, drifting)), "next", 20, QUICK)  # seven checkpoints, k = 2
    assert calls == [("fit", range(3), 4), ("predict", 4), ("fit", range(5)), ("predict", 6)]


def test_an_ablated_input_is_not_seen(tmp_path):
    """Without local deltas, two trajectories with the same global ones are predicted alike from the same weights."""
    deltas = low_rank_deltas(load_trajectory(save_run(tmp_path, drifting)), 2)
    others = [deltas_module.Deltas(d.names, d.from_start, d.from_start, d.target) for d in deltas]

    def predictions(of, **settings):
        return torch.cat([dense(t.as_factors()).flatten() for t in fitted(of, **settings).predict(-1)])

    assert torch.equal(predictions(deltas, without_local=True), predictions(others, without_local=True))
    assert not torch.allclose(predictions(deltas), predictions(others))


def fitted(deltas, **settings) -> TrajectoryPredictor:
    predictor = TrajectoryPredictor(deltas, dataclasses.replace(QUICK, **settings))
    predictor.fit(range(3), epochs=dict.fromkeys(predictor.vectors, 100))
    return predictor


# ---- Writing


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def write(run: Path, *arguments: str) -> Path:
    quick = ["--epochs", "100", "--hidden_size", "16", "--learning_rate", "1e-2"]
    main([str(run), "--steps-ahead", "20", *quick, *arguments])
    return run / "extrapolated" / "next"


CONFIGS = {
    "alpha / r": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"q_proj": 5}, alpha_pattern={"layers.0.self_attn.o_proj": 7}),
    "embeddings": lora(target_modules=[*MODULES, "embed_tokens"]),
    "modules_to_save": lora(modules_to_save=["norm"]),
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in ("patterns", "modules_to_save") else [pytest.mark.slow])
        for name, config in CONFIGS.items()
    ],
)
def test_the_adapter_is_what_was_predicted(tmp_path, config):
    """Loaded by plain PEFT, it adds α·ΔW to the last checkpoint and nothing else."""
    run = save_run(tmp_path, drifting, config)
    folder = write(run, "--alpha", "1.5") / "alpha-1.5"
    trajectory = load_trajectory(run)
    found = extrapolate(trajectory, "next", 20, QUICK)
    adapter = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = AutoPeftModelForCausalLM.from_pretrained(run / "checkpoint-70", dtype=torch.float32).merge_and_unload()
    for i, d in enumerate(found.deltas):
        for name, movement in zip(d.names, dense(found.predict(i, slice(None))), strict=True):
            expected.get_submodule(name).weight.data += 1.5 * movement
            assert adapter.get_submodule(f"base_model.model.{name}").r["default"] == trajectory.shapes[name][1] + 1
    assert torch.allclose(logits(adapter), logits(expected), atol=1e-4)
    assert not torch.allclose(logits(adapter), logits(tiny_model()), atol=1e-2)


def test_adapter_and_merged_model_agree(tmp_path):
    run = save_run(tmp_path, drifting)
    adapter = AutoPeftModelForCausalLM.from_pretrained(write(run) / "alpha-1", dtype=torch.float32)
    write(run, "--merged", "true", "--output_dir", str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "alpha-1", dtype=torch.float32)
    assert not (tmp_path / "merged" / "alpha-1" / "adapter_config.json").exists()
    assert torch.allclose(logits(adapter), logits(merged), atol=2e-2)  # the tiny model is kept in fp16


@pytest.mark.parametrize("method", ["next", "relex", "alpharl", "rl-extra", "linear"])
def test_alpha_0_is_the_last_checkpoint(tmp_path, method):
    run = save_run(tmp_path, drifting)
    write(run, "--method", method, "--alpha", "0,1")
    before, after, moved = (
        AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (run / "checkpoint-70", *(run / "extrapolated" / method / f"alpha-{a}" for a in (0, 1)))
    )
    assert torch.allclose(logits(after), logits(before), atol=1e-4)
    assert not torch.allclose(logits(moved), logits(before), atol=1e-3)


def test_full_fine_tuning_is_written_whole(tmp_path):
    run = save_full_run(tmp_path, rank=2, shards="100KB")
    write(run, "--base_model", str(TINY_MODEL_PATH), "--alpha", "0.5", "--method", "linear")
    folder = run / "extrapolated" / "linear" / "alpha-0.5"
    states = [AutoModelForCausalLM.from_pretrained(run / f"checkpoint-{s}").state_dict() for s in (10, 20, 30, 40)]
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, last in states[-1].items():
        is_map = last.ndim == 2 and "embed" not in name and "lm_head" not in name
        slope = sum(w * s[name] for w, s in zip((-0.3, -0.1, 0.1, 0.3), states, strict=True)) if is_map else 0.0
        assert torch.allclose(found[name], last + 0.5 * 2 * slope, atol=1e-5)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "extrapolation.json", "trajectory.png"}


def test_what_is_no_map_is_left_alone_and_said_so(tmp_path, capsys):
    run = save_run(tmp_path, drifting, lora(target_modules=[*MODULES, "embed_tokens"], modules_to_save=["norm"]))
    folder = write(run) / "alpha-1"
    assert "Left unchanged, not being low-rank maps: 8 tensors" in capsys.readouterr().out
    before, after = load_file(run / "checkpoint-70" / ADAPTER_WEIGHTS), load_file(folder / ADAPTER_WEIGHTS)
    left_alone = json.loads((folder / "extrapolation.json").read_text())["left_alone"]
    parts = ("lora_embedding_A", "lora_embedding_B", "embed_tokens.base_layer", "norm.weight")
    assert len(left_alone) == 8 and all(any(part in name for name in left_alone) for part in parts)
    assert all(torch.equal(before[name], after[name]) for name in left_alone)


def test_an_adapter_grows_and_keeps_what_it_had(tmp_path):
    run = save_run(tmp_path, drifting)
    folder = write(run) / "alpha-1"
    before, after = load_file(run / "checkpoint-70" / ADAPTER_WEIGHTS), load_file(folder / ADAPTER_WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] / 4 == pytest.approx(5 / 3) and not config["rank_pattern"]
    for name, old in before.items():
        new = after[name]
        kept, added = (new[:3], new[3:]) if "lora_A" in name else (new[:, :3], new[:, 3:])
        assert torch.equal(kept, old)
        partner = after[name.replace("lora_A", "lora_B")][:, 3:]
        assert "lora_B" in name or added.norm().item() == pytest.approx(partner.norm().item(), rel=1e-4)


def test_report_card_and_figure_of_each_alpha(tmp_path, capsys):
    folder = write(save_run(tmp_path, drifting), "--alpha", "0.5,2")
    assert capsys.readouterr().out.split()[-2:] == [str(folder / "alpha-0.5"), str(folder / "alpha-2")]
    for alpha in (0.5, 2.0):
        result = folder / f"alpha-{alpha:g}"
        report = json.loads((result / "extrapolation.json").read_text())
        assert report["alpha"] == alpha and report["steps_ahead"] == 20 and report["matrices"] == 8
        assert report["held_out"]["errors"]["zero"]["error"] == pytest.approx(1.0)
        assert report["seconds"]["all"] > 0 and len(report["energy_ratio"]["mean"]) == 7
        card = (result / "README.md").read_text()
        assert f"α = {alpha:g}" in card and "![" in card
        assert "base_model:" not in card  # it is a folder of this machine
        assert (result / "trajectory.png").stat().st_size > 10_000
        assert (result / "tokenizer_config.json").is_file()
    assert not list(folder.glob("*.partial"))


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    run = save_run(tmp_path, drifting)
    folder = write(run)
    before = (folder / "alpha-1" / ADAPTER_WEIGHTS).read_bytes()
    with pytest.raises(SystemExit, match="exists already"):
        write(run, "--alpha", "2,1", "--seed", "1")
    assert not (folder / "alpha-2").exists() and (folder / "alpha-1" / ADAPTER_WEIGHTS).read_bytes() == before

    monkeypatch.setattr("gxpo_trl.trajectory.writing._card", lambda *args: 1 / 0)
    with pytest.raises(SystemExit, match="error: ZeroDivisionError"):
        write(run, "--alpha", "3")
    assert sorted(path.name for path in folder.iterdir()) == ["alpha-1"]


def test_what_lies_beside_the_results_stays(tmp_path):
    run = save_run(tmp_path / "run", drifting)
    for name in ("trajectory.png", "alpha-1.partial"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    main([str(run), "--method", "linear", "--steps-ahead", "20", "--output-dir", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "alpha-1" / ADAPTER_WEIGHTS).is_file()
    for name in ("trajectory.png", "alpha-1.partial"):
        assert (tmp_path / "mine" / name).read_text() == "mine"


def test_two_alphas_of_six_equal_digits_are_two_results(tmp_path):
    folder = write(save_run(tmp_path, drifting), "--alpha", "1.2345671,1.2345674,2")
    found = {path.name: json.loads((path / "extrapolation.json").read_text())["alpha"] for path in folder.iterdir()}
    assert found == {"alpha-1.2345671": 1.2345671, "alpha-1.2345674": 1.2345674, "alpha-2": 2.0}


@pytest.mark.parametrize("arguments", [("--alpha", "1e45"), ("--learning-rate", "1e25")])
def test_what_is_not_finite_is_not_written(tmp_path, arguments):
    run = save_run(tmp_path, drifting)
    with pytest.raises(SystemExit, match="is not finite at α = .*. Lower `alpha`, or the `learning_rate`"):
        write(run, *arguments)
    assert not list((run / "extrapolated").rglob("alpha-*"))


def slowly(name: str, layer: LoraLayer, step: int) -> None:
    """A small movement from a large start."""
    torch.manual_seed(sum(map(ord, name)))
    for factor in (layer.lora_A, layer.lora_B):
        weight = factor["default"].weight.data.normal_(std=0.1)
        weight.add_(torch.empty_like(weight).normal_(std=0.1) * step / 1000)


@pytest.mark.parametrize("method", ["rl-extra", "relex"])
def test_the_movement_of_an_adapter_in_bf16_is_not_rounded_away(tmp_path, method):
    run = save_run(tmp_path, slowly)
    for path in run.glob(f"*/{ADAPTER_WEIGHTS}"):
        tensors = load_file(path)
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    main([str(run), "--method", method, "--steps-ahead", "20"])
    trajectory = load_trajectory(run)
    found = extrapolate(trajectory, method, 20)
    name = found.deltas[0].names[0]
    moved = dense_delta(run / "extrapolated" / method / "alpha-1", name) - dense_delta(trajectory.folders[-1], name)
    expected = dense(found.predict(0, slice(0, 1)))[0]
    assert (moved - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Set `run`"),
        (["RUN", "--method", "magic"], "`method` must be one of next, relex, alpharl"),
        (["RUN", "--alpha", "-1"], "`alpha` must be finite"),
        (["RUN", "--alpha", "1,x"], "`alpha` must be finite"),
        (["RUN", "--steps-ahead", "0"], "`steps_ahead` must be at least 1"),
        (["RUN", "--epochs", "0"], "`epochs`"),
        (["RUN", "--learning_rate", "0"], "`learning_rate`"),
        (["RUN", "--without_global", "true", "--without_local", "true"], "no input"),
        (["RUN", "--method", "linear", "--without_local", "true"], "only apply to `method: next`"),
        (["RUN", "--last_step", "5"], "Raise `last_step`"),
        (["RUN", "--step-ahead", "20"], "Unknown key `step-ahead`"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_errors(tmp_path, arguments, message):
    run = save_run(tmp_path, at_random, steps=(10, 20))
    with pytest.raises(SystemExit, match=message):
        main([str(run) if argument == "RUN" else argument for argument in arguments])
    assert not (run / "extrapolated").exists()


def test_training_can_go_on_from_the_result(tmp_path):
    run = save_run(tmp_path, drifting)
    model = PeftModel.from_pretrained(tiny_model(), write(run) / "alpha-1", is_trainable=True)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 16
    for name, gradient in gradients.items():
        added = gradient[3] if "lora_A" in name else gradient[:, 3]
        assert added.abs().max() > 0
