"""One rank of a two-process run: trains what the command line says and saves what came of it.

torchrun --nproc_per_node 2 tests/ddp_worker.py OUTPUT_DIR '{"max_steps": 3}'
"""

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401  offline, as the tests are
import torch
from accelerate.utils import DistributedType
from helpers import RisingGateTrainer, compute_in_float64, double_model, make_trainer, parameters
from peft import LoraConfig
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gxpo_trl import GXPOTrainer


class PoisonedOnOneRankTrainer(GXPOTrainer):
    """Rank 1 sees a loss that is not a number, in the second pass of the second step."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls = self.calls + 1 if self.state.global_step == 1 else 0
        poisoned = self.calls == 3 and self.accelerator.process_index == 1
        return loss * float("nan") if poisoned else loss


class CountingTrainer(GXPOTrainer):
    """Counts how often gradients are reduced over the ranks, once per backward pass that does so."""

    reductions = None

    def training_step(self, model, *args, **kwargs):
        if self.reductions is None:
            self.reductions = 0
            model.register_comm_hook(None, self.count_and_reduce)
        return super().training_step(model, *args, **kwargs)

    def count_and_reduce(self, state, bucket):
        self.reductions += bucket.is_last()
        return allreduce_hook(None, bucket)


TRAINERS = {
    "plain": GXPOTrainer,
    "counting": CountingTrainer,
    "rising gate": RisingGateTrainer,
    "poisoned": PoisonedOnOneRankTrainer,
}


def main() -> None:
    output_dir, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    trainer_class = TRAINERS[settings.pop("trainer", "plain")]
    lora = LoraConfig(r=4, target_modules="all-linear") if settings.pop("lora", False) else None
    compute_in_float64()
    trainer = make_trainer(
        output_dir, trainer_class, model=double_model(), peft_config=lora, ddp_backend="gloo", **settings
    )
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    result = {"parameters": parameters(trainer), "log": trainer.state.log_history, "passes": trainer._backward_passes}
    result["gate"] = trainer._gate.state_dict()
    result["reductions"] = getattr(trainer, "reductions", None)
    torch.save(result, output_dir / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
