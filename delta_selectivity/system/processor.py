"""Decide what this machine's CPU computes fast: the one place where the program asks for its processor.

    has_fast_bfloat16()        # bfloat16 products faster than float32 ones
    prefers_onednn()           # float32 products faster by oneDNN than by MKL
    has_fast_bytes()           # products of signed bytes faster than float32 ones
    describe()                 # "AMD EPYC 9354: bfloat16, onednn, bytes; 8 threads"

The environment variable DELTA_SELECTIVITY_CPU overrules the decision: the names of what is fast, with commas, or
`none`. Times: `python benchmarks/bench_kernels.py`.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch

from delta_selectivity.errors import RequestError

VARIABLE = "DELTA_SELECTIVITY_CPU"
BFLOAT16, ONEDNN, BYTES = "bfloat16", "onednn", "bytes"
FAST = (BFLOAT16, ONEDNN, BYTES)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, rather than emulate them."""
    return BFLOAT16 in fast()


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL, to which torch gives them.

    MKL leaves the AVX-512 instructions of other makers' CPUs unused. With AVX2 alone, and on Intel's, it is the faster.
    """
    return ONEDNN in fast()


def has_fast_bytes() -> bool:
    """Whether this CPU multiplies matrices of signed bytes faster than float32 ones."""
    return BYTES in fast()


@cache
def fast() -> frozenset[str]:
    """Return the members of `FAST` that hold here. Raises `RequestError` for an unknown name in the variable."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return _by_capabilities()
    names = {name.strip() for name in asked.split(",")} - {"", "none"}
    if unknown := sorted(names - set(FAST)):
        raise RequestError(f"{VARIABLE}: {unknown[0]!r} is not one of {', '.join(FAST)}, none")
    return frozenset(names)


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a device computes in bfloat16 itself, so that a model saved in it loses no time by it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and has_fast_bfloat16()


def check_proc() -> None:
    """Raises `RequestError` on a Linux without /proc: PyTorch fails there in the middle, with "cpuinfo"."""
    if sys.platform == "linux" and not Path("/proc/self").is_dir():
        raise RequestError("/proc is not mounted here, and PyTorch needs it: mount -t proc proc /proc")


def cpu_count() -> int:
    """The cores that this process may use, by its affinity and its container's quota, on any system."""
    import joblib  # here: it takes a while to load

    return int(joblib.cpu_count())


def describe() -> str:
    """Return the processor, what is fast on it and the number of threads, for a reader."""
    names = ", ".join(name for name in FAST if name in fast()) or "float32 by MKL only"
    overruled = f" (by {VARIABLE})" if VARIABLE in os.environ else ""
    threads = min(torch.get_num_threads(), cpu_count())
    return f"{_name()}: {names}{overruled}; {threads} thread{'s' if threads > 1 else ''}"


def _by_capabilities() -> frozenset[str]:
    found, onednn_there = torch.cpu.get_capabilities(), torch.backends.mkldnn.is_available()
    has = {
        BFLOAT16: onednn_there and any(found.get(name) for name in ("avx512_bf16", "amx_bf16")),
        ONEDNN: onednn_there
        and torch.backends.mkl.is_available()
        and bool(found.get("avx512_f"))
        and not _made_by_intel(),
        BYTES: onednn_there and any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")),
    }
    return frozenset(name for name in FAST if has[name])


def _made_by_intel() -> bool:
    cpu = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpu.read_text(encoding="utf-8") if cpu.exists() else platform.processor())


def _name() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
