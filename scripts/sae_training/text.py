"""Read a folder of text and cut it into rows of tokens: some to train on, and held-out ones."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from delta_selectivity.errors import RequestError
from scripts.demo_training.corpus import is_held_out
from scripts.demo_training.streams import encode

KINDS = (".txt", ".jsonl", ".jsonl.xz")
CHARACTERS = 6  # characters to read per requested token; an English token has about 4


@dataclass(frozen=True)
class Texts:
    """Documents in shuffled order."""

    train: list[str]
    held_out: list[str]


def text_files(folder: Path) -> list[Path]:
    """Return the files to read. Raises `RequestError` if there are none."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    paths = [path for path in files if path.is_file() and path.name.endswith(KINDS)]
    if not paths:
        raise RequestError(f"`text` {folder}: no {', '.join(KINDS)} there")
    return paths


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """Yield documents: each .txt file is one; in JSON lines, each line's `text`."""
    for path in files:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
            continue
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RequestError(f"`text` {path}, line {number}: not a JSON object with `text`") from error


def choose_texts(folder: Path, tokens: int, held_out_tokens: int, seed: int) -> Texts:
    """Choose about as much text as is needed, in documents drawn uniformly from all files.

    The files are read twice, so that no more than the needed text is in memory. One document in 100, by hash, is held
    out.
    """
    files = text_files(folder)
    size = {False: 0, True: 0}
    for text in read_documents(files):
        size[is_held_out(text)] += len(text)
    share = {
        held_out: wanted * CHARACTERS / max(1, size[held_out])
        for held_out, wanted in {False: tokens, True: held_out_tokens}.items()
    }
    chosen: dict[bool, list[str]] = {False: [], True: []}
    for text in read_documents(files):
        held_out = is_held_out(text)
        digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
        if int.from_bytes(digest[:8], "big") < share[held_out] * 2**64:
            chosen[held_out].append(text)
    for texts in chosen.values():
        random.Random(seed).shuffle(texts)
    if not all(chosen.values()):
        raise RequestError(f"`text` {folder}: too few documents; one in 100 is held out")
    return Texts(chosen[False], chosen[True])


def token_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, bos: int | None, length: int, tokens: int
) -> Tensor:
    """Return int32 [rows, length]: BOS and the next tokens; inside a row, BOS stands before each new document.

    Returns as many rows as have the requested number of tokens besides their first, or as the texts suffice for.
    """
    opening = [] if bos is None else [bos]
    step, wanted = length - len(opening), -(-tokens // (length - len(opening)))
    stream, rows = list[int](), list[list[int]]()
    for ids in encode({"": list(texts)}, tokenizer)[""]:
        stream += opening + ids.tolist()
        while len(stream) > step and len(rows) < wanted:
            first = len(opening) if stream[0] == bos else 0
            rows.append(opening + stream[first : first + step])
            del stream[: first + step]
        if len(rows) == wanted:
            break
    return torch.tensor(rows, dtype=torch.int32).view(-1, length)
