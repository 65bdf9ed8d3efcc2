"""Run folders as crashes, other tools and other people leave them: each file of the schema, with each corruption."""

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


SETTINGS = {"update_rule": "gxpo", "seed": 0, "learning_rate": 1e-4, "lookahead_steps": 5, "reposition_alpha": 0.5}
SETTINGS |= {"gate_threshold": 0.5, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 1}
RUN = {
    "package": "0.2",
    "trainer": "GXPOTrainer",
    "model": "gxpo_trl/tiny",
    "adapter": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
    "rewards": ["maths_reward"],
    "completions_per_step": 16,
    "settings": SETTINGS,
    "changed": {"learning_rate": 1e-4, "seed": 0},
    "versions": {"torch": "2.13"},
}
LOG = [
    {"step": 0, "eval_reward": 0.2, "eval/MATH-500/avg@4": 0.1},
    {"step": 1, "reward": 0.1, "step_time": 1.0, "lookahead/backward_passes": 3.0, "lookahead/elapsed_time": 3.0},
    {"step": 2, "reward": 0.2, "kl": 0.1, "lookahead/backward_passes": 6.0, "lookahead/elapsed_time": 6.0},
    {"step": 2, "eval_reward": 0.5, "eval/MATH-500/avg@4": 0.2, "eval/rollouts": 32, "eval/backward_passes": 6,
     "eval/seconds": 6.0, "lookahead/shutoff_step": 1},
    {"step": 2, "train_runtime": 7.0},
]  # fmt: skip
SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 8}
RESULTS = {
    "model": "MODEL",
    "benchmarks": {"MATH-500": {"problems": 8, "metrics": {"avg@4": SCORE}, "verify_failures": 0}},
}
BAND = {"steps": [2, 3], "mean": [0.5, 0.6], "low": [0.4, 0.5], "high": [0.6, 0.7]}
EXTRAPOLATION = {
    "alpha": 0.5,
    "run": "run",
    "method": "next",
    "steps": [1, 2, 3],
    "steps_ahead": 1,
    "checkpoints_ahead": 1,
    "matrices": 4,
    "left_alone": [],
    "energy_ratio": BAND,
    "linearity": {
        "so_far": BAND,
        "ahead": {"steps": [2], "edges": [0.0, 0.5, 0.8], "shares": [[0.25, 0.25, 0.25, 0.25]]},
    },
    "held_out": {"from_step": 2, "to_step": 3, "errors": {"next": {"error": 0.5, "cosine": 0.8}}},
    "seconds": {"fit": 1.0},
}
COMPLETIONS = [{"step": 1, "prompt": "1+1=", "completion": "2", "advantage": 0.5}]
CARD = "---\ntags:\n- trl\n---\n\n# A run\n"
FILES = {
    "run.json": RUN,
    "log.jsonl": LOG,
    "trainer_state.json": {"log_history": LOG, "global_step": 2},
    "checkpoint-2/trainer_state.json": {"log_history": LOG[:3]},
    "eval/results.json": RESULTS,
    "extrapolated/next/alpha-0.5/extrapolation.json": EXTRAPOLATION,
    "completions/completions_00001.parquet": COMPLETIONS,
    "README.md": CARD,
}
VALUES = [
    *(None, True, 0, -1, 3, 1.5, float("nan"), float("inf"), -float("inf"), 1e308, -1e300, 5e-324, 10**30, -(10**400)),
    *(
        "",
        "3",
        "$",
        "a$b_c^d\\frac{",
        "\\",
        "<b>&amp;",
        "|`|",
        "a\nb\r\n",
        "\x00\x1b",
        "\ud800",
        "x" * 400,
        "../../x",
        "π🙂",
    ),
    *([], [[]], [None], {}, {"a": 1}, [1, "a"]),
]
NAMES = ["a $x$ $ run", "x_y^z", "<script>", "a|b`c`", "a\nb", "{}%s", "'\"", "-o", "\udcff", "π🙂", "a=b", "[x]"]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        with open(path, "wb") as file:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_run(folder: Path, name: str | None = None, content: Any = None) -> Path:
    """A run with all files but `name`, of which it has another content."""
    for file, usual in FILES.items():
        if file != name and (file != "log.jsonl" or name != "trainer_state.json"):
            write(folder / file, {**usual, "model": str(folder)} if file == "eval/results.json" else usual)
    if content is not None:
        write(folder / name, content)
    if name != "trainer_state.json":
        for file in ("trainer_state.json", "checkpoint-2/trainer_state.json"):  # older than the log, which is read
            if (folder / file).is_file():
                os.utime(folder / file, (1, 1))
    if name == "checkpoint-2/trainer_state.json":
        for file in ("log.jsonl", "trainer_state.json"):
            (folder / file).unlink()
    return folder


# ---- Corruptions of the file as a whole


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _huge(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(2**40)


WHOLE: dict[str, Callable[[Path], Any]] = {
    "absent": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": _cut,
    "pipe": _pipe,
    "folder": _folder,
    "loop": _loop,
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "huge": _huge,
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "latin-1": lambda path: path.write_bytes('{"a": "ü"}\n{}'.encode("latin-1")),
    "mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "deep": lambda path: path.write_text("[" * 100_000),
    **{
        f"only {json.dumps(value)}": lambda path, v=value: path.write_text(json.dumps(v))
        for value in (None, 3, "a", [])
    },
    **{
        f"only {json.dumps(value)}": lambda path, v=value: path.write_text(json.dumps(v))
        for value in ([1], {}, {"a": 1})
    },
}


# ---- Corruptions of a value in it


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to each value in nested lists and objects."""
    if path:
        yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield from places(member, (*path, key))


def changed(content: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which the value at that place was changed."""
    found = copy.deepcopy(content)
    inside = found
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return found


def broken_contents(name: str, rng: random.Random, per_place: int) -> Iterator[tuple[str, Any]]:
    """What the file might say instead."""
    content = FILES[name]
    for path in places(content):
        what = "/".join(map(str, path))
        yield f"no {what}", changed(content, path, lambda inside, key: inside.__delitem__(key))
        for value in rng.sample(VALUES, per_place):
            put = lambda inside, key, value=value: inside.__setitem__(key, value)  # noqa: E731
            yield f"{what} is {value!r:.20}", changed(content, path, put)
        if isinstance(path[-1], str):
            text = rng.choice([value for value in VALUES if isinstance(value, str)])

            def rename(inside: dict, key: str, text: str = text) -> None:
                inside[key.replace("MATH-500", text.replace("/", "-")) if "MATH-500" in key else text] = inside.pop(
                    key
                )

            yield f"{what} called {text!r:.20}", changed(content, path, rename)
    if name.endswith(("log.jsonl", "trainer_state.json")):
        log = content if isinstance(content, list) else content["log_history"]
        for what, entries in {
            "reversed": log[::-1],
            "twice": log * 2,
            "one": log[:1],
            "steps by 10**9": [{**entry, "step": entry["step"] * 10**9} for entry in log],
            "one step": [{**entry, "step": 1} for entry in log],
            "no steps": [{k: v for k, v in entry.items() if k != "step"} for entry in log],
            "mixed": [entry | {"lookahead/update_time": "a", "eval_runtime": None} for entry in log],
        }.items():
            yield what, entries if isinstance(content, list) else {"log_history": entries}


def hostile_folders(root: Path, seed: int = 0, per_place: int = 2) -> Iterator[tuple[str, Path]]:
    """Writes run folders, and says what is wrong with each."""
    rng = random.Random(seed)
    count = 0

    def next_folder() -> Path:
        nonlocal count
        count += 1
        return root / f"{count:04d}" / (rng.choice(NAMES) if rng.random() < 0.3 else "run")

    for name in FILES:
        for what, corrupt in WHOLE.items():
            folder = write_run(next_folder(), *([name, FILES[name]] if "trainer_state" in name else []))
            corrupt(folder / name)
            yield f"{name}: {what}", folder
    for name in FILES:
        if name not in ("README.md", "completions/completions_00001.parquet"):
            for what, content in broken_contents(name, rng, per_place):
                yield f"{name}: {what}", write_run(next_folder(), name, content)
