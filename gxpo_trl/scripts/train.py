"""Trains a language model from a recipe.

    accelerate launch -m gxpo_trl.scripts.train --config recipes/tiny/gxpo.yaml
    gxpo train --config recipes/tiny/gxpo.yaml --learning_rate 3e-5 --output_dir out/slow

Model, dataset, PEFT and rewards are built from a recipe as TRL's own GRPO script builds them; `gxpo_trl/arithmetic`
and `gxpo_trl/tiny` name the embedded dataset and model. `--resume_from_checkpoint last` goes on from the newest
checkpoint in the output folder, and starts from the beginning where there is none.
"""

import dataclasses
import os
import sys

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import get_dataset, get_peft_config, get_quantization_config

from ..tasks import resolve_dataset, resolve_model, resolve_reward
from ..trainer.gxpo import GXPOTrainer
from ..trainer.lookahead_trainer import LookaheadTrainer
from ..trainer.sfpo import SFPOTrainer
from .recipe import Recipe, parse_recipe


TRAINERS = {"gxpo": GXPOTrainer, "sfpo": SFPOTrainer, "grpo": LookaheadTrainer}


def build_trainer(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> LookaheadTrainer:
    """The trainer that a recipe describes.

    Raises:
        ValueError: If the recipe names no dataset, no model or no reward, or one that does not exist.
    """
    script_args, training_args, model_args, dataset_args, problem_args = recipe
    if not script_args.dataset_name and not dataset_args.datasets:
        raise ValueError("The recipe names no data. Set `dataset_name` or `datasets`.")
    if not model_args.model_name_or_path:
        raise ValueError("The recipe names no model. Set `model_name_or_path`.")
    reward_funcs = [resolve_reward(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        reward_funcs.append(script_args.reward_model_name_or_path)
    if not reward_funcs:
        raise ValueError("The recipe names no reward. Set `reward_funcs` or `reward_model_name_or_path`.")
    if dataset_args.datasets:
        given = [name for name, value in dataclasses.asdict(problem_args).items() if value is not None]
        if given:
            raise ValueError(f"`datasets` mixes datasets with prompts of their own. Leave out `{'`, `'.join(given)}`.")
        dataset = get_dataset(dataset_args)
    else:
        dataset = resolve_dataset(
            script_args.dataset_name,
            script_args.dataset_config,
            script_args.dataset_streaming,
            script_args.dataset_train_split,
            **dataclasses.asdict(problem_args),
        )
    for name in ("prompt", "system_prompt"):  # benchmarks ask as the training data does, unless told otherwise
        if getattr(training_args, f"eval_{name}") is None:
            setattr(training_args, f"eval_{name}", getattr(problem_args, name))
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
        **(training_args.model_init_kwargs or {}),
    }
    evaluates = training_args.eval_strategy != "no"
    return TRAINERS[training_args.update_rule](
        model=resolve_model(model_args.model_name_or_path),
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        callbacks=callbacks,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def train(trainer: LookaheadTrainer, recipe: Recipe) -> None:
    """Trains, saves model, state and model card, and pushes when asked."""
    script_args, training_args = recipe[:2]
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == "last":
        exists = os.path.isdir(training_args.output_dir)
        checkpoint = get_last_checkpoint(training_args.output_dir) if exists else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.create_model_card(
        model_name=os.path.basename(os.path.abspath(training_args.output_dir)), dataset_name=script_args.dataset_name
    )
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    try:
        recipe = parse_recipe(sys.argv[1:] if arguments is None else arguments, prog)
        trainer = build_trainer(recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    train(trainer, recipe)
    trainer.accelerator.print(f"Done. The model is in {trainer.args.output_dir}.")
    trainer.end()


if __name__ == "__main__":
    main()
