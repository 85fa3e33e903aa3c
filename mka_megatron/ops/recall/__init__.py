"""Recall: pooled keys -> sign codes, recent queries -> their code, the R nearest chunks per query chunk and KV head.

Everything here is exact, so it does not depend on the order of sums, on the device or on how rows are cut: vectors
become fixed-point integers, held in fp64, that stay below 2^53 whatever is summed (:func:`fixed_point`).

Shapes: B batch, S slots at hand, C chunk size, n = ceil(S / C) chunks at hand, N chunks of the row, G KV heads, d head
channels, T tables, W = T * bits / 64 words, R recalled chunks, Q = 16 queries that select.
"""

from mka_megatron.ops.recall.reference import (
    FRACTION_BITS,
    RANGE,
    Candidates,
    centred_means,
    chunk_means,
    chunk_sums,
    fixed_point,
    hamming,
    largest_products,
    nearest_codes,
    recent_sums,
    sign_codes,
)

__all__ = [
    "FRACTION_BITS",
    "RANGE",
    "Candidates",
    "centred_means",
    "chunk_means",
    "chunk_sums",
    "fixed_point",
    "hamming",
    "largest_products",
    "nearest_codes",
    "recent_sums",
    "sign_codes",
]
