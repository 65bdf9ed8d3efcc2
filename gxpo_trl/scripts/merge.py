"""Merges an adapter into its base model, and writes a model that needs neither.

    gxpo merge out/run --output_dir out/run-merged
    gxpo merge out/run/checkpoint-200 --output_dir out/merged --base_model models/Qwen2.5-1.5B

Weights are added in fp32 and rounded once, to the precision of the base model's. The tokenizer is the run's, or else
the base model's.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer

from ..run_folder import TOKENIZER_CONFIG, whole_folder
from ..trajectory.merging import load_merged
from .failing import one_sentence


def merge(adapter: Path, folder: Path, base: str | None = None) -> None:
    """Writes the merged model. The folder appears when it is complete.

    Raises:
        ValueError: If there is no adapter, it can't be merged, or the output folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already. Choose another `--output_dir`, or move it away.")
    model = load_merged(adapter, base)
    places = [place for place in (adapter, adapter.resolve().parent) if (place / TOKENIZER_CONFIG).is_file()]
    tokenizer = AutoTokenizer.from_pretrained(places[0] if places else model.name_or_path)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("adapter", type=Path, help="the folder of an adapter: a run, a checkpoint, an extrapolation")
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, required=True, help="a folder that does not exist yet"
    )
    parser.add_argument("--base_model", "--base-model", help="where the base model is, if that has changed")
    options = parser.parse_args(arguments)
    try:
        merge(options.adapter, options.output_dir, options.base_model)
    except Exception as error:  # a model's files may raise anything
        sys.exit(f"error: {one_sentence(error)}")
    print(options.output_dir)


if __name__ == "__main__":
    main()
