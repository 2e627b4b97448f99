"""The rows of all cells for the page, compressed. The 200 most informative rows of a cell include their texts.

packed(study, max_bytes, RowsReader())    # base64 of gzip of JSON, at most `max_bytes` long; None without stored scores
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from delta_selectivity.errors import RequestError
from delta_selectivity.records import latents as latent_file
from delta_selectivity.records.texts import Text
from delta_selectivity.reporting.names import elide_middle
from delta_selectivity.reporting.row_tables import excerpt
from delta_selectivity.reporting.rows import OUTCOMES, CellRows, Place, places
from delta_selectivity.reporting.study import Study
from delta_selectivity.system.terminal import printable

TOP = 160  # rows with the largest losses, whose texts are in the page
BOTTOM = 40  # rows with the largest gains, whose texts are in the page too
SHARES = (1.0, 0.5, 0.25, 0.1)  # shares of those rows to try if the page would be too large
BEFORE, NAME, AFTER = 220, 80, 40  # characters of a text before, in and after the name
CARRIERS, MAX_EXAMPLE = 15, 90  # latents of a cell, and characters of their example texts
MAX_NAME = 120  # characters of a person's key or a class

Json = dict[str, Any]


def packed(study: Study, max_bytes: int, read: Callable[[Place], CellRows]) -> str | None:
    """Return the rows in at most `max_bytes`: all of them, else the most informative ones; None if there are none."""
    cells = [(number, rows, _cell_facts(rows)) for number, rows in _cells_with_rows(study, read)]
    latents = dict(_cells_with_latents(study))
    if not cells and not latents:
        return None
    for share in (None, *SHARES):
        text = _packed(cells, latents, share)
        if len(text) <= max_bytes:
            return text
    return None


def _cells_with_rows(study: Study, read: Callable[[Place], CellRows]) -> Iterator[tuple[int, CellRows]]:
    """Yield the number and the rows of each cell with stored scores."""
    for sae in study.saes_and_baselines:
        for cell, place in zip(sae.cells, places(sae), strict=True):
            if cell.measured:
                try:
                    yield study.numbers[id(cell)], read(place)
                except RequestError:
                    continue


def _packed(cells: Sequence[tuple[int, CellRows, Json]], latents: Json, share: float | None) -> str:
    texts = _Texts()
    content = {number: {**about, **_row_lines(rows, texts, share)} for number, rows, about in cells}
    return packed_json({"cells": content, "texts": texts.shown, "latents": latents})


def packed_json(value: Any) -> str:
    """Return base64 of gzip of JSON, which the page's script decompresses."""
    whole = json.dumps(value, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(whole, compresslevel=9, mtime=0)).decode()


def _cells_with_latents(study: Study) -> Iterator[tuple[str, Json]]:
    """Yield the number and the stored latents of each cell that has them."""
    for sae in study.saes_and_baselines:
        for cell, place in zip(sae.cells, places(sae), strict=True):
            (path, results), layer, probe = place
            stored = latent_file.load(path, results["_run"]["key"], layer, probe)
            if stored is not None:
                yield str(study.numbers[id(cell)]), _latent_lines(stored)


def _latent_lines(stored: Json) -> Json:
    lines = [
        [
            one["latent"], *(round(one[name], 4) for name in ("share", "dropped", "rate_0", "rate_1", "auc")),
            [excerpt(Text(text, start, end, ""), MAX_EXAMPLE, NAME) for text, start, end in one["examples"]],
            one["address"],
        ]
        for one in stored["latents"][:CARRIERS]
    ]  # fmt: skip
    others = stored["others"] + sum(one["share"] for one in stored["latents"][CARRIERS:])
    return {"latents": lines, "others": round(others, 4), "error": round(stored["error"], 4)}


def _cell_facts(rows: CellRows) -> Json:
    """Return what the page shows of a cell besides its rows: counts by outcome and group, and histograms."""
    end, histogram = rows.histogram()
    return {
        "n": len(rows.order),
        "classes": [elide_middle(printable(name), MAX_NAME) for name in rows.classes],
        "outcomes": OUTCOMES,
        "counts": [
            [by, [[name, counts, _loss_numbers(rows, by, name)] for name, counts in of]] for by, of in rows.counts()
        ],
        "end": round(end, 3),
        "histogram": histogram,
    }


def _row_lines(rows: CellRows, texts: _Texts, share: float | None) -> Json:
    top, bottom = (max(int(n * (share or 1.0)), 1) for n in (TOP, BOTTOM))
    n = len(rows.order)
    informative = np.concatenate([rows.order[:top], rows.order[max(n - bottom, top) :]])
    chosen = rows.order if share is None else informative
    with_text = set(informative.tolist())
    views = (rows.model, rows.sae, *(() if rows.transfer is None else (rows.transfer,)))
    return {
        "texts": [texts.place(rows, int(row), int(row) in with_text) for row in chosen],
        "labels": rows.labels[chosen].astype(int).tolist(),
        "scores": [_hundredths(view[chosen]) for view in views],
    }


def _loss_numbers(rows: CellRows, by: str, group: str) -> list[float] | None:
    """Return delta_sel of a group with interval, and its difference from all others with interval and q."""
    loss = rows.losses.get((by, group))
    if loss is None:
        return None
    numbers = [x for one in (loss.delta_sel, loss.against) for x in (one.value, one.low, one.high)]
    return [round(value, 4) for value in (*numbers, 1.0 if loss.q_value is None else loss.q_value)]


def _hundredths(values: np.ndarray) -> list[int]:
    """Return scores in hundredths; scores that would round to 0 keep their sign, which is the prediction."""
    rounded = np.round(values * 100).astype(np.int64)
    return np.where((rounded <= 0) & (values > 0), 1, np.where((rounded > 0) & (values <= 0), 0, rounded)).tolist()


class _Texts:
    """The texts of the page, each stored once as [before the name, the name, after it, the person]."""

    def __init__(self) -> None:
        self.shown: list[list[str]] = []
        self._places: dict[Any, int] = {}

    def place(self, rows: CellRows, row: int, in_full: bool) -> int:
        """Return the index of a row's text, stored with the text around the name only if a row needs it in full."""
        text = rows.text(row)
        if text is None:
            return self._add(int(rows.persons[row]), ["", "", "", f"person {rows.persons[row]}"])
        key = (text.text, text.start, text.end)
        name, person = elide_middle(printable(" ".join(text.name[: 4 * NAME].split())), NAME), _person_text(text.person)
        place = self._add(key, ["", name, "", person])
        if in_full and not self.shown[place][0]:
            self.shown[place] = [*excerpt(text, BEFORE, NAME, AFTER), person]
        return place

    def _add(self, key: Any, shown: list[str]) -> int:
        if key not in self._places:
            self._places[key] = len(self.shown)
            self.shown.append(shown)
        return self._places[key]


def _person_text(key: str) -> str:
    return elide_middle(printable(key[: 4 * MAX_NAME]), MAX_NAME)
