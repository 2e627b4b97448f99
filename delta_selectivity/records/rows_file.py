"""Files of probed rows: activations at one hook point, their reconstructions, labels and people.

    save(Path("rows.safetensors"), rows)
    load(Path("rows.safetensors")).recons["my_sae"]          # float32 [rows, d]

`docs/rows_file.md` documents the columns. The suffix decides the format: .safetensors, .npz or .parquet, with the same
columns in each (`rows_formats`). Other programs may write such files, so the content is checked. Loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.errors import RequestError
from delta_selectivity.records.rows_formats import FORMATS, Column, Format, Unreadable
from delta_selectivity.system.person_ids import person_ids
from delta_selectivity.system.unpacked import TooLarge, is_special
from delta_selectivity.system.whole_file import replacing, sweep

log = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS = (1e-12, 1e12)  # beyond these limits, sums of weighted squares overflow or underflow float32
NOT_PROBED = -1  # label and place of a row that is not part of a probe

Json = dict[str, Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowText:
    """The text behind a row."""

    text: str
    start: int  # characters [start, end) are probed
    end: int
    person: str  # key of the person


@dataclass(frozen=True, eq=False)
class RowProbe:
    """The binary labels of one probe on some of the rows."""

    name: str
    rows: Ints  # [n], row indices in the file, in summation order
    labels: NDArray[np.bool_]  # [n]
    dataset: str = ""  # probes of one dataset on the same rows share folds and fits


@dataclass(frozen=True, eq=False)
class Rows:
    """The content of a file of rows."""

    x: Floats  # [rows, d], activations
    recons: Mapping[str, Floats]  # SAE -> [rows, d]
    probes: tuple[RowProbe, ...]
    groups: Ints  # [rows], the person
    weights: NDArray[np.floating[Any]] | None = None  # [rows]
    tokens: Ints | None = None  # [rows], token type at the row
    order: Ints | None = None  # [rows], row ids independent of the order of the rows in the file
    texts: Sequence[RowText] | None = None  # [rows]; written, but not read back
    about: Json = field(default_factory=dict)  # description by the writer: model, layer, hookpoint, saes, settings


def check_target(path: Path) -> None:
    """Raise `RequestError` unless a file of rows can be written at a path."""
    _format(path)
    if path.is_dir():
        raise RequestError(f"{path}: cannot be written: this is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


def save(path: Path, rows: Rows) -> None:
    """Write the file atomically. Raises `RequestError` for an unknown suffix, and OSError."""
    columns = dict(_columns(rows))
    about = {"format": FORMAT, **rows.about, "datasets": {probe.name: probe.dataset for probe in rows.probes}}
    about["sha256"] = _digest(about, columns)
    texts = None if rows.texts is None else [(t.text, t.start, t.end, t.person) for t in rows.texts]
    sweep(path.parent, path.name)
    with replacing(path, "wb") as file:
        _format(path).write(file, columns, json.dumps(about), texts)


def load(path: Path) -> Rows:
    """Read and check a file of rows.

    Raises:
        RequestError: It is not a file of rows, is truncated or changed, or cannot be measured; the message says why.
    """
    try:
        file_format = _format(path)
        if is_special(path):
            raise Unreadable("a pipe or a device, not a file")
        content = file_format.read(path)
        about = _read_about(content.about)
        digest = about.pop("sha256", None)
        if digest is not None and digest != _digest(about, content.columns):
            raise Unreadable("it was changed after it was written")
        return _rows(content.columns, about, path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (Unreadable, TooLarge) as error:
        raise RequestError(f"{path}: {error}") from error


def _format(path: Path) -> Format:
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"{path}: unknown suffix {path.suffix!r}: give {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def _columns(rows: Rows) -> Iterator[tuple[str, NDArray[Any]]]:
    """Return the columns of a file, in order."""
    n = len(rows.x)
    yield "x", rows.x
    yield from ((f"recon.{name}", recon) for name, recon in rows.recons.items())
    for probe in rows.probes:
        labels, place = np.full(n, NOT_PROBED, np.int8), np.full(n, NOT_PROBED, np.int64)
        labels[probe.rows] = probe.labels
        place[probe.rows] = np.arange(len(probe.rows))
        yield f"labels.{probe.name}", labels
        if (np.diff(probe.rows) < 0).any():
            yield f"rows.{probe.name}", place
    others = {"groups": rows.groups, "weights": rows.weights, "tokens": rows.tokens, "order": rows.order}
    yield from ((name, values) for name, values in others.items() if values is not None)


def _digest(about: Json, columns: Mapping[str, Column]) -> str:
    """Return the sha256 of the data that determine the metric, the same in every format."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, values in sorted(columns.items()):
        array = np.ascontiguousarray(values)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode("utf-8", "surrogatepass"))
        digest.update(array.data if array.dtype.kind in "fiub" else repr(array.tolist()).encode())
    return digest.hexdigest()


def _read_about(text: str | None) -> Json:
    """Return the description in the file; empty if it has none because another program wrote it."""
    if text is None:
        return {}
    try:
        about = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"its description is no JSON ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else about
        raise Unreadable(f"it is of format {version!r:.40}; this program reads format {FORMAT}")
    for name in ("datasets", "saes", "settings"):
        if not isinstance(about.get(name, {}), dict):
            raise Unreadable(f"its description is damaged: {name} is no object")
    return about


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number there")


def _rows(columns: Mapping[str, Column], about: Json, path: Path) -> Rows:
    recon_of, labels_of = _columns_by_name(columns, about, *_RECONS), _columns_by_name(columns, about, *_LABELS)
    present = {"x": "x" in columns, "recon": recon_of, "labels": labels_of, "groups": "groups" in columns}
    if missing := [what for what, is_present in present.items() if not is_present]:
        raise Unreadable(f"{missing[0]} is missing; found {', '.join(columns) or 'nothing'}")
    x = _matrix("x", columns["x"])
    n = len(x)
    known = {*_REQUIRED, *_OPTIONAL, *recon_of.values(), *labels_of.values(), *(f"rows.{name}" for name in labels_of)}
    if others := [name for name in columns if name not in known]:
        log.warning("%s: not used: %s", path, ", ".join(others))
    datasets = about.get("datasets", {})
    optional = {name: _OPTIONAL[name](name, columns[name], n) for name in _OPTIONAL if name in columns}
    return Rows(
        x=x,
        recons={name: _matrix(column, columns[column], x.shape) for name, column in recon_of.items()},
        probes=tuple(_probe(name, columns, labels_of[name], n, str(datasets.get(name, ""))) for name in labels_of),
        groups=_groups(columns["groups"], n),
        about=about,
        **optional,
    )


def _columns_by_name(
    columns: Mapping[str, Column], about: Json, prefix: str, plain: Mapping[str, str], order: str
) -> dict[str, str]:
    """Return name -> column for columns with the prefix or a plain name.

    The order is that of the description's entry `order`, because folds depend on the order of a dataset's labels, which
    safetensors does not keep.
    """
    column_of: dict[str, str] = {}
    for column in columns:
        name = column.removeprefix(prefix) if column.startswith(prefix) else plain.get(column)
        if name is not None and (name in column_of or not name):
            raise Unreadable(f"{column} has no name" if not name else f"{column_of[name]} and {column} are both {name}")
        if name is not None:
            column_of[name] = column
    listed = [name for name in about.get(order, {}) if name in column_of]
    return {name: column_of[name] for name in (*listed, *(name for name in column_of if name not in listed))}


def _matrix(name: str, values: Column, shape: tuple[int, ...] | None = None) -> Floats:
    if values.dtype.kind not in "fiu":
        raise Unreadable(f"{name} is of {values.dtype}: real numbers are needed")
    if values.ndim != 2 or 0 in values.shape:
        raise Unreadable(f"{name} has shape {list(values.shape)}: [rows, d] is needed, with neither of them 0")
    if shape is not None and values.shape != shape:
        raise Unreadable(f"{name} has shape {list(values.shape)}, but x has {list(shape)}")
    with np.errstate(over="ignore"):  # infinite values are rejected later
        matrix = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise Unreadable(f"{name}: row {int(np.argmin(finite))} holds NaN, infinity, or a number beyond float32")
    return matrix if matrix.flags.writeable else matrix.copy()  # torch accepts no other arrays


def _probe(name: str, columns: Mapping[str, Column], column: str, n: int, dataset: str) -> RowProbe:
    labels = columns[column]
    _check_length(column, labels, n)
    if labels.dtype.kind not in "biuf":
        raise Unreadable(
            f"{column} is of {labels.dtype}: 0, 1, and {NOT_PROBED} for rows that are not probed, are needed"
        )
    allowed = (labels == 0) | (labels == 1) | (labels == NOT_PROBED)
    if not allowed.all():
        row = int(np.argmin(allowed))
        raise Unreadable(f"{column}: row {row} is {labels[row]}: only 0, 1 and {NOT_PROBED} (not probed) are labels")
    rows = np.flatnonzero(labels != NOT_PROBED)
    if f"rows.{name}" in columns:
        rows = _ordered_rows(f"rows.{name}", columns[f"rows.{name}"], rows, n)
    positive = labels[rows] == 1
    if positive.all() or not positive.any():
        raise Unreadable(f"{column} has {int(positive.sum())} positives in {len(rows)} rows: both classes are needed")
    return RowProbe(name, rows, positive, dataset)


def _ordered_rows(name: str, values: Column, rows: Ints, n: int) -> Ints:
    """Return the rows of a probe in the order of their places."""
    place = _integers(name, values, n)
    if not np.array_equal(np.sort(place[rows]), np.arange(len(rows))):
        raise Unreadable(f"{name}: not the places 0 to {len(rows) - 1} of the rows that are probed, each once")
    ordered = np.empty_like(rows)
    ordered[place[rows]] = rows
    return ordered


def _groups(values: Column, n: int) -> Ints:
    _check_length("groups", values, n)
    if values.dtype.kind == "U":
        names, of_row = np.unique(values, return_inverse=True)
        return person_ids(names.tolist())[of_row]
    if values.dtype.kind == "f" and (np.abs(values) < 2.0**63).all() and (values == np.round(values)).all():
        return values.astype(np.int64)
    if values.dtype.kind not in "biu":
        raise Unreadable(f"groups are of {values.dtype}: whole numbers or strings are needed")
    return values.astype(np.int64)  # uint64 keeps its bits, so equal groups stay equal


def _weights(name: str, values: Column, n: int) -> NDArray[np.floating[Any]]:
    _check_length(name, values, n)
    least, most = WEIGHTS
    if values.dtype.kind not in "fiu" or not ((values >= least) & (values <= most)).all():
        raise Unreadable(f"{name} are not all numbers between {least:g} and {most:g}")
    return values.astype(np.float64)


def _integers(name: str, values: Column, n: int) -> Ints:
    _check_length(name, values, n)
    if values.dtype.kind not in "iu":
        raise Unreadable(f"{name} is of {values.dtype}: whole numbers are needed")
    return values.astype(np.int64)


def _check_length(name: str, values: Column, n: int) -> None:
    if values.shape != (n,):
        raise Unreadable(f"{name} has shape {list(values.shape)}, but x has {n} rows: [{n}] is needed")


_RECONS = ("recon.", {"recon": "reconstruction", "reconstruction": "reconstruction"}, "saes")
_LABELS = ("labels.", {"labels": "labels"}, "datasets")
_REQUIRED = ("x", "groups")
_OPTIONAL: dict[str, Callable[[str, Column, int], Any]] = {
    "weights": _weights,
    "tokens": _integers,
    "order": _integers,
}
