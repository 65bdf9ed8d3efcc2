"""Where a training engine keeps parameters, gradients and optimizer state: one class per storage.

Everything above works on lists of local shards (`Engine`); `make_engine` picks the class.
"""

from .base import Engine, OptimizerSnapshot
from .bf16_optimizer import BF16OptimizerEngine
from .choice import check_decoupled_decay, check_engine, keeps_fp32_parameters, make_engine, reduce_in_fp32
from .fsdp2 import FSDP2Engine
from .replicated import TorchEngine
from .whole import whole_parameters
from .zero3 import Zero3Engine
from .zero12 import Zero12Engine


__all__ = [
    "BF16OptimizerEngine",
    "Engine",
    "FSDP2Engine",
    "OptimizerSnapshot",
    "TorchEngine",
    "Zero12Engine",
    "Zero3Engine",
    "check_decoupled_decay",
    "check_engine",
    "keeps_fp32_parameters",
    "make_engine",
    "reduce_in_fp32",
    "whole_parameters",
]
