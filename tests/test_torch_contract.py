"""What of torch we touch beyond the everyday, each with the promise that we rely on."""

import pytest
import torch
from contracts import Name, check
from packaging.version import Version
from torch.distributed.tensor import Replicate, Shard
from torch.nn.utils.rnn import pad_sequence

from gxpo_trl.engines import base


ALL_GATHER = "all_gather_single" if Version(torch.__version__) >= Version("2.13") else "all_gather_into_tensor"
"""Renamed in 2.13. The old name still works there, with a warning."""

DTENSOR, MESH = "torch.distributed.tensor.DTensor", "torch.distributed.device_mesh.DeviceMesh"
BASE, FSDP2, WHOLE, DEEPSPEED = (f"engines/{name}.py" for name in ("base", "fsdp2", "whole", "deepspeed"))
GENERATORS, GENERATION, BENCHMARKS = "rollout/generators.py", "sampling/grouped.py", "callbacks/benchmarks.py"
CHECKPOINTS = "trainer/checkpoints.py"

NAMES = [
    # ---- Sharded parameters
    Name("torch.distributed", ALL_GATHER, BASE, "gathers totals with it", "output_tensor, input_tensor, * group"),
    Name("torch.distributed", "get_world_size", DEEPSPEED, "knows by it whether a rank is alone", "group"),
    Name("torch.distributed", "get_rank", "engines/zero12.py", "knows by it which partition is this rank's", "group"),
    Name("torch.distributed.fsdp.FSDPModule", "reshard", FSDP2, "drops gathered parameters with it", ""),
    Name(
        *(DTENSOR, "from_local", FSDP2, "makes gradients of local shards with it"),
        "local_tensor, device_mesh, placements, * run_check, shape, stride",
    ),
    Name(DTENSOR, "full_tensor", "trainer/vllm.py", "puts whole parameters together with it", ""),
    Name(
        *("torch.func", "functional_call", "trainer/vllm.py", "lends PEFT copies of the parameters with it"),
        "module, parameter_and_buffer_dicts, args",
    ),
    Name(DTENSOR, "to_local", FSDP2, "works on the local shards", ""),
    Name(DTENSOR, "full_tensor", WHOLE, "puts whole parameters together with it", ""),
    Name(DTENSOR, "device_mesh", FSDP2, "makes gradients lie where parameters do by it"),
    Name(DTENSOR, "placements", FSDP2, "knows by them along which dimension of the mesh a parameter is sharded"),
    Name(MESH, "mesh", FSDP2, "finds the ranks along that dimension by it"),
    Name(MESH, "size", FSDP2, "knows by it how many shards there are", "mesh_dim"),
    # ---- Distributed checkpoints
    Name(
        *("torch.distributed.checkpoint", "FileSystemReader", CHECKPOINTS, "reads with it where each tensor is"),
        "path",
    ),
    Name("torch.distributed.checkpoint.FileSystemReader", "read_metadata", CHECKPOINTS, "reads with it where each is"),
    Name("torch.distributed.checkpoint.metadata.Metadata", "storage_data", CHECKPOINTS, "finds the places there"),
    *(
        Name("torch.distributed.checkpoint.filesystem._StorageInfo", name, CHECKPOINTS, "knows a file that is cut off")
        for name in ("relative_path", "offset", "length")
    ),
    # ---- Random numbers, and memory
    Name("torch.nn.modules.dropout", "_DropoutNd", "sampling/model_traits.py", "knows dropout of any kind by it"),
    Name("torch", "get_device_module", GENERATORS, "finds the random numbers of a device with it", "device"),
    *(
        Name("torch.cuda", name, GENERATORS, "has replays draw what pass 1 drew by it", takes)
        for name, takes in (("get_rng_state", "device"), ("set_rng_state", "new_state, device"))
    ),
    Name("torch.random", "fork_rng", BENCHMARKS, "leaves training's random numbers alone by it", "devices"),
    Name("torch.accelerator", "is_available", "scripts/", "knows by it that a CPU has to do", ""),
    Name("torch.cuda", "max_memory_allocated", "trainer/step_log.py", "logs it"),
    # ---- Batches
    Name(
        *("torch.nn.utils.rnn", "pad_sequence", GENERATION, "pads prompts with it"),
        "sequences, * batch_first, padding_value, padding_side",
    ),
]


@pytest.mark.parametrize("touched", NAMES, ids=str)
def test_the_names_that_we_touch_are_there(touched):
    check(touched)


def test_totals_are_gathered_by_the_name_that_torch_does_not_warn_of():
    assert base._all_gather is getattr(torch.distributed, ALL_GATHER), (
        f"engines/base.py does not gather totals with torch's {ALL_GATHER}, which is the name in {torch.__version__}."
    )


def test_the_module_of_a_device_is_found_by_its_type():
    found = torch.get_device_module(torch.device("cuda", 0))
    assert found is torch.cuda and torch.get_device_module("cuda") is torch.cuda, (
        "torch's `get_device_module` does not return `torch.cuda` for a device of CUDA's any more: "
        "rollout/generators.py asks it for the state of random numbers."
    )


def test_a_sharded_dimension_is_found_among_the_placements_by_equality():
    placements = (Replicate(), Shard(0))
    assert placements.index(Shard(0)) == 1 and Shard(0) != Shard(1), (
        "torch's Shard(0) is not equal to another Shard(0) any more: engines/fsdp2.py finds the dimension of the mesh "
        "by it."
    )


def test_sequences_are_padded_on_the_left():
    padded = pad_sequence([torch.tensor([1]), torch.tensor([2, 3])], True, 9, padding_side="left")
    assert padded.tolist() == [[9, 1], [2, 3]], (
        "torch's `pad_sequence` does not pad on the left any more where it is told to: sampling/grouped.py lays "
        "prompts out so."
    )


def test_random_numbers_are_forked_for_the_cpu_and_the_devices_that_are_named():
    before = torch.get_rng_state()
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before), (
        "torch's `fork_rng` does not restore the CPU's random numbers any more where no device is named: "
        "callbacks/benchmarks.py and trajectory/checkpoints.py rely on it."
    )
