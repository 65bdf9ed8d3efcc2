r"""How often answers are judged rightly: `maths_reward` and `choice_reward` next to math-verify, by kind of answer.

    python benchmarks/verdicts.py                        # benchmarks/verdicts.jsonl, about 2 minutes on two cores
    python benchmarks/verdicts.py FILE.jsonl --wrong ours

A case is one JSON line: `kind`, `reward`, `gold`, `completion` and `expected`, whether the completion is right.
Contenders:

- ours: `maths_reward` or `choice_reward`, as `reward` says;
- TRL: `accuracy_reward`;
- math-verify: `verify(parse(gold), parse(completion))`, as it comes;
- thin: the last box against the gold, as strings, else by math-verify.

Each runs in a process of its own, case by case. A case that takes more than a minute is undecided, and so is one that
gets `None` or raises. What is undecided is not right. Times are medians over cases, after a first call.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from gxpo_trl.tasks.rewards import choice_reward, maths_reward


CASES = Path(__file__).with_name("verdicts.jsonl")
LIMIT = 60.0  # seconds for one case
WARM_UP = {"reward": "maths_reward", "gold": "x+1", "completion": r"\boxed{1+x}"}


def in_dollars(gold: str) -> str:
    """What math-verify takes for LaTeX."""
    return gold if "$" in gold or "\\boxed" in gold else f"${gold}$"


def ours(case: dict) -> float | None:
    reward = choice_reward if case["reward"] == "choice_reward" else maths_reward
    return reward([[{"role": "assistant", "content": case["completion"]}]], [case["gold"]])[0]


def trl(case: dict) -> float | None:
    return accuracy_reward([[{"role": "assistant", "content": case["completion"]}]], [in_dollars(case["gold"])])[0]


def math_verify(case: dict) -> float | None:
    return float(verify(parse(in_dollars(case["gold"])), parse(case["completion"])))


def thin(case: dict) -> float | None:
    _, box, rest = case["completion"].rpartition("\\boxed{")
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"{": 1, "}": -1}.get(rest[end], 0)
        end += 1
    answer = rest[: end - 1].strip() if box and depth == 0 else ""
    return float(bool(answer) and (answer == case["gold"].strip() or bool(verified(case["gold"], answer))))


def verified(gold: str, answer: str) -> bool:
    return verify(parse(in_dollars(gold)), parse(f"${answer}$"))


CONTENDERS: dict[str, Callable[[dict], float | None]] = {
    "ours": ours,
    "TRL": trl,
    "math-verify": math_verify,
    "thin": thin,
}


def serve(name: str, pipe) -> None:
    """Judges the cases that come through a pipe; replies with the score and the seconds that it took."""
    logging.disable(logging.CRITICAL)
    CONTENDERS[name](WARM_UP)
    pipe.send(None)
    while True:
        case, started = pipe.recv(), time.perf_counter()
        try:
            score = CONTENDERS[name](case)
        except Exception:
            score = None
        pipe.send((score, time.perf_counter() - started))


def judge_all(name: str, cases: list[dict]) -> list[tuple[float | None, float]]:
    context, process, results = get_context("spawn"), None, []
    for case in cases:
        if process is None:
            pipe, other = context.Pipe()
            process = context.Process(target=serve, args=(name, other))
            process.start()
            pipe.recv()
        pipe.send(case)
        if pipe.poll(LIMIT):
            results.append(pipe.recv())
        else:
            results.append((None, LIMIT))
            process.kill()
            process.join()
            process = None
    if process is not None:
        process.terminate()  # ours closes its workers
        process.join()
    return results


def count(cases: list[dict], results: list[tuple[float | None, float]]) -> dict[str, float]:
    pairs = [(case["expected"], score) for case, (score, _) in zip(cases, results, strict=True)]
    return {
        "right": sum(score == float(expected) for expected, score in pairs),
        "false accepts": sum(score == 1.0 and not expected for expected, score in pairs),
        "false rejects": sum(score == 0.0 and expected for expected, score in pairs),
        "undecided": sum(score is None for _, score in pairs),
        "ms": 1000 * statistics.median(seconds for _, seconds in results),
    }


def table(cases: list[dict], results: dict[str, list[tuple[float | None, float]]]) -> str:
    """By kind, how many are right; in all, what the others are; in Markdown."""
    names = list(results)
    lines = [f"| kind | cases | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for kind in sorted({case["kind"] for case in cases}):
        chosen = [index for index, case in enumerate(cases) if case["kind"] == kind]
        some = [cases[index] for index in chosen]
        rights = [count(some, [results[name][index] for index in chosen])["right"] for name in names]
        lines.append(f"| {kind} | {len(some)} | {' | '.join(map(str, rights))} |")
    totals = {name: count(cases, results[name]) for name in names}
    for figure in ("right", "false accepts", "false rejects", "undecided"):
        figures = [f"{totals[name][figure]} ({totals[name][figure] / len(cases):.1%})" for name in names]
        lines.append(f"| **{figure}** | {len(cases)} | {' | '.join(figures)} |")
    lines.append(f"| **median ms** | | {' | '.join(format(totals[name]['ms'], '.1f') for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", type=Path, default=CASES)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--half", type=int, choices=(0, 1), help="only the cases in this half, by a hash")
    parser.add_argument("--wrong", choices=list(CONTENDERS), help="also print what this contender judges wrongly")
    options = parser.parse_args()

    rows = map(json.loads, options.cases.read_text().splitlines())
    cases = [row for row in rows if row["reward"] in ("maths_reward", "choice_reward")]
    if options.half is not None:
        cases = [row for row in cases if crc32((row["gold"] + row["completion"]).encode()) % 2 == options.half]
    results = {name: judge_all(name, cases) for name in options.contenders}
    print(table(cases, results))
    for case, (score, _) in zip(cases, results.get(options.wrong, []), strict=False):
        if score != float(case["expected"]):
            print(f"{score} for {case}"[:1000], file=sys.stderr)


if __name__ == "__main__":
    main()
