"""Find a person's name at the end of a text, and the key that identifies the person.

The Wikidata prompts end at the end of a name whose start is not marked. This package takes the last two words as the
name, which groups 'Edward I of England' with 'Eleanor of England'. This is the safe choice for folds by person: two
people may share a group, but no person is in two groups.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

import regex  # for Unicode word boundaries, which `re` lacks

_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_BOUNDARY = regex.compile(r"\b", flags=regex.WORD)
_MAX_SEARCH = 200  # characters at the end of a text in which to search its last word

_INNER_MARKS = ".-'’\u00ad"  # allowed inside a name; the last is the soft hyphen of hyphenated words in books

# What separates a name from the word before it: 'others.--Marianne', 'If...Andrew', 'Gov.Gina' (but not 'J.K.').
_JOINT = re.compile(r"--+|\.\.+|(?<=[a-z]{2})\.(?=[A-Z])")
_POSSESSIVE = re.compile(r"['’]s$", re.IGNORECASE)


def last_words(text: str, count: int) -> tuple[int, int] | None:
    """Return the characters [start, end) of the last `count` words (or all, if fewer); None without a word."""
    shown = text.rstrip()
    parts = shown.rsplit(None, count)  # the words, preceded by the remaining text if there is any
    if not parts:
        return None
    before = len(parts[0]) if len(parts) > count else 0
    return len(shown) - len(shown[before:].lstrip()), len(shown)


def last_word(text: str) -> tuple[int, int] | None:
    """Return the characters [start, end) of the last word, including the punctuation after it; None without a word.

    Words are separated by spaces. In scripts without spaces (Chinese, Japanese, Thai, ...) they are the Unicode
    segments of UAX 29, which uses no dictionary: an ideograph, a run of Katakana, a syllable of Thai.
    """
    span = last_words(text, 1)
    if span is None or text.isascii() or not _UNSPACED.search(text, *span):
        return span
    start = max(span[0], span[1] - _MAX_SEARCH)
    inside = text[start : span[1]]
    borders = [0, *(found.start() for found in _BOUNDARY.finditer(inside)), len(inside)]
    for begin, end in reversed(list(itertools.pairwise(borders))):
        if any(char.isalnum() for char in inside[begin:end]):
            return start + begin, span[1]
    return start, span[1]


def name_span(text: str) -> tuple[int, int] | None:
    """Return the characters [start, end) of the name at the end of `text`: its last two words.

    Whitespace after the name is excluded, and so is text attached to its front: the span of
    '... Darryl Dawkins,Moses Malone' is 'Moses Malone'. None if the text has no word.
    """
    span = last_words(text, 2)
    if span is None:
        return None
    start, end = span
    first, *rest = text[start:end].split()
    return (start + first.rfind(_name_part(first)), end) if rest else span


def person_key(name: str) -> str:
    """Return the key of the person named by `name` (the text of a `name_span`).

    It is casefolded, without punctuation, accents and a possessive 's: 'J.K. ROWLING’s' and 'JK Rowling' are equal.
    A name that is only punctuation is its own key.
    """
    words = _POSSESSIVE.sub("", name.strip()).split()
    kept = (_letters(word) for word in words)
    return " ".join(word for word in kept if word) or plain_key(name)


def plain_key(name: str) -> str:
    """Return casefolded `name` in NFKC with single spaces: the key if the source names the person."""
    return " ".join(unicodedata.normalize("NFKC", name.casefold()).split())


def _letters(word: str) -> str:
    folded = word.casefold()
    if folded.isascii() and folded.isalnum():  # the usual case
        return folded
    decomposed = unicodedata.normalize("NFKD", folded)
    return "".join(char for char in decomposed if char.isalnum())


def _name_part(word: str) -> str:
    """Return the end of `word` that can be a name: '(Lucy' -> 'Lucy'; `word` itself if no part can."""
    if word.isalpha():  # the usual case
        return word
    end = len(word)
    while end and not _is_name_character(word[end - 1]):
        end -= 1
    start = end
    while start and _is_name_character(word[start - 1]):
        start -= 1
    return _JOINT.split(word[start:end])[-1].lstrip(_INNER_MARKS) or word


def _is_name_character(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM" or char in _INNER_MARKS
