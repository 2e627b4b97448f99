"""Memory limits, and peak memory of the process and its GPUs."""

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
    """Convert a limit to bytes, at least 1 so that some data passes, and bounded for integer arithmetic."""
    return max(1, int(min(gigabytes, 2.0**32) * 2**30))


def peak_memory() -> dict[str, float]:
    """Return peak memory in GB: resident memory of the process, where available, and of each CUDA device."""
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        peak["peak_ram_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1024**3, 3)
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak[f"peak_cuda{device}_gb"] = round(torch.cuda.max_memory_allocated(device) / 1024**3, 3)
    return peak


def return_free_memory() -> None:
    """Return freed memory that glibc keeps to the system; batches of varying sizes leave growing gaps in it.

    Does nothing on other systems.
    """
    with suppress(AttributeError, OSError, TypeError):  # the C library lacks the function
        ctypes.CDLL(None).malloc_trim(0)
