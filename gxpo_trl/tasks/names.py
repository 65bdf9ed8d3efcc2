"""What a recipe may call by name: models and reward functions."""

import importlib
import os
import re
import sys
from collections.abc import Callable

import trl.rewards

from ..spelling import nearest
from .arithmetic import arithmetic_reward
from .code import check_permission, code_reward
from .rewards import boxed_format_reward, choice_reward, maths_reward
from .tiny_model import TINY_MODEL_PATH


EMBEDDED_MODEL = "gxpo_trl/tiny"


def resolve_model(name: str) -> str:
    """A model's name or path as `from_pretrained` wants it: `gxpo_trl/tiny` becomes the folder in the package."""
    return str(TINY_MODEL_PATH) if name == EMBEDDED_MODEL else name


def resolve_reward(name: str) -> Callable:
    """The reward function of that name.

    Args:
        name (`str`): one of ours, such as `maths_reward`, one that TRL's own script takes, or a dotted path such as
            `my_package.rewards.my_reward`, looked up in the working directory too. Of TRL's,
            `get_soft_overlong_punishment` may have its tokens with it: `get_soft_overlong_punishment(4096, 819)`.

    Raises:
        ValueError: If there is none of that name; it names the nearest. If it runs code, and the environment does not
            allow that.
    """
    known = {
        "arithmetic_reward": arithmetic_reward,
        "maths_reward": maths_reward,
        "choice_reward": choice_reward,
        "boxed_format_reward": boxed_format_reward,
        "code_reward": code_reward,
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
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"There is no reward function `{name}`{nearest(name, known)} Names are {', '.join(known)}; anything else "
            "needs its dotted path, such as `my_package.rewards.my_reward`."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward function `{name}` can't be imported: {error}.") from error


def _overlong_punishment(longest: int, cache: int) -> Callable:
    if not 0 < cache < longest:
        raise ValueError(
            f"`get_soft_overlong_punishment({longest}, {cache})` takes the longest completion and, below it, how many "
            "of its last tokens cost something."
        )
    return trl.rewards.get_soft_overlong_punishment(longest, cache)
