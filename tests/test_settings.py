"""Settings that make no sense are refused where they are made, with the setting and the remedy in the sentence."""

import functools
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import ON_CPU, make_trainer, tiny_model
from torch.distributed.tensor import Shard, distribute_tensor
from trl import GRPOConfig

from gxpo_trl import GXPOConfig, GXPOTrainer, LookaheadConfig, LookaheadTrainer, SFPOConfig, SFPOTrainer
from gxpo_trl.callbacks.records import describe_run
from gxpo_trl.engines.support import check_engine, launcher_surprises
from gxpo_trl.tasks import arithmetic_reward, load_arithmetic


@pytest.mark.parametrize(
    "setting, value",
    [
        ("update_rule", "gpxo"),
        ("lookahead_steps", 0),
        ("reposition_alpha", -0.1),
        ("reposition_alpha", math.nan),
        ("reposition_alpha", math.inf),
        ("active_threshold", -1e-8),
        ("active_threshold", math.inf),
        ("retention_min", 3.1),
        ("retention_max", -2.1),
        ("retention_max", math.nan),
        ("scale_max", 0.9),
        ("scale_max", math.nan),
        ("ratio_anchor", "old"),
        ("gate_signal", "loss"),
        ("gate_threshold", 0.0),
        ("gate_threshold", math.nan),
        ("gate_window", 1),
        ("gate_warmup_steps", -1),
        ("gate_patience", 0),
        ("max_active_steps", 0),
        ("alpha_decay_steps", -1),
        ("snapshot_device", "disk"),
        ("lookahead_diagnostics_steps", -1),
        ("fp16", True),
        ("max_grad_norm", None),
        ("optim", "lomo"),
        ("optim", "adalomo"),
        ("optim", "galore_adamw_layerwise"),
        ("optim", "schedule_free_adamw"),
    ],
)
def test_a_setting_out_of_bounds_is_named(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting}"):
        GXPOConfig(str(tmp_path), **{**ON_CPU, setting: value})


@pytest.mark.parametrize("setting", ["prompts_per_step", "num_generations", "per_device_train_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_what_prompts_per_step_is_divided_by_is_a_count(tmp_path, setting, value):
    settings = {"prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 8, setting: value}
    with pytest.raises(ValueError, match=f"`{setting}`"):
        GXPOConfig(str(tmp_path), **{**ON_CPU, **settings})


def test_one_step_is_two_passes(tmp_path):
    """Of GXPO without a way back, whatever α."""
    assert SFPOConfig(str(tmp_path), **ON_CPU, lookahead_steps=1).lookahead_rule().passes == 2
    rule = GXPOConfig(str(tmp_path), **ON_CPU, lookahead_steps=1).lookahead_rule()
    assert (rule.passes, rule.alpha, rule.extrapolation) == (2, 1.0, None)


def test_the_defaults_of_sfpo_are_those_of_its_paper(tmp_path):
    config = SFPOConfig(str(tmp_path), **ON_CPU)
    rule, trigger = config.lookahead_rule(), config.gate().trigger
    assert (rule.probes, rule.passes, rule.alpha, rule.extrapolation) == (3, 4, 0.8, None)
    assert (config.gate_signal, trigger.threshold, trigger.window, trigger.two_sided) == ("entropy", 1.0, 30, True)


def test_the_defaults_are_those_of_the_paper(tmp_path):
    rule = GXPOConfig(str(tmp_path), **ON_CPU).lookahead_rule()
    assert rule.passes == 3 and not rule.rollback
    extrapolation = rule.extrapolation
    assert (extrapolation.lookahead_steps, rule.alpha) == (5, 0.5)
    assert (extrapolation.active_threshold, extrapolation.scale_min, extrapolation.scale_max) == (1e-8, 1.0, 3.5)
    assert (extrapolation.retention_min, extrapolation.retention_max) == (-2.0, 3.0)


def test_bounds_can_be_opened(tmp_path):
    bounds = {"retention_min": -math.inf, "retention_max": math.inf, "scale_max": math.inf}
    extrapolation = GXPOConfig(str(tmp_path), **ON_CPU, **bounds).lookahead_rule().extrapolation
    assert {name: getattr(extrapolation, name) for name in bounds} == bounds


def test_alpha_above_one_warns_once(tmp_path):
    with pytest.warns(UserWarning, match="reposition_alpha") as caught:
        GXPOConfig(str(tmp_path), **ON_CPU, reposition_alpha=1.5)
    assert sum("reposition_alpha" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GXPOConfig(str(tmp_path), **ON_CPU, reposition_alpha=1.0)
    assert not any("reposition_alpha" in str(warning.message) for warning in caught)


def test_the_plain_rule_takes_what_trl_takes(tmp_path):
    LookaheadConfig(str(tmp_path), **{**ON_CPU, "optim": "schedule_free_adamw"}, update_rule="grpo")


def test_every_new_field_has_help_and_a_documented_default():
    for field in LookaheadConfig.__dataclass_fields__.values():
        if field.name in GRPOConfig.__dataclass_fields__:
            continue
        assert field.metadata["help"].endswith("."), field.name
        assert f"{field.name} (`" in LookaheadConfig.__doc__, field.name


def test_the_update_has_at_most_21_settings_and_step_control_3():
    ours = LookaheadConfig.__dataclass_fields__.keys() - GRPOConfig.__dataclass_fields__.keys()
    of_control = {name for name in ours if name.startswith("step_control")}
    assert len(ours - of_control - {"prompts_per_step"}) <= 21  # which is the batch's
    assert len(of_control) <= 3


@pytest.mark.parametrize(
    "trainer_class, config_class, rule, instead",
    [
        (GXPOTrainer, LookaheadConfig, "sfpo", "SFPOTrainer"),
        (GXPOTrainer, GXPOConfig, "grpo", "LookaheadTrainer"),
        (SFPOTrainer, LookaheadConfig, "gxpo", "GXPOTrainer"),
    ],
)
def test_each_class_runs_its_own_rule(tmp_path, trainer_class, config_class, rule, instead):
    with pytest.raises(ValueError, match=f"update_rule: .*{rule}.*Use {instead}"):
        make_trainer(tmp_path, trainer_class, config_class, update_rule=rule)


@pytest.mark.parametrize("rule, name", [("gxpo", "GXPO"), ("sfpo", "SFPO"), ("grpo", "GRPO")])
def test_the_name_the_tags_and_the_paper_follow_the_rule(tmp_path, rule, name):
    trainer = make_trainer(tmp_path, LookaheadTrainer, LookaheadConfig, update_rule=rule)
    assert trainer._name == name and rule in trainer._tag_names and rule in trainer.model.model_tags
    assert trainer._paper["id"] == {"gxpo": "2605.06755", "sfpo": "2510.04072", "grpo": "2402.03300"}[rule]


def test_a_plain_grpo_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="GXPOConfig"):
        make_trainer(tmp_path, GXPOTrainer, GRPOConfig)


@pytest.mark.parametrize("is_stream", [False, True])
def test_data_that_fill_no_generation_batch_are_refused(tmp_path, is_stream):
    args = GXPOConfig(str(tmp_path), **ON_CPU, per_device_train_batch_size=16, num_generations=4, max_steps=1)
    rows = load_arithmetic(train_size=3)["train"]
    if is_stream:  # whose length is not known
        GXPOTrainer(tiny_model(), arithmetic_reward, args, rows.to_iterable_dataset())
        return
    said = r"have 3 prompt\(s\), and a generation batch takes 4 \(`generation_batch_size` 16 / .*Add data, or set a"
    with pytest.raises(ValueError, match=said):
        GXPOTrainer(tiny_model(), arithmetic_reward, args, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["gxpo", "check"])
def test_parameters_stored_in_low_precision_are_refused(tmp_path, rule, dtype):
    with pytest.raises(ValueError, match="allow_low_precision_parameters"):
        make_trainer(tmp_path, LookaheadTrainer, LookaheadConfig, model=tiny_model(dtype=dtype), update_rule=rule)


def test_parameters_stored_in_low_precision_are_taken_when_the_user_insists(tmp_path):
    trainer = make_trainer(
        tmp_path, model=tiny_model(dtype=torch.bfloat16), allow_low_precision_parameters=True, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["lookahead/active"] == 1.0


def refuse(match: str, model: torch.nn.Module | None = None, **accelerator) -> None:
    """Asserts that an accelerator like this one is refused with such a sentence."""
    plain = {"distributed_type": DistributedType.NO, "scaler": None, "mixed_precision": "no"}
    accelerator = SimpleNamespace(**{**plain, "parallelism_config": None, "is_fsdp2": False, **accelerator})
    with pytest.raises(ValueError, match=match):
        check_engine(accelerator, model or torch.nn.Linear(1, 1))


@pytest.mark.parametrize("engine", [DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_an_engine_of_other_storage_is_refused_with_what_to_use(engine):
    refuse(f"{engine.value}.*DDP, FSDP2 or DeepSpeed.*update_rule: grpo", distributed_type=engine)


def test_fsdp1_is_refused():
    refuse("fsdp_version: 2.*update_rule: grpo", distributed_type=DistributedType.FSDP)


@pytest.mark.parametrize("accelerator", [{"scaler": object()}, {"mixed_precision": "fp16"}])
def test_fp16_is_refused(accelerator):
    refuse("fp16.*bf16: true", **accelerator)


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_parallelism_within_a_sequence_or_a_matrix_is_refused(size):
    parallelism = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, size: 2})
    refuse(f"{size}.*update_rule: grpo", parallelism_config=parallelism)


def test_a_model_that_was_sharded_while_loading_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    try:
        refuse("tp_plan", model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "path, value",
    [
        ("zero_optimization.stage", 0),
        ("zero_optimization.stage", None),
        ("fp16.enabled", True),
        ("bf16.bf16_master_weights_and_grads", True),
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("zero_optimization.offload_param.device", "nvme"),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.mics_shard_size", 2),
        ("zero_optimization.zero_hpz_partition_size", 2),
        ("zero_optimization.zero_quantized_gradients", True),
        ("tensor_parallel.autotp_size", 2),
        ("managed_gradient_accumulation", False),
        ("optimizer.type", "OneBitAdam"),
    ],
)
def test_deepspeed_settings_that_move_parameters_elsewhere_are_refused_by_name(path, value):
    shown = re.escape(f"`{path}: {0 if value is None else value}`")
    refuse(f"{shown}.*update_rule: grpo", **deepspeed({path: value}))


def deepspeed(settings: dict) -> dict:
    config = {"zero_optimization": {"stage": 2}}
    for path, value in settings.items():
        node, *keys = config, *path.split(".")
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    plugin = SimpleNamespace(deepspeed_config=config)
    return {"distributed_type": DistributedType.DEEPSPEED, "state": SimpleNamespace(deepspeed_plugin=plugin)}


def test_a_launcher_that_says_otherwise_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = make_trainer(tmp_path, bf16=False)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert "`mixed_precision: bf16`, which the run computes in, and its own settings say no" in caplog.text
    assert describe_run(trainer)["mixed_precision"] == "bf16"
    caplog.clear()
    make_trainer(tmp_path, bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as in recipes/accelerate
    assert make_trainer(tmp_path, bf16=True).accelerator.mixed_precision == "bf16"
    make_trainer(tmp_path, bf16=False)
    assert "which the run computes in" not in caplog.text


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_the_launcher_names_and_the_run_has_not_is_warned_of(monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    for kind in (DistributedType.MULTI_CPU, DistributedType(engine)):
        accelerator = SimpleNamespace(mixed_precision="no", distributed_type=kind)
        said = list(launcher_surprises(accelerator, "no"))
        assert len(said) == (kind == DistributedType.MULTI_CPU)
        assert all(f"told to use {engine}, and the run has MULTI_CPU" in sentence for sentence in said)


def test_the_defaults_of_another_rule_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="`update_rule: sfpo` has GXPO's defaults for `lookahead_steps`"):
        LookaheadConfig(str(tmp_path), update_rule="sfpo", **ON_CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LookaheadConfig(str(tmp_path), update_rule="sfpo", lookahead_steps=3, **ON_CPU)
        SFPOConfig(str(tmp_path), **ON_CPU)
        SFPOConfig(str(tmp_path), **ON_CPU, lookahead_steps=5, reposition_alpha=0.5, gate_threshold=0.5)


def test_without_a_gpu_the_error_says_what_to_set(tmp_path):
    settings = {name: value for name, value in ON_CPU.items() if name not in ("use_cpu", "bf16")}
    with pytest.raises(ValueError, match="This machine has no GPU, and `bf16` is on.*Set `use_cpu: true`"):
        GXPOConfig(str(tmp_path), **settings)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_zero_is_taken(stage):
    settings = {"zero_optimization.stage": stage, "zero_optimization.offload_optimizer.device": "cpu"}
    settings["fp16.enabled"] = "auto"
    accelerator = {"scaler": None, "mixed_precision": "bf16", "parallelism_config": None, **deepspeed(settings)}
    check_engine(SimpleNamespace(**accelerator), torch.nn.Linear(1, 1))


def test_a_trainer_without_args_makes_its_own(tmp_path, monkeypatch):
    """As in TRL. (TRL's own defaults want a GPU, hence the partial.)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GXPOTrainer, "_config_class", functools.partial(GXPOConfig, **ON_CPU))
    trainer = GXPOTrainer(tiny_model(), arithmetic_reward, train_dataset=load_arithmetic(8, 2)["train"])
    assert isinstance(trainer.args, GXPOConfig)
    assert trainer.args.output_dir == "tiny-GXPO"
