"""What an evaluation was made with: the content of a model's files, and of the files of reward functions.

Names stay when a run is continued in its folder, or a file is edited. Samples are used again only with the
same content.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..run_folder import ADAPTER_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG, adapter_base, is_adapter
from ..tasks.names import resolve_model, resolve_reward
from .settings import EvaluationArguments


FILES_OF_MODEL = (
    *("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", MODEL_CONFIG, ADAPTER_CONFIG),
    *("tokenizer.json", "chat_template.jinja"),
)
"""What decides the samples of a checkpoint. Others, such as an optimizer's state, may change."""
OF_PACKAGES = ("gxpo_trl", "trl")
"""Rewards of packages have no file of the user's."""

Fingerprints = dict[str, str]
"""By setting, or by setting and name."""


def fingerprints(model: str, settings: EvaluationArguments) -> Fingerprints:
    """Checksums of a model and of the files of the reward functions; those that are not known are left out.

    Args:
        model (`str`): As in `models`: a folder, an adapter, or a name of the Hub, of which it is the revision.
        settings ([`EvaluationArguments`]): They name the reward functions.
    """
    found = {"model": of_model(resolve_model(model))}
    found |= {f"reward_funcs: {name}": _of_reward(name) for name in settings.reward_funcs or ()}
    return {name: value for name, value in found.items() if value is not None}


def of_model(name: str) -> str | None:
    """A checksum of a folder's files, for an adapter with those of its base's folder; of a name of the Hub, the
    revision in the cache.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _revision(name)
    checksums: dict[str, Any] = {
        path.name: _of_file(path) for pattern in FILES_OF_MODEL for path in sorted(folder.glob(pattern))
    }
    base = adapter_base(folder) if is_adapter(folder) else None
    if base is not None and Path(base).is_dir():  # of the Hub, it is not in the cache until it is loaded
        checksums["base"] = of_model(base)
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _revision(name: str) -> str | None:
    for file in (TOKENIZER_CONFIG, MODEL_CONFIG, ADAPTER_CONFIG):  # the first is there once the tokenizer was loaded
        try:
            path = try_to_load_from_cache(name, file)
        except HFValidationError:  # a path where nothing is: loading says so
            return None
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _of_reward(name: str) -> str | None:
    module = getattr(resolve_reward(name), "__module__", "")
    if module.partition(".")[0] in OF_PACKAGES:
        return None
    path = getattr(sys.modules.get(module), "__file__", None)
    return None if path is None else _of_file(Path(path))
