"""The questions: Wikidata's properties, and the items that count as classes.

They are those of Gurnee et al. 2023 (arXiv 2305.01610): github.com/wesg52/sparse-probing-paper,
`probing_datasets/wikidata.py`. They list the occupations of an athlete; here, the dump's subclasses of athlete are
used. Items are numbers: 6581072 is Q6581072.
"""

from __future__ import annotations

from dataclasses import dataclass

INSTANCE_OF, SUBCLASS_OF = "P31", "P279"
SEX_OR_GENDER, OCCUPATION, PARTY, BORN, DIED = "P21", "P106", "P102", "P569", "P570"
HUMAN, ATHLETE, POLITICIAN = 5, 2066131, 82955

NONE, SEVERAL = 0, 255  # codes for "unknown" and "more than one class"; class i of a task has the code i + 1


@dataclass(frozen=True)
class Task:
    """A question about a person, whose answer is one of some classes, or unknown."""

    name: str
    classes: tuple[str, ...]  # if there are two, the first is label 1

    def label(self, code: int) -> str:
        """Return the label in the file: 1 or 0 if there are two classes, else the name of the class."""
        return str(2 - code) if len(self.classes) == 2 else self.classes[code - 1]


GENDER = Task("gender", ("female", "male"))
OCCUPATIONS = Task("occupation", ("journalist", "athlete", "actor", "politician", "researcher", "singer"))
POLITICS = Task("politics", ("Democratic Party", "Republican Party"))
SPORTS = Task("athlete", ("football", "basketball", "baseball", "soccer", "hockey"))
IS_ALIVE = Task("is_alive", ("true", "false"))
TASKS = (GENDER, OCCUPATIONS, POLITICS, SPORTS, IS_ALIVE)

GENDER_ITEMS = {6581072: 1, 6581097: 2}
PARTY_ITEMS = {29552: 1, 29468: 2}
OCCUPATION_ITEMS = {
    1930187: 1,
    33999: 3,
    POLITICIAN: 4,
    1650915: 5,
    177220: 6,
}  # code 2, athlete: every subclass of ATHLETE
SPORT_ITEMS = {19204627: 1, 3665646: 2, 10871364: 3, 937857: 4, 11774891: 5}

LAST_DEATH = 1980  # as in the paper: only deaths that are old enough for texts to mention them
FIRST_LIVING_BIRTH = 1910  # our addition: people born earlier are not alive, even if no death is recorded
