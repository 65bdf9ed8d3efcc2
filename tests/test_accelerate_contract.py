"""The internals of accelerate that engines and trainer touch, each with the promise that they rely on."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, fsdp_utils
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from contracts import Name, check, parameter_names

from gxpo_trl.engines.passes import BackwardOnly
from gxpo_trl.engines.support import REPLICATED


ACCELERATOR = "accelerate.Accelerator"
STATE = "accelerate.state.AcceleratorState"
PROCESS = "accelerate.state.PartialState"
BASE, CHOICE, PASSES, WHOLE = (f"engines/{name}.py" for name in ("base", "support", "passes", "whole"))
BENCHMARKS, LAYOUT, SHIM = "callbacks/benchmarks.py", "trainer/layout.py", "tests/cpu_engines.py"

NAMES = [
    Name(ACCELERATOR, "backward", PASSES, "goes backward with it", "loss"),
    Name(ACCELERATOR, "no_sync", PASSES, "keeps ranks from reducing gradients before the last micro-batch", "model"),
    Name(ACCELERATOR, "gradient_state", PASSES, "sets there whether gradients synchronise"),
    Name("accelerate.state.GradientState", "_set_sync_gradients", PASSES, "says so with it", "sync_gradients"),
    Name(ACCELERATOR, "device", BASE, "adds totals up there"),
    Name(ACCELERATOR, "sync_gradients", "trainer/update.py", "knows by it that pass 1 is over"),
    Name(
        *(ACCELERATOR, "clip_grad_norm_", "engines/replicated.py", "clips as the trainer does"),
        "parameters, max_norm",
    ),
    Name(ACCELERATOR, "wait_for_everyone", "trainer/trainer.py", "has all processes save before older ones go", ""),
    Name(
        "accelerate.utils", "broadcast_object_list", "scripts/", "tells all processes what one decides", "object_list"
    ),
    Name(ACCELERATOR, "free_memory", "scripts/", "leaves the devices to the next trainer with it", ""),
    Name(ACCELERATOR, "end_training", "scripts/", "ends trackers and processes with it", ""),
    Name(ACCELERATOR, "deepspeed_engine_wrapped", PASSES, "puts `BackwardOnly` in its place"),
    Name(ACCELERATOR, "unwrap_model", WHOLE, "names whole parameters as the model below does", "model"),
    Name(ACCELERATOR, "distributed_type", CHOICE, "chooses the engine by it"),
    Name(ACCELERATOR, "mixed_precision", CHOICE, "refuses fp16 by it"),
    Name(ACCELERATOR, "scaler", CHOICE, "refuses a loss scaler by it"),
    Name(ACCELERATOR, "parallelism_config", CHOICE, "refuses tensor parallelism by it"),
    Name(ACCELERATOR, "is_fsdp2", CHOICE, "tells FSDP2 from FSDP1 by it"),
    Name(ACCELERATOR, "state", CHOICE, "finds the plugins there"),
    Name(STATE, "deepspeed_plugin", CHOICE, "reads DeepSpeed's configuration there"),
    Name(STATE, "fsdp_plugin", "engines/__init__.py", "sets the precision of reductions there"),
    Name("accelerate.DeepSpeedPlugin", "deepspeed_config", CHOICE, "reads DeepSpeed's configuration there"),
    Name(
        "accelerate.optimizer.AcceleratedOptimizer", "optimizer", BASE, "finds the optimizer below the wrapper there"
    ),
    Name(ACCELERATOR, "num_processes", LAYOUT, "counts ranks by it"),
    Name(ACCELERATOR, "process_index", BENCHMARKS, "deals problems out by it"),
    Name(ACCELERATOR, "gather", LAYOUT, "agrees with the other ranks on widths", "tensor"),
    Name(ACCELERATOR, "reduce", LAYOUT, "adds tokens up over ranks", "tensor"),
    Name(ACCELERATOR, "print", "trainer/trainer.py", "says what a batch is"),
    Name(ACCELERATOR, "is_main_process", "scripts/", "removes the rehearsal's folder once"),
    Name(ACCELERATOR, "wait_for_everyone", "scripts/", "removes that folder when all are done", ""),
    Name("accelerate.utils", "gather_object", BENCHMARKS, "gathers the samples of all ranks", "object"),
    Name(
        *("accelerate.utils", "get_int_from_env", "trainer/config.py"),
        *("knows the number of processes before there is a trainer", "env_keys, default"),
    ),
    Name("accelerate.logging", "get_logger", "callbacks/hub.py", "warns once, not on every rank", "name"),
    Name(PROCESS, "_prepare_backend", SHIM, "stands in for it", "cpu, sagemaker_dp, backend"),
    Name(PROCESS, "_shared_state", SHIM, "knows by it whether a state is the first"),
    Name(PROCESS, "distributed_type", SHIM, "has FSDP2 run without an accelerator by it"),
    Name(STATE, "_reset_state", SHIM, "forgets the engine of the run before", "reset_partial_state"),
    Name("accelerate.state.GradientState", "_reset_state", SHIM, "forgets the engine of the run before", ""),
]


@pytest.mark.parametrize("touched", NAMES, ids=str)
def test_the_names_that_we_touch_are_there(touched):
    check(touched)


@pytest.fixture
def prepared():
    """An accelerator with the optimizer of one parameter, as the trainer has them."""
    accelerator = Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = accelerator.prepare(torch.optim.SGD([parameter], lr=1.0))
    yield accelerator, parameter, optimizer
    accelerator.gradient_state._set_sync_gradients(True)


def test_gradients_synchronise_by_hand_and_a_step_acts_only_then(prepared):
    accelerator, parameter, optimizer = prepared
    parameter.grad = torch.ones(2)
    accelerator.gradient_state._set_sync_gradients(False)
    optimizer.step()
    held_back = not accelerator.sync_gradients and not parameter.any()
    accelerator.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert held_back and accelerator.sync_gradients and parameter.tolist() == [-1.0, -1.0], (
        "accelerate's optimizer does not act by `_set_sync_gradients` alone any more: `micro_batch` in "
        "engines/passes.py sets it by hand."
    )


def test_a_prepared_optimizer_is_a_wrapper_that_shares_groups_and_state(prepared):
    _, parameter, optimizer = prepared
    assert (
        isinstance(optimizer, AcceleratedOptimizer) and optimizer.param_groups is optimizer.optimizer.param_groups
    ), (
        "accelerate's AcceleratedOptimizer does not show the param groups of the optimizer below it any more: "
        "engines/base.py and replicated.py read and restore them through it."
    )


def test_a_norm_is_returned_from_before_clipping(prepared):
    accelerator, parameter, _ = prepared
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = accelerator.clip_grad_norm_([parameter], 1.0)
    factor = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
    assert norm == 5.0 and torch.equal(parameter.grad, torch.tensor([3.0, 4.0]) * factor), (
        "accelerate's `clip_grad_norm_` does not multiply gradients with min(1, max / (norm + 1e-6)) any more: "
        "`clip_gradients` in engines/replicated.py and fsdp2.py takes that for the factor."
    )


def test_the_kinds_of_process_groups_have_their_names():
    named = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")
    assert [kind.name for kind in REPLICATED] == list(named), (
        "accelerate's DistributedType calls the kinds of plain data parallelism otherwise now: REPLICATED in "
        "engines/support.py lists them."
    )


def test_every_kind_of_process_group_is_accepted_or_refused_knowingly():
    known = {*REPLICATED, DistributedType.FSDP, DistributedType.DEEPSPEED}
    refused = {"MULTI_SDAA", "MULTI_MUSA", "MULTI_NEURON", "XLA", "MEGATRON_LM", "TP"}
    new = {kind.name for kind in DistributedType if kind not in known} - refused
    assert not new, (
        f"accelerate's DistributedType has {', '.join(sorted(new))} now: engines/support.py refuses it; if it "
        "is plain data parallelism it belongs to REPLICATED, else to `refused` here."
    )


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_the_sizes_of_parallelism_are_one_unless_set(size):
    assert getattr(ParallelismConfig(), size, None) == 1, (
        f"accelerate's ParallelismConfig has no `{size}` of 1 by default any more: engines/support.py refuses a "
        "run by it."
    )


# ---- FSDP2


def test_the_precision_of_reductions_can_be_set_in_the_plugin_before_the_model_is_wrapped():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    policy = plugin.mixed_precision_policy
    assert policy.reduce_dtype == torch.bfloat16 and "reduce_dtype" in policy.__dataclass_fields__, (
        "accelerate's FullyShardedDataParallelPlugin has no `mixed_precision_policy` with a `reduce_dtype` any more: "
        "`reduce_in_fp32` in engines/__init__.py replaces it."
    )
    assert "fsdp2_plugin.mixed_precision_policy" in inspect.getsource(fsdp_utils.fsdp2_prepare_model), (
        "accelerate's `fsdp2_prepare_model` does not read `mixed_precision_policy` from the plugin any more: "
        "`reduce_in_fp32` in engines/__init__.py sets it there."
    )


def test_fsdp2_keeps_parameters_in_fp32_under_the_condition_that_we_repeat():
    source = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    condition = 'accelerator.mixed_precision != "no" and not model_has_params4bit'
    assert condition in source and "Params4bit" in source, (
        "accelerate's `fsdp2_prepare_model` upcasts parameters under another condition now: `keeps_fp32_parameters` "
        "in engines/support.py repeats the old one."
    )


# ---- DeepSpeed


class SpyingEngine:
    """Writes down what is asked of it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.items()))


@pytest.mark.parametrize("last", [False, True])
def test_the_backward_pass_of_deepspeeds_wrapper_differs_from_ours_by_the_step_alone(last):
    theirs, ours = SpyingEngine(), SpyingEngine()
    DeepSpeedEngineWrapper(theirs).backward(1.0, sync_gradients=last, scale_wrt_gas=False)
    BackwardOnly(ours).backward(1.0, sync_gradients=last, scale_wrt_gas=False)
    assert theirs.calls == ours.calls + ([("step",)] if last else []), (
        "accelerate's DeepSpeedEngineWrapper does more in `backward`, or less, than to go backward and step: "
        "`BackwardOnly` in engines/passes.py has to do the same without the step."
    )
    assert parameter_names(DeepSpeedEngineWrapper.backward) == parameter_names(BackwardOnly.backward), (
        "accelerate's DeepSpeedEngineWrapper.backward takes other arguments now: `BackwardOnly` in "
        "engines/passes.py stands in for it."
    )


def test_the_accelerator_goes_backward_through_the_wrapper_and_passes_arguments_on():
    engine = SpyingEngine()
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_engine_wrapped=BackwardOnly(engine),
        sync_gradients=True,
        gradient_accumulation_steps=4,
    )
    Accelerator.backward(accelerator, 8.0, scale_wrt_gas=False)
    expected = [("set_gradient_accumulation_boundary", ("is_boundary", True))]
    assert engine.calls == [*expected, ("backward", 8.0, ("scale_wrt_gas", False))], (
        "accelerate's `backward` does not hand the loss undivided to `deepspeed_engine_wrapped` any more: "
        "engines/passes.py puts `BackwardOnly` there."
    )


def test_a_loss_is_taken_as_it_is_by_an_accelerator_that_accumulates_nothing():
    """As the trainer's: transformers counts micro-batches by itself."""
    loss = torch.ones(1, requires_grad=True)
    Accelerator(cpu=True).backward(loss)
    assert loss.grad == 1.0, (
        "accelerate's `backward` scales a loss although it accumulates over one micro-batch: `backward` in "
        "engines/passes.py hands it losses divided already."
    )


def test_deepspeeds_optimizer_wrapper_does_not_step():
    counting = SpyingEngine()
    counting.param_groups = []
    wrapper = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    wrapper.optimizer = counting
    wrapper.step()
    wrapper.zero_grad()
    assert isinstance(wrapper, AcceleratedOptimizer) and not counting.calls, (
        "accelerate's DeepSpeedOptimizerWrapper steps now: `finish` in engines/passes.py would step twice."
    )
