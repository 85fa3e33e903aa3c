"""L2: causal session summaries (ops.scan), and the decays that they begin with.

Shapes: G KV heads, d head channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mka_megatron.config.schema import L2Config
from mka_megatron.ops.scan import ema as ema
from mka_megatron.ops.scan import prefix_mean as prefix_mean


def decay_logits(l2: L2Config, kv_heads: int, head_dim: int) -> Tensor:
    """Initial logits of the EMA's decays 1 - 1/span, for spans log-spaced from l2.min_span to l2.max_span tokens.

    Every head has the same spread over its channels, so that it does not depend on how heads are sharded; with
    one decay per head (l2.decay "head") the spread is over the heads.

    Returns:
        fp32 [G, d], or [G, 1] for "head". Raises ValueError unless 1 < min_span <= max_span.
    """
    if not 1 < l2.min_span <= l2.max_span:
        raise ValueError(
            f"memory_hierarchy.l2.min_span is {l2.min_span}, max_span {l2.max_span}: set 1 < min_span <= max_span."
        )
    low, high = math.log(l2.min_span), math.log(l2.max_span)
    per_head = l2.decay == "head"
    count = kv_heads if per_head else head_dim
    if count == 1:
        low = high = (low + high) / 2
    # logit(1 - 1/span) = log(span - 1)
    logits = (torch.linspace(low, high, count, dtype=torch.float64).exp() - 1).log().float()
    return logits[:, None] if per_head else logits.repeat(kv_heads, 1)
