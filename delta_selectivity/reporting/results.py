"""Load result files and iterate over their cells in a fixed order.

load(result_files(Path("results")))
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import K_SPARSE
from delta_selectivity.records import result_file
from delta_selectivity.records.differences import shown
from delta_selectivity.records.figures import missing
from delta_selectivity.records.verdicts import verdict
from delta_selectivity.reporting import groups
from delta_selectivity.reporting.groups import File, dataset_of, model_names

NAMED = ("model", "sae", "baseline", "data", "calibration")
"""Entries of `_run.key` that are hashes, or that a line of results gives in another column."""
DOWNSTREAM = ("delta_ce", "ce_recovered", "kl_pos")
"""Downstream figures (of the model's output when it continues from x̂) that tables show."""


def result_files(folder: Path) -> list[Path]:
    """Return the result files in a folder and one level below it (one folder per SAE), sorted by name.

    Files of baselines come last. A path of a file is returned as it is. Raises `RequestError` if there are no files.
    """
    if folder.is_file():
        return [folder]
    paths = _files_in(folder)
    if not paths:
        raise RequestError(f"{folder}: {_no_results_message(folder)}")
    return paths


def _files_in(folder: Path) -> list[Path]:
    matches = [sorted(folder.glob(pattern)) for pattern in ("*.json", "*/*.json", "baselines/*/*.json")]
    return [path for paths in (sorted(matches[0] + matches[1]), matches[2]) for path in paths if path.name[0] != "."]


def _holds_results(folder: Path) -> bool:
    return any(result_file.read_key(path) is not None for path in _files_in(folder)[:3])


def _no_results_message(folder: Path) -> str:
    """Return the error message for a folder without result files."""
    if not folder.is_dir():
        return "there is no such folder: run the program first, or give the folder of its results"
    for pattern in ("[!.]*", "[!.]*/[!.]*"):
        below = [path for path in sorted(folder.glob(pattern)) if path.is_dir() and _holds_results(path)]
        if below:
            return f"no result files; there are some in {', '.join(map(str, below[:3]))}"
    return "no result files: run the program first, or give the folder of its results"


def load(paths: Iterable[Path]) -> list[File]:
    """Load and check the files; the SAEs of a run are in the order of its request.

    Raises `RequestError` if one is not a result file.
    """
    files, refused = load_all(paths)
    if refused:
        raise refused[0]
    return files


def load_all(paths: Iterable[Path]) -> tuple[list[File], list[RequestError]]:
    """Return the valid files, in the order of `load`, and the errors of the others."""
    files, refused = [], []
    for path in paths:
        try:
            files.append((path, _checked(path)))
        except RequestError as error:
            refused.append(error)
    kept = groups.without_repeats(files)
    return sorted(kept, key=lambda file: (is_baseline(file[1]), _request_position(file[1]))), refused


def _checked(path: Path) -> result_file.Json:
    content = result_file.read(path)
    problem = missing({name: value for name, value in content.items() if name != "_run"})
    if problem is not None:
        raise RequestError(f"{path} is not a result file of this program: {problem}")
    return content


def _request_position(results: result_file.Json) -> int:
    """Return the position of an SAE in its run's request; 0 if it was requested by a pattern."""
    config = results["_run"]["config"]
    names, sae = config.get("sae_names"), config["sae"]
    names_in_request = names if isinstance(names, list) else []
    return next(
        (i for i, name in enumerate(names_in_request) if str(name) == sae or str(name).startswith(f"{sae}=")), 0
    )


def cells(results: result_file.Json) -> Iterator[tuple[int, str, result_file.Json, result_file.Json]]:
    """Yield (layer, probe, the layer's figures, the probe's result), ordered by layer."""
    names = (name for name in results if name.startswith("layer_"))
    for name in sorted(names, key=lambda name: int(name.removeprefix("layer_"))):
        for probe, result in results[name].items():
            if isinstance(result, dict):
                yield int(name.removeprefix("layer_")), probe, results[name], result


def lines(files: Iterable[File]) -> list[dict[str, Any]]:
    """Return a flat row for each SAE, dataset, layer and probe: names, settings, numbers of layer and probe."""
    rows = []
    files = list(files)
    models = model_names(files)
    for path, content in files:
        about, settings = about_file((path, content), models)
        for layer, probe, figures, result in cells(content):
            layer_figures = {name: value for name, value in figures.items() if not isinstance(value, dict)}
            where = {"path": path, **about, "layer": layer, "probe": probe}
            rows.append({**where, **settings, **layer_figures, **result, "verdict": verdict(result)})
    return rows


def about_file(file: File, models: Mapping[Any, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the names of SAE and dataset, and the model and settings that affect the numbers, of a file."""
    run = file[1]["_run"]
    settings = {name: value for name, value in groups.settings_of(file).items() if name not in NAMED}
    setting_texts = {name: shown(name, v) if isinstance(v, list) else v for name, v in settings.items()}
    sae = {name: run["config"].get(name) for name in ("sae", "baseline")}
    return (
        {**sae, "dataset": dataset_of(file).removeprefix("wikidata_")},
        {
            "model": models[str(run["key"].get("model"))],
            "family": (run.get("task") or {}).get("family"),
            **{"probe_solver" if name == "probe" else name: value for name, value in setting_texts.items()},
        },
    )


def is_baseline(results: result_file.Json) -> bool:
    """Return whether these results are a baseline's."""
    return bool(results["_run"]["config"].get("baseline"))


def with_downstream(figures: result_file.Json, result: result_file.Json) -> result_file.Json:
    """Return a probe's record with the downstream figures of its layer, if there are any."""
    known = {name: figures.get(name) for name in DOWNSTREAM if not isinstance(figures.get(name), dict)}
    return {**{name: value for name, value in known.items() if name in figures}, **result}


def optional_figures(records: Iterable[result_file.Json]) -> list[str]:
    """Return the optional figures that any of these records (`with_downstream`) has."""
    known = {name for record in records for name in record}
    names = ("error_sel", "latent_sel", *(f"k{k}_sel" for k in K_SPARSE), *DOWNSTREAM)
    return [name for name in names if name in known]


def by_sae(files: Sequence[File]) -> dict[str, list[File]]:
    """Return the files of each SAE by its name in the request, followed by those of each baseline.

    Files that differ in more than the dataset count as different SAEs, named by the difference. Baselines of SAEs with
    equal names in two runs have those SAEs' full names.
    """
    configs = [results["_run"]["config"] for _, results in files]
    owners = {(config["sae"], config["baseline_of_sae"]) for config in configs if "baseline_of_sae" in config}
    shared = {name for name, n in Counter(name for name, _ in owners).items() if n > 1}
    files_by_name: dict[str, list[File]] = {}
    for path, results in sorted(files, key=lambda file: is_baseline(file[1])):
        config = results["_run"]["config"]
        made_from = config.get("baseline_of_sae")
        name = f"{config['sae']} ({made_from})" if made_from and config["sae"] in shared else config["sae"]
        files_by_name.setdefault(name, []).append((path, results))
    return groups.split(files_by_name)


def owner(results: result_file.Json) -> str | None:
    """Return the SAE (in older files, its label) or the hook point that a baseline belongs to."""
    config = results["_run"]["config"]
    owner_name: str | None = config.get("baseline_of_sae") or config.get("baseline_of")
    return owner_name


def label_in_run(name: str, files: Sequence[File]) -> str:
    """Return a short label of the SAE or baseline of these files: its name in the run."""
    if is_baseline(files[0][1]):
        return name
    label = files[0][1]["_run"]["config"].get("sae_label")
    return label if isinstance(label, str) and label else result_file.slug(files[0][1]["_run"]["config"]["sae"])


def level_of(files: Sequence[File]) -> result_file.Json:
    """Return the SAE-level numbers of the files; empty if the files disagree because they are from several runs."""
    levels = [results["_run"]["sae_level"] for _, results in files]
    return levels[0] if all(level == levels[0] for level in levels) else {}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
