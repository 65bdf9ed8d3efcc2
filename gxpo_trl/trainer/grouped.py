"""Grouped sampling for any GRPOTrainer or RLOOTrainer of TRL, in place of its call of `generate`.

    trainer = GRPOTrainer(...)
    sample_in_groups(trainer)
    trainer.train()

One object holds all of its state; on this one trainer its methods replace those that sample and score.
"""

import contextlib
import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from trl import GRPOTrainer, RLOOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ..sampling.grouped import SharedNoise, pad_left, sample_grouped, why_not_grouped
from ..sampling.model_traits import has_relative_positions
from .methods import is_replaced


logger = get_logger(__name__)

BACKENDS = ("auto", "grouped", "transformers")


@dataclass
class GroupedSamplingArguments:
    r"""
    Settings of [`sample_in_groups`]: how completions are sampled without vLLM.

    Parameters:
        generation_backend (`str`, *optional*, defaults to `"auto"`):
            What samples completions without vLLM: `"grouped"` prefills each distinct prompt once and drops rows as
            they finish, `"transformers"` is TRL's call of `generate`. `"auto"` takes `"grouped"` where it gives the
            same completions, and warns at the start where it doesn't.
        generation_token_budget (`int`, *optional*):
            Limits the memory of generation: the unfinished completions on one device, times the tokens that prompt and
            completion may have. Further prompts are admitted as completions finish. Unset for all at once. Needs
            grouped generation.
    """

    generation_backend: str = field(
        default="auto",
        metadata={
            "help": "What samples completions without vLLM: 'grouped' prefills each distinct prompt once and drops "
            "rows as they finish, 'transformers' is TRL's call of `generate`. 'auto' takes 'grouped' where it gives "
            "the same completions, and warns at the start where it doesn't."
        },
    )
    generation_token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Limits the memory of generation: the unfinished completions on one device, times the tokens that "
            "prompt and completion may have. Further prompts are admitted as completions finish. "
            "Unset for all at once. Needs grouped generation."
        },
    )

    def __post_init__(self):
        if self.generation_backend not in BACKENDS:
            raise ValueError(
                f"`generation_backend` must be one of {', '.join(map(repr, BACKENDS))}, got "
                f"{self.generation_backend!r}."
            )
        if self.generation_token_budget is not None and self.generation_token_budget < 1:
            raise ValueError(
                f"`generation_token_budget` must be at least 1, got {self.generation_token_budget}. Leave it out for "
                "no bound."
            )

    def needs(self) -> list[str]:
        """The settings in use that need grouped generation."""
        needs = {
            "generation_backend: grouped": self.generation_backend == "grouped",
            "generation_token_budget": self.generation_token_budget is not None,
        }
        return [name for name, is_set in needs.items() if is_set]

    def check_needs(self, reason: str) -> None:
        """Refuses these settings if there is a reason against grouped generation.

        Raises:
            ValueError: Names the settings.
        """
        if needs := self.needs():
            raise ValueError(f"This run can't have grouped generation: {reason}. Leave out `{'`, `'.join(needs)}`.")


def sample_in_groups(
    trainer: GRPOTrainer | RLOOTrainer, backend: str = "auto", token_budget: int | None = None
) -> bool:
    """Makes a trainer sample its completions in groups from here on.

    Greedy completions equal those of `generate` token for token; sampled ones have the same distribution. If TRL makes
    a forward pass for the old log-probabilities and sampling has the same numbers, that pass is skipped.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): Of this class or one below it, before it trains.
        backend (`str`): `"auto"` samples in groups if that gives the same completions; if it doesn't, the call of
            `generate` stays, with a warning. `"grouped"` makes that an error. `"transformers"` leaves `generate`.
        token_budget (`int`, *optional*): Limit for the unfinished completions on one device, times the tokens that
            prompt and completion may have. Unset: all at once.

    Returns:
        `bool`: Whether the trainer samples in groups. It doesn't, without a warning, if vLLM, continuous batching or
        `rollout_func` generates, or tools are called between turns.

    Raises:
        `ValueError`: If it can't sample in groups and `backend` or `token_budget` ask for it; if it does already; if
            an argument is out of its bounds, or the trainer is another one.
    """
    settings = GroupedSamplingArguments(backend, token_budget)
    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        raise ValueError(
            f"Grouped sampling takes a GRPOTrainer or RLOOTrainer of TRL, got a {type(trainer).__name__}."
        )
    if isinstance(getattr(trainer._generate_single_turn, "__self__", None), GroupedSampling):
        raise ValueError("The trainer samples in groups already. Call `sample_in_groups` once.")
    elsewhere = _why_not_by_generate(trainer)
    reason = elsewhere or _why_not_in_groups(trainer, backend)
    if reason is None:
        GroupedSampling(trainer, settings).attach()
        return True
    settings.check_needs(reason)
    if elsewhere is None and trainer.generation_config.stop_strings is not None:
        raise ValueError(
            "`generation_kwargs: stop_strings` needs grouped generation, since TRL's call of `generate` has no "
            f"tokenizer to find them with, and this run can't have it: {reason}. Leave them out."
        )
    if elsewhere is None and backend == "auto":
        _warn_of_generate(reason)
    return False


def _warn_of_generate(reason: str) -> None:
    logger.warning(
        f"Completions are sampled by transformers' `generate`, which takes longer: {reason}. Set "
        "`generation_backend: transformers` if that is intended."
    )


def _why_not_by_generate(trainer: GRPOTrainer | RLOOTrainer) -> str | None:
    """Why TRL does not sample completions by `generate`; `None` if it does."""
    if isinstance(trainer, GRPOTrainer) and trainer.rollout_func is not None:
        return "`rollout_func` generates"
    if isinstance(trainer, GRPOTrainer) and trainer.tools:
        return "tools are called between turns"
    if trainer.use_vllm:
        return "vLLM generates"
    return "continuous batching generates" if trainer.use_transformers_continuous_batching else None


def _why_not_in_groups(trainer: GRPOTrainer | RLOOTrainer, backend: str) -> str | None:
    """Why the call of `generate` stays; `None` if it can be replaced."""
    if backend == "transformers":
        return "`generation_backend` is `transformers`"
    if is_replaced(trainer, "_generate_single_turn"):
        return f"this {type(trainer).__name__} has a `_generate_single_turn` of its own"
    if trainer.args.neftune_noise_alpha:
        return "`neftune_noise_alpha` adds noise, which copies of a prompt would share"
    if unknown := _unknown_ends(trainer):
        return (
            f"`generation_kwargs` ends completions with the tokens {', '.join(map(str, unknown))}, which TRL doesn't "
            "count as ends: a completion that is cut there is truncated to it"
        )
    return why_not_grouped(trainer.model, trainer.generation_config, in_training=True)


def _unknown_ends(trainer: GRPOTrainer | RLOOTrainer) -> list[int]:
    """Tokens that end completions by `generation_kwargs` and not for TRL."""
    ends = trainer.generation_config.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    return sorted(set(map(int, ends)) - set(trainer.eos_token_ids))


class GroupedSampling:
    """Samples the completions of one trainer with `sample_grouped`.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): Its model and settings are read at each call.
        settings (`GroupedSamplingArguments`): The settings of [`sample_in_groups`].

    Raises:
        `ValueError`: If transformers can't look for the stop strings of `generation_kwargs`, or
            `mask_truncated_completions` would leave out what ends with them.
    """

    def __init__(self, trainer: GRPOTrainer | RLOOTrainer, settings: GroupedSamplingArguments):
        self.trainer, self.settings = trainer, settings
        self.config, self.stopping_criteria = _read_settings(trainer)
        self._draws = False  # whether the model has been seen to draw random numbers: TRL samples from then on
        self._scoring = getattr(getattr(trainer, "lookahead", None), "scoring", None)  # of this package's trainers
        self._trl_turn = trainer._generate_single_turn
        self._trl_score = trainer._generate_and_score_completions
        self._trl_logps = trainer._get_per_token_logps_and_entropies
        self._expects_old_logps = False  # whether completions are being sampled and scored, and no score is there yet
        self._sampled: Sampled | None = None  # the completions that are being scored

    def attach(self) -> None:
        """Replaces the trainer's own methods, only on this instance."""
        self.trainer._generate_single_turn = self._generate_single_turn
        if _has_old_logps(self.trainer, self.config):
            self.trainer._generate_and_score_completions = self._generate_and_score_completions
            self.trainer._get_per_token_logps_and_entropies = self._get_per_token_logps_and_entropies

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        completions = None if self._draws else self.sample(prompt_ids)
        if self._draws:
            return self._trl_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        return (completions, None) if isinstance(self.trainer, GRPOTrainer) else completions

    def sample(self, prompt_ids: list[list[int]]) -> list[list[int]] | None:
        """One completion of each prompt, with the token that ended it; `None` if the model draws random numbers."""
        trainer = self.trainer
        self.config, self.stopping_criteria = _read_settings(trainer)  # a callback may have changed them
        prompts = [torch.tensor(ids, device=trainer.accelerator.device) for ids in prompt_ids]
        input_ids, attention_mask = pad_left(prompts, trainer._tokenizer.pad_token_id)
        wants_entropies = self._has_entropies and self._scoring.wants_entropies
        communicates = trainer.accelerator.num_processes > 1 and (trainer._dist.is_zero3 or trainer._dist.is_fsdp)
        output = None
        with (
            profiling_context(trainer, "transformers.generate"),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            with contextlib.suppress(SharedNoise):
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    generation_config=self.config,
                    stopping_criteria=self.stopping_criteria,
                    custom_generate=sample_grouped,
                    token_budget=self.settings.generation_token_budget,
                    lockstep=communicates,
                    output_entropies=wants_entropies,
                )
        if output is None:
            self._draws = True
            self.settings.check_needs(SharedNoise.reason)
            _warn_of_generate(SharedNoise.reason)
            return None
        completions = output.sequences[:, -output.logps.size(1) :]
        lengths = output.lengths[:, None]
        after = torch.arange(completions.size(1), device=lengths.device) >= lengths
        completions = completions.masked_fill(after, trainer._tokenizer.pad_token_id)
        if wants_entropies:
            self._scoring.keep_entropies(output.entropies, completions)
        if self._expects_old_logps and _has_old_logps(trainer, self.config):
            self._sampled = Sampled(input_ids, attention_mask, completions, output.logps)
        rows = zip(completions.tolist(), output.lengths.tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    @property
    def _has_entropies(self) -> bool:
        """Whether the entropies that sampling sees are those that this package's trainers log."""
        return self._scoring is not None and _has_numbers_of_the_loss(self.trainer, self.config)

    # ---- Log-probabilities of the sampled tokens as the old ones

    def _generate_and_score_completions(self, inputs):
        self._expects_old_logps = True
        try:
            return self._trl_score(inputs)
        finally:
            self._expects_old_logps, self._sampled = False, None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        is_first, self._expects_old_logps = self._expects_old_logps, False  # TRL asks for the old ones first
        sampled, self._sampled = self._sampled, None
        if is_first:
            known = sampled is not None and sampled.are(input_ids, attention_mask, logits_to_keep)
            if self._on_every_rank(known):
                return F.pad(sampled.logps, (0, logits_to_keep - sampled.logps.size(1))), None, None
        return self._trl_logps(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _on_every_rank(self, here: bool) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return here
        return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).all())


@dataclass(frozen=True)
class Sampled:
    """Completions as they were sampled, before a subclass of the trainer or TRL could change them.

    Attributes:
        prompts, prompt_mask (`torch.Tensor`): (B, P), padded on the left.
        completions (`torch.Tensor`): (B, T), with padding after the token that ended each.
        logps (`torch.Tensor`): Of their tokens, (B, T), 0 after the end.
    """

    prompts: torch.Tensor
    prompt_mask: torch.Tensor
    completions: torch.Tensor
    logps: torch.Tensor

    def are(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> bool:
        """Whether these are the rows that TRL scores, which it may have padded further."""
        split = input_ids.size(1) - logits_to_keep
        before, after = split - self.prompts.size(1), logits_to_keep - self.completions.size(1)
        if len(input_ids) != len(self.prompts) or before < 0 or after < 0:
            return False
        mask, end = attention_mask.bool(), input_ids.size(1) - after
        prompt_mask = F.pad(self.prompt_mask.bool(), (before, 0))
        return (
            torch.equal(mask[:, :split], prompt_mask)
            and torch.equal(input_ids[:, :split][prompt_mask], self.prompts[self.prompt_mask.bool()])
            and torch.equal(input_ids[:, split:end], self.completions)
            and not mask[:, end:].any()
        )


def _read_settings(trainer: GRPOTrainer | RLOOTrainer) -> tuple[GenerationConfig, StoppingCriteriaList]:
    """TRL's settings; stop strings as the criterion they stand for, since custom decoding gets no tokenizer."""
    config = copy.deepcopy(trainer.generation_config)
    config.return_dict_in_generate = True
    strings, config.stop_strings = config.stop_strings, None
    if strings is None:
        return config, StoppingCriteriaList()
    if trainer.mask_truncated_completions:
        raise ValueError(
            "`mask_truncated_completions` leaves out every completion that ends with one of `generation_kwargs: "
            "stop_strings`, since TRL counts it as truncated. Set one of the two."
        )
    try:
        return config, StoppingCriteriaList([StopStringCriteria(trainer._tokenizer, strings)])
    except ValueError as error:
        raise ValueError(
            f"`generation_kwargs: stop_strings`: transformers can't look for {strings} in this tokenizer's output "
            f"({error}). Leave them out, or end completions with `eos_token_id`."
        ) from error


def _has_old_logps(trainer: GRPOTrainer | RLOOTrainer, config: GenerationConfig) -> bool:
    """Whether TRL makes a forward pass for the old log-probabilities whose numbers sampling has.

    GRPO makes one where a generation batch is not used up by one optimizer step, RLOO always. Sampling has the same
    numbers in fp32; in bf16 and TF32 the two differ by rounding.
    """
    args = trainer.args
    if getattr(args, "ratio_anchor", "rollout") == "current":  # of our trainer: the policy of each pass itself
        return False
    lasts = args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) != 0
    makes_pass = lasts or isinstance(trainer, RLOOTrainer)
    in_fp32 = all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    in_fp32 = in_fp32 and trainer.accelerator.mixed_precision == "no" and not args.tf32
    in_fp32 = in_fp32 and torch.get_float32_matmul_precision() == "highest"
    return makes_pass and in_fp32 and _has_numbers_of_the_loss(trainer, config)


def _has_numbers_of_the_loss(trainer: GRPOTrainer | RLOOTrainer, config: GenerationConfig) -> bool:
    """Whether sampling computes the log-probabilities that the loss computes: by TRL's own method, at its temperature.

    `generate` numbers positions from a prompt's first token, TRL's loss from the padding, so that they must be
    relative.
    """
    replaced = is_replaced(trainer, "_get_per_token_logps_and_entropies")
    at_temperature = config.do_sample and config.temperature == trainer.temperature
    return not replaced and at_temperature and has_relative_positions(trainer.model)
