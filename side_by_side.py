"""Work for several threads whose results are wanted in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(items: Iterable[T], work: Callable[[T], R], workers: int, name: str) -> Generator[tuple[T, R], None, None]:
    """Each item with `work(item)`, in order; `workers` threads of this name are at it, and one item more waits.

    Items are taken when there is room for them: once they end, or this iterator is closed, no other work begins. One
    worker is the caller's own thread. Raises what the work raises.
    """
    if workers == 1:
        for item in items:
            yield item, work(item)
        return
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > workers:
                    item, result = waiting.popleft()
                    yield item, result.result()
            while waiting:
                item, result = waiting.popleft()
                yield item, result.result()
        finally:
            for _, result in waiting:  # nobody wants them any more
                result.cancel()
