"""What a page store reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TierStatistics:
    """What a store holds, and what it has done since the counters were last reset."""

    pages: int = 0
    """Pages held."""
    hbm_pages: int = 0
    """Of these with a copy on the device."""
    dram_pages: int = 0
    """In host memory."""
    ssd_pages: int = 0
    """On the SSD."""
    hbm_bytes: int = 0
    """Device memory of the copies."""
    dram_bytes: int = 0
    """Host memory of the pages."""
    ssd_bytes: int = 0
    """Disk space of the pages."""
    hbm_hits: int = 0
    """Pages asked for that were on the device."""
    dram_hits: int = 0
    """Pages asked for that were in host memory, prefetched ones included."""
    misses: int = 0
    """Pages asked for that had to be waited for."""
    evictions: int = 0
    """Pages that left host memory for the SSD alone."""
    forgotten: int = 0
    """Pages given up because the slowest tier was full."""
    written_bytes: int = 0
    """Bytes written to the SSD."""
    read_bytes: int = 0
    """Bytes read from it."""
    stall_seconds: float = 0.0
    """Time the caller waited for the SSD."""
