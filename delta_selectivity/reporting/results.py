"""Load result files and iterate over their cells in one order.

load(result_files(Path("results")))
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.records import result_file
from delta_selectivity.reporting import groups
from delta_selectivity.reporting.groups import File, dataset_of, model_names

NAMED = ("model", "sae", "baseline", "data", "calibration")
"""Entries of `_run.key` that a line of results has the names of."""


def result_files(folder: Path) -> list[Path]:
    """Result files in the folder and one level below it (one folder per SAE), in order of name; a file is itself.

    Those of baselines follow.
    """
    if folder.is_file():
        return [folder]
    found = [sorted(folder.glob(pattern)) for pattern in ("*.json", "*/*.json", "baselines/*/*.json")]
    return [path for paths in (sorted(found[0] + found[1]), found[2]) for path in paths if path.name[0] != "."]


def load(paths: Iterable[Path]) -> list[File]:
    """The files, each checked. Raises `RequestError` if there is none, or one is no result file."""
    files = groups.without_repeats([(path, result_file.read(path)) for path in paths])
    if not files:
        raise RequestError("no result files found: run the program first, or name its `output`")
    return files


def cells(results: result_file.Json) -> Iterator[tuple[int, str, result_file.Json, result_file.Json]]:
    """(layer, probe, the layer's figures, the probe's result) in order of layers."""
    names = (name for name in results if name.startswith("layer_"))
    for name in sorted(names, key=lambda name: int(name.removeprefix("layer_"))):
        for probe, result in results[name].items():
            if isinstance(result, dict):
                yield int(name.removeprefix("layer_")), probe, results[name], result


def lines(files: Iterable[File]) -> list[dict[str, Any]]:
    """A flat row for each SAE, dataset, layer and probe: who, where, settings, the layer's and the probe's numbers."""
    rows = []
    files = list(files)
    models = model_names(files)
    for path, found in files:
        about, settings = about_file((path, found), models)
        for layer, probe, figures, result in cells(found):
            own = {name: value for name, value in figures.items() if not isinstance(value, dict)}
            where = {"path": path, **about, "layer": layer, "probe": probe}
            rows.append({**where, **settings, **own, **result})
    return rows


def about_file(file: File, models: Mapping[Any, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a line of results says of where it comes from: SAE and dataset; model and settings that change a number."""
    run = file[1]["_run"]
    settings = {name: value for name, value in groups.settings_of(file).items() if name not in NAMED}
    told = {name: groups.shown(name, v) if isinstance(v, list) else v for name, v in settings.items()}
    sae = {name: run["config"].get(name) for name in ("sae", "baseline")}
    return (
        {**sae, "dataset": dataset_of(file).removeprefix("wikidata_")},
        {
            "model": models[run["key"].get("model")],
            **{"probe_solver" if name == "probe" else name: value for name, value in told.items()},
        },
    )


def is_baseline(results: result_file.Json) -> bool:
    """Whether these results are no SAE's but something to compare it with."""
    return bool(results["_run"]["config"].get("baseline"))


def is_significant(result: result_file.Json) -> bool:
    """Whether delta_sel differs from 0 after Benjamini-Hochberg; not before the run is complete and has q values."""
    q_value = result.get("q_value")
    return q_value is not None and q_value < 0.05


def is_preserved(result: result_file.Json) -> bool:
    """Whether delta_sel was shown to be small."""
    return bool(result.get("preserved"))


def by_sae(files: Sequence[File]) -> dict[str, list[File]]:
    """The files of each SAE, by the name that its user typed; those of each baseline after them.

    What differs in more than the dataset is another SAE, and its name says in what.
    """
    found: dict[str, list[File]] = {}
    for path, results in sorted(files, key=lambda file: is_baseline(file[1])):
        found.setdefault(results["_run"]["config"]["sae"], []).append((path, results))
    return groups.split(found)


def label(name: str, files: Sequence[File]) -> str:
    """What to call the SAE or baseline of these files where there is little room."""
    return name if is_baseline(files[0][1]) else result_file.slug(files[0][1]["_run"]["config"]["sae"])


def level_of(files: Sequence[File]) -> result_file.Json:
    """What its files agree on about the SAE; empty if they were measured in runs that knew of different ones."""
    found = [results["_run"]["sae_level"] for _, results in files]
    return found[0] if all(level == found[0] for level in found) else {}


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
