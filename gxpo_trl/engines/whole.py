"""Trainable parameters put together again, for those who want to look at them."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


def whole_parameters(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The trainable parameters in turn, each whole and in the precision that is stepped, under its name in the model.

    Every rank has to ask for all of them, since each may hold a part.

    Args:
        accelerator (`accelerate.Accelerator`): Of the trainer.
        model (`torch.nn.Module`): The model as the training loop sees it, wrapped.
    """
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            yield name, parameter.detach().full_tensor()
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import safe_get_full_fp32_param  # an optional dependency

            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, parameter.detach()
