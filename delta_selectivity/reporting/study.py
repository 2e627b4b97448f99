"""SAEs and baselines of several result files, with their cells.

study = study_of(load(result_files(Path("results"))))
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from delta_selectivity.records import result_file, verdicts
from delta_selectivity.records.saebench import Evaluation
from delta_selectivity.reporting.groups import File, dataset_of, model_names, stored_cells, why_incomparable
from delta_selectivity.reporting.results import (
    by_sae,
    cells,
    is_baseline,
    label_in_run,
    level_of,
    mean,
    owner,
    with_downstream,
)
from delta_selectivity.system.terminal import printable

MAX_DATASETS = 12  # a report with more datasets groups them by family and shows only the largest losses in full
MAX_PANELS = 24  # maximum number of probes with a panel by layer, in such a report
OTHERS = "other tasks"  # name of the tasks without a family


@dataclass(frozen=True)
class Cell:
    """One probe at one layer of one dataset."""

    dataset: str  # name in the report
    layer: int
    probe: str
    figures: result_file.Json  # of the layer: mse_pos, fvu_pos, l0, ...
    result: result_file.Json  # of the probe: model_sel, sae_sel, delta_sel, ...; or only a `reason`
    family: str = OTHERS  # of its dataset

    @property
    def measured(self) -> bool:
        """Return whether the cell has numbers."""
        return not self.result.get("reason")

    @property
    def record(self) -> result_file.Json:
        """Return the probe's result, with the downstream figures of its layer."""
        return with_downstream(self.figures, self.result)

    @cached_property
    def verdict(self) -> str:
        """Return the verdict, one of the words of `records.verdicts`."""
        return verdicts.verdict(self.result)


@dataclass(frozen=True)
class Sae:
    """An SAE, or a baseline that is measured like one."""

    name: str  # as typed
    label: str  # shorter, and unique
    run_label: str  # label in its run
    is_baseline: bool
    kind: str | None  # of a baseline: identity, random, ...
    owner: str | None  # of a baseline that belongs to an SAE: that SAE's name, or its label in older files
    level: result_file.Json  # `_run.sae_level`, or recomputed from the stored scores if its files disagree
    cells: tuple[Cell, ...]  # ordered by dataset and layer
    files: tuple[File, ...]

    @cached_property
    def measured(self) -> list[Cell]:
        """Return the cells that have numbers."""
        return [cell for cell in self.cells if cell.measured]

    def count(self, verdict: str) -> int:
        """Return how many cells have this verdict."""
        return sum(cell.verdict == verdict for cell in self.cells)

    def mean(self, key: str) -> float | None:
        """Return a score's mean over the cells."""
        return mean(cell.result[key] for cell in self.measured)

    def overall(self, score: str) -> tuple[float | None, float | None, float | None]:
        """Return the mean of delta_sel or transfer_r2 and its 95 % interval, as measured by the run with all cells.

        If the files do not agree on an interval, it is the mean over the loaded cells, without an interval.
        """
        if self.level.get(score) is None:
            return self.mean(score), None, None
        return self.level[score], self.level[f"{score}_ci_low"], self.level[f"{score}_ci_high"]

    def rank_key(self) -> tuple[float, float]:
        """Return the key that ranks SAEs: mean transfer_r2, or mean delta_sel if that was not measured."""
        survives, delta = (self.overall(score)[0] for score in ("transfer_r2", "delta_sel"))
        return (float("-inf") if survives is None else survives, delta or 0.0)

    def mean_figure(self, key: str) -> float | None:
        """Return the mean of a reconstruction figure, with layers weighted by their number of probes."""
        return mean(cell.figures.get(key) for cell in self.measured)

    def belongs_to(self, sae: Sae) -> bool:
        """Return whether this is a baseline of that SAE."""
        name_in_request = sae.files[0][1]["_run"]["config"]["sae"]
        return (
            self.owner is not None
            and self.owner in (name_in_request, sae.run_label)
            and not why_incomparable(self.files, sae.files)
        )

    def where(self, dataset: str, probe: str) -> dict[int, Cell]:
        """Return the measured cells of one probe by layer."""
        return {cell.layer: cell for cell in self.measured if (cell.dataset, cell.probe) == (dataset, probe)}


@dataclass(frozen=True)
class Comparison:
    """Two SAEs paired by row, fold and person."""

    one: Sae
    other: Sae
    figures: result_file.Json  # one's transfer_r2 - the other's, with interval and test; the same for delta_sel


@dataclass(frozen=True)
class Study:
    """The SAEs and baselines of one report."""

    files: tuple[File, ...]
    saes: tuple[Sae, ...]
    baselines: tuple[Sae, ...]
    beside: tuple[Evaluation, ...] = ()  # from SAEBench

    @property
    def saes_and_baselines(self) -> tuple[Sae, ...]:
        """Return the SAEs, then the baselines."""
        return self.saes + self.baselines

    def baselines_of(self, group: Sequence[Sae]) -> list[Sae]:
        """Return the baselines of these SAEs, and those that belong to no SAE; empty if there are no SAEs."""
        others = [sae for sae in self.saes if sae not in group]
        of_others = [b for b in self.baselines if any(b.belongs_to(sae) for sae in others)]
        return [baseline for baseline in self.baselines if baseline not in of_others] if self.saes else []

    @property
    def shown_in_full(self) -> tuple[Sae, ...]:
        """Return what is shown cell by cell: the SAEs, or the baselines if there are no SAEs."""
        return self.saes or self.baselines

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Return the number of each cell by its `id`: its line in the table of cells, and its number in the page."""
        cells = (cell for sae in self.saes_and_baselines for cell in sae.cells)
        return {id(cell): number for number, cell in enumerate(cells)}

    @cached_property
    def datasets(self) -> dict[str, list[str]]:
        """Return the probes of each dataset, in the order of the files."""
        probes_of: dict[str, dict[str, None]] = {}
        for sae in self.saes_and_baselines:
            for cell in sae.cells:
                probes_of.setdefault(cell.dataset, {})[cell.probe] = None
        return {dataset: list(probes) for dataset, probes in probes_of.items()}

    @property
    def has_many_datasets(self) -> bool:
        """Return whether there are too many datasets to show each in full."""
        return len(self.datasets) > MAX_DATASETS

    @cached_property
    def losses(self) -> dict[tuple[str, str], float]:
        """Return the mean delta_sel over SAEs and layers by dataset and probe, the largest loss first."""
        deltas: dict[tuple[str, str], list[float]] = {}
        for cell in (cell for sae in self.shown_in_full for cell in sae.measured):
            deltas.setdefault((cell.dataset, cell.probe), []).append(cell.result["delta_sel"])
        means = {place: statistics.fmean(values) for place, values in deltas.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """Return the datasets of each family, both in descending order of loss; unmeasured ones come last."""
        family = {cell.dataset: cell.family for sae in self.saes_and_baselines for cell in sae.cells}
        worst = dict.fromkeys([*(dataset for dataset, _ in self.losses), *self.datasets])
        losses_of: dict[str, list[float]] = {name: [] for name in family.values()}
        for (dataset, _), loss in self.losses.items():
            losses_of[family[dataset]].append(loss)
        order = sorted(losses_of, key=lambda name: statistics.fmean(losses_of[name]) if losses_of[name] else math.inf)
        return {name: [dataset for dataset in worst if family[dataset] == name] for name in order}

    @cached_property
    def panel_probes(self) -> list[tuple[str, str]]:
        """Return (dataset, probe) for the panels by layer: all, in the order of the files, or the largest losses."""
        if self.has_many_datasets:
            return list(self.losses)[:MAX_PANELS]
        return [(dataset, probe) for dataset, probes in self.datasets.items() for probe in probes]

    @property
    def incomplete(self) -> list[File]:
        """Return the files of incomplete runs."""
        return [file for file in self.files if not file[1]["_run"]["complete"]]

    @cached_property
    def neighbours(self) -> list[Comparison]:
        """Return the comparisons of neighbouring SAEs, then of each baseline and its SAE.

        SAEs are in descending order of `rank_key`, within each set of comparable SAEs.
        """
        pairs = [pair for group in self.comparable for pair in itertools.pairwise(group)]
        pairs += [(baseline, sae) for baseline in self.baselines for sae in self.saes if baseline.belongs_to(sae)]
        return [comparison for pair in pairs if isinstance(comparison := self._pair(*pair), Comparison)]

    @cached_property
    def not_compared(self) -> list[str]:
        """Return one line for each comparison that is impossible, with the reason."""
        groups = self.comparable
        lines = []
        for one, other in itertools.pairwise(groups):
            names = [", ".join(sae.label for sae in group) for group in (one, other)]
            lines.append(f"{names[0]} not compared with {names[1]}: {why_incomparable(one[0].files, other[0].files)}")
        for pair in (pair for group in groups for pair in itertools.pairwise(group)):
            if isinstance(reason := self._pair(*pair), str):
                lines.append(f"{pair[0].label} not compared with {pair[1].label}: {reason}")
        return lines

    @cached_property
    def comparable(self) -> list[list[Sae]]:
        """Return the sets of SAEs that are comparable with each other, each in descending order of `rank_key`."""
        groups: list[list[Sae]] = []
        known = [sae for sae in self.saes if sae.overall("delta_sel")[0] is not None]
        for sae in sorted(known, key=Sae.rank_key, reverse=True):
            group = next((group for group in groups if not why_incomparable(group[0].files, sae.files)), None)
            if group is None:
                groups.append([sae])
            else:
                group.append(sae)
        return groups

    @cached_property
    def _cells_of(self) -> Any:
        by_name = {sae.name: sae for sae in self.saes_and_baselines}
        return lru_cache(maxsize=16)(lambda name: stored_cells(by_name[name].files))

    @cached_property
    def _pairs(self) -> dict[tuple[str, str], Comparison | str]:
        return {}

    def _pair(self, one: Sae, other: Sae) -> Comparison | str:
        """Return the comparison of two SAEs, from their run or the stored scores; or why they cannot be compared."""
        names = one.name, other.name
        if names not in self._pairs:
            self._pairs[names] = self._compare(one, other)
        return self._pairs[names]

    def _compare(self, one: Sae, other: Sae) -> Comparison | str:
        if reason := why_incomparable(one.files, other.files):
            return reason
        name_in_request = other.files[0][1]["_run"]["config"]["sae"]
        figures = one.level.get("compared", {}).get(name_in_request)
        if not figures or figures["delta_sel"] is None:
            if not all(file[1]["_run"]["complete"] for file in (*one.files, *other.files)):
                return "a run is incomplete"
            for sae in (one, other):
                if self._cells_of(sae.name) is None:
                    return f"the stored scores of {sae.label} are missing or from another run"
            from delta_selectivity.records.sae_level import compare  # here: imports scipy, seldom needed

            figures = compare(self._cells_of(one.name), self._cells_of(other.name), tasks_of(one.files))
        if figures["delta_sel"] is None:
            return "no dataset, layer and probe in common with the same rows and folds"
        return Comparison(one, other, figures)

    def comparison(self, name: str, other: str) -> Comparison | None:
        """Return the comparison of the two SAEs with these names, if they can be compared."""
        by_name = {sae.name: sae for sae in self.saes_and_baselines}
        comparison = self._pair(by_name[name], by_name[other]) if name != other else None
        return comparison if isinstance(comparison, Comparison) else None


def study_of(files: Sequence[File], beside: Sequence[Evaluation] = ()) -> Study:
    """Return the SAEs and baselines of the files. Names are made printable here, for all pages and plots."""
    own_files = by_sae(files)
    labels = _labels(own_files)
    of = _dataset_namer(files)
    saes = [_sae(name, files_of_sae, labels[name], of) for name, files_of_sae in own_files.items()]
    return Study(
        tuple(files),
        tuple(sae for sae in saes if not sae.is_baseline),
        tuple(sae for sae in saes if sae.is_baseline),
        tuple(beside),
    )


def _sae(name: str, files: Sequence[File], label: str, dataset_of: Callable[[File], str]) -> Sae:
    config = files[0][1]["_run"]["config"]
    cells_of_sae = tuple(
        Cell(dataset_of(file), layer, printable(probe), figures, result, _family(file))
        for file in files
        for layer, probe, figures, result in cells(file[1])
    )
    baseline = is_baseline(files[0][1])
    kind, run_label, made_from = config.get("baseline"), label_in_run(name, files), owner(files[0][1])
    return Sae(name, label, run_label, baseline, kind, made_from, _level(files), cells_of_sae, tuple(files))


def _family(file: File) -> str:
    return printable((file[1]["_run"].get("task") or {}).get("family") or OTHERS)


def _level(files: Sequence[File]) -> result_file.Json:
    """Return the SAE's means if its files agree, or recompute them from the stored scores of several runs."""
    level = level_of(files)
    if level or not all(results["_run"]["complete"] for _, results in files):
        return level
    from delta_selectivity.records.sae_level import summarise  # here: imports scipy

    return summarise(stored_cells(files), tasks_of(files))


def tasks_of(files: Sequence[File]) -> Any:
    """Return the task information of each dataset for `records.sae_level`."""
    from delta_selectivity.records.task_level import task_of  # here: imports scipy

    return {dataset_of(file): task_of(file[1]["_run"], dataset_of(file)) for file in files}


def _labels(own_files: dict[str, list[File]]) -> dict[str, str]:
    short = {name: label_in_run(name, files_of_sae) for name, files_of_sae in own_files.items()}
    seen = Counter(short.values())
    return {name: printable(text if seen[text] == 1 else name) for name, text in short.items()}


def _dataset_namer(files: Sequence[File]) -> Callable[[File], str]:
    """Return a function that names a file's dataset: without the model, unless several models were measured."""
    models = model_names(files)

    def name_of(file: File) -> str:
        model = result_file.model_slug(models[str(file[1]["_run"]["key"].get("model"))])
        return printable(f"{dataset_of(file)} ({model})" if len(models) > 1 else dataset_of(file))

    return name_of
