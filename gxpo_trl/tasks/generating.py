"""Draws items from reasoning-gym's generators. A script: settings as JSON on stdin, items as JSON on stdout.

Five of the generators iterate over sets of strings, so that what they draw depends on `PYTHONHASHSEED`.
`generated.py` runs this file with a fixed one: then every process of a run draws the same, and so does a resumed one.
Only Python and reasoning-gym are imported.

Training and test examples are disjoint in two ways. They are drawn from separate streams of seeds, and a hash of its
question decides whether an item is held out: one in four. So no question is in both, for any seeds and sizes.
"""

import contextlib
import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from typing import Any


CHUNK = 500  # items of one generator; the next one continues with other seeds
MOST_REJECTED = 1000  # draws in a row without a new item


def is_held_out(question: str) -> bool:
    """Whether an item belongs to the test split: a hash of its question, without spacing and case; one in four."""
    return hashlib.md5(" ".join(question.lower().split()).encode()).digest()[0] % 4 == 0


def draw(request: dict[str, Any]) -> dict[str, Any]:
    """Items of several tasks, mixed by weight.

    Args:
        request (`dict[str, Any]`): `tasks`, a list of `name`, `weight` and `settings`; `known`, names that settings
            are given for; `split`, `"train"` or `"test"`; `seed`; and `size`, how many. Test items have distinct
            questions.

    Returns:
        `dict[str, Any]`: `items`, a list of `task` and `item` (a Python literal: tuples stay tuples). Fewer than
            `size` where the tasks have no more.
    """
    rng = random.Random(f"{request['split']}-{request['seed']}")
    streams = {task["name"]: items_of(task, request["split"], request["seed"]) for task in request["tasks"]}
    weights = {task["name"]: task["weight"] for task in request["tasks"]}
    items: list[dict[str, str]] = []
    while len(items) < request["size"] and streams:
        (name,) = rng.choices(list(streams), [weights[name] for name in streams])
        item = next(streams[name], None)
        if item is None:
            del streams[name]  # there are no more
        else:
            items.append({"task": name, "item": repr(item)})
    return {"items": items}


def items_of(task: dict[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """The items of one task in a split, until many draws in a row have given no new one."""
    seen, rejected = set(), 0
    for item in stream(task, split, seed):
        question = item["question"]
        if is_held_out(question) == (split == "test") and not (split == "test" and question in seen):
            seen.add(question)
            rejected = 0
            yield item
        elif (rejected := rejected + 1) == MOST_REJECTED:
            return


def stream(task: dict[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """All items of one task, in the order of seeds of the split's own."""
    import reasoning_gym

    start = int.from_bytes(hashlib.sha256(f"{task['name']}-{split}-{seed}".encode()).digest()[:4], "big") // 4
    for first in range(start, start + 2**30, CHUNK):
        generator = reasoning_gym.create_dataset(task["name"], seed=first, size=CHUNK, **task["settings"])
        for i in range(CHUNK):
            random.seed(first + i)  # for those that draw from Python's own
            yield generator[i]


def refusal(task: dict[str, Any]) -> dict[str, Any] | None:
    """What is wrong with a task's name or settings, with the names that there are; `None` if nothing is."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task["name"] not in DATASETS:
        return {"unknown": task["name"], "known": sorted(DATASETS)}
    known = [field.name for field in dataclasses.fields(DATASETS[task["name"]][1])]
    if unknown := [name for name in task["settings"] if name not in known or name in ("seed", "size")]:
        return {"unknown": unknown[0], "task": task["name"], "known": sorted({*known} - {"seed", "size"})}
    try:
        reasoning_gym.create_dataset(task["name"], seed=0, size=CHUNK, **task["settings"])[0]
    except Exception as error:
        return {"task": task["name"], "error": f"{error or type(error).__name__}"}
    return None


def main() -> None:
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # some print
        others = [{"name": name, "settings": {}} for name in request["known"]]
        refusals = (refusal(task) for task in [*request["tasks"], *others])
        found = {"refusal": first} if (first := next(filter(None, refusals), None)) else draw(request)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
