"""A training recipe as one object, made of the dataclasses whose fields are its keys."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from ..callbacks.benchmarks import BenchmarkArguments
from ..callbacks.trajectories import TrajectoryArguments
from ..tasks.generated import read_mapping
from ..trainer.config import LookaheadConfig
from ..trainer.grouped import GroupedSamplingArguments
from .keys import Origin


@dataclass
class ModelArguments(ModelConfig):
    """TRL's settings of the model. A list of one module stays a list."""

    def __post_init__(self):
        super().__post_init__()
        target = self.lora_target_modules  # where it is a text, PEFT takes it for a pattern of whole paths
        if isinstance(target, str) and re.fullmatch(r"[\w.]+", target):
            self.lora_target_modules = [target]


@dataclass
class ProblemArguments:
    r"""
    How problems become prompts, if `dataset_name` is a problem set (`gxpo_trl/tasks/datasets.py`) or a file.

    Parameters:
        prompt (`str`, *optional*):
            Template of the user's message, with `{problem}` in it. Unset for only the problem.
        system_prompt (`str`, *optional*):
            System message. Unset for none.
        problem_column, answer_column (`str`, *optional*):
            Columns of a file, a folder or a Hub dataset that is not a named problem set.
        reasoning_gym (`dict[str, Any]`, *optional*):
            For `dataset_name: reasoning_gym/<task>` and benchmarks of such names: `seed` (0), `size` and `test_size`
            (2000 and 200), and, by a task's name, the settings of its generator and its `weight` in a mixture.
    """

    prompt: str | None = field(default=None, metadata={"help": "Template of the user's message, with {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message. Unset for none."})
    problem_column: str | None = field(default=None, metadata={"help": "Of a dataset that has no name here."})
    answer_column: str | None = field(default=None, metadata={"help": "Of a dataset that has no name here."})
    reasoning_gym: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the tasks of reasoning-gym; on a command line as JSON."}
    )

    def __post_init__(self):
        self.reasoning_gym = read_mapping("reasoning_gym", self.reasoning_gym)


@dataclass
class ExtrapolationLoopArguments:
    r"""
    NExt in one recipe: train, extrapolate, and continue training. `trajectory_steps` records the adapters.

    Parameters:
        resume_adapter (`str`, *optional*):
            A LoRA adapter to start from, such as one of `gxpo extrapolate`. Its own rank and α are used instead of the
            recipe's.
        extrapolate_after (`int`, *optional*):
            Optimizer steps after which the run is extrapolated. It continues from there up to `max_steps`, which
            counts only trained steps. Unset for no extrapolation.
        extrapolate_method (`str`, *optional*, defaults to `"next"`):
            As `method` of `gxpo extrapolate`.
        extrapolate_steps_ahead (`int`, *optional*):
            As `steps_ahead` of `gxpo extrapolate`. Unset for five checkpoints.
        extrapolate_alpha (`float`, *optional*, defaults to `1.0`):
            As `alpha` of `gxpo extrapolate`.
    """

    resume_adapter: str | None = field(default=None, metadata={"help": "A LoRA adapter to start from."})
    extrapolate_after: int | None = field(
        default=None, metadata={"help": "Steps after which the run is extrapolated; it continues from there."}
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
            Prints what the recipe needs in tokens, memory and backward passes, then rehearses it: a few small steps of
            the embedded model.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Print what the recipe needs, then rehearse it in a few steps of the embedded model."},
    )


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. It is parsed once; variants of it are made by `dataclasses.replace`.

    Attributes:
        text (`str`): The recipe as one file, which is saved with a run.
        origin (`Origin`): Where each setting came from. The other attributes are its parts.
    """

    script: GRPOScriptArguments
    training: LookaheadConfig
    model: ModelArguments
    mixture: DatasetMixtureConfig
    problems: ProblemArguments
    sampling: GroupedSamplingArguments
    benchmarks: BenchmarkArguments
    trajectory: TrajectoryArguments
    loop: ExtrapolationLoopArguments
    rehearsal: RehearsalArguments
    text: str = ""
    origin: Origin = field(default_factory=Origin)

    @property
    def parts(self) -> tuple:
        """The dataclasses whose fields are its keys."""
        return tuple(getattr(self, name) for name in PARTS)

    def settings(self) -> dict[str, Any]:
        """All keys, with their values."""
        return {f.name: getattr(part, f.name) for part in self.parts for f in dataclasses.fields(part)}


PARTS = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in ("text", "origin")}


def replace_training(args: LookaheadConfig, **changes: Any) -> LookaheadConfig:
    """Training arguments with some settings changed, as if these had been given from the start.

    `dataclasses.replace` starts from values that were already computed. Those that follow from other settings are
    computed again:

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
