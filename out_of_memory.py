"""Which errors mean that memory ran out, so that a smaller piece of the same work is worth a try."""

from __future__ import annotations

import torch

ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # to catch, and then to look at with `is_out_of_memory`
_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece could have fitted, on the GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)
