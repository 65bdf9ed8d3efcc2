"""Kills runs of `gxpo train` and goes on with them: is the end that of the run which nobody killed, bit for bit?

    python tests/kill_runs.py --random 100 --aimed 30          # of a full model
    python tests/kill_runs.py --random 100 --aimed 30 --lora

Each run is a fork of this process, which has imported everything, and dies of a SIGKILL at a random moment. Its model
card has no picture, which would take half of the time. The aimed
ones die while a checkpoint or the final model is being written: half of them at a moment after its writing has begun,
half of them in the middle of a file, by the system's limit on the size of files. Then `--resume_from_checkpoint last`
goes on until the run is over, and once more, which has to change nothing.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import conftest  # noqa: F401  offline, as the tests are
import torch

from gxpo_trl.reporting import card
from gxpo_trl.scripts.train import main as train_command
from gxpo_trl.tasks import arithmetic


RECIPE = {
    **{"model_name_or_path": "gxpo_trl/tiny", "dataset_name": "gxpo_trl/arithmetic", "update_rule": "gxpo"},
    **{"reward_funcs": "arithmetic_reward", "per_device_train_batch_size": 4, "num_generations": 4},
    **{"max_completion_length": 8, "max_steps": 6, "learning_rate": 1e-3, "gate_warmup_steps": 1, "seed": 0},
    **{"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "eval_strategy": "no", "report_to": "none"},
    **{"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "dataloader_pin_memory": "false"},
    **{"disable_tqdm": "true", "loss_type": "grpo"},
}
LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}
PLACES = ("checkpoint-2", "checkpoint-4", "checkpoint-6", "end")
OF_ONE_PART = ("time", "per_second", "memory", "train_loss")
"""Of the log: the last is Trainer's mean over the steps since it was started."""
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def command(folder: Path, lora: bool, *options: str) -> list[str]:
    settings = RECIPE | (LORA if lora else {}) | {"output_dir": folder}
    return [*(word for k, v in settings.items() for word in (f"--{k}", str(v))), *options]


arithmetic.sample_problems = functools.cache(arithmetic.sample_problems)
card._curve = lambda run: None


# ---- One run, in a process of its own


def begin(arguments: list[str], said: Path, limit: tuple[str, int] | None = None, modules: Path | None = None) -> int:
    """Forks a run, and returns its process.

    Args:
        arguments (`list[str]`): Of `gxpo train`.
        said (`Path`): What it says.
        limit (`tuple[str, int]`, *optional*): A place, and the size at which a file is cut from there on.
        modules (`Path`, *optional*): The names of what it has imported.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        if limit is not None:
            die_within_a_file(*limit)
        train_command(arguments)
        if modules is not None:
            modules.write_text("\n".join(sorted(sys.modules)))
        code = 0
    except SystemExit as ended:
        print(ended.code, flush=True)
        code = 1 if isinstance(ended.code, str) else ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def die_within_a_file(place: str, size: int) -> None:
    """From the making of a folder on, or from the last checkpoint on, a file that grows too large ends the process."""

    def watch(event: str, arguments: tuple) -> None:
        begins = event == "os.mkdir" and str(arguments[0]).endswith(place)
        ends = place == "end" and event == "open" and str(arguments[0]).endswith("checkpoint-6/trainer_state.json")
        if begins or ends:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)


def end(process: int) -> int:
    """How a process ended: its exit code, or the signal with a minus."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after(process: int, seconds: float) -> bool:
    """Whether it was killed; it may have ended before."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return end(process) == -signal.SIGKILL


def wait_for(path: Path, process: int) -> None:
    """Until a file or folder is there, or the process is gone."""
    while not path.exists() and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0002)


# ---- What became of it


def outcome(folder: Path) -> dict:
    """What two runs have to agree in: weights, log without times, gate and counts."""
    weights = {name: (folder / name).read_bytes() for name in WEIGHTS if (folder / name).is_file()}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    state = json.loads((folder / "checkpoint-6" / "lookahead_state.json").read_text())
    timeless = [{k: v for k, v in entry.items() if not any(word in k for word in OF_ONE_PART)} for entry in log]
    return {"weights": weights, "log": timeless, "gate": state}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def go_on(folder: Path, lora: bool, said: Path) -> str | None:
    """Goes on until the run is over. Returns what went wrong."""
    arguments = command(folder, lora, "--resume_from_checkpoint", "last")
    code = end(begin(arguments, said))
    if code and "is whole" in said.read_text() and len(list(folder.glob("checkpoint-*"))) == 1:
        shutil.rmtree(next(folder.glob("checkpoint-*")))  # the first one was broken off: as the sentence says
        code = end(begin(arguments, said))
    if code:
        return f"exit {code}: {said.read_text()[-2000:]}"
    before = contents(folder)
    code = end(begin(arguments, said))
    if code or "has ended after 6 steps" not in said.read_text() or contents(folder) != before:
        return f"the finished run was not left as it was: {said.read_text()[-2000:]}"
    return None


class Attack:
    """Runs that are killed, and one that is not.

    Args:
        folder (`Path`): For all of them.
        lora (`bool`): Whether an adapter is trained.
        seed (`int`): Decides the moments.
    """

    def __init__(self, folder: Path, lora: bool, seed: int = 0):
        self.folder, self.lora, self.random = folder, lora, random.Random(seed)
        self.said = folder / "said.txt"
        whole = folder / "whole"
        self._run(whole, folder / "modules.txt")
        for module in (folder / "modules.txt").read_text().splitlines():
            with contextlib.suppress(Exception):  # those that a run makes
                importlib.import_module(module)
        arithmetic.load_arithmetic()
        self.expected, started = outcome(whole), time.perf_counter()
        self._run(folder / "again")
        self.seconds = time.perf_counter() - started
        if outcome(folder / "again") != self.expected:
            raise RuntimeError("Two runs that nobody killed differ: there is nothing to compare.")
        files = [path for path in (whole / "checkpoint-6").iterdir() if path.is_file()]
        times = [path.stat().st_mtime for path in files]
        self.writing, self.largest = max(times) - min(times), max(path.stat().st_size for path in files)
        self.found: Counter[str] = Counter()

    def _run(self, folder: Path, modules: Path | None = None) -> None:
        if code := end(begin(command(folder, self.lora), self.said, modules=modules)):
            raise RuntimeError(f"exit {code}: {self.said.read_text()}")

    def at_random(self) -> str | None:
        return self._attack(
            lambda run: kill_after(begin(command(run, self.lora), self.said), self._moment(self.seconds))
        )

    def at_a_checkpoint(self, number: int) -> str | None:
        place, by_size = PLACES[number % len(PLACES)], number % (2 * len(PLACES)) < len(PLACES)

        def kill(run: Path) -> bool:
            if by_size:
                size = int(self.largest ** self.random.uniform(0.3, 1))
                return end(begin(command(run, self.lora), self.said, (place, size))) == -signal.SIGXFSZ
            process = begin(command(run, self.lora), self.said)
            wait_for(run / ("checkpoint-6/trainer_state.json" if place == "end" else place), process)
            return kill_after(process, self._moment(1.2 * self.writing))

        return self._attack(kill)

    def _moment(self, seconds: float) -> float:
        return self.random.uniform(0, seconds)

    def _attack(self, kill) -> str | None:
        """Returns what went wrong."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        self.found["killed"] += kill(run)
        names = {path.name for path in run.glob("checkpoint-*")} if run.is_dir() else set()
        fault = go_on(run, self.lora, self.said)
        if fault is None:
            self.found["had a partial checkpoint"] += bool(list(run.glob("partial-checkpoint-*")))
            found = outcome(run)
            different = [part for part, expected in self.expected.items() if found[part] != expected]
            fault = f"{' and '.join(different)} differ" if different else None
        self.found["failed" if fault else "as the whole run"] += 1
        return f"with {sorted(names)}: {fault}" if fault else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=100, help="kills at a random moment")
    parser.add_argument("--aimed", type=int, default=30, help="kills while something is being saved")
    parser.add_argument("--lora", action="store_true", help="of an adapter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder), options.lora, options.seed)
        print(f"A run takes {attack.seconds:.1f} s, a checkpoint {1000 * attack.writing:.0f} ms.", flush=True)
        for kind, number in (("random", options.random), ("aimed", options.aimed)):
            attack.found.clear()
            for i in range(number):
                fault = attack.at_random() if kind == "random" else attack.at_a_checkpoint(i)
                if fault is not None or i % 10 == 9:
                    print(f"{kind} {i}: {fault or 'as the whole run'}", flush=True)
            failed += attack.found["failed"]
            print(f"{kind}: {dict(attack.found)} of {number}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
