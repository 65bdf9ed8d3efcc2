"""Broken recipes by the hundred: each has to work, or to end in one sentence that leaves nothing behind.

    python tests/mutate_recipes.py 1000 --seed 1        # counts what became of them, and shows the worst

A case is a recipe of the package with the embedded model and task in it, changed in one to three places. It is read
and built in a process of its own, as `gxpo train` does it, up to where training would begin.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml

from gxpo_trl.scripts import train
from gxpo_trl.scripts.recipes import recipe_names, recipe_path


TIME_LIMIT = 60.0
ON_THIS_MACHINE = {"model_name_or_path": "gxpo_trl/tiny", "dataset_name": "gxpo_trl/arithmetic", "use_cpu": True}
ON_THIS_MACHINE |= {"reward_funcs": ["arithmetic_reward"], "use_vllm": False, "bf16": False, "report_to": "none"}
ON_THIS_MACHINE |= {"gradient_checkpointing": False, "eval_benchmarks": ["arithmetic"], "eval_steps": 5}
NO_PROBLEM_SET = ("prompt", "system_prompt", "problem_column", "answer_column")
VALUES = [  # as YAML spells them: of every type, and at the ends of their ranges
    *("null", "true", "false", "yes", "no", "on", "0", "1", "-1", "-7", "5.7", "1.0", "1e-5", "1.0e+30", "1e30"),
    *(".nan", ".inf", "-.inf", "nan", "inf", '"5"', '"1e-5"', '""', "''", '" "', "2024-01-01", "2024-13-45"),
    *("12:30:00", "2024-01-01T10:00:00Z", "0x10", "0o17", "010", "1_000", str(10**30), "-9223372036854775809"),
    *("[]", "[1]", "[a, b]", "[null]", "[[1]]", "[{}]", "{}", "{a: 1}", "{1: 2}", "{a: {b: [c]}}", "[1, a, null]"),
    *("!!python/object:os.system {}", "!!python/name:os.system", "!!binary aGVsbG8=", "!!set {a, b}", "!!int foo"),
    *("!!bool maybe", "!!timestamp then", "!!omap [a: 1]", "!local x", "&anchor 5", "*nowhere", "&a [*a]", "<<"),
    *('"a\\0b"', '"\\ud800"', "'é\u202e☃'", "x" * 5000, "[" * 40 + "]" * 40, "/", "/dev/null", "/nowhere/at/all"),
    *(".", "..", "~", "gxpo_trl/tiny", "nobody/nothing", "steps", "auto", "none", "|\n  some\n  text", ">\n  text"),
    *(
        "'{\"a\": 1}'",
        "'{'",
        "'{}'",
        "'[1, 2]'",
        "-",
        "?",
        ":",
        "%",
        "@",
        "`",
        "a: b",
        "# nothing",
        "'",
        '"',
        "{",
        "[",
    ),
]
KEYS = [
    *("on", "5", "null", "true", "2024-01-01", "1.5", "help", "config", "env", "text", "h", "self", "class"),
    "[a]",
]
KEYS += ["? {a: 1}\n", "learning-rate", "Learning_rate", "lookahead_step", "--seed", "", "'a b'", "é", "datasets"]
KEYS += ["reward_weights", "model_init_kwargs", "generation_kwargs", "lr_scheduler_kwargs", "optim", "optim_args"]
KEYS += ["deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "lora_target_modules"]
KEYS += ["prompts_per_step", "scale_max", "max_tokens_per_micro_batch", "trajectory_steps", "extrapolate_after"]
KEYS += ["eval_benchmarks", "resume_adapter", "resume_from_checkpoint", "label_names", "debug", "log_level", "dtype"]
KEYS += ["attn_implementation", "model_revision", "dataset_config", "prompt", "hub_strategy", "save_total_limit"]
LINES = [
    "---",
    "...",
    "<<: {seed: 1}",
    "<<: *nowhere",
    "<<: 5",
    "<<: [{seed: 1}, {seed: 2}]",
    "\tseed: 1",
    "  seed: 1",
]
LINES += ["- seed", "seed", "help: true", "config: x", "%YAML 9.9", "%TAG ! tag:x", "env: {PYTHONPATH: /tmp}"]
LINES += ["env: {GXPO_ALLOW_CODE_EXECUTION: 1}", "env: [a]", "env: {a=b: c}", "env: {1: 2}", "env:", "env: {A: {}}"]
LINES += ["x: &x [1, 2]\ny: &y [*x, *x]\nseed: [*y, *y]", "seed: &a {b: *a}", "}", "]", "\x0c", "\x07", "\ufeff"]
LAUGHS = ["&l0 [lol, lol]", *(f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))]
LINES += ["\n".join(f"laugh{i}: {line}" for i, line in enumerate(LAUGHS)) + "\nseed: *l11"]


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `works`, `sentence`, `usage`, `traceback`, `hang` or `left`, with what it said."""

    kind: str
    said: str


def base(name: str) -> dict:
    """A recipe of the package that can be built on this machine."""
    settings = yaml.safe_load(recipe_path(f"gxpo:{name}").read_text(encoding="utf-8"))
    if not name.startswith("tiny/"):
        settings |= {key: value for key, value in ON_THIS_MACHINE.items() if key in settings or key == "use_cpu"}
        settings |= {"load_in_4bit": False} if "load_in_4bit" in settings else {}
        settings = {key: value for key, value in settings.items() if key not in NO_PROBLEM_SET}
        settings.pop("attn_implementation", None)
    return settings | {"output_dir": "out/run"}


def mutate(random: random.Random, settings: dict) -> bytes:
    """A recipe's text with one to three faults in it."""
    lines = [
        f"{key}: {yaml.safe_dump(value, default_flow_style=True, width=10**6).split(chr(10))[0]}"
        for key, value in settings.items()
    ]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at = random.randrange(len(lines))
        key = lines[at].partition(":")[0]
        match random.choice(["value", "value", "value", "delete", "key", "repeat", "line", "misspell", "swap"]):
            case "value":
                lines[at] = f"{key}: {random.choice(VALUES)}"
            case "delete":
                del lines[at]
            case "key":
                lines.insert(at, f"{random.choice(KEYS)}: {random.choice(VALUES)}")
            case "repeat":
                lines.insert(random.randrange(len(lines)), lines[at])
            case "line":
                lines.insert(at, random.choice(LINES))
            case "misspell":
                place = random.randrange(len(key) + 1)
                lines[at] = key[:place] + random.choice(["", "s", "_", "-", " ", "X"]) + lines[at][place + 1 :]
            case "swap":
                other = random.choice(lines)
                lines[at] = f"{key}:{other.partition(':')[2]}"
    return corrupt(random, "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")


def corrupt(random: random.Random, text: bytes) -> bytes:
    """Now and then, a fault of the bytes as well, or a file that is none of a recipe at all."""
    chance = random.random()
    if chance > 0.15:
        return text
    at = random.randrange(len(text))
    return random.choice(
        [
            text[:at],
            text[:at] + random.randbytes(3) + text[at + 3 :],
            text[:at] + random.choice(b":#[]{}\"'\t&*!|>%@`,?-\0\r").to_bytes() + text[at:],
            text.replace(b"\n", b"\r\n"),
            text.decode("utf-8", "replace").encode("utf-16"),
            b"\xef\xbb\xbf" + text,
            text.replace(b"\n", b" "),
            text + b"\n---\n" + text,
            *(b"", b"\n\n", b"# nothing\n", b"null\n", b"- a\n- b\n", b"just words\n", b"5\n", random.randbytes(200)),
            b"[" * 3000,
            b"a: " + b"[" * 3000,
            b"a: " * 2000,
            b"x: " + b"y" * 300_000 + b"\n" + text,
        ]
    )


def cases(count: int, seed: int) -> Iterator[tuple[str, bytes, list[str]]]:
    """The name of a recipe, its broken text, and what the command line says beside it."""
    names = {name: base(name) for name in recipe_names()}
    draw = random.Random(seed)
    for _ in range(count):
        name = draw.choice(list(names))
        words = []
        if draw.random() < 0.15:
            key, value = draw.choice([*names[name], *KEYS]), draw.choice(VALUES)
            words = [f"--{key}", value] if draw.random() < 0.8 else [f"--{key}={value}"]
        yield name, mutate(draw, names[name]), [word.replace("\0", "") for word in words]


def run(text: bytes, words: list[str], folder: Path) -> Outcome:
    """Reads and builds one recipe, in a child of this process."""
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    said = folder.with_suffix(".said")
    child = os.fork()
    if child == 0:
        _in_child(["--config", str(path), *words], folder, said)
    status = _wait(child)
    printed = said.read_text(errors="replace")
    said.unlink()
    if status is None:
        return Outcome("hang", printed)
    kind = {0: "works", 1: "sentence", 2: "usage"}.get(os.waitstatus_to_exitcode(status), "traceback")
    if kind == "sentence" and len(printed.strip().splitlines()) > 1:
        kind = "lines"
    left = [found for found in folder.iterdir() if found != path]
    if left and kind != "works":
        return Outcome("left", f"{printed}\n{left}")
    return Outcome(kind, printed)


def _wait(child: int) -> int | None:
    """Its status, or `None` after the time limit, when it is killed."""
    end = time.monotonic() + TIME_LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(arguments: list[str], folder: Path, said: Path) -> None:
    """Ends the process: 0 where training would begin, 1 after a sentence, 2 after a usage message, 3 on the rest."""
    os.chdir(folder)
    with open(said, "w", errors="replace") as file:
        code = 3
        try:
            with contextlib.redirect_stderr(open(os.devnull, "w")), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                with mock.patch.multiple(train, train=_begin, train_around_extrapolation=_begin):
                    train.main(arguments)
            code = 0
        except _Begun:
            code = 0
        except SystemExit as ended:
            code = 1 if isinstance(ended.code, str) and ended.code.startswith("error: ") else ended.code or 0
            file.write(str(ended.code))
        except BaseException:
            traceback.print_exc(file=file)
        file.flush()
        os._exit(code if code in (0, 1, 2) else 3)


class _Begun(Exception):
    """Where training would begin."""


def _begin(*args, **kwargs):
    raise _Begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", nargs="*", default=["traceback", "hang", "left", "usage", "lines"])
    options = parser.parse_args()
    counts = collections.Counter()
    started = time.perf_counter()
    for i, (name, text, words) in enumerate(cases(options.count, options.seed)):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "case").mkdir()
            outcome = run(text, words, Path(folder) / "case")
        counts[outcome.kind] += 1
        if outcome.kind in options.show:
            print(f"---- {outcome.kind}, case {i}, {name}, {words}\n{outcome.said[-1500:]}", flush=True)
    print(dict(counts), f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
