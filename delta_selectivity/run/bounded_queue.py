"""A queue between two threads, bounded in bytes, that passes errors both ways.

`queue.Queue` bounds the number of items, and if one thread dies, the other waits forever. Here a failure on one side
wakes the other at once: the consumer gets the items already produced and then `ProducerFailed`; the producer gets
`QueueCancelled` at its next `put`.

    pytest tests/test_bounded_queue.py
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ProducerFailed(RuntimeError):
    """Error raised in the consumer when the producer stopped with the error in `__cause__`."""


class QueueCancelled(RuntimeError):
    """Error raised in the producer when the consumer has stopped."""


class BoundedQueue(Generic[T]):
    """A FIFO queue whose `put` waits while the queue holds more than `max_bytes`.

    An item larger than `max_bytes` is accepted when the queue is empty, so no item waits forever.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[T], int]) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._cancelled = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        """Bytes waiting now."""
        return self._bytes

    def put(self, item: T) -> None:
        """Append `item`; wait until there is room. Raises `QueueCancelled` if the consumer has stopped."""
        size = self._size_of(item)
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or not self._items or self._bytes + size <= self._max_bytes)
            if self._cancelled:
                raise QueueCancelled("the consumer takes no more items")
            if self._closed:
                raise ValueError("put after close")
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify_all()

    def close(self) -> None:
        """End the queue: the consumer's iteration stops after the last item."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Report the producer's failure: the consumer gets the remaining items, then `ProducerFailed` from `error`."""
        with self._changed:
            self._failure = error
            self._closed = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Report that the consumer stopped: drop all items and wake the producer with `QueueCancelled`."""
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._bytes = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed or self._cancelled)
                if self._cancelled:
                    return
                if not self._items:
                    if self._failure is not None:
                        raise ProducerFailed(str(self._failure)) from self._failure
                    return
                item, size = self._items.popleft()
                self._bytes -= size
                self._changed.notify_all()
            yield item
