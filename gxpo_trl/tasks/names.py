"""Models and reward functions that a recipe names."""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import trl.rewards

from ..spelling import nearest
from .arithmetic import arithmetic_reward
from .code import check_permission, code_reward
from .generated import reasoning_gym_reward
from .rewards import boxed_format_reward, choice_reward, maths_reward
from .tiny_model import TINY_MODEL_PATH


EMBEDDED_MODEL = "gxpo_trl/tiny"
GIVEN_TO_REWARDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL passes to a reward function by name, in addition to the columns."""


def resolve_model(name: str) -> str:
    """A model's name or path for `from_pretrained`: `gxpo_trl/tiny` becomes the folder in the package."""
    return str(TINY_MODEL_PATH) if name == EMBEDDED_MODEL else name


def resolve_reward(name: str) -> Callable:
    """The reward function of that name.

    Args:
        name (`str`): one of ours, such as `maths_reward`; one that TRL's own script takes; `file.py:my_reward`; or a
            dotted path such as `my_package.rewards.my_reward`, looked up in the working directory too, after all that
            is installed. Of TRL's, `get_soft_overlong_punishment` may have its tokens with it:
            `get_soft_overlong_punishment(4096, 819)`.

    Raises:
        ValueError: If there is none of that name (the message has the nearest), its file or module can't be imported,
            TRL could not call it, or it runs code and the environment does not allow that.
    """
    known = {
        "arithmetic_reward": arithmetic_reward,
        "maths_reward": maths_reward,
        "choice_reward": choice_reward,
        "boxed_format_reward": boxed_format_reward,
        "code_reward": code_reward,
        "reasoning_gym_reward": reasoning_gym_reward,
        "accuracy_reward": trl.rewards.accuracy_reward,
        "reasoning_accuracy_reward": trl.rewards.reasoning_accuracy_reward,
        "think_format_reward": trl.rewards.think_format_reward,
        "get_soft_overlong_punishment": trl.rewards.get_soft_overlong_punishment(1280, 256),
    }
    if bounds := re.fullmatch(r"get_soft_overlong_punishment\((\d+), *(\d+)\)", name):
        return _overlong_punishment(*map(int, bounds.groups()))
    if name == "code_reward":
        check_permission()
    if name in known:
        return known[name]
    if reward_file(name) is None and "." not in name:
        raise ValueError(
            f"There is no reward function `{name}`{nearest(name, known)} Names are {', '.join(known)}; anything else "
            "is `file.py:my_reward`, or a dotted path such as `my_package.rewards.my_reward`."
        )
    reward = _load_from_file(name) if reward_file(name) else _load_from_module(name)
    _check_reward(name, reward)
    return reward


def reward_file(name: str) -> Path | None:
    """The file of a reward that is named `file.py:function`; `None` for other names."""
    path, colon, _ = name.rpartition(":")
    return Path(path) if colon and path.endswith(".py") else None


def _load_from_file(name: str) -> Any:
    path, function_name = reward_file(name).absolute(), name.rpartition(":")[2]
    if not path.is_file():
        raise ValueError(f"The reward function `{name}` is not available: there is no file {path}.")
    _look_in(path.parent)
    # It has a name of its own, so that it shadows nothing. It is in sys.modules, so that its objects can be pickled.
    module_name = f"reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ValueError(f"The reward function `{name}` can't be imported: {_explain(error, path)}.") from error
    return _get(name, module, function_name)


def _load_from_module(name: str) -> Any:
    module_name, _, function_name = name.rpartition(".")
    _look_in(Path.cwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"The reward function `{name}` can't be imported: {_explain(error)}.") from error
    return _get(name, module, function_name)


def _look_in(folder: Path) -> None:
    """Looks up modules in a folder too, after all installed ones."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _explain(error: BaseException, path: Path | None = None) -> str:
    """The error of an import, and its place in the user's file."""
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {said}"  # which says the line
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    inside = [frame for frame in lines if path is not None and frame.filename == str(path)] or lines[1:]
    place = f" in {inside[-1].filename}, line {inside[-1].lineno}" if inside else ""
    return f"{type(error).__name__}: {said}{place}"


def _get(name: str, module: ModuleType, function_name: str) -> Any:
    if not hasattr(module, function_name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"The reward function `{name}` is not available: {getattr(module, '__file__', module.__name__)} has no "
            f"`{function_name}`{nearest(function_name, functions)}"
        )
    return getattr(module, function_name)


def _check_reward(name: str, reward: Any) -> None:
    """Refuses functions that TRL could not call as a reward, or could not log under a name.

    Raises:
        ValueError: With the parameters that it needs.
    """
    if not callable(reward) or not hasattr(reward, "__name__") or isinstance(reward, type):
        raise ValueError(f"The reward function `{name}` is not a function: it is {reward!r:.80}.")
    try:
        signature = inspect.signature(reward)
        signature.bind_partial(**dict.fromkeys(GIVEN_TO_REWARDS))
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
                raise TypeError(f"`{parameter.name}` can't be given by name")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward function `{name}` can't be called by TRL: {error}. It needs the parameters `completions`, "
            f"the columns that it uses, and `**kwargs` for the rest: {', '.join(GIVEN_TO_REWARDS)}."
        ) from error


def _overlong_punishment(longest: int, cache: int) -> Callable:
    if not 0 < cache < longest:
        raise ValueError(
            f"`get_soft_overlong_punishment({longest}, {cache})` takes the longest completion and, below it, how many "
            "of its last tokens cost something."
        )
    return trl.rewards.get_soft_overlong_punishment(longest, cache)
