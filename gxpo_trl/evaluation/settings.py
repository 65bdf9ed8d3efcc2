"""The settings of an evaluation, as a recipe or the command line gives them."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..tasks.generated import is_generated, read_mapping


@dataclass
class EvaluationArguments:
    r"""
    Settings of `gxpo eval`.

    Parameters:
        models (`list[str]`, *optional*):
            Checkpoint folders, adapters or Hub names; all are evaluated, one after the other.
        benchmarks (`list[str]`, *optional*):
            Names of problem sets, `reasoning_gym/<task>`, JSON, JSONL or parquet files, folders, or Hub names.
        reward_funcs (`list[str]`, *optional*):
            The functions that score completions, instead of right answers: built-in names, `file.py:function`, or
            dotted paths, as in a recipe.
        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions; unset for 1 each.
        threshold (`float`, *optional*, defaults to `1.0`):
            The (weighted) reward from which a completion counts as right.
        samples (`int`, *optional*, defaults to `16`):
            n, the completions of each problem.
        ks (`list[int]`, *optional*):
            The k of pass@k and maj@k; unset for the powers of two up to n.
        temperature (`float`, *optional*, defaults to `1.0`):
            The sampling temperature; 0 for greedy completions, which need `samples: 1`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Samples from the most probable tokens whose probabilities add up to this.
        top_k (`int`, *optional*, defaults to `0`):
            Samples from this many most probable tokens; 0 for all.
        min_p (`float`, *optional*, defaults to `0.0`):
            Leaves out tokens less probable than this fraction of the most probable one.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Divides the logits of tokens that are already in the prompt or the completion; 1 for none.
        max_new_tokens (`int`, *optional*, defaults to `3072`):
            The maximum number of tokens of a completion.
        prompt (`str`, *optional*):
            Template of the user's message with `{problem}` in it; unset for the problem without any other text.
        system_prompt (`str`, *optional*):
            System message; unset for none.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template, as in training; on the command line as JSON.
        problems_per_batch (`int`, *optional*, defaults to `32`):
            Problems that are sampled and saved together: an interruption loses at most one such batch. Other sizes
            draw other samples.
        token_budget (`int`, *optional*):
            Limits the memory of generation, like `generation_token_budget` in training.
        backend (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, or `"vllm"`, which is an extra.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            The share of a GPU's memory that vLLM takes.
        dtype (`str`, *optional*, defaults to `"auto"`):
            The dtype of the loaded weights: `"auto"` for the checkpoint's own, `"float32"` or `"bfloat16"`.
        attn_implementation (`str`, *optional*):
            As for `from_pretrained`.
        limit (`int`, *optional*):
            Takes the first so many problems of each benchmark.
        problem_column, answer_column, kind (`str`, *optional*):
            For a benchmark that is a file or a Hub set without a name here.
        reasoning_gym (`dict[str, Any]`, *optional*):
            Settings of the tasks of reasoning-gym, as in a recipe; on the command line as JSON.
        verify_only (`str`, *optional*):
            A samples file whose recorded completions are judged again; nothing is sampled.
        gold (`bool`, *optional*, defaults to `False`):
            Judges the right answers of the benchmarks against themselves, as a check of the verifier.
        seed (`int`, *optional*, defaults to `0`):
            The same seed gives the same samples, over any number of processes.
        output_dir (`str`, *optional*, defaults to `"out/eval"`):
            Where results, samples and the table go, a folder for each model.
    """

    models: list[str] = field(default_factory=list, metadata={"help": "Checkpoint folders, adapters or Hub names."})
    benchmarks: list[str] = field(default_factory=list, metadata={"help": "Names of problem sets, or files."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "What scores: names, file.py:function or dotted paths."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weights of the reward functions."})
    threshold: float = field(default=1.0, metadata={"help": "The reward from which a completion counts as right."})
    samples: int = field(default=16, metadata={"help": "n, the completions of each problem."})
    ks: list[int] | None = field(
        default=None, metadata={"help": "The k of pass@k and maj@k; unset for the powers of two up to n."}
    )
    temperature: float = field(default=1.0, metadata={"help": "The sampling temperature; 0 for greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Samples from the most probable tokens that make up this."})
    top_k: int = field(default=0, metadata={"help": "Samples from so many most probable tokens; 0 for all."})
    min_p: float = field(default=0.0, metadata={"help": "Leaves out tokens below this share of the most probable."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Of tokens that occurred before; 1 for none."})
    max_new_tokens: int = field(default=3072, metadata={"help": "Tokens of a completion, at most."})
    prompt: str | None = field(default=None, metadata={"help": "Template of the user's message, with {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message; unset for none."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template, as JSON."}
    )
    problems_per_batch: int = field(default=32, metadata={"help": "Problems sampled together and saved together."})
    token_budget: int | None = field(default=None, metadata={"help": "Bounds the memory of generation."})
    backend: str = field(default="transformers", metadata={"help": "'transformers' or 'vllm'."})
    vllm_gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "The share of a GPU's memory that vLLM takes."}
    )
    dtype: str = field(default="auto", metadata={"help": "'auto' for the checkpoint's own, 'float32', 'bfloat16'."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As for `from_pretrained`."})
    limit: int | None = field(default=None, metadata={"help": "Takes the first so many problems of each benchmark."})
    problem_column: str | None = field(default=None, metadata={"help": "Of a benchmark without a name here."})
    answer_column: str | None = field(default=None, metadata={"help": "Of a benchmark without a name here."})
    kind: str | None = field(default=None, metadata={"help": "Of its answers: maths, choice or arithmetic."})
    reasoning_gym: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the tasks of reasoning-gym, as JSON."}
    )
    verify_only: str | None = field(default=None, metadata={"help": "Judges a samples file again."})
    gold: bool = field(default=False, metadata={"help": "Judges the right answers against themselves."})
    seed: int = field(default=0, metadata={"help": "Same seed, same samples, over any number of processes."})
    output_dir: str = field(default="out/eval", metadata={"help": "Where results go, a folder for each model."})

    def __post_init__(self):
        for name in ("reasoning_gym", "chat_template_kwargs"):
            setattr(self, name, read_mapping(name, getattr(self, name)))
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
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be between 0 and 1, got {self.min_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0, which is all tokens, got {self.top_k}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"`repetition_penalty` must be a finite number above 0, got {self.repetition_penalty}. Set 1 for none."
            )
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"`vllm_gpu_memory_utilization` must be above 0 and at most 1, got {self.vllm_gpu_memory_utilization}."
            )
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be 'auto' or a type of torch such as 'bfloat16', got {self.dtype!r}.")
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"`backend` must be 'transformers' or 'vllm', got {self.backend!r}.")
        if self.backend == "vllm":
            for name in ("token_budget", "attn_implementation"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` has no meaning for `backend: vllm`. Leave it out.")
            if self.min_p > 0 and self.top_p < 1:
                raise ValueError(
                    "vLLM applies `min_p` before `top_p` and transformers after it, so that the backends would sample "
                    "differently. Set one of them."
                )
        self._check_switches()
        if self.ks is None:
            self.ks = [2**i for i in range(self.samples.bit_length())]
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"`ks` has {k}, and there are {self.samples} samples of each problem. Raise `samples`, or leave "
                    f"{k} out."
                )

    def _check_switches(self) -> None:
        """Refuses settings of something that is off."""
        if self.verify_only and self.gold:
            raise ValueError("`gold` and `verify_only` judge different things. Leave one of them out.")
        if self.reward_weights and not self.reward_funcs:
            raise ValueError("`reward_weights` does nothing without `reward_funcs`. Name these, or leave it out.")
        if self.threshold != 1.0 and not (self.reward_funcs or any(map(is_generated, self.benchmarks))):
            raise ValueError(
                "`threshold` does nothing without `reward_funcs`: right answers score 1 or 0. Name these, or leave it "
                "out."
            )
        for name in ("reward_funcs", "problem_column", "answer_column", "limit"):
            if self.verify_only and getattr(self, name) and not self.benchmarks:
                raise ValueError(
                    f"`{name}` does nothing with `verify_only` and no data: it reads only the samples. Name the data "
                    "that was sampled as `benchmarks`, or leave it out."
                )

    def distribution(self) -> dict[str, float]:
        """The sampling distribution, by the names that transformers and vLLM share. A model's own generation_config,
        which may have other values, is ignored.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    def determining(self) -> dict[str, Any]:
        """The settings that decide which samples are drawn. An evaluation is resumed only with the same ones."""
        others = ("models", "benchmarks", "ks", "token_budget", "verify_only", "gold", "output_dir")
        others += ("vllm_gpu_memory_utilization",)
        return {name: value for name, value in asdict(self).items() if name not in others}
