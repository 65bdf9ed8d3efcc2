"""What an active step holds in memory compared with a plain step, by setting.

    python benchmarks/memory.py

Peak memory of one step above what is held between steps (parameters and optimizer state), in multiples of the
trainable parameters, full fine-tuning with AdamW. On a GPU it is the allocator's peak; on a CPU every allocation is
counted. With `snapshot_device: cpu` the copies are in pinned host memory: only a GPU's allocator shows the difference.
The extrapolation's temporaries (about 40 MiB, whatever the model's size) are included. With step control the
optimizer's state at θ0 is kept as well, since a step may be undone.
"""

import argparse
import dataclasses

import torch
from accelerate import Accelerator
from common import describe_machine, peak_bytes, save_result
from transformers import LlamaConfig, LlamaForCausalLM

from gxpo_trl.engines import make_engine
from gxpo_trl.update.algorithm import LookaheadRule, lookahead_step, one_pass
from gxpo_trl.update.extrapolation import Extrapolation
from gxpo_trl.update.measurements import Measurements, take_real_steps
from gxpo_trl.update.rule import two_passes
from gxpo_trl.update.snapshot import Origin


GXPO = LookaheadRule(probes=2, alpha=0.5, extrapolation=Extrapolation(5, scale_max=3.5))
RULES = {
    "gxpo": GXPO,
    "gxpo, snapshot_device: cpu": dataclasses.replace(GXPO, copies_on_host=True),
    "gxpo, a step with diagnostics": GXPO,
    "gxpo, step_control: cosine": GXPO,
    "gxpo, two passes, step_control: cosine": two_passes(),
    "sfpo, K = 3": LookaheadRule(probes=3, alpha=0.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(2)

    accelerator = Accelerator()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden_size // 64,
            tie_word_embeddings=True,
        )
    ).to(accelerator.device)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False))
    engine = make_engine(accelerator, model, optimizer, max_grad_norm=1.0)
    state = engine.state
    tokens = torch.randint(0, 1024, (2, 64), device=accelerator.device)

    def replay() -> None:
        engine.passes.backward(model(input_ids=tokens, labels=tokens).loss)

    def step(rule: LookaheadRule | None, diagnose: bool = False, takes_back: bool = False) -> None:
        replay()
        if rule is not None:
            real_steps = None
            if diagnose:
                real_steps = take_real_steps(state, lambda: one_pass(state, replay), rule.extrapolation)
            origin = Origin.of(state, rule.copies_on_host, takes_back)
            lookahead_step(state, replay, rule, Measurements(state, rule, real_steps), origin)
            origin.grad_0 = []  # as the trainer does
        state.clip_gradients()
        state.step()
        state.clear_gradients()

    step(None)  # the moments exist from here on
    trainable = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = peak_bytes(lambda: step(None)) / trainable
    rows = {"plain": plain}
    print(f"{trainable / 2**20:.0f} MiB of trainable parameters. Peak of a step in multiples of them, and of a plain:")
    print(f"  {'plain':42s} {plain:5.2f}")
    for name, rule in RULES.items():
        how = {"diagnose": "diagnostics" in name, "takes_back": "step_control" in name}
        rows[name] = peak_bytes(lambda r=rule, how=how: step(r, **how)) / trainable
        print(f"  {name:42s} {rows[name]:5.2f}  (+{rows[name] - plain:.2f})")
    result = {"trainable_bytes": trainable, "peak_in_trainable_parameters": rows, **describe_machine(threads=2)}
    print(f"written to {save_result('memory', result)}")


if __name__ == "__main__":
    main()
