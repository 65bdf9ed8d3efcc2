"""One task on one model: processes share the problems in batches. Each batch is sampled, judged and saved whole.

A batch is a file. An interrupted evaluation continues with the missing batches. A batch has its own seed, so that it
does not depend on which process made it, or on how many there are.
"""

import dataclasses
import json
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerState

from ..run_folder import samples_file, write_whole
from ..tasks.answers import Verdict
from ..tasks.datasets import FILE_TYPES
from ..tasks.examples import Prompt
from ..tasks.task import Task
from .sampling import Sample, Sampler
from .settings import EvaluationArguments


def slug(name: str) -> str:
    """The name of the file or folder for a benchmark or model: of a path, the last two parts."""
    path = Path(name)
    if path.suffix in FILE_TYPES:
        path = path.with_suffix("")
    parts = [part for part in path.parts if part not in ("/", "..", ".")] or path.resolve().parts[1:]
    return "--".join(parts[-2:])


def check_slugs(setting: str, names: Sequence[str]) -> None:
    """Refuses benchmarks that would share a file, or a name in the log.

    Raises:
        ValueError: Names the setting and those that share one.
    """
    for name in names:
        same = [other for other in names if slug(other) == slug(name)]
        if len(same) > 1:
            raise ValueError(
                f"Two of the benchmarks would share a file or a name, {slug(name)}: {', '.join(same)}. Leave one out "
                f"of `{setting}`, or rename it or its folder."
            )


@dataclass(frozen=True)
class Record:
    """One judged sample, as a line of the samples file.

    Attributes:
        id (`str`): The place of its problem in the task.
        kind (`str`): The kind of its answer.
        sample (`int`): Its number among those of its problem.
        completion (`str`): Its text.
        length (`int`): In tokens.
        truncated (`bool`): Whether it reached the length limit.
        gold, answer (`str`): The right answer, and the answer that was read, where these are known.
        score (`float`, *optional*): 1.0 if it is right, 0.0 if not, `None` if it could not be decided.
        seconds (`float`): Its share of the time of its batch.
        reward (`float`, *optional*): What was compared with the threshold.
        asked (`str`): A checksum of the problem, with all its columns.
    """

    id: str
    kind: str
    sample: int
    completion: str
    length: int
    truncated: bool
    gold: str
    answer: str | None
    score: float | None
    seconds: float = 0.0
    reward: float | None = None
    asked: str = ""
    failed: bool = False

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.score, self.answer, self.failed)


def run_benchmark(
    task: Task,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: EvaluationArguments,
) -> Path:
    """Samples and judges the missing batches, with all processes, and gathers all of them.

    Returns:
        `Path`: The samples file, `FOLDER/BENCHMARK.jsonl`: one line for each sample, in the task's order.

    Raises:
        ValueError: If there are batches of other problems.
    """
    state = PartialState()
    gathered = samples_file(folder, slug(task.name))
    if gathered.is_file():
        return gathered
    parts = parts_folder(folder, task)
    parts.mkdir(parents=True, exist_ok=True)
    batches = list(_batches(task, tokenizer, settings.problems_per_batch, settings.chat_template_kwargs or {}))
    numbers = range(len(batches))[state.process_index :: state.num_processes]
    own = {number: parts / f"{number:05d}.jsonl" for number in numbers}
    missing = [number for number in own if not _is_whole(own[number], task, batches[number][0], settings.samples)]
    counts = {number: len(batches[number][0]) * settings.samples for number in own}
    with tqdm(
        desc=task.name,
        total=sum(counts.values()),
        initial=sum(counts[number] for number in own.keys() - missing),
        unit=" samples",
        **({} if state.is_main_process else {"disable": True}),  # else `TQDM_DISABLE` says
    ) as bar:
        for number in missing:
            places, prompts = batches[number]
            batch_seed = zlib.crc32(f"{settings.seed}/{task.name}/{number}".encode())
            started = time.perf_counter()
            completions = sampler(prompts, settings.samples, batch_seed)
            records = judge_samples(task, places, completions)
            seconds = (time.perf_counter() - started) / len(records)
            write_samples(own[number], [dataclasses.replace(record, seconds=seconds) for record in records])
            bar.update(len(records))
    state.wait_for_everyone()
    if state.is_main_process:
        _gather(parts, gathered)
    state.wait_for_everyone()
    return gathered


def _is_whole(part: Path, task: Task, places: list[int], samples: int) -> bool:
    """Whether a batch exists already.

    Raises:
        ValueError: If it has other problems.
    """
    if not part.is_file():
        return False
    try:
        found = [(record.id, record.sample, record.asked) for record in read_samples(part)]
    except ValueError:  # the machine stopped before all of it was on the disk
        return False
    asked = {place: checksum(task.problems[place]) for place in places}
    expected = [(str(place), i, asked[place]) for place in places for i in range(samples)]
    if found != expected[: len(found)]:
        raise ValueError(f"{part} holds samples of other problems than {task.name}. Use another `output_dir`.")
    return len(found) == len(expected)


def parts_folder(folder: Path, task: Task) -> Path:
    """The folder of a task's batches until all are complete."""
    return folder / f"{slug(task.name)}.parts"


def _batches(
    task: Task, tokenizer: PreTrainedTokenizerBase, size: int, template_options: dict[str, Any]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Batches of problem indices with prompts of similar length, so that there is little padding; and the prompts'
    tokens.
    """
    tokens = tokenize_prompts(task.problems["prompt"][:], tokenizer, **template_options)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, [tokens[i] for i in chosen]


def tokenize_prompts(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, **template_options) -> list[list[int]]:
    """The tokens of prompts, as in TRL's trainers: texts are tokenized as they are, messages by the chat template."""
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **template_options}
    return tokenizer.apply_chat_template(prompts, **options)["input_ids"]


def judge_samples(
    task: Task, places: list[int], completions: list[list[Sample]], trainer_state: TrainerState | None = None
) -> list[Record]:
    """Scores the completions of some problems, (problems, samples); one record each.

    Args:
        task (`Task`): The task.
        places (`list[int]`): Indices of the problems in the task.
        completions (`list[list[Sample]]`): The completions of each problem.
        trainer_state (`TrainerState`, *optional*): Of the run, for reward functions.
    """
    own_rows = [task.problems[place] for place in places]
    pairs = [
        (place, row, i, sample)
        for place, row, own in zip(places, own_rows, completions, strict=True)
        for i, sample in enumerate(own)
    ]
    rows, samples = [row for _, row, *_ in pairs], [sample for *_, sample in pairs]
    judgements = task.judge(rows, [s.text for s in samples], [s.token_ids for s in samples], trainer_state)
    return [
        Record(
            id=str(place),
            kind=task.kind,
            sample=i,
            completion=sample.text,
            length=sample.length,
            truncated=sample.truncated,
            gold=gold,
            answer=judgement.answer,
            score=judgement.score,
            failed=judgement.failed,
            reward=judgement.reward,
            asked=checksum(row),
        )
        for (place, row, i, sample), gold, judgement in zip(pairs, task.golds(rows), judgements, strict=True)
    ]


def checksum(row: dict[str, Any]) -> str:
    """A checksum of a problem with all its columns, the same in every process."""
    return f"{zlib.crc32(json.dumps(row, sort_keys=True, default=_content).encode()):08x}"


def _content(value: Any) -> str:
    """Of images and arrays their bytes, of others a text without addresses."""
    if hasattr(value, "tobytes"):
        return f"{zlib.crc32(value.tobytes()):08x}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def write_samples(path: Path, records: list[Record]) -> None:
    """One line each."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))


def _gather(parts: Path, gathered: Path) -> None:
    records = [record for file in parts.glob("*.jsonl") for record in read_samples(file)]
    write_samples(gathered, in_order(records))
    shutil.rmtree(parts)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sorts records in the order of the task, and by sample number."""
    return sorted(records, key=lambda record: (int(record.id), record.sample))


def read_samples(path: Path) -> list[Record]:
    """The lines of a samples file.

    Raises:
        ValueError: If the file does not exist, or a line is not a record.
    """
    if not path.is_file():
        raise ValueError(f"There is no samples file {path}.")
    try:
        return [Record(**json.loads(line)) for line in path.read_text().splitlines()]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a samples file of `gxpo eval`: {error}.") from error
