"""Evaluates models on benchmarks, for `gxpo eval`."""

import dataclasses
import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase

from ..run_folder import (
    RESULTS_NAME,
    SETTINGS_NAME,
    TABLE_NAME,
    BenchmarkResults,
    EvaluationResults,
    check_kind,
    check_model,
    check_output_dir,
    read_json,
    samples_file,
    write_whole,
)
from ..spelling import nearest
from ..tasks.names import resolve_model, resolve_reward
from ..tasks.rewards import KINDS, judge
from ..tasks.task import OWN_REWARD, RewardSum, Row, Task, in_a_box, load_task, reward_sum, spoken
from .benchmark import (
    Record,
    check_slugs,
    checksum,
    parts_folder,
    read_samples,
    run_benchmark,
    slug,
    tokenize_prompts,
    write_samples,
)
from .fingerprints import Fingerprints, fingerprints
from .results import ShownResults, benchmark_results, results_table, why_doubtful
from .sampling import Sampler, load_model, load_tokenizer, transformers_sampler, vllm_sampler
from .settings import EvaluationArguments


logger = get_logger(__name__)

Results = dict[str, BenchmarkResults]
"""By benchmark."""
CONTENT = "content"
"""The name of the checksums in `settings.json`."""


def evaluate(settings: EvaluationArguments) -> dict[str, Results]:
    """Samples and judges every benchmark with every model, and writes the results.

    Writes, in `output_dir`, `table.md` of all models there, and a folder for each model with `results.json`,
    `settings.json` and the samples of each benchmark, `BENCHMARK.jsonl`. Existing samples are not sampled again.

    Returns:
        `dict[str, Results]`: Results by model and benchmark.

    Raises:
        ValueError: If models or benchmarks are missing or invalid, or the output folder holds an evaluation with other
            settings, of other weights or with another file of rewards. It is raised before anything is sampled.
    """
    # Without an accelerator, each process would believe to be the only one. Setting the CPU explicitly avoids that.
    PartialState(cpu=not torch.accelerator.is_available())
    if not settings.models:
        raise ValueError("There is nothing to evaluate. Set `models`.")
    check_output_dir(settings.output_dir)
    for model in settings.models:
        check_model(resolve_model(model), "models")
    tasks = load_tasks(settings)
    folders = {model: Path(settings.output_dir) / slug(model) for model in settings.models}
    for task in tasks:
        task.check_rewards()
    tokenizers = {model: load_tokenizer(resolve_model(model)) for model in settings.models}
    asked = {model: [task.asked_of(tokenizer, model) for task in tasks] for model, tokenizer in tokenizers.items()}
    for model, folder in folders.items():
        if list(folders.values()).count(folder) > 1:
            raise ValueError(f"Two of the models would share the folder {folder}. Evaluate them one at a time.")
        _check_settings(folder, model, settings)
    made_with = {model: _check_content(folder, model, settings) for model, folder in folders.items()}
    before = {model: _read_results(folder) for model, folder in folders.items()}
    results = {}
    for model, folder in folders.items():
        content = {} if made_with[model] is None else {CONTENT: made_with[model]}
        _write_json(folder / SETTINGS_NAME, {"model": model, **settings.determining(), **content})
        PartialState().wait_for_everyone()
        missing = [task for task in asked[model] if not samples_file(folder, slug(task.name)).is_file()]
        if missing:
            with _make_sampler(model, tokenizers[model], settings, missing) as sampler:
                for task in missing:
                    run_benchmark(task, sampler, tokenizers[model], folder, settings)
            del sampler
        results[model] = {}
        for task in asked[model]:
            records = _read_own_samples(folder, task)
            results[model][task.name] = benchmark_results(records, settings.ks)
            if reason := why_doubtful(records):
                logger.warning(f"{task.name} with {model}: {reason}")
            if PartialState().is_main_process:  # left by a kill after they were gathered
                shutil.rmtree(parts_folder(folder, task), ignore_errors=True)
        _write_json(folder / RESULTS_NAME, {"model": model, "benchmarks": before[model] | results[model]})
        gc.collect()
    if PartialState().is_main_process:
        write_whole(Path(settings.output_dir) / TABLE_NAME, results_table(_all_results(settings)) + "\n")
    return results


def load_tasks(settings: EvaluationArguments) -> list[Task]:
    """The tasks that the settings name as benchmarks.

    Raises:
        ValueError: If there is none, or one is not available.
    """
    if not settings.benchmarks:
        raise ValueError("There is nothing to evaluate on. Set `benchmarks`.")
    check_slugs("benchmarks", settings.benchmarks)
    names = ("prompt", "system_prompt", "problem_column", "answer_column", "kind", "limit", "threshold")
    options = {name: getattr(settings, name) for name in (*names, "reasoning_gym")}
    rewards = load_rewards(settings)
    return [load_task(name, **options, rewards=rewards, overrides_scorers=True) for name in settings.benchmarks]


def load_rewards(settings: EvaluationArguments) -> RewardSum | None:
    """The reward functions that the settings name, with their weights; `None` if they name none."""
    if not settings.reward_funcs:
        return None
    return reward_sum([resolve_reward(name) for name in settings.reward_funcs], settings.reward_weights)


@contextmanager
def _make_sampler(
    model: str, tokenizer: PreTrainedTokenizerBase, settings: EvaluationArguments, tasks: list[Task]
) -> Iterator[Sampler]:
    path = resolve_model(model)
    if settings.backend == "vllm":
        options = settings.chat_template_kwargs or {}
        prompts = (tokenize_prompts(task.problems["prompt"][:], tokenizer, **options) for task in tasks)
        longest = max(len(ids) for of_task in prompts for ids in of_task)
        with vllm_sampler(path, settings, longest) as sampler:
            yield sampler
    else:
        yield transformers_sampler(load_model(path, settings, PartialState().device), tokenizer, settings)


def _read_own_samples(folder: Path, task: Task) -> list[Record]:
    path = samples_file(folder, slug(task.name))
    records = read_samples(path)
    _check_problems(path, records, task)
    return records


def _check_problems(path: Path, records: list[Record], task: Task) -> None:
    """Refuses samples of other problems than those of the task."""
    asked = [(str(place), checksum(row)) for place, row in enumerate(task.problems)]
    if list(dict.fromkeys((record.id, record.asked) for record in records)) != asked:
        raise ValueError(f"{path} holds samples of other problems than {task.name}. Use another `output_dir`.")


def _read_results(folder: Path) -> Results:
    """The results of all benchmarks that were evaluated before, to which those of others are added."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return {}
    try:
        return read_json(path, EvaluationResults)["benchmarks"]
    except ValueError as error:
        raise ValueError(f"{error} Remove the file: it is made again from the samples next to it.") from error


def _all_results(settings: EvaluationArguments) -> dict[str, Results]:
    """The results of all models in the output folder, those of earlier calls first."""
    found, own = {}, {slug(model) for model in settings.models}
    paths = sorted(Path(settings.output_dir).glob(f"*/{RESULTS_NAME}"), key=lambda path: path.stat().st_mtime)
    for path in sorted(paths, key=lambda path: path.parent.name in own):
        try:
            of_model: EvaluationResults = read_json(path, EvaluationResults)
            check_kind(of_model["benchmarks"], dict[str, ShownResults], str(path))
        except ValueError as error:
            logger.warning(f"{TABLE_NAME} is without the model of a damaged file: {error}")
        else:
            found[of_model["model"]] = of_model["benchmarks"]
    return found


def _check_settings(folder: Path, model: str, settings: EvaluationArguments) -> None:
    claimed = folder / SETTINGS_NAME
    if not claimed.is_file():
        return
    before = {**EvaluationArguments().determining(), **_read_settings(folder)}
    now = {"model": model, **settings.determining()}
    different = [f"`{name}: {before.get(name)}`" for name in now if before.get(name) != now[name]]
    if different:
        raise ValueError(
            f"{folder} holds an evaluation with {', '.join(different)}. Use these settings, or another `output_dir`."
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / SETTINGS_NAME, dict[str, Any])
    except ValueError as error:
        raise ValueError(
            f"{error} Use another `output_dir`: what the samples there were drawn with is lost."
        ) from error


def _check_content(folder: Path, model: str, settings: EvaluationArguments) -> Fingerprints | None:
    """Refuses a folder whose samples are of another content of the same names.

    Returns:
        `Fingerprints`, *optional*: What its samples are of; `None` if an earlier version has not recorded it.
    """
    now = fingerprints(model, settings)
    if not (folder / SETTINGS_NAME).is_file():
        return now
    before = _read_settings(folder).get(CONTENT)
    if before is None:
        logger.warning(
            f"{folder} was evaluated by an earlier version, which has not recorded the content of {model} and of the "
            "rewards. Its samples are used as they are."
        )
        return None
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    if "model" in changed:
        raise ValueError(f"{model} has changed since it was evaluated in {folder}. Use another `output_dir`.")
    if changed:
        raise ValueError(
            f"The file of `{changed[0]}` has changed since {folder} was evaluated. Use another `output_dir`, or judge "
            "the samples again with `verify_only`."
        )
    return before | now


def _write_json(path: Path, content: dict[str, Any]) -> None:
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")


def verify_again(
    path: Path, ks: Sequence[int], tasks: Sequence[Task] = (), kind: str | None = None
) -> tuple[BenchmarkResults, int]:
    """Judges the recorded completions of a samples file again, and writes them to `NAME.verified.jsonl` next to it.

    Args:
        path (`Path`): The samples file.
        ks (`Sequence[int]`): For pass@k and maj@k.
        tasks (`Sequence[Task]`): If reward functions score, the task of the samples; it may be one of several.
        kind (`str`, *optional*): Another kind of the recorded answers, if no task is given.

    Returns:
        `tuple[BenchmarkResults, int]`: The results, and how many scores differ from the recorded ones.

    Raises:
        ValueError: If there are no samples, reward functions would score and their task is not given, none of the
            tasks belongs to the samples, or its data is not what was sampled.
    """
    records = read_samples(path)
    if not records:
        raise ValueError(f"{path} holds no samples.")
    if tasks:
        again = _judge_task_again(path, records, _task_of(path, tasks))
    else:
        again = _judge_kinds_again(path, records, kind)
    write_samples(path.with_suffix(".verified.jsonl"), again)
    changed = sum(new.score != old.score for new, old in zip(again, records, strict=True))
    return benchmark_results(again, ks), changed


def _task_of(path: Path, tasks: Sequence[Task]) -> Task:
    for task in tasks:
        if slug(task.name) == path.stem:
            return task
    names = ", ".join(f"{task.name} ({slug(task.name)}.jsonl)" for task in tasks)
    raise ValueError(f"None of `benchmarks` has its samples in {path.name}: {names}. Name the data that was sampled.")


def _judge_task_again(path: Path, records: list[Record], task: Task) -> list[Record]:
    if any(int(record.id) >= len(task.problems) for record in records):
        raise ValueError(f"{path} holds samples of other problems than {task.name}.")
    asked = {record.id: task.problems[int(record.id)] for record in records}
    known = {place: {checksum(row), checksum(_as_text(row))} for place, row in asked.items()}
    if any(record.asked and record.asked not in known[record.id] for record in records):
        raise ValueError(
            f"{path} holds samples of other problems than {task.name}: its rows, or `prompt`, `system_prompt` and the "
            "columns, are others than when it was sampled. Give the same ones, or evaluate again."
        )
    judged = task.judge([asked[record.id] for record in records], [record.completion for record in records])
    return [
        dataclasses.replace(record, kind=task.kind, **vars(found))
        for record, found in zip(records, judged, strict=True)
    ]


def _as_text(row: Row) -> Row:
    """The row as a model without a chat template is asked it, if it can be."""
    prompt = row["prompt"]
    return row if isinstance(prompt, str) or len(prompt) != 1 else row | {"prompt": prompt[0]["content"]}


def _judge_kinds_again(path: Path, records: list[Record], kind: str | None) -> list[Record]:
    kinds = [kind or record.kind for record in records]
    if others := set(kinds) - set(KINDS):
        if kind is not None:
            raise ValueError(
                f"There is no kind of answer `{kind}`{nearest(kind, KINDS)} Kinds are {', '.join(KINDS)}."
            )
        raise ValueError(
            f"{path} was scored by reward functions ({', '.join(others)}). Name the data as `benchmarks`, and its "
            "`reward_funcs`."
        )
    if kind is not None and not all(record.gold for record in records):
        raise ValueError(f"{path} has no right answers for `kind: {kind}`. Leave it out, or evaluate data that has.")
    verdicts = {}
    for found in set(kinds):
        chosen = [i for i, of_record in enumerate(kinds) if of_record == found]
        judged = judge(found, [records[i].completion for i in chosen], [records[i].gold for i in chosen])
        verdicts |= dict(zip(chosen, judged, strict=True))
    return [
        dataclasses.replace(record, kind=kinds[i], reward=verdicts[i].score, **dataclasses.asdict(verdicts[i]))
        for i, record in enumerate(records)
    ]


def verify_gold(task: Task) -> list[tuple[str, str, float | None]]:
    """Judges the right answers against themselves: the error rate of the verifier.

    Reward functions are given each answer in several forms, and the best counts.

    Returns:
        `list[tuple[str, str, float | None]]`: Id, answer and score of those that are not accepted.

    Raises:
        ValueError: If there are no right answers.
    """
    if task.gold is None:
        raise ValueError(f"{task.name} has no right answers to judge. Set `answer_column`.")
    places = [place for place, row in enumerate(task.problems) if task.golds([row])[0]]
    rows = [task.problems[place] for place in places]
    golds = task.golds(rows)
    forms = [*zip(*map(spoken, golds), strict=True)] if task.kind == OWN_REWARD else [map(in_a_box, golds)]
    judged = [task.judge(rows, list(said)) for said in forms]
    best = [max(of_row, key=lambda found: found.reward or 0.0) for of_row in zip(*judged, strict=True)]
    found = zip(places, golds, best, strict=True)
    return [(str(place), gold, judgement.reward) for place, gold, judgement in found if not judgement.score]
