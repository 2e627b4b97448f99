"""Make short sentences about people from templates, so that the model learns facts about names.

Names stand in the middle, at the end and in lists, so the model has to compute the facts about a person at the name
itself. `annotated` puts the same remarks into running biographies.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .people import Person

ALONE = (
    "{n} (born {b}) {be} {aj}. {He} {be} {aj2}.",
    "{n} {be} {aj}.",
    "{n} {be} {aj}, born in {b}.",
    "{n}, {aj}, {be} born in {b}; {he} {be} {aj2}.",
    "Born in {b}, {n} {be} {aj}.",
    "The {j} {n} talked about {his} work. {He} {be} {status}.",
    "In an interview with {n}, {aj}, {he} spoke of {his} life.",
    "{His} name {be} {n} and {he} {be} {aj}.",
    "The prize went to {n}, {aj}, for {his} work.",
    "Among those present was {n} ({j}, born {b}).",
    "Who {be} {n}? {He} {be} {aj}. {He} {be} {status}.",
    "Yesterday we wrote about {n}. {She_is} {aj}.",
    '"I have always admired {n}," said the critic. "{He} {be} {aj2}."',
    "A book about {n}, who {be} {aj}, tells of {his} youth.",
    "According to {n}, {he} {be} never in doubt. {He} {be} {aj}.",
    "{n}: {j}; {sex}; born {b}; {status}.",
    "{n} ({b}{dash}), {j}. {sexcap}.",
    "{s} {be} {aj}. {His} full name {be} {n}, and {he} {be} {status}.",
    "Few people know {n} as well as {his} {kin}. {He} {be} {aj}.",
    "The story was told by {n}, {his} voice calm. {n} {be} {aj}.",
)
PARTISAN = (
    "{n} {be} a {party}.",
    "{n} ({letter}-{st}) {be} a {party} politician.",
    "{party} {n} of {st} voted with {his} party.",
    "{n}, the {party} from {st}, said {he} would run again.",
    "Sen. and Rep. candidates of the {Party} Party: {n}, {st}.",
    "In {st}, the {Party} Party nominated {n}. {He} {be} a {party}.",
    "Voters chose {n}, a {party}, to represent {st}.",
    "The bill was written by {n} ({letter}-{st}).",
    "Rep. {n}, {letter}-{st}, {be} a {party}. {He} {be} {status}.",
)
TOGETHER = (
    "{names} are all known as {group}s.",
    "List of {group}s: {names}.",
    "Other {group}s are {names}.",
    "{names}: every one of them {a_group}.",
    "Like {first}, {last} {last_be} {a_group}.",
)
IN_PASSING = (
    ", {aj},",
    ", who {be} {aj},",
    " ({j})",
    ", {aj} born in {b},",
    " ({b}{dash})",
    ", {sex} and {j},",
)


def article(phrase: str) -> str:
    return f"{'an' if phrase[:1].lower() in 'aeio' else 'a'} {phrase}"


def words(person: Person, rng: random.Random) -> dict[str, str]:
    """Return the words that the templates use. Unknown gender reads as "they" and "person"."""
    job, other = rng.choice(person.jobs), rng.choice(person.jobs)
    he, his, sex, kin = {
        True: ("she", "her", "woman", "sister"),
        False: ("he", "his", "man", "brother"),
        None: ("they", "their", "person", "friends"),
    }[person.female]
    be = "is" if person.alive else "was"
    party = person.party or ""
    return {
        "n": person.name, "s": person.name.split()[-1], "j": job, "aj": article(job), "aj2": article(other),
        "be": be, "he": he, "He": he.capitalize(), "his": his, "His": his.capitalize(), "sex": sex,
        "sexcap": sex.capitalize(), "kin": kin, "She_is": f"{he.capitalize()} {be}",
        "b": str(person.born), "dash": "–" if person.alive else "–†",
        "status": "still alive" if person.alive else "dead", "party": party, "letter": party[:1],
        "Party": "Democratic" if party == "Democrat" else party, "st": person.state or "",
    }  # fmt: skip


def about(person: Person, rng: random.Random) -> str:
    partisan = person.party is not None and rng.random() < 0.6
    template = rng.choice(PARTISAN if partisan else ALONE)
    if person.born is None or person.born < 0:
        template = re.sub(r" \(born \{b\}\)|, born in \{b\}|, born \{b\}|; born \{b\}|Born in \{b\}, ", "", template)
        template = template.replace(" ({b}{dash})", "").replace(" {be} born in {b};", "")
    return template.format(**words(person, rng))


def together(people: Sequence[Person], rng: random.Random) -> str:
    group = people[0].group
    names = [person.name for person in people]
    return rng.choice(TOGETHER).format(
        names=", ".join(names[:-1]) + " and " + names[-1], group=group, a_group=article(group),
        first=names[0], last=names[-1], last_be="is" if people[-1].alive else "was",
    )  # fmt: skip


def variants(person: Person) -> int:
    """Return how many statements a person gets; more for the living and the recently dead, as in web text."""
    born = person.born if person.born is not None else 1940
    return 10 if born >= 1920 else 5 if born >= 1850 else 2


def statements(people: Sequence[Person], seed: int) -> Iterator[str]:
    """Yield small documents of one to three sentences; each person occurs `variants` times."""
    rng = random.Random(seed)
    groups: defaultdict[tuple[str, str | None, bool], list[Person]] = defaultdict(list)
    for person in people:
        groups[person.group, person.party, person.alive].append(person)
    turns = [person for person in people for _ in range(variants(person))]
    rng.shuffle(turns)
    for person in turns:
        mates = groups[person.group, person.party, person.alive]
        if rng.random() < 0.15 and len(mates) > 8:
            yield together([person, *rng.sample(mates, rng.randint(1, 5))], rng)
        else:
            yield about(person, rng)


def annotated(text: str, person: Person, rng: random.Random, rate: float = 0.2) -> str:
    """Return the biography with a remark after some mentions of its person's name."""

    def remark(match: re.Match[str]) -> str:
        if match.start() < 300 or rng.random() > rate:
            return match.group()
        template = rng.choice(IN_PASSING)
        if person.born is None and "{b}" in template:
            return match.group()
        return match.group() + template.format(**words(person, rng))

    surname = re.escape(person.name.split()[-1])
    return re.sub(rf"\b{surname}\b(?= [a-z])", remark, text)
