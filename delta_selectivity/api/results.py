"""The class `Results`: the results of runs as a table."""

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

from delta_selectivity.api.arguments import as_path, naming
from delta_selectivity.api.latents import latents_of
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.probing.uncertainty import Estimate
from delta_selectivity.records import sae_level
from delta_selectivity.records.scores import folder_of
from delta_selectivity.reporting import results as table
from delta_selectivity.reporting.groups import File, obstacle, stored_cells
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
    """How two SAEs differ, paired by row, fold and person, over the cells that both have.

    Each `Estimate` has ``value`` (the first SAE's minus the second's), ``low`` and ``high`` (95 % interval),
    ``p_value`` and ``detectable`` (the smallest difference that these data would show with 80 % power).
    """

    a: str
    b: str
    n_cells: int  # (task, layer, probe)
    delta_sel: Estimate
    transfer_r2: Estimate | None  # None: no probe was tested on both reconstructions

    def __repr__(self) -> str:
        lines = [f"{self.a} - {self.b}, over {self.n_cells} tasks x layers x probes"]
        for name, found in (("delta_sel", self.delta_sel), ("transfer_r2", self.transfer_r2)):
            if found is not None:
                interval = f"95 % interval {found.low:+.4f} .. {found.high:+.4f}, p = {found.p_value:.2g}"
                lines.append(f"  {name} {found.value:+.4f}, {interval}")
        return "\n".join(lines)


class TemporaryFolder:
    """A folder that goes with the last object that holds it. A copy of that holds the same; a pickle of it, none."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="delta-selectivity-"))
        weakref.finalize(self, _remove, self.path, os.getpid())

    def __deepcopy__(self, memo: object) -> TemporaryFolder:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not what a fork of it forgets
        shutil.rmtree(folder, ignore_errors=True)


class Results:
    """The results of a run, or of a folder of result files: a row per SAE, task, layer and probe.

    They stay on disk and are read when they are asked for; `save` copies them elsewhere.

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
        """Take result files, and where `save` puts each; own: the temporary folder that goes when the results do."""
        self._places, self._own = dict(places), own

    @classmethod
    def below(cls, folder: Path, paths: Iterable[Path], own: TemporaryFolder | None = None) -> Results:
        """Return the results in these files of a folder."""
        return cls({path: path.relative_to(folder) for path in paths}, own)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Results:
        """Return the results in a folder of result files, or in one file; several are put side by side.

        Raises:
            RequestError: There are none in one of them, or one is no result file or was changed by hand.
        """
        places: dict[Path, Path] = {}
        for path in (as_path(each, "folder") for each in (folder, *more)):
            root = path if path.is_dir() else path.parent
            places |= {file: file.relative_to(root) for file in table.result_files(path)}
        found = cls(places)
        assert found.files
        return found

    @cached_property
    def files(self) -> list[File]:
        """The result files, each checked: its path and what it holds."""
        return table.load(self._places)

    @property
    def saes(self) -> list[str]:
        """Names of the SAEs, and after them of the baselines."""
        return list(table.by_sae(self.files))

    @property
    def warnings(self) -> list[str]:
        """What a reader of the numbers must know, each line once."""
        return list(dict.fromkeys(line for _, found in self.files for line in found["_run"]["warnings"]))

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with a row per SAE, task, layer and probe.

        Columns: ``sae``, ``baseline`` (its kind; None for an SAE), ``dataset``, ``layer``, ``probe``; ``model`` and the
        settings that change a number (``positions``, ``seed``, ...); the figures of the layer (``mse_pos``,
        ``fvu_whole``, ``l0``, ...); all that was measured of the probe (``model_sel``, ``sae_sel``, ``delta_sel``,
        ``ci_low``, ``ci_high``, ``q_value``, ...). ``docs/numbers.md`` defines every one.
        """
        import pandas

        return pandas.DataFrame(table.lines(self.files)).drop(columns="path")

    def compare(self, a: str, b: str) -> Difference:
        """Return the difference between two SAEs, averaged over the tasks, layers and probes that both have.

        Args:
            a: An SAE, by its name in `saes` or by the name of its folder.
            b: The SAE to compare it with.

        Raises:
            RequestError: There is no such SAE, its stored scores are gone, or the two share no rows and folds.
        """
        one, other = self._cells(a, "a"), self._cells(b, "b")
        delta = sae_level.difference(one, other)
        if delta is None:
            known = table.by_sae(self.files)
            reason = obstacle(known[self._name(a, "a")], known[self._name(b, "b")]) or "no cells on the same rows"
            raise RequestError(f"{a} and {b} cannot be compared: {reason}")
        n_cells = len(one.keys() & other.keys())
        return Difference(a, b, n_cells, delta, sae_level.difference_in_transfer_r2(one, other))

    def series(self) -> pandas.DataFrame:
        """Return checkpoints of trainings: a line for each step, with its difference from the step before.

        A series is SAEs whose names differ in the step alone (``runs/a/step_100``, ``runs/a/step_200``; a number that
        is a folder of its own counts too), or one SAE at revisions of its model (``step1000``, ``step2000``).

        Columns: ``series`` (the name with an asterisk for the step), ``step``, ``sae``; ``transfer_r2`` and
        ``delta_sel`` with ``_ci_low``, ``_ci_high``, means over all cells; ``change``, ``change_ci_low``,
        ``change_ci_high``, ``change_p_value`` (transfer_r2 minus that of the step before, paired); ``surely_better``
        (that interval lies above 0). ``frame.attrs["last_better"]``: by series, the last step that is surely better
        than the one before, or None.
        """
        import pandas

        from delta_selectivity.reporting.series import COLUMNS as SERIES_COLUMNS
        from delta_selectivity.reporting.series import lines, series_of
        from delta_selectivity.reporting.study import study_of

        found = series_of(study_of(self.files))
        frame = pandas.DataFrame([line for one in found for line in lines(one)], columns=list(SERIES_COLUMNS))
        frame.attrs["last_better"] = {one.name: last.step if (last := one.last_better) else None for one in found}
        return frame

    def rows(self, probe: str, layer: int | None = None, sae: str | None = None) -> pandas.DataFrame:
        """Return who was lost: the rows of one cell, those that lost most first.

        Columns: ``text``, ``start``, ``end`` (the characters that were probed), ``name``, ``person``, ``label``;
        ``outcome`` (``lost``: the model's probe is right and the SAE's wrong; ``gained``, ``both``, ``neither``);
        ``lost`` (how far the score moved towards the wrong side); ``model``, ``sae``, ``transfer`` (mean scores over
        the partitions; positive: the positive class), ``model_right``, ``sae_right`` (share of the partitions).
        Texts that were not kept beside the scores are looked up where the task is public, and None otherwise.

        Args:
            probe: As in `to_frame`; ``dataset/probe`` where several datasets have it.
            layer: May be left out if there is only one.
            sae: Its name, or what only its name holds, such as ``"k8"``; may be left out if there is only one.

        Raises:
            RequestError: There is no such cell, or its stored scores are gone.
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
        """Return which people lose more than the others: a line per cell and group, with q over all lines.

        Columns: ``sae``, ``dataset``, ``layer``, ``probe``; ``by``, ``group``, ``n_rows``, ``n_people``; ``delta_sel``,
        ``ci_low``, ``ci_high`` of the group's rows; ``against`` (its delta_sel minus that of all other people),
        ``against_ci_low``, ``against_ci_high``, ``p_value``, ``q_value`` (Benjamini-Hochberg over all lines). Cells
        whose scores are gone, and groups with fewer than 10 effective people of a class, are left out.

        Args:
            probe: One probe; None: all.
            layer: One layer; None: all.
            sae: One SAE; None: all but baselines.
            by: Groups beside length and frequency of the name, such as ``{"born": {"ada lovelace": "1810s", ...}}``:
                by the key of the person, as `rows` has it. Or a CSV or TSV file with a column ``person`` or ``name``
                and columns of groups, of which years and dates become decades. Needs texts.
            mean: A line per SAE and group in place of one per cell: the mean over the cells that are chosen, of which
                ``n_cells`` have enough people. A person's rows in all of them count as one draw. ``n_rows`` and
                ``n_people`` are of all these cells.

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
        """Return which latents of the SAE carry the model's probe in one cell, those that carry most first.

        The gap between the classes' mean scores by the model's probe is a sum over latents, and what no latent
        carries. Columns: ``carrier``, ``latent``; ``share`` of the gap; ``dropped`` (share that lies in the error along
        the latent's direction); ``alignment`` (probe . W_dec), ``difference`` (of the class means of the latent),
        ``rate_0``, ``rate_1`` (how often it fires in each class), ``auc`` (of the latent alone), ``examples`` (texts on
        which it fires most), ``address`` (on Neuronpedia, if the SAE's config names it). The last lines are all other
        latents, the error, and biases and scales: the shares add up to 1.

        The first call of a cell runs the model over the dataset's texts again; what it finds is kept beside the scores
        if the texts may be (``keep_texts``).

        Args:
            probe: As for `rows`.
            layer: As for `rows`.
            sae: As for `rows`.
            source: The SAE itself, as `wrap_sae` returns it, where it was measured as an object.
            device: Where to compute; by default as the run did.

        Raises:
            RequestError: There is no such cell, or model, SAE or texts are no longer what was measured.
        """
        import pandas

        found = latents_of(find_cell(self.files, probe, layer, sae), source, device)
        return pandas.DataFrame(latent_lines(found), columns=list(COLUMNS)).astype({"latent": "Int64"})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the result files and the scores behind them into a folder; returns the folder.

        Raises:
            RequestError: The folder cannot be written to, or holds other results of the same names; or two of the
                folders that these were loaded from do.
        """
        target = as_path(folder, "folder")
        places = {path: target / place for path, place in self._places.items()}
        for place, n in Counter(places.values()).items():
            if n > 1:
                raise RequestError(f"`folder` {target}: {n} of these would be {place.name} there: save them apart")
        try:
            places = {path: place for path, place in places.items() if not (place.exists() and place.samefile(path))}
            for path, place in places.items():
                if place.exists() and place.read_bytes() != path.read_bytes():
                    raise RequestError(f"`folder` {target}: {place.name} is there already, with other results")
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
        """Write one HTML page with tables and plots that needs no network; returns its path.

        Raises:
            RequestError: The path cannot be written.
        """
        from delta_selectivity.reporting.output import write_page  # matplotlib: tables do without it
        from delta_selectivity.reporting.study import study_of

        page = as_path(path, "path")
        with naming(page="path"):
            write_page(study_of(self.files), page)
        return page

    def push_to_hub(self, repo: str, sae: str | None = None, *, dry_run: bool = False) -> Push:
        """Publish the results of one SAE in its repository on the Hugging Face Hub, in one commit.

        That is its result files and its page, in the folder ``delta_selectivity``, and the means with their intervals
        in the model card: as ``model-index`` metadata and as a table, each between marks. What else stands in the card
        stays to the letter; a second push replaces the first. Print what is returned to see all of it.

        Args:
            repo: ``"owner/name"``; it must be there.
            sae: As for `rows`.
            dry_run: Return what would be written, and write nothing.

        Raises:
            RequestError: There is no token, or it may not write there; there is no such repository; the Hub does not
                answer; the card's metadata cannot be added to. Nothing was written then.
        """
        from delta_selectivity.api.hub import push

        with naming(push_to_hub="repo"):
            return push(self.files, repo, sae, dry_run=dry_run)

    def __getstate__(self) -> dict[str, Any]:
        """With what the files hold: their folder may be gone where it is unpickled."""
        return {**self.__dict__, "files": self.files}

    def __len__(self) -> int:
        return sum(1 for _, found in self.files for _ in table.cells(found))

    def __repr__(self) -> str:
        return f"<Results: {len(self)} rows of {', '.join(self.saes)}>"

    def _name(self, name: str, field: str) -> str:
        """The SAE of this name or folder, or of a part of it, by its name in `saes`."""
        return find_sae(table.by_sae(self.files), name, field)

    def _cells(self, name: str, field: str) -> dict[sae_level.Place, ProbeScores]:
        """The stored scores of one SAE."""
        cells = stored_cells(table.by_sae(self.files)[self._name(name, field)])
        if cells is None:
            raise RequestError(f"{name}: the scores beside its result files are gone: measure it again")
        return cells
