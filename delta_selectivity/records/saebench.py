"""Reader of SAEBench 0.6 result files: one evaluation of one SAE.

found = read(Path("pythia_blocks.4_eval_results.json"))
found.eval_type, found.metrics["sae_top_1_test_accuracy"], found.tasks["gender"]

Supports `core`, `sparse_probing` and `sparse_probing_sae_probes`. NaN, and SAE Lens's -1, stand for "not computed".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.records.figures import ROUNDING, is_number
from delta_selectivity.system.terminal import printable

Json = dict[str, Any]

CORE, PROBING = "core", "sparse_probing"
TYPES = (CORE, PROBING, "sparse_probing_sae_probes")
NOT_COMPUTED = -1.0
LONGEST_NAME = 200
_SHARE = re.compile(r"\w+_(accuracy|auc|f1)|frac_alive")
_LAYER = re.compile(r"(?:blocks|layers?|h)[._](\d{1,4})(?!\d)")


@dataclass(frozen=True)
class Evaluation:
    """The content of one file."""

    eval_type: str  # of `TYPES`
    sae: str
    model: str  # "" if the file does not name it
    layer: int | None
    metrics: Mapping[str, float]  # only computed metrics
    tasks: Mapping[str, Mapping[str, float]]  # sparse probing metrics by dataset
    is_ours: bool  # whether this program wrote the file

    @property
    def is_core(self) -> bool:
        """Whether it evaluates the reconstruction and the model's output, and not probes."""
        return self.eval_type == CORE


def read(path: Path) -> Evaluation:
    """Read a result file of SAEBench. Raises `RequestError` if it is not one, or of an unsupported evaluation."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise RequestError(f"`beside` {path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`beside` {path} is not a result file of SAEBench: no JSON") from error
    try:
        return evaluation(content, path.stem.removesuffix("_eval_results"))
    except ValueError as error:
        raise RequestError(f"`beside` {path} is not a result file of SAEBench: {error}") from error


def evaluation(content: Any, name: str) -> Evaluation:
    """Parse the content of a file; `name` is the fallback for the SAE's name. Raises ValueError if it is invalid."""
    if not isinstance(content, dict):
        raise ValueError("no object")
    eval_type = content.get("eval_type_id")
    if not isinstance(eval_type, str):
        raise ValueError("'eval_type_id' is no text")
    if eval_type not in TYPES:
        raise ValueError(f"the evaluation {eval_type[:LONGEST_NAME]!r} is not supported; supported: {', '.join(TYPES)}")
    config, cfg = _object(content, "eval_config"), _object(content, "sae_cfg_dict")
    cfg = {**cfg, **_object(cfg, "metadata")}  # SAE Lens 6 stores the SAE's model and hook here
    release, own_id = _text(content, "sae_lens_release_id"), _text(content, "sae_lens_id")
    categories = _object(content, "eval_result_metrics")
    if not categories:
        raise ValueError("'eval_result_metrics' is empty")
    metrics: dict[str, float] = {}
    for category in categories:
        metrics |= _numbers(_object(categories, category), category)
    commit = _text(content, "sae_bench_commit_hash")
    return Evaluation(
        eval_type=eval_type,
        sae="/".join(part for part in (release, own_id) if part) or printable(name),
        model=_text(config, "model_name") or _text(cfg, "model_name"),
        layer=_layer(cfg, own_id),
        metrics=metrics,
        tasks={} if eval_type == CORE else _tasks(content.get("eval_result_details")),
        is_ours=commit.startswith("delta-selectivity"),
    )


def _object(content: Json, name: str) -> Json:
    value = content.get(name)
    if not isinstance(value, dict | None):
        raise ValueError(f"'{name[:LONGEST_NAME]}' is no object")
    return value or {}


def _text(content: Json, name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"'{name}' is no text")
    return printable((value or "")[:LONGEST_NAME])


def _numbers(content: Json, where: str) -> dict[str, float]:
    """Return the computed numbers. Texts and lists are ignored; other values that are not numbers are rejected."""
    numbers: dict[str, float] = {}
    for name, value in content.items():
        if value is None or isinstance(value, str | list | dict) or value == NOT_COMPUTED:
            continue
        if not is_number(value):
            raise ValueError(f"{where[:LONGEST_NAME]}: '{name[:LONGEST_NAME]}' is no number")
        if _SHARE.fullmatch(name) and not -ROUNDING <= value <= 1 + ROUNDING:
            raise ValueError(f"{where[:LONGEST_NAME]}: '{name[:LONGEST_NAME]}' is not between 0 and 1")
        numbers[name] = float(value)
    return numbers


def _tasks(details: Any) -> dict[str, dict[str, float]]:
    if not isinstance(details, list | None):
        raise ValueError("'eval_result_details' is no list")
    tasks: dict[str, dict[str, float]] = {}
    for dataset in details or ():
        if not isinstance(dataset, dict) or not isinstance(dataset.get("dataset_name"), str):
            raise ValueError("an entry of 'eval_result_details' has no 'dataset_name'")
        name = printable(dataset["dataset_name"][:LONGEST_NAME].removesuffix("_results"))
        tasks[name] = _numbers(dataset, name)
    return tasks


def _layer(cfg: Json, own_id: str) -> int | None:
    """Return the layer from the SAE's config, or from its id."""
    layer = cfg.get("hook_layer")
    if isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < 10_000:
        return layer
    names = (own_id, cfg.get("hook_name"), cfg.get("hook_point"))
    matches = (_LAYER.search(name) for name in names if isinstance(name, str))
    return next((int(match[1]) for match in matches if match), None)
