"""The report as one self-contained HTML page.

The page's Content Security Policy enforces this: browsers block all requests and all scripts but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from delta_selectivity.reporting.cell_table import cell_table
from delta_selectivity.reporting.drawing import Plot
from delta_selectivity.reporting.families import family_table
from delta_selectivity.reporting.html import Markup, element, table
from delta_selectivity.reporting.numbers import signed
from delta_selectivity.reporting.plots import Plots, parts
from delta_selectivity.reporting.provenance import facts, file_table, heading, notices, settings, versions
from delta_selectivity.reporting.row_data import packed_json
from delta_selectivity.reporting.saebench import caveats, own_evaluations, table_of
from delta_selectivity.reporting.sentences import opening
from delta_selectivity.reporting.series import series_of
from delta_selectivity.reporting.study import Study
from delta_selectivity.reporting.summary import detectable_sentence, pair_table, sae_table
from delta_selectivity.reporting.svg import inline

HERE = Path(__file__).parent
READING = (
    ("survives", "transfer_r2: the R² between the outputs of the model's own probes on the SAE's reconstruction and on "
     "the activations. 1: identical; 0 or less: no better than a constant. It is far more sensitive than delta_sel. "
     "Attention sinks among the probed rows are excluded."),
    ("rank", "By transfer_r2. 1–2: tied with another SAE, because the 95 % interval of their paired difference "
     "includes 0."),
    ("delta_sel", "Balanced accuracy of a probe on the SAE's reconstruction minus that on the model's activations. "
     "0: the SAE keeps what the model knows. Negative: it loses some. Intervals are 95 %, clustered by group "
     "(person)."),
    ("▼ lost", "A probe fitted anew finds less: delta_sel is negative with q < 0.05 (Benjamini-Hochberg over all cells "
     "of the SAE) and is not shown to be small."),
    ("→ moved", "A probe fitted anew finds the answer, but the model's own probe finds less. delta_sel is shown to be "
     "small: its 90 % interval lies within ± epsilon."),
    ("= preserved", "delta_sel is shown to be small, and the model's own probe is not shown to find less."),
    ("? undecided", "The data are insufficient to decide, or the model itself is not shown to know the answer."),
    ("bold, hatched", "Bold: delta_sel differs from 0 (q < 0.05). All other cells of the heatmaps are hatched."),
)  # fmt: skip
PAIRED = element(
    "p",
    "Each SAE is compared with the next in rank: the first minus the second, on the same rows, folds and groups. "
    "The p values are not corrected for the number of pairs.",
)
DEPTH = element(
    "p",
    "Each panel shows one probe by layer: its accuracy on the model's activations, the accuracy of a probe fitted anew "
    "on the SAE's reconstruction, and the accuracy of the model's own probe on the reconstruction. A gap between the "
    "last two means that the information moved. If scores are stored, each SAE is also drawn with the next one; "
    "layers where the two differ are shaded (paired by row, fold and group; q < 0.05).",
)
HEATMAPS = element(
    "p",
    "The heatmaps show delta_sel of every SAE by layer (rows) and probe (columns), with one colour scale for the whole "
    "report. The panels show, for each probe, the accuracy on the activations and on the reconstructions. Hatched: not "
    "significant. ▼ lost, → moved, = preserved, ? undecided. Click on a cell to see which of its rows were lost.",
)
FAMILIES = element(
    "p",
    "Tasks are grouped by family. Each family shows the probes with the largest losses first (mean delta_sel over SAEs "
    "and layers), and the first three also by layer. The table of all cells has every task and can be searched.",
)


def page(
    study: Study,
    plots: Plots,
    drawn: Mapping[str, str],
    with_links: bool,
    groups: Sequence[Markup] = (),
    rows: str | None = None,
    pack_plots: bool = False,
) -> str:
    """Return the whole document.

    Args:
        study: The SAEs to report on.
        plots: Their plots.
        drawn: SVG of each plot, by name.
        with_links: Add download links, which double the size of the plots.
        groups: Section on the losses of subgroups, over all cells.
        rows: Rows of the cells, from `row_data.packed`.
        pack_plots: Embed the plots compressed. The script decompresses a plot when it scrolls into view.
    """
    inner = {name: inline(svg) for name, svg in drawn.items()}

    def figures(plots_shown: Sequence[Plot]) -> Markup:
        if pack_plots:
            return element("div", *(_placeholder(plot, inner[plot.name]) for plot in plots_shown), class_="plots")
        return element("div", *(_figure(plot, inner, drawn, with_links) for plot in plots_shown), class_="plots")

    sections = list(_sections(study, plots, figures, groups))
    links = (element("a", title, href=f"#{name}") for name, title, _ in sections)
    parts = [
        element(
            "header", element("h1", "Delta Selectivity"), element("p", heading(study)), *_opening(study), facts(study)
        ),
        *notices(study),
        element("nav", *links, aria_label="sections"),
        element("main", *(_section(name, title, parts) for name, title, parts in sections)),
        _cell_dialog(),
        element("template", rows or "", id="row-data"),
        element("template", packed_json(inner) if pack_plots else "", id="plot-data"),
    ]
    return document(f"Delta Selectivity: {heading(study)}", parts, ("page.js", "rows.js"))


def document(title: str, parts: Sequence[Markup], scripts: Sequence[str], styles: Sequence[str] = ()) -> str:
    """Return a page of these parts, with scripts and styles of this package; its policy allows no other scripts."""
    script = Markup("\n".join(_package_file(name) for name in scripts))
    body = element("body", *parts, element("script", script))
    return f"<!DOCTYPE html>\n{element('html', _head(title, script, ('page.css', *styles)), body, lang='en')}\n"


def _opening(study: Study) -> list[Markup]:
    """Return the summary of the report as a list of sentences."""
    sentences = (line.partition(": ") for line in opening(study))
    lines = [element("li", element("b", first), f": {rest}") for first, _, rest in sentences]
    return [element("ul", *lines, class_="opening")] if lines else []


def _head(title: str, script: Markup, styles: Sequence[str]) -> Markup:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup("\n".join(_package_file(name) for name in styles))),
    )


def _sections(
    study: Study, plots: Plots, figures: Callable[[Sequence[Plot]], Markup], groups: Sequence[Markup]
) -> Iterator[tuple[str, str, list[Markup]]]:
    """Yield (id, title, content) of each section."""
    pairs = pair_table(study)
    compared = [element("h3", "Against each other"), PAIRED, pairs] if pairs else []
    compared += [element("p", line) for line in study.not_compared]
    suite = family_table(study)
    if suite is not None:
        compared += [element("h3", "Over tasks"), suite]
    yield "saes", "SAEs", [sae_table(study), _reading(study), *compared, figures(plots.saes)]
    if plots.series:
        sentences = [element("p", series.sentence()) for series in series_of(study)]
        yield "series", "By training step", [*sentences, figures(plots.series)]
    if plots.tradeoffs:
        yield "pareto", "delta_sel against FVU and L0", [figures(plots.tradeoffs)]
    if plots.depth:
        yield "depth", "By depth", [DEPTH, figures(plots.depth)]
    yield (
        "datasets",
        "Layer by layer",
        [HEATMAPS, *([FAMILIES] if study.has_many_datasets else []), figures([plots.scale])],
    )
    for number, (part, datasets) in enumerate(parts(study).items()):
        shown = [figures(plots.heatmaps[part]), figures(plots.levels[part])]
        title = f"{part} ({len(datasets)})" if study.has_many_datasets else part
        yield f"dataset-{number}", title, [_collapsed(study, datasets, shown)] if study.has_many_datasets else shown
    if groups:
        yield "people", "Losses by subgroup", list(groups)
    if study.beside:
        yield "saebench", "Comparison with SAEBench", [*_saebench_tables(study), figures(plots.beside)]
    yield "all-cells", "All cells", [cell_table(study)]
    listed = element("summary", f"Result files ({len(study.files)})")
    files = element("details", listed, file_table(study))
    yield "run", "How it was run", [settings(study), element("h3", "Versions"), versions(study), files]


def _collapsed(study: Study, datasets: Sequence[str], shown: Sequence[Markup]) -> Markup:
    """Return a family's plots and tasks in a collapsed element, whose heading lists the largest losses."""
    worst = [place for place in study.losses if place[0] in datasets][:3]
    losses = ", ".join(f"{probe} {signed(study.losses[dataset, probe])}" for dataset, probe in worst)
    head = f"largest losses: {losses}" if losses else "nothing was measured"
    return element("details", element("summary", head), *shown, element("p", f"Tasks: {', '.join(datasets)}."))


def _saebench_tables(study: Study) -> Iterator[Markup]:
    """Yield what cannot be compared, and a table for each kind of evaluation."""
    evaluations = own_evaluations(study.files)
    yield from (element("p", line) for line in caveats(evaluations, study.beside))
    for core, title in ((False, "Probes on few latents"), (True, "Reconstruction, and the model's output with it")):
        if any(one.is_core == core for one in study.beside):
            head, *rows = table_of(core, evaluations, study.beside)
            yield from (element("h3", title), table(head, rows))


def _reading(study: Study) -> Markup:
    terms = (element("div", element("dt", term), element("dd", text)) for term, text in READING)
    return element(
        "details",
        element("summary", "How to read it"),
        element("dl", *terms),
        element("p", detectable_sentence(study)),
        open="",
    )


def _section(name: str, title: str, parts: Sequence[Markup]) -> Markup:
    return element("section", element("h2", title), *parts, id=name)


def _figure(plot: Plot, inner: Mapping[str, str], drawn: Mapping[str, str], with_links: bool) -> Markup:
    links = [_download_links(plot, drawn[plot.name])] if with_links else []
    return element("figure", Markup(inner[plot.name]), *links, id=plot.name)


def _placeholder(plot: Plot, svg: str) -> Markup:
    """Return a placeholder of the size of a plot."""
    width, height = (re.search(rf'<svg[^>]* {size}="([0-9.]+)"', svg) for size in ("width", "height"))
    assert width is not None
    assert height is not None
    style = f"width: {width[1]}px; height: {height[1]}px"
    return element("figure", id=plot.name, data_plot=plot.name, style=style)


def _download_links(plot: Plot, svg: str) -> Markup:
    """Return download links for the plot and its data; a PNG is rendered from the SVG on demand."""
    files = {"SVG": ("svg", "image/svg+xml", svg), "CSV": ("csv", "text/csv;charset=utf-8", plot.csv())}
    links = [
        element("a", kind, href=_data(media, text), download=f"{plot.name}.{ending}", title=f"{plot.title}, as {kind}")
        for kind, (ending, media, text) in files.items()
    ]
    png = element("button", "PNG", type="button", data_png=plot.name, title=f"{plot.title}, as PNG")
    return element("figcaption", links[0], png, links[1])


def _data(media: str, text: str) -> str:
    return f"data:{media};base64,{base64.b64encode(text.encode()).decode()}"


def _cell_dialog() -> Markup:
    """Return the panel that opens when a cell is selected; the script fills it."""
    close = element("button", "close", type="button", id="close")
    title = element("h2", "", id="cell-title", tabindex="-1")
    return element("dialog", element("div", title, close, class_="bar"), element("div", id="cell-content"),
                   id="cell", aria_labelledby="cell-title")  # fmt: skip


@cache
def _package_file(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))
