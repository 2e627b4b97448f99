"""The texts behind the rows of a result file, kept beside its scores.

    kept = load(Path("results/tiny-pythia_wikidata_gender.scores/texts.json.gz"))
    kept.texts[kept.rows["gender"][17]]         # the text of row 17 in the stored scores of probe `gender`

Each result file has one gzip file of JSON for all its layers. The file stores the data hash from `_run.key`, so that a
reader can detect that it belongs to other data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from delta_selectivity.errors import RequestError
from delta_selectivity.records.scores import folder_of
from delta_selectivity.system.whole_file import refuse_link, replacing, sweep

if TYPE_CHECKING:
    from delta_selectivity.tasks import Dataset, ProbeTexts

FORMAT = 1
NAME = "texts.json.gz"


@dataclass(frozen=True)
class Text:
    """One text, and the characters [start, end) of it that were probed."""

    text: str
    start: int
    end: int
    person: str  # key of the person

    @property
    def name(self) -> str:
        """The probed characters."""
        return self.text[self.start : self.end]


@dataclass(frozen=True, eq=False)  # compared by identity, so that instances can be cache keys
class KeptTexts:
    """The texts of a dataset, and the text of each row of each probe."""

    data: str  # hash of the dataset, as in `_run.key`
    texts: Sequence[Text]
    rows: Mapping[str, NDArray[np.int64]]  # probe -> [rows] indices into `texts`, in the order of the stored scores


def of_dataset(texts: ProbeTexts, dataset: Dataset, rows_of: Callable[[NDArray[np.int64]], Any]) -> KeptTexts:
    """Return the texts of a dataset, each once.

    Args:
        texts: All texts.
        dataset: The dataset, with the mentions of each probe.
        rows_of: Returns the number of rows of each of the given mentions.
    """
    from delta_selectivity.tasks import dataset_fingerprint  # imports torch, which reports do not need

    used = np.unique(np.concatenate([probe.mentions for probe in dataset.probes]))
    texts_of_rows = [texts.mentions[m] for m in used]
    return KeptTexts(
        dataset_fingerprint(texts, dataset),
        [Text(m.text, m.start, m.end, m.person) for m in texts_of_rows],
        {p.name: np.searchsorted(used, np.repeat(p.mentions, rows_of(p.mentions))) for p in dataset.probes},
    )


def path_of(result_file: Path) -> Path:
    """Return the path of the texts of a result file."""
    return folder_of(result_file) / NAME


def to_bytes(kept: KeptTexts) -> bytes:
    """Return the content of the file; the same texts give the same bytes."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "data": kept.data,
        "texts": [[text.text, text.start, text.end, text.person] for text in kept.texts],
        "rows": {name: rows.tolist() for name, rows in kept.rows.items()},
    }
    content["sha256"] = digest(content)
    return gzip.compress(json.dumps(content).encode(), compresslevel=4, mtime=0)


def keep(result_file: Path, content: bytes | None) -> None:
    """Write this content beside a result file, or remove its texts if the content is None.

    Raises OSError, or `RequestError` if the folder is a link.
    """
    path = path_of(result_file)
    refuse_link(path.parent)
    if content is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(exist_ok=True)
        sweep(path.parent, NAME)
        with replacing(path, "wb") as file:
            file.write(content)


def load(path: Path) -> KeptTexts:
    """Read a file of `keep`. Raises `RequestError` if it is missing, truncated, changed, or another kind of file."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        if content["format"] != FORMAT:
            raise ValueError("it is of another format")
        if content.pop("sha256") != digest(content):
            raise ValueError("it was changed after it was written")
        texts = [Text(str(text), int(start), int(end), str(person)) for text, start, end, person in content["texts"]]
        rows = {str(name): np.array(places, dtype=np.int64) for name, places in content["rows"].items()}
        if any(len(places) and not (places.min() >= 0 and places.max() < len(texts)) for places in rows.values()):
            raise ValueError("a row refers to a text that the file does not have")
        return KeptTexts(str(content["data"]), texts, rows)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise RequestError(f"{path} holds no texts of this program, or was damaged: {error}") from error


def digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything else in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
