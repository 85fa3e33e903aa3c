"""The score mixture as the paper derives it: level by level. The specification of mka.score_mixture, for small S.

Dense [S, S] scores, any device, autograd. Shapes: B batch, S sequence, H heads, d head channels, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unnormalised(scores: Sequence[Tensor], values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Eq. 6-8: numerator and denominator accumulate over the levels and are divided once.

    Z_l = Z_{l-1} + lambda_l sum exp(s_l), N_l = N_{l-1} + lambda_l sum exp(s_l) v_l, out = N_L / Z_L.

    Args:
        scores: L tensors [B, H, S, S], scaled, -inf where a query may not look.
        values: L tensors [B, H, S, d].
        weights: [B, H, S, L], lambda (any positive multiple of it gives the same output).

    Returns:
        [B, H, S, d].
    """
    numerator = torch.zeros_like(values[0])
    denominator = torch.zeros_like(weights[..., :1])
    for level, (score, value) in enumerate(zip(scores, values, strict=True)):
        raised = weights[..., level, None] * score.exp()
        numerator = numerator + raised @ value
        denominator = denominator + raised.sum(dim=-1, keepdim=True)
    return numerator / denominator


def online(scores: Sequence[Tensor], values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Eq. 11-14: the same with a running maximum, so that nothing overflows and the output is normalised throughout.

    m_l = max(m_{l-1}, max(s_l + log lambda_l)), z_l = z_{l-1} e^{m_{l-1} - m_l} + sum e^{s_l + log lambda_l - m_l},
    out_l = (out_{l-1} z_{l-1} e^{m_{l-1} - m_l} + sum e^{s_l + log lambda_l - m_l} v_l) / z_l.

    Arguments and result as for :func:`unnormalised`; level 1 must have some weight.
    """
    raised = scores[0] + weights[..., 0, None].log()
    peak = raised.amax(dim=-1, keepdim=True)
    shifted = (raised - peak).exp()
    total = shifted.sum(dim=-1, keepdim=True)
    out = shifted @ values[0] / total
    for level in range(1, len(scores)):
        raised = scores[level] + weights[..., level, None].log()
        higher = torch.maximum(peak, raised.amax(dim=-1, keepdim=True))
        shifted = (raised - higher).exp()
        kept = total * (peak - higher).exp()
        total = kept + shifted.sum(dim=-1, keepdim=True)
        out = (out * kept + shifted @ values[level]) / total
        peak = higher
    return out
