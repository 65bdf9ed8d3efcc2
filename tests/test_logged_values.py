"""What callbacks log may be anything: the run goes on, its checkpoints are whole, and numbers are read as such."""

import dataclasses
import json
import math
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_trainer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl import GXPOConfig, LookaheadTrainer
from gxpo_trl.callbacks.records import RunRecordCallback
from gxpo_trl.plain_values import plain
from gxpo_trl.reporting.runs import load_run


@dataclasses.dataclass
class Point:
    x: int


class Unwilling:
    def __float__(self):
        raise KeyError("no number")

    def __str__(self):
        return "unwilling"


KNOWN = {  # and what is read back
    "tensor": (torch.tensor(1.5), 1.5),
    "tensor with a gradient": (torch.tensor(1.5, requires_grad=True) * 2, 3.0),
    "one element": (torch.tensor([[2.5]]), 2.5),
    "bf16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "integers": (torch.tensor(7), 7),
    "truth": (torch.tensor(True), True),
    "several": (torch.ones(2), "tensor([1., 1.])"),
    "without data": (torch.ones(1, device="meta"), "tensor(..., device='meta', size=(1,))"),
    "complex": (torch.tensor(1j), "tensor(0.+1.j)"),
    "half": (np.float16(0.25), 0.25),
    "float64": (np.float64(0.1), 0.1),
    "int64": (np.int64(3), 3),
    "bool_": (np.bool_(False), False),
    "array": (np.array([4.0]), 4.0),
    "arrays": (np.arange(3), "[0 1 2]"),
    "datetime64": (np.datetime64("2025-01-02T03:04:05", "ns"), "2025-01-02T03:04:05.000000000"),
    "decimal": (Decimal("1.25"), 1.25),
    "fraction": (Fraction(1, 4), 0.25),
    "path": (Path("a/b"), "a/b"),
    "date": (date(2025, 1, 2), "2025-01-02"),
    "duration": (timedelta(seconds=1), "0:00:01"),
    "set": ({1}, "{1}"),
    "dataclass": (Point(1), "Point(x=1)"),
    "unwilling": (Unwilling(), "unwilling"),
    "none": (None, None),
    "text": ("text", "text"),
    "inf": (math.inf, math.inf),
    "-inf": (torch.tensor(-math.inf), -math.inf),
    "tuple": ((torch.tensor(1), [np.float32(0.5)]), [1, [0.5]]),
    "deep": ({"a": {1: torch.tensor(2.0)}, 2: {3}}, {"a": {"1": 2.0}, "2": "{3}"}),
}
LOGGED = {name: value for name, (value, _) in KNOWN.items()} | {
    5: torch.tensor(6),
    (1, 2): 3,
    "nan": np.float32("nan"),
}
READ = {name: value for name, (_, value) in KNOWN.items()} | {"5": 6, "(1, 2)": 3}


def test_values_become_what_json_knows():
    found = json.loads(json.dumps(plain(LOGGED), sort_keys=True))
    assert math.isnan(found.pop("nan")) and found == READ
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in READ.items()}


class Logging(TrainerCallback):
    """Logs all of it at the end of each step, and something more whenever it is told of that."""

    def __init__(self):
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.log(dict(LOGGED))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "tensor" in logs:
            self.trainer.log({"answer": torch.tensor(42)})


def assert_read(entries: list[dict], steps: list[int]) -> None:
    assert [entry["step"] for entry in entries if "tensor" in entry] == steps
    assert [(entry["step"], entry["answer"]) for entry in entries if "answer" in entry] == [(s, 42) for s in steps]
    for entry in entries:
        if "tensor" in entry:
            assert {name: entry[name] for name in READ} == READ and math.isnan(entry["nan"])


@pytest.mark.parametrize(
    "trainer_class, config, records",
    [(LookaheadTrainer, GXPOConfig, False), (LookaheadTrainer, GXPOConfig, True), (GRPOTrainer, GRPOConfig, True)],
)
def test_a_run_that_logs_anything_is_saved_resumed_and_read(tmp_path, trainer_class, config, records):
    for steps in (1, 2):
        trainer = make_trainer(tmp_path, trainer_class, config, max_steps=steps, save_strategy="steps", save_steps=1)
        callback = Logging()
        callback.trainer = trainer
        trainer.add_callback(callback)
        if records:
            trainer.add_callback(RunRecordCallback(trainer))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if steps == 2 else None)
    trainer.save_state()
    expected = [1, 2]
    assert_read(json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"], expected)
    assert_read(json.loads((tmp_path / "trainer_state.json").read_text())["log_history"], expected)
    if records:
        entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert_read(entries, expected)
        assert len(entries) == len(trainer.state.log_history)
    run = load_run(tmp_path)
    assert run.series("tensor") == ([1, 2], [1.5, 1.5]) and run.series("nan") == ([], [])
