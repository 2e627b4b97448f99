"""Reading an SAE's files, and saying in one line what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import RequestError

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and the shapes that their config promises."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `RequestError` if the file is missing or is not one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path}: a JSON object was expected, this is a {type(config).__name__}")
    return config


def positive_int(config: Mapping[str, Any], key: str, path: Path) -> int:
    """``config[key]``. Raises `RequestError` if it is missing or is not a whole number above zero."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise RequestError(f"{path}: {key} {found}; a whole number above 0 is needed")
    return value


def tensor_names(path: Path) -> set[str]:
    """What a safetensors file holds, from its header alone."""
    return set(_read_shapes(path))


def check_shapes(path: Path, expected: Shapes) -> None:
    """Compare a safetensors file's header with what the config promises. Raises `RequestError` at a difference."""
    found = _read_shapes(path)
    for name, shape in expected.items():
        if name not in found:
            raise RequestError(f"{path}: no tensor {name!r}; it holds {', '.join(sorted(found)) or 'nothing'}")
        if found[name] != shape:
            transposed = " (transposed?)" if len(shape) > 1 and found[name] == shape[::-1] else ""
            raise RequestError(
                f"{path}: {name} has shape {list(found[name])}{transposed}, but cfg.json says {list(shape)}"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file as float32, in memory of their own.

    safetensors maps the file: if somebody wrote to it during the run, numbers would change or the process would die.
    Raises `RequestError` if a tensor holds a value that is not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RequestError(f"{path}: {name} holds NaN or infinity; the file is broken, or its training diverged")
    return tensors


def digest_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise RequestError(f"{path}: no such file; the config beside it needs these weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path}: not a whole safetensors file ({error}); copy or download it again")
