"""Summary sentences of a report: rank of SAEs, preserved and lost probes, and undecided cells."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from delta_selectivity.records.verdicts import LOST, MOVED, PRESERVED, UNDECIDED, is_known
from delta_selectivity.reporting.numbers import number, signed
from delta_selectivity.reporting.ranking import rank
from delta_selectivity.reporting.study import Cell, Sae, Study

NAMED = 3  # maximum number of SAEs or probes in a sentence
Placed = tuple[Sae, Cell]


def opening(study: Study) -> list[str]:
    """Return the sentences, from the verdicts of all cells that are shown in full; empty if nothing was measured."""
    cells = [(sae, cell) for sae in study.in_full for cell in sae.measured]
    ranked = rank(study).sentence()
    first = [] if ranked is None else [f"Ranked: {ranked}"]
    return [*first, _kept(study, cells), _lost(study, cells), _undecided(cells)] if cells else []


def _kept(study: Study, cells: Sequence[Placed]) -> str:
    kept = _with(cells, PRESERVED)
    if not kept:
        return f"Kept: in none of {_cells(len(cells))} are these data enough to show that nothing was lost."
    return f"Kept: {len(kept)} of {_cells(len(cells))} {_are(kept)} preserved{_by_sae(study, kept)}{_by_probe(kept)}."


def _lost(study: Study, cells: Sequence[Placed]) -> str:
    lost, moved = _with(cells, LOST), _with(cells, MOVED)
    turned = f"{len(moved)} moved (a probe fitted anew finds the answer, the model's own probe does not)"
    if not lost:
        return f"Lost: no cell is shown to be lost{f'; {turned}' if moved else ''}."
    sae, worst = min(lost, key=lambda placed: placed[1].result["delta_sel"])
    of = f" of {sae.label}" if len(study.in_full) > 1 else ""
    most = f"most at {worst.probe}, layer {worst.layer}{of} ({signed(worst.result['delta_sel'])})"
    also = f"; {turned}" if moved else ""
    return f"Lost: {len(lost)} of {_cells(len(cells))} {_are(lost)} lost{_by_sae(study, lost)}, {most}{also}."


def _undecided(cells: Sequence[Placed]) -> str:
    open_ = _with(cells, UNDECIDED)
    if not open_:
        return f"Undecided: these data decide all of {_cells(len(cells))}."
    unknown = [placed for placed in open_ if not is_known(placed[1].result)]
    reasons = [f"in {len(unknown)} the model itself is not shown to know the answer"] if unknown else []
    known = [cell.result["detectable"] for _, cell in open_ if is_known(cell.result)]
    found = [value for value in known if value is not None]
    if found:
        typical = number(statistics.median(found), ".3f")
        reasons.append(f"in {len(known)} a change below about {typical} would go unseen")
    told = f": {'; '.join(reasons)}" if reasons else ""
    return f"Undecided: these data cannot tell of {len(open_)} of {_cells(len(cells))}{told}{_by_probe(open_)}."


def _with(cells: Sequence[Placed], word: str) -> list[Placed]:
    return [placed for placed in cells if placed[1].verdict == word]


def _cells(n: int) -> str:
    return f"{n} cell{'' if n == 1 else 's'}"


def _are(found: Sequence[Placed]) -> str:
    return "is" if len(found) == 1 else "are"


def _by_sae(study: Study, found: Sequence[Placed]) -> str:
    """Return the counts by SAE if there are several; of many SAEs the largest and the smallest count."""
    if len(study.in_full) == 1:
        return ""
    counts = Counter(sae.label for sae, _ in found)
    ordered = sorted(study.in_full, key=lambda sae: -counts[sae.label])
    told = [f"{counts[sae.label]} of {len(sae.measured)} of {sae.label}" for sae in ordered]
    return f" ({', '.join(told)})" if len(told) <= NAMED else f" (from {told[0]} to {told[-1]})"


def _by_probe(found: Sequence[Placed]) -> str:
    """Return the most frequent probes among the cells, if there are several."""
    counts = Counter(cell.probe for _, cell in found)
    if len(counts) < 2:
        return ""
    return f"; most often {', '.join(f'{probe} ({n})' for probe, n in counts.most_common(NAMED))}"
