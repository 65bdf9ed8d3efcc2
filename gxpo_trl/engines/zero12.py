"""ZeRO-1 and ZeRO-2: of every param group each rank owns a flat fp32 partition, in host memory if it is offloaded."""

from collections.abc import Iterator

import torch

from .deepspeed import WholeParametersState


class Zero12State(WholeParametersState):
    """DeepSpeed's `DeepSpeedZeroOptimizer`."""

    def optimized(self) -> list[torch.Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def coordinates(self) -> int:
        return sum(p.numel() for group in self.zero.bit16_groups for p in group)

    def regions(self, i: int) -> Iterator[tuple[int, int]]:
        zero, size = self.zero, int(self.zero.partition_size[i])
        rank = torch.distributed.get_rank(zero.real_dp_process_group[i])
        for p in zero.params_in_partition[i]:
            start = int(zero.grad_start_offset[i][rank][zero.get_param_id(p)])
            offset = int(zero.grad_partition_insertion_offset[i][rank][zero.get_param_id(p)])
            yield offset, min(p.numel() - start, size - offset)

    def reduced_gradient(self, i: int) -> torch.Tensor:
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()
            return self.optimized()[i].grad
        flat = self.zero._get_preflattened_grad_partition(i)
        return torch.cat([g.flatten() for g in self.zero.averaged_gradients[i]]) if flat is None else flat

    def own_gradient(self, i: int) -> torch.Tensor:
        gradient = super().own_gradient(i)
        self.zero.averaged_gradients[i] = None  # flat and in pieces at once would be one copy more
        return gradient

    def release_gradients(self) -> None:
        zero = self.zero
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        for i in range(len(self.optimized())):
            zero.averaged_gradients[i] = None
            zero.all_grad_tensors[i] = None
        zero.micro_step_id = -1  # INITIAL_MICRO_STEP_ID: the next micro-batch is the first of its pass
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()

    def step_partition(self, i: int) -> None:
        self.zero._optimizer_step(i)
