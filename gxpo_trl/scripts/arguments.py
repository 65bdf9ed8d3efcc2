"""What a training recipe says: one object, of the dataclasses whose fields its keys are."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from ..callbacks.benchmarks import BenchmarkArguments
from ..callbacks.trajectories import TrajectoryArguments
from ..trainer.config import LookaheadConfig
from ..trainer.grouped import GroupedSamplingArguments


@dataclass
class ProblemArguments:
    r"""
    How problems become prompts, where `dataset_name` is a problem set (`gxpo_trl/tasks/datasets.py`) or a file.

    Parameters:
        prompt (`str`, *optional*):
            Template of the user's message, with `{problem}` in it. Unset for the problem alone.
        system_prompt (`str`, *optional*):
            System message. Unset for none.
        problem_column, answer_column (`str`, *optional*):
            Columns of a file or of a Hub dataset that has no name here.
    """

    prompt: str | None = field(default=None, metadata={"help": "Template of the user's message, with {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message. Unset for none."})
    problem_column: str | None = field(default=None, metadata={"help": "Of a dataset that has no name here."})
    answer_column: str | None = field(default=None, metadata={"help": "Of a dataset that has no name here."})


@dataclass
class ExtrapolationLoopArguments:
    r"""
    NExt in one recipe: train, extrapolate, go on. What an adapter is extrapolated from is `trajectory_steps`' doing.

    Parameters:
        resume_adapter (`str`, *optional*):
            A LoRA adapter to start from, such as one of `gxpo extrapolate`. Its own rank and α hold, whatever the
            recipe says of LoRA.
        extrapolate_after (`int`, *optional*):
            Optimizer steps after which the run is extrapolated and goes on from there, up to `max_steps`, which counts
            the steps that are trained. Unset for a run without.
        extrapolate_method (`str`, *optional*, defaults to `"next"`):
            As `method` of `gxpo extrapolate`.
        extrapolate_steps_ahead (`int`, *optional*):
            As `steps_ahead` of `gxpo extrapolate`. Unset for five checkpoints.
        extrapolate_alpha (`float`, *optional*, defaults to `1.0`):
            As `alpha` of `gxpo extrapolate`.
    """

    resume_adapter: str | None = field(default=None, metadata={"help": "A LoRA adapter to start from."})
    extrapolate_after: int | None = field(
        default=None, metadata={"help": "Steps after which the run is extrapolated and goes on from there."}
    )
    extrapolate_method: str = field(default="next", metadata={"help": "As `method` of `gxpo extrapolate`."})
    extrapolate_steps_ahead: int | None = field(
        default=None, metadata={"help": "As `steps_ahead` of `gxpo extrapolate`."}
    )
    extrapolate_alpha: float = field(default=1.0, metadata={"help": "As `alpha` of `gxpo extrapolate`."})


@dataclass
class RehearsalArguments:
    r"""
    Parameters:
        dry_run (`bool`, *optional*, defaults to `False`):
            Says what the recipe would take, in tokens, memory and backward passes, then carries it out in small: a few
            steps of the embedded model on the embedded task.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Say what the recipe would take, then carry it out in small, on the embedded model."},
    )


@dataclass(frozen=True)
class Recipe:
    """What a recipe says. It is parsed once; what is like it is a `dataclasses.replace` of it.

    Attributes:
        text (`str`): The same as one file, as it is left with a run. The others are its parts.
    """

    script: GRPOScriptArguments
    training: LookaheadConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    problems: ProblemArguments
    sampling: GroupedSamplingArguments
    benchmarks: BenchmarkArguments
    trajectory: TrajectoryArguments
    loop: ExtrapolationLoopArguments
    rehearsal: RehearsalArguments
    text: str = ""

    @property
    def parts(self) -> tuple:
        """The dataclasses that its keys are fields of."""
        return tuple(getattr(self, name) for name in PARTS)

    def settings(self) -> dict[str, Any]:
        """All keys, with their values."""
        return {f.name: getattr(part, f.name) for part in self.parts for f in dataclasses.fields(part)}


PARTS = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name != "text"}


def replace_training(args: LookaheadConfig, **changes: Any) -> LookaheadConfig:
    """Training arguments that differ in these settings, as if they had been given with the others.

    `dataclasses.replace` makes them anew from what was made of them. What follows from other settings is made again:

    - `do_eval`, of `eval_strategy`;
    - `gradient_accumulation_steps`, of `prompts_per_step`;
    - of `generation_batch_size` and `steps_per_generation`, TRL takes one and makes the other. It is given the second,
      unless `changes` have the first: rollouts last for as many micro-batches as they did.
    """
    derived: dict[str, Any] = {"generation_batch_size": None}
    if changes.get("generation_batch_size") is not None:
        derived["steps_per_generation"] = None
    if args.eval_strategy != "no":
        derived["do_eval"] = False
    if changes.get("prompts_per_step", args.prompts_per_step) is not None:
        derived["gradient_accumulation_steps"] = 1
    return dataclasses.replace(args, **{**derived, **changes})
