"""The trajectory of a run: each weight matrix at evenly spaced checkpoints."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from ..run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    RUN_NAME,
    TRAJECTORY_FOLDER,
    read_json,
    saved_steps,
)
from .lowrank import Factors, concatenate


logger = logging.getLogger(__name__)


PREFIX = "base_model.model."
OTHER_VARIANTS = (
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings of PEFT with which an adapter is not s·B·A of linear layers."""
PLAIN_STARTS = (True, "gaussian")
"""Values of `init_lora_weights` with which B is zero before the first step."""
STARTS_THAT_MOVE = (False, "orthogonal")
"""Values with which B·A is not zero, but the base model is unchanged."""
EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of weights that are tables of tokens or positions, not maps."""


class WeightIndex(TypedDict):
    """What transformers writes about a model in several files."""

    weight_map: dict[str, str]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Context that yields the tensors of a file in safetensors, to be read one by one.

    Raises:
        ValueError: If the file is missing, broken or incomplete.
    """
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read: {error}. Leave its step out with `last_step`.") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file in safetensors.

    Raises:
        ValueError: As `opened`.
    """
    with opened(path) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


def find_steps(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by step: those of `run/trajectory` if there is one, else those that Trainer saved.

    Raises:
        ValueError: If there are none.
    """
    for folder in (run / TRAJECTORY_FOLDER, run):
        if found := saved_steps(folder):
            return found
    raise ValueError(
        f"{run} holds no checkpoints. Train with `trajectory_steps: 10` (only adapters), or with "
        "`save_strategy: steps` and `save_steps`."
    )


def check_steps(run: Path, steps: Sequence[int]) -> int:
    """The spacing of saved steps.

    Raises:
        ValueError: If there is none.
    """
    gaps = {later - earlier for earlier, later in zip(steps, steps[1:], strict=False)}
    if len(gaps) > 1:
        spacing = steps[1] - steps[0]
        last_even = next(a for a, b in zip(steps, steps[1:], strict=False) if b - a != spacing)
        raise ValueError(
            f"The checkpoints of {run} are unevenly spaced: {', '.join(map(str, steps))}. Use an even part, such "
            f"as the steps up to {last_even} with `last_step: {last_even}`, or move the others away."
        )
    if not gaps:
        raise ValueError(f"{run} holds a single checkpoint. A trajectory has several: set `trajectory_steps`.")
    return gaps.pop()


@dataclass(frozen=True)
class Trajectory:
    """Weight matrices at evenly spaced steps, and at the start of the run.

    Attributes:
        run (`Path`): The run's folder.
        steps (`tuple[int, ...]`): Optimizer steps of the checkpoints, without the starting point.
        folders (`tuple[Path, ...]`): Their folders.
        spacing (`int`): Steps from one to the next.
        start (`Path`, *optional*): What was saved before the first step.
    """

    run: Path
    steps: tuple[int, ...]
    folders: tuple[Path, ...]
    spacing: int
    start: Path | None

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def starts_at_zero(self) -> bool:
        """Whether the starting point is one spacing before the first checkpoint."""
        return self.steps[0] == self.spacing

    def differences(self, names: Sequence[str], pairs: Sequence[tuple[int, int | None]]) -> Iterator[Factors]:
        """W_later - W_earlier of matrices of one shape, in fp32, one pair at a time.

        Args:
            names (`Sequence[str]`): The names of N modules of one shape and rank.
            pairs (`Sequence[tuple[int, int | None]]`): Indices of checkpoints, the later one first; `None` for the
                starting point.

        Yields:
            `Factors`: (N, m, r) and (N, r, n).
        """
        raise NotImplementedError

    def difference(self, names: Sequence[str], later: int, earlier: int | None) -> Factors:
        """One of the `differences`."""
        return next(self.differences(names, [(later, earlier)]))

    def combination(self, names: Sequence[str], weights: Sequence[float]) -> Factors:
        """The sum of w_i·W_i over the checkpoints, exactly, for weights whose sum is 0.

        Args:
            names (`Sequence[str]`): As for `difference`.
            weights (`Sequence[float]`): w, one for each checkpoint.
        """
        raise NotImplementedError

    def products(self, names: Sequence[str], points: int) -> torch.Tensor:
        """Inner products of W_i - W_0 and W_j - W_0 for i, j < `points`, (N, points, points), in float64."""
        raise NotImplementedError

    def combination_from_start(self, names: Sequence[str], weights: torch.Tensor) -> Factors:
        """The sum of w_i·(W_i - W_0), exactly.

        Args:
            names (`Sequence[str]`): As for `difference`.
            weights (`torch.Tensor`): w, (N, points), of the first checkpoints.
        """
        raise NotImplementedError

    def groups(self) -> list[tuple[tuple[int, int], list[str]]]:
        """The modules that can be processed together: their shape (m, n), and names."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """How many numbers the difference of a matrix needs while it is computed."""
        raise NotImplementedError

    @cached_property
    def left_alone(self) -> list[str]:
        """Names of trained tensors that are not low-rank maps. They stay as in the last checkpoint."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdapterTrajectory(Trajectory):
    """The trajectory of a LoRA run: ΔW = s·B·A. Nothing larger than B and A is created."""

    @cached_property
    def config(self) -> LoraConfig:
        return LoraConfig.from_pretrained(str(self.folders[-1]))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(m, r, n) of each adapted module."""
        found = {}
        with opened(self.folders[-1] / ADAPTER_WEIGHTS) as tensors:
            for key in sorted(tensors.keys()):
                if key.endswith(".lora_A.weight"):
                    a, b = (tensors.get_slice(k).get_shape() for k in (key, key.replace("lora_A", "lora_B")))
                    if len(a) == 2:
                        found[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = (b[0], a[0], a[1])
        return found

    @cached_property
    def left_alone(self) -> list[str]:
        with opened(self.folders[-1] / ADAPTER_WEIGHTS) as tensors:
            mine = {key for name in self.shapes for key in factor_keys(name)}
            return sorted(set(tensors.keys()) - mine)

    def groups(self) -> list[tuple[tuple[int, int], list[str]]]:
        by_shape: dict[tuple[int, int, int], list[str]] = {}
        for name, shape in self.shapes.items():
            by_shape.setdefault(shape, []).append(name)
        return [((m, n), names) for (m, _, n), names in by_shape.items()]

    def size(self, name: str) -> int:
        m, rank, n = self.shapes[name]
        return 2 * rank * (m + n)

    def scaling(self, name: str) -> float:
        """s of a module, as PEFT computes it."""
        config = self.config
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        return alpha / rank**0.5 if config.use_rslora else alpha / rank

    def at(self, names: Sequence[str], index: int | None) -> Factors:
        """s·B and A of a checkpoint, or of the starting point."""
        folder = self.start if index is None else self.folders[index]
        with opened(folder / ADAPTER_WEIGHTS) as tensors:
            right, left = (
                torch.stack([tensors.get_tensor(keys[i]).float() for keys in map(factor_keys, names)]) for i in (0, 1)
            )
        scalings = torch.tensor([self.scaling(name) for name in names])
        return Factors(left * scalings[:, None, None], right)

    def differences(self, names: Sequence[str], pairs: Sequence[tuple[int, int | None]]) -> Iterator[Factors]:
        at = functools.cache(lambda index: self.at(names, index))
        for later, earlier in pairs:
            if earlier is None and (self.start is None or not at(None).left.any()):
                yield at(later)  # B was zero before the first step
            else:
                yield at(later).minus(at(earlier))

    def combination(self, names: Sequence[str], weights: Sequence[float]) -> Factors:
        return concatenate([self.at(names, i).times(weight) for i, weight in enumerate(weights) if weight])

    def products(self, names: Sequence[str], points: int) -> torch.Tensor:
        pairs = [(d.left, d.right.mT) for d in self.differences(names, [(i, None) for i in range(points)])]
        left, right = (torch.stack(factors).double() for factors in zip(*pairs, strict=True))
        inner = torch.einsum("inmr,jnms->nijrs", left, left) * torch.einsum("inkr,jnks->nijrs", right, right)
        return inner.sum((-2, -1))

    def combination_from_start(self, names: Sequence[str], weights: torch.Tensor) -> Factors:
        deltas = self.differences(names, [(i, None) for i in range(weights.size(1))])
        columns = weights.float()[..., None, None].unbind(1)
        return concatenate([Factors(d.left * w, d.right) for d, w in zip(deltas, columns, strict=True)])


def factor_keys(name: str) -> tuple[str, str]:
    """The keys of A and B of a module in an adapter's file."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


@dataclass(frozen=True)
class FullTrajectory(Trajectory):
    """The trajectory of full fine-tuning: differences of state dicts, read one tensor at a time and reduced to their
    leading `rank` singular components by a randomized SVD (Halko et al., 2011).
    """

    rank: int = 32
    power_iterations: int = 4

    @cached_property
    def _files(self) -> list[dict[str, Path]]:
        return [weight_files(folder) for folder in (self.start, *self.folders)]

    def get(self, name: str, index: int | None) -> torch.Tensor:
        """A tensor of a checkpoint, or of the starting point, as it was saved."""
        path = self._files[0 if index is None else index + 1][name]
        with opened(path) as tensors:
            return tensors.get_tensor(name)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, path in self._files[-1].items():
            with opened(path) as tensors:
                found[name] = tuple(tensors.get_slice(name).get_shape())
        return found

    @cached_property
    def left_alone(self) -> list[str]:
        maps = {name for _, names in self.groups() for name in names}
        return sorted(set(self.shapes) - maps)

    def groups(self) -> list[tuple[tuple[int, int], list[str]]]:
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, shape in self.shapes.items():
            if len(shape) == 2 and not any(part in name for part in EMBEDDINGS):
                by_shape.setdefault(shape, []).append(name)
        return list(by_shape.items())

    def size(self, name: str) -> int:
        m, n = self.shapes[name]
        return m * n

    def differences(self, names: Sequence[str], pairs: Sequence[tuple[int, int | None]]) -> Iterator[Factors]:
        for later, earlier in pairs:
            found = [self._reduce(self.get(name, later).float() - self.get(name, earlier).float()) for name in names]
            yield Factors(torch.stack([f.left for f in found]), torch.stack([f.right for f in found]))

    def combination(self, names: Sequence[str], weights: Sequence[float]) -> Factors:
        sums = [
            sum(self.get(name, i).float() * weight for i, weight in enumerate(weights) if weight) for name in names
        ]
        return _as_factors(sums)

    def products(self, names: Sequence[str], points: int) -> torch.Tensor:
        tables = (torch.stack([self._from_start(name, i).flatten() for i in range(points)]) for name in names)
        return torch.stack([table @ table.mT for table in tables]).double()

    def combination_from_start(self, names: Sequence[str], weights: torch.Tensor) -> Factors:
        return _as_factors(
            [
                sum(self._from_start(name, i) * w for i, w in enumerate(row))
                for name, row in zip(names, weights.tolist(), strict=True)
            ]
        )

    def _from_start(self, name: str, index: int) -> torch.Tensor:
        return self.get(name, index).float() - self.get(name, None).float()

    def _reduce(self, matrix: torch.Tensor) -> Factors:
        rank = min(self.rank, *matrix.shape)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # the sketch is part of the definition: the same at every call
            u, sigma, v = torch.svd_lowrank(matrix, q=rank, niter=self.power_iterations)
        return Factors(u * sigma, v.mT)


def _as_factors(matrices: Sequence[torch.Tensor]) -> Factors:
    """Whole matrices of one shape."""
    whole = torch.stack(list(matrices))
    count, m, n = whole.shape
    if m < n:
        return Factors(torch.eye(m).expand(count, m, m), whole)
    return Factors(whole, torch.eye(n).expand(count, n, n))


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a saved model.

    Raises:
        ValueError: If the folder holds no weights in safetensors, or a broken index of them.
    """
    index = folder / MODEL_INDEX
    if index.is_file():
        return {name: folder / file for name, file in read_json(index, WeightIndex)["weight_map"].items()}
    whole = folder / MODEL_WEIGHTS
    if not whole.is_file():
        raise ValueError(f"{folder} holds no weights in safetensors.")
    with opened(whole) as tensors:
        return dict.fromkeys(tensors.keys(), whole)


def load_trajectory(run: str | Path, last_step: int | None = None, base_model: str | None = None) -> Trajectory:
    """The trajectory of a run, checked.

    Args:
        run (`str` or `Path`): Output folder of a run with LoRA or full fine-tuning.
        last_step (`int`, *optional*): Leaves out later checkpoints.
        base_model (`str`, *optional*): Folder of the weights that full fine-tuning started from.

    Raises:
        ValueError: If there are too few checkpoints, they are unevenly spaced or do not belong together, or there are
            numbers that are not finite, or an adapter that is not plain LoRA.
    """
    run = Path(run)
    found = find_steps(run)
    if last_step is not None:
        found = {step: path for step, path in found.items() if step <= last_step}
    start = found.pop(0, None)
    if found and not _holds_weights(found[max(found)]):  # a run that is saving it, or was killed meanwhile
        logger.warning(f"{found[max(found)]} holds no weights yet: it is left out.")
        del found[max(found)]
    if not found and last_step is None:
        raise ValueError(f"{run} holds no checkpoint after the start of the run. Train on, or name another run.")
    if not found:
        raise ValueError(f"{run} holds no checkpoint up to step {last_step}. Raise `last_step`.")
    for folder in found.values():
        _check_place(folder)
    steps, folders = tuple(found), tuple(found.values())
    spacing = check_steps(run, steps)
    are_adapters = {(folder / ADAPTER_WEIGHTS).is_file() for folder in folders}
    if are_adapters == {True}:
        trajectory = AdapterTrajectory(run, steps, folders, spacing, start or _adapter_at_start(run))
        _check_config(trajectory)
        for folder in folders if trajectory.start is None else (trajectory.start, *folders):
            _check_adapter(trajectory, folder)
        return trajectory
    if are_adapters == {True, False}:
        raise ValueError(f"Some checkpoints of {run} are adapters and some are not. Move those of another run away.")
    if start is None and base_model is None:
        raise ValueError(
            f"{run} is a run of full fine-tuning, and its starting weights are needed too. Set `base_model`."
        )
    trajectory = FullTrajectory(run, steps, folders, spacing, start or Path(base_model))
    _check_full(trajectory)
    return trajectory


def _holds_weights(folder: Path) -> bool:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob(f"*/{ADAPTER_CONFIG}")]
    return any(path.name != "training_args.bin" for path in files)


def _check_place(folder: Path) -> None:
    """Refuses adapters that are not where, or what, `AdapterTrajectory` reads."""
    if (folder / ADAPTER_WEIGHTS).is_file() or (folder / MODEL_CONFIG).is_file():
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds an adapter without {ADAPTER_WEIGHTS}. Save adapters in safetensors, or move it away."
        )
    if named := sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
        raise ValueError(
            f"{folder} holds its adapter in the folder {named[0]}, and one that is called `default` is read. Train "
            "with `trajectory_steps`, which saves it so."
        )


def _adapter_at_start(run: Path) -> Path | None:
    """The adapter that the run started from, if it did not start from a new one and recorded that.

    Raises:
        ValueError: If it is not there any more.
    """
    about = read_json(run / RUN_NAME, dict[str, Any]) if (run / RUN_NAME).is_file() else {}
    name = (about.get("settings") or {}).get("resume_adapter")
    if name is not None and not (Path(name) / ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"{run} started from the adapter {name}, which is not there. Put it back, or train with "
            "`trajectory_steps`, which saves it."
        )
    return None if name is None else Path(name)


def check_adapter_settings(settings: dict[str, Any], what: str) -> None:
    """Refuses an adapter that is not plain LoRA: the deltas of its weights would not be s·B·A.

    Args:
        settings (`dict`): Of PEFT's configuration.
        what (`str`): Its name in messages.

    Raises:
        ValueError: Names the setting and what to do.
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"A low-rank trajectory needs plain LoRA, and {what} is {settings.get('peft_type')}.")
    variants = [name for name in settings if name.startswith("use_") and name != "use_rslora"]
    for name in (*variants, *OTHER_VARIANTS):
        if settings.get(name):
            raise ValueError(f"A low-rank trajectory needs plain LoRA, and {what} has `{name}`. Train without it.")
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS + STARTS_THAT_MOVE:
        raise ValueError(
            f"`init_lora_weights: {start}` of {what} changes the base model's weights, and "
            "would change them differently for an adapter of another rank. Train with the default."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of a saved adapter.

    Raises:
        ValueError: If there is none, or it is not JSON.
    """
    return read_json(folder / ADAPTER_CONFIG, dict[str, Any])


def _check_config(trajectory: AdapterTrajectory) -> None:
    folder = trajectory.folders[-1]
    settings = read_config(folder)
    check_adapter_settings(settings, str(folder))
    if settings.get("init_lora_weights", True) in STARTS_THAT_MOVE and trajectory.start is None:
        raise ValueError(
            f"{folder} started from an adapter that was not zero, and the run did not save it. Train with "
            "`trajectory_steps`, which does."
        )
    if not trajectory.shapes:
        raise ValueError(f"{folder} adapts no linear layer.")


def _check_adapter(trajectory: AdapterTrajectory, folder: Path) -> None:
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    expected = trajectory.shapes
    maps = [key for key, tensor in tensors.items() if key.endswith(".lora_A.weight") and tensor.ndim == 2]
    names = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in maps}
    if names != set(expected):
        changed = sorted(names ^ set(expected))
        raise ValueError(
            f"{folder} adapts other modules than {trajectory.folders[-1]} does, such as {changed[0]}. Move the "
            "checkpoints of other runs away."
        )
    settings, last = read_config(folder), read_config(trajectory.folders[-1])
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path"):
        if settings.get(name) != last.get(name):
            raise ValueError(
                f"{folder} has `{name}: {settings.get(name)}`, and {trajectory.folders[-1]} has {last.get(name)}. "
                "Move the checkpoints of other runs away."
            )
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{folder} holds numbers that are not finite, in {key}. Go back to the steps before, with `last_step`."
            )


def _check_full(trajectory: FullTrajectory) -> None:
    for index, folder in enumerate((trajectory.start, *trajectory.folders)):
        names = set(trajectory._files[index])
        if names != set(trajectory.shapes):
            changed = sorted(names ^ set(trajectory.shapes))
            raise ValueError(
                f"{folder} has other tensors than {trajectory.folders[-1]} has, such as {changed[0]}. Move the "
                "checkpoints of other runs away, or set the right `base_model`."
            )
        for name in trajectory.shapes:
            tensor = trajectory.get(name, index - 1 if index else None)
            if tuple(tensor.shape) != trajectory.shapes[name]:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} in {folder} and {trajectory.shapes[name]} at the end. Set the "
                    "right `base_model`."
                )
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{folder} holds numbers that are not finite, in {name}. Go back to the steps before, with "
                    "`last_step`."
                )
