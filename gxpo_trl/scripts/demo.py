"""Trains a small language model with GRPO, SFPO and GXPO and compares them, offline, in minutes on a laptop.

    make demo                                    # or: gxpo demo --output_dir out/demo

All runs start from the same warm start and see the same prompts, seed and number of rollouts; they differ only in the
update rule (recipes/tiny/{grpo,sfpo,gxpo}.yaml). Held-out pass@1 is measured during training by the same function that
rewards the rollouts. Options after `--output_dir` go to all recipes: `--max_steps 20`, `--learning_rate 3e-4`, …
"""

import argparse
import sys
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from ..reporting.arm_tables import demo_table
from ..reporting.figures import draw_demo
from ..reporting.runs import Run, load_run
from ..tasks.arithmetic import sample_problems
from ..tasks.tiny_model import prompt_text
from .building import build_trainer
from .parsing import parse_recipe
from .running import train


ARMS = {
    "GRPO": "one step with the gradient of each batch of rollouts",
    "SFPO": "three fast steps on the batch, back a fifth of the way, one slow step; back to GRPO when the policy's "
    "entropy jumps",
    "GXPO": "two probe steps on the batch, an extrapolation to more steps, a move part of the way there, one "
    "corrective step; back to GRPO when the norm of the corrective gradient rises",
}


class ProgressBar(TrainerCallback):
    """One progress bar for each run: batches, the last batch's reward, and the last held-out pass@1."""

    def __init__(self):
        self.bar = None
        self.shown = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, unit=" batches", dynamic_ncols=True, file=sys.stdout)

    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            self.shown["reward"] = f"{logs['reward']:.2f}"
        if "eval_reward" in logs:
            self.shown["held-out pass@1"] = f"{logs['eval_reward']:.3f}"
        self.bar.set_postfix(self.shown)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def run_arm(label: str, output_dir: Path, overrides: list[str]) -> Run:
    """Trains one recipe and reads its folder."""
    arguments = ["--config", f"gxpo:tiny/{label.lower()}.yaml", "--output_dir", str(output_dir)]
    recipe = parse_recipe([*arguments, "--disable_tqdm", "true", "--log_level", "error", *overrides])
    trainer = build_trainer(recipe, callbacks=[ProgressBar()])
    trainer.remove_callback(PrinterCallback)
    train(trainer, recipe)
    return load_run(output_dir, label)


def quieten() -> None:
    """Silences the warnings and progress bars of other libraries."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"), help="folder of the runs and the figure")
    options, overrides = parser.parse_known_args(arguments)
    quieten()
    torch.set_num_threads(1)  # more threads do not help such a small model

    problem = sample_problems(1, "test", seed=0)[0]
    print("\nThe task    Word problems with a number for an answer. One of those held out from training:")
    print(f"              {prompt_text(problem)}")
    print(f"            A worked answer: {' '.join(problem.steps)} \\boxed{{{problem.answer}}}")
    print("The model   A Llama of 90,624 parameters, warm-started so that it solves some of them.")
    print("The reward  1 if the boxed number is right, else 0. The model learns from nothing else.")

    runs = []
    for i, (label, summary) in enumerate(ARMS.items(), start=1):
        print(f"\n[{i}/{len(ARMS)}] {label}: {summary}.")
        try:
            runs.append(run_arm(label, options.output_dir / label.lower(), overrides))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")

    figure = options.output_dir / "comparison.png"
    draw_demo(runs, figure)
    print(f"\n{demo_table(runs).markdown()}\n")
    for run in runs:
        if run.shutoff_step is not None:
            print(f"{run.label} ended its lookahead after step {run.shutoff_step} and continued as GRPO.")
    print(f"The curves: {figure.resolve()}")


if __name__ == "__main__":
    main()
