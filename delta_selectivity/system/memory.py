"""Memory: limits on it, and the peak of the process and of its GPUs."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def as_bytes(gigabytes: float) -> int:
    """Return a limit in bytes: 1 at least, so that something is let through, and no more than a machine counts."""
    return max(1, int(min(gigabytes, 2.0**32) * 2**30))


def peak_memory() -> dict[str, float]:
    """Return the peaks of the process's resident memory, where the system tells it, and of its CUDA devices, in GB."""
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        peak["peak_ram_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1024**3, 3)
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak[f"peak_cuda{device}_gb"] = round(torch.cuda.max_memory_allocated(device) / 1024**3, 3)
    return peak


def return_free_memory() -> None:
    """Give the system back what glibc keeps of freed memory: batches of ever new sizes leave gaps that add up.

    Elsewhere nothing is done.
    """
    with suppress(AttributeError, OSError, TypeError):  # no C library by that name, or one without it
        ctypes.CDLL(None).malloc_trim(0)
