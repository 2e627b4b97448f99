"""Reader of ``torch.save`` files that does not execute code.

Such a file is a pickle, and unpickling can call arbitrary functions. ``weights_only`` builds tensors and plain
containers and refuses everything else: https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.system.unpacked import ALWAYS_ALLOWED

SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt"})

MAX_EXPANSION = 4  # ratio of the tensors' size to the file's, above 1 because tensors may share memory
MAX_ENTRIES, MAX_LEVELS = 100_000, 100  # of nested dictionaries

_CALLED = re.compile(r"GLOBAL (\S+)")


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, memory-mapped on the CPU where the file allows it.

    Nested dictionaries give dotted names (``state_dict.encoder.weight``); values that are not tensors are skipped.
    Raises `RequestError` if the file is broken, holds anything but tensors in dictionaries, or would have to run code.
    """
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise RequestError(
            f"{path}: it contains a {kind}, but must have named tensors: torch.save(sae.state_dict(), path)"
        )
    tensors = dict(_flatten(path, content))
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            raise RequestError(
                f"{path}: {name} is sparse, complex, quantized or on the meta device: save dense real numbers"
            )
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if claimed > max(
        ALWAYS_ALLOWED, MAX_EXPANSION * path.stat().st_size
    ):  # stride 0, or many names for the same memory
        raise RequestError(f"{path}: its tensors have {claimed / 2**20:.0f} MiB, far more than the file")
    return tensors


def _unpickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save does not compress; torch.load has no size limit
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("packed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; unreadable files raise
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken pickle may raise anything: EOFError, KeyError, RuntimeError, ...
        called = _CALLED.search(str(error)) if isinstance(error, UnpicklingError) else None
        if called:
            raise RequestError(
                f"{path}: reading it would call {called[1]}, which is not allowed, because a file could run any code:"
                " save only the tensors: torch.save(sae.state_dict(), path)"
            ) from error
        raise RequestError(f"{path}: not a complete file of torch.save: copy or download it again") from error


def _flatten(path: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    levels = [("", content)]
    seen = 0
    while levels:
        prefix, inner = levels.pop()
        for key, value in inner.items():
            seen += 1
            if seen > MAX_ENTRIES or prefix.count(".") > MAX_LEVELS:  # a dictionary may contain itself
                raise RequestError(f"{path}: its dictionaries are nested too deeply: save named tensors only")
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            elif isinstance(value, Mapping):
                levels.append((f"{prefix}{key}.", value))
