"""The `gxpo` command: `gxpo train`, `gxpo eval`, `gxpo report`, … Each is a module of that name in this folder."""

import argparse
import importlib


COMMANDS = {
    "train": "train a model from a recipe",
    "eval": "score models on benchmarks",
    "extrapolate": "predict the later weights of a run, and write that model",
    "merge": "merge an adapter into its base model",
    "report": "tables and figures of runs, on one page",
    "watch": "the page of a running run",
    "push": "send a run to the Hub",
    "recipes": "list, print or copy the recipes that come with the package",
    "demo": "train a small model with GRPO, SFPO and GXPO, and draw a figure",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gxpo", description="Lookahead policy updates for TRL.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    known, rest = parser.parse_known_args(arguments)
    importlib.import_module(f"gxpo_trl.scripts.{known.command}").main(rest, prog=f"gxpo {known.command}")


if __name__ == "__main__":
    main()
