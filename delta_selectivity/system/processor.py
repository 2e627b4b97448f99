"""Detection of what this machine's CPU computes fast; the only module that inspects the processor.

    has_fast_bfloat16()        # bfloat16 products are faster than float32 ones
    prefers_onednn()           # float32 products are faster with oneDNN than with MKL
    has_fast_bytes()           # int8 products are faster than float32 ones
    has_fast_attention()       # short texts attend faster by products than by torch's sdpa
    describe()                 # "AMD EPYC 9354: bfloat16, onednn, bytes; 8 threads"

The environment variable DELTA_SELECTIVITY_CPU overrides the detection: `none`, or a comma-separated
list of fast operations. Timings: `python -m benchmarks.bench_kernels`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from functools import cache
from pathlib import Path

import torch

from delta_selectivity.errors import RequestError

VARIABLE = "DELTA_SELECTIVITY_CPU"
BFLOAT16, ONEDNN, BYTES = "bfloat16", "onednn", "bytes"
FAST = (BFLOAT16, ONEDNN, BYTES)


def has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices natively, faster than float32 ones."""
    return BFLOAT16 in fast_operations()


def prefers_onednn() -> bool:
    """Return whether oneDNN multiplies float32 matrices faster than MKL, torch's default.

    MKL does not use AVX-512 on CPUs other than Intel's. With AVX2 only, and on Intel's CPUs, MKL is faster.
    """
    return ONEDNN in fast_operations()


def has_fast_bytes() -> bool:
    """Return whether this CPU multiplies int8 matrices faster than float32 ones."""
    return BYTES in fast_operations()


def has_fast_attention() -> bool:
    """Return whether attention over short texts in bfloat16 is faster by products than by torch's sdpa.

    It is on AMD's CPUs, where it takes half the time; on Intel's it takes twice as long.
    """
    return has_fast_bfloat16() and prefers_onednn()


@cache
def fast_operations() -> frozenset[str]:
    """Return the members of `FAST` that apply.

    Raises `RequestError` for a name in the variable that is unknown, or that this processor cannot do: without its
    instructions, products of bytes overflow and those of bfloat16 fail.
    """
    override = os.environ.get(VARIABLE)
    if override is None:
        return _by_capabilities()
    names = {name.strip() for name in override.split(",")} - {"", "none"}
    if unknown := sorted(names - set(FAST)):
        raise RequestError(f"{VARIABLE}: {unknown[0]!r} is not one of {', '.join(FAST)}, none")
    if impossible := sorted(names - {ONEDNN} - _by_capabilities()):
        raise RequestError(f"{VARIABLE}: this processor has no fast products of {impossible[0]}")
    return frozenset(names)


def has_bfloat16(device: str | torch.device) -> bool:
    """Return whether a device computes in bfloat16 natively, so that a model in bfloat16 is not slowed down."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and has_fast_bfloat16()


def check_proc() -> None:
    """Raise `RequestError` on Linux without /proc, where PyTorch would fail later with an error about "cpuinfo"."""
    if sys.platform == "linux" and not Path("/proc/self").is_dir():
        raise RequestError("/proc is not mounted, but PyTorch needs it: mount -t proc proc /proc")


def cpu_count() -> int:
    """Return the number of cores that this process may use, given its affinity and container quota."""
    import joblib  # deferred: slow to import

    return int(joblib.cpu_count())


def describe() -> str:
    """Return a text with the processor, what is fast on it and the number of threads."""
    names = ", ".join(name for name in FAST if name in fast_operations()) or "float32 by MKL only"
    source = f" (by {VARIABLE})" if VARIABLE in os.environ else ""
    threads = min(torch.get_num_threads(), cpu_count())
    return f"{_name()}: {names}{source}; {threads} thread{'s' if threads > 1 else ''}"


def _by_capabilities() -> frozenset[str]:
    found, has_onednn = torch.cpu.get_capabilities(), torch.backends.mkldnn.is_available()
    has = {
        BFLOAT16: has_onednn and any(found.get(name) for name in ("avx512_bf16", "amx_bf16")),
        ONEDNN: has_onednn
        and torch.backends.mkl.is_available()
        and bool(found.get("avx512_f"))
        and not _made_by_intel(),
        BYTES: has_onednn and any(found.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")),
    }
    return frozenset(name for name in FAST if has[name])


def _made_by_intel() -> bool:
    return "GenuineIntel" in _cpuinfo()


def _name() -> str:
    name = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    family = re.search(r"^cpu family\s*:\s*(\d+)", _cpuinfo(), re.MULTILINE)
    if name.endswith("EPYC") and family:  # virtual machines hide the number of the model
        return f"{name} (family {family[1]})"
    return name


def _cpuinfo() -> str:
    cpu = Path("/proc/cpuinfo")
    return cpu.read_text(encoding="utf-8") if cpu.exists() else platform.processor()
