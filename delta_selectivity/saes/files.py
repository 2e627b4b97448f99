"""Readers of an SAE's files, with one-line errors.

Weights are read as safetensors or, for the suffixes of ``torch_file``, as a file of ``torch.save``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.torch_file import SUFFIXES, read_torch_file
from delta_selectivity.system.unpacked import is_special

MAX_CONFIG_BYTES = 64 * 2**20  # bytes

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and their shapes."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `RequestError` if the file is missing or holds something else."""
    _check_file(path, "a folder with weights needs its config")
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise RequestError(f"{path}: {size / 2**20:.0f} MiB is too large for a config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path}: it must be a JSON object, but is a {type(config).__name__}")
    return config


def positive_int(config: Mapping[str, Any], key: str, path: Path) -> int:
    """Return ``config[key]``. Raises `RequestError` unless it is a whole number above zero."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise RequestError(f"{path}: {key} {found}, but must be a whole number above 0")
    return value


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors in a weights file, read from its header only."""
    _check_file(path, "its config needs these weights")
    if path.suffix in SUFFIXES:
        return {name: tuple(tensor.shape) for name, tensor in read_torch_file(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _incomplete(path, error) from error


def check_shapes(path: Path, expected: Shapes) -> None:
    """Compare the shapes in a weights file with the expected ones. Raises `RequestError` if they differ."""
    compare_shapes(path, read_shapes(path), expected)


def compare_shapes(where: object, found: Shapes, expected: Shapes) -> None:
    """Compare found tensor shapes with the expected ones; ``where`` is their origin, for messages.

    Raises `RequestError` if a tensor is missing or has another shape. Additional tensors are ignored.
    """
    for name, shape in expected.items():
        if name not in found:
            raise RequestError(f"{where}: no tensor {name!r}; it has {', '.join(sorted(found)) or 'none'}")
        if found[name] != shape:
            transposed = " (transposed?)" if len(shape) > 1 and found[name] == shape[::-1] else ""
            raise RequestError(
                f"{where}: {name} has shape {list(found[name])}{transposed}, but its config says {list(shape)}"
            )


def check_finite(where: object, name: str, tensor: Tensor) -> None:
    """Raise `RequestError` if a tensor holds NaN or infinity; ``where`` is its origin, for messages."""
    if not torch.isfinite(tensor).all():
        raise RequestError(f"{where}: {name} has NaN or infinity: the file is damaged, or the training diverged")


def check_values(path: Path) -> None:
    """Read a weights file, one tensor at a time. Raises `RequestError` if a value is not finite."""
    for name, tensor in _tensors(path):
        check_finite(path, name, tensor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a weights file as float32 copies.

    The file is memory-mapped, so without copies a write to it during the run would change the weights or crash the
    process. Raises `RequestError` if a value is not finite.
    """
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in _tensors(path)}
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors


def digest_files(paths: Iterable[Path]) -> str:
    """Return the sha256 of the files' names and contents, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and values, independent of the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors, memory-mapped."""
    if path.suffix in SUFFIXES:
        yield from read_torch_file(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _incomplete(path, error) from error


def _check_file(path: Path, why: str) -> None:
    """Raise `RequestError` unless the path is a readable, non-empty regular file; ``why`` is added if it is missing."""
    try:
        if is_special(path):
            raise RequestError(f"{path}: it is a pipe or a device, not a file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except IsADirectoryError as error:
        raise RequestError(f"{path}: it is a folder, not a file") from error
    except FileNotFoundError as error:
        reason = "a symbolic link to a missing file" if path.is_symlink() else "no such file"
        raise RequestError(f"{path}: {reason}; {why}") from error
    except OSError as error:  # such as no permission, a link to itself, or a disk failure
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise RequestError(f"{path}: the file is empty: copy or download it again")


def _incomplete(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path}: not a complete safetensors file ({error}): copy or download it again")
