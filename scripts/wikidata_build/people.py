"""All humans of a dump in a few columns, then one row for each name.

A name is its 64-bit hash: ten million people take 300 MB, and a name of a text is looked up by bisection. In a billion
lookups among ten million names, one is answered wrongly with probability 5e-4.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scripts.wikidata_build import classes as c
from scripts.wikidata_build.entities import Person, one_code

Int64Array = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

_TWO_WORDS = re.compile(r"\w+\W+\w+")


@dataclass(frozen=True, eq=False)
class Names:
    """One row for each name that says something, in order of hash."""

    hashes: Int64Array  # [n] hash() of the name, in this process
    prefixes: Int64Array  # [m] hash() of the first two words of every name, ascending, each once
    codes: dict[str, ByteArray]  # task -> [n] the class on which all of that name agree; NONE if they do not
    prominence: Int64Array  # [n] of the most prominent one


class PeopleTable:
    """Fill it with `add` and `add_subclass`, then ask for `names`."""

    def __init__(self) -> None:
        self._hashes, self._prefixes = array("q"), array("q")
        self._prominence, self._counts = array("q"), array("q")  # counts: occupations of each
        self._codes = {task.name: array("B") for task in (c.GENDER, c.POLITICS, c.IS_ALIVE)}
        self._occupations = array("q")
        self._children, self._parents = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, person: Person) -> None:
        """One human."""
        two_words = _TWO_WORDS.match(person.name)
        assert two_words is not None, person.name  # `entities` keeps names of two words or more
        self._hashes.append(hash(person.name))
        self._prefixes.append(hash(two_words[0]))
        self._prominence.append(person.prominence)
        for task, code in ((c.GENDER, person.gender), (c.POLITICS, person.politics), (c.IS_ALIVE, person.is_alive)):
            self._codes[task.name].append(code)
        self._counts.append(len(person.occupations))
        self._occupations.extend(person.occupations)

    def add_subclass(self, child: int, parents: tuple[int, ...]) -> None:
        """Items that are a class of others: P279."""
        for parent in parents:
            self._children.append(child)
            self._parents.append(parent)

    @property
    def knows_subclasses(self) -> bool:
        """Whether any class is below athlete, other than the five sports: else it is a small part of a dump."""
        return len(self.athletes()) > len(c.SPORT_ITEMS) + 1

    def athletes(self) -> set[int]:
        """Athlete and all below it, however deep; what the sports ask about is among them in any dump."""
        children, parents = np.array(self._children, np.int64), np.array(self._parents, np.int64)
        found = np.array(sorted({c.ATHLETE, *c.SPORT_ITEMS}), np.int64)
        while True:
            wider = np.union1d(found, children[np.isin(parents, found)])
            if len(wider) == len(found):
                return set(found.tolist())
            found = wider

    def names(self) -> Names:
        """Namesakes made one. A name is worth nothing to a task if two who bear it differ."""
        codes = {name: np.array(column, np.uint8) for name, column in self._codes.items()}
        athletes = dict.fromkeys(self.athletes(), c.OCCUPATIONS.classes.index("athlete") + 1)
        codes[c.OCCUPATIONS.name] = self._by_occupation(athletes | c.OCCUPATION_ITEMS)
        codes[c.SPORTS.name] = self._by_occupation(c.SPORT_ITEMS)
        hashes, owner = np.unique(np.array(self._hashes, np.int64), return_inverse=True)
        agreed = {name: _agreed(column, owner, len(hashes)) for name, column in codes.items()}
        prominence = np.zeros(len(hashes), np.int64)
        np.maximum.at(prominence, owner, np.array(self._prominence, np.int64))
        useful = np.any([column != c.NONE for column in agreed.values()], axis=0)
        prefixes = np.array(self._prefixes, np.int64)[useful[owner]]
        return Names(
            hashes=hashes[useful],
            prefixes=np.unique(prefixes),
            codes={name: column[useful] for name, column in agreed.items()},
            prominence=prominence[useful],
        )

    def _by_occupation(self, items: dict[int, int]) -> ByteArray:
        """The class of each person [n]: SEVERAL with occupations of two."""
        kinds, kind = np.unique(np.array(self._occupations, np.int64), return_inverse=True)
        codes = np.array([one_code((int(item),), items) for item in kinds], np.uint8)[kind]
        owner = np.repeat(np.arange(len(self)), np.array(self._counts, np.int64))
        return _one_each(codes, owner, len(self))


def _one_each(codes: ByteArray, owner: Int64Array, n: int) -> ByteArray:
    """For each owner the one code among its own: NONE if it has none, SEVERAL if they differ."""
    least, most = np.full(n, c.SEVERAL, np.uint8), np.full(n, c.NONE, np.uint8)
    known = codes != c.NONE
    np.minimum.at(least, owner[known], codes[known])
    np.maximum.at(most, owner[known], codes[known])
    return np.where((least == most) | (most == c.NONE), most, c.SEVERAL).astype(np.uint8)


def _agreed(codes: ByteArray, owner: Int64Array, n: int) -> ByteArray:
    """For each name the class of all who bear it, as far as it is known; NONE if there are several."""
    one = _one_each(codes, owner, n)
    return np.where(one == c.SEVERAL, c.NONE, one).astype(np.uint8)
