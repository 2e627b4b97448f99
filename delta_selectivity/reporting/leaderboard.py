"""The leaderboard: a self-contained HTML page that ranks the SAEs of one model, hook point and layer.

write_leaderboard(files, Path("leaderboard.html"))

Ranks are those of `ranking`: SAEs without a significant paired difference share ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.reporting.groups import File, model_names
from delta_selectivity.reporting.html import Markup, element, join
from delta_selectivity.reporting.numbers import number, signed, span, typeset
from delta_selectivity.reporting.page import document
from delta_selectivity.reporting.ranking import Ranking, in_order, rank
from delta_selectivity.reporting.study import Sae, Study, study_of
from delta_selectivity.system.terminal import printable
from delta_selectivity.system.whole_file import replacing

HEAD = ("rank", "SAE", "survives (transfer_r2)", "95 % interval", "delta_sel", "L0", "width", "fvu_pos", "probes")
BAR, HALF = 180, 8  # width and half height of the drawn interval, pixels
READING = (
    "transfer_r2 is the R² between the outputs of the model's own probes on the SAE's reconstruction and on the "
    "activations. 1: identical; 0 or less: no better than a constant. Ranks such as 2–4 are ties: the 95 % "
    "interval of the paired difference from each SAE that is listed as tied includes 0. Filters hide SAEs but do not "
    "change ranks."
)


@dataclass(frozen=True)
class Board:
    """The SAEs of one model, hook point and layer."""

    model: str
    hookpoint: str
    layer: int
    study: Study  # restricted to this layer
    ranking: Ranking

    @property
    def title(self) -> str:
        """Return what its SAEs have in common."""
        return f"{self.model} · {self.hookpoint} · layer {self.layer}"


def boards_of(files: Sequence[File]) -> Iterator[Board]:
    """Yield a board for each model, hook point and layer of these files, without baselines."""
    models = model_names(files)
    places: dict[tuple[str, str, int], list[File]] = {}
    for path, content in files:
        key, config = content["_run"]["key"], content["_run"]["config"]
        layers = [int(name.removeprefix("layer_")) for name in content if name != "_run"]
        for layer in layers if not config.get("baseline") else ():
            board = printable(models[str(key.get("model"))]), printable(str(key.get("hookpoint"))), layer
            places.setdefault(board, []).append((path, _at_layer(content, layer, is_only=len(layers) == 1)))
    for (model, place, layer), files_of_board in sorted(places.items()):
        study = study_of(files_of_board)
        yield Board(model, place, layer, study, rank(study))


def _at_layer(content: dict[str, object], layer: int, is_only: bool) -> dict[str, object]:
    """Return one layer of a result file, without the means over all layers; these are recomputed from the scores."""
    run = content["_run"]
    assert isinstance(run, dict)
    return {"_run": run if is_only else {**run, "sae_level": {}}, f"layer_{layer}": content[f"layer_{layer}"]}


def write_leaderboard(files: Sequence[File], path: Path) -> str:
    """Write the page; returns a message. Raises `RequestError` if there are no SAEs, or the path is not writable."""
    boards = list(boards_of(files))
    if not boards:
        raise RequestError("`leaderboard`: the files hold only baselines, and no SAE")
    try:
        with replacing(path.absolute(), "w", encoding="utf-8") as out:
            out.write(leaderboard(boards))
    except OSError as error:
        raise RequestError(f"`leaderboard` {path}: cannot be written: {error.strerror or error}") from error
    n_saes = len({sae.name for board in boards for sae in board.study.saes})
    return f"leaderboard: {path} ({n_saes} SAEs, {len(boards)} model{'s' if len(boards) > 1 else ''} x layer)"


def leaderboard(boards: Sequence[Board]) -> str:
    """Return the whole document."""
    title = "SAEs by transfer_r2"
    header = element("header", element("h1", title), element("p", READING))
    parts = element("main", _controls(boards), *(_section(i, board) for i, board in enumerate(boards)))
    return document(title, [header, parts], ("leaderboard.js",), ("leaderboard.css",))


def _controls(boards: Sequence[Board]) -> Markup:
    widths = sorted({width for board in boards for sae in board.study.saes if (width := _width(sae)) is not None})
    choices = [element("option", "all", value=""), *(element("option", f"{w:,}", value=str(w)) for w in widths)]
    places = [element("option", board.title, value=str(i)) for i, board in enumerate(boards)]
    return element(
        "form",
        _labelled("model and layer", element("select", *places, id="board")),
        _labelled("L0 from", element("input", id="l0-low", type="number", min="0", step="any", inputmode="decimal")),
        _labelled("to", element("input", id="l0-high", type="number", min="0", step="any", inputmode="decimal")),
        _labelled("width", element("select", *choices, id="width")),
        element("button", "show all", type="reset"),
        element("output", "", id="count", aria_live="polite"),
        id="filters", class_="controls", aria_label="filters",
    )  # fmt: skip


def _labelled(name: str, control: Markup) -> Markup:
    return element("label", name, " ", control)


def _section(index: int, board: Board) -> Markup:
    sentence = board.ranking.sentence()
    ends = [end for sae in board.study.saes for end in sae.overall("transfer_r2") if end is not None]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    rows = [_row(board, sae, low, high) for sae in in_order(board.study, board.ranking) if not sae.is_baseline]
    heads = [element("th", name, scope="col") for name in HEAD]
    caption = element("caption", f"{board.title}: {len(rows)} SAEs by rank", class_="hidden")
    table = element("table", caption, element("thead", element("tr", *heads)), element("tbody", *rows), class_="board")
    return element(
        "section",
        element("h2", board.title, id=f"title-{index}"),
        *([element("p", sentence)] if sentence else []),
        element("div", table, class_="scroll lists", tabindex="0", role="region", aria_labelledby=f"title-{index}"),
        data_board=str(index),
    )


def _row(board: Board, sae: Sae, low: float, high: float) -> Markup:
    r2, delta = sae.overall("transfer_r2"), sae.overall("delta_sel")
    width, l0 = _width(sae), sae.mean_figure("l0")
    cells = [
        _rank_cell(board, sae),
        None,
        element("b", typeset(number(r2[0], ".3f"))),
        _interval(r2, low, high),
        join([element("b", signed(delta[0], 4)), " ", element("small", span(delta[1], delta[2], 4))]),
        number(l0, ".1f"),
        "-" if width is None else f"{width:,}",
        number(sae.mean_figure("fvu_pos"), ".3f"),
        str(len(sae.measured)),
    ]
    inner = [
        element("th", sae.label, scope="row") if cell is None else element("td", element("span", cell), data_head=name)
        for name, cell in zip(HEAD, cells, strict=True)
    ]
    return element(
        "tr", *inner, data_l0=None if l0 is None else f"{l0:.6g}", data_width=None if width is None else str(width)
    )


def _rank_cell(board: Board, sae: Sae) -> Markup:
    """Return the rank and the number of SAEs that share it; their names are a tooltip and an accessible label."""
    rank = element("b", board.ranking.place(sae).replace("-", "–"))
    tied = [
        (pair.other if pair.one is sae else pair.one).label
        for pair in board.ranking.pairs
        if not pair.is_significant and sae in (pair.one, pair.other)
    ]
    if not tied:
        return rank
    names = ", ".join(tied)
    others = f"tied with {len(tied)}"
    return join([rank, " ", element("small", others, element("span", f": {names}", class_="hidden"), title=names)])


def _interval(estimate: Sequence[float | None], low: float, high: float) -> Markup:
    """Return the interval in numbers and as a drawing on the board's scale."""
    value, *ends = estimate
    if value is None or None in ends:
        return Markup("–")
    x = [round(4 + (BAR - 8) * (one - low) / (high - low), 1) for one in (value, *ends) if one is not None]
    line = element("line", x1=str(x[1]), x2=str(x[2]), y1=str(HALF), y2=str(HALF))
    dot = element("circle", cx=str(x[0]), cy=str(HALF), r="4")
    drawn = element("svg", line, dot, width=str(BAR), height=str(2 * HALF), aria_hidden="true")
    bounds = f"{typeset(f'{ends[0]:.3f}')} to {typeset(f'{ends[1]:.3f}')}"
    return join([drawn, " ", element("small", bounds)])


def _width(sae: Sae) -> int | None:
    """Return the number of latents of the SAE; None for files of older versions, which do not have it."""
    widths = sae.files[0][1]["_run"]["config"].get("d_sae")
    layer = sae.cells[0].layer if sae.cells else None
    width = widths.get(str(layer)) if isinstance(widths, dict) else None
    return width if isinstance(width, int) and not isinstance(width, bool) else None
