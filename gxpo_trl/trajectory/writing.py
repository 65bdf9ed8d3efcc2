"""Writes an extrapolated model: the last adapter with the predicted directions appended, or whole weights."""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from ..run_folder import (
    ADAPTER_WEIGHTS,
    CARD_NAME,
    EXTRAPOLATION_NAME,
    LOOKAHEAD_STATE_NAME,
    TOKENIZER_CONFIG,
    TRAINER_STATE_NAME,
    TRAJECTORY_FIGURE_NAME,
    ExtrapolationReport,
    whole_folder,
)
from .checkpoints import PREFIX, AdapterTrajectory, FullTrajectory, Trajectory, factor_keys, read_tensors
from .deltas import in_chunks
from .forecast import Forecast
from .lowrank import Factors
from .merging import merge_adapter


NOT_OF_A_MODEL = (TRAINER_STATE_NAME, LOOKAHEAD_STATE_NAME)


def write_extrapolation(
    trajectory: Trajectory, found: Forecast, alpha: float, folder: Path, merged: bool, draw: Callable[[Path], Any]
) -> None:
    """A model, its card with the figure, and `extrapolation.json`. The folder appears when it is complete.

    Args:
        trajectory (`Trajectory`): What was extrapolated.
        found (`Forecast`): The prediction.
        alpha (`float`): The factor of the movement.
        folder (`Path`): Where to write; must not exist.
        merged (`bool`): Whether an adapter is merged into its base model. Full fine-tuning is written whole anyway.
        draw (`Callable`): Writes the figure of the report to a path.

    Raises:
        ValueError: If what was predicted is not finite.
    """
    with whole_folder(folder) as partial:
        if isinstance(trajectory, FullTrajectory):
            write_weights(trajectory, found, alpha, partial)
        else:
            write_adapter(trajectory, found, alpha, partial)
            if merged:
                merge_adapter(partial)
        draw(partial / TRAJECTORY_FIGURE_NAME)
        report: ExtrapolationReport = {"alpha": alpha, "run": str(trajectory.run.resolve()), **found.report}
        (partial / EXTRAPOLATION_NAME).write_text(json.dumps(report, indent=2) + "\n")
        _card(trajectory, report, merged).save(partial / CARD_NAME)


def _check_finite(tensor: torch.Tensor, name: str, alpha: float) -> torch.Tensor:
    if not tensor.isfinite().all():
        raise ValueError(
            f"What was predicted for {name} is not finite at α = {alpha:g}. Lower `alpha`, or the `learning_rate` of "
            "the predictor."
        )
    return tensor


# ---- Adapters


def write_adapter(trajectory: AdapterTrajectory, found: Forecast, alpha: float, folder: Path) -> None:
    """The last adapter plus α times what was predicted, of rank r + q where that is of rank q.

    B gets q columns and A q rows; the old ones and s do not change, so that training can continue from it. Both are in
    fp32: the new columns may be whole checkpoints, of whose sum only a small movement is left. The rest of the adapter
    is copied.
    """
    tensors = read_tensors(trajectory.folders[-1] / ADAPTER_WEIGHTS)
    for i, d in enumerate(found.deltas):
        for part in in_chunks(trajectory, d.names):
            movement = found.predict(i, part)
            for j, name in enumerate(d.names[part]):
                key_a, key_b = factor_keys(name)
                added = balance(Factors(movement.left[j] * (alpha / trajectory.scaling(name)), movement.right[j]))
                for key, new, dim in ((key_a, added.right, 0), (key_b, added.left, 1)):
                    tensors[key] = torch.cat([tensors[key].float(), _check_finite(new.float(), name, alpha)], dim)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)
    _adapter_config(trajectory, tensors).save_pretrained(folder)
    _save_tokenizer(trajectory, folder)


def balance(movement: Factors) -> Factors:
    """The same matrix, each column of `left` (m, q) as long as its row of `right` (q, n): both learn at one pace."""
    left, right = movement.left.norm(dim=0), movement.right.norm(dim=1)
    ratio = torch.where(left * right > 0, right / left, 1.0).sqrt()
    return Factors(movement.left * ratio, movement.right / ratio[:, None])


def _adapter_config(trajectory: AdapterTrajectory, tensors: dict[str, torch.Tensor]) -> LoraConfig:
    """PEFT's configuration for the ranks of these tensors, with an α for each module that gives it the s it had."""
    ranks, alphas = {}, {}
    for key, tensor in tensors.items():
        for kind in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(kind):
                name = key.removeprefix(PREFIX).removesuffix(kind)
                ranks[name] = len(tensor)
                alpha = trajectory.scaling(name) * len(tensor)
                alphas[name] = round(alpha) if alpha == round(alpha) else alpha
    config = copy.deepcopy(trajectory.config)
    config.use_rslora, config.init_lora_weights = False, True
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    return config


def _save_tokenizer(trajectory: AdapterTrajectory, folder: Path) -> None:
    """The run's tokenizer, or else the base model's."""
    places = [path for path in (trajectory.folders[-1], trajectory.run) if (path / TOKENIZER_CONFIG).is_file()]
    source = places[0] if places else trajectory.config.base_model_name_or_path
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


# ---- Full fine-tuning


def write_weights(trajectory: FullTrajectory, found: Forecast, alpha: float, folder: Path) -> None:
    """The last checkpoint's weights plus α times the predicted movement, one file at a time."""
    source = trajectory.folders[-1]
    place = {name: (i, j) for i, d in enumerate(found.deltas) for j, name in enumerate(d.names)}
    for path in sorted(source.glob("*.safetensors")):
        tensors = read_tensors(path)
        for name in place.keys() & tensors.keys():
            i, j = place[name]
            movement = found.predict(i, slice(j, j + 1))
            moved = tensors[name].float() + alpha * (movement.left[0] @ movement.right[0])
            tensors[name] = _check_finite(moved.to(tensors[name].dtype), name, alpha)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model", ".py") and path.name not in NOT_OF_A_MODEL:
            shutil.copy(path, folder / path.name)


# ---- The card


def _card(trajectory: Trajectory, report: ExtrapolationReport, merged: bool) -> ModelCard:
    is_adapter = isinstance(trajectory, AdapterTrajectory) and not merged
    base = trajectory.config.base_model_name_or_path if isinstance(trajectory, AdapterTrajectory) else None
    base = None if base is None or Path(base).exists() else base  # the Hub takes no local path for one
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["gxpo_trl", "next", "rlvr", *(["lora"] if is_adapter else [])],
    )
    held_out = report["held_out"]
    rows = [
        f"| {name} | {' | '.join('' if value is None else f'{value:.3f}' for value in found.values())} |"
        for name, found in held_out["errors"].items()
    ]
    lines = [
        f"# {trajectory.run.resolve().name}, {report['steps_ahead']} steps ahead",
        "",
        f"Not trained but predicted, from {len(report['steps'])} checkpoints of a run with reinforcement learning, up "
        f"to step {report['steps'][-1]}: W + α·ΔW with α = {report['alpha']:g} and ΔW by the method "
        f"`{report['method']}` for {report['matrices']} weight matrices. `{EXTRAPOLATION_NAME}` holds all of it.",
        "",
        f"The error of each method for what happened between steps {held_out['from_step']} and "
        f"{held_out['to_step']} (1 is as good as no prediction):",
        "",
        "| method | error | cosine |",
        "|---|---|---|",
        *rows,
        "",
        f"![Energy ratio and linearity of the trajectory]({TRAJECTORY_FIGURE_NAME})",
        "",
        "Method: NExt, [Low-rank Optimization Trajectories Modeling for LLM RLVR Acceleration]"
        "(https://huggingface.co/papers/2604.11446). AlphaRL: [2510.00553](https://huggingface.co/papers/2510.00553). "
        "RELEX: [2605.21468](https://huggingface.co/papers/2605.21468). "
        "RL-Extra: [2601.04537](https://huggingface.co/papers/2601.04537).",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
