"""Summary sentences of a report: the rank of the SAEs, and the preserved, lost and undecided cells."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from delta_selectivity.records.verdicts import LOST, MOVED, PRESERVED, UNDECIDED, is_known
from delta_selectivity.reporting.numbers import number, signed
from delta_selectivity.reporting.ranking import rank
from delta_selectivity.reporting.study import Cell, Sae, Study

MAX_NAMED = 3  # maximum number of SAEs or probes in a sentence
Placed = tuple[Sae, Cell]


def opening(study: Study) -> list[str]:
    """Return the sentences, from the verdicts of the SAEs' cells; empty if nothing was measured."""
    cells = [(sae, cell) for sae in study.shown_in_full for cell in sae.measured]
    ranked = rank(study).sentence()
    first = [] if ranked is None else [f"Ranked: {ranked}"]
    sentences = [*first, _preserved_sentence(study, cells), _lost_sentence(study, cells), _undecided_sentence(cells)]
    return sentences if cells else []


def _preserved_sentence(study: Study, cells: Sequence[Placed]) -> str:
    preserved = _having(cells, PRESERVED)
    if not preserved:
        return f"Preserved: none of {_cells(len(cells))} is shown to be preserved."
    counts = f"{len(preserved)} of {_cells(len(cells))} {_be(preserved)} preserved"
    return f"Preserved: {counts}{_by_sae(study, preserved)}{_by_probe(preserved)}."


def _lost_sentence(study: Study, cells: Sequence[Placed]) -> str:
    lost, moved = _having(cells, LOST), _having(cells, MOVED)
    moved_text = f"{len(moved)} moved (a probe fitted anew finds the answer, but the model's own probe does not)"
    if not lost:
        return f"Lost: no cell is shown to be lost{f'; {moved_text}' if moved else ''}."
    sae, worst = min(lost, key=lambda placed: placed[1].result["delta_sel"])
    of = f" of {sae.label}" if len(study.shown_in_full) > 1 else ""
    most = f"the largest loss is {worst.probe}, layer {worst.layer}{of} ({signed(worst.result['delta_sel'])})"
    also = f"; {moved_text}" if moved else ""
    return f"Lost: {len(lost)} of {_cells(len(cells))} {_be(lost)} lost{_by_sae(study, lost)}; {most}{also}."


def _undecided_sentence(cells: Sequence[Placed]) -> str:
    undecided = _having(cells, UNDECIDED)
    if not undecided:
        return f"Undecided: none of {_cells(len(cells))}."
    unknown = [placed for placed in undecided if not is_known(placed[1].result)]
    reasons = [f"in {len(unknown)} of them the model itself is not shown to know the answer"] if unknown else []
    known = [cell.result["detectable"] for _, cell in undecided if is_known(cell.result)]
    detectable = [value for value in known if value is not None]
    if detectable:
        typical = number(statistics.median(detectable), ".3f")
        reasons.append(f"in {len(known)} a change below about {typical} would not be detected")
    text = "; ".join(reasons)
    details = f" {text[0].upper()}{text[1:]}." if text else ""
    counts = f"{len(undecided)} of {_cells(len(cells))} {_be(undecided)} undecided"
    return f"Undecided: {counts}{_by_probe(undecided)}.{details}"


def _having(cells: Sequence[Placed], word: str) -> list[Placed]:
    return [placed for placed in cells if placed[1].verdict == word]


def _cells(n: int) -> str:
    return f"{n} cell{'' if n == 1 else 's'}"


def _be(cells: Sequence[Placed]) -> str:
    return "is" if len(cells) == 1 else "are"


def _by_sae(study: Study, cells: Sequence[Placed]) -> str:
    """Return the counts by SAE if there are several; if there are many, only the largest and the smallest count."""
    if len(study.shown_in_full) == 1:
        return ""
    counts = Counter(sae.label for sae, _ in cells)
    ordered = sorted(study.shown_in_full, key=lambda sae: -counts[sae.label])
    counts_text = [f"{counts[sae.label]} of {len(sae.measured)} of {sae.label}" for sae in ordered]
    return (
        f" ({', '.join(counts_text)})"
        if len(counts_text) <= MAX_NAMED
        else f" (from {counts_text[0]} to {counts_text[-1]})"
    )


def _by_probe(cells: Sequence[Placed]) -> str:
    """Return the most frequent probes among the cells, if there are several."""
    counts = Counter(cell.probe for _, cell in cells)
    if len(counts) < 2:
        return ""
    return f"; most often {', '.join(f'{probe} ({n})' for probe, n in counts.most_common(MAX_NAMED))}"
