"""The reward of the sums."""


def sum_reward(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1.0 where the first line is the sum and nothing else, else 0.0."""
    lines = [text.split("\n")[0].strip() for text in completions]
    return [float(line == wanted) for line, wanted in zip(lines, answer, strict=True)]
