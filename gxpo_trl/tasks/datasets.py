"""Problem sets by name: where they are, which columns hold what, and which rows count.

A problem set comes out as rows of `id`, `problem` and `answer`, all strings; `to_prompts` adds TRL's columns, `prompt`
and `solution`. Anything else can be named by its path, a local file or a set of the Hub, with its columns.
"""

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..spelling import nearest
from .arithmetic import load_arithmetic
from .choice import LETTERS, format_choices
from .maths import final_answer
from .rewards import KINDS


Row = dict[str, Any]
Column = str | Callable[[Row], Any]
"""A column's name, or what makes its value of a row."""

EMBEDDED_DATASET = "gxpo_trl/arithmetic"
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class ProblemSet:
    """Where a set of problems is and how its rows are read.

    Attributes:
        path (`str`): Of the Hub, or a builder of `datasets` such as `"json"`.
        problem, answer (`Column`): Where they are.
        config, split (`str`): As for `load_dataset`.
        kind (`str`): Of its answers, see `tasks/rewards.py`.
        keep (`Callable[[Row], bool]`, *optional*): Which rows count; unset for all.
        repeats (`bool`): Whether problems occur more than once, and are to be taken once.
        data_files (`str`, *optional*): As for `load_dataset`.
    """

    path: str
    problem: Column = "problem"
    answer: Column = "answer"
    config: str | None = None
    split: str = "test"
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
    """GPQA's columns tell the right answer by their names. The order is the problem's own, the same every time."""
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


def problem_set(
    name: str, problem_column: str | None = None, answer_column: str | None = None, kind: str | None = None
) -> ProblemSet:
    """The problem set of a name, a file or a Hub path.

    Args:
        name (`str`): One of `PROBLEM_SETS`; a `.json`, `.jsonl` or `.parquet` file; or `owner/dataset` of the Hub.
        problem_column, answer_column (`str`, *optional*): For a file or a Hub path; `problem` and `answer` if unset.
        kind (`str`, *optional*): Of a file's or a Hub path's answers; `"maths"` if unset.

    Raises:
        ValueError: If there is none of that name (the nearest is named), no such file, or a type that can't be read.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no kind of answer `{kind}`{nearest(kind, KINDS)} Kinds are {', '.join(KINDS)}.")
    if name in PROBLEM_SETS:
        if problem_column or answer_column or kind:
            raise ValueError(f"{name} has columns and a kind of its own. Leave out those that are given.")
        return PROBLEM_SETS[name]
    options = {"problem": problem_column or "problem", "answer": answer_column or "answer", "kind": kind or "maths"}
    path = Path(name)
    if path.is_file() and path.suffix not in FILE_TYPES:
        raise ValueError(f"{name} is none of {', '.join(FILE_TYPES)}.")
    if path.is_file():
        return ProblemSet(FILE_TYPES[path.suffix], data_files=name, split="train", **options)
    if path.suffix in (*FILE_TYPES, ".csv", ".tsv", ".txt"):
        raise ValueError(f"There is no file {name}.")
    if name.count("/") == 1:
        return ProblemSet(name, split="train", **options)
    raise ValueError(
        f"There is no problem set `{name}`{nearest(name, PROBLEM_SETS)} Names are {', '.join(PROBLEM_SETS)}; anything "
        "else is a file, or a path of the Hub such as `owner/dataset`."
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
        split (`str`, *optional*): Another split than the set's own.
        limit (`int`, *optional*): Takes the first so many problems.

    Returns:
        `Dataset` with the columns `id`, `problem` and `answer`, all strings.

    Raises:
        ValueError: If the set, its split or a column does not exist, an answer is empty, or nothing is left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    chosen = problem_set(name, problem_column, answer_column, kind)
    rows = _load(chosen, name, split or chosen.split)
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
    return Dataset.from_list(_numbered(problems))


def hub_dataset(name: str | None) -> str | None:
    """Where a dataset is on the Hub, for links; `None` for what is not there, and for several at once."""
    if name in PROBLEM_SETS:
        name = PROBLEM_SETS[name].path
    if name is None or name == EMBEDDED_DATASET or Path(name).exists() or Path(name).suffix in FILE_TYPES:
        return None
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _joined(sets: list[Dataset]) -> Dataset:
    """Several sets of problems as one. What is in more than one of them is in it once."""
    if len(sets) == 1:
        return sets[0]
    return Dataset.from_list(_numbered({row["problem"]: row for problems in sets for row in problems}.values()))


def _numbered(rows: Iterable[Row]) -> list[Row]:
    return [{"id": "", **row} | {"id": str(i)} for i, row in enumerate(rows)]


def _load(chosen: ProblemSet, name: str, split: str) -> Dataset:
    try:
        if chosen.path == EMBEDDED_DATASET:
            return load_arithmetic()[split]
        return load_dataset(chosen.path, name=chosen.config, data_files=chosen.data_files, split=split)
    except KeyError as error:
        raise ValueError(f"{name} has no split {error}. It has train, test.") from error
    except (ValueError, OSError, DatasetGenerationError, StopIteration) as error:
        raise ValueError(f"{name} can't be loaded: {error or 'it is empty'}.") from error


def _check_columns(rows: Dataset, chosen: ProblemSet, name: str) -> None:
    for setting, column in (("problem_column", chosen.problem), ("answer_column", chosen.answer)):
        if isinstance(column, str) and column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise ValueError(f"{name} has no column `{column}`; set `{setting}` to one of {columns}.")


def _read(row: Row, column: Column) -> str:
    value = row[column] if isinstance(column, str) else column(row)
    if isinstance(value, list):  # a conversational prompt, or several answers
        value = value[-1]["content"] if value and isinstance(value[-1], dict) else ", ".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def to_prompts(problems: Dataset, prompt: str | None = None, system_prompt: str | None = None) -> Dataset:
    """Adds TRL's columns: `prompt`, a list of messages, and `solution`, the answer.

    Args:
        problems (`Dataset`): From `load_problems`.
        prompt (`str`, *optional*): Template of the user's message with `{problem}` in it, braces of its own doubled;
            unset for the problem alone.
        system_prompt (`str`, *optional*): Unset for none.

    Raises:
        ValueError: If the template has no `{problem}`, or other fields.
    """
    template = "{problem}" if prompt is None else prompt
    try:
        holds_problem = "\0" in template.format(problem="\0")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`prompt` is no template, {error!r}: double the braces that are not `{{problem}}`."
        ) from error
    if not holds_problem:
        raise ValueError("`prompt` has no {problem} in it, where the problem would stand.")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def ask(row: Row) -> Row:
        user = {"role": "user", "content": template.format(problem=row["problem"])}
        return {"prompt": [*system, user], "solution": row["answer"]}

    return Dataset.from_list([{**row, **ask(row)} for row in problems])


def resolve_dataset(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    split: str = "train",
    prompt: str | None = None,
    system_prompt: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """The dataset that a recipe names, with TRL's columns.

    Args:
        name (`str`): `gxpo_trl/arithmetic`, which needs no network; a problem set or a file, or several joined by `+`,
            which are loaded as the split `split` with prompts; or any that `load_dataset` knows, which has to have its
            prompts.
        config, streaming: As for `load_dataset`.
        split (`str`): What the problems are called.
        prompt, system_prompt, problem_column, answer_column: As for `to_prompts` and `load_problems`.

    Raises:
        ValueError: If there is a prompt for a dataset that has its own, and what `load_problems` raises.
    """
    names = [name] if Path(name).is_file() else name.split("+")
    if len(names) > 1 or name in PROBLEM_SETS or Path(name).suffix in FILE_TYPES or problem_column or answer_column:
        problems = _joined([load_problems(part.strip(), None, problem_column, answer_column) for part in names])
        return DatasetDict({split: to_prompts(problems, prompt, system_prompt)})
    if prompt or system_prompt:
        raise ValueError(
            f"{name} is taken to have prompts of its own, and would not use `prompt` and `system_prompt`. Name its "
            "`problem_column` and `answer_column`, or leave these out."
        )
    if name == EMBEDDED_DATASET:
        return load_arithmetic()
    return load_dataset(name, name=config, streaming=streaming)


def find_overlap(train: Dataset, evaluation: Dataset) -> list[str]:
    """The problems of `evaluation` that are in `train` too, by text without case, spacing, punctuation and dollars.

    Args:
        train (`Dataset`): With the column `problem`, or else `prompt`, whose last message is compared.
        evaluation (`Dataset`): From `load_problems`.
    """
    if "problem" in train.column_names:
        texts = train["problem"][:]
    else:
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in train["prompt"][:]]
    known = {fold(text) for text in texts}
    return [problem for problem in evaluation["problem"][:] if fold(problem) in known]


def fold(text: str) -> str:
    """What is left of a problem when case, spacing, punctuation and the ways of setting LaTeX are taken away."""
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])|[^\w+\-*/=<>^\\.,]", "", text.lower())
    return re.sub(r"(?<!\d)[.,]|[.,](?!\d)", "", text)
