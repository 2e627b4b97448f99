"""Select the rows that `shuffle_select_n` keeps: shared evenly among row sets, with balanced classes, by seed.

Selections are nested: with one seed, the rows kept for n are among those kept for any larger n.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.types import Int64Array, RowSet, Task


def select_rows(source: Task, n: int | None, seed: int, allow_one_class: bool = False) -> Task:
    """Keep at most `n` rows of `source` over its row sets (None: all), in the original order.

    Raises `RequestError` if `n` leaves a class of some probe without rows, unless `allow_one_class`.
    """
    if n is None:
        return source
    shares = _allocate([len(row_set.rows) for row_set in source.row_sets], n)
    if not (allow_one_class or _keeps_every_class(source, shares)):
        raise RequestError(
            f"`shuffle_select_n` {n} leaves a probe of {source.slug} without one of its classes: "
            f"give at least {_min_rows(source, n)} rows"
        )
    kept = tuple(
        _draw(row_set, share, _generator(seed, source.slug, row_set.name))
        for row_set, share in zip(source.row_sets, shares, strict=True)
    )
    return replace(source, row_sets=kept)


def _draw(row_set: RowSet, n: int, rng: np.random.Generator) -> RowSet:
    chosen = _balanced_order([row.value for row in row_set.rows], rng)[:n]
    return RowSet(tuple(row_set.rows[i] for i in np.sort(chosen)), row_set.probes)


def _balanced_order(values: Sequence[str], rng: np.random.Generator) -> Int64Array:
    """Return shuffled row indices [n] that alternate between the classes, so that every prefix is balanced."""
    codes = np.unique(np.asarray(values, dtype=object), return_inverse=True)[1]
    turn = np.empty(len(codes), dtype=np.int64)
    for code in range(int(codes.max()) + 1):
        members = np.flatnonzero(codes == code)
        turn[members] = rng.permutation(len(members))
    return np.lexsort((codes, turn)).astype(np.int64)


def _allocate(available: Sequence[int], n: int) -> list[int]:
    """Split `n` rows over row sets of these sizes as evenly as possible; the first get the remainder."""
    shares = [0] * len(available)
    while (remaining := n - sum(shares)) > 0:
        unfilled = [i for i, size in enumerate(available) if shares[i] < size]
        if not unfilled:
            break
        if remaining < len(unfilled):
            step, unfilled = 1, unfilled[:remaining]
        else:
            step = min(remaining // len(unfilled), *(available[i] - shares[i] for i in unfilled))
        for i in unfilled:
            shares[i] += step
    return shares


def _keeps_every_class(source: Task, shares: Sequence[int]) -> bool:
    # rows alternate between the classes, so the first round has a row of each
    counts = (len({row.value for row in row_set.rows}) for row_set in source.row_sets)
    return all(share >= classes for share, classes in zip(shares, counts, strict=True))


def _min_rows(source: Task, n: int) -> int:
    sizes = [len(row_set.rows) for row_set in source.row_sets]
    return next(m for m in itertools.count(n + 1) if _keeps_every_class(source, _allocate(sizes, m)))


def _generator(seed: int, slug: str, row_set: str) -> np.random.Generator:
    # one stream per row set, so that the selection does not depend on which other datasets are requested
    return np.random.default_rng([seed, zlib.crc32(f"{slug}/{row_set}".encode())])
