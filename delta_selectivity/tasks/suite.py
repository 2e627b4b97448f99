"""The tasks of sae-probes, each a data file of its wheel, probed at the last token of the text.

This is the suite of Kantamneni et al. 2025 (arXiv 2502.16681). Rows are repeated, and different rows have the same
subject. Rows that share a subject form a group, by the rules in `suite_files.GROUPINGS`.

    load_suite_task("117_us_state_FL")
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.data_wheel import WHEEL, read_labelled
from delta_selectivity.tasks.people import name_span, person_key, plain_key
from delta_selectivity.tasks.suite_files import STEMS, family_of, grouping_of, is_regression, source_of
from delta_selectivity.tasks.types import Mention, ProbeSpec, Row, RowSet, Task

MAX_SPAN = 64  # characters; a longer span is not a name and may not fit into a model's context
MAX_KEY = 80  # characters of a group's key; a longer key is cut and ends with a digest

_QUALIFIER = re.compile(r"[,(]")
_AFTER_QUESTION = re.compile(r"\n|\||\[SEP\]|\(A\)")
_NO_LETTER = re.compile(r"[^\w\s]|_")
_NO_ASCII_LETTER = {code: None for code in range(128) if _NO_LETTER.match(chr(code))}


def load_suite_task(name: str) -> Task:
    """Read a task of `suite_files.ALL` with all rows; each of several classes is a probe against the rest.

    Raises `RequestError` if its file is not available, or holds numbers instead of classes.
    """
    if is_regression(name):
        raise RequestError(f"`tasks` {name}: its labels are numbers, not classes, so it cannot be probed")
    stem, grouping = STEMS[name], grouping_of(name)
    mentions: dict[str, Mention] = {}  # rows repeat, and each text is processed once
    rows = []
    for text, target in read_labelled(stem):
        if text not in mentions:
            mentions[text] = _mention(text, grouping)
        rows.append(Row(mentions[text], target))
    row_sets = (RowSet(tuple(rows), _probes(stem, rows)),)
    return Task(name, name, row_sets, True, family_of(name), source_of(name), grouping)


def group_key(text: str, grouping: str) -> str:
    """Return the key of a text's group, by a rule of `suite_files.GROUPINGS`."""
    return _GROUP_KEYS[grouping](text)


def _mention(text: str, grouping: str) -> Mention:
    """Return a mention of the text's last words up to its very end, so that the last token is always probed."""
    span = name_span(text)
    if span is None:
        raise RequestError(f"{WHEEL.distribution} has a prompt without a word, {text!r}: {WHEEL.install_command}")
    return Mention(text, max(span[0], len(text) - MAX_SPAN), len(text), group_key(text, grouping))


def _probes(stem: str, rows: list[Row]) -> tuple[ProbeSpec, ...]:
    """Return the probes; the later of two classes is the positive one, as in sae-probes."""
    tag = stem.partition("_")[2].replace(" ", "_")
    values = sorted({row.value for row in rows})
    if len(values) == 2:
        return (ProbeSpec(tag, values[1]),)
    return tuple(ProbeSpec(f"{tag}_is_{value.replace(' ', '_')}", value) for value in values)


def _person(text: str) -> str:
    span = name_span(text)
    return plain_key(text) if span is None else person_key(text[slice(*span)])


def _letters(text: str) -> str:
    """Return the text's letters and digits without case and accents; the text itself if it has none."""
    folded = text.casefold()
    if folded.isascii():  # the usual case
        letters = folded.translate(_NO_ASCII_LETTER)
    else:
        letters = _NO_LETTER.sub("", unicodedata.normalize("NFKD", folded))
    key = " ".join(letters.split()) or plain_key(text)
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - 17]} {hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def _part_before(separator: re.Pattern[str], text: str) -> str:
    """Return the part before the first separator, or between separators if that is empty."""
    return next((part for part in separator.split(text) if part.strip()), text)


_GROUP_KEYS: dict[str, Callable[[str], str]] = {
    "person": _person,
    "name": lambda text: _letters(_part_before(_QUALIFIER, text)),
    "question": lambda text: _letters(_part_before(_AFTER_QUESTION, text)),
    "text": _letters,
}
