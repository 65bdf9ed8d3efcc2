"""A single run: its settings, its environment, and completions early and late."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ...run_folder import completion_files, open_file, printable
from ..runs import Run
from ..tables import Table
from .section import Section


def run_section(run: Run) -> Section:
    """Settings, environment, and completions early and late."""
    section = Section("The run")
    changed = run.about.get("changed", {})
    if changed:
        rows = [[name, json.dumps(value, ensure_ascii=False, default=str)] for name, value in sorted(changed.items())]
        section.tables.append(Table("settings", "Settings that differ from the defaults", ["setting", "value"], rows))
    if run.about:
        names = ("trainer", "model", "rewards", "training_examples", "parameters", "trainable_parameters", "processes",
                 "completions_per_step", "started", "machine", "python", "package", "versions")  # fmt: skip
        rows = [[name.replace("_", " "), _text(run.about[name])] for name in names if run.about.get(name) is not None]
        section.tables.append(Table("environment", "What was trained, on what", ["", ""], rows))
    files = completion_files(run.folder)
    if files:
        for title, path in (("Early", files[0]), ("Late", files[-1]))[: len(files)]:
            try:
                section.samples.extend(_samples(path, title))
            except ValueError as error:
                section.notes.append(str(error))
    else:
        section.notes.append("No completions were kept: `log_completions: true` keeps them.")
    return section


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _samples(path: Path, when: str, count: int = 3) -> list[dict[str, str]]:
    rows, samples = _first_rows(path, count), []
    for row in rows:
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
        scores = [f"{name} {value:g}" for name, value in numbers.items()]
        title = f"{when}: step {row['step']}"
        texts = {name: _message(row[name]) for name in ("prompt", "completion")}
        samples.append({"title": title, "score": ", ".join(scores), **texts})
    return samples


def _first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    with open_file(path) as file:
        try:
            rows = next(pyarrow.parquet.ParquetFile(file).iter_batches(count), None)
            rows = [] if rows is None else rows.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not a complete parquet file: {error}") from error
    for name in ("step", "prompt", "completion"):
        if rows and name not in rows[0]:
            raise ValueError(f"{path} has no column `{name}`.")
    return rows


def _message(value) -> str:
    """A text, or the last of a conversation's messages."""
    is_conversation = isinstance(value, list) and value and isinstance(value[-1], dict)
    return printable(str(value[-1].get("content") if is_conversation else value))
