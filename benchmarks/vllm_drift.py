"""How far a frozen base in bf16 drifts when adapters are sent to vLLM, by TRL's merge in place and out of place.

    python benchmarks/vllm_drift.py        # about a minute on one core; no vLLM, a stand-in takes the weights

Before each synchronisation AdamW makes a step on random gradients, which moves the adapter as far as training does.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from vllm_stand_in import generation_for  # noqa: E402

from gxpo_trl.trainer.vllm import merge_out_of_place  # noqa: E402


def norm(tensors: list[torch.Tensor]) -> float:
    return sum(t.double().square().sum() for t in tensors).sqrt().item()


def measure(out_of_place: bool, learning_rate: float, synchronisations: tuple[int, ...]) -> list[tuple]:
    """Of some counts of synchronisations: drift over the base's norm, over the adapter's move, and the share seen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config).bfloat16(), lora)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    start = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generation = generation_for(model)
    if out_of_place:
        merge_out_of_place(generation)
    rows = []
    for i in range(1, synchronisations[-1] + 1):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
        generation.sync_weights()
        if i in synchronisations:
            base = {name: layer.base_layer.weight.detach() for name, layer in layers.items()}
            drift = norm([base[name].double() - start[name].double() for name in layers])
            deltas = {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}
            seen = sum(
                ((generation.llm.weights[f"{name}.weight"].double() - start[name].double()) * delta).sum()
                for name, delta in deltas.items()
            )
            moved = norm(list(deltas.values()))
            rows.append((i, drift / norm(list(start.values())), drift / moved, (seen / moved**2).item()))
    return rows


def main() -> None:
    print(
        "| merge | learning rate | synchronisations | drift / base | drift / adapter's move | share that vLLM sees |"
    )
    print("|---|---|---|---|---|---|")
    for out_of_place in (False, True):
        for learning_rate in (1e-5, 1e-6):
            for i, of_base, of_move, share in measure(out_of_place, learning_rate, (30, 300)):
                merge = "out of place" if out_of_place else "TRL's, in place"
                print(
                    f"| {merge} | {learning_rate:g} | {i} | {of_base:.2%} | {of_move:.2%} | {share:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
