"""The rows of a cell as text for a terminal, and as CSV."""

from __future__ import annotations

from pathlib import Path

from delta_selectivity.records.texts import Text
from delta_selectivity.reporting.csv_file import csv_text
from delta_selectivity.reporting.groups import dataset_of
from delta_selectivity.reporting.names import abridged
from delta_selectivity.reporting.numbers import number
from delta_selectivity.reporting.rows import COLUMNS, OUTCOMES, CellRows, Place
from delta_selectivity.reporting.tables import Row, aligned
from delta_selectivity.system.terminal import one_line
from delta_selectivity.system.whole_file import replacing

SHOWN = 25  # rows
BEFORE, NAME = 60, 30  # characters of a text and of a name
BINS, BAR = 12, 30  # of the histogram, and characters of its longest bar


def rows_text(place: Place, rows: CellRows) -> str:
    """Return the losses in a cell as text: counts, a histogram, and the rows with the largest losses."""
    head = f"{dataset_of(place.file)}, {place.probe}, layer {place.layer}: {len(rows.labels)} rows"
    counts = (_counts(rows, by, groups) for by, groups in rows.counts())
    parts = [one_line(head), *counts, _histogram(rows), _rows(rows)]
    note = (
        "scores are means over the partitions; positive: the positive class\n"
        "lost: how far they moved to the wrong side; lost share: of the rows that the model has right\n"
        "q: Benjamini-Hochberg over the groups of this cell"
    )
    if rows.kept is None:
        note += "\nthe texts were not kept, and there are no task data to look them up in"
    return "\n\n".join([*parts, note])


def write_rows(rows: CellRows, path: Path) -> None:
    """Write all rows of a cell as CSV. Raises OSError."""
    with replacing(path.absolute(), "w", encoding="utf-8") as out:
        out.write(csv_text(COLUMNS, rows.lines()))


def excerpt(text: Text, before: int, name: int, after: int = 0) -> tuple[str, str, str]:
    """Return the end of the text before the name, the name, and the start of the text after it, each on one line."""
    start = text.text[max(text.start - 4 * before, 0) : text.start]
    head = one_line(start)
    head = f"…{head[-before:]}" if len(head) > before or text.start > 4 * before else head
    gap = " " if start[-1:].isspace() and head else ""
    rest = text.text[text.end : text.end + 4 * after]
    tail = one_line(rest)
    tail = f"{tail[:after]}…" if len(tail) > after or text.end + 4 * after < len(text.text) else tail
    lead = " " if rest[:1].isspace() and tail else ""
    return f"{head}{gap}", abridged(one_line(text.name[: 4 * name]), name), f"{lead}{tail}" if after else ""


def _counts(rows: CellRows, by: str, groups: list[tuple[str, list[int]]]) -> str:
    """Return the rows of each group by outcome; for groups of people also their losses compared with all others."""
    tested = any((by, name) in rows.losses for name, _ in groups)
    more = ("delta_sel", "95 % interval", "minus that of all others", "95 % interval", "q") if tested else ()
    table: list[Row] = [(by, "rows", *OUTCOMES, "lost share", *more)]
    for name, counts in groups:
        had, loss = counts[0] + counts[2], rows.losses.get((by, name))
        told: tuple[str, ...] = ("",) * len(more)
        if loss is not None:
            told = tuple(
                text
                for found in (loss.delta_sel, loss.against)
                for text in (f"{found.value:+.3f}", f"{found.low:+.3f} .. {found.high:+.3f}")
            )
            told = (*told, number(loss.q_value, ".3f"))
        table.append((name, str(sum(counts)), *map(str, counts), f"{counts[0] / had:.0%}" if had else "-", *told))
    return aligned(table)


def _histogram(rows: CellRows) -> str:
    """Return bars of the scores of each class, for the model and the SAE."""
    end, counts = rows.histogram(BINS)
    largest = max(max(bins) for of_class in counts for bins in of_class) or 1
    table: list[Row] = [("score", *(f"{name}: {view}" for name in rows.classes for view in ("model", "SAE")))]
    for i in range(BINS):
        low = -end + 2 * end * i / BINS
        bars = ("#" * round(BAR * bins[i] / largest) for of_class in counts for bins in of_class)
        table.append((f"{low:+.2f} .. {low + 2 * end / BINS:+.2f}", *bars))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _rows(rows: CellRows) -> str:
    table: list[Row] = [("outcome", "name", "label", "lost", "model", "SAE", "transfer", "text before it")]
    for row in rows.order[:SHOWN]:
        text = rows.text(row)
        before, name, _ = ("", f"person {rows.persons[row]}", "") if text is None else excerpt(text, BEFORE, NAME)
        scores = (rows.lost[row], rows.model[row], rows.sae[row], None if rows.transfer is None else rows.transfer[row])
        shown = (number(score, "+.2f") for score in scores)
        table.append((OUTCOMES[rows.outcome[row]], name, rows.classes[int(rows.labels[row])], *shown, before))
    told = f"\n({len(rows.labels) - SHOWN} more: as CSV, all)" if len(rows.labels) > SHOWN else ""
    return aligned(table) + told
