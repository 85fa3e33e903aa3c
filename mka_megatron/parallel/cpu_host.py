"""Every patch that Megatron-core and DeepSpeed need on a host without CUDA, and nothing else.

Megatron asks CUDA for its current device (buffers of the tensor-parallel collectives) and for its
RNG state (sequence-parallel embedding, activation recomputation). On CPU the device is "cpu" and
the state is the CPU generator's. No CUDA run imports a patched function: `patch_megatron` is called
by `groups.initialize`, `patch_deepspeed` by the engine, only where `torch.cuda.is_available()` is false.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import random as megatron_random


def patch_megatron() -> None:
    """Point Megatron's CUDA queries at the CPU; calling it again changes nothing."""

    def current_device() -> torch.device:
        return torch.device("cpu")

    def get_rng_state(device: object = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.current_device = current_device  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state


def patch_deepspeed() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective when it starts up; safe to call again.

    Only inference uses that collective, and compiling it needs Python's headers, which a host may lack.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def seed_rng_tracker(seed: int, tp_rank: int) -> None:
    """`model_parallel_cuda_manual_seed` for the CPU generator: same names, same seeds."""
    megatron_random.initialize_rng_tracker(force_reset=True)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.set_states(
        {
            megatron_random.get_data_parallel_rng_tracker_name(): _state(seed),
            megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME: _state(seed + 2718 + tp_rank),
        }
    )


def _state(seed: int) -> torch.Tensor:
    return torch.Generator().manual_seed(seed).get_state()
