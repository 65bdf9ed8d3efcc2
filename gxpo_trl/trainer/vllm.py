"""The weights of a PEFT model that are sent to vLLM: base plus adapter, merged out of place. The base does not change.

TRL's `VLLMGeneration` merges the adapter into the base, sends the base and takes the adapter out again, in the base's
precision. In bf16 this changes the frozen weights: each round adds its rounding error.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from trl.generation.vllm_generation import VLLMGeneration


logger = get_logger(__name__)


def merge_out_of_place(generation: VLLMGeneration, report: Callable[[float], None] | None = None) -> None:
    """Makes `generation` send merged weights without changing the base.

    Layer by layer, PEFT merges into fp32 copies of the layer's parameters, and what is sent is rounded once, to the
    base's dtype. Sharded parameters (ZeRO-3, FSDP2) are gathered for one layer at a time. A quantized base, and FSDP1,
    are left to TRL, with a warning.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]): Of a trainer with a PEFT model.
        report (`Callable`, *optional*): As for [`MergedParameters`].

    Raises:
        `ValueError`: If the adapter can't be merged, or vLLM has no room for what it changes.
    """
    model = generation.model
    if not isinstance(model.base_model, BaseTuner):
        kind = model.active_peft_config.peft_type
        raise ValueError(
            f"vLLM needs the adapter merged into the model, and {kind.value} can't be. Use LoRA, or set `use_vllm: "
            "false`."
        )
    if reason := _why_not(generation):
        logger.warning(
            "Each time vLLM gets new weights TRL merges the adapter into the base and takes it out again, and the "
            f"frozen weights drift by what that rounds: {reason}."
        )
        return
    _check_tied_weights(model)
    merged = MergedParameters(generation, report)
    merged.check()
    generation._iter_named_params = merged


def _why_not(generation: VLLMGeneration) -> str | None:
    if generation._dist.fsdp_version == 1:
        return "FSDP1 does not show single parameters; use FSDP2"
    for name, p in generation.model.named_parameters():
        if not p.is_floating_point() or p.element_size() == 1:
            return f"`{name}` is quantized; a base in bf16 is left as it is"
    return None


class MergedParameters:
    """The parameters of a PEFT model, its active adapters merged in, by the names that vLLM knows.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]): Which sends them.
        report (`Callable`, *optional*): Called at the end of each iteration with the share of the adapter's move that
            vLLM's copy shows, ⟨R(W + Δ) - R(W), Δ⟩ / ⟨Δ, Δ⟩ over all merged matrices. W is the base, Δ what the
            adapter adds to it in fp32, and R rounds to W's dtype and to vLLM's. It is 1 if nothing is lost, and far
            from 1 if Δ is small next to the steps in which R rounds.
    """

    def __init__(self, generation: VLLMGeneration, report: Callable[[float], None] | None = None):
        self.generation = generation
        self.report = report

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every process must iterate, because each may hold a part. A tensor is valid until the next one is
        requested.
        """
        generation = self.generation
        base = generation.model.get_base_model()
        layers, copies = _outermost_tuner_layers(base), _modules_to_save(base)
        elsewhere = tuple(f"{name}." for name in layers)
        for name, p in base.named_parameters():
            if name.startswith(elsewhere) or not _is_in_use(name, copies):
                continue
            with generation._dist.gather_params([p]):
                yield self._name(name), self._whole(p)
        totals = torch.zeros(2, dtype=torch.float64)
        for name, layer in layers.items():
            with generation._dist.gather_params(list(layer.parameters())):
                for inner, (weight, merged) in self._merge(layer).items():
                    sent = merged.to(weight.dtype)
                    totals += self._compare(weight, merged, sent)
                    yield self._name(f"{name}.{inner}"), sent
        if self.report is not None and totals[1] > 0:
            self.report((totals[0] / totals[1]).item())

    def check(self) -> None:
        """Merges one layer of each kind, as a test.

        Raises:
            `ValueError`: If PEFT can't merge one.
        """
        layers = _outermost_tuner_layers(self.generation.model.get_base_model())
        kinds = {(type(layer), *map(str, getattr(layer, "lora_variant", ()))): name for name, layer in layers.items()}
        for name in kinds.values():
            try:
                with self.generation._dist.gather_params(list(layers[name].parameters())):
                    self._merge(layers[name])
            except (RuntimeError, ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"vLLM needs the adapter merged into the model, and PEFT can't merge `{name}`: {error} Use a "
                    "plain LoRA, or set `use_vllm: false`."
                ) from error

    @torch.no_grad()
    def _merge(self, layer: BaseTunerLayer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each parameter of the layer's base: as it is, and merged, in fp32 or what is finer."""
        whole = {f"layer.{name}": self._whole(p) for name, p in layer.named_parameters()}
        lent = {name: p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in whole.items()}
        merged = functional_call(_Merge(layer), lent, ())
        return {name: (self._whole(p), merged[name]) for name, p in layer.get_base_layer().named_parameters()}

    def _whole(self, p: torch.Tensor) -> torch.Tensor:
        """Of FSDP2's shards the whole; with other engines it is there."""
        if isinstance(p, DTensor):
            p = p.to(self.generation.accelerator.device).full_tensor()  # from host memory, if FSDP2 offloads there
        return p.detach()

    def _compare(self, weight: torch.Tensor, merged: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """The two products that the share is made of, for one matrix."""
        delta = merged - weight.to(merged.dtype)
        seen = self._received(sent).to(merged.dtype) - self._received(weight).to(merged.dtype)
        return torch.stack([(seen * delta).sum(), (delta * delta).sum()]).double().cpu()

    def _received(self, sent: torch.Tensor) -> torch.Tensor:
        """The parameter as vLLM stores it. A server does not report its dtype; it is assumed to store what it gets."""
        if self.generation.mode == "server":
            return sent
        return sent.to(self.generation.llm.llm_engine.model_config.dtype)

    def _name(self, name: str) -> str:
        adapters = self.generation.model.active_adapters
        prefixes = ["original_module.", "token_adapter.", *(f"modules_to_save.{adapter}." for adapter in adapters)]
        return self.generation._fix_param_name_to_vllm(name, extra_prefixes=prefixes)


class _Merge(torch.nn.Module):
    """Merging a layer as a forward pass, for which `functional_call` can lend it other parameters than its own."""

    def __init__(self, layer: BaseTunerLayer):
        super().__init__()
        self.layer = layer

    def forward(self) -> dict[str, torch.Tensor]:
        """The parameters of the layer's base, with all active adapters merged in."""
        for layer in self.layer.modules():  # layers for several parameters of one module are nested
            if isinstance(layer, BaseTunerLayer):
                already = list(layer.merged_adapters)
                try:
                    layer.merge()
                finally:
                    layer.merged_adapters[:] = already
        return dict(self.layer.get_base_layer().named_parameters())


def _outermost_tuner_layers(base: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    layers = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith(tuple(f"{outer}." for outer in layers)):
            layers[name] = module
    return layers


def _modules_to_save(base: torch.nn.Module) -> dict[str, ModulesToSaveWrapper]:
    return {name: module for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _is_in_use(name: str, copies: dict[str, ModulesToSaveWrapper]) -> bool:
    """Whether a parameter takes part in the forward pass: of a module that is trained whole one of its copies does."""
    for wrapped, module in copies.items():
        if name.startswith(f"{wrapped}."):
            adapters = [adapter for adapter in module.active_adapters if adapter in module.modules_to_save]
            used = f"modules_to_save.{adapters[0]}." if adapters else "original_module."
            return name.startswith(f"{wrapped}.{used}")
    return True


def _check_tied_weights(model: PeftModel) -> None:
    """Refuses an adapter that changes one use of a tied matrix and not the other: vLLM has one matrix for both."""
    base = model.get_base_model()
    changed = {**_outermost_tuner_layers(base), **_modules_to_save(base)}
    uses = defaultdict(dict)
    for name, p in base.named_parameters(remove_duplicate=False):
        uses[p][next((outer for outer in changed if name.startswith(f"{outer}.")), None)] = name
    for modules in uses.values():
        alike = all(isinstance(changed.get(module), TrainableTokensLayer) for module in modules)
        if len(modules) > 1 and not alike and not getattr(model.active_peft_config, "ensure_weight_tying", False):
            names = " and ".join(f"`{name}`" for name in modules.values())
            raise ValueError(
                f"vLLM has one matrix for {names}, which are tied, and the adapter does not change them alike. Take "
                "them out of `target_modules` and `modules_to_save`, or set `ensure_weight_tying=True` in the "
                "LoraConfig."
            )
