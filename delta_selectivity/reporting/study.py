"""SAEs and baselines of several result files, each with its cells.

study = study_of(load(result_files(Path("results"))))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from delta_selectivity.records import result_file
from delta_selectivity.reporting.results import (
    File,
    by_sae,
    cells,
    is_baseline,
    is_preserved,
    is_significant,
    label_in_run,
    level_of,
    mean,
    owner,
    pairs,
)
from delta_selectivity.system.terminal import printable


@dataclass(frozen=True)
class Cell:
    """One probe at one layer of one dataset."""

    dataset: str  # what the report calls it
    layer: int
    probe: str
    figures: result_file.Json  # of the layer: mse_pos, fvu_pos, l0, ...
    result: result_file.Json  # of the probe: model_sel, sae_sel, delta_sel, ...; or only a `reason`

    @property
    def measured(self) -> bool:
        """Whether it has numbers."""
        return not self.result.get("reason")

    @property
    def verdict(self) -> str:
        """What the data show of delta_sel, in one or two words."""
        if not self.measured:
            return "not measured"
        if is_significant(self.result):
            size = "small " if is_preserved(self.result) else ""
            return f"{size}{'loss' if self.result['delta_sel'] < 0 else 'gain'}"
        return "preserved" if is_preserved(self.result) else "undecided"


@dataclass(frozen=True)
class Sae:
    """An SAE, or a baseline that is measured like one."""

    name: str  # as its user typed it
    label: str  # shorter, and no other's
    own_label: str  # what its run called it
    is_baseline: bool
    kind: str | None  # of a baseline: identity, random, ...
    owner: str | None  # of a baseline that belongs to an SAE: that one's name, or in older files its label
    level: result_file.Json  # `_run.sae_level`; empty if its files disagree
    cells: tuple[Cell, ...]  # in order of dataset and layer

    @cached_property
    def measured(self) -> list[Cell]:
        """The cells that have numbers."""
        return [cell for cell in self.cells if cell.measured]

    @property
    def n_lost(self) -> int:
        """Cells with a significant loss."""
        return sum(is_significant(cell.result) and cell.result["delta_sel"] < 0 for cell in self.measured)

    @property
    def n_preserved(self) -> int:
        """Cells shown to be preserved."""
        return sum(is_preserved(cell.result) for cell in self.measured)

    def mean(self, key: str) -> float | None:
        """A score's mean over the cells."""
        return mean(cell.result[key] for cell in self.measured)

    def overall(self, score: str) -> tuple[float | None, float | None, float | None]:
        """The mean of delta_sel or transfer_r2 and its 95 % interval, as the run that knew all cells measured it.

        Without an interval where the files do not agree on one: the mean over the cells that are here.
        """
        if self.level.get(score) is None:
            return self.mean(score), None, None
        return self.level[score], self.level[f"{score}_ci_low"], self.level[f"{score}_ci_high"]

    def mean_figure(self, key: str) -> float | None:
        """The same of a figure of reconstruction: each layer weighs as much as it has probes."""
        return mean(cell.figures[key] for cell in self.measured)

    def belongs_to(self, sae: Sae) -> bool:
        """Whether this is a baseline of that SAE."""
        return self.owner is not None and self.owner in (sae.name, sae.own_label)

    def where(self, dataset: str, probe: str) -> dict[int, Cell]:
        """By layer, the measured cells of one probe."""
        return {cell.layer: cell for cell in self.measured if (cell.dataset, cell.probe) == (dataset, probe)}


@dataclass(frozen=True)
class Comparison:
    """Two of one run, paired by row, fold and person."""

    one: Sae
    other: Sae
    found: result_file.Json  # one's delta_sel - the other's, its interval and test; likewise transfer_r2


@dataclass(frozen=True)
class Study:
    """Everything that one report is about."""

    files: tuple[File, ...]
    saes: tuple[Sae, ...]
    baselines: tuple[Sae, ...]

    @property
    def everything(self) -> tuple[Sae, ...]:
        """SAEs, then baselines."""
        return self.saes + self.baselines

    def drawn_with(self, group: Sequence[Sae]) -> list[Sae]:
        """The baselines to compare these SAEs with: their own, and those that are no SAE's. None without SAEs."""
        others = [sae for sae in self.saes if sae not in group]
        foreign = [b for b in self.baselines if any(b.belongs_to(sae) for sae in others)]
        return [baseline for baseline in self.baselines if baseline not in foreign] if self.saes else []

    @property
    def in_full(self) -> tuple[Sae, ...]:
        """What is shown cell by cell: the SAEs; the baselines if there is nothing else."""
        return self.saes or self.baselines

    @cached_property
    def datasets(self) -> dict[str, list[str]]:
        """The probes of each dataset, in the order of the files."""
        found: dict[str, dict[str, None]] = {}
        for sae in self.everything:
            for cell in sae.cells:
                found.setdefault(cell.dataset, {})[cell.probe] = None
        return {dataset: list(probes) for dataset, probes in found.items()}

    @property
    def incomplete(self) -> list[File]:
        """Files of runs that have not ended."""
        return [file for file in self.files if not file[1]["_run"]["complete"]]

    @cached_property
    def neighbours(self) -> list[Comparison]:
        """From the best mean delta_sel to the worst, each SAE and the next; then each baseline and its SAE."""
        known = {name: own for name, own in by_sae(self.files).items() if level_of(own).get("delta_sel") is not None}
        return [found for pair in pairs(known) if (found := self.comparison(*pair))]

    def comparison(self, name: str, other: str) -> Comparison | None:
        """The two of these names, if they were run together and their scores were there to compare."""
        by_name = {sae.name: sae for sae in self.everything}
        found = by_name[name].level.get("compared", {}).get(other)
        return Comparison(by_name[name], by_name[other], found) if found and found["delta_sel"] is not None else None


def study_of(files: Sequence[File]) -> Study:
    """The files, sorted into SAEs and baselines. Names are made printable here, once for every page and plot."""
    own_files = by_sae(files)
    labels = _labels(own_files)
    of = _namer(files)
    found = [_sae(name, own, labels[name], of) for name, own in own_files.items()]
    return Study(
        tuple(files),
        tuple(sae for sae in found if not sae.is_baseline),
        tuple(sae for sae in found if sae.is_baseline),
    )


def _sae(name: str, files: Sequence[File], label: str, dataset_of: Callable[[File], str]) -> Sae:
    config = files[0][1]["_run"]["config"]
    found = tuple(
        Cell(dataset_of(file), layer, printable(probe), figures, result)
        for file in files
        for layer, probe, figures, result in cells(file[1])
    )
    baseline = is_baseline(files[0][1])
    called = label_in_run(name, files)
    return Sae(name, label, called, baseline, config.get("baseline"), owner(files[0][1]), level_of(files), found)


def _labels(own_files: dict[str, list[File]]) -> dict[str, str]:
    short = {name: label_in_run(name, own) for name, own in own_files.items()}
    seen = Counter(short.values())
    return {name: printable(text if seen[text] == 1 else name) for name, text in short.items()}


def _namer(files: Sequence[File]) -> Callable[[File], str]:
    """What to call the dataset of a file: its name without the model's, unless several models were measured."""
    several = len(set(models(files))) > 1

    def dataset_of(file: File) -> str:
        model = result_file.slug(str(file[1]["_run"]["config"].get("model_name", "")))
        dataset = file[0].stem.removeprefix(f"{model}_")
        return printable(f"{dataset} ({model})" if several else dataset)

    return dataset_of


def models(files: Sequence[File]) -> Iterator[str]:
    """The model of each file."""
    return (str(results["_run"]["config"].get("model_name", "")) for _, results in files)
