"""Checksums of pages by the standard library alone: what `checksum` is where xxhash is not there.

Used by the files that travel with a Hugging Face model; pages do not outlive their process, so that the two never meet.
"""

from __future__ import annotations

import hashlib


def checksum(data: memoryview) -> int:
    """64 bits over `data`."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def digest(text: str) -> bytes:
    """16 bytes that stand for `text`."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
