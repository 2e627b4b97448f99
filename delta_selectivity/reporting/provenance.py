"""The page's section on the run: facts, warnings, settings."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from delta_selectivity.records import result_file
from delta_selectivity.reporting.groups import File, model_names
from delta_selectivity.reporting.html import Markup, element, table
from delta_selectivity.reporting.names import short_names
from delta_selectivity.reporting.study import Study
from delta_selectivity.system.terminal import printable

NAME = 40  # characters of the name of an SAE
MAX_WARNINGS = 12  # maximum number of warnings that are listed individually
NO_SETTINGS = {
    "sae", "sae_label", "baseline", "baseline_of", "baseline_of_sae", "model", "data", "schema", "output_directory",
    "quiet", "verbose", "overwrite", "d_sae",
}  # fmt: skip # of `_run.config` and `_run.key`: shown elsewhere, hashes, and options without effect on numbers


def heading(study: Study) -> str:
    """Return the subject of the report, in one line."""
    layers = {cell.layer for sae in study.saes_and_baselines for cell in sae.cells}
    n_probes = sum(map(len, study.datasets.values()))
    counts = [
        (len(study.saes), "SAE"),
        (len(study.baselines), "baseline"),
        (len(study.datasets), "dataset"),
        (n_probes, "probe"),
        (len(layers), "layer"),
    ]
    parts = [f"{n} {name}{'' if n == 1 else 's'}" for n, name in counts if n]
    return " · ".join([*map(printable, sorted(model_names(study.files).values())), *parts])


def facts(study: Study) -> Markup:
    """Return the most important settings for interpreting the numbers."""
    runs = [results["_run"] for _, results in study.files]
    pairs = {
        "Hook point": _distinct(run["key"].get("hookpoint") for run in runs),
        "Position": _distinct(run["config"].get("positions") for run in runs),
        "Cross-validation": _distinct(map(_folds, runs)),
        "Preserved within": _distinct(f"±{run['config'].get('epsilon')}" for run in runs),
        "Started": " to ".join(sorted({min(run["started"] for run in runs), max(run["started"] for run in runs)})),
        "Commit": _distinct((run.get("commit") or "none")[:12] for run in runs),
    }
    return _definitions(pairs)


def _folds(run: result_file.Json) -> str:
    config = run["config"]
    return f"{config.get('repeats')} partitions into {config.get('folds')} folds by group, seed {config.get('seed')}"


def notices(study: Study) -> list[Markup]:
    """Return notices about the numbers: incomplete runs, and the warnings of the runs."""
    elements = []
    if study.incomplete:
        text = (
            f"{len(study.incomplete)} of {len(study.files)} result files are incomplete. Layers may be missing. There "
            "are no q values yet, so no cell counts as lost. To complete the files, repeat the command of main.py."
        )
        elements.append(_notice("Incomplete", text, [_name(file) for file in study.incomplete]))
    by_warning: dict[str, list[str]] = defaultdict(list)
    for file in study.files:
        for warning in file[1]["_run"]["warnings"]:
            by_warning[printable(warning)].append(_name(file))
    if len(by_warning) > MAX_WARNINGS:
        return [*elements, _collapsed_warnings(by_warning)]
    return elements + [_notice("Warning", warning, names) for warning, names in by_warning.items()]


def _collapsed_warnings(by_warning: Mapping[str, Sequence[str]]) -> Markup:
    """Return many warnings in one collapsed element."""
    lines = (
        element("li", f"{warning} ({names[0] if len(names) == 1 else f'{len(names)} files'})")
        for warning, names in by_warning.items()
    )
    shown = element("details", element("summary", "show all"), element("ul", *lines))
    text = f"{len(by_warning)} different warnings"
    return element("div", element("p", element("b", "Warnings: "), text), shown, class_="notice warning")


def _notice(kind: str, text: str, names: list[str]) -> Markup:
    listed = element("ul", *(element("li", name) for name in names))
    files = element("details", element("summary", f"{len(names)} file{'' if len(names) == 1 else 's'}"), listed)
    return element("div", element("p", element("b", f"{kind}: "), text), files, class_=f"notice {kind.lower()}")


def settings(study: Study) -> Markup:
    """Return every setting; if files differ, each value with the number of files."""
    runs = [results["_run"] for _, results in study.files]
    settings_of_runs = [{**run["config"], **run["key"]} for run in runs]
    names = [
        name for name in dict.fromkeys(name for one in settings_of_runs for name in one) if name not in NO_SETTINGS
    ]
    pairs = {name: _distinct(_as_text(one[name]) for one in settings_of_runs if name in one) for name in names}
    return _definitions(pairs)


def versions(study: Study) -> Markup:
    """Return the versions of this package and its dependencies."""
    runs = [results["_run"] for _, results in study.files]
    packages = dict.fromkeys(name for run in runs for name in run.get("versions", {}))
    by_package = {
        name: _distinct(run.get("versions", {}).get(name) or "not installed" for run in runs) for name in packages
    }
    commits = _distinct(run.get("commit") or "none" for run in runs)
    return _definitions({**by_package, "commit": commits})


def file_table(study: Study) -> Markup:
    """Return a table with a line for each result file."""
    head = ("file", "SAE", "rows", "groups", "positive class", "started", "seconds", "complete")
    saes = [printable(results["_run"]["config"]["sae"]) for _, results in study.files]
    return table(head, map(_file_line, study.files, short_names(saes, NAME)))


def _file_line(file: File, sae: str) -> list[str]:
    run = file[1]["_run"]
    cells = [
        cell for layer in file[1].values() for cell in layer.values() if isinstance(cell, dict) and "n_rows" in cell
    ]
    seconds = run["seconds"].get("total")
    return [
        _name(file),
        sae,
        _count_range(cell["n_rows"] for cell in cells),
        _count_range(cell["n_people"] for cell in cells),
        _positive_classes(run.get("positive_class", {})),
        run["started"],
        "–" if seconds is None else f"{seconds:.1f}",
        "yes" if run["complete"] else "no",
    ]


def _positive_classes(classes: dict[str, str]) -> str:
    """Return the label that counts as 1; by probe if there are several, except for probes that are named after it."""
    labels = [
        label if len(classes) == 1 else f"{probe}: {label}"
        for probe, label in classes.items()
        if len(classes) == 1 or not probe.endswith(f"_is_{label}")
    ]
    return printable(", ".join(labels)) or "–"


def _count_range(counts: Iterable[int]) -> str:
    """Return one count, or the range from minimum to maximum."""
    known = sorted(set(counts))
    return " to ".join(dict.fromkeys(f"{count:,}" for count in (known[0], known[-1]))) if known else "–"


def _name(file: File) -> str:
    """Return the file's name with the SAE's folder; the rest of the path is omitted for privacy."""
    return printable("/".join(file[0].parts[-2:]))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)


def _distinct(values: Iterable[Any]) -> str:
    """Return the common value of all files, or each value with the number of files."""
    counts: dict[str, int] = defaultdict(int)
    for value in values:
        counts[printable(str(value))] += 1
    return next(iter(counts)) if len(counts) == 1 else "; ".join(f"{value} ({n} files)" for value, n in counts.items())


def _definitions(pairs: dict[str, str]) -> Markup:
    return element("dl", *(element("div", element("dt", k), element("dd", v)) for k, v in pairs.items()))
