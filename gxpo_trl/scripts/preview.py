"""Shows a recipe's task: two prompts as the model sees them, and the rewards of right and wrong answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from datasets import Dataset, DatasetDict, IterableDatasetDict
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from ..evaluation.benchmark import tokenize_prompts
from ..tasks.datasets import text_of_cell
from ..tasks.examples import GOLD_COLUMNS, without_chat_template
from ..tasks.names import resolve_model
from ..tasks.task import name_of, reward_sum, spoken, try_rewards
from .arguments import Recipe
from .building import load_benchmark, load_data, load_rewards, own_tokenizer


WEIGHTS = ("*.safetensors", "*.bin")
FORMS = ("the right answer", "the same in a box", "the same in tags")
WRONG_FORMS = ("another's answer", "that in a box", "that in tags")
UNREACHABLE = (ConnectionError, LocalEntryNotFoundError, httpx.TransportError)


def open_data(recipe: Recipe) -> DatasetDict | IterableDatasetDict | None:
    """The recipe's data; `None` if it is on the Hub and the Hub can't be reached."""
    try:
        return load_data(recipe)
    except (ValueError, OSError) as error:
        if is_unreachable(error):
            return None
        raise


def is_unreachable(error: BaseException) -> bool:
    """Whether an error comes from a Hub that can't be reached, and not from a wrong name."""
    while error is not None:
        if isinstance(error, UNREACHABLE):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_task(recipe: Recipe, data: DatasetDict | IterableDatasetDict | None) -> str:
    """The data, two prompts as the model will see them, and their rewards.

    Raises:
        ValueError: If the model's folder holds no model, a reward fails, or a benchmark is not available.
    """
    tokenizer = _open_model(recipe)
    if data is None:
        names = recipe.script.dataset_name or ", ".join(found.path for found in recipe.mixture.datasets)
        return f"The data           not opened: the Hub can't be reached, and {names} is there\n"
    rows = _first_rows(data[recipe.script.dataset_train_split])
    lines = [f"The data           {_count(data, recipe)} with the columns {', '.join(rows.column_names)}"]
    if tokenizer is not None and tokenizer.chat_template is None:
        rows = without_chat_template(rows, recipe.model.model_name_or_path)
    lines += _describe_prompts(rows.select(range(min(2, len(rows)))), tokenizer, recipe)
    if not recipe.script.reward_model_name_or_path:
        lines += _describe_rewards(rows, recipe)
    return "\n".join([*lines, *_describe_benchmarks(recipe), ""])


def _open_model(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; `None` if it is on the Hub and the Hub can't be reached."""
    name = resolve_model(recipe.model.model_name_or_path)
    if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in WEIGHTS):
        raise ValueError(f"`model_name_or_path: {name}` is a folder without weights. Name one that holds a model.")
    try:
        return own_tokenizer(recipe)
    except OSError:
        if Path(name).is_dir():
            raise
        return None


def _first_rows(split: Any, count: int = 16) -> Dataset:
    return Dataset.from_list(list(split.take(count)))


def _count(data: DatasetDict | IterableDatasetDict, recipe: Recipe) -> str:
    split = data[recipe.script.dataset_train_split]
    return f"{len(split):,} examples" if isinstance(split, Dataset) else "a stream of examples"


def _describe_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe) -> Iterator[str]:
    model = recipe.model.model_name_or_path
    if tokenizer is None:
        yield f"Two prompts        not shown: the tokenizer of {model} can't be read here"
        return
    options = recipe.training.chat_template_kwargs or {}
    for i, ids in enumerate(tokenize_prompts(rows["prompt"][:], tokenizer, **options)):
        yield f"Prompt {i + 1}           as {model} sees it, {len(ids)} tokens:"
        yield from (f"  | {line}" for line in tokenizer.decode(ids).split("\n"))


def _describe_rewards(rows: Dataset, recipe: Recipe) -> Iterator[str]:
    """The rewards of the first example for the right answer in several forms, a wrong answer and none."""
    rewards = reward_sum(load_rewards(recipe), recipe.training.reward_weights)
    names = list(map(name_of, rewards.functions))
    of_parts = [f"{name} × {weight:g}" for name, weight in zip(names, rewards.weights, strict=True)]
    yield f"Rewards            {' + '.join(of_parts)}"
    row, said = rows[0], {}
    golds = _golds(rows, recipe)
    if golds[0]:
        said |= dict(zip(FORMS, spoken(golds[0]), strict=True))
    if others := [gold for gold in golds if gold and gold != golds[0]]:
        said |= dict(zip(WRONG_FORMS, spoken(others[0]), strict=True))
    said["nothing"] = ""
    totals = {}
    for form, completion in said.items():
        parts = try_rewards(rewards, row, "the data", completion)
        present = [weight * part for weight, part in zip(rewards.weights, parts, strict=True) if part is not None]
        totals[form] = sum(present) if present else None
        weighted = [f"{w:g} × {_number(part)}" for w, part in zip(rewards.weights, parts, strict=True)]
        detail = f" = {' + '.join(weighted)}" if len(parts) > 1 else ""
        yield f"                   {_number(totals[form])}{detail}  for {form}, {completion!r:.80}"
    if not golds[0]:
        yield (
            "                   No column has right answers, so their reward can't be shown. Set "
            f"`answer_column`, or name it one of {', '.join(GOLD_COLUMNS)}."
        )
    elif max(totals[form] or 0.0 for form in FORMS) <= max(totals[form] or 0.0 for form in said if form not in FORMS):
        yield ("                   A right answer gets no more than a wrong one. The rewards may expect another form.")


def _golds(rows: Dataset, recipe: Recipe) -> list[str]:
    wanted = (recipe.problems.answer_column, *GOLD_COLUMNS)
    column = next((column for column in wanted if column in rows.column_names), None)
    return [""] * len(rows) if column is None else [text_of_cell(cell) for cell in rows[column][:]]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _describe_benchmarks(recipe: Recipe) -> Iterator[str]:
    """The number of problems of each benchmark, and what scores them."""
    for name in recipe.benchmarks.eval_benchmarks or []:
        try:
            task = load_benchmark(name, recipe)
            task.check_rewards()
        except (ValueError, OSError) as error:
            if not is_unreachable(error):
                raise
            yield f"Benchmark          {name}: not opened, the Hub can't be reached"
        else:
            functions = () if task.rewards is None else task.rewards.functions
            by = " + ".join(map(name_of, functions)) or f"right answers ({task.kind})"
            yield f"Benchmark          {name}: {len(task.problems):,} problems, scored by {by}"
