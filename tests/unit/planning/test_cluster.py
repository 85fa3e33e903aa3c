"""The table of GPUs: found by the name that a device gives itself, and by the key of --gpu."""

from __future__ import annotations

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.planning.cluster import CPU, GIB, GPUS, Cluster, gpu_by_key, gpu_by_name, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A40", 149.7),
    ],
)
def test_known_peaks(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


def test_unknown_devices_have_no_peak() -> None:
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
    assert peak_flops("cpu") is None


def test_keys_are_unique_and_found() -> None:
    keys = [gpu.key for gpu in GPUS]
    assert len(set(keys)) == len(keys)
    assert all(gpu_by_key(gpu.key) is gpu for gpu in GPUS)
    assert gpu_by_key("H100-80G").tflops == 989.4


def test_an_unknown_key_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"^--gpu is v100: .*h100-80g.*\.$"):
        gpu_by_key("v100")


def test_two_sizes_of_a100_are_told_apart() -> None:
    names = {"NVIDIA A100-SXM4-80GB": "a100-80g", "NVIDIA A100-SXM4-40GB": "a100-40g", "NVIDIA A100-PCIE-40GB": "a100-40g"}
    for name, key in names.items():
        found = gpu_by_name(name)
        assert found is not None and found.key == key


def test_reserves() -> None:
    """An H100 keeps 1.5 GiB and 4% of 79.1 GiB back; ranks on a CPU share the node's memory."""
    h100 = Cluster(gpu_by_key("h100-80g"), per_node=8, nodes=4)
    assert h100.world_size == 32
    assert h100.device_bytes == int(79.1 * GIB)
    assert h100.device_reserve == pytest.approx((1.5 + 3.164) * GIB, abs=1)
    cpu = Cluster(CPU, per_node=2, nodes=1)
    assert cpu.device_bytes is None and cpu.device_reserve == 0
    assert cpu.dram_reserve == pytest.approx(1.4 * GIB, abs=2)
