"""The internals of DeepSpeed that the ZeRO engines touch, each with the promise that they rely on.

Nothing is launched here: names are looked for in the sources, and methods are called on stand-ins.
"""

import ast
import inspect
import pkgutil
import textwrap
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from contracts import Name, check

from gxpo_trl.engines import ZERO_STATES
from gxpo_trl.engines.support import DEEPSPEED_SETTINGS


pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed, an extra, is not installed")

ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
PARTITIONED = "deepspeed.runtime.zero.partition_parameters.Init"
"""What gives the parameters of ZeRO-3 their attributes."""

OF_THE_ENGINE, PASSES = "engines/deepspeed.py", "engines/passes.py"
OF_ZERO_12, OF_ZERO_3, OF_BF16 = (f"engines/{name}.py" for name in ("zero12", "zero3", "bf16_optimizer"))

NAMES = [
    # ---- The engine, which wraps the model
    Name(ENGINE, "optimizer", OF_THE_ENGINE, "takes the ZeRO optimizer from there"),
    Name(ENGINE, "gradient_clipping", OF_THE_ENGINE, "clips by what it returns", ""),
    Name(ENGINE, "get_data_types", OF_THE_ENGINE, "asks it what gradients are accumulated in", ""),
    Name(
        *(ENGINE, "set_gradient_accumulation_boundary", PASSES),
        *("tells it whether gradients are reduced with a micro-batch", "*, is_boundary"),
    ),
    Name(ENGINE, "backward", PASSES, "goes backward with a loss divided already", "loss, *, scale_wrt_gas"),
    Name(ENGINE, "step", PASSES, "leaves the last step of an update to it", ""),
    Name(ENGINE, "_global_grad_norm", PASSES, "writes the norm there after a step of its own"),
    Name(ENGINE, "micro_steps", PASSES, "counts a step of its own there"),
    Name(ENGINE, "global_steps", PASSES, "counts a step of its own there"),
    Name(ENGINE, "global_samples", PASSES, "counts the samples of a step of its own there"),
    Name(ENGINE, "train_batch_size", PASSES, "counts so many samples in a step of its own", ""),
    Name(ENGINE, "lr_scheduler", PASSES, "moves the schedule on after a step of its own"),
    Name(ENGINE, "destroy", "tests/engine_worker.py", "ends an engine with it", ""),
    # ---- What all ZeRO optimizers have
    *(
        Name(owner, name, OF_THE_ENGINE, use)
        for owner in (ZERO_12, ZERO_3, BF16)
        for name, use in (
            ("optimizer", "steps the base optimizer below the partitions"),
            ("dp_process_group", "adds up over the ranks that hold other shards"),
        )
    ),
    # ---- ZeRO-1 and 2
    Name(ZERO_12, "single_partition_of_fp32_groups", OF_ZERO_12, "steps these partitions"),
    Name(ZERO_12, "bit16_groups", OF_ZERO_12, "counts the coordinates of the parameters there"),
    Name(ZERO_12, "partition_size", OF_ZERO_12, "takes it for the length of a partition"),
    Name(ZERO_12, "real_dp_process_group", OF_ZERO_12, "knows from it which partition is this rank's"),
    Name(ZERO_12, "params_in_partition", OF_ZERO_12, "finds the parameters of a partition there"),
    Name(ZERO_12, "grad_start_offset", OF_ZERO_12, "reads there where a parameter is cut"),
    Name(ZERO_12, "grad_partition_insertion_offset", OF_ZERO_12, "reads there where a parameter begins"),
    Name(ZERO_12, "get_param_id", OF_ZERO_12, "looks offsets up by it", "param"),
    Name(ZERO_12, "update_lp_params", OF_THE_ENGINE, "publishes written partitions with it", ""),
    Name(ZERO_12, "cpu_offload", OF_ZERO_12, "asks it where gradients are"),
    Name(ZERO_12, "_wait_for_offload_copies", OF_ZERO_12, "waits for offloaded gradients with it", ""),
    Name(ZERO_12, "_get_preflattened_grad_partition", OF_ZERO_12, "asks it for a flat gradient", "group_idx"),
    Name(ZERO_12, "averaged_gradients", OF_ZERO_12, "reads the reduced gradient there"),
    Name(ZERO_12, "all_grad_tensors", OF_ZERO_12, "clears what was accumulated there"),
    Name(ZERO_12, "zero_grad", OF_ZERO_12, "clears the gradients of the parameters with it", ""),
    Name(ZERO_12, "_release_preflattened_grad_buffers", OF_ZERO_12, "frees flat gradients with it", ""),
    Name(ZERO_12, "micro_step_id", OF_ZERO_12, "sets it so that the next micro-batch is the first of its pass"),
    Name(ZERO_12, "_offload_accumulated_param_ids", OF_ZERO_12, "forgets there what was accumulated in host memory"),
    Name(ZERO_12, "reset_cpu_buffers", OF_ZERO_12, "forgets offloaded gradients with it", ""),
    Name(ZERO_12, "_optimizer_step", OF_ZERO_12, "steps a partition with it", "group_no"),
    Name(ZERO_12, "_hp_optimizer_states_linked", OF_THE_ENGINE, "has state linked anew that a rollback dropped"),
    # ---- ZeRO-1 in bf16
    Name(BF16, "fp32_groups_flat_partition", OF_BF16, "steps these partitions"),
    Name(BF16, "bf16_groups", OF_BF16, "counts the coordinates of the parameters there"),
    Name(BF16, "group_paddings", OF_BF16, "leaves the padding at the end of a partition out"),
    Name(BF16, "fp32_groups_gradient_flat_partition", OF_BF16, "reads the reduced gradient there"),
    Name(BF16, "fp32_groups_gradients_flat", OF_BF16, "measures the norm of the whole gradient there"),
    Name(BF16, "zero_grad", OF_BF16, "clears gradients with it", ""),
    Name(BF16, "_lazy_init_hp_params_optimizer_state", OF_BF16, "links the optimizer's state with it", ""),
    Name(BF16, "update_lp_params", OF_THE_ENGINE, "publishes written partitions with it", ""),
    # ---- ZeRO-3
    Name(ZERO_3, "fp32_partitioned_groups_flat", OF_ZERO_3, "steps these partitions"),
    Name(ZERO_3, "fp16_groups", OF_ZERO_3, "finds the parameters of a sub-group there"),
    Name(ZERO_3, "_partition_all_parameters", OF_ZERO_3, "drops gathered parameters with it", ""),
    Name(
        *(ZERO_3, "_reassign_or_swap_out_partitioned_parameters", OF_ZERO_3),
        *("publishes a written sub-group with it", "sub_group_id"),
    ),
    Name(ZERO_3, "persistent_parameters", OF_ZERO_3, "gathers these anew"),
    Name(ZERO_3, "invalidate_secondary_tensor", OF_ZERO_3, "drops second copies of parameters with it", ""),
    Name(ZERO_3, "offload_optimizer", OF_ZERO_3, "asks it where gradients are"),
    Name(ZERO_3, "averaged_gradients", OF_ZERO_3, "reads the reduced gradient there"),
    Name(ZERO_3, "_pre_step", OF_ZERO_3, "has the next pass begin with it", ""),
    Name(ZERO_3, "zero_grad", OF_ZERO_3, "clears the gradients of the parameters with it", ""),
    Name(ZERO_3, "reset_cpu_buffers", OF_ZERO_3, "forgets offloaded gradients with it", ""),
    Name(ZERO_3, "_optimizer_step", OF_ZERO_3, "steps a sub-group with it", "sub_group_id"),
    Name(PARTITIONED, "ds_numel", OF_ZERO_3, "counts the coordinates of a parameter by it"),
    Name(PARTITIONED, "partition_numel", OF_ZERO_3, "knows from it how long this rank's part is"),
    Name(PARTITIONED, "ds_process_group", OF_ZERO_3, "knows from it which part is this rank's"),
    Name(PARTITIONED, "all_gather", OF_ZERO_3, "gathers persistent parameters with it"),
    Name(PARTITIONED, "ds_id", "tests/engine_worker.py", "knows a partitioned parameter by it"),
    # ---- The rest
    Name("deepspeed.utils", "safe_get_full_fp32_param", "engines/whole.py", "reads whole parameters", "param"),
    Name("deepspeed.runtime.zero", "GatheredParameters", "tests/engine_worker.py", "reads whole parameters"),
    Name("deepspeed.ops", "__compatible_ops__", "tests/cpu_engines.py", "keeps an operation from being compiled"),
]


@pytest.mark.parametrize("touched", NAMES, ids=str)
def test_the_names_that_the_engines_touch_are_there(touched):
    check(touched)


def test_the_engine_is_chosen_by_these_class_names():
    classes = {path.rpartition(".")[2] for path in (ZERO_12, ZERO_3, BF16)}
    assert classes == set(ZERO_STATES), (
        "engines/__init__.py chooses an engine by the name of DeepSpeed's optimizer, and the contract knows "
        f"{', '.join(sorted(classes ^ set(ZERO_STATES)))} in one of the two places alone."
    )


def lines_of(owner: str, method: str) -> set[str]:
    """The statements of a method, one text each."""
    function = getattr(pkgutil.resolve_name(owner), method)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)}


@pytest.mark.parametrize(
    "method, statement",
    [
        ("step", "self.micro_steps += 1"),
        ("_take_model_step", "self.global_steps += 1"),
        ("_take_model_step", "self.global_samples += self.train_batch_size()"),
        ("_take_model_step", "self.lr_scheduler.step(**lr_kwargs or {})"),
        ("_take_model_step", "self._global_grad_norm = self.optimizer._global_grad_norm"),
    ],
)
def test_a_step_of_the_engine_counts_as_ours_does(method, statement):
    assert statement in lines_of(ENGINE, method), (
        f"DeepSpeedEngine.{method} of DeepSpeed has no `{statement}` any more: the step that "
        "engines/passes.py takes after a fall-back, in `finish`, has to count as DeepSpeed's own does."
    )


def test_the_first_micro_batch_of_a_pass_follows_minus_one():
    stage = pkgutil.resolve_name("deepspeed.runtime.zero.stage_1_and_2")
    assert stage.INITIAL_MICRO_STEP_ID == -1, (
        "DeepSpeed's INITIAL_MICRO_STEP_ID is no longer -1, to which engines/zero12.py sets `micro_step_id` so "
        "that the next micro-batch is the first of its pass."
    )


def test_gradients_are_accumulated_in_the_second_of_the_data_types():
    types = pkgutil.resolve_name(ENGINE).get_data_types(
        SimpleNamespace(
            fp16_enabled=lambda: False,
            bfloat16_enabled=lambda: True,
            _config=SimpleNamespace(grad_accum_dtype="fp32"),
        )
    )
    assert types == (torch.bfloat16, torch.float32), (
        "DeepSpeedEngine.get_data_types of DeepSpeed does not return the precision of accumulation in second place "
        "any more: engines/deepspeed.py warns by it."
    )


class CountingOptimizer(torch.optim.SGD):
    """Writes down what each of its steps steps."""

    def __init__(self, parameters):
        super().__init__([{"params": [p]} for p in parameters], lr=0.1)
        self.stepped = []

    def step(self, closure=None):
        self.stepped.append([p for group in self.param_groups for p in group["params"]])


@pytest.mark.parametrize("owner", [ZERO_12, ZERO_3])
def test_one_partition_is_stepped_and_the_param_groups_are_left_as_they_were(owner):
    first, second = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = CountingOptimizer([first, second])
    zero = SimpleNamespace(
        optimizer=optimizer,
        torch_autocast_gradscaler=None,
        zenflow=False,
        offload_optimizer=False,
        sub_group_to_group_id={0: 0, 1: 1},
        fp32_partitioned_groups_flat=[first, second],
        _lazy_init_hp_params_optimizer_state=lambda: None,
    )
    if owner == ZERO_3:  # between steps its groups are empty
        for group in optimizer.param_groups:
            group["params"] = []
    groups = list(optimizer.param_groups)
    pkgutil.resolve_name(owner)._optimizer_step(zero, 1)
    stepped = [id(p) for p in optimizer.stepped[0]]
    assert stepped == [id(second)] and optimizer.param_groups == groups, (
        f"`_optimizer_step` of DeepSpeed's {owner.rpartition('.')[2]} does not step one partition alone any more: "
        "`step_partition` in engines/zero12.py and zero3.py relies on it."
    )


def clipped_by_stage_1_and_2(gradient: torch.Tensor, norm: torch.Tensor) -> None:
    zero = SimpleNamespace(clip_grad=0.5, loss_scale=1.0, device="cpu")
    pkgutil.resolve_name(ZERO_12).unscale_and_clip_grads(zero, [gradient], norm)


def clipped_by_stage_3(gradient: torch.Tensor, norm: torch.Tensor) -> None:
    partition = torch.zeros_like(gradient)
    partition.grad = gradient
    zero = SimpleNamespace(clip_grad=0.5, loss_scale=1.0, fp32_partitioned_groups_flat=[partition])
    pkgutil.resolve_name(ZERO_3).unscale_and_clip_grads(zero, 0, norm)


def clipped_by_bf16_optimizer(gradient: torch.Tensor, norm: torch.Tensor) -> None:
    clip = pkgutil.resolve_name("deepspeed.runtime.bf16_optimizer.clip_tensors_by_global_norm")
    clip([gradient], max_norm=0.5, global_norm=norm)


@pytest.mark.parametrize("clip", [clipped_by_stage_1_and_2, clipped_by_stage_3, clipped_by_bf16_optimizer])
@pytest.mark.parametrize("norm", [0.4, 5.0])
def test_gradients_are_clipped_by_the_factor_that_we_use(clip, norm):
    gradient = torch.tensor([norm])
    clip(gradient, torch.tensor(norm))
    factor = min(1.0, 0.5 / (norm + 1e-6))
    assert gradient.item() == pytest.approx(norm * factor, rel=1e-6), (
        "DeepSpeed does not multiply gradients with min(1, max / (norm + 1e-6)) any more: `clip_gradients` in "
        "engines/deepspeed.py clips the gradients of probes so."
    )


CONFIGURATIONS = {
    "fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "zero_optimization.offload_optimizer": "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.offload_param": "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
    "tensor_parallel": "deepspeed.runtime.tensor_parallel.config.TPTrainingConfig",
}
"""The class that reads each part of a configuration."""
READ_BY_HAND = {"sequence_parallel_size", "managed_gradient_accumulation", "optimizer.type"}
REFUSED_BY_DEEPSPEED = {"zero_optimization.mics_shard_size"}
"""What is refused whatever we do, since DeepSpeed has removed it."""


@pytest.mark.parametrize("setting", sorted(set(DEEPSPEED_SETTINGS) - READ_BY_HAND - REFUSED_BY_DEEPSPEED))
def test_the_settings_that_are_refused_go_by_these_names(setting):
    """A setting that goes by another name would be let through without a word."""
    part, _, name = setting.rpartition(".")
    fields = pkgutil.resolve_name(CONFIGURATIONS[part]).model_fields
    known = {*fields, *(field.alias for field in fields.values())}
    assert name in known, (
        f"DeepSpeed's configuration has no `{setting}` any more: DEEPSPEED_SETTINGS in engines/support.py looks "
        "there for what it has to refuse."
    )


@pytest.mark.parametrize("setting", sorted(READ_BY_HAND | REFUSED_BY_DEEPSPEED))
def test_the_settings_without_a_class_are_named_in_the_sources(setting):
    modules = [pkgutil.resolve_name(f"deepspeed.runtime.{name}") for name in ("config", "constants")]
    texts = " ".join(inspect.getsource(module) for module in modules)
    assert all(f'"{part}"' in texts for part in setting.removeprefix("zero_optimization.").split(".")), (
        f"DeepSpeed does not read `{setting}` any more: DEEPSPEED_SETTINGS in engines/support.py looks there "
        "for what it has to refuse."
    )
