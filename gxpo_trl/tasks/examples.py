"""Data with prompts, by name: problem sets, files, folders, sets of the Hub, generated tasks.

A user's file either has problems and answers, which become prompts by a template, or it has a column `prompt` in TRL's
form: a text, or a list of messages. All its columns are kept for the reward.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .arithmetic import load_arithmetic
from .datasets import (
    EMBEDDED_DATASET,
    FILE_TYPES,
    PROBLEM_SETS,
    ProblemSet,
    has_name,
    is_saved_dataset,
    load_rows,
    problem_set,
    problems_of,
    reason_of,
    replace_columns,
    shadowed,
    text_of_cell,
    to_prompts,
)
from .generated import generate, is_generated


logger = get_logger(__name__)

Prompt = str | list[dict[str, Any]]
"""A text, or messages."""

GOLD_COLUMNS = ("solution", "answer", "ground_truth", "gold", "target", "label")
"""Columns that may hold the right answers of data with its own prompts, in this order."""
NOT_OF_DATA = ("prompts", "completions", "completion_ids")
"""Arguments that TRL passes to a reward function in addition to the columns."""


def load_examples(
    name: str,
    split: str | None = None,
    prompt: str | None = None,
    system_prompt: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    reasoning_gym: dict[str, Any] | None = None,
    prefer: tuple[str, ...] = ("train",),
    needs_template: bool = True,
) -> Dataset:
    """Loads one split of the data that a name stands for.

    Args:
        name (`str`): As for `problem_set`, or `reasoning_gym/<task>`, several of them joined by `+`.
        split (`str`, *optional*): Another split than the data's own.
        prompt, system_prompt: As for `to_prompts`; for data that has problems, not prompts.
        problem_column, answer_column, limit: As for `load_problems`.
        reasoning_gym (`dict[str, Any]`, *optional*): As for `generate`.
        prefer (`tuple[str, ...]`): Splits to use if the data does not name one; otherwise the first.
        needs_template (`bool`): Whether an unused template is an error or a warning.

    Returns:
        `Dataset` with the columns `prompt` and, if there are right answers, `solution`, and all of its own.

    Raises:
        ValueError: If there is no such data, it has neither prompts nor problems, or a row has none.
    """
    if is_generated(name):
        split = split or next(found for found in (*prefer, "train") if found in ("train", "test"))
        rows = to_prompts(generate(name, split, reasoning_gym), prompt, system_prompt)
        return rows.select(range(min(len(rows), limit or len(rows))))
    chosen = problem_set(name, problem_column, answer_column)
    rows = load_rows(chosen, name, split, prefer)
    columns = (problem_column, answer_column)
    return with_prompts(rows, chosen, name, prompt, system_prompt, *columns, limit, needs_template)


def with_prompts(
    rows: Dataset,
    chosen: ProblemSet,
    name: str,
    prompt: str | None,
    system_prompt: str | None,
    problem_column: str | None,
    answer_column: str | None,
    limit: int | None = None,
    needs_template: bool = True,
) -> Dataset:
    """Rows with their own prompts, or with prompts made from their problems."""
    has_template = prompt is not None or system_prompt is not None
    if not has_own_prompts(rows, name, problem_column, has_template):
        examples = to_prompts(problems_of(rows, chosen, name, limit), prompt, system_prompt)
        own = [] if has_name(name) else shadowed(rows, chosen)
        return replace_columns(examples, **{column: rows[column][: len(examples)] for column in own})
    if has_template:
        said = f"{name} has prompts of its own, and would not use `prompt` and `system_prompt`."
        if needs_template:
            raise ValueError(f"{said} Name its `problem_column` and `answer_column`, or leave these out.")
        logger.warning(f"{said} Its prompts are used as they are.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    _check_prompts(rows, name)
    gold = gold_column(rows, name, answer_column)
    if gold in (None, "solution"):
        return rows
    return replace_columns(rows, solution=[text_of_cell(cell) for cell in rows[gold][:]])


def has_own_prompts(rows: Dataset, name: str, problem_column: str | None, has_template: bool) -> bool:
    """Whether the column `prompt` is used, and not a template with the problem."""
    if has_name(name) or problem_column is not None or "prompt" not in rows.column_names:
        return False
    return not (has_template and {"problem", "answer"} <= set(rows.column_names))


def gold_column(rows: Dataset, name: str, answer_column: str | None) -> str | None:
    """The column with the right answers of data with its own prompts, if there is one.

    Raises:
        ValueError: If there is no column of the given name.
    """
    if answer_column is not None and answer_column not in rows.column_names:
        raise ValueError(
            f"{name} has no column `{answer_column}`; set `answer_column` to one of {', '.join(rows.column_names)}."
        )
    return answer_column or next((column for column in GOLD_COLUMNS if column in rows.column_names), None)


def check_columns(columns: Iterable[str], name: str) -> None:
    """Refuses data with a column that TRL would give a reward function twice."""
    if taken := [column for column in NOT_OF_DATA if column in columns]:
        raise ValueError(f"{name} has a column `{taken[0]}`, which TRL gives rewards itself. Rename the column.")


def _check_prompts(rows: Dataset, name: str) -> None:
    check_columns(rows.column_names, name)
    if not len(rows):
        raise ValueError(f"{name} has no rows.")
    for i, cell in enumerate(rows["prompt"][:]):
        if not _is_prompt(cell):
            raise ValueError(
                f"{name} has no prompt in row {i}: expected a text, or messages with `role` and `content`, got "
                f"{cell!r:.60}."
            )


def _is_prompt(cell: Any) -> bool:
    if isinstance(cell, list):
        return bool(cell) and all(isinstance(m, dict) and m.get("role") and m.get("content") for m in cell)
    return isinstance(cell, str) and bool(cell)


def resolve_dataset(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    split: str = "train",
    prompt: str | None = None,
    system_prompt: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    reasoning_gym: dict[str, Any] | None = None,
    test_split: str = "test",
) -> DatasetDict | IterableDatasetDict:
    """The dataset that a recipe names, with TRL's columns.

    Args:
        name (`str`): `gxpo_trl/arithmetic`, which needs no network; a problem set or a file, or several joined by `+`,
            which are loaded as the split `split`; `reasoning_gym/<task>`, or several joined by `+`; a folder; or any
            that `load_dataset` knows, which has to have its prompts.
        config, streaming: As for `load_dataset`.
        split, test_split (`str`): What the examples are called, and those that are held out, where there are any.
        prompt, system_prompt, problem_column, answer_column, reasoning_gym: As for `load_examples`.

    Raises:
        ValueError: If there is a prompt for a dataset that has its own, and what `load_examples` raises.
    """
    columns = {"problem_column": problem_column, "answer_column": answer_column}
    template = {"prompt": prompt, "system_prompt": system_prompt}
    if is_generated(name):
        splits = {split: "train", test_split: "test"}
        made = {key: load_examples(name, of, **template, reasoning_gym=reasoning_gym) for key, of in splits.items()}
        return DatasetDict(made)
    names = [name] if Path(name).exists() else [part.strip() for part in name.split("+")]
    if Path(name).is_dir():
        return _load_folder(name, config, **template, **columns)
    if len(names) > 1 or name in PROBLEM_SETS or Path(name).suffix in FILE_TYPES or problem_column or answer_column:
        return DatasetDict({split: _joined([load_examples(part, **template, **columns) for part in names])})
    if prompt or system_prompt:
        raise ValueError(
            f"{name} is assumed to have its own prompts, and would not use `prompt` and `system_prompt`. Name its "
            "`problem_column` and `answer_column`, or leave these out."
        )
    if name == EMBEDDED_DATASET:
        return load_arithmetic()
    return load_dataset(name, name=config, streaming=streaming)


def _load_folder(name: str, config: str | None, problem_column: str | None, answer_column: str | None, **template):
    chosen = problem_set(name, problem_column, answer_column)
    try:
        loaded = load_from_disk(name) if is_saved_dataset(name) else load_dataset(name, name=config)
    except (ValueError, OSError, DatasetGenerationError, StopIteration) as error:
        raise ValueError(f"{name} can't be loaded: {reason_of(error)}.") from error
    splits = {"train": loaded} if isinstance(loaded, Dataset) else loaded
    columns = {"problem_column": problem_column, "answer_column": answer_column}
    return DatasetDict(
        {split: with_prompts(rows, chosen, name, **template, **columns) for split, rows in splits.items()}
    )


def _joined(sets: list[Dataset]) -> Dataset:
    """Joins several sets of examples. Repeated prompts are kept once."""
    if len(sets) == 1:
        return sets[0]
    try:
        rows = concatenate_datasets(sets)
    except ValueError as error:
        raise ValueError(f"The sets that `+` joins have columns of other types: {error}.") from error
    first = {json.dumps(cell): i for i, cell in reversed(list(enumerate(rows["prompt"][:])))}
    rows = rows.select(sorted(first.values()))
    if "id" in rows.column_names and len(set(rows["id"][:])) < len(rows):
        rows = replace_columns(rows, id=[str(i) for i in range(len(rows))])
    return rows


# ---- Models without a chat template


def without_chat_template(rows: Dataset, model: str) -> Dataset:
    """Prompts for a model whose tokenizer has no chat template: a single user message becomes its text.

    Raises:
        ValueError: If a prompt has more messages.
    """
    if isinstance(rows[0]["prompt"], str):
        return rows
    prompts = [_as_text(prompt, model) for prompt in rows["prompt"][:]]
    return replace_columns(rows, prompt=prompts)


def _as_text(prompt: list[dict[str, Any]], model: str) -> str:
    if len(prompt) != 1 or prompt[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(
            f"The tokenizer of {model} has no chat template, and a prompt has the messages {roles}: without a "
            "template there is one text. Leave out `system_prompt` and say it in `prompt`, give texts as prompts, or "
            "give the tokenizer a template."
        )
    return prompt[0]["content"]
