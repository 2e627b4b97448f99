"""Export tasks as a table that `UserData` can read: the same texts, labels and people.

export_rows(load_probe_texts(["gender"]), Path("gender.csv"))
load_task("gender.csv")
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.whole_file import replacing
from delta_selectivity.tasks.types import ProbeTexts

logger = logging.getLogger(__name__)

COLUMNS = ("text", "label", "group", "start", "end", "task", "dataset")
Line = dict[str, Any]


def export_rows(texts: ProbeTexts, path: Path) -> int:
    """Write one line for each row of each probe; the suffix determines the format.

    Args:
        texts: Result of `load_probe_texts`: distinct rows, already sampled.
        path: A .csv, .jsonl or .parquet file, replaced atomically. Its columns are those of `UserData`, and `dataset`:
            `task` is the probe, `label` 0 or 1, `group` the key of the person, `start` and `end` the probed characters.

    Returns:
        The number of lines.

    Raises:
        RequestError: The suffix is unknown, two probes have the same name, or the file cannot be written.
    """
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise RequestError(f"{path}: unknown suffix {path.suffix!r}: give {', '.join(_WRITERS)}")
    names = [probe.name for dataset in texts.datasets for probe in dataset.probes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"{path}: two probes have the name {twice[0]!r}: export their datasets to two files")
    if any(mention.token_ids is not None for mention in texts.mentions):
        logger.warning(
            "%s: a table does not store the token ids of these texts, so they may be tokenised differently", path
        )
    lines = list(_lines(texts))
    try:
        with replacing(path, "wb") as file:
            write(lines, file)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
    return len(lines)


def _lines(texts: ProbeTexts) -> Iterator[Line]:
    for dataset in texts.datasets:
        for probe in dataset.probes:
            for place, label in zip(probe.mentions.tolist(), probe.labels.tolist(), strict=True):
                mention = texts.mentions[place]
                span = (mention.start, mention.end)
                values = (mention.text, int(label), mention.person, *span, probe.name, dataset.name)
                yield dict(zip(COLUMNS, values, strict=True))


def _write_csv(lines: list[Line], file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(lines)
    text.flush()
    text.detach()


def _write_jsonl(lines: list[Line], file: IO[bytes]) -> None:
    file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _write_parquet(lines: list[Line], file: IO[bytes]) -> None:
    import pyarrow  # needed for this format only
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), file)


_WRITERS: dict[str, Callable[[list[Line], IO[bytes]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
