"""The trainer: TRL's GRPOTrainer, in which a batch of rollouts becomes a lookahead update."""

import contextlib
import json
import shutil
from collections.abc import Sized
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch.utils.data import IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..engines import reduce_in_fp32
from ..engines.support import check_engine, check_parameter_precision, check_rates, check_trainable, launcher_surprises
from ..plain_values import make_history_plain
from ..rollout.compaction import LOSS_WEIGHT
from ..run_folder import LOOKAHEAD_STATE_NAME, write_whole
from .advice import FlatGroupsCallback
from .checkpoints import MANIFEST, check_whole, describe, newest_whole, read_state, skip, what_starts_afresh
from .config import LookaheadConfig
from .rules import RULES
from .step_callbacks import StepCallback, StepTakenCallback
from .update import LookaheadUpdate
from .vllm import merge_out_of_place


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
        `ValueError`: If nothing would be trained, the data do not fill a generation batch, or the set-up is not
            supported: the engine, the precision of the trainable parameters, the optimizer, or `args` that are not a
            [`LookaheadConfig`] or have an `update_rule` that this class does not run.
    """

    _config_class = LookaheadConfig
    _update_rule: str | None = None  # the one rule of a subclass; here each
    _limit_put_aside: int | None = None  # `save_total_limit` while a checkpoint is saved
    _is_save_postponed = False  # whether a checkpoint was asked for inside a step

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

        if isinstance(self.train_dataset, Sized) and not isinstance(self.train_dataset, IterableDataset):
            args.check_prompts(len(self.train_dataset))
        check_trainable(self.model, self.optimizer)
        self._has_trained = False
        self.lookahead = LookaheadUpdate(self)
        if self.lookahead.control is not None and self.optimizer is not None:
            check_rates(self.optimizer)
        self.callback_handler.callbacks.insert(0, StepTakenCallback(self.lookahead))
        self.add_callback(StepCallback(self.lookahead))
        self.add_callback(FlatGroupsCallback())
        if args.update_rule != "grpo":
            check_engine(self.accelerator, self.model)
            if not args.allow_low_precision_parameters:
                check_parameter_precision(self.accelerator, self.model)
        if self.lookahead.rule is not None:  # `check` leaves the plain step as it is, bit for bit
            reduce_in_fp32(self.accelerator)
        if self.use_vllm and is_peft_model(self.model):
            merge_out_of_place(self.vllm_generation, self._log_adapter_share)
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        for surprise in launcher_surprises(self.accelerator, precision):
            logger.warning(surprise)
        self.accelerator.print(self._describe_batch())

    @property
    def lookahead_active(self) -> bool:
        """Whether the next optimizer step is a lookahead step."""
        return self.lookahead.active

    @property
    def backward_passes(self) -> int:
        """Passes over rollouts that the run has made so far."""
        return self.lookahead.backward_passes

    def _log_adapter_share(self, share: float) -> None:
        self._metrics["train"]["lookahead/vllm_adapter_share"].append(share)

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        with self.lookahead.timed():
            return self.lookahead.layout.arrange(inputs)

    def _generate_and_score_completions(self, inputs):
        return self.lookahead.scoring.generate_and_score(super()._generate_and_score_completions, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.lookahead.scoring.score(super()._get_per_token_logps_and_entropies, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch):
        with self.lookahead.micro_batch(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * inputs[LOSS_WEIGHT] if LOSS_WEIGHT in inputs else loss

    def save_model(self, output_dir=None, _internal_call=False):
        args = self.args
        args.save_total_limit = args.save_total_limit or self._limit_put_aside  # which `training_args.bin` has
        try:
            with self.lookahead.committed():
                super().save_model(output_dir, _internal_call)
        finally:
            if self._limit_put_aside is not None:
                args.save_total_limit = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Like TRL's. `True` or `"last"` resumes from the newest whole checkpoint; a named one must be whole. Called
        again, it begins a new run from the weights that there are.

        Raises:
            ValueError: If there is no checkpoint to resume from, or only part of one.
        """
        if self._has_trained:
            self.lookahead.begin_run()
        self._has_trained, self._is_save_postponed = True, False
        if resume_from_checkpoint:
            resume_from_checkpoint = self._open_checkpoint(resume_from_checkpoint)
        try:
            with self.lookahead.training():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            make_history_plain(self.state.log_history, 0)  # which is saved as JSON

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # Trainer takes a step before it checks
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _open_checkpoint(self, name: str | bool) -> str:
        """Restores the gate and the counts of a checkpoint, and returns its folder."""
        skipped = {}
        if name is True or name == "last":
            checkpoint, skipped = newest_whole(Path(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        else:
            checkpoint = Path(name)
            check_whole(checkpoint)
        self.accelerator.wait_for_everyone()  # all have looked
        for message in (*skip(skipped, self.args.should_save), *what_starts_afresh(checkpoint)):
            logger.warning(message)
        if (state := read_state(checkpoint)) is not None:
            self.lookahead.load_state_dict(state)
        return str(checkpoint)

    def _save_checkpoint(self, model, trial):
        """Trainer writes its own state last, and ours is first: a checkpoint that has both has what is between them.

        Older ones are deleted when every process has saved, not when the first has. Inside a step (a SIGTERM with
        `enable_jit_checkpoint`) it waits for the step's end: the optimizer has then taken probes, and the gate has
        seen them.
        """
        if self.lookahead.in_step:
            self._is_save_postponed = True
            return
        make_history_plain(self.state.log_history, 0)
        args, run = self.args, self._get_output_dir(trial)
        folder = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt, with which this one would be mixed
            folder.mkdir(parents=True)
            state = self.lookahead.state_dict() | {MANIFEST: describe(args)}
            write_whole(folder / LOOKAHEAD_STATE_NAME, json.dumps(state, indent=2))
        self.accelerator.wait_for_everyone()
        self._limit_put_aside = limit = args.save_total_limit
        args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, self._limit_put_aside = limit, None
        self.accelerator.wait_for_everyone()
        if args.should_save:
            rotate_checkpoints(run, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_postponed_checkpoint(self):
        if self._is_save_postponed:
            self._is_save_postponed = False
            self._save_checkpoint(self.model, None)
            before = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step - 1}"
            if self.args.should_save:
                with contextlib.suppress(OSError):  # the folder that transformers has made for it, if it is empty
                    before.rmdir()

    def _describe_batch(self) -> str:
        """The start-up line: prompts × generations × devices × accumulation × passes."""
        args, rule = self.args, self.lookahead.rule
        completions = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        single = "1 pass and two micro-batches" if self.lookahead.checks else "1 pass"
        single += f" in every {args.steps_of_batch} steps" if self.lookahead.checks and args.steps_of_batch > 1 else ""
        passes = single if rule is None else f"{rule.passes} passes while active and 1 after"
        return (
            f"{args.update_rule.upper()}: {completions / args.num_generations:g} prompts × {args.num_generations} "
            f"generations = {completions} completions an optimizer step, as {args.world_size} device(s) × "
            f"{args.gradient_accumulation_steps} accumulation steps × {args.per_device_train_batch_size}; "
            f"{passes} over them."
        )
