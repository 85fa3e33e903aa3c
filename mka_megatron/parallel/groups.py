"""Process groups: Megatron's, wrapped in one immutable :class:`Topology`, and DeepSpeed's view of them."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from mka_megatron.config.schema import ParallelConfig
from mka_megatron.parallel import cpu_host

NAMES = {
    "tensor": "TENSOR_MODEL_PARALLEL_GROUP",
    "context": "CONTEXT_PARALLEL_GROUP",
    "data": "DATA_PARALLEL_GROUP",
    "replicas": "DATA_PARALLEL_GROUP_WITH_CP",
}
"""What Megatron calls the groups; replicas: the ranks that hold the same weights."""


@dataclass(frozen=True)
class Topology:
    """Where this process stands."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    groups: ProcessGroupCollection

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share each layer."""
        return self.groups.tp

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.groups.tp.size()

    @property
    def tp_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self.groups.tp.rank()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that hold replicas of this rank's shard and see other rows."""
        return self.groups.dp

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.groups.dp.size()

    @property
    def dp_rank(self) -> int:
        """Rank within the data-parallel group."""
        return self.groups.dp.rank()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Ranks that share each row of the batch, in the order of its slots."""
        return self.groups.cp

    @property
    def cp_size(self) -> int:
        """Context-parallel size."""
        return self.groups.cp.size()

    @property
    def cp_rank(self) -> int:
        """Rank within the context-parallel group."""
        return self.groups.cp.rank()

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        """Ranks that hold this rank's weights: replicas and the ranks they share their rows with."""
        return self.groups.dp_cp

    @property
    def dp_cp_rank(self) -> int:
        """Rank within that group."""
        return self.groups.dp_cp.rank()


def initialize(parallel: ParallelConfig, timeout_seconds: int = 1800, seed: int = 1234) -> Topology:
    """Start torch.distributed (NCCL on CUDA, gloo on CPU) and Megatron's groups.

    Reads the rank variables that torchrun sets; without them the process is a world of one.
    `seed` feeds Megatron's RNG tracker. The configuration must have passed `validate`.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    timeout = timedelta(seconds=timeout_seconds)
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(local_rank)
    else:
        cpu_host.patch_megatron()
    if not dist.is_initialized():
        backend = "nccl" if on_cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=parallel.context_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, timeout_seconds // 60),
    )
    if on_cuda:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)
    else:
        cpu_host.seed_rng_tracker(seed, parallel_state.get_tensor_model_parallel_rank())
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if on_cuda else torch.device("cpu"),
        groups=ProcessGroupCollection.use_mpu_process_groups(
            ["tp", "pp", "mp", "cp", "tp_cp", "dp", "dp_cp", "embd", "pos_embd", "ep", "expt_tp", "tp_ep"]
        ),
    )


def destroy() -> None:
    """Tear the groups down.

    A gloo group that is still referenced when the interpreter shuts down can abort the process after all
    its work is done, so what Megatron forgets is cleared and reference cycles are collected; callers must
    not keep a :class:`Topology` in a global.
    """
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


class MegatronMPU:
    """What `deepspeed.initialize(mpu=...)` asks for, answered from a :class:`Topology`.

    The data-parallel size leaves context parallelism out, because DeepSpeed derives the batch size
    from it; the sequence-data-parallel group, over which ZeRO shards, includes it.
    """

    def __init__(self, topology: Topology) -> None:
        self._groups = topology.groups

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tp.size()

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._groups.tp)[0]

    def get_data_parallel_world_size(self) -> int:
        return self._groups.dp.size()

    def get_data_parallel_rank(self) -> int:
        return self._groups.dp.rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.dp)

    def get_sequence_parallel_world_size(self) -> int:
        return self._groups.cp.size()

    def get_sequence_parallel_rank(self) -> int:
        return self._groups.cp.rank()

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.cp

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._groups.dp_cp.size()

    def get_sequence_data_parallel_rank(self) -> int:
        return self._groups.dp_cp.rank()

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp_cp
