"""Problem sets by name: their location, columns and rows.

A problem set has the columns `id`, `problem` and `answer`; `to_prompts` adds TRL's columns, `prompt` and `solution`.
Other data is named by its path: a file, a folder or a set on the Hub. It keeps its own columns. `examples.py` loads
data with its own prompts.
"""

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..spelling import nearest
from .answers import final_answer
from .answers.choice import LETTERS, format_choices
from .arithmetic import load_arithmetic
from .generated import is_generated
from .rewards import KINDS, date_text, listed


Row = dict[str, Any]
Column = str | Callable[[Row], Any]
"""A column's name, or a function that computes its value from a row."""

EMBEDDED_DATASET = "gxpo_trl/arithmetic"
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
NO_FOLDERS = (*FILE_TYPES, ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class ProblemSet:
    """Where a set of problems is and how its rows are read.

    Attributes:
        path (`str`): Of the Hub, or a builder of `datasets` such as `"json"`.
        problem, answer (`Column`): Where they are.
        config, split (`str`, *optional*): As for `load_dataset`.
        kind (`str`): The kind of its answers, see `tasks/rewards.py`.
        keep (`Callable[[Row], bool]`, *optional*): Which rows are used; unset for all.
        repeats (`bool`): Whether problems occur more than once; repeats are dropped.
        data_files (`str`, *optional*): As for `load_dataset`.
    """

    path: str
    problem: Column = "problem"
    answer: Column = "answer"
    config: str | None = None
    split: str | None = "test"
    kind: str = "maths"
    keep: Callable[[Row], bool] | None = None
    repeats: bool = False
    data_files: str | None = None


# ---- Rows of an unusual form


def _boxed_answer(row: Row) -> str | None:
    return final_answer(row["solution"])


def _is_level_3_to_5(row: Row) -> bool:
    return row["level"] in ("Level 3", "Level 4", "Level 5")


def _after_hashes(row: Row) -> str:
    return row["answer"].rpartition("####")[2]


def _without_instructions(row: Row) -> str:
    """DAPO's user message: an instruction, the problem, another instruction, with blank lines between them."""
    paragraphs = row["prompt"][0]["content"].split("\n\n")
    return "\n\n".join(paragraphs[1:-1])


def _ground_truth(row: Row) -> str:
    return row["reward_model"]["ground_truth"]


def _first_ground_truth(row: Row) -> str:
    return json.loads(row["reward_model"]["ground_truth"])[0]


def _user_message(row: Row) -> str:
    return row["prompt"][0]["content"]


def _has_answer(row: Row) -> bool:
    return bool(row["answer"])


def _joined_answers(row: Row) -> str:
    return ", ".join(row["final_answer"])


def _shuffled_choices(row: Row) -> list[str]:
    """GPQA's column names give the right answer away. The order is derived from the problem, and is always the
    same.
    """
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    random.Random(row["Question"]).shuffle(options)
    return options


def _gpqa_question(row: Row) -> str:
    return format_choices(row["Question"], _shuffled_choices(row))


def _gpqa_letter(row: Row) -> str:
    return LETTERS[_shuffled_choices(row).index(row["Correct Answer"])]


def _mmlu_question(row: Row) -> str:
    return format_choices(row["question"], row["options"])


PROBLEM_SETS = {
    # For training
    "MATH-3to5": ProblemSet(
        "DigitalLearningGmbH/MATH-lighteval", answer=_boxed_answer, split="train", keep=_is_level_3_to_5
    ),
    "MATH-train": ProblemSet("DigitalLearningGmbH/MATH-lighteval", answer=_boxed_answer, split="train"),
    "GSM8K-train": ProblemSet("openai/gsm8k", "question", _after_hashes, config="main", split="train"),
    "DAPO-Math-17k": ProblemSet(
        "BytedTsinghua-SIA/DAPO-Math-17k", _without_instructions, _ground_truth, split="train", repeats=True
    ),
    "Skywork-OR1": ProblemSet("Skywork/Skywork-OR1-RL-Data", _user_message, _first_ground_truth, split="math"),
    "OpenR1-Math": ProblemSet("open-r1/OpenR1-Math-220k", config="default", split="train", keep=_has_answer),
    # For evaluation
    "MATH-500": ProblemSet("HuggingFaceH4/MATH-500"),
    "AMC23": ProblemSet("math-ai/amc23", "question"),
    "GSM8K": ProblemSet("openai/gsm8k", "question", _after_hashes, config="main"),
    "Minerva": ProblemSet("math-ai/minervamath", "question"),
    "OlympiadBench": ProblemSet(
        "Hothan/OlympiadBench", "question", _joined_answers, config="OE_TO_maths_en_COMP", split="train"
    ),
    "AIME24": ProblemSet("HuggingFaceH4/aime_2024", split="train"),
    "AIME25": ProblemSet("math-ai/aime25"),
    "OlymMATH-easy": ProblemSet("RUC-AIBOX/OlymMATH", config="en-easy"),
    "GPQA-diamond": ProblemSet(
        "Idavidrein/gpqa", _gpqa_question, _gpqa_letter, config="gpqa_diamond", split="train", kind="choice"
    ),
    "MMLU-Pro": ProblemSet("TIGER-Lab/MMLU-Pro", _mmlu_question, kind="choice"),
    "arithmetic": ProblemSet(EMBEDDED_DATASET, "prompt", "solution", kind="arithmetic"),
}


def has_name(name: str) -> bool:
    """Whether a problem set is known by name here, with its columns and the kind of its answers."""
    return name in PROBLEM_SETS or name == EMBEDDED_DATASET


def problem_set(
    name: str, problem_column: str | None = None, answer_column: str | None = None, kind: str | None = None
) -> ProblemSet:
    """The problem set of a name or a path.

    Args:
        name (`str`): One of `PROBLEM_SETS`; a `.json`, `.jsonl` or `.parquet` file; a folder that `load_dataset` or
            `load_from_disk` can read; or `owner/dataset` of the Hub.
        problem_column, answer_column (`str`, *optional*): For a path; `problem` and `answer` if unset.
        kind (`str`, *optional*): Of the answers at a path; `"maths"` if unset.

    Raises:
        ValueError: If there is none of that name (the message has the nearest), no such file, or a type that can't be
            read.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no kind of answer `{kind}`{nearest(kind, KINDS)} Kinds are {', '.join(KINDS)}.")
    if name == EMBEDDED_DATASET and not (problem_column or answer_column):
        name = "arithmetic"
    if name in PROBLEM_SETS:
        if problem_column or answer_column or kind:
            raise ValueError(f"{name} has columns and a kind of its own. Leave out those that are given.")
        return PROBLEM_SETS[name]
    options = {"problem": problem_column or "problem", "answer": answer_column or "answer", "kind": kind or "maths"}
    path = Path(name)
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise ValueError(f"{name} is not one of {', '.join(FILE_TYPES)}.")
    if path.is_file():
        return ProblemSet(FILE_TYPES[path.suffix], data_files=name, split="train", **options)
    if path.is_dir() or name.count("/") == 1 and path.suffix not in NO_FOLDERS:
        return ProblemSet(name, split=None, **options)
    if path.suffix in NO_FOLDERS:
        raise ValueError(f"There is no file {name}.")
    raise ValueError(
        f"There is no problem set `{name}`{nearest(name, PROBLEM_SETS)} Names are {', '.join(PROBLEM_SETS)}; anything "
        "else is a file, a folder, or a path of the Hub such as `owner/dataset`."
    )


def load_problems(
    name: str,
    split: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Loads a problem set.

    Args:
        name, problem_column, answer_column, kind: As for `problem_set`.
        split (`str`, *optional*): Another split than the set's own. Of a folder and a Hub path that is `train`, else
            the first.
        limit (`int`, *optional*): Uses only this many problems, from the start.

    Returns:
        `Dataset` with the columns `id`, `problem` and `answer`, and all others that a file, a folder or a Hub path
        has. Columns that are called `problem` or `answer` already give way to the chosen ones.

    Raises:
        ValueError: If the set, its split or a column does not exist, an answer is empty, or nothing is left.
    """
    chosen = problem_set(name, problem_column, answer_column, kind)
    return problems_of(load_rows(chosen, name, split, prefer=("train",)), chosen, name, limit)


def problems_of(rows: Dataset, chosen: ProblemSet, name: str, limit: int | None = None) -> Dataset:
    """The problems in the rows of a set, as `load_problems` returns them."""
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    if chosen.keep is not None:
        rows = rows.filter(chosen.keep)
    _check_columns(rows, chosen, name)
    problems = [{"problem": _read(row, chosen.problem), "answer": _read(row, chosen.answer)} for row in rows]
    if chosen.repeats:
        problems = list({row["problem"]: row for row in problems}.values())
    problems = problems[:limit]
    if not problems:
        raise ValueError(f"{name} has no problems.")
    empty = [i for i, row in enumerate(problems) if not (row["problem"] and row["answer"])]
    if empty:
        raise ValueError(f"{name} has {len(empty)} rows without a problem or an answer, the first is row {empty[0]}.")
    if has_name(name):
        return Dataset.from_list(_numbered(problems))
    rows = rows.select(range(len(problems))).remove_columns(shadowed(rows, chosen))
    return with_columns(
        rows,
        id=[str(i) for i in range(len(problems))],
        **{key: [row[key] for row in problems] for key in ("problem", "answer")},
    )


def shadowed(rows: Dataset, chosen: ProblemSet) -> list[str]:
    """The columns that are called as those of a problem set are, where others were chosen."""
    names = {"problem": chosen.problem, "answer": chosen.answer}
    return [name for name, column in names.items() if column != name and name in rows.column_names]


def with_columns(rows: Dataset, **columns: list) -> Dataset:
    """Adds these columns to the rows, unless they have columns of these names."""
    for name, values in columns.items():
        if name not in rows.column_names:
            rows = rows.add_column(name, values)
    return rows


def replace_columns(rows: Dataset, **columns: list) -> Dataset:
    """Adds these columns to the rows, in the place of those of these names."""
    return with_columns(rows.remove_columns([name for name in columns if name in rows.column_names]), **columns)


def hub_dataset(name: str | None) -> str | None:
    """Where a dataset is on the Hub, for links; `None` for what is not there, and for several at once."""
    if name in PROBLEM_SETS:
        name = PROBLEM_SETS[name].path
    if name is None or name == EMBEDDED_DATASET or is_generated(name):
        return None
    if Path(name).exists() or Path(name).suffix in FILE_TYPES:
        return None
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _numbered(rows: Iterable[Row]) -> list[Row]:
    return [{"id": str(i), **row} for i, row in enumerate(rows)]


def load_rows(chosen: ProblemSet, name: str, split: str | None = None, prefer: tuple[str, ...] = ()) -> Dataset:
    """The rows of a set as they are.

    Args:
        chosen (`ProblemSet`): Where they are.
        name (`str`): The name that the user gave.
        split (`str`, *optional*): Another than the set's own.
        prefer (`tuple[str, ...]`): Splits to use if the set does not name one; otherwise the first split.

    Raises:
        ValueError: If they can't be loaded.
    """
    split = split or chosen.split
    try:
        loaded = _load(chosen, split)
    except KeyError as error:
        raise ValueError(f"{name} has no split {error}. It has train, test.") from error
    except (ValueError, OSError, DatasetGenerationError, StopIteration) as error:
        raise ValueError(f"{name} can't be loaded: {reason_of(error)}.") from error
    if isinstance(loaded, Dataset):
        return loaded
    if split is not None and split not in loaded:
        raise ValueError(f"{name} has no split '{split}'. It has {', '.join(loaded)}.")
    return loaded[split or next((found for found in prefer if found in loaded), next(iter(loaded)))]


def reason_of(error: Exception) -> str:
    """Why data can't be loaded: of a broken file what its reader says. Of an empty one there may be no message."""
    said = str(error.__cause__ or error).rstrip(".!")
    return said if said and "corresponds to no data" not in said else "it is empty"


def _load(chosen: ProblemSet, split: str | None) -> Dataset | DatasetDict:
    if chosen.path == EMBEDDED_DATASET:
        return load_arithmetic() if split is None else load_arithmetic()[split]
    if is_saved_dataset(chosen.path):
        return load_from_disk(chosen.path)
    return load_dataset(chosen.path, name=chosen.config, data_files=chosen.data_files, split=split)


def is_saved_dataset(path: str) -> bool:
    """Whether a folder is what `save_to_disk` writes."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _check_columns(rows: Dataset, chosen: ProblemSet, name: str) -> None:
    for setting, column in (("problem_column", chosen.problem), ("answer_column", chosen.answer)):
        if isinstance(column, str) and column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise ValueError(f"{name} has no column `{column}`; set `{setting}` to one of {columns}.")


def _read(row: Row, column: Column) -> str:
    return text_of_cell(row[column] if isinstance(column, str) else column(row))


def text_of_cell(value: Any) -> str:
    """A cell as text: of a conversation its last message, of several answers all, of 2.0 "2", of nothing "".

    The loader of JSON makes times of dates, whose text is the date, and floats of integers that don't fit, of which
    only the first digits are right: 1.2345678901234568e+29.
    """
    if isinstance(value, list):
        value = value[-1]["content"] if value and isinstance(value[-1], dict) else listed(value, text_of_cell)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, date):
        value = date_text(value)
    return "" if value is None or value != value else str(value).strip()  # NaN is an empty cell


def to_prompts(problems: Dataset, prompt: str | None = None, system_prompt: str | None = None) -> Dataset:
    """Adds TRL's columns: `prompt`, a list of messages, and `solution`, the answer. All others stay.

    Args:
        problems (`Dataset`): From `load_problems`.
        prompt (`str`, *optional*): Template of the user's message with `{problem}` in it, braces of its own doubled;
            unset for only the problem.
        system_prompt (`str`, *optional*): Unset for none.

    Raises:
        ValueError: If the template has no `{problem}`, or other fields.
    """
    template = "{problem}" if prompt is None else prompt
    try:
        holds_problem = "\0" in template.format(problem="\0")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`prompt` is not a template ({error!r}): double the braces that are not `{{problem}}`."
        ) from error
    if not holds_problem:
        raise ValueError("`prompt` has no {problem} in it, where the problem would go.")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    asked, answers = (map(text_of_cell, problems[column][:]) for column in ("problem", "answer"))
    prompts = [[*system, {"role": "user", "content": template.format(problem=problem)}] for problem in asked]
    return replace_columns(problems, prompt=prompts, solution=list(answers))


def find_overlap(train: Dataset, evaluation: Dataset) -> list[str]:
    """The problems of `evaluation` that are in `train` too, by text without case, spacing, punctuation and dollars.

    Args:
        train, evaluation (`Dataset`): With the column `problem`, or `prompt`, whose last message is compared, or both.
    """
    known = {fold(text) for texts in _problem_texts(train) for text in texts}
    return [texts[0] for texts in _problem_texts(evaluation) if any(fold(text) in known for text in texts)]


def _problem_texts(rows: Dataset) -> list[tuple[str, ...]]:
    """Of each row. The column `problem` of data where another was chosen may be something else."""
    names = [name for name in ("problem", "prompt") if name in rows.column_names]
    return list(zip(*([text_of_cell(cell) for cell in rows[name][:]] for name in names), strict=True))


def fold(text: str) -> str:
    """A problem without case, spacing, punctuation and LaTeX spacing commands."""
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[^\w+\-*/=<>^\\.,]", "", text.lower())
    return re.sub(r"(?<!\d)[.,]|[.,](?!\d)", "", text)
