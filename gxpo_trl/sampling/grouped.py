"""Sampling in groups: each distinct prompt is prefilled once, and rows leave the batch as they finish.

    model.generate(**inputs, num_return_sequences=16, custom_generate=sample_grouped)

`generate` runs every copy of a prompt through the model, and decodes all rows until the longest has ended. Here the KV
cache of a prompt is filled once and repeated for its copies; rows that have ended are dropped; and with a token budget
new prompts replace them. Only the scheduling is ours: `generate` prepares settings, logits processors and stopping
criteria, the model prepares its inputs, and the caches are transformers' own.

The unfinished rows form one rectangle, padded on the left. It may hold rows of different age: a key is stored with its
position, and attention sees columns only through the mask and their distance.
"""

import contextlib
import copy
import functools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria

from ..rollout.generators import Generators
from .model_traits import cache_argument, decoder_of, why_not_row_by_row


KEEP_ROWS = 0.85  # finished rows are dropped once at most this fraction of the rows is unfinished

SERVED_SETTINGS = {
    *("max_new_tokens", "max_length", "stop_strings", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "suppress_tokens", "remove_invalid_values", "renormalize_logits"),
    *("return_dict_in_generate", "num_return_sequences", "disable_compile", "compile_config", "max_cache_len"),
    *("cache_implementation", "transformers_version"),
}
"""Settings of `generate` that treat all rows, and all positions of a row, alike. The others count columns."""


class SharedNoise(ValueError):
    """Raised if a forward pass has drawn random numbers."""

    reason = "the model draws random numbers in its forward pass, which copies of a prompt would share"

    def __init__(self):
        super().__init__(f"Grouped sampling can't serve this: {self.reason}. Leave out `custom_generate`.")


@dataclass
class GroupedOutput(GenerateDecoderOnlyOutput):
    """
    What `sample_grouped` returns with `return_dict_in_generate`.

    Attributes:
        sequences (`torch.LongTensor`): Prompts and completions, (B, P + T), padded on both sides.
        lengths (`torch.LongTensor`): Tokens of each completion, with the one that ended it, (B,).
        logps (`torch.FloatTensor`): Log-probabilities of the completions' tokens, (B, T), 0 where there is none. They
            are the model's at the sampling temperature, before any token is excluded or penalized: what TRL calls old.
        entropies (`torch.FloatTensor`, *optional*): The entropy of the distribution that each of them has its
            log-probability from, in nats, (B, T), if asked for.
    """

    lengths: torch.LongTensor | None = None
    logps: torch.FloatTensor | None = None
    entropies: torch.FloatTensor | None = None


def pad_left(prompts: Sequence[torch.Tensor], pad_token: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Prompts of any lengths as a batch and its mask, (B, P) each, padded on the left."""
    ids = pad_sequence(list(prompts), batch_first=True, padding_value=pad_token, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    return ids, mask


def why_not_grouped(model: torch.nn.Module, config: GenerationConfig, in_training: bool = False) -> str | None:
    """Why `sample_grouped` can't stand in for `generate` with a model and settings.

    Args:
        model (`torch.nn.Module`): A transformers model, with or without adapters.
        config (`GenerationConfig`): The settings. Unset ones come from the model, as in `generate`.
        in_training (`bool`): Whether the model will be in training mode.

    Returns:
        `str`, *optional*: The reason, to follow a colon; `None` if it can.
    """
    config = copy.deepcopy(config)
    config.update(**decoder_of(model).generation_config.to_dict(), defaults_only=True)
    return why_not_row_by_row(model, in_training) or _why_not_settings(config)


@functools.cache
def penalizes_by_row() -> bool:
    """Whether transformers can leave padding out of a repetition penalty, as from 5.23 on: rows differ in theirs."""
    try:
        RepetitionPenaltyLogitsProcessor(1.0, prompt_ignore_length=torch.zeros(1, dtype=torch.long))
    except ValueError:
        return False
    return True


def _why_not_settings(config: GenerationConfig) -> str | None:
    if config.repetition_penalty not in (None, 1.0) and not penalizes_by_row():
        return (
            f"transformers {transformers.__version__} penalizes padding as a repetition with `repetition_penalty: "
            f"{config.repetition_penalty}`, and 5.23 or later does not"
        )
    if config.cache_implementation not in (None, "dynamic"):
        return f"`cache_implementation: {config.cache_implementation}` asks for another cache"
    neutral, default = GenerationConfig._get_default_generation_params(), GenerationConfig().to_dict()
    for name in sorted(default.keys() - SERVED_SETTINGS):
        value = getattr(config, name, None)
        if not name.startswith("_") and value not in (None, default[name], neutral.get(name, False)):
            return f"the setting `{name}: {value}` is not served"
    return None


@torch.no_grad()
def sample_grouped(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    token_budget: int | None = None,
    lockstep: bool = False,
    output_entropies: bool = False,
    **model_kwargs: Any,
) -> torch.LongTensor | GroupedOutput:
    """A decoding method for `generate(custom_generate=...)`: the same completions in less time.

    Greedy completions are `generate`'s token for token, sampled ones have its distribution; neighbouring rows with the
    same prompt are recognized as copies.

    Args:
        model (`PreTrainedModel`): A decoder with the stock KV cache.
        input_ids (`torch.LongTensor`): Prompts, (B, P), padded on the left.
        logits_processor, stopping_criteria, generation_config: As `generate` prepared them. A processor of your own
            must not count columns: with a budget, rows of other ages share them.
        token_budget (`int`, *optional*): Limit for the number of unfinished rows times the columns they may grow to,
            in tokens, except for a single row that needs more. The KV cache holds no more than that. Unset: all at
            once.
        lockstep (`bool`): All ranks make equally many forward passes: where one communicates, as under FSDP2.
        output_entropies (`bool`): Whether a `GroupedOutput` has `entropies`.
        **model_kwargs: As `generate` prepared them; `attention_mask` (B, P) tells the padding.

    Returns:
        `torch.LongTensor`: Prompts and completions, (B, P + T), as from `generate`; or a `GroupedOutput`.

    Raises:
        `ValueError`: If the model, a setting or a further model input can't be served, or the budget isn't positive.
        `SharedNoise`: If the model draws random numbers. The generators are as they were then.
    """
    sampler = _Sampler(
        model, logits_processor, stopping_criteria, generation_config, token_budget, lockstep, output_entropies
    )
    mask = model_kwargs.pop("attention_mask", None)
    if mask is None:
        mask = torch.ones_like(input_ids)
    caches = {name: value for name, value in model_kwargs.items() if isinstance(value, Cache)}
    forward_arguments = {name: model_kwargs.pop(name) for name in ("logits_to_keep",) if name in model_kwargs}
    unread = [name for name in model_kwargs if name not in ("position_ids", "use_cache", *caches)]
    if unread or any(cache.get_seq_length() > 0 for cache in caches.values()):
        raise ValueError(
            f"Grouped sampling starts only from token ids; it can't serve {', '.join(unread) or 'a filled cache'}. "
            "Call `generate` without `custom_generate`."
        )
    output = sampler.run(input_ids, mask, forward_arguments)
    return output if generation_config.return_dict_in_generate else output.sequences


@dataclass
class _Rows:
    """The unfinished rows: R of them, with W columns in the cache.

    Attributes:
        owner (`torch.LongTensor`): The row of the request that each completes, (R,).
        ids (`torch.LongTensor`): Prompts and completions so far, (R, W + 1): the cache lacks the last token.
        mask (`torch.LongTensor`): 1 where there is a token, 0 in the padding on the left, (R, W + 1).
        prompt_length, length (`torch.LongTensor`): Tokens given and generated, (R,).
        unfinished (`torch.BoolTensor`): (R,).
        cache (`DynamicCache`): Keys and values of the first W columns.
        is_padded (`bool`): Whether `mask` may have a 0.
        longest_prompt (`int`): The maximum of `prompt_length`.
    """

    owner: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    prompt_length: torch.Tensor
    length: torch.Tensor
    unfinished: torch.Tensor
    cache: DynamicCache
    is_padded: bool
    longest_prompt: int

    TENSORS: ClassVar = ("owner", "ids", "mask", "prompt_length", "length", "unfinished")

    def __len__(self) -> int:
        return self.owner.size(0)

    def keep_unfinished(self) -> None:
        """Keeps only these rows, and drops the columns that they don't need."""
        indices = self.unfinished.nonzero()[:, 0]
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[indices])
        self.cache.batch_select_indices(indices)
        padding = self.mask.argmax(1)
        least, most, self.longest_prompt = torch.stack(
            [padding.min(), padding.max(), self.prompt_length.max()]
        ).tolist()
        self.is_padded = most > least
        self._pad(-least)

    def join(self, other: "_Rows") -> None:
        """Appends the rows of another rectangle; the narrower one is padded."""
        wider = other.mask.size(1) - self.mask.size(1)
        self._pad(max(wider, 0))
        other._pad(max(-wider, 0))
        for name in self.TENSORS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for layer, addition in zip(self.cache.layers, other.cache.layers, strict=True):
            if layer.is_initialized:
                layer.keys = torch.cat([layer.keys, addition.keys])
                layer.values = torch.cat([layer.values, addition.values])
        self.is_padded = self.is_padded or other.is_padded or wider != 0
        self.longest_prompt = max(self.longest_prompt, other.longest_prompt)

    def _pad(self, columns: int) -> None:
        """Adds columns of padding on the left, or cuts them if negative."""
        if columns == 0:
            return
        self.ids, self.mask = F.pad(self.ids, (columns, 0)), F.pad(self.mask, (columns, 0))
        width = self.mask.size(1) - 1
        for layer in self.cache.layers:
            if not layer.is_initialized:  # it reads another layer's keys and values
                continue
            stored = width
            if isinstance(layer, DynamicSlidingWindowLayer):
                stored = min(width, layer.sliding_window - 1)
                layer.cumulative_length = width
            missing = stored - layer.keys.size(-2)
            layer.keys = F.pad(layer.keys, (0, 0, missing, 0))
            layer.values = F.pad(layer.values, (0, 0, missing, 0))


Group = tuple[torch.Tensor, range]
"""A prompt, (P,), without padding, and the rows of the request that complete it."""


class _Sampler:
    """One call of `sample_grouped`."""

    def __init__(
        self,
        model: PreTrainedModel,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        token_budget: int | None,
        lockstep: bool,
        output_entropies: bool,
    ):
        if reason := why_not_row_by_row(model, model.training) or _why_not_settings(config):
            raise ValueError(f"Grouped sampling can't serve this: {reason}. Leave out `custom_generate`.")
        if self._penalizes(logits_processor) and not penalizes_by_row():
            raise ValueError("Grouped sampling needs transformers 5.23 for a repetition penalty. Leave it out.")
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"`token_budget` must be at least 1, got {token_budget}. Leave it out for no bound.")
        self.model, self.config, self.processors = model, config, logits_processor
        # Columns don't tell a row's age here; `_take_tokens` counts tokens instead.
        criteria = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria)]
        self.criteria = StoppingCriteriaList(criteria)
        self.token_budget, self.lockstep, self.output_entropies = token_budget, lockstep, output_entropies
        self.cache_argument = cache_argument(type(model))
        self.has_prefilled = False

    def run(self, input_ids: torch.Tensor, mask: torch.Tensor, forward_arguments: dict[str, Any]) -> GroupedOutput:
        """Samples all completions of a request, (B, P) with its mask."""
        self.forward_arguments = forward_arguments
        self.max_new_tokens = self.config.max_length - input_ids.size(1)
        self.pad_token = self._pad_token()
        # One column more: rows that have ended write their padding there until they are dropped.
        self.completions = input_ids.new_full((input_ids.size(0), self.max_new_tokens + 1), self.pad_token)
        self.logps = torch.zeros(self.completions.shape, device=input_ids.device)
        self.entropies = torch.zeros_like(self.logps) if self.output_entropies else None
        self.lengths = input_ids.new_zeros(input_ids.size(0))
        queue, rows = _find_groups(input_ids, mask), None
        while self._anywhere(rows is not None or len(queue) > 0):  # has a forward pass to make
            if wave := self._admit(queue, rows):
                fresh = self._without_finished(self._prefill(wave))
                if rows is None or fresh is None:
                    rows = rows or fresh
                else:
                    rows.join(fresh)
            elif rows is not None:
                rows = self._without_finished(self._decode(rows))
            else:
                self._idle()
        longest = int(self.lengths.max())
        sequences = torch.cat([input_ids, self.completions[:, :longest]], dim=1)
        entropies = None if self.entropies is None else self.entropies[:, :longest]
        return GroupedOutput(
            sequences=sequences, lengths=self.lengths, logps=self.logps[:, :longest], entropies=entropies
        )

    def _pad_token(self) -> int:
        if self.config._pad_token_tensor is not None:
            return int(self.config._pad_token_tensor)
        if self.criteria:
            raise ValueError("Rows that end early need a `pad_token_id`. Set it, or an `eos_token_id`.")
        return 0  # never seen: all rows are equally long

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on this rank, or in lockstep on any rank."""
        if not self.lockstep:
            return here
        found = torch.tensor(float(here), device=self.lengths.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def _admit(self, queue: deque[Group], rows: _Rows | None) -> list[Group]:
        """Takes from the queue what fits. Groups of up to half the free room stay whole."""
        wave: list[Group] = []
        taken = 0 if rows is None else len(rows)
        longest_prompt = 0 if rows is None else rows.longest_prompt
        while queue:
            prompt, owners = queue[0]
            longest_prompt = max(longest_prompt, len(prompt))
            capacity = math.inf if self.token_budget is None else self._capacity(longest_prompt)
            least = min(len(owners), max(capacity // 2, 1))
            if taken > 0 and capacity - taken < least:
                break
            count = int(min(len(owners), max(capacity - taken, 1)))
            wave.append((prompt, owners[:count]))
            taken += count
            queue.popleft()
            if count < len(owners):
                queue.appendleft((prompt, owners[count:]))
        return wave

    def _capacity(self, longest_prompt: int) -> int:
        return self.token_budget // (longest_prompt + self.max_new_tokens)

    def _prefill(self, wave: list[Group]) -> _Rows:
        """Fills the cache with each prompt once, repeats it for the rows that complete it, samples their first."""
        prompts, owners = zip(*wave, strict=True)
        lengths = [len(prompt) for prompt in prompts]
        ids, mask = pad_left(prompts, self.pad_token)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        is_padded = min(lengths) < max(lengths)
        with self._refusing_noise():
            logits = self._forward(ids, mask if is_padded else None, positions, cache, is_first_iteration=True)
        if cache.get_seq_length() == 0:
            raise ValueError(
                "The model keeps no KV cache, as in training with gradient checkpointing. Call "
                "`model.gradient_checkpointing_disable()` or `model.eval()` before sampling."
            )
        copies = torch.tensor([len(rows) for rows in owners], device=ids.device)
        source = torch.arange(len(prompts), device=ids.device).repeat_interleave(copies)  # (R,)
        cache.batch_select_indices(source)
        rows = _Rows(
            owner=torch.tensor([i for rows in owners for i in rows], device=ids.device),
            ids=ids[source],
            mask=mask[source],
            prompt_length=torch.tensor(lengths, device=ids.device)[source],
            length=torch.zeros_like(source),
            unfinished=torch.ones_like(source, dtype=torch.bool),
            cache=cache,
            is_padded=is_padded,
            longest_prompt=max(lengths),
        )
        self._take_tokens(rows, logits[source])
        return rows

    @contextlib.contextmanager
    def _refusing_noise(self) -> Iterator[None]:
        """Around the first forward pass of a request, which every rank makes."""
        if self.has_prefilled:
            yield
            return
        self.has_prefilled = True
        generators = Generators.of(self.model, self.lengths.device)
        before = generators.state()
        yield
        if self._anywhere(generators.have_drawn(since=before)):
            generators.restore(before)
            raise SharedNoise

    def _decode(self, rows: _Rows) -> _Rows:
        """One token more for every row."""
        positions = (rows.prompt_length + rows.length - 1)[:, None]
        self._take_tokens(rows, self._forward(rows.ids, rows.mask if rows.is_padded else None, positions, rows.cache))
        return rows

    def _forward(self, ids, mask, positions, cache: DynamicCache, is_first_iteration: bool = False) -> torch.Tensor:
        """The logits after the last token, (R, V) in fp32, with the tokens of `positions` added to the cache."""
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=positions.size(1),
            attention_mask=mask,
            position_ids=positions,
            is_first_iteration=is_first_iteration,
            use_cache=True,
            **{self.cache_argument: cache},
            **self.forward_arguments,
        )
        return self.model(**inputs, return_dict=True).logits[:, -1].float()

    def _idle(self) -> None:
        """A forward pass for the ranks that have rows left."""
        self.model(input_ids=self.lengths.new_full((1, 1), self.pad_token), use_cache=False)

    def _take_tokens(self, rows: _Rows, logits: torch.Tensor) -> None:
        """Samples from logits, (R, V), and records the tokens of unfinished rows."""
        scores = self._processors(rows)(rows.ids, logits)
        if self.config.do_sample:
            tokens = _draw(scores.softmax(-1))
        else:
            tokens = scores.argmax(-1)
        if self.config.return_dict_in_generate:
            temperature = (self.config.temperature or 1.0) if self.config.do_sample else 1.0
            all_logps = (logits / temperature).log_softmax(-1)
            logps = all_logps.gather(1, tokens[:, None])[:, 0]
            self.logps[rows.owner, rows.length] = logps * rows.unfinished
            if self.entropies is not None:
                entropies = torch.special.entr(all_logps.exp_()).sum(-1)
                self.entropies[rows.owner, rows.length] = entropies * rows.unfinished
        tokens = torch.where(rows.unfinished, tokens, self.pad_token)
        self.completions[rows.owner, rows.length] = tokens
        rows.length = rows.length + rows.unfinished
        self.lengths[rows.owner] = rows.length
        rows.ids = torch.cat([rows.ids, tokens[:, None]], dim=1)
        rows.mask = F.pad(rows.mask, (0, 1), value=1)
        rows.unfinished = rows.unfinished & ~self.criteria(rows.ids, None) & (rows.length < self.max_new_tokens)

    def _processors(self, rows: _Rows) -> LogitsProcessorList:
        """The logits processors, with the padding of the present rows where one asks for it."""
        if not self._penalizes(self.processors):
            return self.processors
        padding = rows.mask.argmax(1)
        return LogitsProcessorList(
            RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding)
            if isinstance(processor, RepetitionPenaltyLogitsProcessor)
            else processor
            for processor in self.processors
        )

    @staticmethod
    def _penalizes(processors: LogitsProcessorList) -> bool:
        return any(isinstance(processor, RepetitionPenaltyLogitsProcessor) for processor in processors)

    def _without_finished(self, rows: _Rows) -> _Rows | None:
        unfinished = int(rows.unfinished.sum())
        if unfinished == 0:
            return None
        if unfinished <= KEEP_ROWS * len(rows):
            rows.keep_unfinished()
        return rows


def _draw(probabilities: torch.Tensor) -> torch.Tensor:
    """One token for each row, (R,), with these probabilities, (R, V)."""
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, num_samples=1)[:, 0]
    # On a CPU `multinomial` draws a number for each of V tokens, a seventh of a step's time. One for each row will do.
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    if not cumulated[:, -1].isfinite().all():
        raise RuntimeError("The model's logits are not finite: there is nothing to sample from.")
    drawn = torch.rand(len(cumulated), 1, dtype=torch.float64) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn, right=True)[:, 0].clamp(max=cumulated.size(1) - 1)


def _find_groups(input_ids: torch.Tensor, mask: torch.Tensor) -> deque[Group]:
    """The distinct prompts of a request, (B, P) with its mask: neighbouring rows that are equal form a group."""
    _, copies = torch.unique_consecutive(torch.cat([input_ids, mask], dim=1), dim=0, return_counts=True)
    groups, start = deque(), 0
    for count in copies.tolist():
        groups.append((input_ids[start][mask[start].bool()], range(start, start + count)))
        start += count
    return groups
