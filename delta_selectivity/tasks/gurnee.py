"""Reader for the folders of Gurnee et al. 2023, e.g. `wikidata_sorted_sex_or_gender.pyth.128.6000`.

Source: arXiv 2305.01610. The folders are written by `datasets.save_to_disk` in github.com/wesg52/sparse-probing-paper,
`probing_datasets/wikidata.py`. `tokens` is BOS (id 0) and the last 127 tokens of a text that ends with the name, padded
on the right with id 0, which is also BOS and end of text. Padding is therefore recognised by position, not by value.
The name's positions are inclusive and count the BOS. `text` includes the decoded padding and is only for human readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.people import plain_key
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task

_PREFIX = "wikidata_sorted_"
_BOS = 0
_END_OF_TEXT = "<|endoftext|>"
_COLUMNS = ("name", "text", "tokens", "name_index_start", "surname_index_end", "class")

# dataset -> the property in the folder's name
_PROPERTIES = {
    "gender": "sex_or_gender",
    "occupation": "occupation",
    "politics": "political_party",
    "athlete": "occupation_athlete",
    "is_alive": "is_alive",
}
# property -> (probe, the class that counts as 1)
_PROBES: dict[str, tuple[tuple[str, str], ...]] = {
    "sex_or_gender": (("gender", "female"),),
    "occupation": (
        ("is_actor", "actor"),
        ("is_journalist", "journalist"),
        ("is_politician", "politician"),
        ("is_researcher", "researcher"),
        ("is_singer", "singer"),
    ),
    "political_party": (("politics", "Democratic Party"),),
    "occupation_athlete": (
        ("plays_football", "American football player"),
        ("plays_basketball", "basketball player"),
        ("plays_baseball", "baseball player"),
        ("plays_soccer", "association football player"),
        ("plays_hockey", "ice hockey player"),
    ),
    "is_alive": (("is_alive", "true"),),
}
_IS_ATHLETE = (("is_athlete", "athlete"),)


def load_gurnee(name: str, data_dir: Path) -> Task:
    """Read dataset `name` from its folder below `data_dir`, with all rows.

    The athlete dataset also has the probe `is_athlete` if the occupation folder exists and has that class.
    Raises `RequestError` if the folder is missing, exists twice, or has other content.
    """
    folders = _folders(data_dir)
    wanted = _PROPERTIES[name]
    if wanted not in folders:
        found = ", ".join(path.name for path in folders.values()) or "no such folder"
        raise RequestError(f"`data_dir` {data_dir}: no {_PREFIX}{wanted}.* for {name}; found {found}")
    row_sets = [_row_set(folders[wanted], _PROBES[wanted])]
    if name == "athlete" and "occupation" in folders:
        general = _row_set(folders["occupation"], _IS_ATHLETE)
        row_sets = [general, *row_sets] if general.probes else row_sets
    return Task(name=name, slug=f"wikidata_{name}", row_sets=tuple(row_sets), is_public=True)


def _folders(data_dir: Path) -> dict[str, Path]:
    """Return property -> folder. Raises `RequestError` if one property has two folders."""
    if not data_dir.is_dir():
        raise RequestError(f"`data_dir` {data_dir}: no such folder")
    folders: dict[str, Path] = {}
    for path in sorted(data_dir.glob(f"{_PREFIX}*")):
        key = path.name.removeprefix(_PREFIX).partition(".")[0]
        if path.is_dir() and folders.setdefault(key, path) != path:
            raise RequestError(
                f"`data_dir` {data_dir}: both {folders[key].name} and {path.name} have {key}: remove one"
            )
    return folders


def _row_set(folder: Path, probes: Sequence[tuple[str, str]]) -> RowSet:
    """Read the rows of `folder`, with those of `probes` whose class occurs in it."""
    import datasets  # slow import, needed for these folders only

    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: not a folder written by datasets ({_one_line(error)})") from error
    missing = [column for column in _COLUMNS if column not in table.column_names]
    if missing:
        raise RequestError(f"{folder}: no column {missing[0]!r}; found {table.column_names}")
    records = table.select_columns(list(_COLUMNS)).with_format(None)  # the stored format is tensors
    rows = tuple(
        Row(_mention(record, f"{folder}, row {number}"), record["class"])
        for number, record in enumerate(records, start=1)
    )
    present = {row.value for row in rows}
    return RowSet(rows, tuple(ProbeSpec(*probe) for probe in probes if probe[1] in present))


def _mention(record: dict[str, Any], where: str) -> Mention:
    """Convert one record to our convention: no BOS, no padding, name positions shifted accordingly."""
    tokens: list[int] = record["tokens"]
    first, last = int(record["name_index_start"]), int(record["surname_index_end"])
    offset = int(bool(tokens) and tokens[0] == _BOS)
    length = max((i + 1 for i, token in enumerate(tokens) if token != _BOS), default=0)
    if not offset <= first <= last < length:
        raise RequestError(
            f"{where}: the name {record['name']!r} is at tokens {first} to {last}, outside {offset} to {length - 1}"
        )
    text, start, end = _readable(record["text"], record["name"])
    return Mention(
        text=text,
        start=start,
        end=end,
        person=plain_key(record["name"]),
        token_ids=tuple(tokens[offset:length]),
        token_span=(first - offset, last - offset),
    )


def _readable(text: str, name: str) -> tuple[str, int, int]:
    """Return the text without decoded padding, and the characters of the name in it (all of it if not found)."""
    while text.endswith(_END_OF_TEXT):
        text = text.removesuffix(_END_OF_TEXT)
    start = text.rfind(name)
    return (text, start, start + len(name)) if start >= 0 else (text, 0, len(text))


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
