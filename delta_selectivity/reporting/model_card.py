"""Add results to a model card: `model-index` metadata and a table, between markers, without other changes.

with_results(card, "sae-k32", results, body)      # the card with our two blocks added or replaced
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.records.sae_level import mean_delta, mean_transfer_r2
from delta_selectivity.reporting.groups import stored_cells
from delta_selectivity.reporting.results import mean
from delta_selectivity.reporting.study import Sae

MARKS = ("# delta-selectivity: begin", "# delta-selectivity: end")
"""Markers around our entry in the metadata."""
BODY_MARKS = ("<!-- delta-selectivity: begin -->", "<!-- delta-selectivity: end -->")
"""Markers around our section in the text."""
SOURCE = "Delta Selectivity"
TASK = "feature-extraction"
SCORES = {
    "transfer_r2": "R² between the outputs of the model's probes on the reconstruction and on the activations",
    "delta_sel": "change in balanced accuracy",
}
PAGE = "report.html"

_FRONT = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Score:
    """A score of one dataset, or of all, with its 95 % interval if the stored scores exist."""

    dataset: str  # as in file names; "" for all
    name: str
    value: float
    low: float | None
    high: float | None


def scores_of(sae: Sae) -> list[Score]:
    """Return the means over all cells, then those of each dataset. Raises `RequestError` if there are none."""
    scores_found = [(("", name), *sae.overall(name)) for name in SCORES]
    cells = stored_cells(sae.files) or {}
    for dataset in dict.fromkeys(cell.dataset for cell in sae.measured):
        cells_of_dataset = {place: scores for place, scores in cells.items() if place[0] == dataset}
        results = [cell.result for cell in sae.measured if cell.dataset == dataset]
        for name, over in (("transfer_r2", mean_transfer_r2), ("delta_sel", mean_delta)):
            known = over(cells_of_dataset) if cells_of_dataset else None
            if known is None:
                scores_found.append(((dataset, name), mean(result[name] for result in results), None, None))
            else:
                scores_found.append(((dataset, name), known.value, known.low, known.high))
    scores = [Score(*of, value, low, high) for of, value, low, high in scores_found if value is not None]
    if not scores:
        raise RequestError(f"{sae.name}: the files have no measured results for it")
    return scores


def model_index(sae: Sae, name: str, url: str) -> list[dict[str, Any]]:
    """Return the Hub's metadata: a result for each dataset, with a metric for each score.

    Args:
        sae: The measured SAE.
        name: Name of the model that the card describes.
        url: Address of the page with all numbers.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    layers = sorted({cell.layer for cell in sae.measured})
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Probes on the reconstruction",
            dataset_type=score.dataset or "all",
            dataset_name=_title(score.dataset),
            dataset_args={"layers": layers},
            metric_type=score.name,
            metric_name=f"{score.name} ({SCORES[score.name]})",
            metric_value=round(score.value, 6),
            metric_args=_interval(score),
            source_name=SOURCE,
            source_url=url,
        )
        for score in scores_of(sae)
    ]
    metadata: list[dict[str, Any]] = eval_results_to_model_index(name, results)
    return metadata


def body_of(sae: Sae, folder: str) -> str:
    """Return a section in Markdown with a line for each dataset. `folder`: folder of the page in the repository."""
    by_dataset: dict[str, dict[str, Score]] = {}
    for score in scores_of(sae):
        by_dataset.setdefault(score.dataset, {})[score.name] = score
    rows = [
        f"| {_title(dataset)} | {' | '.join(_score_text(scores.get(name)) for name in SCORES)} |"
        for dataset, scores in by_dataset.items()
    ]
    layers = ", ".join(map(str, sorted({cell.layer for cell in sae.measured})))
    fvu, l0 = sae.mean_figure("fvu_whole"), sae.mean_figure("l0")
    figures = [f"{name} {value:.3g}" for name, value in (("FVU", fvu), ("L0", l0)) if value is not None]
    return "\n".join([
        "## What the SAE keeps",
        "",
        "Probes are trained on the model's activations and evaluated on the SAE's reconstruction. The table has means "
        f"over layers and probes with 95 % intervals. Layers {layers}{''.join(f'; {one}' for one in figures)}.",
        "",
        f"| dataset | {' | '.join(SCORES)} |",
        f"|---|{'---:|' * len(SCORES)}",
        *rows,
        "",
        f"`transfer_r2`: {SCORES['transfer_r2']} (1: identical). "
        f"`delta_sel`: {SCORES['delta_sel']} of a probe fitted anew on the reconstruction (0: nothing lost). "
        f"[All numbers]({folder}/{PAGE}).",
    ])  # fmt: skip


def _title(dataset: str) -> str:
    return dataset or "all datasets"


def _interval(score: Score) -> dict[str, float] | None:
    if score.low is None or score.high is None:
        return None
    return {"confidence": 0.95, "low": round(score.low, 6), "high": round(score.high, 6)}


def _score_text(score: Score | None) -> str:
    if score is None or score.low is None or score.high is None:
        return "–" if score is None else f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def with_results(card: str, index: Sequence[Mapping[str, Any]], body: str) -> str:
    """Return the card with metadata and section added; all other text is unchanged.

    Raises:
        RequestError: The card's metadata is not valid YAML, or has a model-index that cannot be extended.
    """
    end = "\r\n" if "\r\n" in card else "\n"
    before = _parsed(card)
    front = _FRONT.match(card)
    if front is None:
        head, rest = f"---{end}{_with_entry('', index, end)}---{end}", card
    else:
        head = f"{front[1]}{_with_entry(front[2], index, end)}{front[3]}"
        rest = card[front.end() :]
    new_card = head + _with_section(rest, body, end)
    _check(before, _parsed(new_card), index)
    return new_card


def _with_entry(yaml: str, index: Sequence[Mapping[str, Any]], end: str) -> str:
    from huggingface_hub.utils import yaml_dump

    lines = yaml.splitlines(keepends=True)
    entry = yaml_dump(list(index), sort_keys=False).splitlines()
    own_lines = [i for i, line in enumerate(lines) if line.strip() in MARKS]
    key = next((i for i, line in enumerate(lines) if line.startswith("model-index:")), None)
    if len(own_lines) == 2:
        start, stop = own_lines[0], own_lines[1] + 1
        indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    elif key is None:
        start = stop = len(lines) + 1
        lines, indent = [*lines, f"model-index:{end}"], ""
    else:
        if lines[key].split("#")[0].strip() != "model-index:":
            raise RequestError("the card's model-index is written in one line: write it as a YAML block list first")
        start = stop = _last_line_of(lines, key) + 1
        item = next((line for line in lines[key + 1 : start] if line.lstrip().startswith("-")), "")
        indent = item[: len(item) - len(item.lstrip())]
    block = [f"{indent}{line}{end}" for line in (MARKS[0], *entry, MARKS[1])]
    return "".join([*lines[:start], *block, *lines[stop:]])


def _last_line_of(lines: Sequence[str], key: int) -> int:
    """Return the last line of the value of a top-level key."""
    last = key
    for i, line in enumerate(lines[key + 1 :], key + 1):
        if line[0] in " \t-" and line.strip():
            last = i
        elif line.strip() and not line.startswith("#"):
            break
    return last


def _with_section(text: str, body: str, end: str) -> str:
    section = end.join([BODY_MARKS[0], *body.splitlines(), BODY_MARKS[1]])
    begin, stop = (text.find(mark) for mark in BODY_MARKS)
    if 0 <= begin < stop:
        return text[:begin] + section + text[stop + len(BODY_MARKS[1]) :]
    return f"{text}{'' if text.endswith(end) or not text else end}{end}{section}{end}"


def _parsed(card: str) -> dict[str, Any]:
    """Return the parsed metadata of a card."""
    import yaml

    front = _FRONT.match(card)
    try:
        metadata = yaml.safe_load(front[2]) if front else {}
    except yaml.YAMLError as error:
        raise RequestError(f"the card's metadata is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict | None):
        raise RequestError("the card's metadata is no mapping")
    return metadata or {}


def _check(before: dict[str, Any], after: dict[str, Any], index: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RequestError` if anything except our entry has changed in the metadata."""
    theirs = [entry for entry in before.pop("model-index", None) or [] if not _is_ours(entry)]
    entries = after.pop("model-index")
    if (
        before != after
        or [e for e in entries if not _is_ours(e)] != theirs
        or [e for e in entries if _is_ours(e)] != [*index]
    ):
        raise RequestError(
            "nothing can be added to the card's metadata: its model-index, or our entry in it, was changed by hand: "
            "remove our entry first"
        )


def _is_ours(entry: Any) -> bool:
    results = entry.get("results") if isinstance(entry, dict) else None
    sources = [result.get("source") for result in results or () if isinstance(result, dict)]
    return any(isinstance(source, dict) and source.get("name") == SOURCE for source in sources)
