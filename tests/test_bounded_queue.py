"""The queue between the threads: order, limit in bytes, and errors in both directions without a hang."""

from __future__ import annotations

import threading
import time

import pytest

from delta_selectivity.run.bounded_queue import BoundedQueue, ProducerFailed, QueueCancelled


def in_thread(work):
    """Run `work` in a thread; return the thread and the list that will hold its exception."""
    errors: list[BaseException] = []

    def body():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, errors


def joined(thread):
    thread.join(timeout=5)
    assert not thread.is_alive(), "hangs"


def test_items_arrive_in_order_and_iteration_ends_after_close():
    queue = BoundedQueue[int](max_bytes=3, size_of=lambda item: 1)
    thread, errors = in_thread(lambda: ([queue.put(i) for i in range(100)], queue.close()))
    assert list(queue) == list(range(100))
    joined(thread)
    assert not errors


def test_never_holds_more_bytes_than_its_bound():
    queue = BoundedQueue[int](max_bytes=10, size_of=lambda item: item)
    thread, _ = in_thread(lambda: ([queue.put(4) for _ in range(20)], queue.close()))
    seen = []
    for _ in queue:
        seen.append(queue.nbytes)
        time.sleep(0.001)
    joined(thread)
    assert len(seen) == 20
    assert max(seen) <= 10


def test_an_item_above_the_bound_passes_alone():
    queue = BoundedQueue[int](max_bytes=10, size_of=lambda item: item)
    thread, errors = in_thread(lambda: ([queue.put(size) for size in (3, 50, 3)], queue.close()))
    assert list(queue) == [3, 50, 3]
    joined(thread)
    assert not errors


def test_the_consumer_gets_all_items_before_the_producers_error():
    queue = BoundedQueue[int](max_bytes=10, size_of=lambda item: 1)
    queue.put(1)
    cause = ZeroDivisionError("layer 3")
    queue.fail(cause)
    items = iter(queue)
    assert next(items) == 1
    with pytest.raises(ProducerFailed, match="layer 3") as caught:
        next(items)
    assert caught.value.__cause__ is cause


def test_a_waiting_consumer_gets_the_producers_error():
    queue = BoundedQueue[int](max_bytes=10, size_of=lambda item: 1)
    thread, errors = in_thread(lambda: list(queue))
    time.sleep(0.05)
    queue.fail(MemoryError())
    joined(thread)
    assert isinstance(errors[0], ProducerFailed)


def test_a_waiting_producer_gets_the_consumers_error():
    queue = BoundedQueue[int](max_bytes=1, size_of=lambda item: 1)
    queue.put(0)
    thread, errors = in_thread(lambda: queue.put(1))
    time.sleep(0.05)
    assert thread.is_alive(), "there is no room: put must wait"
    queue.cancel()
    joined(thread)
    assert isinstance(errors[0], QueueCancelled)
    with pytest.raises(QueueCancelled):
        queue.put(2)


def test_an_invalid_bound_is_rejected():
    with pytest.raises(ValueError, match="positive"):
        BoundedQueue[int](max_bytes=0, size_of=lambda item: 1)
