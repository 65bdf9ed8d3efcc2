"""The sharding engines on a machine without an accelerator: FSDP2 and DeepSpeed over gloo, in the tests alone.

Accelerate takes a process without an accelerator for a plain one, and offers FSDP and DeepSpeed to accelerators only.
"""

import copy
import importlib.util
import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1_000_000,
}
SMALL_BUCKETS = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
GATHER_ON_SAVE = {"stage3_gather_16bit_weights_on_model_save": True}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def zero(stage: int, others: dict[str, Any] | None = None, **settings) -> dict[str, Any]:
    return {
        "deepspeed": {**ZERO, "zero_optimization": {"stage": stage, **SMALL_BUCKETS, **settings}, **(others or {})}
    }


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"use_cpu": True},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "zero1": zero(1),
    "zero2": zero(2),
    "zero2-offload": zero(2, **OFFLOAD),
    "zero3": zero(3, stage3_param_persistence_threshold=0, **GATHER_ON_SAVE),
    "zero3-persistent": zero(3, stage3_param_persistence_threshold=100_000, **GATHER_ON_SAVE),
    "zero3-offload": zero(3, stage3_param_persistence_threshold=500, **OFFLOAD, **GATHER_ON_SAVE),
}
"""Training arguments of each engine, in fp32."""

IN_BF16: dict[str, dict[str, Any]] = {
    "ddp-bf16": ENGINES["ddp"],
    "fsdp2-bf16": ENGINES["fsdp2"],
    "zero1-bf16": zero(1, BF16),  # DeepSpeed's BF16_Optimizer
    "zero2-bf16": zero(2, BF16),
    "zero2-offload-bf16": zero(2, BF16, **OFFLOAD),
    "zero3-bf16": zero(3, BF16, stage3_param_persistence_threshold=500, **GATHER_ON_SAVE),
}
"""The same in bf16, gradients accumulated in fp32."""

OTHERS: dict[str, dict[str, Any]] = {
    "zero2-all-bf16": zero(2, {"bf16": {"enabled": True}}),
}
"""What is neither recommended nor refused."""


def install() -> None:
    """To be called before anything of accelerate is made. With GPUs, what is there is taken as it is."""
    if torch.cuda.is_available():
        return
    initialise, prepare_backend = PartialState.__init__, PartialState._prepare_backend

    def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        backend, distributed_type = prepare_backend(self, cpu, sagemaker_dp, backend)
        if distributed_type == DistributedType.NO and "LOCAL_RANK" in os.environ:
            backend, distributed_type = "gloo", DistributedType.MULTI_CPU
        return backend, distributed_type

    def __init__(self, cpu=False, **kwargs):
        is_first = PartialState._shared_state == {}
        initialise(self, cpu, **kwargs)
        if is_first and self.device.type == "cpu":
            self.device = torch.device("cpu")  # not "cpu:0", which is another device to a mesh, and to torch 2.11 none
        if is_first and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState._prepare_backend = _prepare_backend
    PartialState.__init__ = __init__
    import transformers.training_args

    if importlib.util.find_spec("deepspeed") is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at the first launch
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def choose(engine: str) -> dict[str, Any]:
    """Forgets the engine of a run before, and returns the training arguments of this one."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in ("DEEPSPEED", "FSDP", "CPU"):
        os.environ.pop(f"ACCELERATE_USE_{name}", None)
    if engine.startswith("fsdp2"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    return copy.deepcopy((ENGINES | IN_BF16 | OTHERS)[engine]) | {"bf16": engine.endswith("bf16")}
