"""The machines: one table of GPUs from the vendors' data sheets, and a cluster of equal nodes of them."""

from __future__ import annotations

from dataclasses import dataclass

from mka_megatron.config.errors import ConfigError, show

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One kind of device. Rates are per device and in one direction: data sheets add up both for NVLink and PCIe."""

    key: str
    """What --gpu calls it."""
    words: str
    """All of them in the name that a device gives itself identify it."""
    tflops: float
    """Peak of dense bf16 tensor-core arithmetic (without sparsity), in 1e12 FLOP/s."""
    memory_gib: float
    """What a program can have, in GiB: the data sheet's gigabytes less what the driver and ECC keep."""
    memory_gbs: float
    """Device memory, in 1e9 B/s."""
    link_gbs: float
    """To the other devices of its node (NVLink, Infinity Fabric, else PCIe), in 1e9 B/s."""
    network_gbs: float
    """To other nodes, in 1e9 B/s: the device's share of the network cards of the vendor's own server."""


# The first entry whose words are all in the device's name counts: particular names before general ones.
GPUS: tuple[Gpu, ...] = (
    Gpu("gb200", "GB200", 2500.0, 184.0, 8000, 900, 50),
    Gpu("b200", "B200", 2250.0, 178.3, 8000, 900, 50),
    Gpu("h200", "H200", 989.4, 139.7, 4800, 450, 50),
    Gpu("gh200", "GH200", 989.4, 94.5, 4000, 450, 50),
    Gpu("h100-nvl", "H100 NVL", 835.5, 93.0, 3900, 64, 25),
    Gpu("h100-pcie", "H100 PCIe", 756.5, 79.1, 2000, 64, 25),
    Gpu("h100-80g", "H100", 989.4, 79.1, 3350, 450, 50),
    Gpu("h800", "H800", 989.4, 79.1, 3350, 200, 50),
    Gpu("h20", "H20", 148.0, 95.0, 4000, 450, 50),
    Gpu("a100-40g", "A100 40GB", 312.0, 39.4, 1555, 300, 25),
    Gpu("a100-80g", "A100", 312.0, 79.1, 2039, 300, 25),
    Gpu("a800", "A800", 312.0, 79.1, 2039, 200, 25),
    Gpu("a40", "A40", 149.7, 44.3, 696, 32, 12.5),
    Gpu("a30", "A30", 165.0, 23.5, 933, 32, 12.5),
    Gpu("a10", "A10", 125.0, 21.9, 600, 32, 12.5),
    Gpu("l40s", "L40S", 362.05, 44.3, 864, 32, 12.5),
    Gpu("l40", "L40", 181.05, 44.3, 864, 32, 12.5),
    Gpu("l4", "L4", 121.0, 21.9, 300, 32, 12.5),
    Gpu("rtx4090", "RTX 4090", 165.2, 23.5, 1008, 32, 1.25),
    Gpu("rtx3090", "RTX 3090", 71.0, 23.5, 936, 16, 1.25),
    Gpu("mi325x", "MI325X", 1307.4, 255.9, 6000, 448, 50),
    Gpu("mi300x", "MI300X", 1307.4, 191.9, 5300, 448, 50),
    Gpu("mi250x", "MI250X", 191.5, 63.9, 1638, 100, 12.5),
)
CPU = Gpu("cpu", "cpu", 0.1, 0.0, 20, 5, 1.25)
"""One rank on a few processor cores, for dry runs: round figures of no data sheet; its memory is the node's."""

_PROCESS_GIB = 0.7
"""Python, PyTorch, Megatron and DeepSpeed of a rank, in the node's memory."""
_DEVICE_GIB, _GAPS = 1.5, 0.04
"""CUDA's context and NCCL's buffers; share of a device's memory lost to gaps between allocations."""


def gpu_by_name(device_name: str) -> Gpu | None:
    """The GPU that `torch.cuda.get_device_name` names; None for one that the table has not."""
    words = device_name.upper().replace("-", " ").split()
    return next((gpu for gpu in GPUS if all(word in words for word in gpu.words.upper().split())), None)


def peak_flops(device_name: str) -> float | None:
    """Its peak of dense bf16 FLOP/s; None when unknown."""
    gpu = gpu_by_name(device_name)
    return None if gpu is None else gpu.tflops * 1e12


def gpu_by_key(key: str) -> Gpu:
    """The GPU that --gpu names; raises ConfigError for another."""
    known = {gpu.key: gpu for gpu in (*GPUS, CPU)}
    if key.lower() not in known:
        raise ConfigError(f"--gpu is {show(key)}: the table has no such device; give one of {', '.join(known)}.")
    return known[key.lower()]


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices."""

    gpu: Gpu
    per_node: int
    """Devices, and so ranks, of a node."""
    nodes: int
    dram_bytes: int | None = None
    """Of a node; None: not known, so not checked."""
    ssd_bytes: int | None = None
    """Likewise, free for this run."""
    reserves: bool = True
    """Leave some of each memory to what the plan does not count; False: only what cannot fit at all is refused."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.per_node * self.nodes

    @property
    def on_cpu(self) -> bool:
        """Ranks work in the node's memory."""
        return self.gpu.key == CPU.key

    @property
    def device_bytes(self) -> int | None:
        """Memory of a device; None: it is the node's."""
        return None if self.on_cpu else int(self.gpu.memory_gib * GIB)

    @property
    def device_reserve(self) -> int:
        """Of that, not for the plan: context, NCCL, gaps."""
        return 0 if self.on_cpu or not self.reserves else int((_DEVICE_GIB + _GAPS * self.gpu.memory_gib) * GIB)

    @property
    def dram_reserve(self) -> int:
        """Of a node's memory, not for the plan: the processes themselves."""
        return int(_PROCESS_GIB * GIB) * self.per_node if self.reserves else 0
