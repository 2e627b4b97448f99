"""The rows of all cells for the page: for each cell the 200 most informative ones with their texts, compressed.

packed(study, room)         # base64 of gzip of JSON, at most `room` bytes; None without stored scores
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from delta_selectivity.errors import RequestError
from delta_selectivity.records import latents as latent_file
from delta_selectivity.records.texts import Text
from delta_selectivity.reporting.names import abridged
from delta_selectivity.reporting.row_tables import excerpt
from delta_selectivity.reporting.rows import OUTCOMES, CellRows, places, rows_of
from delta_selectivity.reporting.study import Study
from delta_selectivity.system.terminal import printable

TOP = 160  # rows with the largest losses, whose texts are in the page
BOTTOM = 40  # rows with the largest gains, whose texts are in the page too
FEWER = (1.0, 0.5, 0.25, 0.1)  # shares of those rows to try if the page would be too large
BEFORE, NAME, AFTER = 220, 80, 40  # characters of a text before, in and after the name
CARRIERS, SHORT = 15, 90  # latents of a cell, and characters of their example texts
LONGEST = 120  # characters of a person's key or a class

Json = dict[str, Any]


def packed(study: Study, room: int) -> str | None:
    """Return the rows in at most `room` bytes: all of them, else the most informative; None if there are none."""
    found, latents = [(number, rows, _about(rows)) for number, rows in _found(study)], dict(_latents(study))
    if not found and not latents:
        return None
    for share in (None, *FEWER):
        text = _packed(found, latents, share)
        if len(text) <= room:
            return text
    return None


def _found(study: Study) -> Iterator[tuple[int, CellRows]]:
    """Yield the number and the rows of each cell with stored scores."""
    for sae in study.everything:
        for cell, place in zip(sae.cells, places(sae), strict=True):
            if cell.measured:
                try:
                    yield study.numbers[id(cell)], rows_of(place, fetch=False)
                except RequestError:
                    continue


def _packed(found: Sequence[tuple[int, CellRows, Json]], latents: Json, share: float | None) -> str:
    texts = _Texts()
    content = {number: {**about, **_lines(rows, texts, share)} for number, rows, about in found}
    return packed_json({"cells": content, "texts": texts.shown, "latents": latents})


def packed_json(value: Any) -> str:
    """Return base64 of gzip of JSON, which the page's script decompresses."""
    whole = json.dumps(value, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(whole, compresslevel=9, mtime=0)).decode()


def _latents(study: Study) -> Iterator[tuple[str, Json]]:
    """Yield the number and the stored latents of each cell that has them."""
    for sae in study.everything:
        for cell, place in zip(sae.cells, places(sae), strict=True):
            (path, results), layer, probe = place
            kept = latent_file.load(path, results["_run"]["key"], layer, probe)
            if kept is not None:
                yield str(study.numbers[id(cell)]), _carriers(kept)


def _carriers(kept: Json) -> Json:
    lines = [
        [
            one["latent"], *(round(one[name], 4) for name in ("share", "dropped", "rate_0", "rate_1", "auc")),
            [excerpt(Text(text, start, end, ""), SHORT, NAME) for text, start, end in one["examples"]], one["address"],
        ]
        for one in kept["latents"][:CARRIERS]
    ]  # fmt: skip
    others = kept["others"] + sum(one["share"] for one in kept["latents"][CARRIERS:])
    return {"latents": lines, "others": round(others, 4), "error": round(kept["error"], 4)}


def _about(rows: CellRows) -> Json:
    """Return the facts about a cell that are included for any number of rows."""
    end, histogram = rows.histogram()
    return {
        "n": len(rows.order),
        "classes": [abridged(printable(name), LONGEST) for name in rows.classes],
        "outcomes": OUTCOMES,
        "counts": [[by, [[name, counts, _loss(rows, by, name)] for name, counts in of]] for by, of in rows.counts()],
        "end": round(end, 3),
        "histogram": histogram,
    }


def _lines(rows: CellRows, texts: _Texts, share: float | None) -> Json:
    top, bottom = (max(int(n * (share or 1.0)), 1) for n in (TOP, BOTTOM))
    n = len(rows.order)
    telling = np.concatenate([rows.order[:top], rows.order[max(n - bottom, top) :]])
    chosen = rows.order if share is None else telling
    with_text = set(telling.tolist())
    views = (rows.model, rows.sae, *(() if rows.transfer is None else (rows.transfer,)))
    return {
        "texts": [texts.place(rows, int(row), int(row) in with_text) for row in chosen],
        "labels": rows.labels[chosen].astype(int).tolist(),
        "scores": [_hundredths(view[chosen]) for view in views],
    }


def _loss(rows: CellRows, by: str, group: str) -> list[float] | None:
    """Return delta_sel of a group with interval, and its difference from all others with interval and q."""
    loss = rows.losses.get((by, group))
    if loss is None:
        return None
    found = [x for one in (loss.delta_sel, loss.against) for x in (one.value, one.low, one.high)]
    return [round(value, 4) for value in (*found, 1.0 if loss.q_value is None else loss.q_value)]


def _hundredths(values: np.ndarray) -> list[int]:
    """Return scores in hundredths; the smallest keep their sign, which is the prediction."""
    found = np.round(values * 100).astype(np.int64)
    return np.where((found <= 0) & (values > 0), 1, np.where((found > 0) & (values <= 0), 0, found)).tolist()


class _Texts:
    """The shown texts, each stored once: before the name, the name, after it, the person."""

    def __init__(self) -> None:
        self.shown: list[list[str]] = []
        self._places: dict[Any, int] = {}

    def place(self, rows: CellRows, row: int, in_full: bool) -> int:
        """Return the index of a row's text, stored with its context only if any of its rows is shown in full."""
        text = rows.text(row)
        if text is None:
            return self._add(int(rows.persons[row]), ["", "", "", f"person {rows.persons[row]}"])
        key = (text.text, text.start, text.end)
        name, person = abridged(printable(" ".join(text.name[: 4 * NAME].split())), NAME), _person(text.person)
        place = self._add(key, ["", name, "", person])
        if in_full and not self.shown[place][0]:
            self.shown[place] = [*excerpt(text, BEFORE, NAME, AFTER), person]
        return place

    def _add(self, key: Any, shown: list[str]) -> int:
        if key not in self._places:
            self._places[key] = len(self.shown)
            self.shown.append(shown)
        return self._places[key]


def _person(key: str) -> str:
    return abridged(printable(key[: 4 * LONGEST]), LONGEST)
