"""The random generators that a model draws from, and their state."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Generators:
    """Every generator that forward and backward passes may draw from: torch's, Python's and numpy's.

    Attributes:
        devices (`tuple[torch.device, ...]`): The accelerator devices with their own generators.
        held (`tuple[torch.Generator, ...]`): Generators that are attributes of the model's modules.
    """

    devices: tuple[torch.device, ...]
    held: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, model: torch.nn.Module, device: torch.device) -> "Generators":
        """The generators of a model that computes on a device. Offloaded parameters may be elsewhere."""
        devices = dict.fromkeys([device, *(parameter.device for parameter in model.parameters())])
        held = (value for module in model.modules() for value in vars(module).values())
        return cls(
            devices=tuple(device for device in devices if device.type not in ("cpu", "meta")),
            held=tuple(dict.fromkeys(value for value in held if isinstance(value, torch.Generator))),
        )

    def state(self) -> list[Any]:
        """Their current state."""
        name, keys, *rest = np.random.get_state()
        return [
            random.getstate(),
            (name, tuple(keys.tolist()), *rest),
            torch.get_rng_state(),
            *(torch.get_device_module(device).get_rng_state(device) for device in self.devices),
            *(generator.get_state() for generator in self.held),
        ]

    def restore(self, state: list[Any]) -> None:
        """Sets their state."""
        of_python, of_numpy, of_cpu, *others = state
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_cpu)
        for generator, saved in zip((*self.devices, *self.held), others, strict=True):
            if isinstance(generator, torch.device):
                torch.get_device_module(generator).set_rng_state(saved, generator)
            else:
                generator.set_state(saved)

    def have_drawn(self, since: list[Any]) -> bool:
        """Whether the state has changed."""
        pairs = zip(since, self.state(), strict=True)
        return not all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1] for pair in pairs)
