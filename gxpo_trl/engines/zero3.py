"""ZeRO-3: parameters, too, are partitioned; sub-groups of them share flat fp32 partitions, padded one by one."""

from collections.abc import Iterator

import torch

from .deepspeed import DeepSpeedState


class Zero3State(DeepSpeedState):
    """DeepSpeed's `DeepSpeedZeroOptimizer_Stage3`, offloaded or not, with persistent parameters or without."""

    def optimized(self) -> list[torch.Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def coordinates(self) -> int:
        return sum(p.ds_numel for group in self.zero.fp16_groups for p in group)

    def regions(self, i: int) -> Iterator[tuple[int, int]]:
        offset = 0
        for p in self.zero.fp16_groups[i]:
            size = p.partition_numel()
            rank = torch.distributed.get_rank(p.ds_process_group)
            yield offset, max(0, min(size, p.ds_numel - rank * size))
            offset += size

    def publish(self) -> None:
        zero = self.zero
        zero._partition_all_parameters()  # first: what is gathered, as persistent parameters are, would stay stale
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def reduced_gradient(self, i: int) -> torch.Tensor:
        if self.zero.offload_optimizer:
            return self.optimized()[i].grad
        return torch.cat([g.flatten() for g in self.zero.averaged_gradients[i]])

    def release_gradients(self) -> None:
        self.zero._pre_step()
        self.zero.zero_grad()
        self.zero.averaged_gradients = {}
        if self.zero.offload_optimizer:
            self.zero.reset_cpu_buffers()

    def step_partition(self, i: int) -> None:
        self.zero._optimizer_step(i)
