"""The trainer: TRL's GRPOTrainer, in which a batch of rollouts becomes a lookahead update."""

import json
import os
from pathlib import Path

from accelerate.logging import get_logger
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..engines import reduce_in_fp32
from ..engines.support import check_engine, check_parameter_precision
from ..rollout.compaction import LOSS_WEIGHT
from ..run_folder import LOOKAHEAD_STATE_NAME
from .config import LookaheadConfig
from .rules import RULES
from .update import LookaheadUpdate


logger = get_logger(__name__)


class LookaheadTrainer(GRPOTrainer):
    """
    Trainer for lookahead policy updates: [`~trl.GRPOTrainer`] that moves the policy further on each batch of rollouts.

    The first pass over the rollouts is TRL's own. When its last micro-batch is done and the active phase lasts,
    `training_step` runs the rest of the update rule of `args.update_rule` on the same rollouts and leaves the
    corrective gradient to the training loop, which clips and steps as always. Schedule, callbacks, logging, saving,
    evaluation and vLLM see committed weights only, once per step.

    Args:
        model, reward_funcs:
            As for [`~trl.GRPOTrainer`].
        args ([`LookaheadConfig`], *optional*):
            Configuration. If `None`, a default one.
        *positional, **kwargs:
            The other arguments of [`~trl.GRPOTrainer`], in its order.

    Attributes:
        lookahead ([`~gxpo_trl.trainer.update.LookaheadUpdate`]):
            The update rule at work: gate, engine, and what the run has counted.

    Raises:
        `ValueError`: If the set-up is not supported: the engine, the precision of the trainable parameters, or `args`
            that are no [`LookaheadConfig`] or have an `update_rule` that this class does not run.
    """

    _config_class = LookaheadConfig
    _update_rule: str | None = None  # the one rule of a subclass; here each

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            name = RULES[self._update_rule or LookaheadConfig.update_rule].name
            args = self._config_class(f"{model_name.split('/')[-1]}-{name}")
        if not isinstance(args, LookaheadConfig):
            raise ValueError(
                f"`args` must be a {self._config_class.__name__}, got a {type(args).__name__}. It takes every "
                f"argument of the {type(args).__name__}: change the name."
            )
        if self._update_rule not in (None, args.update_rule):
            raise ValueError(
                f"{type(self).__name__} runs `update_rule: {self._update_rule}`, got `{args.update_rule}`. Use "
                f"{RULES[args.update_rule].trainer}, or LookaheadTrainer, which runs each rule."
            )
        rule = RULES[args.update_rule]
        self._name, self._tag_names, self._paper = rule.name, list(rule.tags), rule.paper
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

        self.lookahead = LookaheadUpdate(self)
        if self.lookahead.rule is not None:
            check_engine(self.accelerator, self.model)
            reduce_in_fp32(self.accelerator)
            if not args.allow_low_precision_parameters:
                check_parameter_precision(self.accelerator, self.model)
        self.accelerator.print(self._describe_batch())

    @property
    def lookahead_active(self) -> bool:
        """Whether the next optimizer step is a lookahead step."""
        return self.lookahead.active

    @property
    def backward_passes(self) -> int:
        """Passes over rollouts that the run has made so far."""
        return self.lookahead.backward_passes

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        with self.lookahead.timed():
            return self.lookahead.layout.arrange(inputs)

    def training_step(self, model, inputs, num_items_in_batch):
        with self.lookahead.micro_batch(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.lookahead.open_micro_batch(inputs)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * inputs[LOSS_WEIGHT] if LOSS_WEIGHT in inputs else loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.lookahead.keep_logps(outputs[0])
        return outputs

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            path = Path(output_dir) / LOOKAHEAD_STATE_NAME
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(self.lookahead.state_dict(), indent=2))
            os.replace(partial, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / LOOKAHEAD_STATE_NAME
        if path.is_file():
            self.lookahead.load_state_dict(json.loads(path.read_text()))
        else:
            logger.warning(
                f"{checkpoint} holds no {LOOKAHEAD_STATE_NAME}: it was not saved by a LookaheadTrainer. The gate and "
                "the count of backward passes start afresh."
            )

    def _describe_batch(self) -> str:
        """The start-up line: prompts × generations × devices × accumulation × passes."""
        args, rule = self.args, self.lookahead.rule
        completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        passes = "1 pass" if rule is None else f"{rule.passes} passes while active and 1 after"
        return (
            f"{args.update_rule.upper()}: {completions / args.num_generations:g} prompts × {args.num_generations} "
            f"generations = {completions} completions an optimizer step, as {args.world_size} device(s) × "
            f"{args.gradient_accumulation_steps} accumulation steps × {args.per_device_train_batch_size}; "
            f"{passes} over them."
        )
