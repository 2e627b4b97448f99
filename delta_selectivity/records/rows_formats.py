"""Readers and writers of named columns in safetensors, .npz or Parquet; sizes are checked before allocation.

Columns are NumPy arrays by name. A file also has a JSON text, under `delta_selectivity`, and the texts of the rows: in
safetensors and .npz a column `texts` (uint8, the distinct ones as JSON) and `text_of_row` (int64), in Parquet the
columns `text`, `start`, `end` and `person`.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from delta_selectivity.system.person_ids import person_ids
from delta_selectivity.system.unpacked import check_size

METADATA = "delta_selectivity"
BATCH = 256
"""Rows of a Parquet file that are read before its size is checked. The footer has the size, but reading a damaged
footer makes pyarrow end the process (a ParquetException in `RowGroupMetaData.column`)."""
TEXTS = ("texts", "text_of_row")  # for human readers; not read back

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, RuntimeError, KeyError)
"""Exceptions that `zipfile` raises for a damaged archive."""

Column = NDArray[Any]
Text = tuple[str, int, int, str]  # text, start, end, person


class Unreadable(ValueError):
    """An error that says in one line what is wrong with a file."""


@dataclass(frozen=True)
class Content:
    """The content of a file."""

    columns: Mapping[str, Column]
    about: str | None  # JSON; None in a file without a description


class Format(Protocol):
    """One file format."""

    def write(self, file: IO[bytes], columns: Mapping[str, Column], about: str, texts: Sequence[Text] | None) -> None:
        """Write columns, their description, and the text of each row."""
        ...

    def read(self, path: Path) -> Content:
        """Read a file. Raises `Unreadable` or OSError."""
        ...


class Safetensors:
    """The safetensors format; its reader checks the header against the file's size."""

    def write(self, file: IO[bytes], columns: Mapping[str, Column], about: str, texts: Sequence[Text] | None) -> None:
        from safetensors.numpy import save

        header = {METADATA: about}  # a single entry: safetensors writes several in random order
        all_columns = {**columns, **_text_columns(texts)}
        file.write(save({name: np.ascontiguousarray(values) for name, values in all_columns.items()}, header))

    def read(self, path: Path) -> Content:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
                about = (file.metadata() or {}).get(METADATA)
                wanted = [name for name in file.keys() if name not in TEXTS]  # noqa: SIM118 - no mapping
                return Content({name: _as_array(file.get_tensor(name)) for name in wanted}, about)
        except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
            raise Unreadable(f"not a whole safetensors file ({_first_line(error)})") from error


class Npz:
    """NumPy's archive; rejects objects, and arrays larger than their header says or than memory."""

    def write(self, file: IO[bytes], columns: Mapping[str, Column], about: str, texts: Sequence[Text] | None) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, values in {**columns, **_text_columns(texts), METADATA: np.array(about)}.items():
                entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date, so that the same rows give the same bytes
                with archive.open(entry, "w", force_zip64=True) as member:
                    npy.write_array(member, np.ascontiguousarray(values).reshape(values.shape), allow_pickle=False)

    def read(self, path: Path) -> Content:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if m.filename.removesuffix(".npy") not in TEXTS]
                names = [member.filename.removesuffix(".npy") for member in members]
                if len(set(names)) < len(names):
                    raise Unreadable("two of its arrays have the same name")
                check_size(sum(member.file_size for member in members), path)
                columns = {name: _member(archive, member) for name, member in zip(names, members, strict=True)}
        except ZIP_ERRORS as error:
            raise Unreadable(f"not a whole .npz file ({_first_line(error)})") from error
        about = columns.pop(METADATA, None)
        if about is not None and (about.dtype.kind != "U" or about.size != 1):
            raise Unreadable("its description is no text")
        return Content(columns, None if about is None else str(about.reshape(-1)[0]))


class Parquet:
    """The Parquet format; matrices are columns of lists."""

    TEXTS = ("text", "start", "end", "person")

    def write(self, file: IO[bytes], columns: Mapping[str, Column], about: str, texts: Sequence[Text] | None) -> None:
        import pyarrow  # for this format only
        import pyarrow.parquet

        arrays: dict[str, Any] = {}
        for name, values in columns.items():
            flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
            is_matrix = values.ndim == 2
            arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]) if is_matrix else flat
        for place, name in enumerate(self.TEXTS if texts is not None else ()):
            arrays[name] = pyarrow.array([text[place] for text in texts or ()])
        table = pyarrow.table(arrays).replace_schema_metadata({METADATA: about})
        pyarrow.parquet.write_table(table, file, use_dictionary=list(self.TEXTS) if texts is not None else False)

    def read(self, path: Path) -> Content:
        import pyarrow
        import pyarrow.parquet

        try:
            names = pyarrow.parquet.read_schema(path).names
            named = [name for name in names if name == "groups"]  # distinct names only
            with pyarrow.parquet.ParquetFile(path, read_dictionary=named) as file:
                schema = file.schema_arrow
                if len(set(schema.names)) < len(schema.names):
                    raise Unreadable("two of its columns have the same name")
                wanted = [name for name in schema.names if _is_known_column(name)]
                batches, size = [], 0
                for batch in file.iter_batches(BATCH, columns=wanted):
                    batches.append(batch)
                    size += batch.nbytes
                    check_size(size, path)
            table = pyarrow.Table.from_batches(batches, pyarrow.schema([schema.field(name) for name in wanted]))
            about = (schema.metadata or {}).get(METADATA.encode())
            columns = {name: _from_arrow(name, table.column(name)) for name in wanted}
            return Content(columns, None if about is None else about.decode())
        except (pyarrow.ArrowException, KeyError, UnicodeDecodeError, OverflowError) as error:
            raise Unreadable(f"not a readable Parquet file ({_first_line(error)})") from error
        except OSError as error:  # Arrow's own OSErrors have no errno
            if error.errno is not None:
                raise
            raise Unreadable(f"not a readable Parquet file ({_first_line(error)})") from error


FORMATS: dict[str, Format] = {".safetensors": Safetensors(), ".npz": Npz(), ".parquet": Parquet()}


def _text_columns(texts: Sequence[Text] | None) -> dict[str, Column]:
    """Return the distinct texts as JSON, and the index of each row's text."""
    if texts is None:
        return {}
    places: dict[Text, int] = {}
    of_row = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.int64)
    content = json.dumps(list(places), ensure_ascii=False).encode()
    return {"texts": np.frombuffer(content, dtype=np.uint8), "text_of_row": of_row}


def _as_array(tensor: Any) -> Column:
    """Return a copy of a tensor as an array; float32 for dtypes that NumPy lacks."""
    narrow = tensor.is_floating_point() and tensor.itemsize < 4
    return np.array((tensor.float() if narrow else tensor).numpy())


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Column:
    """Read one array of an archive after checking its size: NumPy would allocate whatever the header says."""
    name = member.filename
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unreadable(f"{name} is compressed by a method that NumPy does not use")
    with archive.open(member) as opened:
        file: Any = opened  # its type stub lacks `readinto`
        try:
            shape, fortran, dtype = _npy_header(file)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{name} is no array ({_first_line(error)})") from error
        if dtype.hasobject or dtype.kind not in "biufU":
            raise Unreadable(f"{name} is of {dtype}: numbers or strings are needed, and no Python objects")
        expected, follow = dtype.itemsize * math.prod(shape), member.file_size - file.tell()
        if expected != follow or expected <= 0:
            raise Unreadable(f"{name}: its header announces {expected} bytes of values, but {follow} follow")
        content = bytearray(expected)
        if file.readinto(content) != expected:
            raise Unreadable(f"{name} is truncated")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version == (2, 0):
        return npy.read_array_header_2_0(file)
    raise ValueError(f"its version is {version[0]}.{version[1]}")


def _is_known_column(name: str) -> bool:
    plain = ("x", "recon", "reconstruction", "labels", "groups", "weights", "tokens", "order")
    return name in plain or name.startswith(("recon.", "labels.", "rows."))


def _from_arrow(name: str, column: Any) -> Column:
    """Return a column as an array: lists of one length as a matrix, people's names as int64 ids.

    Raises `Unreadable` for missing values.
    """
    from pyarrow import types

    chunk = column.combine_chunks()
    if column.null_count:
        raise Unreadable(f"{name} has missing values")
    kind = chunk.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        values = chunk.flatten()
        n, width = len(chunk), len(values) // max(len(chunk), 1)
        if values.null_count:
            raise Unreadable(f"{name} has missing values")
        if not types.is_fixed_size_list(kind) and (np.diff(chunk.offsets.to_numpy()) != width).any():
            raise Unreadable(f"{name} has lists of different lengths")
        return _numbers(name, values).reshape(n, width)
    if types.is_dictionary(kind):
        names = chunk.dictionary
        if types.is_integer(names.type):
            return _numbers(name, chunk.dictionary_decode())
        if not (types.is_string(names.type) or types.is_large_string(names.type)) or names.null_count:
            raise Unreadable(f"{name} is of {names.type}: whole numbers or strings are needed")
        return person_ids(names.to_pylist())[chunk.indices.to_numpy()]
    return _numbers(name, chunk)


def _numbers(name: str, values: Any) -> Column:
    from pyarrow import types

    kind = values.type
    if types.is_boolean(kind):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    if not (types.is_integer(kind) or types.is_floating(kind)):
        raise Unreadable(f"{name} is of {kind}: numbers are needed")
    return np.asarray(values.to_numpy())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
