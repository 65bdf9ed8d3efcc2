"""The adapters of a model, whether it is a `PeftModel` or has PEFT's layers in it without one."""

from collections.abc import Iterator

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


def adapter_layers(model: torch.nn.Module) -> Iterator[BaseTunerLayer]:
    """The layers of a model that PEFT has replaced."""
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def saves_adapter(model: torch.nn.Module) -> bool:
    """Whether the adapter of a model, if it has one, is saved as one: by PEFT or by transformers, which added it."""
    knows_adapters = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    return knows_adapters or not any(adapter_layers(model))


def trained_adapters(model: torch.nn.Module) -> dict[str, PeftConfig]:
    """PEFT's settings of the active adapters that are trained, by name; if none is trained, of all active ones."""
    in_use, trained = _adapters_in_use(model), set()
    for layer in adapter_layers(model):
        for name, parameter in layer.named_parameters():
            trained.update(name.split(".") if parameter.requires_grad else ())
    configs = _adapter_configs(model)
    return {name: configs[name] for name in in_use if name in trained} or {name: configs[name] for name in in_use}


def _adapters_in_use(model: torch.nn.Module) -> list[str]:
    names = [name for layer in adapter_layers(model) for name in layer.active_adapters]
    if not names and isinstance(model, PeftModel):  # a learned prompt has no layers
        names = [model.active_adapter]
    return list(dict.fromkeys(names))


def _adapter_configs(model: torch.nn.Module) -> dict[str, PeftConfig]:
    """PEFT's settings by adapter name. They are kept by the module that PEFT was applied to, which may be a part of
    the model.
    """
    configs: dict[str, PeftConfig] = {}
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        configs = {**found, **configs} if isinstance(found, dict) else configs
    return configs
