"""The class `Results`: a table of the results of runs."""

from __future__ import annotations

import os
import shutil
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from delta_selectivity.api.arguments import as_path, renaming_fields
from delta_selectivity.api.latents import latents_of
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.probing.uncertainty import Estimate
from delta_selectivity.records import sae_level
from delta_selectivity.records.scores import folder_of
from delta_selectivity.reporting import results as table
from delta_selectivity.reporting.groups import File, stored_cells, why_incomparable
from delta_selectivity.reporting.latent_tables import COLUMNS, latent_lines
from delta_selectivity.reporting.people_table import read_people
from delta_selectivity.reporting.rows import find_cell, find_sae, rows_of
from delta_selectivity.reporting.subgroup_lines import COLUMNS as SUBGROUP_COLUMNS
from delta_selectivity.reporting.subgroup_lines import MEAN_COLUMNS, mean_subgroup_lines, subgroup_lines
from delta_selectivity.system.whole_file import replacing

if TYPE_CHECKING:
    import pandas

    from delta_selectivity.api.hub import Push


@dataclass(frozen=True)
class Difference:
    """Difference of two SAEs, paired by row, fold and person, over the cells that both have.

    Each `Estimate` has ``value`` (the first SAE's minus the second's), ``low`` and ``high`` (95 % interval),
    ``p_value`` and ``detectable`` (the smallest difference that would be found with 80 % power).
    """

    a: str
    b: str
    n_cells: int  # cells are (task, layer, probe)
    delta_sel: Estimate
    transfer_r2: Estimate | None  # None: no probe was tested on both reconstructions

    def __repr__(self) -> str:
        lines = [f"{self.a} - {self.b}, over {self.n_cells} tasks x layers x probes"]
        for name, estimate in (("delta_sel", self.delta_sel), ("transfer_r2", self.transfer_r2)):
            if estimate is not None:
                interval = f"95 % interval {estimate.low:+.4f} .. {estimate.high:+.4f}, p = {estimate.p_value:.2g}"
                lines.append(f"  {name} {estimate.value:+.4f}, {interval}")
        return "\n".join(lines)


class TemporaryFolder:
    """A temporary folder, removed with the last object that refers to it. Copies share it; pickles omit it."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="delta-selectivity-"))
        weakref.finalize(self, _remove, self.path, os.getpid())

    def __deepcopy__(self, memo: object) -> TemporaryFolder:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked process must not remove the folder of its parent
        shutil.rmtree(folder, ignore_errors=True)


class Results:
    """Results of a run, or of a folder of result files: one row per SAE, task, layer and probe.

    Result files stay on disk and are read on demand; `save` copies them.

    Example:
        >>> results = evaluate(model, [sae, other_sae], "people.csv", layers=1, settings=Settings(folds=3, repeats=2))
        >>> folder = results.save("kept")
        >>> results = Results.load("kept")
        >>> found = results.compare(*results.saes)
        >>> found.delta_sel.low <= found.delta_sel.value <= found.delta_sel.high
        True
        >>> results.report("report.html").name
        'report.html'
    """

    def __init__(self, places: Mapping[Path, Path], own: TemporaryFolder | None = None) -> None:
        """Store the result files.

        Args:
            places: Path of each result file -> its relative path in the folder of `save`.
            own: The temporary folder to remove together with the results.
        """
        self._places, self._own = dict(places), own

    @classmethod
    def below(cls, folder: Path, paths: Iterable[Path], own: TemporaryFolder | None = None) -> Results:
        """Return the results in the given files of a folder."""
        return cls({path: path.relative_to(folder) for path in paths}, own)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Results:
        """Load the results in a folder of result files, or in one file; several are combined.

        Raises:
            RequestError: One of them has no results, or a file is not a result file or was edited.
        """
        places: dict[Path, Path] = {}
        for path in (as_path(each, "folder") for each in (folder, *more)):
            root = path if path.is_dir() else path.parent
            places |= {file: file.relative_to(root) for file in table.result_files(path)}
        results = cls(places)
        assert results.files
        return results

    @cached_property
    def files(self) -> list[File]:
        """Return the result files, checked: path and content of each."""
        return table.load(self._places)

    @property
    def saes(self) -> list[str]:
        """Return the names of the SAEs, followed by those of the baselines."""
        return list(table.by_sae(self.files))

    @property
    def warnings(self) -> list[str]:
        """Return the warnings about the numbers, each line once."""
        return list(dict.fromkeys(line for _, content in self.files for line in content["_run"]["warnings"]))

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with a row per SAE, task, layer and probe.

        Columns: ``sae``, ``baseline`` (its kind; None for an SAE), ``dataset``, ``layer``, ``probe``; ``model`` and the
        settings that affect the numbers (``positions``, ``seed``, ...); the figures of the layer (``mse_pos``,
        ``fvu_whole``, ``l0``, ...); all numbers of the probe (``model_sel``, ``sae_sel``, ``delta_sel``,
        ``ci_low``, ``ci_high``, ``q_value``, ...). ``docs/numbers.md`` defines all of them.
        """
        import pandas

        return pandas.DataFrame(table.lines(self.files)).drop(columns="path")

    def compare(self, a: str, b: str) -> Difference:
        """Return the difference between two SAEs, averaged over the tasks, layers and probes that both have.

        Args:
            a: An SAE, by its name in `saes` or the name of its folder.
            b: The SAE to compare it with.

        Raises:
            RequestError: There is no such SAE, its stored scores are missing, or the two share no rows and folds.
        """
        one, other = self._cells(a, "a"), self._cells(b, "b")
        delta = sae_level.difference(one, other)
        if delta is None:
            known = table.by_sae(self.files)
            reason = (
                why_incomparable(known[self._name(a, "a")], known[self._name(b, "b")]) or "no cells on the same rows"
            )
            raise RequestError(f"{a} and {b} cannot be compared: {reason}")
        n_cells = len(one.keys() & other.keys())
        return Difference(a, b, n_cells, delta, sae_level.difference_in_transfer_r2(one, other))

    def series(self) -> pandas.DataFrame:
        """Return the checkpoints of trainings: one line per step, with the difference from the previous step.

        A series consists of SAEs whose names differ only in the step (``runs/a/step_100``, ``runs/a/step_200``, or
        folders named by a number), or of one SAE at several revisions of its model (``step1000``, ``step2000``).

        Columns: ``series`` (the name with an asterisk for the step), ``step``, ``sae``; ``transfer_r2`` and
        ``delta_sel`` with ``_ci_low``, ``_ci_high``, means over all cells; ``change``, ``change_ci_low``,
        ``change_ci_high``, ``change_p_value`` (transfer_r2 minus that of the previous step, paired); ``surely_better``
        (that interval lies above 0). ``frame.attrs["last_better"]``: for each series, the last step that is surely
        better than the previous one, or None.
        """
        import pandas

        from delta_selectivity.reporting.series import COLUMNS as SERIES_COLUMNS
        from delta_selectivity.reporting.series import lines, series_of
        from delta_selectivity.reporting.study import study_of

        series = series_of(study_of(self.files))
        frame = pandas.DataFrame([line for one in series for line in lines(one)], columns=list(SERIES_COLUMNS))
        frame.attrs["last_better"] = {one.name: last.step if (last := one.last_better) else None for one in series}
        return frame

    def rows(self, probe: str, layer: int | None = None, sae: str | None = None) -> pandas.DataFrame:
        """Return the rows of one cell with their outcome, the largest losses first.

        Columns: ``text``, ``start``, ``end`` (the probed characters), ``name``, ``person``, ``label``;
        ``outcome`` (``lost``: the model's probe is right and the SAE's wrong; ``gained``, ``both``, ``neither``);
        ``lost`` (how far the score moved towards the wrong class); ``model``, ``sae``, ``transfer`` (mean scores over
        the partitions; positive: the positive class), ``model_right``, ``sae_right`` (share of the partitions).
        Texts that were not stored with the scores are looked up if the task is public, and are None otherwise.

        Args:
            probe: As in `to_frame`; ``dataset/probe`` if several datasets have it.
            layer: May be omitted if there is only one.
            sae: Name of the SAE or a unique part of it, such as ``"k8"``; may be omitted if there is only one.

        Raises:
            RequestError: There is no such cell, or its stored scores are missing.
        """
        return rows_of(find_cell(self.files, probe, layer, sae)).frame()

    def subgroups(
        self,
        probe: str | None = None,
        layer: int | None = None,
        sae: str | None = None,
        *,
        by: Mapping[str, Mapping[str, str]] | str | os.PathLike[str] | None = None,
        mean: bool = False,
    ) -> pandas.DataFrame:
        """Return the losses of subgroups of people compared with all others: one line per cell and group.

        Columns: ``sae``, ``dataset``, ``layer``, ``probe``; ``by``, ``group``, ``n_rows``, ``n_people``; ``delta_sel``,
        ``ci_low``, ``ci_high`` of the group's rows; ``against`` (its delta_sel minus that of all other people),
        ``against_ci_low``, ``against_ci_high``, ``p_value``, ``q_value`` (Benjamini-Hochberg over all lines). Cells
        whose scores are missing, and groups with fewer than 10 effective people of a class, are left out.

        Args:
            probe: One probe; None: all.
            layer: One layer; None: all.
            sae: One SAE; None: all but baselines.
            by: Further groups, besides length and frequency of the name, such as ``{"born": {"ada lovelace":
                "1810s"}}``, with the person keys of `rows`. Alternatively, a CSV or TSV file with a column ``person``
                or ``name`` and columns of groups; years and dates become decades. Requires texts.
            mean: Return one line per SAE and group, the mean over the selected cells, instead of one per cell.
                ``n_cells`` counts the cells with enough people. All rows of a person count as one draw. ``n_rows`` and
                ``n_people`` are totals over these cells.

        Raises:
            RequestError: There is no such SAE, or the file of people cannot be read.
        """
        import pandas

        chosen = None if sae is None else self._name(sae, "sae")
        known = read_people(as_path(by, "by")) if isinstance(by, str | os.PathLike) else by or {}
        lines, columns = (mean_subgroup_lines, MEAN_COLUMNS) if mean else (subgroup_lines, SUBGROUP_COLUMNS)
        return pandas.DataFrame(lines(self.files, chosen, probe, layer, known), columns=list(columns))

    def latents(
        self, probe: str, layer: int | None = None, sae: str | None = None, *, source: Any = None, device: Any = None
    ) -> pandas.DataFrame:
        """Return which latents of the SAE carry the model's probe in one cell, the largest shares first.

        The gap between the classes' mean scores (by the model's probe) is decomposed into a sum over latents and a
        remainder. Columns: ``carrier``, ``latent``; ``share`` of the gap; ``dropped`` (share that lies in the error
        along the latent's direction); ``alignment`` (probe . W_dec), ``difference`` (of the class means of the latent),
        ``rate_0``, ``rate_1`` (firing rate in each class), ``auc`` (of the latent alone), ``examples`` (texts with the
        highest activations), ``address`` (on Neuronpedia, if the SAE's config names it). The last lines are all other
        latents, the error, and biases and scales; the shares add up to 1.

        The first call for a cell runs the model over the dataset's texts again; the result is stored with the scores
        if texts may be stored (``keep_texts``).

        Args:
            probe: As for `rows`.
            layer: As for `rows`.
            sae: As for `rows`.
            source: The SAE, as `wrap_sae` returns it, if it was measured as an object.
            device: Device to compute on; by default that of the run.

        Raises:
            RequestError: There is no such cell, or the model, the SAE or the texts have changed since the measurement.
        """
        import pandas

        attribution = latents_of(find_cell(self.files, probe, layer, sae), source, device)
        return pandas.DataFrame(latent_lines(attribution), columns=list(COLUMNS)).astype({"latent": "Int64"})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the result files and their stored scores into a folder; returns the folder.

        Raises:
            RequestError: The folder is not writable or holds different results of the same names; or two of the
                loaded folders do.
        """
        target = as_path(folder, "folder")
        places = {path: target / place for path, place in self._places.items()}
        for place, n in Counter(places.values()).items():
            if n > 1:
                raise RequestError(
                    f"`folder` {target}: {n} result files have the name {place.name}: save them to different folders"
                )
        try:
            places = {path: place for path, place in places.items() if not (place.exists() and place.samefile(path))}
            for path, place in places.items():
                if place.exists() and place.read_bytes() != path.read_bytes():
                    raise RequestError(f"`folder` {target}: {place.name} already exists, with different results")
            for path, place in places.items():
                place.parent.mkdir(parents=True, exist_ok=True)
                if folder_of(path).is_dir():
                    shutil.copytree(folder_of(path), folder_of(place), dirs_exist_ok=True)
                with replacing(place, "wb") as file:
                    file.write(path.read_bytes())
        except OSError as error:
            raise RequestError(f"`folder` {target}: cannot write there: {error.strerror or error}") from error
        return target

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained HTML page with tables and plots; returns its path.

        Raises:
            RequestError: The path is not writable.
        """
        from delta_selectivity.reporting.output import write_page  # imports matplotlib, which tables do not need
        from delta_selectivity.reporting.study import study_of

        page = as_path(path, "path")
        with renaming_fields(page="path"):
            write_page(study_of(self.files), page)
        return page

    def push_to_hub(self, repo: str, sae: str | None = None, *, dry_run: bool = False) -> Push:
        """Publish the results of one SAE in its Hugging Face Hub repository, in one commit.

        Writes the result files and the page to the folder ``delta_selectivity``, and the means with their intervals to
        the model card: as ``model-index`` metadata and as a table, each between markers. The rest of the card
        is unchanged; a second push replaces the first. Print the returned object to see everything.

        Args:
            repo: ``"owner/name"`` of an existing repository.
            sae: As for `rows`.
            dry_run: Return what would be written, without writing.

        Raises:
            RequestError: There is no token, or it has no write access; the repository does not exist; the Hub does not
                respond; the card's metadata cannot be extended. Nothing is written in these cases.
        """
        from delta_selectivity.api.hub import push

        with renaming_fields(push_to_hub="repo"):
            return push(self.files, repo, sae, dry_run=dry_run)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the content of the files, because their folder may not exist after unpickling."""
        return {**self.__dict__, "files": self.files}

    def __len__(self) -> int:
        return sum(1 for _, content in self.files for _ in table.cells(content))

    def __repr__(self) -> str:
        return f"<Results: {len(self)} rows of {', '.join(self.saes)}>"

    def _name(self, name: str, field: str) -> str:
        """Return the name in `saes` of the SAE with this name or folder, or with this as a part of its name."""
        return find_sae(table.by_sae(self.files), name, field)

    def _cells(self, name: str, field: str) -> dict[sae_level.Place, ProbeScores]:
        """Return the stored scores of one SAE."""
        cells = stored_cells(table.by_sae(self.files)[self._name(name, field)])
        if cells is None:
            raise RequestError(f"{name}: its stored scores are missing: measure it again")
        return cells
