"""The update rules, in one table: their names, papers, passes, and how the settings become an update."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl import GRPOTrainer

from ..update.extrapolation import Extrapolation
from ..update.rule import LookaheadRule, two_passes


if TYPE_CHECKING:
    from .config import LookaheadConfig


@dataclass(frozen=True)
class RuleEntry:
    """What a rule is called, and what it needs.

    Attributes:
        name (`str`): On model cards and in default folder names.
        trainer (`str`): The public class that runs this rule.
        tags (`tuple[str, ...]`): Of the model card.
        paper (`dict[str, Any]`): As TRL's trainers have it.
        fewest_steps (`int`): The least `lookahead_steps`.
    """

    name: str
    trainer: str
    tags: tuple[str, ...]
    paper: dict[str, Any]
    fewest_steps: int


RULES = {
    "gxpo": RuleEntry(
        name="GXPO",
        trainer="GXPOTrainer",
        tags=("trl", "gxpo"),
        paper={
            "title": "Gradient Extrapolation-Based Policy Optimization",
            "id": "2605.06755",
            # docstyle-ignore
            "citation": textwrap.dedent("""\
                @article{swapnil2026gxpo,
                    title        = {{Gradient Extrapolation-Based Policy Optimization}},
                    author       = {Ismam Nur Swapnil and Aranya Saha and Tanvir Ahmed Khan and Mohammad Ariful Haque
                                    and Ser-Nam Lim},
                    year         = 2026,
                    eprint       = {arXiv:2605.06755},
                }"""),
        },
        fewest_steps=1,
    ),
    "sfpo": RuleEntry(
        name="SFPO",
        trainer="SFPOTrainer",
        tags=("trl", "sfpo"),
        paper={
            "title": "Slow-Fast Policy Optimization: Reposition-Before-Update for LLM Reasoning",
            "id": "2510.04072",
            # docstyle-ignore
            "citation": textwrap.dedent("""\
                @inproceedings{wang2026sfpo,
                    title        = {{Slow-Fast Policy Optimization: Reposition-Before-Update for LLM Reasoning}},
                    author       = {Ziyan Wang and Zheng Wang and Jie Fu and Xingwei Qu and Qi Cheng and
                                    Shengpu Tang and Minjia Zhang and Xiaoming Huo},
                    year         = 2026,
                    booktitle    = {International Conference on Learning Representations},
                }"""),
        },
        fewest_steps=1,
    ),
    "check": RuleEntry(
        name="GRPO-check",
        trainer="LookaheadTrainer",
        tags=(*GRPOTrainer._tag_names, "step-control"),
        paper=GRPOTrainer._paper,
        fewest_steps=1,
    ),
    "grpo": RuleEntry(
        name=GRPOTrainer._name,
        trainer="LookaheadTrainer",
        tags=tuple(GRPOTrainer._tag_names),
        paper=GRPOTrainer._paper,
        fewest_steps=1,
    ),
}


ONE_PASS = ("grpo", "check")
"""Those whose step is TRL's own."""


def make_rule(args: "LookaheadConfig") -> LookaheadRule | None:
    """The update rule of a configuration as data; `None` for TRL's own single pass."""
    steps, alpha, on_host = args.lookahead_steps, args.reposition_alpha, args.snapshot_device == "cpu"
    if args.update_rule in ONE_PASS:
        return None
    if args.update_rule == "sfpo":
        return LookaheadRule(probes=steps, alpha=alpha, copies_on_host=on_host)
    if steps == 1:
        return two_passes(on_host)
    extrapolation = Extrapolation(
        lookahead_steps=steps,
        of_optimizer=args.extrapolation == "optimizer",
        active_threshold=args.active_threshold,
        retention_min=args.retention_min,
        retention_max=args.retention_max,
        scale_max=steps / 2 + 1 if args.scale_max is None else args.scale_max,
    )
    return LookaheadRule(probes=2, alpha=alpha, extrapolation=extrapolation, copies_on_host=on_host)
