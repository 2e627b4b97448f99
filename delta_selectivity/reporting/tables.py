"""Tables in Markdown for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from delta_selectivity.records import result_file
from delta_selectivity.records.verdicts import LOST, PRESERVED, is_preserved, is_significant
from delta_selectivity.reporting.families import MEANING as OVER_TASKS
from delta_selectivity.reporting.families import family_rows
from delta_selectivity.reporting.groups import File, dataset_of
from delta_selectivity.reporting.names import elide_middle, short_names
from delta_selectivity.reporting.numbers import few_effective, fvu_whole, interval, number, p_value, people
from delta_selectivity.reporting.ranking import MEANING, in_order, rank
from delta_selectivity.reporting.results import (
    cells,
    is_baseline,
    label_in_run,
    mean,
    optional_figures,
    with_downstream,
)
from delta_selectivity.reporting.study import MAX_DATASETS, Study, study_of
from delta_selectivity.system.terminal import one_line, printable

Row = tuple[str, ...]
MAX_NAME = 72  # characters of a name
MAX_CELLS = 20  # maximum number of cells shown for many datasets

LEGEND = (
    "delta_sel: 0 = preserved, negative = lost; intervals are clustered by group (person)\n"
    "[54 (as 6.2) groups] after a probe: their sizes differ so much that they count as 6.2 groups of equal size\n"
    "* after delta_sel: q < 0.05 (Benjamini-Hochberg over all results of the SAE in the run)\n"
    "= after delta_sel: shown to be preserved, because the 90 % interval lies within +-epsilon"
)
"""Legend below the tables."""


def selectivity_table(results: result_file.Json, worst_first: bool = False) -> str:
    """Return layer, probe, model_sel, sae_sel, delta_sel with its 95 % interval, both FVU and L0."""
    all_cells = list(cells(results))
    if worst_first:
        all_cells.sort(key=lambda cell: cell[3].get("delta_sel", 0.0) if cell[3].get("delta_sel") is not None else 0.0)
    views = optional_figures(with_downstream(figures, result) for *_, figures, result in all_cells)
    header = (
        "layer",
        "probe",
        "model_sel",
        "sae_sel",
        "delta_sel",
        "95 % interval",
        "transfer",
        "fvu_pos",
        "fvu_whole",
        "L0",
        *views,
    )
    rows = [
        (*_row(str(layer), probe, figures, result), *_optional_columns(with_downstream(figures, result), views))
        for layer, probe, figures, result in all_cells
    ]
    return aligned([header, *rows])


def rows_table(results: result_file.Json) -> str:
    """Return a line per SAE and probe of a file of rows: SAE -> figures, and probe -> record."""
    header = ("SAE", "probe", "model_sel", "sae_sel", "delta_sel", "95 % interval", "transfer", "fvu_pos")
    all_cells = (
        (sae, probe, figures, result)
        for sae, figures in results.items()
        if sae != "_run"
        for probe, result in figures.items()
        if isinstance(result, dict)
    )
    return aligned([header, *(_row(*cell)[: len(header)] for cell in all_cells)])


def _row(first: str, probe: str, figures: result_file.Json, result: result_file.Json) -> Row:
    first, probe = (elide_middle(printable(name), MAX_NAME) for name in (first, probe))
    if result.get("reason"):
        return (first, probe, f"({result['reason']})", *[""] * 7)
    return (
        first,
        f"{probe} [{people(result)} groups]" if few_effective(result) else probe,
        f"{result['model_sel']:.3f}",
        f"{result['sae_sel']:.3f}",
        f"{result['delta_sel']:+.3f}{_marks(result)}",
        f"{result['ci_low']:+.3f} .. {result['ci_high']:+.3f}",
        number(result["transfer_sel"], ".3f"),
        number(figures["fvu_pos"], ".3f"),
        fvu_whole(figures),
        number(figures.get("l0"), ".1f"),
    )


def _optional_columns(result: result_file.Json, views: Sequence[str]) -> Row:
    return tuple("" if result.get("reason") else number(result.get(view), ".3f") for view in views)


def _marks(result: result_file.Json) -> str:
    return f"{'*' if is_significant(result) else ' '}{'=' if is_preserved(result) else ' '}"


def summary_table(study: Study) -> str:
    """Return a line per SAE by rank: means over datasets, layers and probes, with intervals clustered by group.

    Baselines are listed below the SAEs.
    """
    ranking = rank(study)
    views = optional_figures(cell.record for sae in study.saes_and_baselines for cell in sae.measured)
    rows: list[Row] = [
        ("SAE", "rank", "survives", "95 % interval", "probes x layers", "model_sel", "sae_sel", "delta_sel",
         "95 % interval", "lost (q < 0.05)", "preserved", "fvu_pos", "fvu_whole", "L0", *views)
    ]  # fmt: skip
    saes = in_order(study, ranking)
    names = short_names([sae.label for sae in saes], MAX_NAME)
    for sae, name in zip(saes, names, strict=True):
        n_cells = len(sae.measured)
        rows.append(
            (
                name,
                ranking.place(sae),
                number(sae.overall("transfer_r2")[0], ".3f"),
                interval(sae.level, "transfer_r2", ".3f"),
                str(n_cells),
                number(sae.mean("model_sel"), ".3f"),
                number(sae.mean("sae_sel"), ".3f"),
                number(sae.overall("delta_sel")[0], "+.4f"),
                interval(sae.level, "delta_sel"),
                f"{sae.count(LOST)} of {n_cells}",
                f"{sae.count(PRESERVED)} of {n_cells}",
                number(sae.mean_figure("fvu_pos"), ".3f"),
                number(sae.mean_figure("fvu_whole"), ".3f"),
                number(sae.mean_figure("l0"), ".1f"),
                *(number(mean(cell.record.get(view) for cell in sae.measured), ".3f") for view in views),
            )
        )
    return aligned(rows)


def comparison_table(study: Study) -> str | None:
    """Return paired comparisons of each SAE with the next in rank, by row, fold and person.

    Each baseline that belongs to an SAE is compared with it below. None if no two can be compared.
    """
    scores = ("transfer_r2", "delta_sel")
    columns = [column for score in scores for column in (f"difference of {score}", "95 % interval", "p")]
    rows: list[Row] = [("SAE", "compared with", *columns)]
    labels = [sae.label for sae in study.saes_and_baselines]
    names = dict(zip(labels, short_names(labels, MAX_NAME), strict=True))
    for pair in study.neighbours:
        figures = [figure for score in scores for figure in _difference(pair.figures, score)]
        rows.append((names[pair.one.label], names[pair.other.label], *figures))
    return aligned(rows) if len(rows) > 1 else None


def _difference(comparison: result_file.Json, score: str) -> Row:
    return (number(comparison[score], "+.4f"), interval(comparison, score), p_value(comparison[f"{score}_p_value"]))


def resource_table(files: Sequence[File]) -> str:
    """Return seconds per stage and peak memory of the run that wrote the newest file.

    `total` is wall-clock time; the stages of the two threads overlap, so their sum is larger.
    """
    run = max(
        (results["_run"] for _, results in files), key=lambda run: (run["started"], run["seconds"].get("total", 0))
    )
    rows: list[Row] = [("stage", "seconds")]
    rows += [(name, f"{seconds:.1f}") for name, seconds in run["seconds"].items()]
    rows += [(name, f"{value:.2f}") for name, value in run["resources"].items()]
    return aligned(rows)


def aligned(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table aligned for a terminal, with the first two columns left-aligned.

    Names come from data: characters that would break the table or the terminal are escaped.
    """
    rows = [tuple(printable(cell).replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def render(files: Sequence[File], worst_first: bool = False) -> str:
    """Return every table of the files. The summary over several files comes last, so that it is visible in a terminal.

    Baselines are only in the summary, unless there are no SAEs.
    """
    in_full = [file for file in files if not is_baseline(file[1])] or files
    if len({dataset_of(file) for file in in_full}) > MAX_DATASETS:
        return "\n\n".join([*_largest_losses(in_full), overview(files)])
    parts = [f"{one_line(str(path))}\n\n{selectivity_table(results, worst_first)}" for path, results in in_full]
    return "\n\n".join([*parts, LEGEND, *([overview(files)] if len(files) > 1 else [])])


def _largest_losses(files: Sequence[File]) -> list[str]:
    """Return, for many datasets, the probes with the largest losses, and those that could not be measured."""
    named = [(dataset_of(file), file) for file in files]
    all_cells = [(label_in_run("", [file]), dataset, *cell) for dataset, file in named for cell in cells(file[1])]
    measured = [cell for cell in all_cells if not cell[-1].get("reason")]
    by_loss = sorted(measured, key=lambda cell: cell[-1]["delta_sel"], reverse=True)
    of_probe = {(sae, dataset, probe): place for place, (sae, dataset, _, probe, *_) in enumerate(by_loss)}
    worst = [by_loss[place] for place in sorted(of_probe.values(), reverse=True)[:MAX_CELLS]]
    header: Row = ("SAE", "dataset", "layer", "probe", "model_sel", "sae_sel", "delta_sel", "95 % interval", "transfer")
    rows = [
        (
            elide_middle(printable(sae), MAX_NAME),
            elide_middle(printable(dataset), MAX_NAME),
            *_row(str(layer), probe, *numbers)[:7],
        )
        for sae, dataset, layer, probe, *numbers in worst
    ]
    reasons: dict[str, None] = {
        f"not measured: {dataset}, {probe}: {result['reason']}": None
        for _, dataset, _, probe, _, result in all_cells
        if result.get("reason")
    }
    head = (
        f"the {len(rows)} of {len(of_probe)} probes with the largest losses, each at its worst layer; for all probes, "
        "print a single result file, or write a page or a CSV file"
    )
    return [head, aligned([header, *rows]), LEGEND, *([one_line_each(reasons)] if reasons else [])]


def one_line_each(texts: Iterable[str]) -> str:
    """Return texts from data, each on one line."""
    return "\n".join(map(one_line, texts))


def overview(files: Sequence[File]) -> str:
    """Return the line per SAE, the significant differences between them, and the comparisons."""
    study = study_of(files)  # computed once, because pairs may be compared from their stored scores
    not_compared = "\n".join(one_line(line) for line in study.not_compared)
    sentence = rank(study).sentence()
    families = family_rows(study)
    over_tasks = f"{aligned(families)}\n\n{OVER_TASKS}" if families else None
    text = sentence and one_line(sentence)
    parts = (over_tasks, summary_table(study), MEANING, text, comparison_table(study), not_compared)
    return "\n\n".join(part for part in parts if part)
