"""verify.py's section on a whole attention layer: FastMKA over the kernels against FastMKA without them, and against GQA.

The layer is Qwen2.5-7B's: 3584 channels, 28 query heads, 4 KV heads of 128, bias; from its input to its output
projection. FastMKA adds a gate over L1 and L2 and the fusion; both attend by the same SDPA backend.
"""

# ruff: noqa: B023 (a lambda here is called before the loop goes on)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from verify_common import Check, Clock, Timing, as_accurate

from mka_megatron.attention import fastmka, grouped
from mka_megatron.attention.gate import token_logits
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import Config
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Memory

GOAL = 1.03
"""FastMKA's time, forward and backward, over GQA's, from 16K slots on."""
BENCHMARKED = range(16384, 32769)
"""Longer ones take long, and the attention's share only grows."""
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Layer:
    """Weights and an input."""

    x: Tensor
    """[S, B, h], as Megatron has it."""
    weights: dict[str, Tensor]
    heads: int
    groups: int
    upstream: Tensor
    """[S, B, h]."""

    @staticmethod
    def draw(
        device: torch.device, slots: int, *, batch: int = 1, heads: int = 28, groups: int = 4, channels: int = 128,
        dtype: torch.dtype = torch.bfloat16, hidden: int = 64,
    ) -> Layer:  # fmt: skip
        """Random ones."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(*shape, generator=generator, device=device)

        width = heads * channels
        weights = {
            "qkv": normal((heads + 2 * groups) * channels, width, std=width**-0.5).to(dtype),
            "bias": normal((heads + 2 * groups) * channels).to(dtype),
            "out": normal(width, width, std=width**-0.5).to(dtype),
            "fc1": normal(hidden, width, std=width**-0.5).to(dtype),
            "bias1": normal(hidden).to(dtype),
            "fc2": normal(2, hidden, std=hidden**-0.5).to(dtype),
            "bias2": normal(2).to(dtype),
            "beta": torch.full((1,), 0.7, device=device),
            "decay": 1 - 2.0 ** -(1 + 12 * torch.rand(groups, channels, generator=generator, device=device)),
        }
        x, upstream = (normal(slots, batch, width).to(dtype) for _ in range(2))
        return Layer(x, weights, heads, groups, upstream)

    def run(self, backend: str | None, wide: bool = False) -> dict[str, Tensor]:
        """Output, and gradients of the input and the weights; `backend`: of the fusion, None: GQA."""

        def put(x: Tensor) -> Tensor:
            return x.to(torch.float64 if wide else x.dtype).detach().requires_grad_()

        x, w = put(self.x), {name: put(each) for name, each in self.weights.items()}
        slots, batch, width = x.shape
        channels = width // self.heads
        fan = self.heads // self.groups
        # [S, B, h] -> [S, B, G, (H/G + 2) * d]
        projected = F.linear(x, w["qkv"], w["bias"]).unflatten(2, (self.groups, -1))
        q, k, v = projected.split((fan * channels, channels, channels), dim=3)
        q = q.reshape(slots, batch, self.heads, channels)
        angles = torch.arange(slots, device=x.device)[:, None] * 1e6 ** -torch.arange(0, 1, 2 / channels, device=x.device)
        angles = angles.repeat(1, 2).expand(batch, -1, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        finish = Finish(lambda x: x, lambda x: x, lambda x, _: apply_rope(x, cos, sin))
        given = [each.transpose(0, 1) for each in (q, k, v)]
        rows = Documents.unpacked(batch, slots, x.device)
        common: dict[str, Any] = {"finish": finish, "documents": rows, "scale": channels**-0.5, "config": Config()}
        if backend is None:
            out = grouped.attend(*given, route=None, **common)[0]
        else:
            logits = token_logits(q, w["fc1"], w["bias1"], w["fc2"], w["bias2"]).transpose(0, 1)
            route = RouteInputs(logits.to(w["beta"].dtype), w["beta"], w["decay"], w["decay"])
            memory = Memory(fuse_backend=backend)
            out = fastmka.attend(*given, route=route, memory=memory, **common)[0]
        y = F.linear(out.transpose(0, 1).flatten(2), w["out"])
        used = {"x": x, **{name: each for name, each in w.items() if backend or name in ("qkv", "bias", "out")}}
        grads = torch.autograd.grad(y, list(used.values()), self.upstream.to(y.dtype))
        return {"y": y.detach(), **{f"d {name}": grad for name, grad in zip(used, grads, strict=True)}}


def checks(device: torch.device, lengths: Sequence[int]) -> Iterator[Check]:
    """A narrower layer, whole, at lengths up to 4096."""
    for slots in lengths:
        if slots > 4096:
            continue
        layer = Layer.draw(device, slots, batch=3, heads=4, groups=2, channels=64)
        found, peer, exact = layer.run("cuda"), layer.run("reference"), layer.run("reference", wide=True)
        for name in ("y", "d x", "d qkv", "d out"):
            yield as_accurate(f"S={slots} B=3: {name}", found[name], peer[name], exact[name])


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """None: its kernels have their own sections, and PyTorch's attention is not ours to check."""
    return iter(())


def benchmarks(clock: Clock, lengths: Sequence[int]) -> Iterator[Timing]:
    """Forward and backward, eager, as training runs it."""
    for slots in lengths:
        if clock.device.type == "cuda" and slots not in BENCHMARKED:
            continue
        layer = Layer.draw(clock.device, slots)
        for name, context in _backends(layer):
            with context():
                ms = clock.ms(lambda: layer.run("cuda"))
                peers = {"GQA": clock.ms(lambda: layer.run(None)), "eager": clock.ms(lambda: layer.run("reference"))}
            ratio = ms / peers["GQA"]
            goal = f"goal {GOAL} of GQA: {ratio:.3f}, {'met' if ratio <= GOAL else 'missed'}"
            yield Timing(f"forward + backward, {name}", slots, ms, 0, peers, None, goal)


def _backends(layer: Layer) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
    """The SDPA backends that run such a layer."""
    if layer.x.device.type != "cuda":
        yield "host", nullcontext
        return
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                layer.run(None)
        except RuntimeError:
            continue
        yield name, lambda: sdpa_kernel(backend)
