"""The questions: Wikidata's properties, and the items that count as classes.

As Gurnee et al. 2023 (arXiv 2305.01610) chose them: github.com/wesg52/sparse-probing-paper,
`probing_datasets/wikidata.py`. They listed the occupations that make an athlete; here they are what the dump says is
below athlete. Items are numbers here: 6581072 is Q6581072.
"""

from __future__ import annotations

from dataclasses import dataclass

INSTANCE_OF, SUBCLASS_OF = "P31", "P279"
SEX_OR_GENDER, OCCUPATION, PARTY, BORN, DIED = "P21", "P106", "P102", "P569", "P570"
HUMAN, ATHLETE, POLITICIAN = 5, 2066131, 82955

NONE, SEVERAL = 0, 255  # codes: nothing is known; more than one class. The class at i of a task has the code i + 1


@dataclass(frozen=True)
class Task:
    """One question about a person, whose answer is one of some classes, or unknown."""

    name: str
    classes: tuple[str, ...]  # of two, the first is the label 1

    def label(self, code: int) -> str:
        """What the file says: 1 or 0 where there are two classes, else the class's name."""
        return str(2 - code) if len(self.classes) == 2 else self.classes[code - 1]


GENDER = Task("gender", ("female", "male"))
OCCUPATIONS = Task("occupation", ("journalist", "athlete", "actor", "politician", "researcher", "singer"))
POLITICS = Task("politics", ("Democratic Party", "Republican Party"))
SPORTS = Task("athlete", ("football", "basketball", "baseball", "soccer", "hockey"))
IS_ALIVE = Task("is_alive", ("true", "false"))
TASKS = (GENDER, OCCUPATIONS, POLITICS, SPORTS, IS_ALIVE)

GENDER_ITEMS = {6581072: 1, 6581097: 2}
PARTY_ITEMS = {29552: 1, 29468: 2}
OCCUPATION_ITEMS = {1930187: 1, 33999: 3, POLITICIAN: 4, 1650915: 5, 177220: 6}  # 2, athlete: every subclass of ATHLETE
SPORT_ITEMS = {19204627: 1, 3665646: 2, 10871364: 3, 937857: 4, 11774891: 5}

LAST_DEATH = 1980  # theirs: of the dead, those whom texts have had time to call dead
FIRST_LIVING_BIRTH = 1910  # ours: nobody born before is alive because nobody wrote down the death
