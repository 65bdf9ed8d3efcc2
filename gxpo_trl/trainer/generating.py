"""Grouped sampling in a TRL trainer: in place of its call of `generate`, where that gives the same completions."""

import copy

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ..sampling.grouped import pad_left, sample_grouped, why_not_grouped


logger = get_logger(__name__)


class GroupedGenerationMixin:
    """Samples the completions of a batch of prompts with `sample_grouped`."""

    _returns_logprobs = True  # whether TRL's `_generate_single_turn` returns log-probabilities beside completions

    def _set_up_generation(self) -> None:
        self._sampled_logps: torch.Tensor | None = None  # (B, T), of the completions that TRL is scoring
        backend, elsewhere = self.args.generation_backend, self._why_not_sampled_here()
        if elsewhere is not None:
            reason = elsewhere
        elif backend == "transformers":
            reason = "`generation_backend` is `transformers`"
        else:
            reason = why_not_grouped(self.model, self.generation_config, in_training=True)
        self._samples_grouped = reason is None
        if self._samples_grouped:
            self._grouped_settings = self._make_grouped_settings()
            return
        if needs := self.args.needs_grouped_generation():
            raise ValueError(f"This run can't have grouped generation: {reason}. Leave out `{'`, `'.join(needs)}`.")
        if elsewhere is None and backend == "auto":
            logger.warning(
                f"Completions are sampled by transformers' `generate`, which takes longer: {reason}. Set "
                "`generation_backend: transformers` if that is meant."
            )

    def _why_not_sampled_here(self) -> str | None:
        """Why it is not TRL's call of `generate` that samples completions; `None` if it is."""
        if self.use_vllm:
            return "vLLM generates"
        return "continuous batching generates" if self.use_transformers_continuous_batching else None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        if not self._samples_grouped:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        completions = self._sample_grouped(prompt_ids)
        return (completions, None) if self._returns_logprobs else completions

    def _sample(self, prompt_ids: list[list[int]], num_generations: int) -> list[list[int]]:
        """One completion of each prompt, of which `num_generations` in a row are equal, by whatever backend."""
        if self._returns_logprobs:
            completions, _ = self._generate_single_turn(prompt_ids, None, {}, num_generations)
        else:
            completions = self._generate_single_turn(prompt_ids, None, {})
        self._sampled_logps = None
        return completions

    def _sample_grouped(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """One completion of each prompt, with the token that ended it."""
        prompts = [torch.tensor(ids, device=self.accelerator.device) for ids in prompt_ids]
        input_ids, attention_mask = pad_left(prompts, self._tokenizer.pad_token_id)
        config, stopping_criteria = self._grouped_settings
        with (
            profiling_context(self, "transformers.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                stopping_criteria=stopping_criteria,
                custom_generate=sample_grouped,
                token_budget=self.args.generation_token_budget,
                lockstep=self.accelerator.num_processes > 1 and (self._dist.is_zero3 or self._dist.is_fsdp),
            )
        if self.args.old_logps_from_sampling:
            self._sampled_logps = output.logps
        completions = output.sequences[:, -output.logps.size(1) :].tolist()
        return [ids[:length] for ids, length in zip(completions, output.lengths.tolist(), strict=True)]

    def _make_grouped_settings(self) -> tuple[GenerationConfig, StoppingCriteriaList]:
        """TRL's settings; stop strings as the criterion they stand for, since custom decoding gets no tokenizer."""
        config = copy.deepcopy(self.generation_config)
        config.return_dict_in_generate = True
        strings, config.stop_strings = config.stop_strings, None
        if strings is None:
            return config, StoppingCriteriaList()
        try:
            return config, StoppingCriteriaList([StopStringCriteria(self._tokenizer, strings)])
        except ValueError as error:
            raise ValueError(
                f"`generation_kwargs: stop_strings`: transformers can't look for {strings} in this tokenizer's output "
                f"({error}). Leave them out, or end completions with `eos_token_id`."
            ) from error

    # ---- Log-probabilities of the sampled tokens as the old ones

    @property
    def _computes_old_logps(self) -> bool:
        """Whether TRL computes the old log-probabilities when it scores completions, before any others."""
        return True

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._sampled_logps is not None:  # TRL did not ask for them
            output["old_per_token_logps"] = self._take_sampled_logps(output["completion_ids"].size(1))
        return output

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._sampled_logps is not None and self._computes_old_logps:
            return self._take_sampled_logps(logits_to_keep), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _take_sampled_logps(self, columns: int) -> torch.Tensor:
        logps, self._sampled_logps = self._sampled_logps, None
        return F.pad(logps, (0, columns - logps.size(1)))
