"""Token streams, one per source, mixed row by row in fixed shares."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .corpus import Document, read_corpus
from .people import Person, from_biography, from_congress, from_pantheon, with_gender_by_first_name
from .statements import annotated, statements

BOS_ID = 0
BIOGRAPHIES = "wikipedia-featured-biographies"
SHARES = {  # of the rows; featured biographies are seen about twice, telegraphic Congress text about half
    BIOGRAPHIES: 0.46, "bold": 0.10, "gap": 0.07, "wikitext": 0.05, "gutenberg": 0.02,
    "congress-bioguide": 0.07, "statements": 0.23,
}  # fmt: skip
NATURAL_SHARES = {  # for the SAEs: more running text, fewer templates
    BIOGRAPHIES: 0.52, "bold": 0.12, "gap": 0.09, "wikitext": 0.08, "gutenberg": 0.03,
    "congress-bioguide": 0.08, "statements": 0.08,
}  # fmt: skip


class Source:
    """Documents of one kind as token ids, returned endlessly in shuffled order."""

    def __init__(self, documents: list[np.ndarray], rng: random.Random) -> None:
        self.documents, self.rng = documents, rng
        self.tokens = sum(len(d) + 1 for d in documents)
        self.epochs = -1
        self._refill()

    def _refill(self) -> None:
        order = list(range(len(self.documents)))
        self.rng.shuffle(order)
        bos = np.array([BOS_ID], dtype=np.int32)
        self.buffer = np.concatenate([part for i in order for part in (bos, self.documents[i])])
        self.at, self.epochs = 0, self.epochs + 1

    def row(self, length: int) -> np.ndarray:
        """Return BOS and the next tokens; inside the row, BOS stands before each new document."""
        if self.at + length > len(self.buffer):
            self._refill()
        start = self.at + (self.buffer[self.at] == BOS_ID)
        self.at = int(start) + length - 1
        return np.concatenate([[BOS_ID], self.buffer[start : self.at]])


class TextMix:
    """Training rows drawn from the sources by share, and fixed held-out rows."""

    def __init__(
        self,
        train: dict[str, list[np.ndarray]],
        held_out: dict[str, list[np.ndarray]],
        shares: dict[str, float],
        seed: int,
    ) -> None:
        self.rng = random.Random(seed)
        self.shares = shares
        self.sources = {name: Source(train[name], self.rng) for name in shares}
        self.held_out = held_out

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Return token ids `[rows, length]`."""
        names = self.rng.choices(list(self.shares), weights=list(self.shares.values()), k=rows)
        return torch.from_numpy(np.stack([self.sources[name].row(length) for name in names]).astype(np.int64))

    def validation(self, length: int, statements_only: bool = False) -> torch.Tensor:
        """Return all held-out text cut into rows `[rows, length]`, each beginning with BOS."""
        rows = []
        for name, documents in self.held_out.items():
            if (name == "statements") != statements_only:
                continue
            source = Source(documents, random.Random(0))
            rows += [source.row(length) for _ in range(len(source.buffer) // length)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def epochs(self) -> dict[str, float]:
        return {n: round(s.epochs + s.at / len(s.buffer), 2) for n, s in self.sources.items()}


def texts_by_source(shared: Path, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return training and held-out texts. The statements use no people of held-out biographies."""
    rng = random.Random(seed)
    train: dict[str, list[str]] = defaultdict(list)
    held_out: dict[str, list[str]] = defaultdict(list)
    people: list[Person] = []
    for document in read_corpus(shared):
        if document.held_out:
            held_out[document.source].append(document.text)
            continue
        person = _person(document)
        text = document.text
        if person is not None:
            people.append(person)
            if document.source == BIOGRAPHIES:
                text = annotated(text, person, rng)
        train[document.source].append(text)
    tables = shared / "people"
    people += from_pantheon(tables / "pantheon.tsv")
    for name in ("legislators-current.csv", "legislators-historical.csv"):
        people += from_congress(tables / name)
    made = list(statements(with_gender_by_first_name(people), seed))
    cut = len(made) // 100
    train["statements"], held_out["statements"] = made[cut:], made[:cut]
    return dict(train), dict(held_out)


def _person(document: Document) -> Person | None:
    return from_biography(document) if document.source in (BIOGRAPHIES, "bold") else None


def encode(texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[np.ndarray]]:
    backend = tokenizer.backend_tokenizer
    return {name: list(_ids(backend, documents)) for name, documents in texts.items()}


def _ids(backend: Tokenizer, documents: list[str]) -> Iterator[np.ndarray]:
    for start in range(0, len(documents), 2000):
        for encoding in backend.encode_batch_fast(documents[start : start + 2000], add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.int32)


def load_mix(shared: Path, tokenizer: PreTrainedTokenizerBase, shares: dict[str, float], seed: int) -> TextMix:
    train, held_out = texts_by_source(shared, seed)
    return TextMix(encode(train, tokenizer), encode(held_out, tokenizer), shares, seed)
