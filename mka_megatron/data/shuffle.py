"""Deterministic orders that depend on their key alone (not on the NumPy version or the platform).

Only the raw stream of a bit generator is used: NumPy keeps that stable across versions, unlike the
methods of `Generator`.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _key(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "little")


def uniform(count: int, *key: int | str) -> np.ndarray:
    """`count` independent uint64 hashes; element i depends on `key` and i only."""
    return np.random.Philox(key=_key(*key)).random_raw(count) if count else np.empty(0, np.uint64)


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A permutation of range(count), int64, in O(count) memory."""
    return np.argsort(uniform(count, *key), kind="stable").astype(np.int64, copy=False)


def scatter(index: int, count: int, *key: int | str) -> int:
    """Element `index` of a permutation of range(count), in O(1) memory.

    A four-round Feistel network over the next even number of bits, walked until it lands in range.
    """
    if not 0 <= index < count:
        raise IndexError(f"index {index} is outside [0, {count})")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    seed = _key(*key).to_bytes(16, "little")
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2b(bytes([turn]) + right.to_bytes(8, "little"), key=seed, digest_size=8)
            left, right = right, left ^ (int.from_bytes(digest.digest(), "little") & mask)
        index = (left << half) | right
        if index < count:
            return index
