"""Read the training text: one document per line, with a held-out share chosen by hash."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path("corpus") / "people_text.jsonl.xz"
HELD_OUT_IN = 100  # one document in this many is held out


@dataclass(frozen=True)
class Document:
    source: str
    title: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.text)


def is_held_out(text: str) -> bool:
    """Return whether a document is held out, by its hash."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_IN == 0


def detokenised(text: str) -> str:
    """Return WikiText as normal text: undo `1 @,@ 000`, ` = Title = ` and ` , `."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)%]|'s\b)", r"\1", text).replace("( ", "(")
    return re.sub(r' " ([^"\n]*?) " ', r' "\1" ', text)


def split_wikitext(text: str) -> list[str]:
    """Return the articles of a WikiText file; each begins with ` = Title = `."""
    articles = re.split(r"\n(?= = [^=\n]+ = \n)", text)
    return [detokenised(article).strip() for article in articles if len(article) > 200]


def read_corpus(shared: Path) -> list[Document]:
    """Yield every document; WikiText and Gutenberg, which are single texts, are cut into articles."""
    documents: list[Document] = []
    with lzma.open(shared / CORPUS, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            source, title, text = record["source"], record["title"], record["text"]
            if source.startswith("wikitext"):
                documents += [Document("wikitext", "", article) for article in split_wikitext(text)]
            elif source.startswith("gutenberg"):
                parts = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
                documents += [Document("gutenberg", "", part) for part in parts]
            else:
                documents.append(Document(source, title or "", text))
    return documents
