"""Tasks of reasoning-gym: about a hundred generators of problems, each with a scorer of its own.

    dataset_name: reasoning_gym/chain_sum+reasoning_gym/leg_counting
    reasoning_gym: {seed: 1, size: 4000, chain_sum: {max_terms: 3, weight: 2}}

An extra: `pip install 'gxpo_trl[reasoning-gym]'`.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from ..spelling import nearest
from .answers import final_answer


logger = get_logger(__name__)

PREFIX = "reasoning_gym/"
SIZES = {"train": ("size", 2000), "test": ("test_size", 200)}
"""The number of items of a split, by setting, with its default."""
NUMBERS = {"seed": 0, "size": 1, "test_size": 1}
"""The settings of all tasks together, and the least that each may be."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SCRIPT = str(Path(__file__).with_name("generating.py"))
# `-c` puts "" on the path, and a script its own folder, whose files are named like packages.
_LAUNCH = "import sys; sys.path = [p for p in sys.path if p]; import runpy; runpy.run_path({!r}, run_name='__main__')"


def is_generated(name: str) -> bool:
    """Whether a name is a task of reasoning-gym, or several joined by `+`."""
    return name.strip().startswith(PREFIX)


def generate(name: str, split: str, settings: dict[str, Any] | None = None) -> Dataset:
    """Draws examples of one task, or of several that are mixed.

    Args:
        name (`str`): `reasoning_gym/<task>`, several of them joined by `+`.
        split (`str`): `"train"` or `"test"`. No question is in both, whatever the settings are.
        settings (`dict[str, Any]`, *optional*): `seed` (0), `size` and `test_size` (2000 and 200 examples of all tasks
            together), and by a task's name what its generator takes, with its `weight` in the mixture (1).

    Returns:
        `Dataset` with the columns `id`, `problem`, `answer` (empty where a task has many right ones), `task`, and
            `item`, from which `reasoning_gym_reward` scores.

    Raises:
        ValueError: If reasoning-gym is not installed, a task or a setting does not exist, or nothing can be drawn.
    """
    check_installed()
    given = {"seed": 0, **(settings or {})}
    tasks = _read_tasks(name, given)
    key, default = SIZES[split]
    request = {"split": split, "seed": given["seed"], "size": given.get(key, default), "tasks": tasks}
    request["known"] = [task for task in given if task not in NUMBERS]
    items = _draw(json.dumps(request, sort_keys=True))
    if not items:
        raise ValueError(f"{name} has no {split} examples with these settings. Make the task larger.")
    if len(items) < request["size"]:
        logger.warning(
            f"{name} has {len(items)} different {split} examples with these settings; `{key}` is {request['size']}."
        )
    of_task = {task["name"]: task["settings"] for task in tasks}
    drawn = [(item["task"], of_task[item["task"]], ast.literal_eval(item["item"])) for item in items]
    return Dataset.from_dict(
        {
            "id": [str(i) for i in range(len(items))],
            "problem": [item["question"].strip() for *_, item in drawn],
            "answer": [str(item["answer"] or "") for *_, item in drawn],
            "task": [task for task, *_ in drawn],
            "item": [repr(one) for one in drawn],
        }
    )


def read_mapping(name: str, said: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A setting as a mapping: from a recipe, or from JSON on a command line.

    Raises:
        ValueError: If it is not a mapping.
    """
    try:
        settings = json.loads(said) if isinstance(said, str) else said
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be a mapping, or one in JSON, got {said!r}: {error}.") from error
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"`{name}` must be a mapping, got {said!r}.")
    return settings


def check_installed() -> None:
    """Raises a ValueError if the extra is missing."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("This needs reasoning-gym, an extra. Install it: `pip install 'gxpo_trl[reasoning-gym]'`.")


def _read_tasks(name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks of a name with their settings and weights.

    Raises:
        ValueError: If a setting is invalid, or is for a task that is not named.
    """
    parts = [part.strip() for part in name.split("+")]
    if others := [part for part in parts if not part.startswith(PREFIX)]:
        raise ValueError(f"`{name}` mixes tasks of reasoning-gym with `{others[0]}`. Name the ones or the other.")
    names = [part.removeprefix(PREFIX) for part in parts]
    for key, value in settings.items():
        if key in NUMBERS and not (isinstance(value, int) and not isinstance(value, bool) and value >= NUMBERS[key]):
            raise ValueError(
                f"`reasoning_gym`: `{key}` must be a whole number of at least {NUMBERS[key]}, got {value!r}."
            )
        if key not in NUMBERS and not isinstance(value, dict):
            known = [*NUMBERS, *names]
            raise ValueError(
                f"`reasoning_gym` has `{key}: {value!r}`{nearest(key, known)} It may have {', '.join(NUMBERS)}, and a "
                "mapping of settings by the name of a task."
            )
    tasks = []
    for task in dict.fromkeys(names):
        own = dict(settings.get(task, {}))
        weight = own.pop("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"`reasoning_gym`: the `weight` of `{task}` must be a number above 0, got {weight!r}.")
        tasks.append({"name": task, "weight": weight, "settings": own})
    return tasks


@lru_cache(maxsize=8)
def _draw(request: str) -> tuple[dict[str, str], ...]:
    """The items of `generating.py`, drawn in a process with a fixed hash seed."""
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH.format(_SCRIPT)],
        input=request,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise ValueError(f"reasoning-gym can't draw: {(done.stderr.strip().splitlines() or ['interrupted'])[-1]}.")
    found = json.loads(done.stdout)
    if refusal := found.get("refusal"):
        raise ValueError(_explain(refusal))
    return tuple(found["items"])


def _explain(refusal: dict[str, Any]) -> str:
    if "error" in refusal:
        return f"`{PREFIX}{refusal['task']}` does not take its settings: {refusal['error'].rstrip('.')}."
    hint = nearest(refusal["unknown"], refusal["known"])
    if "task" in refusal:
        return (
            f"`{PREFIX}{refusal['task']}` has no setting `{refusal['unknown']}`{hint} It takes "
            f"{', '.join(refusal['known'])}; `seed` and `size` are those of all tasks."
        )
    return f"reasoning-gym has no task `{refusal['unknown']}`{hint} It has {', '.join(refusal['known'])}."


# ---- Scoring


def reasoning_gym_reward(
    completions: list, item: list[str], log_extra: Callable[[str, list], None] | None = None, **kwargs
) -> list[float]:
    """The score of each completion's answer by the task's own scorer: 1.0 for a right one, often less for one that is
    nearly right, 0.0 for one that it can't read.

    Args:
        completions (`list`): In TRL's form.
        item (`list[str]`): The column of `generate`.
        log_extra: Provided by TRL's trainers.
    """
    answers = [read_answer(c if isinstance(c, str) else c[-1]["content"]) for c in completions]
    if log_extra is not None:
        log_extra("answer", answers)
    return [_score(*ast.literal_eval(of), answer) for of, answer in zip(item, answers, strict=True)]


def read_answer(completion: str) -> str:
    """The content of the last `<answer>` tags, else of the last box, else all text after the thinking."""
    if found := _TAGGED.findall(completion):
        return found[-1].strip()
    if "\\boxed" in completion:
        return final_answer(completion) or ""
    return completion.rpartition("</think>")[2].strip()


def _score(task: str, settings: dict[str, Any], item: dict[str, Any], answer: str) -> float:
    try:
        return float(_scorer(task, repr(settings)).score_answer(answer, item))
    except Exception:  # some fail on what they can't read
        return 0.0


@lru_cache(maxsize=256)
def _scorer(task: str, settings: str):
    check_installed()
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=0, size=1, **ast.literal_eval(settings))
