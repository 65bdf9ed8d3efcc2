"""Predicts the later weights of a run, and writes that model.

    gxpo extrapolate out/tiny-grpo --steps-ahead 20 --alpha 0.5,1.0,1.5
    gxpo extrapolate out/tiny-grpo --method rl-extra --merged true
    gxpo train --config recipes/tiny/grpo.yaml --resume-adapter out/tiny-grpo/extrapolated/next/alpha-1.5

It works with any LoRA run that saved its adapter at even intervals, whatever trained it: with `trajectory_steps: 10`
in a recipe, or `save_steps`. For each α it writes a folder `extrapolated/<method>/alpha-<α>` in the run's folder, with
an adapter of one rank more, and how well held-out steps were predicted.
"""

import sys
import time
from pathlib import Path

from ..reporting.trajectory_figure import trajectory_figure
from ..run_folder import EXTRAPOLATED_FOLDER, alpha_folder
from ..trajectory.checkpoints import load_trajectory
from ..trajectory.forecast import extrapolate
from ..trajectory.predictor import PredictorSettings
from ..trajectory.settings import ExtrapolationArguments
from ..trajectory.writing import write_extrapolation
from .failing import one_sentence
from .keys import parse_keys


def run(settings: ExtrapolationArguments) -> list[Path]:
    """Writes the extrapolated models, and returns their folders.

    Raises:
        ValueError: If the trajectory can't be extrapolated, or a result exists already. It is raised before anything
            is written.
    """
    started = time.perf_counter()
    output = Path(settings.output_dir or Path(settings.run) / EXTRAPOLATED_FOLDER / settings.method)
    folders = {alpha_folder(output, alpha): alpha for alpha in settings.alphas()}
    for folder in folders:
        if folder.exists():
            raise ValueError(f"{folder} exists already. Choose another `output_dir`, or move it away.")
    trajectory = load_trajectory(settings.run, settings.last_step, settings.base_model)
    names = ("hidden_size", "epochs", "learning_rate", "seed", "without_global", "without_local", "device")
    predictor = PredictorSettings(**{name: getattr(settings, name) for name in names})
    found = extrapolate(trajectory, settings.method, settings.steps_ahead, predictor)
    found.report["seconds"]["all"] = time.perf_counter() - started
    figure = trajectory_figure(found.report)
    for folder, alpha in folders.items():
        write_extrapolation(
            trajectory, found, alpha, folder, settings.merged, lambda path: figure.savefig(path, dpi=160)
        )
    _tell(found.report)
    return list(folders)


def _tell(report: dict) -> None:
    held_out = report["held_out"]
    print(
        f"{report['matrices']} matrices at {len(report['steps'])} steps, up to {report['steps'][-1]}. "
        f"From step {held_out['from_step']} to {held_out['to_step']} the methods have these errors (1 is as good "
        "as no prediction):"
    )
    for name, found in held_out["errors"].items():
        error, cosine = ("" if value is None else f"{value:.3f}" for value in (found["error"], found["cosine"]))
        print(f"  {name:13} {error}{cosine and f', cosine {cosine}'}")
    if report.get("held_out_was_seen_in_part"):
        print("The trajectory is short: `next` was trained on a part of those steps.")
    if report["left_alone"]:
        some = ", ".join(report["left_alone"][:3])
        print(f"Left unchanged, not being low-rank maps: {len(report['left_alone'])} tensors, such as {some}.")


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    try:
        (settings,) = parse_keys(arguments, (ExtrapolationArguments,), prog)
        folders = run(settings)
    except Exception as error:  # a model's files may raise anything
        sys.exit(f"error: {one_sentence(error)}")
    for folder in folders:
        print(folder)


if __name__ == "__main__":
    main()
