"""Training commands, one after the other, in a process that takes a local server for the Hub; says how each ended."""

import json
import sys
import warnings

import torch
from transformers.utils import logging

from gxpo_trl.scripts import cli


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    ends = []
    for command in json.loads(sys.argv[1]):
        try:
            cli.main(command)
            ends.append("done")
        except SystemExit as end:
            ends.append(str(end))
    print("\nENDS", json.dumps(ends))


if __name__ == "__main__":
    main()
