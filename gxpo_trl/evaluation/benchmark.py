"""One benchmark on one model: problems dealt out to processes in batches, each batch sampled, judged and saved whole.

A batch is a file. An interrupted evaluation goes on with the batches that are missing; which process made a batch, and
how many processes there are, changes nothing in it: its seed is its own.
"""

import dataclasses
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..run_folder import samples_file, write_whole
from ..tasks.datasets import FILE_TYPES
from ..tasks.maths import Verdict
from ..tasks.rewards import judge
from .sampling import Sample, Sampler
from .settings import EvaluationArguments


@dataclass(frozen=True)
class Benchmark:
    """Problems with everything that sampling and judging them needs.

    Attributes:
        name (`str`): As the user wrote it.
        kind (`str`): Of its answers, see `tasks/rewards.py`.
        problems (`Dataset`): With the columns `id`, `prompt` and `solution`.
    """

    name: str
    kind: str
    problems: Dataset

    @property
    def slug(self) -> str:
        return slug(self.name)


def slug(name: str) -> str:
    """A name as a file's or a folder's: paths by their last two parts."""
    path = Path(name)
    if path.suffix in FILE_TYPES:
        path = path.with_suffix("")
    return "--".join([part for part in path.parts if part not in ("/", "..", ".")][-2:])


@dataclass(frozen=True)
class Record:
    """One judged sample, as a line of the samples file. `seconds` is its share of what its batch took."""

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

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.score, self.answer)


def run_benchmark(
    benchmark: Benchmark,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: EvaluationArguments,
) -> Path:
    """Samples and judges what is missing, with all processes, and gathers the batches.

    Returns:
        `Path`: The samples file, `FOLDER/BENCHMARK.jsonl`: a line for each sample, in the benchmark's order.
    """
    state = PartialState()
    gathered = samples_file(folder, benchmark.slug)
    if gathered.is_file():
        return gathered
    parts = folder / f"{benchmark.slug}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    batches = list(_batches(benchmark.problems, tokenizer, settings.problems_per_batch))
    for number in range(state.process_index, len(batches), state.num_processes):
        part = parts / f"{number:05d}.jsonl"
        if not part.is_file():
            rows, prompts = batches[number]
            batch_seed = zlib.crc32(f"{settings.seed}/{benchmark.name}/{number}".encode())
            started = time.perf_counter()
            completions = sampler(prompts, settings.samples, batch_seed)
            records = judge_samples(benchmark, rows, completions)
            seconds = (time.perf_counter() - started) / len(records)
            write_samples(part, [dataclasses.replace(record, seconds=seconds) for record in records])
    state.wait_for_everyone()
    if state.is_main_process:
        _gather(benchmark, parts, gathered)
    state.wait_for_everyone()
    return gathered


def _batches(
    problems: Dataset, tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[tuple[list[dict[str, Any]], list[list[int]]]]:
    """Problems with prompts of similar length together, so that little is padded; with the tokens of the prompts."""
    rows = problems.to_list()
    tokens = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield [rows[i] for i in chosen], [tokens[i] for i in chosen]


def judge_samples(benchmark: Benchmark, rows: list[dict[str, Any]], completions: list[list[Sample]]) -> list[Record]:
    """Scores the completions of some problems, (problems, samples), one line each."""
    pairs = [(row, i, sample) for row, own in zip(rows, completions, strict=True) for i, sample in enumerate(own)]
    verdicts = judge(benchmark.kind, [sample.text for *_, sample in pairs], [row["solution"] for row, *_ in pairs])
    return [
        Record(
            id=row["id"],
            kind=benchmark.kind,
            sample=i,
            completion=sample.text,
            length=sample.length,
            truncated=sample.truncated,
            gold=row["solution"],
            answer=verdict.answer,
            score=verdict.score,
        )
        for (row, i, sample), verdict in zip(pairs, verdicts, strict=True)
    ]


def write_samples(path: Path, records: list[Record]) -> None:
    """One line each."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))


def _gather(benchmark: Benchmark, parts: Path, gathered: Path) -> None:
    place = {row_id: i for i, row_id in enumerate(benchmark.problems["id"][:])}
    records = [record for file in parts.glob("*.jsonl") for record in read_samples(file)]
    write_samples(gathered, sorted(records, key=lambda record: (place[record.id], record.sample)))
    shutil.rmtree(parts)


def read_samples(path: Path) -> list[Record]:
    """The lines of a samples file.

    Raises:
        ValueError: If the file does not exist, or a line is none of these.
    """
    if not path.is_file():
        raise ValueError(f"There is no samples file {path}.")
    try:
        return [Record(**json.loads(line)) for line in path.read_text().splitlines()]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no samples file of `gxpo eval`: {error}.") from error
