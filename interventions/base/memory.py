"""How much main memory this machine has free, and what does not fit into it. A leaf."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory() -> int | None:
    """Bytes of main memory that are to be had; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def shortage(needed: float, share: float = 1.0, unknown: int | None = None) -> str:
    """What is said of something that does not fit into the free memory; nothing where it fits.

    Parameters
    ----------
    needed : float
        Bytes.
    share : float
        Of the free memory, which may be taken.
    unknown : int, optional
        Bytes that may be taken where the system does not say how much is free; left out, all that is needed.

    Returns
    -------
    str
        Such as ``takes 298.0 GiB, and there is room for 11.2 GiB at once``.
    """
    free = free_memory()
    limit = unknown if free is None else share * free
    if limit is None or needed <= limit:
        return ""
    return f"takes {_size(needed)}, and there is room for {_size(limit)} at once"


def _size(count: float) -> str:
    """Bytes as ``298.0 GiB``, few of them as ``1.5 MiB``."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
