"""Collect facts about people from tables and from the first sentence of a biography.

Pantheon gives gender, occupation, birth year and country. The table of members of Congress gives gender, party and
state. A biography gives the rest ("X (born 1950) is an American actor who ...").
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .corpus import Document

DEMONYMS = {
    "UNITED STATES": "American", "UNITED KINGDOM": "British", "FRANCE": "French", "GERMANY": "German",
    "ITALY": "Italian", "RUSSIA": "Russian", "SPAIN": "Spanish", "TURKEY": "Turkish", "POLAND": "Polish",
    "NETHERLANDS": "Dutch", "AUSTRIA": "Austrian", "GREECE": "Greek", "JAPAN": "Japanese",
    "SWEDEN": "Swedish",
    "CHINA": "Chinese", "INDIA": "Indian", "BELGIUM": "Belgian", "SWITZERLAND": "Swiss", "CANADA": "Canadian",
    "BRAZIL": "Brazilian", "HUNGARY": "Hungarian", "UKRAINE": "Ukrainian", "DENMARK": "Danish",
    "ARGENTINA": "Argentine", "NORWAY": "Norwegian", "PORTUGAL": "Portuguese", "IRELAND": "Irish",
    "EGYPT": "Egyptian", "IRAN": "Iranian", "ISRAEL": "Israeli", "AUSTRALIA": "Australian",
    "FINLAND": "Finnish",
    "ROMANIA": "Romanian", "MEXICO": "Mexican", "SERBIA": "Serbian", "CROATIA": "Croatian",
    "CZECH REPUBLIC": "Czech", "SOUTH AFRICA": "South African", "SOUTH KOREA": "South Korean",
}  # fmt: skip
OCCUPATIONS = {
    "SOCCER PLAYER": ("footballer", "association football player", "soccer player", "football player"),
    "RELIGIOUS FIGURE": ("religious leader", "cleric"),
    "MILITARY PERSONNEL": ("soldier", "military officer"),
    "RACECAR DRIVER": ("racing driver",),
    "ATHLETE": ("athlete", "track and field athlete"),
    "CHESSMASTER": ("chess player",),
    "MARTIAL ARTS": ("martial artist",),
    "COMPANION": ("noble",),
    "HOCKEY PLAYER": ("ice hockey player",),
    "PHYSICIST": ("physicist", "scientist", "researcher and physicist"),
    "CHEMIST": ("chemist", "scientist", "researcher and chemist"),
    "BIOLOGIST": ("biologist", "scientist", "researcher and biologist"),
    "SINGER": ("singer", "singer and songwriter"),
    "ACTOR": ("actor", "film actor", "film and television actor"),
    "JOURNALIST": ("journalist", "reporter"),
}
STILL_ALIVE_FROM = 1938  # most people in the tables who were born later are alive; most who were born earlier are not
PREDICATE = re.compile(
    r"\b(was|is) (an? [^.;,()\n]{3,70}?)(?= who\b| whose\b| that\b| which\b| known\b| best\b| from\b|[.,;(])"
)
LIFE = re.compile(r"\((?:[^()]*?\b)?(\d{4})\s*[–-][^()]*?\b(\d{4})\)")
BORN = re.compile(r"\bborn\b[^()\n]{0,60}?\b(1[5-9]\d\d|20[01]\d)\b")


@dataclass(frozen=True)
class Person:
    """Known facts about a person; `None` is unknown."""

    name: str
    jobs: tuple[str, ...]  # phrases without an article: "American actor"
    group: str  # people of one group may be listed together: "actors"
    female: bool | None
    alive: bool
    born: int | None = None
    party: str | None = None
    state: str | None = None


def gender_of(text: str) -> bool | None:
    """Return True if "she" and "her" clearly outnumber "he", "his" and "him", and False in the opposite case."""
    words = re.findall(r"\b(he|his|him|she|her)\b", text.lower())
    her = sum(word.startswith(("sh", "her")) for word in words)
    him = len(words) - her
    return None if max(her, him) < 2 * min(her, him) + 1 else her > him


def from_biography(document: Document) -> Person | None:
    """Return the person whom a biography describes, if its first lines give their occupation."""
    head = document.text[:700]
    predicate = PREDICATE.search(head)
    names = document.title.split()
    if predicate is None or len(names) < 2 or not all(name[0].isupper() for name in (names[0], names[-1])):
        return None
    life, born = LIFE.search(head[:300]), BORN.search(head)
    job = re.sub(r"^an? ", "", predicate.group(2)).strip()
    return Person(
        name=re.sub(r" \(.*\)$", "", document.title),
        jobs=(job,),
        group=job.split()[-1],
        female=gender_of(document.text[:3000]),
        alive=predicate.group(1) == "is" and life is None,
        born=int(life.group(1)) if life else int(born.group(1)) if born else None,
    )


def with_gender_by_first_name(people: list[Person]) -> list[Person]:
    """Set unknown genders where nearly all people with the same first name share one."""
    women: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for person in people:
        if person.female is not None:
            count[person.name.split()[0]] += 1
            women[person.name.split()[0]] += person.female

    def filled(person: Person) -> Person:
        first = person.name.split()[0]
        share = women[first] / count[first] if count[first] >= 2 else 0.5
        known = person.female is not None or 0.1 < share < 0.9
        return person if known else replace(person, female=share > 0.5)

    return [filled(person) for person in people]


def from_pantheon(path: Path) -> Iterator[Person]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if not re.fullmatch(r"-?\d+", row["birthyear"] or "") or not row["occupation"]:
                continue
            nouns = OCCUPATIONS.get(row["occupation"], (row["occupation"].lower(),))
            female = row["gender"] == "Female"
            if female and row["occupation"] == "ACTOR":
                nouns = (*nouns, "actress")
            people = DEMONYMS.get(row["countryName"].upper(), "")
            jobs = tuple(f"{people} {noun}".strip() for noun in nouns)
            born = int(row["birthyear"])
            yield Person(row["name"], jobs, nouns[0], female, born >= STILL_ALIVE_FROM, born)


def from_congress(path: Path) -> Iterator[Person]:
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["party"] not in ("Democrat", "Republican") or row["birthday"] < "1830":
                continue
            chamber = "senator" if row["type"] == "sen" else "representative"
            jobs = ("American politician", f"{row['party']} politician", f"U.S. {chamber}", "politician")
            born = int(row["birthday"][:4])
            name = f"{row['nickname'] or row['first_name']} {row['last_name']}"
            alive = born >= STILL_ALIVE_FROM
            yield Person(name, jobs, "politician", row["gender"] == "F", alive, born, row["party"], row["state"])
