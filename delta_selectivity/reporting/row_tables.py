"""The rows of a cell as text for a terminal, and as CSV."""

from __future__ import annotations

from pathlib import Path

from delta_selectivity.records.texts import Text
from delta_selectivity.reporting.csv_file import csv_text
from delta_selectivity.reporting.groups import dataset_of
from delta_selectivity.reporting.names import elide_middle
from delta_selectivity.reporting.numbers import number
from delta_selectivity.reporting.rows import COLUMNS, OUTCOMES, CellRows, Place
from delta_selectivity.reporting.tables import Row, aligned
from delta_selectivity.system.terminal import one_line
from delta_selectivity.system.whole_file import replacing

MAX_ROWS = 25  # rows
BEFORE, NAME = 60, 30  # characters of a text and of a name
BINS, BAR = 12, 30  # of the histogram, and characters of its longest bar


def rows_text(place: Place, rows: CellRows) -> str:
    """Return the losses in a cell as text: counts, a histogram, and the rows with the largest losses."""
    head = f"{dataset_of(place.file)}, {place.probe}, layer {place.layer}: {len(rows.labels)} rows"
    counts = (_counts(rows, by, groups) for by, groups in rows.counts())
    parts = [one_line(head), *counts, _histogram(rows), _rows(rows)]
    note = (
        "Scores are means over the partitions; a positive score predicts the positive class.\n"
        "lost: how far the score moved towards the wrong class. lost share: of the rows that the model gets right.\n"
        "q: Benjamini-Hochberg over the groups of this cell."
    )
    if rows.kept is None:
        note += "\nThe texts were not stored, and there are no task data from which to look them up."
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
    return f"{head}{gap}", elide_middle(one_line(text.name[: 4 * name]), name), f"{lead}{tail}" if after else ""


def _counts(rows: CellRows, by: str, groups: list[tuple[str, list[int]]]) -> str:
    """Return the number of rows of each group by outcome, and for groups of people their losses and those of others."""
    has_losses = any((by, name) in rows.losses for name, _ in groups)
    loss_heads = ("delta_sel", "95 % interval", "minus that of all others", "95 % interval", "q") if has_losses else ()
    table: list[Row] = [(by, "rows", *OUTCOMES, "lost share", *loss_heads)]
    for name, counts in groups:
        n_right, loss = counts[0] + counts[2], rows.losses.get((by, name))
        loss_columns: tuple[str, ...] = ("",) * len(loss_heads)
        if loss is not None:
            loss_columns = tuple(
                text
                for estimate in (loss.delta_sel, loss.against)
                for text in (f"{estimate.value:+.3f}", f"{estimate.low:+.3f} .. {estimate.high:+.3f}")
            )
            loss_columns = (*loss_columns, number(loss.q_value, ".3f"))
        table.append(
            (name, str(sum(counts)), *map(str, counts), f"{counts[0] / n_right:.0%}" if n_right else "-", *loss_columns)
        )
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
    for row in rows.order[:MAX_ROWS]:
        text = rows.text(row)
        before, name, _ = ("", f"person {rows.persons[row]}", "") if text is None else excerpt(text, BEFORE, NAME)
        scores = (rows.lost[row], rows.model[row], rows.sae[row], None if rows.transfer is None else rows.transfer[row])
        shown = (number(score, "+.2f") for score in scores)
        table.append((OUTCOMES[rows.outcome[row]], name, rows.classes[int(rows.labels[row])], *shown, before))
    more = (
        f"\n({len(rows.labels) - MAX_ROWS} more rows: write a CSV file for all)" if len(rows.labels) > MAX_ROWS else ""
    )
    return aligned(table) + more
