"""Extract what the tasks need from an entity of the dump.

The format: doc.wikimedia.org/Wikibase/master/php/docs_topics_json.html. Of a property's statements, those of the best
rank count: the preferred ones if there are any, else the normal ones, but never deprecated ones. An empty map is `[]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.wikidata_build import classes as c

LANGUAGES = ("en", "mul")  # `mul` has labels that are the same in most languages; an item may have it instead of `en`
MIN_NAME_LENGTH = 8  # minimum characters, as in the paper
MAX_WORDS = 8
_WORD = re.compile(r"\w+")
_TIME = re.compile(r"[+-]\d+")
_DECADE = 8  # precision of a time: 8 is a decade, 9 a year, 11 a day

Entity = Mapping[str, Any]


@dataclass(frozen=True)
class Person:
    """What is stored of a human."""

    name: str
    prominence: int  # number of properties with statements, which is high for well-known people
    gender: int  # codes of the classes
    politics: int
    is_alive: int
    occupations: tuple[int, ...]  # items


def item_number(entity: Entity) -> int:
    """Return 42 for the entity Q42. Raises `ValueError` if it is not an item (but a property or a lexeme)."""
    return int(str(entity["id"]).removeprefix("Q"))


def person_of(entity: Entity) -> Person | None:
    """Return None for entities that are not human, or whose name cannot be searched for (two to eight words)."""
    if c.HUMAN not in items_of(entity, c.INSTANCE_OF):
        return None
    name = _name(entity)
    if name is None:
        return None
    occupations = items_of(entity, c.OCCUPATION)
    in_politics = c.POLITICIAN in occupations
    return Person(
        name=name,
        prominence=len(_map(entity.get("claims"))),
        gender=one_code(items_of(entity, c.SEX_OR_GENDER), c.GENDER_ITEMS),
        politics=one_code(items_of(entity, c.PARTY), c.PARTY_ITEMS) if in_politics else c.NONE,
        is_alive=_is_alive(entity),
        occupations=occupations,
    )


def one_code(items: tuple[int, ...], codes: Mapping[int, int]) -> int:
    """Return the one class among `items`; items that are not a class do not count."""
    known = {codes[item] for item in items if item in codes}
    return c.SEVERAL if len(known) > 1 else known.pop() if known else c.NONE


def items_of(entity: Entity, prop: str) -> tuple[int, ...]:
    """Return the items that the property has as values, without duplicates."""
    values = (snak["datavalue"]["value"] for snak in _best_statements(entity, prop) if snak["snaktype"] == "value")
    return tuple(dict.fromkeys(value.get("numeric-id") or int(value["id"][1:]) for value in values))


def _is_alive(entity: Entity) -> int:
    """Return True for a recent birth without a death, False for a death that is not too recent, else None."""
    deaths, births = _best_statements(entity, c.DIED), _best_statements(entity, c.BORN)
    died = [snak for snak in deaths if snak["snaktype"] != "novalue"]  # "no value": known to be alive
    if died:
        years = [_year(snak) for snak in died]
        return 2 if all(year is not None and year <= c.LAST_DEATH for year in years) else c.NONE
    born = [_year(snak) for snak in births]
    return 1 if born and all(year is not None and year >= c.FIRST_LIVING_BIRTH for year in born) else c.NONE


def _year(snak: Mapping[str, Any]) -> int | None:
    """Return the year of a time that is known at least to the decade."""
    if snak["snaktype"] != "value":
        return None
    value = snak["datavalue"]["value"]
    year = _TIME.match(value["time"])
    return int(year[0]) if year and value.get("precision", _DECADE) >= _DECADE else None


def _best_statements(entity: Entity, prop: str) -> list[Mapping[str, Any]]:
    """Return the main snaks of the statements of the best rank."""
    statements = _map(entity.get("claims")).get(prop, ())
    ranked = {rank: [s["mainsnak"] for s in statements if s["rank"] == rank] for rank in ("preferred", "normal")}
    return ranked["preferred"] or ranked["normal"]


def _name(entity: Entity) -> str | None:
    labels = _map(entity.get("labels"))
    label = next((labels[language]["value"] for language in LANGUAGES if language in labels), "")
    name = " ".join(label.split()).rstrip(".")
    if len(name) < MIN_NAME_LENGTH or " " not in name or not 2 <= len(words := _WORD.findall(name)) <= MAX_WORDS:
        return None
    return name if name.startswith(words[0]) and name.endswith(words[-1]) else None


def _map(value: Any) -> Mapping[str, Any]:
    return value or {}
