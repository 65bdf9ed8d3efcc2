"""The model card of a run: a description of the training from its folder, added to the card that TRL writes.

The added part begins with `MARKER`, so that it can be replaced later: after another checkpoint or an evaluation.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from ..evaluation.benchmark import slug
from ..run_folder import (
    ACCURACY,
    BACKWARD_PASSES,
    CARD_NAME,
    CURVES_NAME,
    EXTRAPOLATION_NAME,
    RECIPE_NAME,
    RESULTS_NAME,
    EvaluationResults,
    RunDescription,
    is_there,
    printable,
    read_json,
    read_text,
    write_whole,
)
from ..tasks.datasets import PROBLEM_SETS
from .arms import NO_PART_OF_AN_ARM, Arm
from .figures import Picture, curve_pictures, metric_picture, save_figure
from .runs import Run, holds_run, load_run
from .tables import Table, number, one_line


MARKER = "<!-- From here on: gxpo_trl, from the folder of the run -->"
METHODS = {
    "gxpo": "GXPO: while its gate is open, a step takes two probe steps on a batch of rollouts, extrapolates the "
    "change of the gradient coordinate by coordinate to K steps, moves a part α of the way, and corrects there.",
    "sfpo": "SFPO: while its gate is open, a step takes K fast steps on a batch of rollouts, goes back to a part α of "
    "the way, and takes one slow step from there.",
    "check": "GRPO: after the first step on a batch of rollouts, one micro-batch says whether it was too long.",
    "grpo": "GRPO: one step on each batch of rollouts.",
}
TWO_PASSES = "GXPO in two passes: while its gate is open, a step takes one probe step on a batch of rollouts, and "
TWO_PASSES += "corrects from there."
PHANTOM_STEPS = "GXPO with phantom steps: while its gate is open, a step takes two probe steps on a batch of rollouts "
PHANTOM_STEPS += "and K - 2 optimizer steps on predicted gradients, moves a part α of the way, and corrects there."
STEP_CONTROL = " A multiplier of the learning rate follows the cosine of the gradients before and after: step control."
SHOWN = ("update_rule", "lookahead_steps", "reposition_alpha", "gate_signal", "gate_threshold", "learning_rate")
SHOWN += ("max_steps", "loss_type", "beta", "epsilon", "num_generations", "temperature", "max_completion_length")
SHOWN += ("max_grad_norm", "seed")
"""Settings that a card lists even if they have their defaults."""
GRPO = """@article{shao2024deepseekmath,
    title        = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
    author       = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and
                    Y. K. Li and Y. Wu and Daya Guo},
    year         = 2024,
    eprint       = {arXiv:2402.03300},
}"""
RLOO = r"""@inproceedings{ahmadian2024back,
    title        = {{Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in
                    LLMs}},
    author       = {Arash Ahmadian and Chris Cremer and Matthias Gall{\'{e}} and Marzieh Fadaee and Julia Kreutzer and
                    Olivier Pietquin and Ahmet {\"{U}}st{\"{u}}n and Sara Hooker},
    year         = 2024,
    booktitle    = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics (Volume 1:
                    Long Papers), {ACL} 2024, Bangkok, Thailand, August 11-16, 2024},
    pages        = {12248--12267},
    publisher    = {Association for Computational Linguistics},
    editor       = {Lun{-}Wei Ku and Andre Martins and Vivek Srikumar},
}"""
NEXT = """@article{chen2026next,
    title        = {{Low-rank Optimization Trajectories Modeling for LLM RLVR Acceleration}},
    author       = {Zhipeng Chen and Tao Qian and Wayne Xin Zhao and Ji-Rong Wen},
    year         = 2026,
    eprint       = {arXiv:2604.11446},
}"""


def write_card(
    folder: Path,
    about: RunDescription | None = None,
    evaluation: Path | None = None,
    step: int | None = None,
    into: Path | None = None,
) -> None:
    """Adds to the card of a run, or writes one, with its picture.

    Args:
        folder (`Path`): The folder of the run.
        about (`RunDescription`, *optional*): As in `run.json`; unset to read it from there.
        evaluation (`Path`, *optional*): A folder of `gxpo eval` with the `results.json` of this model.
        step (`int`, *optional*): The step of the checkpoint that the card is for. Later entries of the log are left
            out.
        into (`Path`, *optional*): Where it is written; unset for the run's folder.

    Raises:
        ValueError: If there is no `results.json`.
    """
    into = into or folder
    run = load_run(folder) if holds_run(folder) else Run(folder, "", [])  # of which nothing is logged yet
    if step is not None and step < run.steps:
        run = replace(run, log=[entry for entry in run.log if entry["step"] <= step], finished=False)
    run = replace(run, about=about or run.about)
    run = replace(run, label=run.method)
    results = [*_of_training(run), *(_of_evaluation(evaluation) if evaluation else [])]
    card = _trl_card(folder, run)
    card.data.eval_results = results or None
    card.data.tags = sorted(card.data.tags or [])  # TRL's order changes each time
    card.data.model_name = card.data.model_name or printable(folder.resolve().name)
    known = card.text.split(MARKER)[0].rstrip()
    card.text = "\n".join([known, "", MARKER, "", *_sections(run, results, into, known)])
    write_whole(into / CARD_NAME, str(card))


def _trl_card(folder: Path, run: Run) -> ModelCard:
    """TRL's card, without its broken links if the model is not on the Hub."""
    path, name = folder / CARD_NAME, printable(folder.resolve().name)
    if not is_there(path):
        data = ModelCardData(library_name="transformers", tags=["trl"], model_name=name)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n")
    try:
        card = ModelCard(read_text(path))
    except (YAMLError, TypeError) as error:
        raise ValueError(f"{path} has no YAML that a model card begins with: {one_line(str(error))}.") from error
    card.text = card.text.replace(
        "is a fine-tuned version of [None](https://huggingface.co/None)", "was fine-tuned from a local model"
    ).replace('model="None"', f'model="{run.folder.name}"')
    return card


# ---- What was measured


def _hub_path(benchmark: str) -> tuple[str, str]:
    """The name of a benchmark and where it is."""
    for name, problems in PROBLEM_SETS.items():
        if slug(name) == benchmark:
            return name, problems.path
    return benchmark, benchmark


def _result(benchmark: str, metric: str, value: float) -> EvalResult:
    name, path = _hub_path(benchmark)
    return EvalResult(
        task_type="text-generation",
        dataset_type=path,
        dataset_name=name,
        metric_type=metric,
        metric_name=metric,
        metric_value=round(value, 4),
    )


def _of_training(run: Run) -> Iterator[EvalResult]:
    """The last score of each benchmark during training."""
    for name in run.metrics:
        if match := ACCURACY.fullmatch(name):
            yield _result(match[1], match[2], run.last(name))


def _of_evaluation(folder: Path) -> Iterator[EvalResult]:
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RESULTS_NAME}. Name a model's folder in the output of `gxpo eval`.")
    for benchmark, found in read_json(path, EvaluationResults)["benchmarks"].items():
        for metric, value in found["metrics"].items():
            if metric.startswith("avg@") or metric == list(found["metrics"])[-1]:
                yield _result(slug(benchmark), metric, value["value"])


# ---- What the card says


def _sections(run: Run, results: list[EvalResult], into: Path, known: str) -> Iterator[str]:
    settings, loss = run.settings, "RLOO" if "RLOO" in run.about.get("trainer", "") else "GRPO"
    rule = METHODS.get(settings.get("update_rule"))
    if settings.get("update_rule") == "gxpo" and settings.get("lookahead_steps") == 1:
        rule = TWO_PASSES
    elif settings.get("update_rule") == "gxpo" and settings.get("extrapolation") == "optimizer":
        rule = PHANTOM_STEPS
    if rule:
        rule += STEP_CONTROL if settings.get("step_control", "none") != "none" else ""
        yield from ("## The update", "", f"{rule.replace('GRPO', loss)} The loss is {loss}'s.", "")
    yield from (_spent(run), "")
    if picture := _curve(run):
        save_figure(picture.figure, into / CURVES_NAME, dpi=150)
        yield from (f"![{re.sub(r'[][<`]', '', one_line(picture.caption))}]({CURVES_NAME})", "")
    if results:
        rows = [(r.dataset_name, r.metric_name, number(r.metric_value)) for r in results]
        yield from ("## Evaluation", "", Table("", "", ("benchmark", "metric", "value"), rows).markdown(), "")
    if settings:
        yield from ("## Settings", "", Table("", "", ("setting", "value"), _settings(run)).markdown(), "")
    if (run.folder / RECIPE_NAME).is_file():
        yield from (f"To train it again: `gxpo train --config {RECIPE_NAME}`.", "")
    has_trajectory = settings.get("trajectory_steps") is not None or (run.folder / EXTRAPOLATION_NAME).is_file()
    citations = [RLOO if loss == "RLOO" else GRPO, *([NEXT] if has_trajectory else [])]
    if citations := [entry for entry in citations if entry.partition(",")[0] not in known]:  # TRL's card has its own
        yield from ("## Further citations", "", "```bibtex", *citations, "```", "")


def _spent(run: Run) -> str:
    passes = run.last(BACKWARD_PASSES)
    parts = [f"{run.steps:,} optimizer steps"]
    if completions := run.about.get("completions_per_step"):
        parts.append(f"{completions:,} completions each")
    if passes is not None:
        parts.append(f"{passes:,.0f} backward passes in all")
    if run.shutoff_step is not None:
        parts.append(f"the gate shut after step {run.shutoff_step:,}")
    return ", ".join(parts) + ("." if run.finished else "; the run had not ended yet.")


def _curve(run: Run) -> Picture | None:
    """Held-out accuracy against rollouts, or against steps if the run does not count rollouts; otherwise the
    reward.
    """
    arms = [Arm(run.label, (run,))]
    for benchmark in run.points:
        pictures = {picture.name: picture for picture in curve_pictures(arms, benchmark, "curve")}
        return pictures.get("curve-rollouts") or next(iter(pictures.values()))
    return metric_picture(arms, {"reward": "reward"}, "curve", "Mean reward of the rollouts", "reward")


def _settings(run: Run) -> list[tuple[str, str]]:
    names = dict.fromkeys([*SHOWN, *run.about.get("changed", {})])
    rows = [
        (f"`{name.replace('`', '')}`", str(run.settings[name]))
        for name in names
        if name in run.settings and (name in SHOWN or not name.startswith(NO_PART_OF_AN_ARM))
    ]
    adapter = run.about.get("adapter") or {}
    rows += [(f"LoRA `{name}`", str(adapter[name])) for name in ("r", "lora_alpha", "lora_dropout") if name in adapter]
    if "target_modules" in adapter:
        targets = adapter["target_modules"]
        targets = targets if isinstance(targets, list) else [targets]
        kinds = sorted({str(name).rpartition(".")[2] for name in targets})
        rows.append(("LoRA `target_modules`", ", ".join(kinds)))
    return rows
