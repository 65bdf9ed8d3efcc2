"""What the copies of an active step take on each GPU, for the models people train: the table of recipes/README.md.

    python benchmarks/snapshot_memory.py

Parameters are counted on models built without memory from the shapes of Qwen2.5, bare and with the adapters of the
papers. The copies are θ0 and g0, 4 bytes a coordinate each; tests/test_engines.py measures on every engine that they
are sharded as the parameters are.
"""

import torch
from common import describe_machine, save_result
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM


SHAPES = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40}
    | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}
ADAPTERS = LoraConfig(r=128, lora_alpha=256, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
BYTES = 8  # a coordinate: θ0 and g0
GPUS = (1, 2, 4, 8)


def trainable(shape: dict, adapters: LoraConfig | None) -> int:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
        model = model if adapters is None else get_peft_model(model, adapters)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    rows = []
    for name, shape in SHAPES.items():
        for tuned, adapters in (("full", None), ("LoRA 128", ADAPTERS)):
            count = trainable(shape, adapters)
            per_gpu = {n: count * BYTES / n / 2**30 for n in GPUS}
            rows.append({"model": name, "tuned": tuned, "trainable": count, "GiB": per_gpu})
    print(f"{'model':6} {'tuned':9} {'trainable':>15}   GiB per GPU, sharded over {GPUS}")
    for row in rows:
        sizes = " ".join(f"{size:8.2f}" for size in row["GiB"].values())
        print(f"{row['model']:6} {row['tuned']:9} {row['trainable']:>15,} {sizes}")
    save_result("snapshot_memory", {**describe_machine(torch.get_num_threads()), "rows": rows})


if __name__ == "__main__":
    main()
