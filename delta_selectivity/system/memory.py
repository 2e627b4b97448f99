"""Memory: limits on it, and the peak of the process and of its GPUs."""

from __future__ import annotations

import resource

import torch


def as_bytes(gigabytes: float) -> int:
    """Return a limit in bytes: 1 at least, so that something is let through, and no more than a machine counts."""
    return max(1, int(min(gigabytes, 2.0**32) * 2**30))


def peak_memory() -> dict[str, float]:
    """Return the peak resident memory of the process and the peak of each CUDA device in use, in GB."""
    peak = {"peak_ram_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 3)}
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            peak[f"peak_cuda{device}_gb"] = round(torch.cuda.max_memory_allocated(device) / 1024**3, 3)
    return peak
