"""The model card of a run: what its folder says of the training, added to the card that TRL writes.

The part that is added begins with `MARKER`, so that it can be written again when more is known: a later checkpoint, an
evaluation.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.benchmark import slug
from ..run_folder import (
    ACCURACY,
    BACKWARD_PASSES,
    CARD_NAME,
    CURVES_NAME,
    EXTRAPOLATION_NAME,
    RECIPE_NAME,
    RESULTS_NAME,
    RunDescription,
    write_whole,
)
from ..tasks.datasets import PROBLEM_SETS
from .arms import NO_PART_OF_AN_ARM, Arm
from .figures import Picture, curve_pictures, metric_picture
from .runs import Run, holds_run, load_run
from .tables import Table, number


MARKER = "<!-- From here on: gxpo_trl, from the folder of the run -->"
METHODS = {
    "gxpo": "GXPO: while its gate is open, a step takes two probe steps on a batch of rollouts, extrapolates the "
    "change of the gradient coordinate by coordinate to K steps, moves a part α of the way, and corrects there.",
    "sfpo": "SFPO: while its gate is open, a step takes K fast steps on a batch of rollouts, goes back to a part α of "
    "the way, and takes one slow step from there.",
    "grpo": "GRPO: one step on each batch of rollouts.",
}
SHOWN = ("update_rule", "lookahead_steps", "reposition_alpha", "gate_signal", "gate_threshold", "learning_rate")
SHOWN += ("max_steps", "loss_type", "beta", "epsilon", "num_generations", "temperature", "max_completion_length")
SHOWN += ("max_grad_norm", "seed")
"""Settings that a card names even where they are the defaults."""
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
    """Adds to the card of a run, or writes one, with the picture that it shows.

    Args:
        folder (`Path`): Of the run.
        about (`RunDescription`, *optional*): As in `run.json`; unset to read it from there.
        evaluation (`Path`, *optional*): A folder of `gxpo eval` with the `results.json` of this model.
        step (`int`, *optional*): Of the checkpoint that the card is for, which knows nothing of what came later.
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
    card.data.tags = sorted(card.data.tags or [])  # TRL's come in another order each time
    card.data.model_name = card.data.model_name or folder.resolve().name
    known = card.text.split(MARKER)[0].rstrip()
    card.text = "\n".join([known, "", MARKER, "", *_sections(run, results, into, known)])
    write_whole(into / CARD_NAME, str(card))


def _trl_card(folder: Path, run: Run) -> ModelCard:
    """TRL's, without the links to nowhere that it has where a model is no model of the Hub."""
    path = folder / CARD_NAME
    if not path.is_file():
        title = f"# {folder.resolve().name}\n"
        data = ModelCardData(library_name="transformers", tags=["trl"], model_name=folder.resolve().name)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}")
    card = ModelCard.load(path)
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
    """The last of each benchmark that was scored on the way."""
    for name in run.metrics:
        if match := ACCURACY.fullmatch(name):
            yield _result(match[1], match[2], run.last(name))


def _of_evaluation(folder: Path) -> Iterator[EvalResult]:
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RESULTS_NAME}. Name a model's folder in the output of `gxpo eval`.")
    for benchmark, found in json.loads(path.read_text())["benchmarks"].items():
        for metric, value in found["metrics"].items():
            if metric.startswith("avg@") or metric == list(found["metrics"])[-1]:
                yield _result(slug(benchmark), metric, value["value"])


# ---- What the card says


def _sections(run: Run, results: list[EvalResult], into: Path, known: str) -> Iterator[str]:
    settings, loss = run.settings, "RLOO" if "RLOO" in run.about.get("trainer", "") else "GRPO"
    if rule := METHODS.get(settings.get("update_rule")):
        yield from ("## The update", "", f"{rule.replace('GRPO', loss)} The loss is that of {loss}.", "")
    yield from (_spent(run), "")
    if picture := _curve(run):
        picture.figure.savefig(into / CURVES_NAME, dpi=150)
        yield from (f"![{picture.caption}]({CURVES_NAME})", "")
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
    """Accuracy on what is held out against rollouts, or steps where the run does not count them; else the reward."""
    arms = [Arm(run.label, (run,))]
    for benchmark in run.points:
        pictures = {picture.name: picture for picture in curve_pictures(arms, benchmark, "curve")}
        return pictures.get("curve-rollouts") or next(iter(pictures.values()))
    return metric_picture(arms, {"reward": "reward"}, "curve", "Mean reward of the rollouts", "reward")


def _settings(run: Run) -> list[tuple[str, str]]:
    names = dict.fromkeys([*SHOWN, *run.about.get("changed", {})])
    rows = [
        (f"`{name}`", str(run.settings[name]).replace("|", "\\|"))
        for name in names
        if name in run.settings and (name in SHOWN or not name.startswith(NO_PART_OF_AN_ARM))
    ]
    adapter = run.about.get("adapter") or {}
    rows += [(f"LoRA `{name}`", str(adapter[name])) for name in ("r", "lora_alpha", "lora_dropout") if name in adapter]
    if "target_modules" in adapter:
        targets = adapter["target_modules"]
        kinds = [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})
        rows.append(("LoRA `target_modules`", ", ".join(kinds)))
    return rows
