"""Out-of-fold scores on disk, from which every statistic can be recomputed without fitting a probe.

    stored = load(Path("results/tiny-pythia-saes-k8/tiny-pythia_wikidata_gender.scores/layer_3.safetensors"))
    stored.probes["gender"].views["sae"]        # float16 [repeats, rows]
    compute(stored)["gender"].delta_sel         # what the JSON says

Beside each result file `NAME.json` is a folder `NAME.scores` with one safetensors file per layer. For the i-th probe of
the header's list it holds

    i.view.NAME       float16 [repeats, rows]   scores; a positive score predicts label 1
    i.labels          uint8   [rows]            0 or 1
    i.persons         int64   [rows]            the number of the person, the same in all files
    i.weights         float64 [rows]
    i.folds           int8    [repeats, rows]   the fold in which the row was held out
    i.outliers        uint8   [rows]            optional: 1 for rows that transfer_r2 excludes
    i.control_scores  float16 [rows]            optional: scores of the control task
    i.control_labels  uint8   [rows]            optional: labels of the control task

The header's metadata has, under `delta_selectivity`, a JSON object with `format`, `layer`, `key` (sha256 of the
settings in `_run.key` of the result file), `probes` (their names) and `sha256` (of this header and of every tensor, to
detect damaged files). Loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import EPSILON, ProbeScores, Statistics, statistics
from delta_selectivity.system.whole_file import refuse_link, replacing, sweep

FORMAT = 1
METADATA = "delta_selectivity"

_FILE_NAME = re.compile(r"layer_(0|[1-9][0-9]{0,5})\.safetensors")
_DTYPES = {
    "labels": np.uint8,
    "persons": np.int64,
    "weights": np.float64,
    "folds": np.int8,
    "outliers": np.uint8,
    "control_scores": np.float16,
    "control_labels": np.uint8,
}
_LABELS = ("labels", "control_labels")
_OPTIONAL = ("outliers", "control_scores", "control_labels")


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer in one result file."""

    layer: int
    key: str  # `key_digest` of the result file's key
    probes: Mapping[str, ProbeScores]


def folder_of(result_file: Path) -> Path:
    """Return the folder of the scores of a result file."""
    return result_file.with_suffix(".scores")


def path_of(result_file: Path, layer: int) -> Path:
    """Return the path of the scores of one layer."""
    return folder_of(result_file) / f"layer_{layer}.safetensors"


def key_digest(key: Mapping[str, Any]) -> str:
    """Return the sha256 of the settings that made a result file."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def save(path: Path, stored: LayerScores) -> None:
    """Write the file atomically; create its folder. Raises OSError, or `RequestError` if the folder is a link."""
    tensors: dict[str, NDArray[Any]] = {}
    for i, probe in enumerate(stored.probes.values()):
        tensors |= {f"{i}.view.{view}": scores for view, scores in probe.views.items()}
        for name, dtype in _DTYPES.items():
            value = getattr(probe, name)
            if value is not None:
                tensors[f"{i}.{name}"] = value.astype(dtype)
    about: dict[str, Any] = {
        "format": FORMAT, "layer": stored.layer, "key": stored.key, "probes": list(stored.probes)
    }  # fmt: skip
    about["sha256"] = _digest(about, tensors)
    refuse_link(path.parent)
    path.parent.mkdir(exist_ok=True)
    sweep(path.parent, "layer_*.safetensors")
    header = {METADATA: json.dumps(about)}  # a single entry: safetensors writes several in random order
    content = to_bytes({name: np.ascontiguousarray(value) for name, value in tensors.items()}, header)
    with replacing(path, "wb") as file:
        file.write(content)


def prune(result_file: Path, layers: Container[int]) -> None:
    """Remove the scores of all layers but these. They belong to an earlier result file that this one replaces.

    Entries with other names, and entries that are not files, are kept. Raises `RequestError` if the folder is a link.
    """
    refuse_link(folder_of(result_file))
    for path in folder_of(result_file).glob("layer_*.safetensors"):
        match = _FILE_NAME.fullmatch(path.name)
        if match and int(match[1]) not in layers and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def load(path: Path, needed: Collection[str] = ("model", "sae")) -> LayerScores:
    """Read a file of `save`; needed: the views that each probe has at least.

    Raises `RequestError` if it is not one, is truncated, or is inconsistent.
    """
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if about["format"] != FORMAT or not isinstance(about["layer"], int) or not isinstance(about["key"], str):
            raise ValueError("its header is of another format")
        if about.pop("sha256") != _digest(about, tensors):
            raise ValueError("it was changed after it was written")
        return LayerScores(
            about["layer"], about["key"], {str(n): _probe(tensors, i, needed) for i, n in enumerate(about["probes"])}
        )
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{path} holds no scores of this program, or was damaged: {error}") from error


def _digest(about: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the sha256 of a file's header, without the digest itself, and of its tensors."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _probe(tensors: Mapping[str, NDArray[Any]], i: int, needed: Collection[str]) -> ProbeScores:
    prefix = f"{i}.view."
    views = {name.removeprefix(prefix): scores for name, scores in tensors.items() if name.startswith(prefix)}
    parts = {name: tensors[f"{i}.{name}"] for name in _DTYPES if f"{i}.{name}" in tensors}
    if not set(needed) <= views.keys():
        raise ValueError(f"its only views are {', '.join(views)}")
    _check_arrays(views, parts)
    labels, control_labels = (_two_classes(parts[name]) if name in parts else None for name in _LABELS)
    return ProbeScores(
        views=views,
        labels=labels,  # type: ignore[arg-type]
        persons=parts["persons"],
        weights=parts["weights"],
        folds=parts["folds"],
        outliers=parts["outliers"].astype(bool) if "outliers" in parts else None,
        control_scores=parts.get("control_scores"),
        control_labels=control_labels,
    )


def _check_arrays(views: Mapping[str, NDArray[Any]], parts: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError unless types and shapes are as documented, and every number is finite."""
    if missing := [name for name in _DTYPES if name not in parts and name not in _OPTIONAL]:
        raise ValueError(f"{', '.join(missing)} missing")
    shape = parts["folds"].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"folds {list(shape)}")
    by_row = {name: part for name, part in parts.items() if name != "folds"}
    if any(view.shape != shape for view in views.values()) or any(p.shape != shape[1:] for p in by_row.values()):
        raise ValueError("its tensors have inconsistent shapes")
    if any(view.dtype != np.float16 for view in views.values()) or any(parts[n].dtype != _DTYPES[n] for n in parts):
        raise ValueError("its tensors have unexpected types")
    if not all(np.isfinite(part).all() for part in (*views.values(), *parts.values())) or parts["weights"].min() <= 0:
        raise ValueError("a number is not finite, or a weight is not positive")


def _two_classes(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError("labels are not 0 and 1, each at least once")
    return labels.astype(bool)


def compute(stored: LayerScores, epsilon: float = EPSILON) -> dict[str, Statistics]:
    """Recompute every statistic of every probe; epsilon: largest difference that counts as preserved."""
    return {name: statistics(probe, epsilon) for name, probe in stored.probes.items()}
