"""The settings of an evaluation, as a recipe or the command line gives them."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EvaluationArguments:
    r"""
    What `gxpo eval` is told.

    Parameters:
        models (`list[str]`, *optional*):
            Checkpoint folders, adapters or Hub names; all are evaluated, one after the other.
        benchmarks (`list[str]`, *optional*):
            Names of problem sets, or JSON, JSONL or parquet files.
        samples (`int`, *optional*, defaults to `16`):
            n, the completions of each problem.
        ks (`list[int]`, *optional*):
            The k of pass@k and maj@k; unset for the powers of two up to n.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling; 0 for greedy completions, which want `samples: 1`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Samples from the most probable tokens that make up this much.
        top_k (`int`, *optional*, defaults to `0`):
            Samples from so many most probable tokens; 0 for all.
        max_new_tokens (`int`, *optional*, defaults to `3072`):
            Tokens of a completion, at most.
        prompt (`str`, *optional*):
            Template of the user's message with `{problem}` in it; unset for the problem set's own.
        system_prompt (`str`, *optional*):
            System message; unset for none.
        problems_per_batch (`int`, *optional*, defaults to `32`):
            Problems that are sampled together and saved together: what an interruption costs. Different sizes draw
            different samples.
        token_budget (`int`, *optional*):
            Bounds the memory of generation, as `generation_token_budget` does in training.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, or `"vllm"`, which is an extra.
        dtype (`str`, *optional*, defaults to `"auto"`):
            What weights are loaded in: `"auto"` for the checkpoint's own, `"float32"` or `"bfloat16"`.
        attn_implementation (`str`, *optional*):
            As for `from_pretrained`.
        limit (`int`, *optional*):
            Takes the first so many problems of each benchmark.
        problem_column, answer_column, kind (`str`, *optional*):
            For a benchmark that is a file or a Hub set without a name here.
        verify_only (`str`, *optional*):
            A samples file whose recorded completions are judged again; nothing is sampled.
        gold (`bool`, *optional*, defaults to `False`):
            Judges the right answers of the benchmarks against themselves, as a check of the verifier.
        seed (`int`, *optional*, defaults to `0`):
            Same seed, same samples, over any number of processes.
        output_dir (`str`, *optional*, defaults to `"out/eval"`):
            Where results, samples and the table go, a folder for each model.
    """

    models: list[str] = field(default_factory=list, metadata={"help": "Checkpoint folders, adapters or Hub names."})
    benchmarks: list[str] = field(default_factory=list, metadata={"help": "Names of problem sets, or files."})
    samples: int = field(default=16, metadata={"help": "n, the completions of each problem."})
    ks: list[int] | None = field(
        default=None, metadata={"help": "The k of pass@k and maj@k; unset for the powers of two up to n."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 for greedy completions."})
    top_p: float = field(default=1.0, metadata={"help": "Samples from the most probable tokens that make up this."})
    top_k: int = field(default=0, metadata={"help": "Samples from so many most probable tokens; 0 for all."})
    max_new_tokens: int = field(default=3072, metadata={"help": "Tokens of a completion, at most."})
    prompt: str | None = field(default=None, metadata={"help": "Template of the user's message, with {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message; unset for none."})
    problems_per_batch: int = field(default=32, metadata={"help": "Problems sampled together and saved together."})
    token_budget: int | None = field(default=None, metadata={"help": "Bounds the memory of generation."})
    backend: str = field(default="transformers", metadata={"help": "'transformers' or 'vllm'."})
    dtype: str = field(default="auto", metadata={"help": "'auto' for the checkpoint's own, 'float32', 'bfloat16'."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As for `from_pretrained`."})
    limit: int | None = field(default=None, metadata={"help": "Takes the first so many problems of each benchmark."})
    problem_column: str | None = field(default=None, metadata={"help": "Of a benchmark without a name here."})
    answer_column: str | None = field(default=None, metadata={"help": "Of a benchmark without a name here."})
    kind: str | None = field(default=None, metadata={"help": "Of its answers: maths, choice or arithmetic."})
    verify_only: str | None = field(default=None, metadata={"help": "Judges a samples file again."})
    gold: bool = field(default=False, metadata={"help": "Judges the right answers against themselves."})
    seed: int = field(default=0, metadata={"help": "Same seed, same samples, over any number of processes."})
    output_dir: str = field(default="out/eval", metadata={"help": "Where results go, a folder for each model."})

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "problems_per_batch", "token_budget", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be a finite number of at least 0, got {self.temperature}.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"`temperature: 0` gives one completion {self.samples} times. Set `samples: 1`, or a temperature."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"`backend` must be 'transformers' or 'vllm', got {self.backend!r}.")
        if self.backend == "vllm":
            for name in ("token_budget", "attn_implementation"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` has no meaning for `backend: vllm`. Leave it out.")
        if self.ks is None:
            self.ks = [2**i for i in range(self.samples.bit_length())]
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"`ks` holds {k}, and there are {self.samples} samples of a problem. Raise `samples`, or leave "
                    f"{k} out."
                )

    def determining(self) -> dict[str, Any]:
        """The settings that decide which samples are drawn: an evaluation is resumed with the same ones alone."""
        others = ("models", "benchmarks", "ks", "token_budget", "verify_only", "gold", "output_dir")
        return {name: value for name, value in asdict(self).items() if name not in others}
