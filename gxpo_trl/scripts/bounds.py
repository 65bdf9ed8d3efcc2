"""Bounds of TRL's numbers, and choices of its texts. TRL checks them not at all, or only during a run."""

import math
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, ModelConfig

from ..spelling import nearest


@dataclass(frozen=True)
class Bounds:
    """The range of a number. It may be infinite if it has no upper bound and `infinite` is set.

    Attributes:
        least, most (`float`): The ends.
        above, below (`bool`): Whether the ends are excluded.
        infinite (`bool`): Whether infinity is allowed.
    """

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False

    def hold(self, number: float) -> bool:
        if math.isinf(number):
            return self.infinite and number > 0
        is_above = number > self.least if self.above else number >= self.least
        return is_above and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'of at least'} {self.least}"
        if self.most == math.inf:
            return f"{'a number' if self.infinite else 'a finite number'} {least}"
        return f"a number {least} and {'below' if self.below else 'at most'} {self.most}"


@dataclass(frozen=True)
class Choices:
    """The texts that a setting may be. Other types have been read by then."""

    texts: tuple[str, ...]

    def hold(self, text: Any) -> bool:
        return not isinstance(text, str) or text in self.texts

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.texts))}"


FROM_0, FROM_1, ABOVE_0 = Bounds(0), Bounds(1), Bounds(0, above=True)
SHARE, POSITIVE_SHARE, DECAY = Bounds(0, 1), Bounds(0, 1, above=True), Bounds(0, 1, below=True)
PORT = Bounds(1, 65535)
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
BOUNDS: dict[type, dict[str, Bounds | Choices]] = {
    GRPOConfig: {
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), FROM_1),
        **dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"), FROM_1),
        **dict.fromkeys(("max_completion_length", "num_iterations", "ref_model_sync_steps"), FROM_1),
        **dict.fromkeys(("vllm_max_model_length", "vllm_tensor_parallel_size", "ddp_timeout"), FROM_1),
        **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"), FROM_1),
        **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "eval_delay"), FROM_0),
        **dict.fromkeys(("top_k", "beta", "epsilon", "dataloader_num_workers", "eval_steps"), FROM_0),
        **dict.fromkeys(("max_grad_norm", "epsilon_high", "delta"), Bounds(0, infinite=True)),
        **dict.fromkeys(("seed", "data_seed"), Bounds(0, 2**32 - 1)),
        **dict.fromkeys(("num_train_epochs", "temperature", "repetition_penalty", "vllm_server_timeout"), ABOVE_0),
        **dict.fromkeys(("logging_steps", "save_steps"), ABOVE_0),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), DECAY),
        **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), POSITIVE_SHARE),
        **dict.fromkeys(("min_p", "top_entropy_quantile", "ref_model_mixup_alpha", "label_smoothing_factor"), SHARE),
        **dict.fromkeys(("vllm_server_port", "vllm_group_port"), PORT),
        "num_generations": Bounds(2),
        "num_generations_eval": FROM_1,
        "max_steps": Bounds(-1),
        "loss_type": Choices(LOSSES),
        "importance_sampling_level": Choices(("token", "sequence")),
        "scale_rewards": Choices(("group", "batch", "none")),
        "multi_objective_aggregation": Choices(("sum_then_normalize", "normalize_then_sum")),
        "vllm_mode": Choices(("server", "colocate")),
        "vllm_importance_sampling_mode": Choices(
            ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        ),
    },
    ModelConfig: {"lora_r": FROM_1, "lora_alpha": FROM_1, "lora_dropout": DECAY},
}
"""Bounds by the class that has the fields; its subclasses have them too."""


def bounds_of(classes: tuple[type, ...]) -> dict[str, Bounds | Choices]:
    """The bounds of the fields of these dataclasses, by name."""
    owned = [bounds for owner, bounds in BOUNDS.items() if any(issubclass(found, owner) for found in classes)]
    return {name: bound for bounds in owned for name, bound in bounds.items()}


def check_bounds(value: Any, bounds: Bounds | Choices | None) -> None:
    """Raises a `ValueError` such as `expected a finite number above 0, got -1.` if a value is out of its bounds."""
    is_bounded = isinstance(value, (int, float)) or isinstance(bounds, Choices)
    if bounds is not None and is_bounded and not bounds.hold(value):
        end = nearest(value, bounds.texts) if isinstance(bounds, Choices) else "."
        raise ValueError(f"expected {bounds}, got {value}{end}")
