"""What verifying answers costs: `maths_reward`'s check, and TRL's `accuracy_reward`.

    python benchmarks/verifier.py                        # about 2 minutes on two cores

One run. Completions are generated: some 2000 characters of words and formulas, then a boxed answer of one of several
kinds, half of them right. No two are equal, so that nothing is saved by what is kept of the last ones. Within a
block every contender verifies the same batch, one after the other and each in its turn first; the next block has new
answers. A figure is the median over blocks. The first block, which warms up, is left out.
"""

import argparse
import logging
import random
import statistics
import time
from collections.abc import Callable

from common import describe_machine, save_result
from trl.rewards import accuracy_reward

from gxpo_trl.tasks.answers import verify_maths


BASELINE = "verify_maths"
CHARACTERS = 2000
WORDS = (
    "so we add the two sides and find that $x^2 + {n} = {m}$, hence by symmetry $\\frac{{{n}}}{{{m}}}$ is less than"
)
KINDS = [  # a gold, another way of writing it, a wrong answer; a, b, c are numbers
    ("{a}", "{a}", "{b}"),
    (r"\frac{{{a}}}{{{b}}}", r"\dfrac{{{a}}}{{{b}}}", r"\dfrac{{{b}}}{{{a}}}"),
    (r"{a}\sqrt{{{b}}}", r"\sqrt{{{b}}} \cdot {a}", r"{b}\sqrt{{{a}}}"),
    (r"({a}, {b}, {c})", r"\left({a},\,{b},\,{c}\right)", r"({b}, {a}, {c})"),
    (r"{a}x^2 + {b}x", r"x({a}x + {b})", r"x({b}x + {a})"),
    (r"\{{{a}, {b}, {c}\}}", r"\{{{c}, {a}, {b}\}}", r"\{{{c}, {a}\}}"),
    (r"(-\infty, {a}) \cup ({b}, \infty)", r"({b}, \infty) \cup (-\infty, {a})", r"(-\infty, {a}] \cup ({b}, \infty)"),
    (r"y = {a}x + {b}", r"{a}x - y + {b} = 0", r"{a}x + y + {b} = 0"),
]

Batch = tuple[list[str], list[str]]


def make_batch(rng: random.Random, count: int) -> Batch:
    completions, golds = [], []
    for index in range(count):
        low, middle, high = sorted(rng.sample(range(2, 10_000), 3))
        numbers = {"a": low, "b": middle, "c": high}
        gold, right, wrong = (form.format(**numbers) for form in KINDS[index % len(KINDS)])
        text = ""
        while len(text) < CHARACTERS:
            text += WORDS.format(n=rng.randrange(1000), m=rng.randrange(1000)) + " "
        completions.append(f"{text}\nThe answer is $\\boxed{{{rng.choice((right, wrong))}}}$.")
        golds.append(gold)
    return completions, golds


def with_trl(completions: list[str], golds: list[str]) -> list:
    messages = [[{"role": "assistant", "content": text}] for text in completions]
    return accuracy_reward(messages, [f"${gold}$" for gold in golds])


def with_verify_maths(completions: list[str], golds: list[str]) -> list:
    return list(map(verify_maths, completions, golds))


def measure(contenders: dict[str, Callable[[list[str], list[str]], list]], count: int, blocks: int) -> dict[str, dict]:
    rng = random.Random(0)
    times = {name: [] for name in contenders}
    for block in range(blocks + 1):
        batch = make_batch(rng, count)
        names = list(contenders)
        for name in names[block % len(names) :] + names[: block % len(names)]:
            started = time.perf_counter()
            contenders[name](*batch)
            times[name].append((time.perf_counter() - started) / count)
    return {
        name: {
            "seconds_per_answer": statistics.median(took[1:]),
            "ratio": statistics.median(t / base for t, base in list(zip(took, times[BASELINE], strict=True))[1:]),
        }
        for name, took in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=320, help="in a batch")
    parser.add_argument("--blocks", type=int, default=7)
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    contenders = {BASELINE: with_verify_maths, "accuracy_reward": with_trl}
    figures = measure(contenders, options.completions, options.blocks)
    for name, figure in figures.items():
        print(f"{name:20s} {1000 * figure['seconds_per_answer']:7.3f} ms an answer  {figure['ratio']:5.2f} ×")
    result = {"completions": options.completions, **figures, **describe_machine(threads=1)}
    print(f"written to {save_result('verifier', result)}")


if __name__ == "__main__":
    main()
