"""The available tasks, and how a name is resolved to a `Task`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.assemble import assemble
from delta_selectivity.tasks.gurnee import load_gurnee
from delta_selectivity.tasks.suite import load_suite_task
from delta_selectivity.tasks.suite_files import OUTSIDE_WIKIDATA, SUITE, find_task, similar
from delta_selectivity.tasks.types import Mention, ProbeTexts, Task
from delta_selectivity.tasks.user_data import UserData, check_columns
from delta_selectivity.tasks.user_task import load_user_task
from delta_selectivity.tasks.wikidata import load_wikidata

DATASET_NAMES = ("gender", "occupation", "politics", "athlete", "is_alive")  # their order defines their index
TASK_GROUPS = {"wikidata": DATASET_NAMES, "sae-probes": SUITE, "all": (*DATASET_NAMES, *OUTSIDE_WIKIDATA)}
"""Names of groups of tasks; `all` has each question once."""
LOADERS: dict[str, Callable[[], Task]] = {name: partial(load_wikidata, name) for name in DATASET_NAMES}
"""Loaders of the built-in tasks other than those of sae-probes, by name in lower case."""


@dataclass(frozen=True)
class GurneeData:
    """A Wikidata task in the authors' own folders."""

    name: str  # of `DATASET_NAMES`
    data_dir: Path


TaskName = str | GurneeData | UserData | Task
"""A name of `LOADERS` or `suite_files.ALL`, a Wikidata task in other files, a user's table, or a loaded task."""


def parse_dataset_names(spec: str, wikidata_only: bool = False) -> tuple[str, ...]:
    """Parse '0,1,politics' to ('gender', 'occupation', 'politics'); duplicates are dropped, order is kept.

    0 to 4 are the Wikidata tasks, other numbers those of sae-probes; a name of `TASK_GROUPS` stands for its tasks.

    Args:
        spec: Numbers and names, separated by commas.
        wikidata_only: `all` means the Wikidata tasks, because the folders to read from have no others.

    Raises:
        RequestError: The request is empty, or a number or name does not exist.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise RequestError(f"`tasks` {spec!r} names no dataset: choose from {_choices()}")
    names: list[str] = []
    for part in parts:
        word = "wikidata" if wikidata_only and part.lower() == "all" else part.lower()
        names.extend(TASK_GROUPS[word] if word in TASK_GROUPS else [_resolve(part)])
    return tuple(dict.fromkeys(names))


def name_task(
    path_or_name: str | Path,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    data_dir: str | Path | None = None,
) -> TaskName:
    """Return the task that a name refers to: a built-in task, else the user's table. Arguments as for `load_task`."""
    name = str(path_or_name)
    if split is None and not columns and name in DATASET_NAMES:
        return name if data_dir is None else GurneeData(name, Path(os.path.expanduser(data_dir)))  # noqa: PTH111 - leaves an unknown ~user as it is
    if data_dir is not None:
        raise RequestError(f"`data_dir` {data_dir}: it can have Wikidata tasks only, not {name!r}")
    path, built_in = Path(name).expanduser(), name if name in LOADERS else find_task(name)
    exists = os.path.exists(path)  # noqa: PTH110 - False for a name that is too long
    if built_in is not None and split is None and not columns and (built_in == name or not exists):
        return built_in
    if not (path.suffix or "/" in name or exists):
        if name in TASK_GROUPS:
            raise RequestError(f"`tasks`: {name} is a group of {len(TASK_GROUPS[name])} tasks: give one task")
        known = ", ".join(DATASET_NAMES)
        raise RequestError(
            f"`tasks`: there is no task {name!r}: give a file, a task of sae-probes or one of {known}"
            f"{_suggestion(name)}"
        )
    return UserData(name, split, check_columns(columns or {}))


def load_task(
    path_or_name: str | Path,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    data_dir: str | Path | None = None,
) -> Task:
    """Load one task.

    Args:
        path_or_name: ``gender``, ``occupation``, ``politics``, ``athlete`` or ``is_alive``; a task of sae-probes by its
            name, with or without its number, such as ``glue_cola``; or a CSV, TSV, JSON, JSONL or Parquet file, a
            folder of the ``datasets`` library, or a dataset on the Hub (``owner/name`` or ``owner/name:config``) with
            columns ``text`` and ``label``, and optionally ``group``, ``start``, ``end``, ``task``.
        split: Split of the user's data to read; by default ``train``, or the only one.
        columns: Column names of the user's data by our names, such as ``{"text": "sentence"}``.
        data_dir: Folder with the Wikidata datasets of Gurnee et al. 2023 (arXiv 2305.01610), read instead of the
            data files of sae-probes.

    Returns:
        The task with all rows of the source.

    Raises:
        RequestError: The data are not available or cannot be probed; the one-line message says which and why.

    Example:
        >>> task = load_task("people.csv", columns={"text": "text"})
        >>> task.name, [probe.name for rows in task.row_sets for probe in rows.probes]
        ('people', ['people'])
    """
    return _load(name_task(path_or_name, split=split, columns=columns, data_dir=data_dir))


def load_probe_texts(
    tasks: Sequence[TaskName] | None = None, *, shuffle_select_n: int | None = None, seed: int = 0
) -> ProbeTexts:
    """Load tasks (None: all Wikidata tasks) into one deduplicated `ProbeTexts`.

    Args:
        tasks: Names or loaded tasks.
        shuffle_select_n: Maximum number of rows per task; None: all.
        seed: Seed of the sampling.

    Raises:
        RequestError: The request or the files have an error.
    """
    if shuffle_select_n is not None and shuffle_select_n < 1:
        raise RequestError(f"`shuffle_select_n` must be at least 1, got {shuffle_select_n}")
    names = DATASET_NAMES if tasks is None else tasks
    return assemble(read_tasks(names), shuffle_select_n, seed, several=len(names) > 1)


def load_tasks(tasks: Sequence[TaskName] | None = None) -> list[Task]:
    """Load the tasks with all rows. Arguments and errors as for `load_probe_texts`."""
    return list(read_tasks(DATASET_NAMES if tasks is None else tasks))


def read_tasks(tasks: Sequence[TaskName]) -> Iterator[Task]:
    """Load the tasks one at a time, because a whole suite is much larger than the rows sampled from it."""
    seen: set[str] = set()
    for name in tasks:
        task = _load(name)
        if task.slug in seen:
            raise RequestError(f"{_shown(name)}: there already is a dataset {task.name!r}: rename the file")
        seen |= {task.slug, task.name}
        yield task


def load_all_mentions(tasks: Sequence[TaskName]) -> list[Mention]:
    """Return every distinct mention of all Wikidata tasks if one of them is among `tasks`, else of these tasks.

    The order depends neither on which Wikidata tasks are named nor on the number of rows used.
    Unreadable tasks are skipped, since folders of Gurnee et al. may lack some.
    """
    named = next((task for task in tasks if isinstance(task, GurneeData) or task in DATASET_NAMES), None)
    found = {} if named is not None else _mentions(read_tasks(tasks))
    for name in DATASET_NAMES if named is not None else ():
        with suppress(RequestError):
            found |= _mentions([_load(GurneeData(name, named.data_dir) if isinstance(named, GurneeData) else name)])
    return list(found.values())


def _mentions(tasks: Iterable[Task]) -> dict[tuple[object, ...], Mention]:
    rows = (row for task in tasks for row_set in task.row_sets for row in row_set.rows)
    return {row.mention.identity: row.mention for row in rows}


def _load(task: TaskName) -> Task:
    if isinstance(task, Task):
        return task
    if isinstance(task, UserData):
        return load_user_task(task)
    if isinstance(task, GurneeData):
        return load_gurnee(_resolve(task.name), task.data_dir)
    name = _resolve(task)
    return LOADERS[name]() if name in LOADERS else load_suite_task(name)


def _shown(task: TaskName) -> str:
    if isinstance(task, UserData):
        return task.flag
    return f"`tasks` {task if isinstance(task, str) else task.name}"


def _resolve(part: str) -> str:
    """Return the task of this number or name."""
    if part.isdecimal() and int(part) < len(DATASET_NAMES):
        return DATASET_NAMES[int(part)]
    found = part.lower() if part.lower() in LOADERS else find_task(part)
    if found is not None:
        return found
    hint = f"; for your own table use `dataset_file` {part}" if Path(part).suffix or "/" in part else ""
    raise RequestError(f"`tasks`: there is no dataset {part!r}: choose from {_choices()}{_suggestion(part)}{hint}")


def _suggestion(part: str) -> str:
    found = ", ".join(similar(part))
    return f"; did you mean {found}?" if found else ""


def _choices() -> str:
    numbered = (f"{index} {name}" for index, name in enumerate(DATASET_NAMES))
    others = (name for name in LOADERS if name not in DATASET_NAMES)
    return f"{', '.join([*numbered, *others, *TASK_GROUPS])}, or a number or name of sae-probes"
