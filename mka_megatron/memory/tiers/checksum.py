"""Checksums of pages: XXH3."""

from __future__ import annotations

import xxhash


def checksum(data: memoryview) -> int:
    """64 bits over `data`."""
    return xxhash.xxh3_64_intdigest(data)


def digest(text: str) -> bytes:
    """16 bytes that stand for `text`."""
    return xxhash.xxh3_128_digest(text.encode())
