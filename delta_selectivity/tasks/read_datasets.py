"""Read tables with the `datasets` library: folders of `save_to_disk`, folders in the Hub's layout, and the Hub.

Since version 4, `datasets` does not run dataset scripts; datasets that need one are rejected.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.hub_access import OFFLINE, use_cache_if_unreachable
from delta_selectivity.system.unpacked import TooLarge, check_archive
from delta_selectivity.tasks.table import Table, chosen_columns, label_names, numbered, one_line
from delta_selectivity.tasks.user_data import UserData

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}(:[\w.+-]+)?", re.ASCII)
_SAVED = ("dataset_info.json", "dataset_dict.json")  # written by save_to_disk
_HUB_FILES = ("README.md", "*.csv", "*.json", "*.jsonl", "*.parquet", "data/*.parquet")  # any Hub folder has one


def is_hub_name(name: str) -> bool:
    """Return whether `name` has the form owner/name or owner/name:config."""
    return _HUB_NAME.fullmatch(name) is not None


def read_folder(path: Path, config: str | None, data: UserData) -> Table:
    """Read a folder of `save_to_disk`, or one laid out as on the Hub. Raises `RequestError` if it is neither."""
    if config is None and any((path / name).is_file() for name in _SAVED):
        return _read_saved(path, data)
    if any(next(path.glob(pattern), None) for pattern in _HUB_FILES):
        with tempfile.TemporaryDirectory(prefix="dataset_") as cache:  # local data needs no permanent copy
            return _load(str(path.absolute()), config, data, cache)
    raise RequestError(f"{data.flag}: neither a folder of datasets' save_to_disk nor one in the Hub's layout")


def read_hub(data: UserData) -> Table:
    """Read a dataset of the Hub by its name; downloads are cached where `datasets` caches them (HF_HOME)."""
    name, _, config = data.path_or_name.partition(":")
    return _load(name, config or None, data, None)


def _read_saved(path: Path, data: UserData) -> Table:
    import datasets  # slow import, needed for these folders only

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{data.flag}: not a readable folder of datasets' save_to_disk ({one_line(error)})"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        return _table(saved[_choose_split(tuple(saved), data)], data)
    if data.split is not None:
        raise RequestError(f"{data.flag}: `split` {data.split}: the folder has no splits; leave it out")
    return _table(saved, data)


def _load(name: str, config: str | None, data: UserData, cache: str | None) -> Table:
    import datasets  # slow import, needed for these only

    reachable = Path(name).exists() or use_cache_if_unreachable()
    try:
        with _quiet_datasets(), _bounded_extraction(data):
            config = _choose_config(datasets.get_dataset_config_names(name), config, data)
            split = _choose_split(datasets.get_dataset_split_names(name, config), data)
            return _table(datasets.load_dataset(name, config, split=split, cache_dir=cache), data)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # file readers, YAML, Hub client and HTTP errors have no common base class
        if not reachable:
            raise RequestError(f"{data.flag}: no such file, and not in the local Hub cache{OFFLINE}") from error
        raise RequestError(f"{data.flag}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the reason in one line; for a failed build that of its cause, since its own message has no details."""
    from datasets.exceptions import DatasetGenerationError
    from datasets.inspect import SplitsNotFoundError

    failed_build = isinstance(error, DatasetGenerationError | SplitsNotFoundError)
    reason = one_line((error.__cause__ if failed_build else None) or error)
    return f"cannot be loaded as a dataset ({reason})"


def _choose_config(found: Sequence[str], requested: str | None, data: UserData) -> str | None:
    if requested is None and len(found) > 1 and "default" not in found:
        raise RequestError(f"{data.flag}: it has several configs, give one as {data.path_or_name}:{found[0]}: "
                           f"{', '.join(found)}")  # fmt: skip
    if requested is not None and requested not in found:
        raise RequestError(f"{data.flag}: there is no config {requested!r}; found {', '.join(found)}")
    return requested


def _choose_split(found: Sequence[str], data: UserData) -> str:
    """Return the requested split, else train, else the only one."""
    choices = ", ".join(found) or "none"
    if data.split is not None and data.split not in found:
        raise RequestError(f"{data.flag}: `split` {data.split}: there is no such split; found {choices}")
    if data.split is not None:
        return data.split
    if "train" not in found and len(found) != 1:
        raise RequestError(f"{data.flag}: it has no split train, choose one with `split`: {choices}")
    return "train" if "train" in found else found[0]


def _table(dataset: Dataset, data: UserData) -> Table:
    """Return the needed columns, with class names; other columns, such as images and sounds, are not read."""
    columns = tuple(dataset.column_names)
    wanted = sorted(set(chosen_columns(data, columns).values()))
    if not wanted:
        return Table(columns, ())
    names = label_names(dataset.features)
    rows = dataset.select_columns(wanted).with_format(None)
    return Table(
        columns,
        numbered({key: names[key](value) if key in names else value for key, value in row.items()} for row in rows),
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Disable progress bars and logging of `datasets` and the Hub client; the error has all information."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _bounded_extraction(data: UserData) -> Iterator[None]:
    """Check archives before `datasets` extracts them, which it does without a limit on disk space."""
    from datasets.utils.extract import Extractor

    original = Extractor.extract

    def extract(input_path: Path | str, *more: Any) -> None:
        try:
            check_archive(Path(input_path))
        except TooLarge as error:
            raise RequestError(f"{data.flag}: {Path(input_path).name}: {error}") from error
        original(input_path, *more)

    try:
        Extractor.extract = extract
        yield
    finally:
        Extractor.extract = original
