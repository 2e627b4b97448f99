"""The rows of one cell: their outcomes, texts, and the probes' scores.

    rows = rows_of(find_cell(load(result_files(Path("results"))), "gender", 4, "k8"))
    rows.frame().head()                         # the rows with the largest losses first

Scores are averaged over the partitions. A row is `lost` if the model's probe is right and the SAE's probe is wrong,
`gained` in the opposite case, `both` if both are right, and `neither` if none is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.records import scores, texts
from delta_selectivity.reporting.groups import File, dataset_of
from delta_selectivity.reporting.results import by_sae, cells, label_in_run
from delta_selectivity.reporting.study import Sae
from delta_selectivity.reporting.subgroups import Grouping, Loss, groupings, losses, with_q_values

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]
OUTCOMES = ("lost", "gained", "both", "neither")
COLUMNS = ("text", "start", "end", "name", "person", "label", "outcome", "lost", "model", "sae", "transfer",
           "model_right", "sae_right")  # fmt: skip


class Place(NamedTuple):
    """Location of a cell: a result file, and the layer and probe in it."""

    file: File
    layer: int
    probe: str


@dataclass(frozen=True)
class CellRows:
    """All rows of a cell; arrays are [rows], in the order of the stored scores."""

    stored: ProbeScores  # source of everything else
    classes: tuple[str, str]  # names of label 0 and label 1
    model: Floats  # mean score of the model's probes on x; positive: label 1
    sae: Floats  # of the SAE's own probes, on x̂
    transfer: Floats | None  # of the model's probes on x̂
    model_right: Floats  # share of the partitions in which the probe is right
    sae_right: Floats
    kept: texts.KeptTexts | None  # the texts, if known
    places: NDArray[np.int64] | None  # index of each row in `kept.texts`

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Return the labels of the rows."""
        return self.stored.labels

    @property
    def persons(self) -> NDArray[np.int64]:
        """Return a number for each row's person."""
        return self.stored.persons

    @cached_property
    def lost(self) -> Floats:
        """Return how far the score moved towards the wrong class: positive if the SAE lost certainty."""
        return np.where(self.labels, 1.0, -1.0) * (self.model - self.sae)

    @cached_property
    def outcome(self) -> NDArray[np.int64]:
        """Return the index in `OUTCOMES` of each row."""
        model, sae = ((score > 0) == self.labels for score in (self.model, self.sae))
        return np.select([model & ~sae, ~model & sae, model & sae], [0, 1, 2], 3)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Return the order of the rows: lost rows first, then all others, both in descending order of loss."""
        return np.lexsort((-self.lost, self.outcome != 0))

    def text(self, row: int) -> texts.Text | None:
        """Return the text of a row."""
        return None if self.kept is None or self.places is None else self.kept.texts[self.places[row]]

    @cached_property
    def groupings(self) -> list[Grouping]:
        """Return the groupings of people that apply to the rows."""
        return groupings(self.stored, self.kept, self.places)

    @cached_property
    def losses(self) -> dict[tuple[str, str], Loss]:
        """Return the loss of each group with enough people, by grouping and group; q over all groups of the cell."""
        return {(loss.by, loss.group): loss for loss in with_q_values(losses(self.stored, self.groupings))}

    def counts(self) -> list[tuple[str, list[tuple[str, list[int]]]]]:
        """Return (name of the grouping, [(group, rows of each of `OUTCOMES`)])."""
        named = [("class", [(self.classes[i], self._count(self.labels == bool(i))) for i in (0, 1)])]
        for by in self.groupings:
            counted = [(name, self._count(by.group == place)) for place, name in enumerate(by.names)]
            named.append((by.by, [(name, count) for name, count in counted if sum(count)]))
        return named

    def histogram(self, n_bins: int = 24) -> tuple[float, list[list[list[int]]]]:
        """Return the upper end of a symmetric scale, and the rows per bin: [class][model or SAE][bin].

        The scale covers 99 % of the scores; the outermost bins include the others.
        """
        end = float(np.quantile(np.abs(np.concatenate([self.model, self.sae])), 0.99)) or 1.0
        edges = np.linspace(-end, end, n_bins + 1)

        def count(score: Floats, label: int) -> list[int]:
            return np.histogram(np.clip(score, -end, end)[self.labels == bool(label)], edges)[0].tolist()

        return end, [[count(score, label) for score in (self.model, self.sae)] for label in (0, 1)]

    def lines(self) -> Iterator[tuple[Any, ...]]:
        """Yield the values of `COLUMNS`, row by row in `order`."""
        for row in self.order:
            text = self.text(row)
            about = (None,) * 4 if text is None else (text.text, text.start, text.end, text.name)
            yield (
                *about, str(self.persons[row]) if text is None else text.person, self.classes[int(self.labels[row])],
                OUTCOMES[self.outcome[row]], float(self.lost[row]), float(self.model[row]), float(self.sae[row]),
                None if self.transfer is None else float(self.transfer[row]), float(self.model_right[row]),
                float(self.sae_right[row]),
            )  # fmt: skip

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a data frame with `COLUMNS`."""
        import pandas

        return pandas.DataFrame(list(self.lines()), columns=list(COLUMNS))

    def _count(self, chosen: NDArray[np.bool_]) -> list[int]:
        return np.bincount(self.outcome[chosen], minlength=len(OUTCOMES)).tolist()


def rows_of(place: Place, fetch: bool = True) -> CellRows:
    """Return the rows of a cell, from its stored scores and texts.

    Args:
        place: Location of the cell.
        fetch: Whether to download task data to look up texts that were not stored.

    Raises:
        RequestError: The scores are missing or from another run.
    """
    (path, content), layer, probe = place
    where = scores.path_of(path, layer)
    if not where.is_file():
        raise RequestError(
            f"{path}: the stored scores of layer {layer} are missing ({where.parent.name}/{where.name}); rows are "
            "computed from them: measure the layer again"
        )
    stored = _load_scores(where, where.stat().st_mtime_ns)
    if stored.key != scores.key_digest(content["_run"]["key"]):
        raise RequestError(f"{where} holds the scores of another run: measure the layer again")
    if probe not in stored.probes:
        reason = content[f"layer_{layer}"][probe].get("reason") or "its scores were not stored"
        raise RequestError(f"{path}: {probe} has no rows in layer {layer}: {reason}")
    stored_probe = stored.probes[probe]
    kept = texts_of(place.file, fetch)
    places = None if kept is None else kept.rows.get(probe)
    if places is not None and len(places) != len(stored_probe.labels):
        kept = places = None
    views = {name: view.astype(np.float64) for name, view in stored_probe.views.items()}
    right = {name: ((view > 0) == stored_probe.labels).mean(axis=0) for name, view in views.items()}
    positive = content["_run"].get("positive_class", {}).get(probe, "1")
    return CellRows(
        stored_probe, (f"not {positive}", positive), views["model"].mean(axis=0), views["sae"].mean(axis=0),
        views["transfer"].mean(axis=0) if "transfer" in views else None, right["model"], right["sae"], kept, places,
    )  # fmt: skip


class RowsReader:
    """Reader that returns the rows of cells and reads each cell once."""

    def __init__(self, fetch: bool = True) -> None:
        self._fetch = fetch
        self._rows: dict[tuple[Path, int, str], CellRows] = {}

    def __call__(self, place: Place) -> CellRows:
        """Return the rows of a cell. Raises `RequestError` as `rows_of` does."""
        key = (place.file[0], place.layer, place.probe)
        if key not in self._rows:
            self._rows[key] = rows_of(place, self._fetch)
        return self._rows[key]


def places(sae: Sae) -> list[Place]:
    """Return the location of each cell of an SAE, in the order of its cells."""
    return [Place(file, layer, probe) for file in sae.files for layer, probe, *_ in cells(file[1])]


def find_cell(files: Sequence[File], probe: str, layer: int | None = None, sae: str | None = None) -> Place:
    """Return the requested cell; layer and SAE may be omitted if there is only one.

    Args:
        files: Result files to search.
        probe: Name of the probe, or ``dataset/probe``.
        layer: Its layer.
        sae: Name of the SAE, or a unique suffix or part of it.

    Raises:
        RequestError: There is no such cell, or several.
    """
    named = by_sae(files)
    files_of_sae = named[find_sae(named, sae)]
    places = [
        Place(file, where, name)
        for file in files_of_sae
        for where, name, *_ in cells(file[1])
        if probe in (name, f"{dataset_of(file)}/{name}", f"{dataset_of(file).removeprefix('wikidata_')}/{name}")
    ]
    if not places:
        known = dict.fromkeys(name for file in files_of_sae for _, name, *_ in cells(file[1]))
        raise RequestError(f"`rows` {probe}: there is no such probe; there are {', '.join(known)}")
    datasets = dict.fromkeys(dataset_of(place.file) for place in places)
    if len(datasets) > 1:
        choices = ", ".join(f"{dataset}/{probe}" for dataset in datasets)
        raise RequestError(f"`rows` {probe}: several datasets have this probe: name one of {choices}")
    layers = [place.layer for place in places]
    if layer is None and len(layers) > 1:
        raise RequestError(f"`layer` is missing: {probe} has {_layer_names(layers)}")
    if layer is not None and layer not in layers:
        raise RequestError(f"`layer` {layer}: {probe} has {_layer_names(layers)}")
    return next(place for place in places if layer in (None, place.layer))


def find_sae(named: dict[str, list[File]], query: str | None, field: str = "sae") -> str:
    """Return the full name of an SAE given in full, by its name in the run, or by a unique suffix or part."""
    labels = {name: label_in_run(name, files) for name, files in named.items()}
    if query is None and len(named) == 1:
        return next(iter(named))
    rules = (
        lambda name: query in (name, labels[name]),
        lambda name: f"{labels[name]}".endswith(str(query)),
        lambda name: str(query) in labels[name],
    )
    for rule in rules if query else ():
        matches = [name for name in named if rule(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RequestError(f"`{field}` {query!r} matches several SAEs: {', '.join(matches)}")
    missing = "is missing: name one of" if query is None else f"there is no SAE {query!r}; there are"
    raise RequestError(f"`{field}`{' ' if query is None else ': '}{missing} {', '.join(named)}")


def texts_of(file: File, fetch: bool = True) -> texts.KeptTexts | None:
    """Return the texts of a result file: the stored ones, or those of a public task's data; None if neither exists."""
    path, content = file
    data = content["_run"]["key"].get("data")
    where = texts.path_of(path)
    try:
        kept = _load_texts(where, where.stat().st_mtime_ns)
        if kept.data == data:
            return kept
    except (OSError, RequestError):
        pass
    config = content["_run"]["config"]
    name = dataset_of(file).removeprefix("wikidata_")
    if name not in (config.get("datasets") or ()) or config.get("positions") == "all":
        return None
    drawn = (config.get("shuffle_select_n"), config.get("seed"))
    if not all(isinstance(value, int | None) for value in drawn):
        return None
    known = _load_public_texts(name, config.get("data_dir"), drawn[0], drawn[1] or 0, fetch)
    return known if known is not None and known.data == data else None


@lru_cache(maxsize=8)
def _load_public_texts(
    name: str, data_dir: str | None, n: int | None, seed: int, fetch: bool
) -> texts.KeptTexts | None:
    from delta_selectivity.tasks import load_probe_texts, name_task  # here, because tasks import torch
    from delta_selectivity.tasks.data_wheel import is_local

    if data_dir is None and not fetch and not is_local():
        return None
    try:
        loaded = load_probe_texts([name_task(name, data_dir=data_dir)], shuffle_select_n=n, seed=seed)
    except RequestError:
        return None
    (dataset,) = loaded.datasets
    return texts.of_dataset(loaded, dataset, rows_of=np.ones_like)


@lru_cache(maxsize=4)
def _load_scores(path: Path, _changed: int) -> scores.LayerScores:
    return scores.load(path)


@lru_cache(maxsize=8)
def _load_texts(path: Path, _changed: int) -> texts.KeptTexts:
    return texts.load(path)


def _layer_names(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
