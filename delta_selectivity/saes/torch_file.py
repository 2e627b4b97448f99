"""Read tensors from a file of ``torch.save`` without running code.

Such a file is a pickle, and unpickling calls whatever it names. ``weights_only`` builds tensors and plain containers
and refuses everything else: https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only.
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

SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt"})

_CALLED = re.compile(r"GLOBAL (\S+)")


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Names and tensors on the CPU, mapped from the file and so read when they are used.

    A dictionary in a dictionary gives dotted names (``state_dict.encoder.weight``); what is no tensor is passed over.
    Raises `RequestError` if the file is broken, holds more than tensors in dictionaries, or would have to run code.
    """
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise RequestError(f"{path}: holds a {kind}; named tensors are needed: torch.save(sae.state_dict(), path)")
    tensors = dict(_flatten(content))
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex():
            raise RequestError(f"{path}: {name} is sparse or complex; save dense real numbers")
    return tensors


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; a file that cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises whatever a broken pickle runs into: EOFError, KeyError, RuntimeError, ...
        called = _CALLED.search(str(error)) if isinstance(error, UnpicklingError) else None
        if called:
            raise RequestError(
                f"{path}: to read it, {called[1]} would have to be called, and a file may call anything; nothing was"
                " run. Save the tensors alone: torch.save(sae.state_dict(), path)"
            ) from error
        raise RequestError(f"{path}: not a whole file that torch.save wrote; copy or download it again") from error


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
