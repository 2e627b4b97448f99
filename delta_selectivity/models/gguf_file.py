"""Read the header of a GGUF file: architecture, quantisation, and whether the file is complete.

    file = GgufFile.read(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))       # reads only the header
    file.architecture, file.quantisation                                # "llama", "Q4_1"

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers reads the weights and dequantises
them. It does not detect a truncated file, and it ignores scaled rotary positions.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from delta_selectivity.errors import RequestError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_UNREAD_ROTARY = ("rope_freqs", "rope_factors")
"""Tensors that modify a model's rotary positions and that transformers ignores."""


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the data


@dataclass(frozen=True)
class GgufFile:
    """Facts from the header of a GGUF file."""

    architecture: str
    quantisation: str  # type of most of the weights: "Q4_1", "F16"
    has_tokenizer: bool

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read the header. Raises `RequestError` if it is unreadable, or if the file is truncated."""
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError as error:
            raise RequestError(f"`model` {path}: a GGUF file needs the package gguf: pip install gguf") from error
        try:
            metadata, tensors, start = _read_header(path)
            types = {kind: GGMLQuantizationType(kind) for kind in {tensor.type for tensor in tensors}}
            ends = [start]
            for tensor in tensors:
                per_block, n_bytes = GGML_QUANT_SIZES[types[tensor.type]]
                ends.append(start + tensor.offset + prod(tensor.shape) // per_block * n_bytes)
        except OSError as error:
            raise RequestError(f"`model` {path}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # damaged files cause many kinds of errors
            reason = str(error) if isinstance(error, _Unsupported) else f"damaged ({type(error).__name__}: {error})"
            raise RequestError(f"`model` {path}: not a readable GGUF file: {reason[:300]}") from error
        if (size := path.stat().st_size) < max(ends):
            raise RequestError(f"`model` {path}: the file has {size} of {max(ends)} bytes: copy or download it again")
        architecture = str(metadata.get("general.architecture"))
        _refuse_unread_rotary(path, metadata, [tensor.name for tensor in tensors], architecture)
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[types[tensor.type].name] += prod(tensor.shape)
        main_type = sizes.most_common(1)[0][0] if sizes else "no weights"
        return cls(architecture, main_type, "tokenizer.ggml.tokens" in metadata)


@contextmanager
def without_bar() -> Iterator[None]:
    """Disable transformers' own progress bar for the tensors of a GGUF file."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar


class _Unsupported(ValueError):
    """Error for an intact file in an unsupported format."""


def _refuse_unread_rotary(path: Path, metadata: dict[str, Any], tensors: list[str], architecture: str) -> None:
    """Raise `RequestError` for scaled rotary positions, which transformers reads as unscaled."""
    found = next((name for name in tensors if name.startswith(_UNREAD_ROTARY)), None)
    key = f"{architecture}.rope.scaling.type"
    if found is None and metadata.get(key, "none") != "none" and architecture != "gpt-oss":
        found = f"{key} {metadata[key]}"
    if found is not None:
        raise RequestError(
            f"`model` {path}: its rotary positions are scaled ({found}), which transformers does not read from GGUF: "
            "use the same model in safetensors"
        )


def _read_header(path: Path) -> tuple[dict[str, Any], list[_Tensor], int]:
    """Return the metadata (for arrays, only the length), the tensors, and the offset of their data."""
    with path.open("rb") as file:
        if (magic := file.read(len(MAGIC))) != MAGIC:
            raise _Unsupported(f"it begins with {magic!r} instead of {MAGIC!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content, len(MAGIC))
            version = reader.number("I")
            if version not in VERSIONS:
                raise _Unsupported(f"its format version is {version}; supported: {' and '.join(map(str, VERSIONS))}")
            n_tensors, n_values = reader.number("Q"), reader.number("Q")
            metadata = {}
            for _ in range(n_values):
                key = reader.text()
                metadata[key] = reader.value(reader.number("I"))
            tensors = [reader.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    return metadata, tensors, -(-reader.at // alignment) * alignment


class _Reader:
    """Sequential reader of values. Raises struct.error beyond the end."""

    def __init__(self, content: mmap.mmap, at: int) -> None:
        self.content = content
        self.at = at

    def number(self, kind: str) -> Any:
        (found,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return found

    def text(self) -> str:
        start = self.skip_text()
        return self.content[start : self.at].decode("utf-8")

    def skip_text(self) -> int:
        """Skip a string, and return its offset."""
        length = self.number("Q")
        start = self.at
        self.skip(length)
        return start

    def skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self.content):
            raise struct.error("the header is truncated")

    def value(self, kind: int) -> Any:
        """Read a metadata value; for an array, skip it and return its length."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_FORMATS[kind])
        of, length = self.number("I"), self.number("Q")
        if of in (_STRING, _ARRAY):
            for _ in range(length):
                self.skip_text() if of == _STRING else self.value(_ARRAY)
        else:
            self.skip(length * struct.calcsize(f"<{_FORMATS[of]}"))
        return length

    def tensor(self) -> _Tensor:
        name, n_dims = self.text(), self.number("I")
        shape = tuple(self.number("Q") for _ in range(n_dims))
        return _Tensor(name, shape, self.number("I"), self.number("Q"))
