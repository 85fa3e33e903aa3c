"""What the layers keep for their backward pass, in bytes per token of a rank, by variant, core and recomputation.

Counted from the tensors that autograd saves (tests/unit/planning/test_activations.py compares with a real model's).
On a CPU PyTorch's RMSNorm and the reference fusion keep fp32 intermediates; the CUDA kernels keep their inputs.

Letters: h hidden, f MLP width, H query heads, G KV heads, d head channels, r gate width, L levels, t tensor-parallel
ranks, w bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, effective_kv_heads, fuses
from mka_megatron.planning.steps import Layout, tiled

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32, _FP64 = 4, 8


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of one layer."""

    norms: float
    """Inputs, outputs and statistics of the two norms; the outputs are what the projections keep."""
    mlp: float
    """Gate, up and activated; 0 where the MLP goes tile by tile."""
    projections: float
    """The joint query, key and value projection's output, raw queries, the gates' tensors: outside of the core."""
    core: float
    """Inside of the core: gone under selective recomputation."""
    out: float
    """The core's output as the output projection takes it, where that is a copy."""
    boundary: float
    """The layer's input, all that full recomputation keeps."""

    @property
    def whole(self) -> float:
        """Without recomputation, and of the layer at hand with it."""
        return self.norms + self.mlp + self.projections + self.core + self.out

    @property
    def selective(self) -> float:
        """With the core computed again."""
        return self.norms + self.mlp + self.projections + self.out


def layer_bytes(config: Config, layout: Layout, device: str) -> LayerBytes:
    """Of one layer on one rank, on a "cuda" or "cpu" device."""
    tensor, model, width, cuda = layout.tensor, config.model, WIDTHS[config.training.precision], device == "cuda"
    share = tensor if config.parallel.sequence_parallel else 1
    norm = _norm(width, cuda) * model.hidden_size / share
    mlp = 0.0 if tiled(config, layout, config.training.mlp_tile) else 3 * model.ffn_hidden_size / tensor * width
    latent = VARIANTS[config.attention.variant].projection == "latent"
    parts = (_latent if latent else _grouped)(config, tensor, width, cuda)
    return LayerBytes(
        norms=2 * (norm + _FP32 / share), mlp=mlp, projections=sum(parts["projections"].values()),
        core=sum(parts["core"].values()), out=parts["out"]["heads"], boundary=model.hidden_size / share * width,
    )


def _norm(width: int, cuda: bool) -> int:
    """Bytes that an RMSNorm keeps per channel, its output included: the composite of a CPU keeps fp32 input and quotient."""
    return 2 * width if cuda else 2 * _FP32 + width


def _grouped(config: Config, tensor: int, width: int, cuda: bool) -> Mapping[str, Mapping[str, float]]:
    model = config.model
    heads = model.num_attention_heads / tensor
    groups = max(1, effective_kv_heads(config.attention.variant, model) / tensor)
    q, kv = heads * model.head_dim, groups * model.head_dim
    variant = VARIANTS[config.attention.variant]
    levels, core_levels = variant.levels(config), variant.core_levels(config)
    block, selective = block_core(config), config.training.recompute == "selective"
    projections: dict[str, float] = {"mixed": 0.0 if block and levels == 1 and not selective else (q + 2 * kv) * width}
    raw = model.qk_norm or selective
    for count in (levels, core_levels):
        if count > 1:
            gate, reads_q = _gate(config, q, groups, count, tensor, width)
            projections[f"gate of {count}"] = gate
            raw = raw or (reads_q and width == _FP32)
    if reads_queries(config) and max(levels, core_levels) > 1 and width < _FP32:
        projections["queries in fp32"] = (1 + (levels > 1 and core_levels > 1)) * q * _FP32
    projections["raw queries"] = q * width if raw else 0.0
    core = {"lse": heads * _FP32, "rotary": 2 * model.head_dim * (_FP32 if width == _FP32 else 2 * width)}
    if model.qk_norm:
        kept = kv * width if cuda else (q + kv) * _FP32 * (1 if width == _FP32 else 2)
        core["q/k-norm"] = kept + (heads + groups) * _FP32
    core |= _cores(config, q, kv, heads, groups, levels, width, cuda)
    copied = block or selective
    return {"projections": projections, "core": core, "out": {"heads": q * width if copied else 0.0}}


def _cores(config: Config, q: float, kv: float, heads: float, groups: float, levels: int, width: int,
           cuda: bool) -> dict[str, float]:
    """Rotated queries, keys, values, outputs and what fuses or mixes the levels."""
    if VARIANTS[config.attention.variant].attends_each_level and levels > 1:
        return _mixture(config, q, kv, heads, levels, width)
    core: dict[str, float] = {}
    fused = 0.0
    if fuses(config):
        # reference: every level and its difference to the tokens in fp32; the kernels keep little beside their inputs
        fused = 0.0 if cuda else 4 * kv * _FP32
        if config.memory_hierarchy.l3.enabled and not block_core(config):
            fused += 2 * kv * width if cuda else 3 * kv * _FP32
    core["fusion"] = fused
    if block_core(config):
        # the core takes queries, joined keys and values, a bias per level; its output is the layer's copy
        core |= {"queries": q * width, "keys and values": 2 * kv * width, "bias": 3 * groups * _FP32 + 3 * groups}
        if not cuda:
            core["lse"] = heads * _FP32
        return core
    repeated = 2 * (q - kv) * width if cuda and width == _FP32 and q != kv else 0.0
    core |= {
        "queries": q * width, "keys": kv * width, "values": kv * width if fuses(config) else 0.0, "outputs": q * width,
        "repeated": repeated,
    }
    return core


def _mixture(config: Config, q: float, kv: float, heads: float, levels: int, width: int) -> dict[str, float]:
    """mka: every level's keys, values and output."""
    pairs = (3 * (levels - 1) + 1) * kv * width
    if config.attention.mixture == "score":
        return {"levels": pairs, "queries and outputs": (2 + levels) * q * width,
                "shares": levels * heads * _FP32 + heads * _FP64}
    # outputs, differences and the mixture in the wide dtype of the route
    return {"levels": pairs, "queries": q * width, "outputs": levels * q * width,
            "differences": levels * q * _FP32, "lses": (levels - 1) * heads * _FP32}


def _gate(config: Config, q: float, groups: float, levels: int, tensor: int, width: int) -> tuple[float, bool]:
    """A gate's own tensors, fp32, and whether it reads queries."""
    routing, model = config.routing, config.model
    per_head = groups if routing.scope == "group" else 1
    share = tensor if config.parallel.sequence_parallel else 1
    if routing.gate_input == "x":
        own = model.hidden_size * _FP32 / share if width < _FP32 else 0.0
        return own + 2 * routing.gate_hidden_size * _FP32 / share + 3 * levels * per_head * _FP32, False
    return 2 * routing.gate_hidden_size * per_head * _FP32 + 3 * levels * per_head * _FP32, True


def reads_queries(config: Config) -> bool:
    """The gates read queries, not the layer's input."""
    return config.routing.gate_input == "q"


def _latent(config: Config, tensor: int, width: int, cuda: bool) -> Mapping[str, Mapping[str, float]]:
    """mla: keys and queries of all channels, values as wide; the latents and their norms."""
    mla = config.attention.mla
    heads = config.model.num_attention_heads / tensor
    keys = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    wide = max(keys, mla.v_head_dim)
    norm = _norm(width, cuda) - (width if cuda else _FP32)
    latents = (mla.kv_lora_rank + mla.qk_rope_head_dim) * width + norm * mla.kv_lora_rank
    if mla.q_lora_rank is not None:
        latents += _norm(width, cuda) * mla.q_lora_rank
    core = {"q, k, v and output": (3 * wide + keys) * heads * width, "lse": heads * _FP32,
            "rotary": 2 * mla.qk_rope_head_dim * _FP32}
    return {"projections": {"latents": latents}, "core": core, "out": {"heads": heads * mla.v_head_dim * width}}
