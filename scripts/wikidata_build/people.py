"""Store all humans of a dump in a few columns, and merge them to one row for each name.

A name is stored as its 64-bit hash: ten million people take 300 MB, and a name is looked up by bisection. In a billion
lookups among ten million names, the probability of one wrong match is 5e-4.
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
    """One row for each name with a known class, sorted by hash."""

    hashes: Int64Array  # [n] hash() of the name, in this process
    prefixes: Int64Array  # [m] hash() of the first two words of every name, ascending, without duplicates
    codes: dict[str, ByteArray]  # task -> [n] the class of all people with that name; NONE if they differ
    prominence: Int64Array  # [n] of the most prominent person with the name


class PeopleTable:
    """Table of people: fill it with `add` and `add_subclass`, then call `names`."""

    def __init__(self) -> None:
        self._hashes, self._prefixes = array("q"), array("q")
        self._prominence, self._counts = array("q"), array("q")  # number of occupations of each
        self._codes = {task.name: array("B") for task in (c.GENDER, c.POLITICS, c.IS_ALIVE)}
        self._occupations = array("q")
        self._children, self._parents = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, person: Person) -> None:
        """Add one human."""
        two_words = _TWO_WORDS.match(person.name)
        assert two_words is not None, person.name  # `entities` keeps names of two or more words
        self._hashes.append(hash(person.name))
        self._prefixes.append(hash(two_words[0]))
        self._prominence.append(person.prominence)
        for task, code in ((c.GENDER, person.gender), (c.POLITICS, person.politics), (c.IS_ALIVE, person.is_alive)):
            self._codes[task.name].append(code)
        self._counts.append(len(person.occupations))
        self._occupations.extend(person.occupations)

    def add_subclass(self, child: int, parents: tuple[int, ...]) -> None:
        """Add items that are a subclass of others (P279)."""
        for parent in parents:
            self._children.append(child)
            self._parents.append(parent)

    @property
    def knows_subclasses(self) -> bool:
        """Return whether any class besides the five sports is below athlete; if not, the dump is a small part."""
        return len(self.athletes()) > len(c.SPORT_ITEMS) + 1

    def athletes(self) -> set[int]:
        """Return athlete and all its subclasses at any depth; the sports of the tasks are always included."""
        children, parents = np.array(self._children, np.int64), np.array(self._parents, np.int64)
        found = np.array(sorted({c.ATHLETE, *c.SPORT_ITEMS}), np.int64)
        while True:
            wider = np.union1d(found, children[np.isin(parents, found)])
            if len(wider) == len(found):
                return set(found.tolist())
            found = wider

    def names(self) -> Names:
        """Merge people with the same name. A name has no class in a task if two of its people differ."""
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
        """Return the class of each person [n]; SEVERAL if they have occupations of two classes."""
        kinds, kind = np.unique(np.array(self._occupations, np.int64), return_inverse=True)
        codes = np.array([one_code((int(item),), items) for item in kinds], np.uint8)[kind]
        owner = np.repeat(np.arange(len(self)), np.array(self._counts, np.int64))
        return _one_each(codes, owner, len(self))


def _one_each(codes: ByteArray, owner: Int64Array, n: int) -> ByteArray:
    """Return, for each owner, the one code among its codes: NONE if it has none, SEVERAL if they differ."""
    least, most = np.full(n, c.SEVERAL, np.uint8), np.full(n, c.NONE, np.uint8)
    known = codes != c.NONE
    np.minimum.at(least, owner[known], codes[known])
    np.maximum.at(most, owner[known], codes[known])
    return np.where((least == most) | (most == c.NONE), most, c.SEVERAL).astype(np.uint8)


def _agreed(codes: ByteArray, owner: Int64Array, n: int) -> ByteArray:
    """Return, for each name, the class of all its people, as far as it is known; NONE if there are several."""
    one = _one_each(codes, owner, n)
    return np.where(one == c.SEVERAL, c.NONE, one).astype(np.uint8)
