"""Sweep files: several requests in a TOML file, all checked before the first one starts.

    output_directory = "results/sweep"         # holds a folder for each request
    page = "report.html"                       # optional: name of an HTML page in each of these folders
    [flags]                                    # flags of every request, without dashes
    folds = 5
    datasets = ["gender", "politics"]          # a list in [flags] is one value
    [[grid]]                                   # every combination of these values is a request
    model_name = "assets/tiny-pythia"
    sae_name = ["assets/tiny-pythia-saes-k8", "assets/tiny-pythia-saes-k32"]     # two values
    layers = ["0-2", "3-5"]                    # two values, so four requests
    seed = 0

Within a list of `[[grid]]`, a nested list is one value: `sae_name = [["a", "b"], "c"]` measures a and b in one request,
where they share a forward pass and are compared with each other, and c in another request. There may be several
`[[grid]]` tables. A request's folder is named after the flags in which the requests differ.

    sweep = Sweep.read(Path("sweep.toml"))
    sweep.requests                             # ({"folds": 5, ..., "output_directory": "results/sweep/..."}, ...)
"""

from __future__ import annotations

import itertools
import logging
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_selectivity.cli.command_line import known_flags
from delta_selectivity.errors import RequestError
from delta_selectivity.records.result_file import slug
from delta_selectivity.system.comma_lists import join_names
from delta_selectivity.system.terminal import show

log = logging.getLogger(__name__)

KEYS = ("output_directory", "page", "flags", "grid")
NOT_IN_REQUESTS = (
    "task",
    "list_datasets",
    "output_directory",
    "overwrite",
    "quiet",
    "verbose",
)  # not allowed in a request
MAX_VALUE = 40  # maximum characters of a value in a folder's name

Values = dict[str, Any]  # flag -> its value


@dataclass(frozen=True)
class Sweep:
    """A validated sweep file."""

    output_directory: Path
    page: str | None  # name of an HTML page in the folder of each request
    requests: tuple[Values, ...]  # values of each, by flag name

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a sweep file. Raises `RequestError` if it cannot be read or has unknown keys."""
        content = _load(path)
        _refuse_unknown(path, "", content, KEYS)
        folder, page = content.get("output_directory"), content.get("page")
        grids = content.get("grid", [])
        if not isinstance(folder, str) or not isinstance(page, str | None) or page == "":
            raise RequestError(f"{path}: output_directory must be a path, and page, if given, the name of a file")
        if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
            raise RequestError(f"{path}: it needs at least one [[grid]] of flags")
        flags = content.get("flags", {})
        if not isinstance(flags, dict):
            raise RequestError(f"{path}: flags must be a table: [flags]")
        known = flag_names()
        for where, table in (("flags", flags), *(("grid", grid) for grid in grids)):
            _refuse_unknown(path, f"{where}.", table, known)
        requests = [flags | combination for grid in grids for combination in _combinations(path, grid)]
        base = Path(folder).expanduser()
        folders = [{"output_directory": base / name} for name in _names(path, requests)]
        return cls(base, page, tuple(_values(path, one) | two for one, two in zip(requests, folders, strict=True)))

    def report_results(self, results: Sequence[Sequence[Path]], quiet: bool) -> None:
        """Print a summary of each request's result files, and write its page if requested."""
        from delta_selectivity.reporting import tables
        from delta_selectivity.reporting.results import load

        for request, paths in zip(self.requests, results, strict=True):
            folder, files = request["output_directory"], load(paths)
            if not quiet:
                show(f"\n## {folder.relative_to(self.output_directory)}\n\n{tables.overview(files)}")
            if self.page is not None:
                from delta_selectivity.reporting.output import write_page  # deferred: tables do not need matplotlib
                from delta_selectivity.reporting.study import study_of

                log.info("%s", write_page(study_of(files), folder / self.page))


def flag_names() -> tuple[str, ...]:
    """Return the flags of main.py that a request may set."""
    return tuple(name for name in known_flags() if name not in NOT_IN_REQUESTS)


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"--config {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"--config {path}: not a TOML file: {error}") from error


def _refuse_unknown(path: Path, where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in table:
        if name not in known:
            raise RequestError(f"{path}: unknown key {where}{name}: use {', '.join(known)}")


def _combinations(path: Path, grid: Values) -> list[Values]:
    """Return every combination of one value per flag."""
    choices = [value if isinstance(value, list) else [value] for value in grid.values()]
    if empty := [name for name, values in zip(grid, choices, strict=True) if not values]:
        raise RequestError(f"{path}: grid.{empty[0]} is an empty list: give it a value")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*choices)]


def _names(path: Path, requests: Sequence[Values]) -> list[str]:
    """Return a folder name for each request, from the flags in which they differ and their values."""
    flags = dict.fromkeys(name for request in requests for name in request)
    differ = [name for name in flags if any(request.get(name) != requests[0].get(name) for request in requests)]
    names = [
        "__".join(f"{name}_{_short(request[name])}" for name in differ if name in request) or "all"
        for request in requests
    ]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise RequestError(
            f"{path}: two requests would be written to {repeated[0]}: they are the same, or their names are too similar"
        )
    return names


def _short(value: Any) -> str:
    parts = value if isinstance(value, list) else str(value).split(",")
    return "_".join(slug(str(part)) for part in parts)[:MAX_VALUE]


def _values(path: Path, request: Values) -> Values:
    """Return the values for `make_request`, with lists joined by commas. Raises `RequestError` for other types."""
    values: Values = {}
    for name, value in request.items():
        if isinstance(value, list) and all(isinstance(part, str | int) for part in value):
            value = (join_names if name == "sae_name" else ",".join)(map(str, value))
        elif not isinstance(value, bool | str | int | float):
            raise RequestError(f"{path}: {name} = {value!r}: give a string, a number, true, false or a list of those")
        values[name] = "all" if name == "baselines" and value is True else value
    return values
